"""What it takes to redo a run, and what came of doing so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...config import (
    BaselineParams,
    MeasureParams,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)

Params = SegmentParams | MeasureParams | SplitParams | TrainParams | BaselineParams | PredictParams


@dataclass(frozen=True)
class Order:
    """What a run was asked to do, as the library takes it.

    ``names``: what goes beside the parameters: ``name`` of a split, ``split``, ``segmentation``,
    ``measurement``, ``run``, ``baseline``, ``folds``. ``doubts`` are sentences on what a command
    cannot say, or the store does not know.
    """

    params: Params
    names: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableRead:
    """A file that an ingest run read."""

    name: str
    sha256: str
    layout: str
    rows: int


@dataclass(frozen=True)
class Step:
    """A run that is needed, and the command that redoes it (without ``cellstore``).

    ``spelled``: the command says every option, so that the recipe's fingerprint comes out the
    same; else it is the command as it was typed, or empty where that is not known.
    """

    run_id: int
    stage: str
    words: tuple[str, ...]
    spelled: bool
    doubts: tuple[str, ...]
    fingerprint: str
    weights_sha256: str | None
    code_version: str
    environment: dict[str, Any]
    started_at: str
    tables: tuple[TableRead, ...] = ()


@dataclass(frozen=True)
class Repro:
    """All steps up to a run, in the order of doing them. ``script`` does them, in a shell."""

    run_id: int
    stage: str
    steps: tuple[Step, ...]
    packages: dict[str, str]
    python: str | None
    code_version: str
    script: str


IDENTICAL, EQUAL, DIFFERENT = "identical", "equal within tolerance", "different"
IMPOSSIBLE = "cannot be redone"


@dataclass(frozen=True)
class Check:
    """What came of redoing a run beside the store.

    ``compared`` of ``what`` were compared, ``differ`` of them differ: the first are told in
    ``differences``. ``largest`` is the largest difference of a number, to be held against
    ``tolerance``. ``same_recipe``: the recipe of the redone run has the same fingerprint.
    ``reasons``: why it cannot be redone, or why it may differ.
    """

    run_id: int
    stage: str
    verdict: str
    what: str
    compared: int
    differ: int
    largest: float
    tolerance: float
    same_recipe: bool
    differences: tuple[str, ...]
    reasons: tuple[str, ...]
    seconds: float = 0.0
