"""What a report says, as plain values."""

from __future__ import annotations

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
class ReportResult:
    """The report on one predict run.

    ``sides`` are the sides of the split that are scored, ``chance`` is 1 / classes. ``leak`` says
    whether the scored wells were seen in training; ``notes`` whatever else a reader must know.
    ``html`` is where the page was written, if one was. ``qc_run_id``: the quality-control run
    whose ``images_flagged`` (those without a cell left) and ``cells_flagged`` had no vote.
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

    def score(self, level: str, vote: str) -> Score:
        """Return the scores of one level and vote."""
        return next(item for item in self.scores if (item.level, item.vote) == (level, vote))
