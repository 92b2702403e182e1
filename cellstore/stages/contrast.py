"""Compare treatments with control, one after the other, and keep the table as a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from ..analysis import contrasts as ops
from ..analysis.contrasts import Contrast, Verdict
from ..analysis.draws import Lowest, even_shares, lots
from ..config import ContrastParams, Selection, as_parameters
from ..enums import Control, Stage, Status
from ..errors import UnknownNameError, UserInputError
from ..extras import need
from ..jobs.recipes import RecipeSpec, fingerprint, register
from ..jobs.runs import running
from ..jobs.selection import images_of
from ..jobs.workspace import Workspace
from ..learn.inputs import teacher_of
from ..models import Cell, Image, Plate, Recipe, Run, Segmentation, Treatment, Well
from ..query.cells import (
    CellSource,
    as_text,
    cells_query,
    choose_recipes,
    places_of,
    read_values,
    recipes_of_set,
    stream_groups,
)
from ..query.feature_files import open_set

VERSION = 1
POOLED = "all treatments"


@dataclass(frozen=True)
class Group:
    """What is compared: a name, the ids of its treatments, and its plates that have controls.

    ``lost``: plates of it without control wells. ``but``: it is all treatments but these.
    """

    name: str
    treatment_ids: tuple[int, ...]
    plate_ids: tuple[int, ...]
    n_wells: int
    lost: int = 0
    but: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``teacher``: the training that the features were learned in, labels and all.
    """

    params: ContrastParams
    source: CellSource
    control: Group
    groups: tuple[Group, ...]
    spec: RecipeSpec
    teacher: int | None = None


def make_plan(
    workspace: Workspace, params: ContrastParams, names: tuple[str | None, str | None]
) -> Plan:
    """Return the plan; ``names`` are those of the segmentation and the measurement."""
    _check(params)
    with workspace.database.read() as session:
        if params.features is None:
            segment, measure = choose_recipes(session, *names)
        else:
            segment, measure = recipes_of_set(session, params.features, *names)
        features = open_set(session, workspace.artifacts, measure.id)
        source = CellSource(segment.id, measure.id, plates=params.plates, features=features)
        images_of(session, Selection(plates=params.plates))  # that there are such plates
        wells = _wells(session, params)
        control = _control(wells, params)
        groups = _groups(wells, control, params)
        spec = _spec(session, source, params, (segment, measure))
        teacher = teacher_of(session, measure)
    return Plan(params, source, control, groups, spec, teacher.id if teacher else None)


def _check(params: ContrastParams) -> None:
    if params.folds < 2 or params.max_cells < 2 or params.nulls < 0:
        raise UserInputError("A contrast needs 2 folds or more, and 2 cells or more on a side.")


@dataclass(frozen=True)
class _Wells:
    plate_id: int
    treatment_id: int
    name: str
    negative: bool
    number: int


def _wells(session: Session, params: ContrastParams) -> list[_Wells]:
    """Treatments on plates: a row for each pair, with how many wells."""
    keys = (Well.plate_id, Treatment.id, Treatment.name, Well.control)
    query = (
        select(*keys, func.count())
        .join(Treatment, Treatment.id == Well.treatment_id)
        .join(Plate, Plate.id == Well.plate_id)
        .group_by(*keys)
    )
    if params.plates:
        query = query.where(Plate.barcode.in_(params.plates))
    found = session.execute(query.order_by(Well.plate_id, Treatment.id))
    return [_Wells(*row[:3], row[3] == Control.NEGATIVE, row[4]) for row in found]


def _control(wells: Sequence[_Wells], params: ContrastParams) -> Group:
    wanted = params.control
    chosen = [w for w in wells if (w.negative if wanted is None else w.name == wanted)]
    if not chosen and wanted is None:
        raise UserInputError(
            "No treatment is marked as negative control. Name one with --control, or mark it as "
            "negcon (negative control) in the treatment table."
        )
    if not chosen:
        raise UnknownNameError.of("treatment", wanted, sorted({w.name for w in wells}))
    return _group(", ".join(sorted({w.name for w in chosen})), chosen)


def _groups(wells: Sequence[_Wells], control: Group, params: ContrastParams) -> tuple[Group, ...]:
    others = [w for w in wells if w.treatment_id not in control.treatment_ids]
    names = sorted({w.name for w in others})
    for name in params.treatments:
        if name not in names:
            raise UnknownNameError.of("treatment", name, names)
    chosen = params.treatments or tuple(names)
    if not chosen:
        raise UserInputError("Every well has the control. There is nothing to compare it with.")
    if params.pooled:
        pool = _group(POOLED, [w for w in others if w.name in set(chosen)])
        if not params.treatments:  # there may be more than a database takes one by one
            pool = replace(pool, treatment_ids=control.treatment_ids, but=True)
        found = [pool]
    else:
        by_name: dict[str, list[_Wells]] = {name: [] for name in chosen}
        for well in others:
            by_name.get(well.name, []).append(well)
        found = [_group(name, some) for name, some in by_name.items()]
    matched = (_on_plates_of(group, control) for group in found)
    # Those of the same plates follow each other, so that their controls are read once.
    return tuple(sorted(matched, key=lambda group: (group.plate_ids, group.name)))


def _group(name: str, wells: Sequence[_Wells]) -> Group:
    treatments, plates = ({w.treatment_id for w in wells}, {w.plate_id for w in wells})
    number = sum(some.number for some in wells)
    return Group(name, tuple(sorted(treatments)), tuple(sorted(plates)), number)


def _on_plates_of(group: Group, control: Group) -> Group:
    shared = tuple(plate for plate in group.plate_ids if plate in set(control.plate_ids))
    return replace(group, plate_ids=shared, lost=len(group.plate_ids) - len(shared))


def _spec(
    session: Session, source: CellSource, params: ContrastParams, inputs: tuple[Recipe, ...]
) -> RecipeSpec:
    parameters = as_parameters(params) | {"cells": _digest_of(session, source)}
    del parameters["features"], parameters["plates"]  # the cells say it
    parameters["treatments"] = sorted(params.treatments)
    if not source.features.in_table:
        parameters["feature_files"] = source.features.mark
    return RecipeSpec(Stage.CONTRAST, VERSION, parameters, None, inputs)


def _digest_of(session: Session, source: CellSource) -> str:
    """What decides the cells beside the recipes: images, their treatments, and how many cells."""
    keys = (Image.id, Segmentation.content_sha256, Well.id, Well.treatment_id)
    cells = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
    query: Any = cells.with_only_columns(*keys, func.count(Cell.id))
    if source.plates:
        on_plate = select(Plate.id).where(Plate.barcode.in_(source.plates))
        query = query.where(Well.plate_id.in_(on_plate))
    query = query.group_by(*keys).order_by(Image.id).execution_options(yield_per=10_000)
    digest = hashlib.sha256()
    for row in session.execute(query):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def cells_of(source: CellSource, group: Group) -> Any:
    """Return the query of the cells of a group on its plates."""
    query = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
    named = Well.treatment_id.in_(group.treatment_ids)
    treated = and_(Well.treatment_id.is_not(None), ~named) if group.but else named
    return query.where(treated, Well.plate_id.in_(group.plate_ids))


Ids = NDArray[np.int64]

POOL = 10
"""Control cells that are read for the plates of a treatment, in multiples of what is compared."""


@dataclass(frozen=True)
class Cells:
    """N cells: ids (N,), features (N, F) float64, ids of wells (N,), barcodes of plates (N,)."""

    ids: Ids
    rows: NDArray[np.float64]
    wells: Ids
    plates: NDArray[np.str_]

    def take(self, chosen: NDArray[np.bool_]) -> Cells:
        """The cells that are ``chosen``, (N,)."""
        return Cells(self.ids[chosen], self.rows[chosen], self.wells[chosen], self.plates[chosen])

    def draw(self, number: int, seed: int) -> Cells:
        """At most ``number`` of them, evenly over wells."""
        names, counts = np.unique(self.wells, return_counts=True)
        shares = even_shares(dict(zip(names.tolist(), counts.tolist(), strict=True)), number)
        chosen = np.zeros(len(self.ids), dtype=bool)
        order = np.argsort(lots(self.ids, seed), kind="stable")
        for well, share in shares.items():
            chosen[order[self.wells[order] == well][:share]] = True
        return self.take(chosen)

    def __len__(self) -> int:
        return len(self.ids)


def read_group(workspace: Workspace, plan: Plan, group: Group, most: int) -> Cells:
    """Draw at most ``most`` cells of a group, evenly over its wells, and read their features."""
    source, columns = plan.source, plan.source.features.columns
    with workspace.database.read() as session:
        lowest = Lowest(_most_of_well(group, most), plan.params.seed)
        query = cells_of(source, group)
        for wells, ids in stream_groups(session, query, source, Image.well_id):
            lowest.add(wells, ids)
        drawn = lowest.drawn(even_shares(lowest.kept, most)).values()
        ids = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
        values = read_values(session, source, ids, columns)
        places = places_of(session, ids)
    return Cells(ids, values, places.wells, places.plates)


def _most_of_well(group: Group, most: int) -> int:
    """Ids to keep of a well while all are looked at: room for wells with more than others."""
    return min(most, max(20, 4 * most // max(1, group.n_wells)))


def match(treated: Cells, control: Cells, most: int, seed: int) -> tuple[Cells, Cells]:
    """Draw the same number of both on each plate that has both, at most ``most`` in all.

    So plates that differ give nothing away, and 0.5 is chance.
    """
    both = np.intersect1d(treated.plates, control.plates).tolist()
    room = {p: min(int((some.plates == p).sum()) for some in (treated, control)) for p in both}
    shares = even_shares(room, most)
    ours, theirs = (_draw(some, shares, seed) for some in (treated, control))
    return ours, theirs


def _draw(cells: Cells, shares: Mapping[str, int], seed: int) -> Cells:
    chosen = np.zeros(len(cells), dtype=bool)
    for plate, share in shares.items():
        there = cells.plates == plate
        drawn = cells.take(there).draw(share, seed)
        chosen |= np.isin(cells.ids, drawn.ids)
    return cells.take(chosen)


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


def contrast(
    workspace: Workspace,
    params: ContrastParams | None = None,
    *,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> ContrastResult:
    """Say of each treatment whether its cells can be told from control cells of the same plates.

    See ``cellstore.analysis.contrasts``. What was compared with the same options on the same cells
    is returned as it is, unless ``force``.

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
