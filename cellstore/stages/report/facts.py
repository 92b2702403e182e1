"""What a report says, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The scores of one kind of answer.

    ``level`` is cell, image or well; ``vote`` hard or soft (a cell has one answer, listed as
    hard). ``low`` and ``high`` bound the accuracy: 95 % bootstrap interval over wells, ``None``
    for a single well. ``majority`` is the accuracy of always answering the most frequent class
    of the training images. ``top_5``: the truth is among the first five; ``None`` where there
    are at most five classes, or fewer than five choices were kept. ``ece``: expected calibration
    error. ``ties`` counts draws of the vote.
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
class ReportResult:
    """The report on one predict run.

    ``sides`` are the sides of the split that are scored, ``chance`` is 1 / classes. ``leak`` says
    whether the scored wells were seen in training; ``notes`` whatever else a reader must know.
    ``html`` is where the page was written, if one was. ``qc_run_id``: the quality-control run
    whose ``images_flagged`` (those without a cell left) and ``cells_flagged`` had no vote.
    ``baselines``: what a score has to beat, by hard votes; ``beats_nulls``: whether the interval of
    the images is above every null baseline, ``None`` where that is not known; ``against_nulls``
    says it in words.
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

    def score(self, level: str, vote: str) -> Score:
        """Return the scores of one level and vote."""
        return next(item for item in self.scores if (item.level, item.vote) == (level, vote))


def by_baseline(found: Sequence[BaselineScore]) -> list[dict[str, BaselineScore]]:
    """Return the scores of each baseline by level: one record per baseline."""
    records: dict[str, dict[str, BaselineScore]] = {}
    for item in found:
        records.setdefault(item.baseline, {})[item.level] = item
    return list(records.values())
