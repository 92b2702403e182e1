"""Compare treatments with control, one after the other, and keep the table as a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ...config import ContrastParams
from ...extras import need
from ...ops import contrast as ops
from ...ops.contrast import Contrast, Verdict
from ...reading.cells import as_text, cells_query
from ...runs import Workspace, register, running
from .cells import POOL, Cells, match, read_group
from .outcome import ContrastResult, ContrastRow, finished, result_of
from .plan import Group, Plan, make_plan


def contrast(
    workspace: Workspace,
    params: ContrastParams | None = None,
    *,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> ContrastResult:
    """Say of each treatment whether its cells can be told from control cells of the same plates.

    See ``cellstore.ops.contrast``. What was compared with the same options on the same cells is
    returned as it is, unless ``force``.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UnknownNameError: no such treatment, plate, recipe or feature set.
        UserInputError: there is no control, or nothing to compare it with, or no measured cell.

    """
    need("train")
    plan = make_plan(workspace, params or ContrastParams(), (segmentation, measurement))
    earlier = None if force else finished(workspace, plan.spec)
    if earlier is not None:
        return earlier
    with workspace.database.begin() as session:
        recipe = register(session, plan.spec)
    query = as_text(cells_query(plan.source))
    with running(workspace.database, recipe, seed=plan.params.seed, query=query) as run:
        run.result = _compare(workspace, plan)
    with workspace.database.read() as session:
        return replace(result_of(session, run.id), already_done=False)


@dataclass
class _Chance:
    """Control wells against control wells, for the plates of the treatments that come now."""

    plan: Plan
    plate_ids: tuple[int, ...] | None = None
    pool: Cells | None = None
    known: dict[int, list[float]] = field(default_factory=dict)
    seen: dict[int, list[float]] = field(default_factory=dict)

    def controls(self, workspace: Workspace, group: Group) -> Cells:
        """The control cells of the plates of a group."""
        if self.pool is None or self.plate_ids != group.plate_ids:
            control = replace(self.plan.control, plate_ids=group.plate_ids)
            most = POOL * self.plan.params.max_cells
            self.pool = read_group(workspace, self.plan, control, most)
            self.plate_ids, self.known = group.plate_ids, {}
        return self.pool

    def areas(self, wells: int) -> list[float]:
        """AUCs of so many control wells, called treated, against the others."""
        assert self.pool is not None
        wells = min(wells, len(np.unique(self.pool.wells)) - ops.FEWEST_WELLS)
        if wells < ops.FEWEST_WELLS:
            return []
        if wells not in self.known:
            drawn = (_null(self.pool, wells, self.plan.params, i) for i in range(self._times))
            self.known[wells] = [found.auc for found in drawn if found is not None]
            self.seen.setdefault(wells, []).extend(self.known[wells])
        return self.known[wells]

    @property
    def _times(self) -> int:
        return self.plan.params.nulls


def _null(pool: Cells, n_wells: int, params: ContrastParams, time: int) -> Contrast | None:
    names = np.unique(pool.wells)
    generator = np.random.Generator(np.random.PCG64([params.seed, time]))
    called = np.isin(pool.wells, generator.choice(names, n_wells, replace=False))
    return _score(pool.take(called), pool.take(~called), params)


def _score(treated: Cells, control: Cells, params: ContrastParams) -> Contrast | None:
    """Compare what matches by plate; ``None`` where a side has fewer than two wells."""
    ours, theirs = match(treated, control, params.max_cells, params.seed)
    if min(len(np.unique(some.wells)) for some in (ours, theirs)) < ops.FEWEST_WELLS:
        return None
    rows = np.concatenate([ours.rows, theirs.rows])
    wells = np.concatenate([ours.wells, theirs.wells])
    plates = np.concatenate([ours.plates, theirs.plates])
    flags = np.repeat([True, False], [len(ours), len(theirs)])
    return ops.contrast(rows, flags, wells, plates, folds=params.folds, seed=params.seed)


def _compare(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    chance = _Chance(plan)
    workspace.progress.start("contrast", len(plan.groups))
    rows = []
    try:
        for group in plan.groups:
            rows.append(_row(workspace, plan, group, chance))
            workspace.progress.advance()
    finally:
        workspace.progress.finish()
    rows.sort(key=lambda row: (row.auc is None, -(row.auc or 0), row.treatment))
    tested = [row for row in rows if row.auc is not None]
    return {
        "control": plan.control.name,
        "feature_set": plan.source.features.name,
        "columns": len(plan.source.features.columns),
        "treatments": len(rows),
        "tested": len(tested),
        "different": sum(row.verdict == Verdict.YES.value for row in rows),
        "rows": [asdict(row) for row in (*rows, *_chance_rows(plan, chance))],
        "notes": _taught(plan) + _notes(tested, len(plan.groups)),
    }


def _row(workspace: Workspace, plan: Plan, group: Group, chance: _Chance) -> ContrastRow:
    many = "plate of it has" if group.lost == 1 else "plates of it have"
    lost = f"{group.lost} {many} no control wells" if group.lost else None
    if not group.plate_ids:
        note = "none of its plates has control wells"
        return ContrastRow(group.name, Verdict.TOO_FEW.value, note=note)
    control = chance.controls(workspace, group)
    treated = read_group(workspace, plan, group, plan.params.max_cells)
    found = _score(treated, control, plan.params)
    if found is None:
        return _too_few(group, treated, control)
    areas = chance.areas(found.treated_wells)
    return ContrastRow(
        treatment=group.name,
        verdict=ops.judge(found, areas).value,
        wells=found.treated_wells,
        control_wells=found.control_wells,
        plates=len(np.intersect1d(treated.plates, control.plates)),
        cells=found.treated_cells,
        control_cells=found.control_cells,
        accuracy=found.accuracy,
        balanced_accuracy=found.balanced_accuracy,
        auc=found.auc,
        low=found.low,
        high=found.high,
        usual=max(0.5, float(np.quantile(areas, 0.95))) if areas else None,
        note=lost,
    )


def _too_few(group: Group, treated: Cells, control: Cells) -> ContrastRow:
    wells, others = (len(np.unique(some.wells)) for some in (treated, control))
    short = f"{wells} well{'' if wells == 1 else 's'} with cells"
    if wells >= ops.FEWEST_WELLS:
        short = f"{others} control well{'' if others == 1 else 's'} with cells"
    return ContrastRow(
        treatment=group.name,
        verdict=Verdict.TOO_FEW.value,
        wells=wells,
        control_wells=others,
        plates=len(np.intersect1d(treated.plates, control.plates)),
        cells=len(treated),
        control_cells=len(control),
        note=f"{short} on plates that have both: none can be held out",
    )


def _chance_rows(plan: Plan, chance: _Chance) -> Iterator[ContrastRow]:
    for wells, areas in sorted(chance.seen.items()):
        if not areas:
            continue
        low, usual, high = np.quantile(areas, [0.025, 0.95, 0.975]).tolist()
        yield ContrastRow(
            treatment=f"{plan.control.name} vs {plan.control.name}",
            verdict="chance",
            null=True,
            wells=wells,
            auc=float(np.median(areas)),
            low=low,
            high=high,
            usual=usual,
            note=f"{len(areas)} times {wells} control wells against the others",
        )


def _taught(plan: Plan) -> list[str]:
    if plan.teacher is None:
        return []
    note = (
        f"These features are an embedding by training run {plan.teacher}, which was taught what "
        "wells got: on wells of its split, a difference says nothing. Use measurements."
    )
    return [note]


def _notes(tested: Sequence[ContrastRow], groups: int) -> list[str]:
    notes = []
    if groups > len(tested):
        notes.append(
            f"{groups - len(tested)} treatments have too few wells to hold one out. More "
            "replicates, or more plates, are the only way to know."
        )
    if any(row.usual is None for row in tested):
        notes.append("There are too few control wells to measure what chance looks like.")
    if len(tested) >= 20:
        notes.append(
            f"Of {len(tested)} treatments that do nothing, some {len(tested) // 20} to "
            f"{len(tested) // 10} would still look different: they are judged one by one."
        )
    return notes
