"""Train baselines: one run of stage ``train`` each, with a checkpoint like any other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..analysis import draws
from ..config import BaselineParams
from ..enums import ArtifactKind, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..extras import need
from ..jobs.lookup import find_split
from ..jobs.recipes import RecipeSpec, fingerprint, register
from ..jobs.runs import attach, keep_file, running
from ..jobs.workspace import Workspace
from ..learn import baselines
from ..learn.baselines import (
    NULLS,
    ON_FEATURES,
    BaselineMeta,
    ForestConfig,
    LogisticConfig,
    Model,
    choose,
    save_model,
)
from ..learn.branches import TABULAR
from ..learn.inputs import flags_that_count, taught_wells, training_labels
from ..learn.normalising import (
    NORMALISATIONS,
    TRAIN,
    FeatureScaler,
    Scaler,
    describe_plates,
    fit_scaler,
)
from ..models import Image, Recipe, Run, Split, SplitMember, Well
from ..query.cells import (
    CellSource,
    ImageBlock,
    as_text,
    cells_query,
    choose_recipes,
    list_blocks,
    places_of,
    read_values,
    recipes_of_set,
    stream_groups,
)
from ..query.feature_files import open_set

VERSION = 1
_USED = {
    baselines.MAJORITY: (),
    baselines.SHUFFLED: ("max_cells", "seed", "strength"),
    baselines.CELLCOUNT: ("max_cells", "seed", "strength"),
    baselines.POSITION: ("max_cells", "seed", "trees"),
    baselines.LOGISTIC: ("max_cells", "seed", "strength"),
    baselines.FOREST: ("max_cells", "seed", "trees", "depth", "smallest_leaf"),
}
"""The parameters that decide what each baseline learns."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``source`` is the training side, ``blocks`` its images that have cells, ``labels`` the classes
    of these by value; ``without`` are the classes that have no cell to learn from.
    """

    params: BaselineParams
    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    blocks: tuple[ImageBlock, ...]
    labels: dict[str, int]
    without: tuple[str, ...]
    remarks: tuple[str, ...]
    inputs: tuple[Recipe, ...]

    def spec(self, kind: str) -> RecipeSpec:
        """Return what decides the result of one baseline."""
        parameters = {name: getattr(self.params, name) for name in _USED[kind]}
        parameters |= {"baseline": kind, "split": self.split.fingerprint}
        parameters |= {"cells": _digest_of(self.blocks)}
        if self.source.unflagged_by is not None:
            parameters["exclude_flagged"] = self.source.unflagged_by
        if kind in baselines.ON_FEATURES:
            parameters |= _reading(self.params, self.source)
        return RecipeSpec(Stage.TRAIN, VERSION, parameters, None, self.inputs)


def _reading(params: BaselineParams, source: CellSource) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if params.normalise != TRAIN:
        found["normalise"] = params.normalise
    if not source.features.in_table:
        found |= {"feature_files": source.features.mark, "gaps": "mean of the training side"}
    return found


def make_plan(
    workspace: Workspace, params: BaselineParams, names: tuple[str | None, str | None, str | None]
) -> Plan:
    """Return the plan; ``names`` are those of the split, the segmentation and the measurement."""
    _check(params)
    with workspace.database.read() as session:
        split = find_split(session, names[0])
        if params.features is None:
            segment, measure = choose_recipes(session, names[1], names[2])
        else:
            segment, measure = recipes_of_set(session, params.features, names[1], names[2])
        features = open_set(session, workspace.artifacts, measure.id)
        qc, unseen = flags_that_count(session, params.exclude_flagged, split.id, segment.id)
        source = CellSource(segment.id, measure.id, split.id, Subset.TRAIN, features=features)
        source = replace(source, unflagged_by=qc.id if qc else None)
        blocks = tuple(list_blocks(session, source))
        labels, without = _labels(session, split, blocks)
        made_by = session.get_one(Recipe, split.recipe_id)
        by_qc = (session.get_one(Recipe, qc.recipe_id),) if qc else ()
        leak = taught_wells(session, measure, split.id)
    inputs = (made_by, segment, measure, *by_qc)
    remarks = tuple(text for text in (unseen, leak) if text)
    return Plan(params, split, segment, measure, source, blocks, labels, without, remarks, inputs)


def _check(params: BaselineParams) -> None:
    counts = (params.max_cells, params.trees, params.depth, params.smallest_leaf)
    if min(counts) < 1 or params.strength <= 0:
        raise UserInputError(
            "The numbers of cells, trees and levels and the penalty must be above 0."
        )
    if params.normalise not in NORMALISATIONS:
        raise UnknownNameError.of("normalisation", params.normalise, NORMALISATIONS)


def _labels(
    session: Session, split: Split, blocks: Sequence[ImageBlock]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Label ids by value, sorted by value, and the values that no block has."""
    seen = {block.label_id for block in blocks}
    every = training_labels(session, split.id)
    known = {value: label_id for value, label_id in every.items() if label_id in seen}
    return known, tuple(value for value in every if value not in known)


def _digest_of(blocks: Sequence[ImageBlock]) -> str:
    digest = hashlib.sha256()
    for line in sorted((b.content_sha256 or "", b.label_id, b.n_cells) for b in blocks):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def check_blocks(plan: Plan) -> None:
    """Refuse a training side without measured cells, or of one class."""
    if not plan.blocks:
        what = f"cells in feature set {plan.source.features.name!r}"
        raise UserInputError(
            f"No image on the training side of split {plan.split.name!r} has "
            f"{'measured cells' if plan.source.features.in_table else what}. "
            "Run: cellstore segment, then: cellstore measure; or name another split with --split."
        )
    if len(plan.labels) < 2:
        raise UserInputError(
            f"The training side of split {plan.split.name!r} has cells of one class only "
            f"({next(iter(plan.labels))}), so there is nothing to tell apart. Make another split."
        )
    if plan.params.max_cells < len(plan.labels):
        raise UserInputError(
            f"{plan.params.max_cells} cells cannot be of all {len(plan.labels)} classes. Give more "
            "--max-cells."
        )


@dataclass(frozen=True)
class WellOf:
    """A well: where it is, and the label of its training images."""

    well_id: int
    row: int
    column: int
    label_id: int


def training_wells(session: Session, plan: Plan) -> list[WellOf]:
    """Return the wells of the training images that have cells, by id."""
    query = (
        select(Well.id, Well.well_row, Well.well_column, SplitMember.label_id, SplitMember.image_id)
        .join(Image, Image.well_id == Well.id)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == plan.split.id, SplitMember.subset == Subset.TRAIN)
        .order_by(Well.id, Image.id)
        .execution_options(yield_per=10_000)
    )
    seen = {block.image_id for block in plan.blocks}
    found: dict[int, WellOf] = {}
    for well_id, row, column, label_id, image_id in session.execute(query):
        if image_id in seen and well_id not in found:
            found[well_id] = WellOf(well_id, row, column, label_id)
    return list(found.values())


def commit(workspace: Workspace, plan: Plan, kind: str) -> Recipe:
    """Register the recipe; the run that follows freezes the split."""
    with workspace.database.begin() as session:
        return register(session, plan.spec(kind))


def as_list(values: Sequence[Any]) -> str:
    """Return the first few of ``values``, with commas."""
    return ", ".join(str(value) for value in values[:5])


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


def train_baselines(
    workspace: Workspace,
    kinds: Sequence[str],
    params: BaselineParams | None = None,
    *,
    split: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> tuple[BaselineResult, ...]:
    """Train baselines on the training side of a split (default: the latest).

    ``kinds``: some of ``cellstore.learn.baselines.BASELINES``, or the groups ``null`` and ``all``.
    A baseline that was finished with the same recipe is returned as it is, unless ``force``.

    Raises:
        MissingExtraError: scikit-learn and the like are not installed.
        UnknownNameError: no such baseline, split, recipe or feature set.
        UserInputError: the training side has no measured cells or one class, or a parameter is
            out of range.

    """
    need("train")
    chosen = choose(kinds)
    plan = make_plan(workspace, params or BaselineParams(), (split, segmentation, measurement))
    check_blocks(plan)
    workspace.progress.start("train", len(chosen))
    try:
        cells = cache(lambda: draw_cells(workspace, plan))  # read once for all that need them
        return tuple(_train(workspace, plan, kind, cells, force=force) for kind in chosen)
    finally:
        workspace.progress.finish()


def _train(
    workspace: Workspace, plan: Plan, kind: str, cells: Callable[[], Cells], *, force: bool
) -> BaselineResult:
    earlier = None if force else finished(workspace, plan, kind)
    if earlier is None:
        earlier = _new(workspace, plan, kind, cells)
    workspace.progress.advance()
    return earlier


def _new(workspace: Workspace, plan: Plan, kind: str, cells: Callable[[], Cells]) -> BaselineResult:
    recipe = commit(workspace, plan, kind)
    query = as_text(cells_query(plan.source))
    with running(
        workspace.database, recipe, split_id=plan.split.id, seed=plan.params.seed, query=query
    ) as run:
        fitted = fit(workspace, plan, kind, cells)
        sha256 = _keep_checkpoint(workspace, run.id, _meta(plan, kind, fitted, recipe), fitted)
        run.result = summary(plan, kind, fitted) | {"checkpoint_sha256": sha256}
    with workspace.database.read() as session:
        return replace(result_of(session, session.get_one(Run, run.id)), already_done=False)


def _meta(plan: Plan, kind: str, fitted: Fitted, recipe: Recipe) -> BaselineMeta:
    return BaselineMeta(
        model=kind,
        labels=tuple(plan.labels),
        field=plan.split.field,
        scaler=fitted.scaler,
        fingerprints={
            "train": recipe.fingerprint,
            "split": plan.split.fingerprint,
            "segment": plan.segment.fingerprint,
            "measure": plan.measure.fingerprint,
        },
        feature_set=plan.source.features.name,
    )


def _keep_checkpoint(workspace: Workspace, run_id: int, meta: BaselineMeta, fitted: Fitted) -> str:
    """Write arrays and the record beside them, then their rows; return the arrays' sha256."""
    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_model(fitted.model), ".safetensors")
    record = meta.to_json() | {"tensors_sha256": tensors.sha256, "rows": fitted.rows}
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    files = (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json"))
    with workspace.database.begin() as session:
        for file in files:
            attach(session, run_id, keep_file(session, file))
    return tensors.sha256
