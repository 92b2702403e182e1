"""What each baseline reads of the training side, and what it learns from that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...db.models import SplitMember
from ...ops import baselines, draws
from ...ops.baselines import ForestConfig, LogisticConfig, Model
from ...ops.scaling import FeatureScaler, Scaler
from ...reading.cells import cells_query, list_blocks
from ...reading.normalising import fit_scaler
from ...reading.samples import places_of, read_values, stream_groups
from ...runs import Workspace
from ...terms import Subset
from .plan import Plan, as_list, training_wells

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """A baseline, what scales its input, and how many ``rows`` (cells, images, wells) it saw."""

    model: Model
    scaler: FeatureScaler
    rows: int
    notes: tuple[str, ...] = ()


def fit(workspace: Workspace, plan: Plan, kind: str, cells: Callable[[], Cells]) -> Fitted:
    """Fit one baseline; ``cells`` are those of the plan, which are read when one needs them."""
    if kind in _FITS:
        return _FITS[kind](workspace, plan)
    return _OF_CELLS[kind](workspace, plan, cells())


def left_out(plan: Plan, fitted: Fitted) -> tuple[str, ...]:
    """Return the columns without a value on the training side."""
    kept = frozenset(fitted.scaler.names)
    return tuple(name for name in plan.source.features.columns if name not in kept)


def _majority(_workspace: Workspace, plan: Plan) -> Fitted:
    places = _places(plan)
    counts = np.bincount([places[b.label_id] for b in plan.blocks], minlength=len(places))
    return Fitted(baselines.fit_constant(counts.tolist()), Scaler((), (), ()), len(plan.blocks))


def _cellcount(workspace: Workspace, plan: Plan) -> Fitted:
    """Cells count whether they are flagged or not: later, nobody will know which were."""
    images = {block.image_id for block in plan.blocks}
    with workspace.database.read() as session:
        every = list_blocks(session, replace(plan.source, unflagged_by=None))
    counts = {block.image_id: block for block in every if block.image_id in images}
    chosen = _drawn(plan, {block.image_id: block.label_id for block in counts.values()})
    rows = baselines.count_rows([counts[image_id].n_cells for image_id in chosen])
    scaler = Scaler.fit(baselines.COUNT, [rows])
    classes = _classes(plan, [counts[image_id].label_id for image_id in chosen])
    return _linear(plan, scaler.transform(rows), classes, scaler)


def _position(workspace: Workspace, plan: Plan) -> Fitted:
    with workspace.database.read() as session:
        wells = {well.well_id: well for well in training_wells(session, plan)}
    chosen = _drawn(plan, {well.well_id: well.label_id for well in wells.values()})
    rows = np.array([(wells[i].row, wells[i].column) for i in chosen], dtype=np.float32)
    classes = _classes(plan, [wells[i].label_id for i in chosen])
    # By heart: what always is in a place is to be known there, which small leaves alone can say.
    config = ForestConfig(plan.params.trees, depth=None, smallest_leaf=1, all_columns=True)
    model = baselines.fit_forest(rows, classes, plan.params.seed, config)
    return Fitted(model, Scaler(baselines.PLACE, (0.0, 0.0), (1.0, 1.0)), len(rows))


def _drawn(plan: Plan, labels: Mapping[int, int]) -> list[int]:
    """Images or wells, by their ids with their label, no more than there may be cells."""
    ids, groups = (np.array(list(x), dtype=np.int64) for x in (labels.keys(), labels.values()))
    lowest = draws.Lowest(plan.params.max_cells, plan.params.seed)
    lowest.add(groups, ids)
    drawn = lowest.drawn(draws.even_shares(lowest.counts, plan.params.max_cells))
    return sorted(np.concatenate(list(drawn.values())).tolist())


@dataclass(frozen=True)
class Cells:
    """Drawn cells: scaled features (N, F) float32, class indices (N,), ids of wells (N,)."""

    rows: NDArray[np.float32]
    classes: Ids
    wells: Ids
    scaler: FeatureScaler


def _logistic(_workspace: Workspace, plan: Plan, cells: Cells) -> Fitted:
    return _linear(plan, cells.rows, cells.classes, cells.scaler)


def _shuffled(workspace: Workspace, plan: Plan, cells: Cells) -> Fitted:
    with workspace.database.read() as session:
        wells = training_wells(session, plan)
    # A class that went to wells without a drawn cell would be in no row.
    drawn = frozenset(cells.wells.tolist())
    wells = [well for well in wells if well.well_id in drawn]
    before = np.array([well.label_id for well in wells])
    after = np.random.Generator(np.random.PCG64(plan.params.seed)).permutation(before)
    given = dict(zip((well.well_id for well in wells), after.tolist(), strict=True))
    classes = _classes(plan, [given[well] for well in cells.wells.tolist()])
    same = int((before == after).sum())
    note = f"Of {len(wells):,} wells, {same:,} got their own label back when labels were shuffled."
    fitted = _linear(plan, cells.rows, classes, cells.scaler)
    return replace(fitted, notes=(*fitted.notes, note))


def _forest(_workspace: Workspace, plan: Plan, cells: Cells) -> Fitted:
    params = plan.params
    config = ForestConfig(params.trees, params.depth, params.smallest_leaf)
    model = baselines.fit_forest(cells.rows, cells.classes, params.seed, config)
    return Fitted(model, cells.scaler, len(cells.rows))


def _linear(plan: Plan, rows: NDArray[np.float32], classes: Ids, scaler: FeatureScaler) -> Fitted:
    config = LogisticConfig(plan.params.strength)
    model, converged = baselines.fit_linear(rows, classes, config)
    note = f"Fitting had not converged after {config.steps} steps; a larger penalty makes it."
    return Fitted(model, scaler, len(rows), () if converged else (note,))


def draw_cells(workspace: Workspace, plan: Plan) -> Cells:
    """Draw cells evenly over the classes, and read what is to be known of them."""
    params, source = plan.params, plan.source
    counts: Counter[int] = Counter()
    for block in plan.blocks:
        counts[block.label_id] += block.n_cells
    shares = draws.even_shares(counts, params.max_cells)
    lowest = draws.Lowest(shares, params.seed)
    with workspace.database.read() as session:
        scaler = fit_scaler(session, source, params.normalise, (Subset.VALIDATION, Subset.TEST))
        query = cells_query(source)
        for groups, ids in stream_groups(session, query, source, SplitMember.label_id):
            lowest.add(groups, ids)
        drawn = lowest.drawn(shares)
        ids = np.sort(np.concatenate(list(drawn.values())))
        label_of = {i: label for label, some in drawn.items() for i in some.tolist()}
        values, places = read_values(session, source, ids, scaler.names), places_of(session, ids)
    classes = _classes(plan, [label_of[i] for i in ids.tolist()])
    return Cells(_scaled(scaler, values, places.plates), classes, places.wells, scaler)


def _scaled(
    scaler: FeatureScaler, values: NDArray[np.float64], plates: NDArray[np.str_]
) -> NDArray[np.float32]:
    rows = np.empty(values.shape, dtype=np.float32)
    for plate in np.unique(plates).tolist():
        there = plates == plate
        rows[there] = scaler.transform(values[there], plate)
    return rows


def _places(plan: Plan) -> dict[int, int]:
    return {label_id: place for place, label_id in enumerate(plan.labels.values())}


def _classes(plan: Plan, label_ids: list[int]) -> Ids:
    places = _places(plan)
    return np.array([places[label_id] for label_id in label_ids], dtype=np.int64)


def column_note(columns: tuple[str, ...]) -> str:
    """Return the sentence on columns that were left out."""
    what = f"{len(columns)} columns of the feature set have no value on the training side"
    return f"{what} and were left out: {as_list(columns)}."


_FITS: Mapping[str, Callable[[Workspace, Plan], Fitted]] = {
    baselines.MAJORITY: _majority,
    baselines.CELLCOUNT: _cellcount,
    baselines.POSITION: _position,
}
_OF_CELLS: Mapping[str, Callable[[Workspace, Plan, Cells], Fitted]] = {
    baselines.SHUFFLED: _shuffled,
    baselines.LOGISTIC: _logistic,
    baselines.FOREST: _forest,
}
