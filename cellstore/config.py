"""What can be chosen: the parameters of every stage, each declared once.

A field says its default, and what the command line needs to know of it: help, range, choices. The
command line, its help, ``docs/commands.md`` and the commands that ``cellstore repro`` prints are
made from these fields. To add an option, add a field here, and use it.
"""

# No "from __future__ import annotations": the command line reads the types of the fields.

import dataclasses
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import partial, wraps
from numbers import Real
from os import PathLike
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from .enums import (
    DEFAULT_MODEL,
    PERTURBATION,
    TREATMENT,
    Gives,
    GroupLevel,
    Look,
    Projection,
    Subset,
)
from .errors import UnknownNameError, UserInputError

Field = dataclasses.Field[Any]
T = TypeVar("T")

RunName = str | int
"""What names a run: its number, or words such as ``latest``; see ``jobs.run_names``."""

METAVARS = {int: "N", float: "X", str: "NAME", Path: "FILE", tuple[str, ...]: "A,B,..."}
"""How the help shows the value of an option of a type."""


def option(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    section: str | None = None,
    repeated: bool = False,
    pair: str = "first",
    empty: str = "none",
    nothing: str | None = None,
    negatable: bool = False,
    unless: str | None = None,
) -> Any:
    """Declare a field of a dataclass that is an option of the command line, too.

    ``name``: of the option, where it is not that of the field. ``metavar``: of its value, where it
    is not the usual one of its type (:data:`METAVARS`). ``min`` and ``max`` may be reached,
    ``above`` and ``below`` not. ``choices``: also of the names in a list, which are kept in this
    order. ``section``: its heading in the help. A list is written with commas, or, if
    ``repeated``, one value at a time; ``empty`` is the word for a list of none. A ``pair`` is cut
    at the ``first`` or at the ``last`` ``=``. ``nothing``: the word for ``None``. ``negatable``:
    there is a ``--no-...``, too. ``unless``: another field, which decides this one where it is not
    at its default.
    """
    metadata = dict(locals())  # all of the above, by name
    return field(default=metadata.pop("default"), metadata=metadata)


def options_of(kind: Any) -> list[Field]:
    """Return the fields of a dataclass that are options.

    Of an object: those that its other values leave open; see ``unless`` of :func:`option`.
    """
    options = [item for item in fields(kind) if "help" in item.metadata]
    if isinstance(kind, type):
        return options
    deciding = {item.name for item in fields(kind) if getattr(kind, item.name) != item.default}
    return [item for item in options if item.metadata["unless"] not in deciding]


def option_of(kind: type, name: str) -> Any:
    """Return an option that a dataclass declares, for a parameter of a command."""
    return next(item for item in options_of(kind) if item.name == name)


def flag(item: Field) -> str:
    """Return the name of a field on the command line, such as ``--crop-size``."""
    return item.metadata["name"] or "--" + item.name.replace("_", "-")


def type_of(item: Field) -> Any:
    """Return the type of a field without its ``None``."""
    assert not isinstance(item.type, str), "its module imports annotations from __future__"
    if isinstance(item.type, UnionType):
        return next(kind for kind in get_args(item.type) if kind is not type(None))
    return item.type


def spelled(item: Field, value: Any) -> list[str]:
    """Return the words of a command line that ask for a value of an option."""
    name, known = flag(item), item.metadata
    if isinstance(value, bool):
        no = [f"--no-{name.removeprefix('--')}"] if known["negatable"] else []
        return [name] if value else no
    if value is None:
        texts = [known["nothing"]] if known["nothing"] else []
    elif not isinstance(value, tuple):
        texts = [repr(float(value)) if type_of(item) is float else str(value)]
    elif not value:
        texts = [] if value == item.default else [known["empty"]]
    else:
        texts = ["=".join(part) if isinstance(part, tuple) else str(part) for part in value]
        texts = texts if known["repeated"] else [",".join(texts)]
    return [f"{name}={text}" for text in texts]  # with "=": a value may begin with a dash


def unspeakable(item: Field, value: Any) -> list[str]:
    """Return the names in a list that a command line cannot hold."""
    if item.metadata["repeated"] or not isinstance(value, tuple):
        return []
    alone = [item.metadata["empty"]] if value == (item.metadata["empty"],) else []
    return alone + [text for text in value if "," in text or text != text.strip() or not text]


def typed_value(item: Field, typed: Any) -> Any:
    """Return the value of an option from what was typed: a list of words, or one value.

    Raises:
        UserInputError: a pair has no ``=``, or nothing before or after it.
    """
    kind, known = type_of(item), item.metadata
    if get_origin(kind) is not tuple:
        if known["nothing"]:
            return None if typed == known["nothing"] else kind(typed)
        return typed
    words = list(typed)
    if words == [known["empty"]]:
        return ()
    if not known["repeated"]:
        words = [part for text in words for part in text.split(",") if part.strip()]
    kind = get_args(kind)[0]
    if kind is str or kind is Path:
        return tuple(kind(word if known["repeated"] else word.strip()) for word in words)
    pairs, start = [], ""
    for word in words:
        # What has no "=" belongs to the next word: the name that it came with has a comma in it.
        start += word
        if "=" not in word and word is not words[-1] and not known["repeated"]:
            start += ","
            continue
        cut = start.partition if known["pair"] == "first" else start.rpartition
        old, _, new = (part.strip() for part in cut("="))
        if not (old and new):
            raise UserInputError(f"Write {flag(item)} {known['metavar']}, not {start!r}.")
        pairs.append((old, new))
        start = ""
    return tuple(pairs)


_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "the path of a file",
    tuple: "a list",
    Sequence: "a list",
    Mapping: "a dictionary",
}
"""What a value of a type is called in messages."""


def fitted(name: str, wanted: Any, value: Any) -> Any:
    """Return a value as one of the type that is wanted, if it says the same.

    A number stands for a text (run 5, plate 1234), one text for a list of one, a list or an array
    for a tuple, a dictionary for pairs, a text for a path; numpy's numbers become Python's. Types
    that messages have no word for are not looked at.

    Raises:
        UserInputError: it is something else; ``name`` is what the message calls it.
        UnknownNameError: it is none of the words of an enum.
    """
    kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    if Any in kinds:
        return value
    boolean = type(value).__name__ in ("bool", "bool_")
    for kind in kinds:
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool) == boolean:
            return value
    number = isinstance(value, Real) and not boolean
    whole = number and (hasattr(value, "__index__") or float(value).is_integer())
    listed = isinstance(value, Iterable) and not isinstance(
        value, str | bytes | Mapping | set | frozenset
    )
    listed = listed and getattr(value, "ndim", 1) > 0  # numpy has arrays of no dimension
    for kind in kinds:
        parts, origin = get_args(kind), get_origin(kind) or kind
        if kind is bool and boolean:
            return bool(value)
        if (kind is float and number) or (kind is int and whole):
            return kind(value)
        if kind is str and ((whole and Path not in kinds) or isinstance(value, PathLike)):
            return str(int(value) if whole else value)
        if kind is Path and isinstance(value, str | PathLike):
            return Path(value)
        if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(value, str):
            if value not in list(kind):
                noun = name.removeprefix("--").translate(str.maketrans("-_", "  "))
                raise UnknownNameError.of(noun, value, [item.value for item in kind])
            return kind(value)
        if origin is tuple or (origin is Sequence and parts[0] in (str, Path, str | Path)):
            several = ... in parts or origin is Sequence
            text = isinstance(value, str | PathLike) and parts[0] in (str, Path, str | Path)
            if several and (text or (whole and parts[0] is str)):
                value, listed = [value], True
            if several and isinstance(value, Mapping) and get_origin(parts[0]) is tuple:
                value, listed = value.items(), True
            items = list(value) if listed else []
            if listed and (several or len(items) == len(parts)):
                each = parts[:1] * len(items) if several else parts
                found = [fitted(name, *pair) for pair in zip(each, items, strict=True)]
                return tuple(found) if origin is tuple else found
            continue
        mapping = origin is Mapping and isinstance(value, Mapping)
        if mapping or (origin is Sequence and listed):  # perhaps a long array
            return value
        if origin not in _WORDS and not isinstance(kind, type):
            return value
    words = []
    for kind in kinds:
        pair = get_origin(kind) is tuple and ... not in get_args(kind)
        if kind is not type(None):
            named = _WORDS.get(get_origin(kind) or kind, f"{kind.__name__}(...)")
            words.append("a pair" if pair else named)
    plain = value is None or isinstance(value, str | Real)
    given_text = repr(value) if plain else f"a {type(value).__name__}"
    raise UserInputError(f"{name} must be {' or '.join(dict.fromkeys(words))}, not {given_text}.")


def checked(kind: type[T]) -> type[T]:
    """Let all public methods of a class take what :func:`fitted` makes of their arguments."""
    for name, method in list(vars(kind).items()):
        inner = method.__func__ if isinstance(method, classmethod) else method
        if not name.startswith("_") and inspect.isfunction(inner):
            made = _checked(inner)
            setattr(kind, name, classmethod(made) if isinstance(method, classmethod) else made)
    return kind


def _checked(method: Callable[..., T]) -> Callable[..., T]:
    hints: dict[str, Any] = {}
    known: list[inspect.Signature] = []

    @wraps(method)
    def call(*args: Any, **given: Any) -> T:
        if not known:  # at the first call: to read all signatures of a class takes a while
            signature = inspect.signature(method)
            for name, item in signature.parameters.items():
                alone = SimpleNamespace(__annotations__={name: item.annotation})
                plain = item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
                if plain and item.annotation is not item.empty:
                    with suppress(NameError):  # imported for mypy alone
                        hints.update(get_type_hints(alone, vars(sys.modules[method.__module__])))
            known.append(signature)
        signature = known[0]
        names = signature.parameters
        if all(item.kind is not item.VAR_KEYWORD for item in names.values()):
            for name in (name for name in given if name not in names):
                for kind in (one for hint in hints.values() for one in get_args(hint) or (hint,)):
                    if isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, name):
                        raise UserInputError(
                            f"{name} is an option of {kind.__name__}. Write: "
                            f"{method.__name__}({kind.__name__}({name}=...), ...)"
                        )
                raise UnknownNameError.of(f"argument of {method.__name__}", name, list(names)[1:])
        bound = signature.bind(*args, **given)
        for name, value in bound.arguments.items():
            bound.arguments[name] = fitted(name, hints.get(name, Any), value)
        return method(*bound.args, **bound.kwargs)

    return call


class Params:
    """What all parameters have in common: they are checked when they are made.

    Raises:
        UnknownNameError: there is no such parameter, or a value is none of the choices.
        UserInputError: a value is of another type (see :func:`fitted`) or out of its range, or the
            options contradict each other.
    """

    def __new__(cls, *_args: Any, **given: Any) -> Self:
        """Refuse names that are none of the fields; __init__ would only say TypeError."""
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in names:
                raise UnknownNameError.of(f"option of {cls.__name__}", name, names)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            known, name = item.metadata, flag(item) if item.metadata else item.name
            value = fitted(name, item.type, getattr(self, item.name))
            choices: Sequence[str] = known.get("choices", ())
            if choices and value is not None:
                many = isinstance(value, tuple)
                for word in value if many else (value,):
                    if word not in choices:
                        noun = f"name for {name}" if many else name[2:].replace("-", " ")
                        raise UnknownNameError.of(noun, word, choices)
                if many:  # in one order, so that equal choices are one recipe
                    value = tuple(word for word in choices if word in value)
            object.__setattr__(self, item.name, value)
            if not known or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise UserInputError(f"{name} must be a number, not {value:g}.")
            for range_of, words, fits in (
                ("min", "at least", operator.ge),
                ("max", "at most", operator.le),
                ("above", "above", operator.gt),
                ("below", "below", operator.lt),
            ):
                bound = known[range_of]
                if bound is not None and not fits(value, bound):
                    raise UserInputError(f"{name} must be {words} {bound:g}, not {value:g}.")

    @classmethod
    def of(cls, preset: str | None = None, **given: Any) -> Self:
        """Return the values of one of :data:`PRESETS`, but for those that are ``given``.

        Raises:
            UnknownNameError: there is no such preset.
        """
        if preset is None:
            return cls(**given)
        if preset not in PRESETS:
            raise UnknownNameError.of("preset", preset, PRESETS)
        return cls(**{**PRESETS[preset].get(cls, {}), **given})

    @classmethod
    def from_recipe(cls, stored: Mapping[str, Any], **changes: Any) -> Self:
        """Return the parameters that a recipe holds, but for the ``changes``.

        The other way round: ``dataclasses.asdict``. What is no field is left aside.
        """
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: stored[name] for name in names if name in stored} | changes)


BASELINES = "Instead of a network"
cells = partial(option, section="Which cells")
network = partial(option, section="The network")
learning = partial(option, section="How it learns")
hardware = partial(option, section="How it is carried out")
baseline = partial(option, section=BASELINES)

# What several dataclasses declare alike.
_plates = partial(
    option,
    (),
    "Only this plate; may be given several times. Default: all plates.",
    name="--plate",
    metavar="BARCODE",
    repeated=True,
)
_where = partial(
    option,
    None,
    "Only images that meet this condition, over plate, batch, well, well_row, well_column, site, "
    "plane, time_point, image, image_id, treatment (also called perturbation), dose, "
    "name_with_dose, target, kind, control, identifier. For example "
    "\"treatment = 'taxol' AND dose >= 1\".",
    metavar="SQL",
)
_exclude_flagged = partial(
    cells,
    None,
    "Exclude the images and cells that this quality-control run (cellstore qc) has flagged: its "
    "number, or latest.",
    metavar="RUN|latest",
)
_features = partial(
    cells,
    None,
    "The feature set that is read: its name, also of one ingested from another tool, or a group "
    "as texture (the set measured last). Default: the built-in measurements last used.",
)
_normalise = partial(
    learning,
    "train",
    "Compare features with the training subset, or first with the negative controls of their "
    "plate.",
    choices=("train", "plate-controls"),
)
_binary = partial(
    option,
    False,
    "Masks are black and white: each connected piece is a cell.",
    name="--binary-masks",
)


@dataclass(frozen=True)
class ImageInput:
    """Which plane of an image a stage looks at: ``channels`` by name, projected to one.

    No channels: the projection file if there is one, else the first three channels.
    """

    channels: tuple[str, ...] = ()
    projection: Projection = Projection.MEDIAN


@dataclass(frozen=True)
class ImageChoice(Params):
    """Some images: all that meet every condition; of these the first ``limit``."""

    plates: tuple[str, ...] = _plates()
    wells: tuple[str, ...] = option(
        (),
        "Only this well, like D14, or PLATE/D14; may be given several times.",
        name="--well",
        metavar="WELL",
        repeated=True,
    )
    where: str | None = _where()
    limit: int | None = option(None, "Only the first N images, for a first try.", min=1)


@dataclass(frozen=True)
class Selection(ImageChoice):
    """Which images a command is about."""

    images: tuple[str, ...] = option(
        (),
        "Only this image: PLATE/A01/1 (plate, well, site), core file name, file name or id; "
        "PLATE/A01: all of the well. May be given several times.",
        name="--image",
        metavar="IMAGE",
        repeated=True,
    )


EVERYTHING = Selection()
"""All images."""


@dataclass(frozen=True)
class Resources(Params):
    """Who works: processes of this machine, or a Dask cluster."""

    workers: int = option(1, "Processes that work at once; 1: this one alone.", min=1)
    scheduler: str | None = option(
        None,
        "Let the workers of this Dask scheduler work, for example tcp://host:8786.",
        metavar="ADDRESS",
    )


THIS_PROCESS = Resources()
"""No other process."""


@dataclass(frozen=True)
class Sources(Params):
    """Which rows a stage reads: a split by name, recipes by number or start of the fingerprint."""

    split: str | None = cells(None, "The split. Default: the latest.")
    segmentation: str | None = cells(
        None,
        "Which segmentation: number or start of the fingerprint, as 'cellstore status' lists "
        "them. Default: the last used.",
        metavar="RECIPE",
    )
    measurement: str | None = cells(
        None,
        "Which measurement, as 'cellstore status' lists them. Default: the last used.",
        metavar="RECIPE",
    )


@dataclass(frozen=True)
class IngestParams(Params):
    """How to read a source, and what goes with it. ``kind``: images, treatments, features, masks.

    ``plate``: the first one is that of a source of one. ``channels``: (number or name, name
    wanted). ``maps``: (old, new) beginnings of folders.
    """

    kind: str | None = None
    images: Path | None = option(
        None, "Folder in which image files are found by name.", metavar="DIR"
    )
    maps: tuple[tuple[str, str], ...] = option(
        (),
        "Folders of the source that begin with OLD are at NEW here; may be given several times. "
        "NEW may be s3://... or another object store.",
        name="--map",
        metavar="OLD=NEW",
        repeated=True,
    )
    look: Look = option(
        Look.HERE,
        "Which image files to read and hash now: those on this machine, also those in object "
        "stores, or none.",
    )
    plate: tuple[str, ...] = option(
        (),
        "The plate, for sources that name none. A plate map may have several, one after another.",
        metavar="BARCODE",
        repeated=True,
    )
    channels: tuple[tuple[str, str], ...] = option(
        (),
        "What stain each channel (number or name) shows, for example 1=Mito,2=DNA.",
        metavar="OLD=NEW,...",
    )
    pixel_size: float | None = option(
        None,
        "Micrometres per pixel, for images whose files do not say it.",
        metavar="UM",
        above=0.0,
    )
    platemap: Path | None = option(
        None, "Which treatment each well got: a table, or a folder of them with --barcodes."
    )
    sheet: str | None = option(None, "The sheet of a spreadsheet that is the plate map.")
    map_columns: tuple[tuple[str, str], ...] = option(
        (),
        "What a column of the plate map is, for example dose='Conc [nM]'; may be given several "
        "times. Also well, row, column, plate, treatment, sirna, genotype, gene, unit, control, "
        "target, cell_line, time, replicate, batch.",
        name="--map-column",
        metavar="MEANING=COLUMN",
        repeated=True,
    )
    blank: str | None = option(
        None,
        "What a well got whose cell of the plate map is blank. Default: not known.",
        choices=("DMSO", "untreated"),
    )
    controls: tuple[tuple[str, str], ...] = option(
        (),
        "Which treatments of the plate map are controls, for example DMSO=negative or "
        "taxol=positive; may be given several times.",
        name="--control",
        metavar="NAME=negative|positive",
        repeated=True,
        pair="last",
    )
    compounds: tuple[Path, ...] = option(
        (),
        "What the treatments of the platemap are: names, targets, structures; may be given "
        "several times.",
        metavar="FILE",
        repeated=True,
    )
    barcodes: Path | None = option(None, "Which platemap each plate has.")
    aliases: Path | None = option(
        None, "Names that mean the same: a table with the columns alias and name.", name="--alias"
    )
    name: str | None = option(None, "Name of the feature set, or of the masks.")
    pattern: str | None = option(
        None,
        "How image files are named, with groups named plate, well (or row and col), site, "
        "channel, plane, time.",
        metavar="REGEX",
    )
    binary: bool = _binary()
    reread: bool = option(False, "Read a source again that was read before, as it is now.")


@dataclass(frozen=True)
class CellPlanes(Params):
    """Which planes of an image show its cells.

    ``channels``: ``None`` becomes the channel of the nuclei; none: see :class:`ImageInput`.
    ``nuclei``: channels of a second plane, for networks that look at two.
    """

    channels: tuple[str, ...] | None = option(
        None,
        "Channels that show the cells, by name or number, with commas between; first-three: the "
        "first three. Default: the channel of the nuclei (DNA, DAPI, Hoechst), if there is one.",
        empty="first-three",
    )
    projection: Projection = option(Projection.MEDIAN, "How several channels become one picture.")
    nuclei: tuple[str, ...] = option(
        (),
        "Channels of the nuclei, a second picture for networks that look at two (cyto, cyto2, "
        "cyto3, cpsam). Default: none.",
    )

    @property
    def planes(self) -> tuple[ImageInput, ...]:
        """The plane of the cells, and that of the nuclei if there is one."""
        wanted = [self.channels or (), *([self.nuclei] if self.nuclei else [])]
        return tuple(ImageInput(channels, self.projection) for channels in wanted)


@dataclass(frozen=True)
class SegmentParams(CellPlanes):
    """Cellpose, on one plane of each image or on two."""

    model: str = option(
        DEFAULT_MODEL,
        "The network: cellstore-nuclei (comes with cellstore), Cellpose's cyto, cyto2, cyto3 or "
        "nuclei (with Cellpose 4: cpsam), fetched on first use; the file of your own; or run:N, "
        "what 'cellstore finetune' made in run N.",
        metavar="NAME|FILE|run:N",
    )
    flow_threshold: float = option(
        0.4, "Higher keeps cells whose shape fits the network's flows less well."
    )
    cellprob_threshold: float = option(0.0, "Lower finds more and larger cells, also dim ones.")
    diameter: float | None = option(
        None, "Diameter of the cells. Default: estimated for each image.", metavar="PIXELS", min=1.0
    )


@dataclass(frozen=True)
class FinetuneParams(CellPlanes):
    """A network that learns from corrected masks."""

    model: str = option(
        DEFAULT_MODEL,
        "The network to start from: as for 'cellstore segment'.",
        metavar="NAME|FILE|run:N",
    )
    epochs: int = option(50, "Passes over the images.", min=1)
    learning_rate: float = option(5e-4, "Largest step of AdamW.", above=0.0)
    held_out: float = option(
        0.2,
        "Share of the wells that is not learned from, only used to judge the network.",
        min=0.0,
        max=0.9,
    )
    binary: bool = _binary()
    seed: int = option(0, "Same seed, same network.", min=0)


@dataclass(frozen=True)
class MeasureParams(Params):
    """Measurements: groups of features, of which each is a recipe of its own."""

    features: tuple[str, ...] = option(
        ("basic",), "Groups of features: basic, intensity, texture; --list shows what is in them."
    )
    channels: tuple[str, ...] | None = option(
        None,
        "Channels whose intensity is measured; first-three: the first three. Default: of group "
        "basic what was segmented, of the other groups each channel there is.",
        empty="first-three",
    )
    projection: Projection = option(
        Projection.MEDIAN, "How the --channels become one picture for group basic."
    )

    @property
    def plane(self) -> ImageInput | None:
        """The plane of the intensities of group ``basic``; ``None``: the segmented one."""
        return None if self.channels is None else ImageInput(self.channels, self.projection)


@dataclass(frozen=True)
class QcParams(Params):
    """What quality control holds to be odd, against the other images or cells of the plate.

    These numbers are our choice, made so that few images of a good plate are flagged; see
    docs/explanation.md.
    """

    outlier: float = option(
        5.0,
        "How far an image may be from the plate's median: focus, background, number and area of "
        "cells, in robust standard deviations.",
    )
    cell_outlier: float = option(5.0, "The same for a cell, by the logarithm of its area.")
    saturated: float = option(
        0.01, "Share of a channel's pixels that may be saturated.", min=0.0, max=1.0
    )
    noise: float = option(
        0.5,
        "A channel that varies little, and whose power spectrum is as flat as this, is noise "
        "(white noise: 1, real fields: -3 to -0.4).",
    )
    border: bool = option(True, "Flag cells that touch the border.", negatable=True)
    min_images: int = option(
        8, "Plates with fewer images are not judged: too few to know what is usual.", min=1
    )


@dataclass(frozen=True)
class SplitParams(Params):
    """Who trains and who tests. Sizes are shares of the groups (wells, images, plates, ...)."""

    protocol: str = option(
        "grouped",
        "grouped: a well (--group) is in one subset only. published: by image, as in the published "
        "study; fields of one well are in both subsets, so scores are too good.",
        choices=("grouped", "published"),
    )
    field: str = option(
        PERTURBATION,
        "What is to be predicted: perturbation (compound, gene), treatment (each dose by itself), "
        "target, a metadata column of wells or plates (moa of Metadata_moa), or annotation: the "
        "label that people gave to images, wells or plates (cellstore annotate).",
    )
    group_level: GroupLevel = option(
        GroupLevel.WELL,
        "What stays together in one subset (grouped protocol). perturbation excludes whole "
        "compounds from training, so it needs a coarser --field.",
        name="--group",
        unless="protocol",
    )
    test_size: float = option(
        0.2, "Share of the groups for the test.", above=0.0, below=1.0, unless="folds"
    )
    validation_size: float = option(
        0.2,
        "Share of the groups that decide when to stop training (grouped protocol). 0: none, and "
        "train --epochs says how long.",
        min=0.0,
        below=1.0,
        unless="protocol",
    )
    test_plates: tuple[str, ...] = option((), "The plates for the test, with --group plate.")
    validation_plates: tuple[str, ...] = option(
        (), "The plates for the validation. Default: drawn from the others.", metavar="C,..."
    )
    folds: int | None = option(
        None,
        "Cross-validation: make the splits NAME-1 to NAME-K. Each image is in the test of one of "
        "them; the next fold is its validation.",
        metavar="K",
        min=2,
    )
    leave_out: str | None = option(
        None,
        "Cross-validation with a fold for each plate (plate), or for each value of a metadata "
        "column of wells or plates (batch, or replicate of Metadata_replicate): the fold tests "
        "it, and trains on the others.",
        metavar="plate|COLUMN",
    )
    seed: int = option(0, "Same seed, same split.", min=0)
    plates: tuple[str, ...] = _plates()
    where: str | None = _where()
    downsample: tuple[tuple[str, str], ...] | None = option(
        None,
        "Cut a class to a number of images, to second-largest or to median; may be given several "
        "times. none: cut nothing. Default: the class with most groups (wells) is cut to the "
        "groups of the second.",
        metavar="CLASS=SIZE",
        repeated=True,
        pair="last",
    )
    downsample_by: str = option(
        "image",
        "What the sizes of --downsample count; whole images are dropped.",
        choices=("image", "cell"),
    )
    min_images: int = option(0, "Exclude classes with fewer images.", min=0)
    allow_missing: bool = option(False, "Also images whose files are not here yet.")
    exclude_flagged: str | None = _exclude_flagged()

    def __post_init__(self) -> None:
        super().__post_init__()
        for label, size in self.downsample or ():
            number = size.isdecimal() and 0 < int(size) < 2**31
            if not number and size not in ("second-largest", "median"):
                raise UserInputError(
                    f"Cut {label!r} to {size!r}? Say --downsample {label}=N with a number, "
                    f"{label}=second-largest or {label}=median."
                )
        if self.protocol == "published":
            given = {item.name: item for item in options_of(self)}
            for name in (
                "test_plates",
                "validation_plates",
                "folds",
                "leave_out",
                "downsample",
                "downsample_by",
            ):
                if getattr(self, name) != given[name].default:
                    raise UserInputError(
                        f"The published protocol draws as the study did, without "
                        f"{flag(given[name])}. Split by image without it: --group image."
                    )
            object.__setattr__(self, "group_level", GroupLevel.IMAGE)
            object.__setattr__(self, "validation_size", 0.0)
            return
        finest = self.field in (PERTURBATION, TREATMENT)
        if self.group_level is GroupLevel.PERTURBATION and finest:
            raise UserInputError(
                "By perturbation, each compound is in one subset only, so compounds cannot be the "
                "classes: none would be both trained and tested. Predict something coarser: "
                "--field target."
            )
        if self.leave_out is not None:
            if self.folds is not None or self.test_plates or self.validation_plates:
                raise UserInputError(
                    "--leave-out makes a fold for each value: leave --folds and the plates of "
                    "subsets out."
                )
            if self.leave_out == "plate":
                object.__setattr__(self, "group_level", GroupLevel.PLATE)
            elif self.group_level is not GroupLevel.WELL:
                raise UserInputError("--leave-out says what stays together: leave --group out.")
        if self.test_plates or self.validation_plates:
            if self.group_level is not GroupLevel.PLATE:
                raise UserInputError(
                    "Plates for a subset need a split by whole plates: --group plate."
                )
            if self.folds is not None:
                raise UserInputError("With --folds every plate is tested in turn: name no plates.")
            if not self.test_plates:
                raise UserInputError("Name the plates that test, too: --test-plates A,B.")
        if self.folds is not None:
            share = 1 / self.folds
            object.__setattr__(self, "test_size", share)
            object.__setattr__(self, "validation_size", share if self.validation_size else 0.0)
        elif self.test_size + self.validation_size >= 1:
            raise UserInputError(
                "None is left to train: --test-size and --validation-size together must be below 1."
            )

    @property
    def several(self) -> bool:
        """Whether these are the folds of a cross-validation."""
        return self.folds is not None or self.leave_out is not None


@dataclass(frozen=True)
class CellChoice(Params):
    """Which cells are learned from, and which measurements of them."""

    features: str | None = _features()
    exclude_flagged: str | None = _exclude_flagged()
    where: str | None = cells(
        None,
        "Only cells that meet this condition, over what image_table and cells have (cellstore "
        'schema) and the measurements of the feature set. For example "area > 500 AND plate = '
        "'P1'\".",
        metavar="SQL",
    )
    sql: str | None = cells(
        None,
        "Only cells that this SQL selects, over all relations that 'cellstore sql' knows: a file "
        "with a SELECT, or the SELECT itself. It gives cell_id, or image_id for all cells of an "
        "image; other columns do not count.",
        metavar="FILE|SQL",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where is not None and not self.where.strip():
            raise UserInputError('The condition is empty. Write it like --where "area > 500".')
        if self.sql is not None and not self.sql.strip():
            raise UserInputError("The SQL is empty. Give a file, or SQL that begins with SELECT.")
        if self.where is not None and self.sql is not None:
            raise UserInputError("Select cells by --where or by --sql, not by both.")

    @property
    def selects(self) -> bool:
        """Whether a condition, or SQL, selects some of the cells."""
        return self.where is not None or self.sql is not None


@dataclass(frozen=True)
class TrainParams(CellChoice):
    """A network and its training.

    The defaults are for some thousand cells; docs/training.md says why, with numbers.
    ``TrainParams.of("published")`` is the network of the study, trained as published.
    """

    branches: tuple[str, ...] | None = network(
        None,
        "What the network looks at: some of mask, flow, image (channels) and tabular (features). "
        "Default: mask, flow and tabular, or those of them that are known of the cells.",
        choices=("mask", "flow", "image", "tabular"),
    )
    channels: tuple[str, ...] = network((), "The channels of the branch image. Default: all.")
    backbone: str = network(
        "resnet18",
        "What looks at crops: a classifier of torchvision, for example efficientnet_b0, resnet18, "
        "mobilenet_v3_small, convnext_tiny; or timm:NAME, a network of timm.",
    )
    weights: str = network(
        "none",
        "What the backbone starts from: random numbers, ImageNet (of timm: its pretrained "
        "weights), or a file of its weights.",
        metavar="none|imagenet|FILE",
    )
    crop_size: int = network(64, "Crops of cells are scaled to this.", metavar="PIXELS", min=1)
    dropout: float = network(0.5, "Dropout of the tabular branch.", min=0.0, below=1.0)
    epochs: int = learning(40, "At most this many passes over the cells.", min=1)
    patience: int = learning(10, "Stop after this many epochs without a better one.", min=1)
    monitor: str = learning(
        "loss",
        "Which value on the validation images says that an epoch is better.",
        choices=("loss", "accuracy"),
    )
    batch_size: int = learning(64, "Cells per step.", min=2)
    sampler: str = learning(
        "classes",
        "How often cells are read in an epoch: each once (cells); each class as often as the "
        "others (classes); the largest class only as often as the second (capped).",
        choices=("cells", "classes", "capped"),
    )
    augment: tuple[str, ...] = learning(
        ("flips", "intensity", "rotations"),
        "Change crops at each step: some of flips, rotations and intensity; or none.",
        choices=("flips", "intensity", "rotations"),
    )
    loss: str = learning("cross-entropy", "The loss function.", choices=("cross-entropy", "focal"))
    class_weights: bool = learning(
        False, "Weigh classes in the loss by how rare they are.", negatable=True
    )
    label_smoothing: float = learning(
        0.1, "Smoothing of the labels in the loss.", min=0.0, below=1.0
    )
    learning_rate: float = learning(5e-4, "Step of Adam.", above=0.0)
    schedule: str = learning(
        "cosine",
        "How the step changes: smaller after every --step-size epochs (step), along a cosine, or "
        "not at all.",
        choices=("step", "cosine", "constant"),
    )
    step_size: int = learning(5, "Epochs until schedule step makes the step smaller.", min=1)
    gamma: float = learning(0.5, "How much smaller schedule step makes it.", min=0.0)
    warmup_epochs: int = learning(
        2, "Epochs in which the step rises first; fewer than all epochs.", min=0
    )
    weight_decay: float = learning(1e-4, "Weight decay of Adam.", min=0.0)
    normalise: str = _normalise()
    intensity: str = learning(
        "plate",
        "Crops are divided by the intensity scale of their image, or of their plate.",
        choices=("image", "plate"),
    )
    precision: str = learning(
        "32", "Bits of the numbers; fewer are faster on most GPUs.", choices=("32", "bf16", "16")
    )
    seed: int = learning(0, "Same seed, same start.", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches == ():
            raise UserInputError(
                "A network needs one branch or more: --branches mask,flow,image,tabular."
            )
        if self.channels and "image" not in (self.branches or ()):
            raise UserInputError(
                "Only the branch image reads channels: add it, for example with "
                "--branches mask,flow,image,tabular."
            )
        object.__setattr__(self, "warmup_epochs", min(self.warmup_epochs, self.epochs - 1))


@dataclass(frozen=True)
class TrainSetup(Params):
    """How a training is carried out; none of it changes what is learned, so no recipe has it."""

    devices: int = hardware(
        1,
        "GPUs of this host that learn together, a process each. Under torchrun or SLURM, also on "
        "several hosts, leave it out.",
        min=1,
    )
    logs: tuple[str, ...] = hardware(
        (),
        "Send metrics and the model also to mlflow, wandb (Weights & Biases), or both.",
        name="--log",
        choices=("mlflow", "wandb"),
    )
    log_dir: Path | None = hardware(
        None, "Folder of the files that --log writes. Default: logs/run-N, here.", metavar="DIR"
    )


@dataclass(frozen=True)
class BaselineParams(CellChoice):
    """Classical models and null baselines; see ``cellstore.learn.baselines``."""

    normalise: str = _normalise()
    seed: int = learning(0, "Same seed, same baseline.", min=0)
    max_cells: int = baseline(
        50_000,
        "With --baseline: learn from at most this many cells, equally many of each class.",
        min=1,
    )
    strength: float = baseline(
        1.0, "With --baseline: penalty of the logistic models (1 / C of scikit-learn).", above=0.0
    )
    neighbours: int = baseline(
        20, "With --baseline: nearest training cells that vote in knn (as DINO's protocol).", min=1
    )
    trees: int = baseline(100, "With --baseline: trees of the forest.", min=1)
    depth: int = baseline(16, "With --baseline: depth of its trees.", min=1)
    smallest_leaf: int = baseline(5, "With --baseline: cells in its smallest leaf.", min=1)


@dataclass(frozen=True)
class ProfileParams(Params):
    """How cells become profiles of wells; see ``cellstore.analysis.well_profiles``."""

    features: str | None = _features()
    plates: tuple[str, ...] = _plates()
    exclude_flagged: str | None = _exclude_flagged()
    average: str = option(
        "median",
        "What is kept of the cells of a well: their median, their mean, or the medians of its "
        "images, each with the weight of its cells (weighted).",
        choices=("median", "mean", "weighted"),
    )
    positions: str = option(
        "none",
        "Take out what rows, columns and edges of a plate do: by the median polish of all wells, "
        "or by the negative controls alone.",
        choices=("none", "median-polish", "controls"),
    )
    normalise: str = option(
        "mad",
        "Compare wells with the controls of their plate by median and median absolute deviation "
        "(mad), by mean and standard deviation, or so that features no longer go together "
        "(sphere).",
        choices=("mad", "standardise", "sphere", "none"),
    )
    against: str = option(
        "controls",
        "Compare with the negative controls of the plate, or with all its wells.",
        choices=("controls", "all"),
    )
    select: tuple[str, ...] = option(
        ("missing", "blocklist", "variance", "correlation"),
        "Remove features: missing in many wells, on pycytominer's blocklist, without variance, "
        "or like another one.",
        choices=("missing", "blocklist", "variance", "correlation"),
    )
    harmony: str = option(
        "none",
        "Bring plates, or batches, together by Harmony.",
        choices=("none", "plate", "batch"),
    )


@dataclass(frozen=True)
class HitsParams(Params):
    """Which treatments are compared with which controls, and when one is a hit."""

    profiles: str | None = option(
        None,
        "The profile run whose wells are compared. Default: the latest.",
        metavar="RUN",
    )
    plates: tuple[str, ...] = _plates()
    control: str | None = option(
        None,
        "Compare with the wells of this treatment; a name without dose means all its doses. "
        "Default: the wells that are negative controls.",
    )
    measure: str = option(
        "activity",
        "What the q value of the rule is of: activity exchanges treated wells and controls on each "
        "plate, copairs takes the p value of that library.",
        choices=("activity", "copairs"),
    )
    q: float = option(
        0.05,
        "A hit has a smaller q value than this: the share of false ones that you accept among the "
        "hits.",
        above=0.0,
        below=1.0,
    )
    min_effect: float = option(
        0.0,
        "A hit has at least this effect, in standard deviations of the controls.",
        metavar="SD",
        min=0.0,
    )
    min_over_count: float = option(
        0.0,
        "Where a treatment has fewer cells, the most changed features of a hit change by more "
        "than its cell count, and by this much more, in standard deviations of the controls; "
        "else it is called 'mainly fewer cells'.",
        metavar="SD",
        min=0.0,
    )
    edge: str = option(
        "auto",
        "Wells at the edge of a plate: match compares them with controls at the edge only, ignore "
        "with all; auto matches where controls at the edge differ from those inside.",
        choices=("auto", "match", "ignore"),
    )
    curves: tuple[str, ...] = option(
        (),
        "Also fit a dose curve of this feature, or of the probability of a label, written "
        "probability:LABEL; may be given several times. Effect and cell count have one always.",
        name="--curve",
        metavar="NAME",
        repeated=True,
    )
    run: str | None = option(
        None,
        "The predict run of --curve probability:LABEL. Default: the latest.",
        metavar="RUN",
    )
    permutations: int = option(
        10_000, "How often wells are exchanged at most to find a p value.", min=100
    )
    seed: int = option(0, "Same seed, same p values.", min=0)


@dataclass(frozen=True)
class VoteOptions(Params):
    """How the cells of an image, or of a well, vote. ``exclude_flagged``: flagged cells do not."""

    min_cells: int = option(1, "No answer for an image or well with fewer cells.", min=1)
    min_margin: float = option(
        0.0,
        "No answer where the first label leads the second by less than this share (0 to 1) of "
        "the vote.",
        metavar="SHARE",
        min=0.0,
        max=1.0,
    )
    controls: bool = option(True, "Whether control wells count.", negatable=True)
    exclude_flagged: str | None = _exclude_flagged()


@dataclass(frozen=True)
class Limits(Params):
    """What one question may take; ``answer_mb``: as one table of Arrow."""

    seconds: float = option(600.0, "Stop a question after this time.", metavar="S", min=0.1)
    memory_mb: int = option(
        2048, "Memory of a question; more goes to the disk.", name="--memory", metavar="MB", min=64
    )
    answer_mb: int = 1024


@dataclass(frozen=True)
class PredictParams(ImageChoice):
    """What to label, and what to keep of it.

    ``subset``: of the run's split, or of another named ``split``; ``None``: every image, or every
    image of ``split`` where one is named.
    """

    subset: Subset | None = option(
        Subset.TEST,
        "Which subset of the run's split (or of --split) is labelled, or all images.",
        nothing="all",
    )
    split: str | None = option(
        None, "The split whose --subset is meant. Default: the one of the run."
    )
    top_k: int = option(
        5,
        "Keep this many labels per cell, the most probable first.",
        min=1,
        unless="all_probabilities",
    )
    all_probabilities: bool = option(False, "Keep the probability of every label instead.")
    embedding: str | None = option(
        None,
        "Keep what the network's last layer reads of each cell as a feature set of this name, for "
        "train, export and sql.",
    )


@dataclass(frozen=True)
class OwnModel(Params):
    """A model that is not of cellstore.

    ``trained_on``: subsets of the split; ``()``: it has not seen this screen, ``None``: nobody
    knows.
    """

    name: str = option(
        "", "What the model, or the feature set that it makes, is called, for example my-vit."
    )
    trained_on: tuple[str, ...] | None = option(
        None,
        "The subsets of the split that the model was trained on; none, if on no image of this "
        "screen. Without it reports say that it is not known.",
        metavar="A,B",
        choices=tuple(item.value for item in Subset),
    )
    note: str | None = option(None, "A note to keep with the runs.", metavar="TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.name.strip()) <= 100 or not self.name.isprintable():
            raise UserInputError("Give the model a name of 1 to 100 characters: --name my-vit")


@dataclass(frozen=True)
class AddedParams(OwnModel):
    """What is said of predictions that a model outside cellstore made.

    ``model``: the file of its weights, of which the sha256 is kept.
    """

    split: str | None = option(
        None, "The split that says which images are for training and which for tests."
    )
    model: Path | None = option(
        None, "The file with its weights: its sha256 is kept; it is not opened.", metavar="FILE"
    )
    segmentation: str | None = option(
        None, "Whose cells, where the table names them by number or point: a segment recipe."
    )
    mlflow_run: str | None = option(
        None,
        "The id of the MLflow run that trained the model, to keep with the runs.",
        metavar="ID",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlflow_run is not None and not re.fullmatch(r"[\w-]{1,100}", self.mlflow_run):
            raise UserInputError(
                f"{self.mlflow_run!r} is not the id of an MLflow run: use letters, digits, - "
                "and _ only."
            )


@dataclass(frozen=True)
class EmbedParams(ImageChoice):
    """Of which cells a network makes an embedding, and what it sees of them."""

    channels: tuple[str, ...] = option((), "The channels of the crops. Default: all.")
    intensity: str = option(
        "plate",
        "Crops are divided by the intensity scale of their image, or of their plate.",
        choices=("image", "plate"),
    )
    segmentation: str | None = option(
        None, "Whose cells: a segment recipe. Default: the last used.", metavar="RECIPE"
    )
    batch_size: int = option(128, "Cells of an image that it is given at once, at most.", min=1)


@dataclass(frozen=True)
class ApplyParams(OwnModel, EmbedParams):
    """What a function of somebody's own is given of each cell, and what it makes of it.

    ``features``: also these measurements, those of a feature set by name; ``subset``: train,
    validation, test or all.
    """

    gives: Gives = option(
        Gives.EMBEDDING,
        "What its numbers are: an embedding of a cell, the probabilities of the classes of the "
        "split, or features.",
    )
    image: bool = option(
        True, "Whether it is given crops of the channels, from -1 (black) to 1.", negatable=True
    )
    crop: int = option(96, "Crops of cells are scaled to this.", metavar="PIXELS", min=1)
    mask: bool = option(False, "It is also given the mask of the cell, from 0 to 1.")
    features: str | None = option(
        None,
        "It is also given the measurements of this feature set, or group as basic. An estimator "
        "of scikit-learn is given nothing else. Default for it: basic.",
    )
    scaled: bool = option(
        False,
        "Measurements are scaled by the training subset of the split, as store.dataset does. "
        "Default: as they were measured, as store.cells has them.",
    )
    softmax: bool = option(
        False, "Its numbers are logits: make probabilities of them by the softmax function."
    )
    split: str | None = option(
        None, "The split whose classes and subsets are meant. Default: the latest."
    )
    subset: str | None = option(
        None,
        "Which subset of the split it is applied to. Default: test for probabilities, else all "
        "images.",
        choices=(*(item.value for item in Subset), "all"),
    )
    top_k: int = option(5, "Keep this many labels per cell, the most probable first.", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gives is Gives.PROBABILITIES:
            return
        for name in ("softmax", "trained_on", "top_k"):
            if getattr(self, name) != option_of(type(self), name).default:
                raise UserInputError(
                    f"--{name.replace('_', '-')} is about probabilities: add --gives probabilities."
                )


PRESETS: Mapping[str, Mapping[type, Mapping[str, Any]]] = {
    "published": {
        SegmentParams: {
            "flow_threshold": 0.7,
            "cellprob_threshold": -5.0,
            "diameter": None,
            "channels": (),
            "projection": Projection.MEDIAN,
            "nuclei": (),
        },
        SplitParams: {"protocol": "published", "field": PERTURBATION, "test_size": 0.2},
        TrainParams: {
            "branches": ("mask", "flow", "tabular"),
            "backbone": "efficientnet_b0",
            "weights": "none",
            "crop_size": 224,
            "dropout": 0.5,
            "epochs": 50,
            "patience": 5,
            "monitor": "loss",
            "batch_size": 512,
            "sampler": "cells",
            "augment": (),
            "loss": "cross-entropy",
            "class_weights": False,
            "label_smoothing": 0.1,
            "learning_rate": 1e-4,
            "schedule": "step",
            "step_size": 5,
            "gamma": 0.5,
            "warmup_epochs": 0,
            "weight_decay": 1e-4,
            "normalise": "train",
            "intensity": "image",
            "precision": "32",
        },
    }
}
"""Sets of values under one name: ``published`` is the study that cellstore generalises.

It names what the study did also where that is the default today, so that no new default changes it.
"""
