"""Compare treatments with control, one after the other, and keep the table as a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from ..analysis import contrasts
from ..analysis.contrasts import Contrast, Difference
from ..analysis.draws import Lowest, even_shares, lots
from ..config import ContrastParams, Selection
from ..db.bulk import in_lists
from ..db.fields import field_column
from ..enums import Control, Stage
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import images_of
from ..jobs.runs import RecipeSpec, digest_of_images, finished_run, result_of, running
from ..jobs.workspace import Workspace
from ..models import Image, Plate, Run, Treatment, Well
from ..notebooks import Shown
from ..query.cells import (
    CellSource,
    as_text,
    cells_query,
    choose_recipes,
    count_cells,
    read_drawn,
    stream_groups,
    trainings_of_features,
)
from ..query.feature_files import open_set
from ..settings import need, track

VERSION = 4
"""2: the negative controls are wells, not all wells of their treatments. 3: no interval. 4: chance
is measured ``FEWEST_NULLS`` times at least."""

TRIES = 10
"""How often control wells are drawn for a comparison: two must be on plates with two others."""

POOLED = "all treatments"
POOL = 10
"""Control cells that are read for the plates of a treatment, in multiples of what is compared."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class ContrastRow:
    """A treatment against control, on wells that were held out.

    ``wells`` and ``cells`` of the treatment, ``control_wells`` and ``control_cells`` of its
    control, on ``plates`` plates that have both; cells as they were drawn. ``usual``: what ``auc``
    stays at or below 19 times of 20 where control wells are compared with control wells, ``None``
    where these are too few. ``different``: yes, no, or too few wells. ``null``: control wells
    against control wells; ``auc`` is then their median.
    """

    treatment: str
    different: str
    null: bool = False
    wells: int = 0
    control_wells: int = 0
    plates: int = 0
    cells: int = 0
    control_cells: int = 0
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    auc: float | None = None
    usual: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class ContrastResult(Shown):
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


@dataclass(frozen=True)
class Group:
    """What is compared: a name, a condition on its wells, and its plates that have controls.

    ``n_wells``: how many wells it has. ``lost``: plates of it without control wells.
    """

    name: str
    which: ColumnElement[bool]
    plate_ids: tuple[int, ...]
    n_wells: int
    lost: int = 0


@dataclass(frozen=True)
class Cells:
    """N cells: ids (N,), features (N, F) float64, ids of wells (N,), barcodes of plates (N,)."""

    ids: Ids
    rows: NDArray[np.float64]
    wells: Ids
    plates: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_wells(self) -> int:
        """How many wells they are of."""
        return len(np.unique(self.wells))

    def take(self, chosen: NDArray[np.bool_]) -> Cells:
        """The cells that are ``chosen``, (N,)."""
        return Cells(self.ids[chosen], self.rows[chosen], self.wells[chosen], self.plates[chosen])

    def draw(self, shares: Mapping[str, int], seed: int) -> Cells:
        """At most so many of each plate, evenly over its wells."""
        chosen = np.zeros(len(self), dtype=bool)
        order = np.argsort(lots(self.ids, seed), kind="stable")
        for plate, share in shares.items():
            on_plate = order[self.plates[order] == plate]
            wells, counts = np.unique(self.wells[on_plate], return_counts=True)
            of_well = even_shares(dict(zip(wells.tolist(), counts.tolist(), strict=True)), share)
            for well, number in of_well.items():
                chosen[on_plate[self.wells[on_plate] == well][:number]] = True
        return self.take(chosen)


def contrast(
    workspace: Workspace,
    params: ContrastParams | None = None,
    *,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> ContrastResult:
    """Test for each treatment whether its cells differ from control cells of the same plates.

    See ``cellstore.analysis.contrasts``. What was compared with the same options on the same cells
    is returned as it is, unless ``force``.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UnknownNameError: no such treatment, plate, recipe or feature set.
        UserInputError: there is no control, or nothing to compare it with, or no measured cell.

    """
    need("train")
    params = params or ContrastParams()
    with workspace.database.read() as session:
        segment, measure = choose_recipes(session, segmentation, measurement, params.features)
        features = open_set(session, workspace.artifacts, measure.id)
        source = CellSource(segment.id, measure.id, plates=params.plates, features=features)
        images = images_of(session, Selection(plates=params.plates))
        control, groups = _choose_groups(session, params)
        parameters = asdict(params) | {
            "cells": digest_of_images(session, images, _treated_cells(session, source, params)),
            "treatments": sorted(params.treatments),
        }
        del parameters["features"], parameters["plates"]  # the cells say it
        if (mark := features.mark(session, segment.id, images)) is not None:
            parameters["feature_files"] = mark
        spec = RecipeSpec(Stage.CONTRAST, VERSION, parameters, None, (segment, measure))
        earlier = None if force else finished_run(session, spec)
        if earlier is not None:
            return _result(earlier)
        training = next(trainings_of_features(session, measure), None)
    query = as_text(cells_query(source))
    with running(workspace.database, spec, seed=params.seed, query=query) as run:
        run.result = _Comparison(workspace, params, source, control).result(groups)
        if training is not None:
            note = (
                f"These features are an embedding by training run {training.id}, which learned "
                "what wells got: a difference on wells of its split proves nothing. Use "
                "measurements."
            )
            run.result["notes"].insert(0, note)
    with workspace.database.read() as session:
        return replace(_result(session.get_one(Run, run.id)), already_done=False)


def _result(run: Run) -> ContrastResult:
    rows = tuple(ContrastRow(**row) for row in (run.result or {})["rows"])
    return result_of(run, ContrastResult, already_done=True, rows=rows)


def _choose_groups(session: Session, params: ContrastParams) -> tuple[Group, tuple[Group, ...]]:
    """Return the control, and what is compared with it."""
    keys = (
        *(Well.plate_id, Treatment.id.label("treatment_id"), Treatment.name, Well.control),
        field_column(params.field).label("label"),
    )
    query = (
        select(*keys, func.count().label("number"))
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .join(Plate, Plate.id == Well.plate_id)
        .group_by(*keys)
    )
    if params.plates:
        query = query.where(Plate.barcode.in_(params.plates))
    wells = session.execute(query.order_by(Well.plate_id, Treatment.id)).all()
    by_mark = params.control is None
    controls, others = list[Any](), list[Any]()
    for well in wells:
        named_so = params.control in (well.name, well.label)
        if (well.control == Control.NEGATIVE) if by_mark else named_so:
            controls.append(well)
        elif well.treatment_id is not None:
            others.append(well)
    if not controls and by_mark:
        raise UserInputError(
            "No well is a negative control. Name a treatment with --control, or mark wells: "
            "cellstore relabel WELL --control negative --reason TEXT"
        )
    if not controls:
        raise UnknownNameError.of("treatment", params.control, sorted({w.name for w in others}))

    def group(name: str, rows: Sequence[Any], which: ColumnElement[bool] | None = None) -> Group:
        """The group of some rows of ``wells``; by default the wells with their treatments."""
        if which is None:
            which = Well.treatment_id.in_(sorted({row.treatment_id for row in rows} - {None}))
        plates = tuple(sorted({row.plate_id for row in rows}))
        return Group(name, which, plates, sum(row.number for row in rows))

    negative = Well.control == Control.NEGATIVE
    names = sorted({w.name or "no treatment" for w in controls})
    control = group(", ".join(names), controls, negative if by_mark else None)
    named: dict[str, set[str]] = defaultdict(set)  # a name without dose means all its doses
    for well in others:
        if well.label is not None:
            named[well.label].add(well.label)
            named[well.name].add(well.label)
    for name in params.treatments:
        if name not in named:
            raise UnknownNameError.of("treatment", name, sorted(named))
    chosen = {label for name in params.treatments or named for label in named[name]}
    if not others:
        raise UserInputError("Every well has the control. There is nothing to compare it with.")
    if not chosen:
        raise UserInputError(f"No treated well has a {params.field}. Choose another --field.")
    if params.pooled:
        pooled = [w for w in others if not params.treatments or w.label in chosen]
        every: ColumnElement[bool] | None = None
        if not params.treatments:  # there may be more than a database takes one by one
            every = Well.treatment_id.is_not(None)
            every = every if by_mark else and_(every, ~control.which)
        groups = [group(POOLED, pooled, every)]
    else:
        by_name: dict[str, list[Any]] = {name: [] for name in chosen}
        for well in others:
            by_name.get(well.label, []).append(well)
        groups = [group(name, some) for name, some in by_name.items()]
    matched = []
    for found in groups:
        shared = tuple(plate for plate in found.plate_ids if plate in set(control.plate_ids))
        which = found.which
        if by_mark:  # a treatment may have wells that are controls, and others
            which = and_(which, Well.control.is_distinct_from(Control.NEGATIVE))
        lost = len(found.plate_ids) - len(shared)
        matched.append(replace(found, which=which, plate_ids=shared, lost=lost))
    # Those of the same plates follow each other, so that their controls are read once.
    return control, tuple(sorted(matched, key=lambda group: (group.plate_ids, group.name)))


def _treated_cells(
    session: Session, source: CellSource, params: ContrastParams
) -> dict[int, list[Any]]:
    """By image id: what was done to its well, its role, and how many cells it has."""
    query: Any = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
    if source.plates:
        on_plate = select(Plate.id).where(Plate.barcode.in_(source.plates))
        query = query.where(Well.plate_id.in_(on_plate))
    counts = count_cells(session, query, source)
    wells = select(Image.id, Treatment.identity, Well.control, field_column(params.field))
    wells = wells.join(Well, Well.id == Image.well_id)
    wells = wells.outerjoin(Treatment, Treatment.id == Well.treatment_id)
    found: dict[int, list[Any]] = {}
    for some in in_lists(counts):
        for image_id, *values in session.execute(wells.where(Image.id.in_(some))):
            found[image_id] = [*values, counts[image_id]]
    return found


class _Comparison:
    """Compares groups with ``control``, and control wells with control wells.

    The control cells of the plates of one group are kept for the groups that follow, as is what
    chance looks like on these plates: AUCs by how many control wells were called treated.
    """

    def __init__(
        self, workspace: Workspace, params: ContrastParams, source: CellSource, control: Group
    ) -> None:
        self.workspace, self.params, self.source = workspace, params, source
        self.control = control
        self.pool: tuple[tuple[int, ...], Cells] | None = None
        self.areas: dict[int, list[float]] = {}
        self.all_areas: dict[int, list[float]] = {}

    def result(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return what the run keeps."""
        each = track(self.workspace.progress, "contrast", len(groups), groups)
        rows = [self._row(group) for group in each]
        rows.sort(key=lambda row: (row.auc is None, -(row.auc or 0), row.treatment))
        tested = [row for row in rows if row.auc is not None]
        chance = []
        for wells, areas in sorted(self.all_areas.items()):
            if not areas:
                continue
            row = ContrastRow(
                treatment=f"{self.control.name} vs {self.control.name}",
                different="chance",
                null=True,
                wells=wells,
                auc=float(np.median(areas)),
                usual=contrasts.usual_auc(areas),
                note=f"{len(areas)} times {wells} control wells against the others",
            )
            chance.append(row)
        return {
            "control": self.control.name,
            "feature_set": self.source.features.name,
            "columns": len(self.source.features.columns),
            "treatments": len(rows),
            "tested": len(tested),
            "different": sum(row.different == Difference.YES.value for row in rows),
            "rows": [asdict(row) for row in (*rows, *chance)],
            "notes": _notes(tested, len(groups)),
        }

    def _row(self, group: Group) -> ContrastRow:
        if not group.plate_ids:
            note = "none of its plates has control wells"
            return ContrastRow(group.name, Difference.TOO_FEW.value, note=note)
        most = self.params.max_cells
        if self.pool is None or self.pool[0] != group.plate_ids:
            control = replace(self.control, plate_ids=group.plate_ids)
            self.pool = group.plate_ids, self._read(control, POOL * most)
            self.areas = {}
        pool = self.pool[1]
        treated = self._read(group, most)
        row = ContrastRow(
            treatment=group.name,
            different=Difference.TOO_FEW.value,
            wells=treated.n_wells,
            control_wells=pool.n_wells,
            plates=len(np.intersect1d(treated.plates, pool.plates)),
            cells=len(treated),
            control_cells=len(pool),
        )
        found = self._compare(treated, pool)
        if found is None:
            short, what = treated.n_wells, "well"
            if short >= contrasts.FEWEST_WELLS:
                short, what = pool.n_wells, "control well"
            wells = f"{short} {what}{'' if short == 1 else 's'}"
            note = f"{wells} with cells on plates that have both: none can be held out"
            return replace(row, note=note)
        areas = self._chance(pool, found.treated_wells)
        many = "plate of it has" if group.lost == 1 else "plates of it have"
        return replace(
            row,
            different=contrasts.judge(found.auc, areas).value,
            wells=found.treated_wells,
            control_wells=found.control_wells,
            cells=found.treated_cells,
            control_cells=found.control_cells,
            accuracy=found.accuracy,
            balanced_accuracy=found.balanced_accuracy,
            auc=found.auc,
            usual=contrasts.usual_auc(areas),
            note=f"{group.lost} {many} no control wells" if group.lost else None,
        )

    def _read(self, group: Group, most: int) -> Cells:
        """Draw at most ``most`` cells of a group, evenly over its wells; read their features."""
        source, columns = self.source, self.source.features.columns
        query = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
        query = query.where(group.which, Well.plate_id.in_(group.plate_ids))
        # Ids to keep of a well while all are looked at: room for wells with more than others.
        of_well = min(most, max(20, 4 * most // max(1, group.n_wells)))
        lowest = Lowest(of_well, self.params.seed)
        with self.workspace.database.read() as session:
            for wells, ids in stream_groups(session, query, source, Image.well_id):
                lowest.add(wells, ids)
            drawn = lowest.drawn(even_shares(lowest.kept, most)).values()
            ids = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
            return Cells(ids, *read_drawn(session, source, ids, columns))

    def _compare(self, treated: Cells, control: Cells) -> Contrast | None:
        """Compare the same number of both on each plate that has both.

        So plates that differ give nothing away, and 0.5 is chance. ``None`` where one of the two
        has fewer than two wells.
        """
        params = self.params
        both = np.intersect1d(treated.plates, control.plates).tolist()
        room = {p: min(int((some.plates == p).sum()) for some in (treated, control)) for p in both}
        shares = even_shares(room, params.max_cells)
        ours, theirs = (some.draw(shares, params.seed) for some in (treated, control))
        if min(ours.n_wells, theirs.n_wells) < contrasts.FEWEST_WELLS:
            return None
        return contrasts.contrast(
            np.concatenate([ours.rows, theirs.rows]),
            np.repeat([True, False], [len(ours), len(theirs)]),
            np.concatenate([ours.wells, theirs.wells]),
            np.concatenate([ours.plates, theirs.plates]),
            folds=params.folds,
            seed=params.seed,
        )

    def _chance(self, pool: Cells, wells: int) -> list[float]:
        """AUCs of so many control wells, called treated, against the others."""
        wells = min(wells, pool.n_wells - contrasts.FEWEST_WELLS)
        if wells < contrasts.FEWEST_WELLS:
            return []
        if wells not in self.areas:
            found: list[float] = []
            for time in range(TRIES * self.params.nulls):
                generator = np.random.Generator(np.random.PCG64([self.params.seed, time]))
                names = generator.choice(np.unique(pool.wells), wells, replace=False)
                called = np.isin(pool.wells, names)
                if (item := self._compare(pool.take(called), pool.take(~called))) is not None:
                    found.append(item.auc)
                if len(found) == self.params.nulls:
                    break
            self.areas[wells] = found
            self.all_areas.setdefault(wells, []).extend(self.areas[wells])
        return self.areas[wells]


def _notes(tested: Sequence[ContrastRow], groups: int) -> list[str]:
    notes = []
    if groups > len(tested):
        notes.append(
            f"{groups - len(tested)} treatments have too few wells to hold one out. More "
            "replicates, or more plates, are the only way to know. To compare all doses of a "
            "compound together: --field perturbation"
        )
    if any(row.usual is None for row in tested):
        notes.append(
            "Of some treatments it cannot be said whether they differ: there are too few control "
            "wells on their plates to measure what chance looks like. Add plates or control wells."
        )
    if len(tested) >= 20:
        notes.append(
            f"Of {len(tested)} treatments that do nothing, some {len(tested) // 20} to "
            f"{len(tested) // 10} would still look different: they are judged one by one."
        )
    return notes
