"""What a contrast says, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Recipe, Run
from ...runs import RecipeSpec, Workspace, fingerprint
from ...terms import Stage, Status


@dataclass(frozen=True)
class ContrastRow:
    """A treatment against control, on wells that were held out.

    ``wells`` and ``cells`` of the treatment, ``control_wells`` and ``control_cells`` of its
    control, on ``plates`` plates that have both; cells as they were drawn. ``auc`` is bounded by
    ``low`` and ``high`` (95 % bootstrap interval over wells), and ``usual`` is what it stays below
    19 times of 20 where control wells are compared with control wells. ``verdict``: yes, no, or too
    few wells, which ``note`` explains. ``null``: control wells against control wells; ``auc`` is
    then their median, and ``low`` to ``high`` holds 95 % of them.
    """

    treatment: str
    verdict: str
    null: bool = False
    wells: int = 0
    control_wells: int = 0
    plates: int = 0
    cells: int = 0
    control_cells: int = 0
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    auc: float | None = None
    low: float | None = None
    high: float | None = None
    usual: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class ContrastResult:
    """Treatments against control, the most different first; rows of chance last.

    ``different`` of ``tested`` treatments look different from ``control``. ``already_done``: the
    run was there before this call.
    """

    run_id: int
    recipe_id: int
    already_done: bool
    control: str
    feature_set: str | None
    columns: int
    treatments: int
    tested: int
    different: int
    rows: tuple[ContrastRow, ...]
    notes: tuple[str, ...]


def finished(workspace: Workspace, spec: RecipeSpec) -> ContrastResult | None:
    """The latest finished run of this recipe."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(spec), Recipe.stage == Stage.CONTRAST)
        .where(Run.status == Status.DONE)
        .order_by(Run.id.desc())
    )
    with workspace.database.read() as session:
        found = session.scalars(query.limit(1)).first()
        return None if found is None else result_of(session, found.id)


def result_of(session: Session, run_id: int) -> ContrastResult:
    """Return what was said of a finished run."""
    run = session.get_one(Run, run_id)
    kept: Mapping[str, Any] = run.result or {}
    rows = tuple(ContrastRow(**row) for row in kept["rows"])
    return ContrastResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        already_done=True,
        **{**kept, "rows": rows, "notes": tuple(kept["notes"])},
    )
