"""What the commands about splits answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ...ops.leaks import Finding

PUBLISHED = "published"
GROUPED = "grouped"
IMPORTED = "imported"


@dataclass(frozen=True)
class SplitResult:
    """A split as it stands.

    ``counts`` are images by side; ``left_out`` says what is on no side and why. ``leaking``: wells
    that train also test, so scores are those of wells already seen. ``created``: by this call,
    in run ``run_id``. ``family`` and ``fold``: which cross-validation it is a fold of.
    """

    name: str
    protocol: str
    field: str
    group_level: str
    seed: int
    fingerprint: str
    created: bool
    frozen: bool
    leaking: bool
    classes: int
    images: int
    counts: dict[str, int]
    wells_on_both_sides: int
    left_out: dict[str, Any]
    query: str
    run_id: int | None = None
    family: str | None = None
    fold: int | None = None


@dataclass(frozen=True)
class SplitLine:
    """A split in a list: images by side, and how many runs name it."""

    name: str
    protocol: str
    group_level: str
    field: str
    train: int
    validation: int
    test: int
    runs: int
    frozen: bool
    created_at: datetime
    family: str | None
    fold: int | None


@dataclass(frozen=True)
class Deleted:
    """Splits that are gone, or would go: one, or all folds of a family."""

    names: tuple[str, ...]
    images: int


@dataclass(frozen=True)
class CheckResult:
    """What a split gives away. ``findings`` is empty where nothing was found.

    ``split`` is its name, or the names of the tables that were looked at: then ``rows`` counts
    their rows that were, ``refused`` the lines that could not be used, and ``images`` is 0.
    ``unseen``: images whose files the store has not seen, so that their bytes were not compared.
    """

    split: str
    protocol: str
    group_level: str
    images: int
    wells: int
    wells_on_both_sides: int
    labels: int
    labels_on_both_sides: int
    plates_on_both_sides: int
    leaks: int
    warnings: int
    findings: tuple[Finding, ...]
    unseen: int = 0
    rows: int = 0
    refused: int = 0
