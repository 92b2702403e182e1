"""What is said of a training: when it ends, and again when it is asked for a second time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Recipe, Run, RunMetric, Split
from ...ops.branches import BRANCHES
from ...runs import Workspace, fingerprint
from ...terms import Stage, Status, Subset
from .plan import Plan

if TYPE_CHECKING:
    from ...ops.training import FitResult


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    ``images``, ``cells`` and ``images_without_cells`` count by side (``train``,
    ``validation``); ``validation_side`` is the side of the split that stopped the training.
    ``metrics`` has one record per epoch. ``already_done``: the run was there before this call.
    ``notes`` are sentences that a reader of the scores has to know. ``columns_left_out`` of the
    feature set have no value on the training side. ``qc_run_id``: the quality-control run whose
    ``images_flagged`` (whole) and ``cells_flagged`` (those of such images included) were left out.
    ``resumed_after``: the epoch after which the run was gone on with last; 0: it never was.
    """

    run_id: int
    recipe_id: int
    split: str
    already_done: bool
    classes: int
    classes_without_cells: tuple[str, ...]
    images: dict[str, int]
    cells: dict[str, int]
    images_without_cells: dict[str, int]
    validation_side: str
    epochs: int
    best_epoch: int
    stopped_early: bool
    checkpoint_sha256: str
    metrics: tuple[dict[str, float], ...]
    notes: tuple[str, ...]
    feature_set: str | None = None
    branches: tuple[str, ...] = BRANCHES
    columns_left_out: tuple[str, ...] = ()
    qc_run_id: int | None = None
    images_flagged: int = 0
    cells_flagged: int = 0
    resumed_after: int = 0


def summary(
    plan: Plan, result: FitResult, columns: list[str], remarks: Sequence[str]
) -> dict[str, Any]:
    """Return what a run keeps of its training; ``columns`` of the feature set were left out."""
    seen = {block.label_id for block in plan.sides["train"]}
    without = [value for value, label_id in plan.labels.items() if label_id not in seen]
    images = {side: len(blocks) for side, blocks in plan.sides.items()}
    left_out = {side: plan.members[side] - count for side, count in images.items()}
    left_out["validation"] -= plan.untaught
    return {
        "classes": len(plan.labels),
        "classes_without_cells": without,
        "images": images,
        "cells": {side: sum(b.n_cells for b in blocks) for side, blocks in plan.sides.items()},
        "images_without_cells": left_out,
        "validation_side": plan.validation_side.value,
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch,
        "stopped_early": result.stopped_early,
        "feature_set": plan.source.features.name,
        "branches": list(plan.branches),
        "columns_left_out": columns,
        "notes": [
            *_notes(plan, without, sum(left_out.values())),
            *_column_notes(columns),
            *remarks,
        ],
        **_flagged(plan),
    }


def _flagged(plan: Plan) -> dict[str, int]:
    found = plan.flagged
    if found is None:
        return {}
    counts = {"images_flagged": found.images, "cells_flagged": found.cells}
    return {"qc_run_id": found.run_id, **counts}


def _column_notes(columns: Sequence[str]) -> list[str]:
    if not columns:
        return []
    some = ", ".join(columns[:5])
    what = f"{len(columns)} columns of the feature set have no value on the training side"
    return [f"{what} and were left out: {some}."]


def _notes(plan: Plan, without: Sequence[str], left_out: int) -> list[str]:
    notes = list(plan.remarks)
    if plan.validation_side is Subset.TEST:
        notes.append(
            "As published, the test side also chose the epoch, and its wells are in training "
            "too: scores are those of wells already seen."
        )
    if plan.untaught:
        notes.append(
            f"{plan.untaught} images of the validation side were left out: their classes are not "
            "on the training side."
        )
    if without:
        notes.append(f"{len(without)} classes have no cell to train on: {', '.join(without[:5])}.")
    flagged = plan.flagged.images if plan.flagged else 0
    if left_out > flagged:
        missing = left_out - flagged
        notes.append(f"{missing} images of the split have no measured cells and were left out.")
    if plan.flagged:
        notes.append(
            f"Left out, because quality-control run {plan.flagged.run_id} flagged them: "
            f"{plan.flagged.images:,} images and {plan.flagged.cells:,} cells, those of the images "
            "included."
        )
    return notes


def finished(workspace: Workspace, plan: Plan) -> TrainResult | None:
    """The training that this recipe has seen to its end, the latest one."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(plan.spec), Recipe.stage == Stage.TRAIN)
        .where(Run.status == Status.DONE, Run.split_id == plan.split.id)
        .order_by(Run.id.desc())
    )
    with workspace.database.read() as session:
        found = session.scalars(query.limit(1)).first()
        return None if found is None else result_of(session, found)


def result_of(session: Session, run: Run) -> TrainResult:
    """Return what was said of a finished training run."""
    kept: Mapping[str, Any] = run.result or {}
    lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return TrainResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        split=session.scalars(select(Split.name).where(Split.id == run.split_id)).one(),
        already_done=True,
        metrics=metrics_of(session, run.id),
        **{**kept, **lists},
    )


def metrics_of(session: Session, run_id: int) -> tuple[dict[str, float], ...]:
    """Return the metrics of a run by name, a record for each epoch."""
    query = select(RunMetric).where(RunMetric.run_id == run_id).order_by(RunMetric.epoch)
    epochs: dict[int, dict[str, float]] = {}
    for item in session.scalars(query):
        record = epochs.setdefault(item.epoch, {"epoch": item.epoch})
        record[item.name] = float("nan") if item.value is None else item.value
    return tuple(epochs.values())
