"""The closed vocabularies of a store. Values, not names, are what the database keeps."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """What a run does."""

    INGEST = "ingest"
    SEGMENT = "segment"
    MEASURE = "measure"
    QC = "qc"
    SPLIT = "split"
    TRAIN = "train"
    PREDICT = "predict"
    FINETUNE = "finetune"
    PROFILE = "profile"
    HITS = "hits"


class Status(StrEnum):
    """How a run or a job stands. Only runs are cancelled; their open jobs stay pending.

    A run whose result somebody brought may be withdrawn: its rows stay, and no command takes it
    by default.
    """

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    WITHDRAWN = "withdrawn"


class Subset(StrEnum):
    """Which part of a split an image belongs to."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class GroupLevel(StrEnum):
    """What stays together in a split."""

    IMAGE = "image"
    WELL = "well"
    PLATE = "plate"
    PERTURBATION = "perturbation"  # all doses of it


class PerturbationKind(StrEnum):
    """What kind of thing acts on the cells; ``none``: the well is untreated."""

    COMPOUND = "compound"
    ORF = "orf"
    CRISPR = "crispr"
    SIRNA = "sirna"
    GENOTYPE = "genotype"
    NONE = "none"


class Control(StrEnum):
    """The role of a well in the assay."""

    NEGATIVE = "negative"
    POSITIVE = "positive"


class Level(StrEnum):
    """What an annotation or an exclusion is about."""

    PLATE = "plate"
    WELL = "well"
    IMAGE = "image"
    CELL = "cell"


class AnnotationKind(StrEnum):
    """What a person notes: a class, that something does not count, or a remark."""

    LABEL = "label"
    EXCLUSION = "exclusion"
    NOTE = "note"


class ExclusionSource(StrEnum):
    """Why something does not count."""

    SEGMENTATION = "segmentation"
    QUALITY = "quality"
    ANNOTATION = "annotation"


class Gives(StrEnum):
    """What the numbers are that a function makes of a cell."""

    EMBEDDING = "embedding"
    PROBABILITIES = "probabilities"
    FEATURES = "features"


class Origin(StrEnum):
    """How a result came into the store: this program made it, or somebody brought it."""

    OBSERVED = "observed"
    DECLARED = "declared"


class Projection(StrEnum):
    """How several channels become one plane."""

    MEDIAN = "median"
    MEAN = "mean"
    MAX = "max"


class ArtifactKind(StrEnum):
    """What a file that we wrote holds."""

    MASK = "mask"
    FLOW = "flow"
    CHECKPOINT = "checkpoint"
    FEATURES = "features"
    PROFILES = "profiles"
    NETWORK = "network"
    TRAINING_STATE = "training_state"


class Verdict(StrEnum):
    """What a hits run says of a treatment, by its rule."""

    HIT = "hit"
    FEWER_CELLS = "mainly fewer cells"  # their number is what changed most
    SMALL = "small effect"  # surely there, but smaller than the rule asks for
    NO = "no difference"
    UNKNOWN = "cannot say"  # too few wells or controls


class ScoreLevel(StrEnum):
    """What a treatment score is about."""

    TREATMENT = "treatment"  # with its dose
    PERTURBATION = "perturbation"  # all doses of it
    TARGET = "target"  # all perturbations that act on it


class ImageFlagReason(StrEnum):
    """Why a quality-control run holds an image to be odd."""

    OUT_OF_FOCUS = "out of focus"
    SATURATED = "saturated"
    BACKGROUND = "background"
    NO_SIGNAL = "no signal"
    CELL_COUNT = "cell count"
    CELL_AREA = "cell area"
    NO_CELLS = "no cells"


class CellFlagReason(StrEnum):
    """Why a quality-control run holds a cell to be odd."""

    AREA = "area"
    BORDER = "touches the border"


class FeatureStorage(StrEnum):
    """Where the values of a feature set live."""

    TABLE = "table"
    FILES = "files"


class Severity(StrEnum):
    """What an ingest did about an issue: left the row out, used it without a part, only noticed."""

    REFUSED = "refused"
    PROBLEM = "problem"
    SUSPICIOUS = "suspicious"


class Look(StrEnum):
    """Which image files an ingest looks at: those of this machine, remote ones too, or none."""

    HERE = "here"
    EVERYWHERE = "everywhere"
    NOWHERE = "nowhere"


PROJECTION_CHANNEL = "projection"
"""Channel name of a file that already holds a projection of several channels."""

EXCLUDED_NO_PERIMETER = "perimeter is 0"
"""Reason of a cell so small that its outline has no length."""

PERTURBATION, TREATMENT, TARGET = "perturbation", "treatment", "target"
"""Label fields that every store has; any metadata column of plates or wells is one too."""

ANNOTATION = "annotation"
"""The label field of what people say, where they name no other."""

DEFAULT_MODEL = "cellstore-nuclei"
"""The network that comes with cellstore; its model card lies beside it."""
