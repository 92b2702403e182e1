"""What is said of a baseline: when it is trained, and again when it is asked for a second time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Recipe, Run, Split
from ...ops.baselines import NULLS, ON_FEATURES
from ...ops.branches import TABULAR
from ...reading.normalising import describe_plates
from ...runs import Workspace, fingerprint
from ...terms import Stage, Status
from .fitting import Fitted, column_note, left_out
from .plan import Plan, as_list


@dataclass(frozen=True)
class BaselineResult:
    """A trained baseline.

    ``images`` and ``cells`` of the training side; ``rows``: how many cells, images or wells it
    learned from. ``null``: it knows nothing of what a treatment does to a cell. ``already_done``:
    the run was there before this call. ``notes`` are sentences that a reader of its scores has to
    know. ``predict_run_id``: the run in which it labelled the test side, if it did.
    """

    run_id: int
    recipe_id: int
    baseline: str
    null: bool
    split: str
    already_done: bool
    classes: int
    classes_without_cells: tuple[str, ...]
    images: int
    cells: int
    rows: int
    checkpoint_sha256: str
    notes: tuple[str, ...]
    feature_set: str | None = None
    columns_left_out: tuple[str, ...] = ()
    qc_run_id: int | None = None
    predict_run_id: int | None = None


_NAMES = frozenset(BaselineResult.__dataclass_fields__)


def summary(plan: Plan, kind: str, fitted: Fitted) -> dict[str, Any]:
    """Return what a run keeps of its training."""
    columns = left_out(plan, fitted) if kind in ON_FEATURES else ()
    notes = [*plan.remarks, *fitted.notes, *describe_plates(fitted.scaler, None)]
    if plan.without:
        some = as_list(plan.without)
        notes.append(f"{len(plan.without)} classes have no cell to train on: {some}.")
    if columns:
        notes.append(column_note(columns))
    return {
        "baseline": kind,
        "null": kind in NULLS,
        "branches": [TABULAR],  # it opens no image
        "classes": len(plan.labels),
        "classes_without_cells": list(plan.without),
        "images": len(plan.blocks),
        "cells": sum(block.n_cells for block in plan.blocks),
        "rows": fitted.rows,
        "notes": notes,
        "feature_set": plan.source.features.name if kind in ON_FEATURES else None,
        "columns_left_out": list(columns),
        "qc_run_id": plan.source.unflagged_by,
    }


def finished(workspace: Workspace, plan: Plan, kind: str) -> BaselineResult | None:
    """The latest finished run of this recipe."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(plan.spec(kind)), Recipe.stage == Stage.TRAIN)
        .where(Run.status == Status.DONE, Run.split_id == plan.split.id)
        .order_by(Run.id.desc())
    )
    with workspace.database.read() as session:
        found = session.scalars(query.limit(1)).first()
        return None if found is None else result_of(session, found)


def result_of(session: Session, run: Run) -> BaselineResult:
    """Return what was said of a finished run."""
    kept: Mapping[str, Any] = {k: v for k, v in (run.result or {}).items() if k in _NAMES}
    lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return BaselineResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        split=session.scalars(select(Split.name).where(Split.id == run.split_id)).one(),
        already_done=True,
        **{**kept, **lists},
    )
