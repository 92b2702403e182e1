"""Frozen settings: where a store is, and the parameters of its stages.

The defaults of the stages are those of the published pipeline.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import StoreNotFoundError, UserInputError
from .terms import GroupLevel, LabelField, Look, Projection, Subset

MARKER = "cellstore.toml"
SQLITE_NAME = "cellstore.db"
ENV_STORE = "CELLSTORE_STORE"
ENV_DATABASE = "CELLSTORE_DATABASE_URL"
DEFAULT_MODEL = "cellstore-nuclei"


@dataclass(frozen=True)
class StoreSettings:
    """Where a store keeps its rows and files. ``database`` is a URL without a password."""

    root: Path
    database: str | None = None

    @property
    def artifacts(self) -> Path:
        """Folder of masks, flows, checkpoints."""
        return self.root / "artifacts"

    @property
    def cache(self) -> Path:
        """Folder of what can be made again at any time."""
        return self.root / "cache"

    @property
    def sqlite(self) -> Path:
        """The embedded database."""
        return self.root / SQLITE_NAME


def find_store(given: Path | None = None) -> StoreSettings:
    """Return the store named by ``given``, else by the environment, else the nearest upwards.

    Raises:
        StoreNotFoundError: there is none.

    """
    named = given or _from_environment()
    if named is not None:
        return _read_marker(_holding(named))
    start = Path.cwd()
    for folder in (start, *start.parents):
        if (folder / MARKER).is_file():
            return _read_marker(folder)
    raise StoreNotFoundError(
        f"No store in {start} or in a folder above it. Make one with: cellstore init, "
        "or name one with --store DIR."
    )


def _from_environment() -> Path | None:
    value = os.environ.get(ENV_STORE)
    return Path(value) if value else None


def _holding(folder: Path) -> Path:
    if (folder / MARKER).is_file():
        return folder
    raise StoreNotFoundError(
        f"{folder} is not a store. Make one there with: cellstore init {folder}"
    )


def _read_marker(folder: Path) -> StoreSettings:
    database = os.environ.get(ENV_DATABASE) or written_database(folder)
    return StoreSettings(folder.resolve(), database)


def written_database(folder: Path) -> str | None:
    """Return the URL that the marker in ``folder`` holds; ``None``: the embedded database.

    Raises:
        UserInputError: the marker cannot be read.

    """
    marker = folder / MARKER
    try:
        values = tomllib.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(f"{marker} cannot be read: {error}.") from error
    database = values.get("database")
    if database is not None and not isinstance(database, str):
        raise UserInputError(f"{marker}: 'database' should be a URL in quotes.")
    return database


@dataclass(frozen=True)
class ImageInput:
    """Which plane of an image a stage looks at: ``channels`` by name, projected to one.

    No channels: the projection file if there is one, else the first three channels.
    """

    channels: tuple[str, ...] = ()
    projection: Projection = Projection.MEDIAN


@dataclass(frozen=True)
class Selection:
    """Which images a command is about: all that meet every condition; the first ``limit``.

    ``wells`` are names like ``D14``. ``where`` is an SQL condition on the columns that
    ``cellstore.runs.conditions`` lists.
    """

    plates: tuple[str, ...] = ()
    wells: tuple[str, ...] = ()
    where: str | None = None
    limit: int | None = None


EVERYTHING = Selection()
"""All images."""


@dataclass(frozen=True)
class Resources:
    """Who works: ``workers`` processes of this machine (1: this process), or a Dask cluster.

    ``scheduler`` is the address of a Dask scheduler, like ``tcp://host:8786``.
    """

    workers: int = 1
    scheduler: str | None = None


THIS_PROCESS = Resources()
"""No other process."""


@dataclass(frozen=True)
class IngestParams:
    """How to read a source, and what goes with it.

    ``layout`` forces a reader, ``kind`` its sort (images, treatments, features, masks). ``plate``
    is the barcode where the source names none. ``images``: the folder in which files are searched
    by name; ``maps``: (old, new) beginnings of folders; ``look``: which files are looked at.
    ``channels``: (number or name, name wanted). ``pattern``: file names as a regular expression
    with named groups. ``platemap``, ``compounds`` and ``barcodes`` say what was done to each well,
    ``aliases`` which names are one. ``name``: of the feature set or of the masks; ``binary``:
    masks of 0 and one other value are taken apart into their connected pieces. ``strict``: one
    refused row undoes the whole source. ``reread``: read it anew, even if it was read before.
    """

    kind: str | None = None
    layout: str | None = None
    plate: str | None = None
    images: Path | None = None
    maps: tuple[tuple[str, str], ...] = ()
    look: Look = Look.HERE
    channels: tuple[tuple[str, str], ...] = ()
    pattern: str | None = None
    platemap: Path | None = None
    compounds: tuple[Path, ...] = ()
    barcodes: Path | None = None
    aliases: Path | None = None
    name: str | None = None
    binary: bool = False
    strict: bool = False
    reread: bool = False


LATER = {"later": True}
"""Marks a field that recipes did not have at first: unwritten, and uncounted, at its default.

So the recipes that were made without it keep their fingerprints, and their images are not done
again; see :func:`as_parameters`.
"""


@dataclass(frozen=True)
class SegmentParams:
    """Cellpose. ``diameter`` in pixels, ``None``: estimated for each image.

    ``nuclei``: a second plane for the network, that of the nuclei of the cells in ``image``.
    ``diameter_from``: a segment recipe; every image gets the median of the diameters that this
    recipe used on the image's plate.
    """

    model: str = DEFAULT_MODEL
    flow_threshold: float = 0.7
    cellprob_threshold: float = -5.0
    diameter: float | None = None
    image: ImageInput = ImageInput()
    nuclei: ImageInput | None = field(default=None, metadata=LATER)
    diameter_from: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class FinetuneParams:
    """A network that learns from corrected masks. ``model``: the one it starts from.

    ``image`` and ``nuclei``: the planes, as for :class:`SegmentParams`. ``held_out``: the share of
    the wells that only tells whether the new network is better. ``binary``: masks are black and
    white, each connected part one cell.
    """

    model: str = DEFAULT_MODEL
    epochs: int = 50
    learning_rate: float = 5e-4
    held_out: float = 0.2
    image: ImageInput = ImageInput()
    nuclei: ImageInput | None = None
    binary: bool = False
    seed: int = 0


@dataclass(frozen=True)
class MeasureParams:
    """Measurements: groups of features, of which each is a recipe of its own.

    ``image`` is the plane of the intensities of group ``basic``; ``None``: the segmented one. The
    other groups are measured on each of its channels; none: on all that the images have.
    """

    image: ImageInput | None = None
    features: tuple[str, ...] = ("basic",)


@dataclass(frozen=True)
class QcParams:
    """What quality control holds to be odd, against the other images or cells of the plate.

    ``outlier`` and ``cell_outlier``: how many robust standard deviations from the plate's median
    an image, or the logarithm of a cell's area, may be. ``saturated``: the share of the pixels of
    a channel that may be at white. ``noise``: a channel that varies less than is usual, and whose
    power spectrum rises more steeply, is noise (white noise: 1, real fields: -3 to -0.4).
    ``border``: cells that touch the border are odd. ``min_images``: a plate with fewer says
    nothing about what is usual on it. These numbers are our choice, made so that few images of a
    good plate are flagged; see docs/explanation.md.
    """

    outlier: float = 5.0
    cell_outlier: float = 5.0
    saturated: float = 0.01
    noise: float = 0.5
    border: bool = True
    min_images: int = 8


@dataclass(frozen=True)
class SplitParams:
    """Who trains and who tests. Sizes are shares of the groups (wells, images or plates).

    ``leave_out_flagged``: a quality-control run (a number, or ``latest``) whose flagged images are
    left out.
    """

    protocol: str = "grouped"
    field: LabelField = LabelField.PERT_INAME
    group_level: GroupLevel = GroupLevel.WELL
    test_size: float = 0.2
    validation_size: float = 0.2
    seed: int = 0
    plates: tuple[str, ...] = ()
    allow_missing: bool = False
    leave_out_flagged: str | None = None


@dataclass(frozen=True)
class TrainParams:
    """The published network and its training. ``crop_size`` in pixels.

    ``features``: the name of a feature set; ``None``: the built-in measurements used last.
    ``branches``: ``mask``, ``flow``, ``tabular`` or some of them; ``None``: all three, or those
    that what is known of the cells can feed. ``leave_out_flagged``: a quality-control run (a
    number, or ``latest``) whose flagged images and cells are left out.
    """

    crop_size: int = 224
    batch_size: int = 512
    epochs: int = 50
    patience: int = 5
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    step_size: int = 5
    gamma: float = 0.5
    label_smoothing: float = 0.1
    dropout: float = 0.5
    weights: str = "none"
    seed: int = 0
    features: str | None = None
    branches: tuple[str, ...] | None = None
    leave_out_flagged: str | None = None


@dataclass(frozen=True)
class BaselineParams:
    """Classical models and null baselines; see ``cellstore.ops.baselines``.

    At most ``max_cells`` cells of the training side are learned from, as many of each class as can
    be. ``strength`` is the penalty of the logistic models (1 / C of scikit-learn); ``trees``,
    ``depth`` and ``smallest_leaf`` are those of the forest. ``features`` and
    ``leave_out_flagged`` as for :class:`TrainParams`.
    """

    max_cells: int = 50_000
    seed: int = 0
    strength: float = 1.0
    trees: int = 100
    depth: int = 16
    smallest_leaf: int = 5
    features: str | None = None
    leave_out_flagged: str | None = None


@dataclass(frozen=True)
class PredictParams:
    """What to label: a side of the run's split, or ``None`` for every image of ``plates``."""

    subset: Subset | None = Subset.TEST
    plates: tuple[str, ...] = ()
    top_k: int = 5


def as_parameters(params: Any) -> dict[str, Any]:
    """Return a dataclass of parameters as plain JSON values, fit for a recipe.

    A field marked ``LATER`` is left out while it has its default.
    """
    unused = {
        item.name
        for item in fields(params)
        if item.metadata.get("later") and getattr(params, item.name) == item.default
    }
    return {name: value for name, value in asdict(params).items() if name not in unused}
