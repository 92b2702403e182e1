"""Frozen settings: the parameters of the stages.

The defaults of the stages are those of the published pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .enums import PERTURBATION, GroupLevel, Look, Projection, Subset
from .errors import UnknownNameError, UserInputError

DEFAULT_MODEL = "cellstore-nuclei"


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
    ``cellstore.jobs.conditions`` lists.
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
    with named groups. ``pixel_size``: micrometres per pixel. ``platemap``, ``compounds`` and
    ``barcodes`` say what was done to each well, ``aliases`` which names are one. ``name``: of the
    feature set or of the masks; ``binary``: masks of 0 and one other value are taken apart into
    their connected pieces. ``strict``: one refused row undoes the whole source. ``reread``: read
    it anew, even if it was read before.
    """

    kind: str | None = None
    layout: str | None = None
    plate: str | None = None
    images: Path | None = None
    maps: tuple[tuple[str, str], ...] = ()
    look: Look = Look.HERE
    channels: tuple[tuple[str, str], ...] = ()
    pattern: str | None = None
    pixel_size: float | None = None
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


def later(default: Any) -> Any:
    """Return a field marked ``LATER``; for classes that have a field called ``field``."""
    return field(default=default, metadata=LATER)


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
    """Who trains and who tests. Sizes are shares of the groups (wells, images, plates, treatments).

    ``leave_out_flagged``: a quality-control run (a number, or ``latest``) whose flagged images are
    left out. ``where``: an SQL condition, as in :class:`Selection`. ``test_plates`` and
    ``validation_plates``: plates that are on that side, where whole plates are split. ``folds``:
    how many parts test in turn; the next part validates, and the sizes do not count.

    ``downsample``: pairs of a class and how much of it is kept (``second-largest``, ``median``, or
    a number as text); ``None``: the largest class is cut to the groups of the second largest;
    none at all: nothing is cut. ``downsample_by``: whether that counts ``image`` or ``cell``.
    ``min_images``: classes with fewer images are left out.
    """

    protocol: str = "grouped"
    field: str = PERTURBATION
    group_level: GroupLevel = GroupLevel.WELL
    test_size: float = 0.2
    validation_size: float = 0.2
    seed: int = 0
    plates: tuple[str, ...] = ()
    allow_missing: bool = False
    leave_out_flagged: str | None = None
    where: str | None = later(None)
    test_plates: tuple[str, ...] = later(())
    validation_plates: tuple[str, ...] = later(())
    folds: int | None = later(None)
    downsample: tuple[tuple[str, str], ...] | None = later(None)
    downsample_by: str = later("image")
    min_images: int = later(0)


@dataclass(frozen=True)
class TrainParams:
    """A network and its training; by default the published ones. ``crop_size`` in pixels.

    ``recipe``: the set of values that the others began from (:data:`TRAIN_RECIPES`); make one with
    :meth:`of`. ``features``: the name of a feature set; ``None``: the built-in measurements used
    last. ``branches``: some of ``mask``, ``flow``, ``image`` and ``tabular``; ``None``: the three
    published ones, or those of them that what is known of the cells can feed. ``channels`` of the
    image that branch ``image`` looks at; none named: all. ``leave_out_flagged``: a quality-control
    run (a number, or ``latest``) whose flagged images and cells are left out.

    ``backbone``: a classifier of torchvision. ``augment``: some of ``flips``, ``rotations``,
    ``intensity``. ``loss``: ``cross-entropy`` or ``focal``, weighted by class if ``class_weights``.
    ``sampler``: every cell once in an epoch (``cells``), every class as often as the others
    (``classes``), or a class that is larger than all others only as often as the second largest
    (``capped``). ``schedule``: ``step`` (times ``gamma`` after every ``step_size`` epochs),
    ``cosine`` or ``constant``, after ``warmup_epochs``. ``monitor``: ``loss`` or ``accuracy`` of
    the validation side chooses the epoch. ``precision``: ``32``, ``bf16`` or ``16``.
    ``normalise``: features as the training side is spread (``train``), or against the negative
    controls of their plate (``plate-controls``). ``intensity``: white is that of the ``image``, or
    that of the ``plate``.
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
    recipe: str = field(default="published", metadata=LATER)
    channels: tuple[str, ...] = field(default=(), metadata=LATER)
    backbone: str = field(default="efficientnet_b0", metadata=LATER)
    augment: tuple[str, ...] = field(default=(), metadata=LATER)
    loss: str = field(default="cross-entropy", metadata=LATER)
    class_weights: bool = field(default=False, metadata=LATER)
    sampler: str = field(default="cells", metadata=LATER)
    schedule: str = field(default="step", metadata=LATER)
    warmup_epochs: int = field(default=0, metadata=LATER)
    monitor: str = field(default="loss", metadata=LATER)
    precision: str = field(default="32", metadata=LATER)
    normalise: str = field(default="train", metadata=LATER)
    intensity: str = field(default="image", metadata=LATER)

    @classmethod
    def of(cls, recipe: str, **given: Any) -> TrainParams:
        """Return the values of a recipe, but for those that are ``given``.

        Its warm-up is shorter than the training where only the ``epochs`` are given.

        Raises:
            UnknownNameError: there is no such recipe.
        """
        if recipe not in TRAIN_RECIPES:
            raise UnknownNameError.of("recipe", recipe, TRAIN_RECIPES)
        chosen = TRAIN_RECIPES[recipe]
        warmup = min(chosen.warmup_epochs, max(0, given.get("epochs", chosen.epochs) - 1))
        return replace(chosen, **{"warmup_epochs": warmup, **given})


TRAIN_RECIPES: Mapping[str, TrainParams] = {
    "published": TrainParams(),
    "compact": TrainParams(
        recipe="compact",
        crop_size=64,
        batch_size=64,
        epochs=40,
        patience=10,
        learning_rate=5e-4,
        backbone="resnet18",
        augment=("flips", "rotations", "intensity"),
        sampler="classes",
        schedule="cosine",
        warmup_epochs=2,
        intensity="plate",
    ),
}
"""Recipes of networks: the one of the study, and one for few cells, with our reasons:

a cell of some 30 pixels gains nothing from being blown up to 224, and a small crop is read and
learned ten times as fast; a residual network of 18 layers learns from some thousand cells, in
batches small enough to take many steps; a cell may lie in any direction; no class should win by
its number; the rate falls to nothing along a cosine instead of by guessed steps; and how bright a
cell is, compared with the others of its plate, is an effect and not a nuisance.
"""


@dataclass(frozen=True)
class TrainSetup:
    """How a training is carried out; none of it changes what is learned, so no recipe has it.

    ``devices``: how many of this host learn together. ``compile``: the network is compiled first.
    ``logs``: some of ``csv``, ``tensorboard`` and ``mlflow``, written to ``log_dir`` (default:
    ``logs/run-N`` in the current folder), which is no part of the store.
    """

    devices: int = 1
    compile: bool = False
    logs: tuple[str, ...] = ()
    log_dir: Path | None = None


@dataclass(frozen=True)
class BaselineParams:
    """Classical models and null baselines; see ``cellstore.learn.baselines``.

    At most ``max_cells`` cells of the training side are learned from, as many of each class as can
    be. ``strength`` is the penalty of the logistic models (1 / C of scikit-learn); ``trees``,
    ``depth`` and ``smallest_leaf`` are those of the forest. ``features``, ``normalise`` and
    ``leave_out_flagged`` as for :class:`TrainParams`.
    """

    max_cells: int = 50_000
    seed: int = 0
    strength: float = 1.0
    trees: int = 100
    depth: int = 16
    smallest_leaf: int = 5
    features: str | None = None
    normalise: str = "train"
    leave_out_flagged: str | None = None


@dataclass(frozen=True)
class ContrastParams:
    """Which treatments are compared with which control, and how.

    See ``cellstore.analysis.contrasts``.

    ``treatments``: names; none: all. ``control``: a name; ``None``: what is marked as negative
    control. ``pooled``: all treatments as one. ``max_cells`` of each side at most; ``nulls``: how
    often control wells are compared with control wells.
    """

    treatments: tuple[str, ...] = ()
    control: str | None = None
    features: str | None = None
    plates: tuple[str, ...] = ()
    pooled: bool = False
    folds: int = 5
    max_cells: int = 2_000
    nulls: int = 20
    seed: int = 0


@dataclass(frozen=True)
class VoteRules:
    """How the cells of an image, or of a well, vote.

    It abstains with fewer than ``min_cells`` cells, or where the share of the winner is less than
    ``min_margin`` (0 to 1) above that of the runner-up. ``controls``: whether wells with controls
    are scored. ``unflagged_by``: a quality-control run; what it has flagged has no vote.

    Raises:
        UserInputError: a rule is out of range.
    """

    min_cells: int = 1
    min_margin: float = 0.0
    controls: bool = True
    unflagged_by: int | None = None

    def __post_init__(self) -> None:
        if self.min_cells < 1:
            raise UserInputError(f"At least 1 cell votes, not {self.min_cells}.")
        if not 0 <= self.min_margin <= 1:
            raise UserInputError(f"A margin is a share from 0 to 1, not {self.min_margin:g}.")


@dataclass(frozen=True)
class PredictParams:
    """What to label, and what to keep of it.

    ``subset``: a side of the run's split, or of another named ``split``; ``None``: every image, or
    every image of ``split`` where one is named. ``plates``, ``wells``, ``where`` and ``limit``
    choose among these, as in :class:`Selection`. ``top_k`` labels are kept per cell, or
    ``all_probabilities``. ``embedding``: the name of a feature set for the embedding of each cell.
    """

    subset: Subset | None = Subset.TEST
    plates: tuple[str, ...] = ()
    top_k: int = 5
    wells: tuple[str, ...] = field(default=(), metadata=LATER)
    where: str | None = field(default=None, metadata=LATER)
    limit: int | None = field(default=None, metadata=LATER)
    split: str | None = field(default=None, metadata=LATER)
    all_probabilities: bool = field(default=False, metadata=LATER)
    embedding: str | None = field(default=None, metadata=LATER)

    @property
    def selection(self) -> Selection:
        """The images that plates, wells and condition name; the limit counts those of the side."""
        return Selection(self.plates, self.wells, self.where)


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
