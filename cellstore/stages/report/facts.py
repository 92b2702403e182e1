"""What a report says, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config import VoteRules
from .comparison_facts import Comparison

__all__ = [
    "BaselineScore",
    "CalibrationBin",
    "ClassScore",
    "Comparison",
    "GroupScore",
    "ReportResult",
    "Score",
    "WellScore",
    "by_baseline",
]

EVERY_VOTE = VoteRules()


@dataclass(frozen=True)
class Score:
    """The scores of one kind of answer.

    ``level`` is cell, image or well; ``vote`` hard, soft or median (a cell has one answer, listed
    as hard). ``n`` counts the answers; ``abstained`` cells, images or wells more gave none, and
    ``coverage`` is the share that did. ``low`` and ``high`` bound the accuracy: 95 % bootstrap
    interval over wells, ``None`` for a single well. ``majority`` is the accuracy of always
    answering the most frequent class of the training images. ``top_5``: the truth is among the
    first five; ``None`` where there are at most five classes, or fewer than five choices were kept.
    ``ece``: expected calibration error. ``ties`` counts draws of the vote. ``log_loss`` is the mean
    of -log(probability of the truth) in nats, ``None`` where ``log_loss_missing`` says why.
    """

    level: str
    vote: str
    n: int
    correct: int
    accuracy: float
    low: float | None
    high: float | None
    majority: float | None
    balanced_accuracy: float
    macro_f1: float
    top_5: float | None
    ece: float
    ties: int
    log_loss: float | None = None
    log_loss_missing: str | None = None
    abstained: int = 0
    coverage: float = 1.0


@dataclass(frozen=True)
class BaselineScore:
    """A baseline on the images of a report, from the newest run of it that has labelled them.

    ``n`` counts the cells, images or wells that both have labelled, ``low`` and ``high`` bound the
    accuracy as in :class:`Score`. ``null``: it knows nothing of what a treatment does to a cell.
    """

    baseline: str
    null: bool
    run_id: int
    train_run_id: int | None
    level: str
    vote: str
    n: int
    accuracy: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ClassScore:
    """How one label does, over images by hard votes.

    ``support`` counts the images of the label, ``predicted`` those that got it, ``correct`` both.
    ``recall`` is ``None`` for a label that is never true, ``precision`` for one that is never
    answered; ``f1`` is 2 ``correct`` / (``support`` + ``predicted``). ``target`` is the gene of a
    compound (several with ``|`` between), ``same_target`` counts its images that got another
    compound of the same gene. ``low`` and ``high`` bound the recall as in :class:`Score`;
    ``wells``: how many the images come from; ``abstained``: images of the label without an answer.
    """

    label: str
    target: str | None
    support: int
    predicted: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float
    same_target: int
    wells: int
    low: float | None = None
    high: float | None = None
    abstained: int = 0


@dataclass(frozen=True)
class GroupScore:
    """The images of one plate, or of the compounds of one target gene, by hard votes.

    A compound of several genes counts for each. ``same_target`` counts the images that got another
    compound of the same gene, so that the gene is right in ``correct + same_target`` of ``n``.
    ``low`` and ``high`` bound the accuracy as in :class:`Score`. ``labels`` counts the true labels
    among them.
    """

    name: str
    n: int
    correct: int
    accuracy: float
    same_target: int
    wells: int
    labels: int
    low: float | None = None
    high: float | None = None
    abstained: int = 0


@dataclass(frozen=True)
class WellScore:
    """One scored well: its images by hard votes, and what all its cells together say.

    ``predicted`` is ``None`` where the well has no answer, or two on two sides of the split.
    ``seen``: the model was trained on other images of this well.
    """

    plate: str
    well: str
    truth: str
    predicted: str | None
    n: int
    correct: int
    seen: bool


@dataclass(frozen=True)
class CalibrationBin:
    """The answers whose confidence is above ``low`` and at most ``high``; only bins that hold any.

    ``confidence`` is their mean confidence, ``accuracy`` the share of them that is right. ``level``
    and ``vote``: cell and hard, or image and soft. The expected calibration error is the mean of
    ``|confidence - accuracy|`` weighed by ``n``.
    """

    level: str
    vote: str
    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ReportResult:
    """The report on one predict run.

    ``sides`` are the sides of the split that are scored, ``chance`` is 1 / classes. ``leak`` says
    whether the scored wells were seen in training; ``notes`` whatever else a reader must know.
    ``html`` is where the page was written, if one was. ``qc_run_id``: the quality-control run
    whose ``images_flagged`` (those without a cell left) and ``cells_flagged`` had no vote.
    ``baselines``: what a score has to beat, by hard votes; ``beats_nulls``: whether the interval of
    the images is above every null baseline, ``None`` where that is not known; ``against_nulls``
    says it in words.

    ``unseen`` are the same scores without the wells that were seen in training; empty if none was,
    or nothing is left. ``without_controls`` are those without control wells; empty if there are
    none, or nothing is left. ``by_class``, ``by_plate`` and ``by_target`` (empty unless the labels
    are compounds with known genes) are in order of name, ``by_well`` in order of plate and place.
    ``comparison``: the run beside another, if one was named. ``rules`` say which images and wells
    have an answer.
    """

    run_id: int
    train_run_id: int | None
    split: str
    protocol: str
    group_level: str
    field: str
    sides: tuple[str, ...]
    classes: int
    chance: float
    majority_label: str | None
    cells: int
    images: int
    wells: int
    wells_seen: int
    leaks: bool
    leak: str
    notes: tuple[str, ...]
    scores: tuple[Score, ...]
    html: str | None = None
    qc_run_id: int | None = None
    images_flagged: int = 0
    cells_flagged: int = 0
    baselines: tuple[BaselineScore, ...] = ()
    beats_nulls: bool | None = None
    against_nulls: str = ""
    unseen: tuple[Score, ...] = ()
    without_controls: tuple[Score, ...] = ()
    by_class: tuple[ClassScore, ...] = ()
    by_plate: tuple[GroupScore, ...] = ()
    by_target: tuple[GroupScore, ...] = ()
    by_well: tuple[WellScore, ...] = ()
    calibration: tuple[CalibrationBin, ...] = ()
    comparison: Comparison | None = None
    rules: VoteRules = EVERY_VOTE

    def score(self, level: str, vote: str) -> Score:
        """Return the scores of one level and vote."""
        return next(item for item in self.scores if (item.level, item.vote) == (level, vote))


def by_baseline(found: Sequence[BaselineScore]) -> list[dict[str, BaselineScore]]:
    """Return the scores of each baseline by level: one record per baseline."""
    records: dict[str, dict[str, BaselineScore]] = {}
    for item in found:
        records.setdefault(item.baseline, {})[item.level] = item
    return list(records.values())
