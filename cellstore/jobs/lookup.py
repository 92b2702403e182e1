"""Which image of the store a file of masks belongs to, told by its name and its folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, exists, or_, select
from sqlalchemy.orm import Session, aliased

from ..artifacts import sha256_of
from ..db.models import Folder, Image, ImageFile, Job, Plate, Recipe, Run, Well
from ..db.session import Database
from ..db.split_models import Split
from ..enums import Stage, Status
from ..errors import ImageError, UnknownNameError, UserInputError
from ..io.filenames import core_file_name, parse_well
from ..io.mask_files import MaskFile, black_and_white, read_labels
from ..io.uris import writable

SHORTEST_SHA256 = 6
"""Hexadecimal digits that name a file at least; fewer are as likely a word or a number."""

_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST_SHA256},64}}")
_LISTED = 6
_NEAR = 3
_FORMS = "PLATE/A01/1 (plate, well, site), r01c01f01, a file name, an id, or the start of a sha256"


def well_name(text: str) -> str:
    """Return the name of a well as it is stored: ``D04`` of ``d4``; other words as they are."""
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d{1,2})", text.strip())
    return f"{match[1].upper()}{int(match[2]):02d}" if match else text


def starts_with(column: Any, start: str) -> ColumnElement[bool]:
    """Return whether the hexadecimal text of ``column`` starts so; as a range, for an index."""
    return and_(column >= start, column < start + "g")  # g: the letter after all digits


def readable(text: str) -> str:
    """Return what was typed as text that a database takes: without NUL and broken letters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def hex_start(text: str) -> str | None:
    """Return ``text`` in small letters if it may be the start of a sha256."""
    lowered = text.strip().lower()
    return lowered if _HEX.fullmatch(lowered) else None


def places_find_image(session: Session, text: str) -> Image:
    """Return the image that ``text`` names.

    Accepts ``PLATE/A01/1`` (plate, well, site; spaces do as well, and the plate may be left out
    where there is one only), a core file name (``r01c01f01``, with ``PLATE/`` before it where
    several plates have it), an id (``17``), the name or path of one of its files, or the first
    digits of the sha256 of its content or of one of its files.

    Raises:
        UnknownNameError: nothing has that name; the names nearby are told.
        UserInputError: several images have it.

    """
    text = readable(text)
    for query in _image_queries(session, text):
        found = list(session.scalars(query.distinct().limit(_LISTED)))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserInputError(_places_several(session, text, found))
    raise _unknown_image(session, text)


class _Words(NamedTuple):
    """``PLATE/A01/1`` taken apart; a plate that is not named is the only one."""

    barcode: str | None
    well: str
    site: str | None = None


def _taken_apart(text: str) -> list[str]:
    parts = text.split("/") if "/" in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def _image_queries(session: Session, text: str) -> Iterator[Select[Image]]:
    base = select(Image).join(Well, Well.id == Image.well_id).join(Plate)
    parts = _taken_apart(text)
    if text.isdecimal() and len(text) < 19:
        yield base.where(Image.id == int(text))
    words = _words_of_image(session, parts)
    if words is not None and words.site is not None:
        place = _at(words)
        if place is not None:
            yield base.where(*place, Image.site == int(words.site))
    if len(parts) == 2:
        yield base.where(Plate.barcode == parts[0], Image.core_name == parts[1])
        if words is None and _is_site(parts[1]) and (well := _as_well(parts[0])) is not None:
            place = Well.row == well[0], Well.column == well[1]  # on whichever plate
            yield base.where(*place, Image.site == int(parts[1]))
    yield base.where(Image.core_name == text)
    yield base.where(_has_file(ImageFile.name == text))
    if "/" in text or "\\" in text:
        yield base.where(_has_file(ImageFile.name == re.split(r"[/\\]", text)[-1]))
    start = hex_start(text)
    if start is not None:
        yield base.where(
            Image.content_sha256.is_not(None), starts_with(Image.content_sha256, start)
        )
        yield base.where(_has_file(starts_with(ImageFile.sha256, start)))


def _words_of_image(session: Session, parts: Sequence[str]) -> _Words | None:
    if len(parts) == 3 and _is_site(parts[2]):
        return _Words(parts[0], parts[1], parts[2])
    if len(parts) == 2 and _is_site(parts[1]) and (plate := only_plate(session)) is not None:
        return _Words(plate.barcode, parts[0], parts[1])
    return None


def _is_site(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _at(words: _Words) -> tuple[ColumnElement[bool], ...] | None:
    try:
        row, column = parse_well(words.well)
    except UserInputError:
        return None
    return Plate.barcode == words.barcode, Well.row == row, Well.column == column


def _has_file(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return Image.id.in_(select(ImageFile.image_id).where(condition))


def _places_several(session: Session, text: str, found: Sequence[Image]) -> str:
    names = ", ".join(_full_names(session, found[: _LISTED - 1]))
    more = ", ..." if len(found) == _LISTED else ""
    return f"{text!r} names several images: {names}{more}. Name one of them, or its id."


def _full_names(session: Session, images: Sequence[Image]) -> list[str]:
    query = select(Image.id, Plate.barcode, Image.core_name).join(Well, Well.id == Image.well_id)
    query = query.join(Plate, Plate.id == Well.plate_id)
    rows = session.execute(query.where(Image.id.in_([item.id for item in images])))
    full = {row.id: f"{row.barcode}/{row.core_name}" for row in rows}
    twice = len(set(full.values())) < len(full)
    return [f"{name} (id {key})" if twice else name for key, name in sorted(full.items())]


def _unknown_image(session: Session, text: str) -> UnknownNameError:
    words = _words_of_image(session, _taken_apart(text))
    if words is not None and words.barcode is not None and _at(words) is not None:
        plate, well = _well_named(session, words)
        sites = session.scalars(select(Image.site).where(Image.well_id == well.id).distinct())
        return UnknownNameError.of(f"site of well {plate.barcode}/{well.name}", words.site, sites)
    near = neighbours(session, Image.core_name, _taken_apart(text)[-1] if text else text)
    if not near:
        return UnknownNameError.of("image", text, near)
    return UnknownNameError(
        f"Unknown image {text!r}. Did you mean {' or '.join(near)}? Images are named by {_FORMS}."
    )


def neighbours(session: Session, column: Any, text: str) -> list[str]:
    """Return the names that stand beside ``text`` in the index of a column."""
    after = select(column).where(column >= text).distinct().order_by(column).limit(_NEAR)
    before = select(column).where(column < text).distinct().order_by(column.desc()).limit(_NEAR)
    found = [*session.scalars(before), *session.scalars(after)]
    # Those that begin most like it.
    return sorted(found, key=lambda name: -_shared(name, text))[:_NEAR]


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one.lower(), other.lower(), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def only_plate(session: Session) -> Plate | None:
    """Return the plate of a store that has one only."""
    found = session.scalars(select(Plate).order_by(Plate.id).limit(2)).all()
    return found[0] if len(found) == 1 else None


def find_well(session: Session, text: str) -> tuple[Plate, Well]:
    """Return the plate and the well that ``text`` names: ``PLATE/A01``, ``PLATE A1``, ``A01``.

    Without a plate there has to be one only. What names an image names its well, too.

    Raises:
        UnknownNameError: there is no such plate or well.
        UserInputError: the text names no well, or one on several plates.

    """
    text = readable(text)
    parts = _taken_apart(text)
    if len(parts) == 1 and (well := _as_well(parts[0])) is not None:
        plate = only_plate(session)
        if plate is None:
            raise _of_which_plate(session, parts[0], well)
        return _well_named(session, _Words(plate.barcode, parts[0]))
    if len(parts) == 2 and not _is_site(parts[1]) and _as_well(parts[1]) is not None:
        return _well_named(session, _Words(parts[0], parts[1]))
    return _well_of_image(session, text)


def looks_like_well(text: str) -> bool:
    """Whether a text is written like a well, with a plate or without."""
    parts = _taken_apart(text)
    return 1 <= len(parts) <= 2 and not _is_site(parts[-1]) and _as_well(parts[-1]) is not None


def _as_well(text: str) -> tuple[int, int] | None:
    if text.isdecimal():
        return None  # "0101" may be a well, and is as likely an id
    try:
        return parse_well(text)
    except UserInputError:
        return None


def _of_which_plate(session: Session, text: str, well: tuple[int, int]) -> UserInputError:
    row, column = well
    query = select(Plate.barcode).join(Well, Well.plate_id == Plate.id).order_by(Plate.id)
    on = query.where(Well.row == row, Well.column == column).limit(_LISTED)
    plates = [f"{barcode}/{text}" for barcode in session.scalars(on)]
    if not plates:
        return UnknownNameError(f"No plate has a well {text!r} with images.")
    return UserInputError(f"Well {text!r} of which plate? Name one: {', '.join(plates)}.")


def _well_named(session: Session, words: _Words) -> tuple[Plate, Well]:
    plate = session.scalars(select(Plate).where(Plate.barcode == words.barcode)).first()
    if plate is None:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
        raise UnknownNameError.of("plate", words.barcode, known)
    row, column = parse_well(words.well)
    place = (Well.plate_id == plate.id, Well.row == row, Well.column == column)
    well = session.scalars(select(Well).where(*place)).first()
    if well is None:
        known = session.scalars(select(Well.name).where(Well.plate_id == plate.id).limit(1536))
        raise UnknownNameError.of("well", words.well, known)
    return plate, well


def _well_of_image(session: Session, text: str) -> tuple[Plate, Well]:
    image = None
    # Not by number: that of an image says nothing about wells.
    if not text.isdecimal():
        queries = _image_queries(session, text)
        found = (list(session.scalars(query.distinct().limit(2))) for query in queries)
        image = next((images[0] for images in found if len(images) == 1), None)
    if image is None:
        raise UserInputError(f"A well is named PLATE/A01, not {text!r}.")
    well = session.get_one(Well, image.well_id)
    return session.get_one(Plate, well.plate_id), well


RUN_WORDS = ("latest", "last")
_FILLERS = ("run", "the")


def run_in(session: Session, reference: str, stages: Sequence[Stage] = ()) -> Run:
    """Return the run with this number, or the ``latest`` finished one of ``stages``.

    The stage may be typed, too: ``latest predict``, ``train-latest``. Also ``#3`` and ``run 3``.

    Baselines stand behind: they are the latest only where there is nothing else, so that what
    follows a training by a baseline still means the network.

    Raises:
        UnknownNameError: there is none.

    """
    reference, typed = _words(reference)
    if typed is not None:
        stages = _agreed(typed, stages)
    query = select(Run).order_by(Run.id.desc())
    if stages:
        query = query.where(Run.stage.in_(stages))
    if reference in RUN_WORDS:
        done = query.where(Run.status == Status.DONE)
        ordered = done.order_by(None).order_by(_of_baseline(), Run.id.desc()) if stages else done
        found = session.scalars(ordered.limit(1)).first()
    else:
        found = session.scalars(query.where(Run.id == _number(reference)).limit(1)).first()
    if found is None:
        kind = f"{' or '.join(stage.value for stage in stages)} run" if stages else "run"
        known = [run.id for run in session.scalars(query.limit(5))]
        raise UnknownNameError.of(kind, reference, known)
    return found


def _words(reference: str) -> tuple[str, Stage | None]:
    """What of ``latest predict`` names a run, and the stage if there is one."""
    parts = [part for part in re.split(r"[\s_:-]+", reference.strip().lower()) if part]
    parts = [part for part in parts if part not in _FILLERS]
    stages = [Stage(part) for part in parts if part in list(Stage)]
    others = [part for part in parts if part not in list(Stage)]
    if len(parts) == 1 and others:
        return others[0], None
    if len(stages) == 1 and len(others) <= 1:
        return (others or [RUN_WORDS[0]])[0], stages[0]
    return reference, None


def _agreed(typed: Stage, stages: Sequence[Stage]) -> Sequence[Stage]:
    if stages and typed not in stages:
        wanted = " or ".join(stage.value for stage in stages)
        raise UserInputError(f"A {wanted} run is wanted here, not a {typed.value} run.")
    return (typed,)


def _of_baseline() -> ColumnElement[bool]:
    """Whether a run trained a baseline, or labelled with one."""
    trained = aliased(Run)
    query = select(trained.id).join(Recipe, Recipe.id == trained.recipe_id)
    query = query.where(or_(trained.id == Run.id, trained.id == Run.parent_id))
    return query.where(Recipe.parameters["baseline"].as_string().is_not(None)).exists()


def find_run(session: Session, reference: str, stage: Stage) -> Run:
    """Return a run of one ``stage``; see :func:`run_in`."""
    return run_in(session, reference, (stage,))


def has_results() -> ColumnElement[bool]:
    """Whether a run has done any image: one that made nothing is never taken by default."""
    return exists().where(Job.run_id == Run.id, Job.status == Status.DONE)


def find_recipe(session: Session, stage: Stage, reference: str) -> Recipe:
    """Return a recipe by its number, else by the start of its fingerprint.

    Raises:
        UnknownNameError: there is none.

    """
    recipes = session.scalars(select(Recipe).where(Recipe.stage == stage)).all()
    matches = [item for item in recipes if reference == str(item.id)]
    matches = matches or [item for item in recipes if item.fingerprint.startswith(reference)]
    if len(matches) != 1:
        known = [f"{item.id} ({item.fingerprint[:8]})" for item in recipes]
        raise UnknownNameError.of(f"{stage.value} recipe", reference, known)
    return matches[0]


def find_split(session: Session, name: str | None) -> Split:
    """Return the split of this name; without a name the only or the latest one.

    Raises:
        UnknownNameError: there is none.

    """
    query = select(Split).order_by(Split.id.desc())
    found = session.scalars(query.where(Split.name == name) if name else query).first()
    if found is None and name is None:
        raise UnknownNameError("There is no split yet. Make one with: cellstore split create NAME")
    if found is None:
        raise UnknownNameError.of("split", name, [item.name for item in session.scalars(query)])
    return found


def _number(text: str) -> int:
    word = text.strip().lstrip("#")
    if not word.isdecimal() or len(word) > 18:
        raise UserInputError(
            f"A run is named by its number, 'latest' or 'latest predict', not {text!r}."
        )
    return int(word)


_ENDINGS = (".tif", ".tiff", ".TIF", ".TIFF", ".png", ".PNG", ".ome.tif", ".ome.tiff")
_SHOWN = 3


class FoundImage(NamedTuple):
    """An image of the store; height and width in pixels where one of its files was seen."""

    id: int
    content_sha256: str | None
    plate_id: int
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    shape: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.plate}/{self.well}/{self.site}"


class NoMatch(NamedTuple):
    """Why a file of masks belongs to no image: a reason to count by, and its details."""

    reason: str
    detail: str


class Labelled(NamedTuple):
    """Masks (H, W) with the image of the store that they are of."""

    image: FoundImage
    labels: NDArray[np.uint32]


def read_masks_of(
    database: Database, mask: MaskFile, *, plate: str | None = None, binary: bool = False
) -> Labelled | NoMatch:
    """Find the image of a file of masks, read the file, and compare the two.

    ``plate`` limits the images, ``binary`` takes each connected part of a black and white mask
    for one object.
    """
    try:
        sha256 = sha256_of(mask.path)
        with database.read() as session:
            image = find_image(session, mask, plate)
            known = _is_an_image(session, sha256)
        if isinstance(image, NoMatch):
            return image
        if known:
            return NoMatch("this is an image", "the file is one of the images of the store")
        labels = _labels(mask, binary)
    except ImageError as error:
        return NoMatch("not a label image", writable(str(error)))
    except OSError as error:
        return NoMatch("cannot be read", str(error.strerror))
    if image.shape is not None and image.shape != labels.shape:
        shapes = f"masks of {_pixels(labels.shape)} pixels, image {image} of {_pixels(image.shape)}"
        return NoMatch("another shape than the image", shapes)
    return Labelled(image, labels)


def check_plate(session: Session, plate: str | None) -> None:
    """Refuse a barcode that no plate of the store has.

    Raises:
        UnknownNameError: with the plates that there are.
    """
    if plate is None or session.scalar(select(Plate.id).where(Plate.barcode == plate)):
        return
    known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
    raise UnknownNameError.of("plate", plate, known)


def find_image(session: Session, mask: MaskFile, plate: str | None) -> FoundImage | NoMatch:
    """Return the image of ``mask``: by the name of any of its files, else by core file name.

    Where several images have the name, the ``plate`` decides, else a folder that is named like a
    plate, else the folder of the image files.
    """
    on_plate = plate or _plate_of_folders(session, mask)
    for stem in mask.stems:
        ids = _by_file_name(session, stem, on_plate) or _by_core_name(session, stem, on_plate)
        if len(ids) > 1:
            ids = _beside(session, ids, mask) or ids
        if len(ids) == 1:
            return _image(session, ids[0])
        if ids:
            return _several(session, ids)
    where = f" on plate {on_plate}" if on_plate else ""
    return NoMatch("no such image", f"no image{where} has a file or a name like {mask.stems[0]!r}")


def _by_file_name(session: Session, stem: str, plate: str | None) -> list[int]:
    names = [stem + ending for ending in _ENDINGS]
    query = select(Image.id).join(ImageFile, ImageFile.image_id == Image.id)
    return _ids(session, query.where(ImageFile.name.in_(names)), plate)


def _by_core_name(session: Session, stem: str, plate: str | None) -> list[int]:
    parsed = core_file_name(stem)
    names = {stem, parsed.core} if parsed else {stem}
    query = select(Image.id).where(Image.core_name.in_(names))
    if parsed and parsed.plane is not None:
        query = query.where(Image.plane == parsed.plane)
    if parsed and parsed.time_point is not None:
        query = query.where(Image.time_point == parsed.time_point)
    return _ids(session, query, plate)


def _ids(session: Session, query: Select[Any], plate: str | None) -> list[int]:
    if plate is not None:
        query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        query = query.where(Plate.barcode == plate)
    # More than a few are not looked at: a name that so many images have says nothing.
    return list(session.scalars(query.distinct().order_by(Image.id).limit(5000)))


def _plate_of_folders(session: Session, mask: MaskFile) -> str | None:
    """Return the plate that the nearest folder is named like ('BR00117035__2021-05-02T...')."""
    parts = [writable(part.split("__")[0]) for part in reversed(mask.path.parent.parts)]
    known = set(session.scalars(select(Plate.barcode).where(Plate.barcode.in_(parts))))
    return next((part for part in parts if part in known), None)


def _beside(session: Session, ids: Sequence[int], mask: MaskFile) -> list[int]:
    query = (
        select(ImageFile.image_id)
        .join(Folder, Folder.id == ImageFile.folder_id)
        .where(ImageFile.image_id.in_(ids), Folder.uri == writable(str(mask.path.parent)))
    )
    return list(session.scalars(query.distinct()))


def _image(session: Session, image_id: int) -> FoundImage:
    place = (Plate.id, Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
    query = select(Image.content_sha256, *place).where(
        Image.id == image_id, Well.id == Image.well_id, Plate.id == Well.plate_id
    )
    row = session.execute(query).one()
    shapes = select(ImageFile.height, ImageFile.width).where(
        ImageFile.image_id == image_id, ImageFile.height.is_not(None)
    )
    shape = session.execute(shapes.order_by(ImageFile.position).limit(1)).first()
    found = None if shape is None else (shape.height or 0, shape.width or 0)
    return FoundImage(image_id, *row, found)


def _several(session: Session, ids: Sequence[int]) -> NoMatch:
    shown = ", ".join(str(_image(session, image_id)) for image_id in ids[:_SHOWN])
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return NoMatch(
        "several images have this name",
        f"{shown}{more}; put the masks of each plate into a folder named like it, or give --plate",
    )


def _labels(mask: MaskFile, binary: bool) -> NDArray[np.uint32]:
    from ..analysis.label_images import labels_in_pieces, parts

    labels = read_labels(mask.path, binary=binary)
    if binary:
        return parts(labels)
    if labels.max(initial=0) == 1 and labels_in_pieces(labels):
        raise ImageError(black_and_white(mask.path.name))
    return labels


def _is_an_image(session: Session, sha256: str) -> bool:
    query = select(ImageFile.id).where(ImageFile.sha256 == sha256).limit(1)
    return session.scalar(query) is not None


def _pixels(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
