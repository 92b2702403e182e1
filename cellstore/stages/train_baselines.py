"""Train baselines: one run of stage ``train`` each, with a checkpoint like any other."""

from __future__ import annotations

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
from ..enums import Stage, Subset
from ..errors import UserInputError
from ..extras import need
from ..jobs.runs import RecipeSpec, attach, finished_run, keep_file, register, running
from ..jobs.workspace import Workspace
from ..learn import baselines
from ..learn.baselines import NULLS, ON_FEATURES, ForestConfig, choose
from ..learn.branches import TABULAR
from ..learn.training_cells import (
    Names,
    TrainingCells,
    excluded_columns,
    find_training_cells,
    result_from,
)
from ..models import Image, Run, SplitMember, Well
from ..query.cells import (
    as_text,
    cells_query,
    list_blocks,
    read_values,
    stream_groups,
    wells_and_plates,
)

VERSION = 1
USED = {
    baselines.MAJORITY: (),
    baselines.SHUFFLED: ("max_cells", "seed", "strength"),
    baselines.CELLCOUNT: ("max_cells", "seed", "strength"),
    baselines.POSITION: ("max_cells", "seed", "trees"),
    baselines.LOGISTIC: ("max_cells", "seed", "strength"),
    baselines.FOREST: ("max_cells", "seed", "trees", "depth", "smallest_leaf"),
}
"""The parameters that decide what each baseline learns."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class BaselineResult:
    """A trained baseline.

    ``images`` and ``cells`` of the training subset; ``rows``: how many cells, images or wells it
    learned from. ``null``: it knows nothing of what a treatment does to a cell. ``already_done``:
    the run was there before this call. ``notes`` are sentences that a reader of its scores has to
    know. ``predict_run_id``: the run in which it labelled the test subset, if it did.
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
    columns_excluded: tuple[str, ...] = ()
    qc_run_id: int | None = None
    predict_run_id: int | None = None


@dataclass(frozen=True)
class Fitted:
    """A baseline, what scales its input, and how many ``rows`` (cells, images, wells) it saw."""

    estimator: Any
    scaler: Any
    rows: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DrawnCells:
    """Drawn cells: scaled features (N, F) float32, class indices (N,), ids of wells (N,)."""

    rows: NDArray[np.float32]
    classes: Ids
    wells: Ids
    scaler: Any


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
    """Train baselines on the training subset of a split (default: the latest).

    ``kinds``: some of ``cellstore.learn.baselines.BASELINES``, or the groups ``null`` and ``all``.
    A baseline that was finished with the same recipe is returned as it is, unless ``force``.

    Raises:
        MissingExtraError: scikit-learn and the like are not installed.
        UnknownNameError: no such baseline, split, recipe or feature set.
        UserInputError: the training subset has no measured cells or one class, or a parameter is
            out of range.

    """
    need("train")
    chosen, params = choose(kinds), params or BaselineParams()
    names: Names = (split, segmentation, measurement)
    with workspace.database.read() as session:
        cells = find_training_cells(
            session, workspace, names, params.features, params.exclude_flagged
        )
    fitting = Fitting(workspace, params, cells)
    results = []
    workspace.progress.start("train", len(chosen))
    try:
        for kind in chosen:
            spec = _spec(params, cells, kind)
            with workspace.database.read() as session:
                found = None if force else finished_run(session, spec, cells.split.id)
                earlier = None if found is None else _result(session, found)
            results.append(earlier or _train(workspace, fitting, kind, spec))
            workspace.progress.advance()
    finally:
        workspace.progress.finish()
    return tuple(results)


def _spec(params: BaselineParams, cells: TrainingCells, kind: str) -> RecipeSpec:
    """What decides the result of one baseline."""
    parameters = {"baseline": kind, **{name: getattr(params, name) for name in USED[kind]}}
    parameters |= cells.parameters
    if kind in ON_FEATURES:
        parameters["normalise"] = params.normalise
    return RecipeSpec(Stage.TRAIN, VERSION, parameters, None, cells.inputs, cells.local)


def _train(workspace: Workspace, fitting: Fitting, kind: str, spec: RecipeSpec) -> BaselineResult:
    from ..learn.normalising import describe_plates
    from ..learn.trained_models import ModelRecord, write_model

    cells = fitting.cells
    with workspace.database.begin() as session:
        recipe = register(session, spec)
    with running(
        workspace.database,
        recipe,
        split_id=cells.split.id,
        seed=fitting.params.seed,
        query=as_text(cells_query(replace(cells.source, subset=Subset.TRAIN))),
    ) as run:
        fitted = fitting.fit(kind)
        record = ModelRecord(
            model=kind,
            labels=tuple(fitting.labels),
            field=cells.split.field,
            scaler=fitted.scaler,
            fingerprints=cells.fingerprints(recipe),
            feature_set=cells.source.features.name,
        )
        files = write_model(workspace, fitted.estimator, record, {"rows": fitted.rows})
        with workspace.database.begin() as session:
            for file in files:
                attach(session, run.id, keep_file(session, file))
        columns = cells.source.features.columns if kind in ON_FEATURES else ()
        excluded, column_notes = excluded_columns(columns, fitted.scaler.names)
        notes = [*cells.notes, *fitted.notes, *describe_plates(fitted.scaler, None)]
        if fitting.without:
            some = ", ".join(fitting.without[:5])
            notes.append(f"{len(fitting.without)} classes have no cell to train on: {some}.")
        run.result = {
            "baseline": kind,
            "null": kind in NULLS,
            "branches": [TABULAR],  # it opens no image
            "classes": len(fitting.labels),
            "classes_without_cells": fitting.without,
            "images": len(fitting.blocks),
            "cells": sum(block.n_cells for block in fitting.blocks),
            "rows": fitted.rows,
            "notes": notes + column_notes,
            "feature_set": cells.source.features.name if kind in ON_FEATURES else None,
            "columns_excluded": excluded,
            "qc_run_id": cells.source.unflagged_by,
            "checkpoint_sha256": files[0].sha256,
        }
    with workspace.database.read() as session:
        return replace(_result(session, session.get_one(Run, run.id)), already_done=False)


def _result(session: Session, run: Run) -> BaselineResult:
    kept = result_from(run, session, BaselineResult.__dataclass_fields__)
    return BaselineResult(already_done=True, **kept)


class Fitting:
    """Fits baselines to the training subset; what several of them need is read once.

    ``blocks`` are its images that have cells, ``labels`` the classes of these by value, ``without``
    the classes that have no cell to learn from.

    Raises:
        UserInputError: there is no measured cell or one class, or too few cells may be drawn.

    """

    def __init__(self, workspace: Workspace, params: BaselineParams, cells: TrainingCells) -> None:
        self.workspace, self.params, self.cells = workspace, params, cells
        self.source = replace(cells.source, subset=Subset.TRAIN)
        self.blocks = cells.blocks[Subset.TRAIN]
        seen = {block.label_id for block in self.blocks}
        self.labels = {value: i for value, i in cells.labels.items() if i in seen}
        self.without = [value for value in cells.labels if value not in self.labels]
        self.class_of = {label_id: index for index, label_id in enumerate(self.labels.values())}
        self.drawn_cells = cache(self._draw_cells)
        name = repr(cells.split.name)
        if params.strength <= 0:
            raise UserInputError("The penalty (--strength) must be above 0.")
        if not self.blocks:
            features = cells.source.features
            what = f"cells in feature set {features.name!r}"
            raise UserInputError(
                f"No image in the training subset of split {name} has "
                f"{'measured cells' if features.in_table else what}. Run: cellstore segment, then: "
                "cellstore measure; or name another split with --split."
            )
        if len(self.labels) < 2:
            raise UserInputError(
                f"The training subset of split {name} has cells of one class only "
                f"({next(iter(self.labels))}), so there is nothing to learn. Make another "
                "split."
            )
        if params.max_cells < len(self.labels):
            raise UserInputError(
                f"{params.max_cells} cells cannot be of all {len(self.labels)} classes. Give more "
                "--max-cells."
            )

    def fit(self, kind: str) -> Fitted:
        """Fit one baseline."""
        fits: Mapping[str, Callable[[], Fitted]] = {
            baselines.MAJORITY: self._majority,
            baselines.SHUFFLED: self._shuffled,
            baselines.CELLCOUNT: self._cellcount,
            baselines.POSITION: self._position,
            baselines.LOGISTIC: self._logistic,
            baselines.FOREST: self._forest,
        }
        return fits[kind]()

    def _majority(self) -> Fitted:
        from ..learn.normalising import Scaler

        classes = self._classes([block.label_id for block in self.blocks])
        return Fitted(baselines.fit_majority(classes), Scaler((), (), ()), len(classes))

    def _cellcount(self) -> Fitted:
        """Cells count whether they are flagged or not: later, nobody will know which were."""
        from ..learn.normalising import Scaler

        images = {block.image_id for block in self.blocks}
        with self.workspace.database.read() as session:
            every = list_blocks(session, replace(self.source, unflagged_by=None))
        counts = {block.image_id: block for block in every if block.image_id in images}
        chosen = self._drawn({block.image_id: block.label_id for block in counts.values()})
        rows = baselines.count_rows([counts[image_id].n_cells for image_id in chosen])
        scaler = Scaler.fit(baselines.COUNT_COLUMNS, [rows])
        classes = self._classes([counts[image_id].label_id for image_id in chosen])
        return self._linear(scaler.transform(rows), classes, scaler)

    def _position(self) -> Fitted:
        from ..learn.normalising import Scaler

        wells = self._wells()
        chosen = self._drawn({well_id: label_id for well_id, (label_id, *_) in wells.items()})
        rows = np.array([wells[i][1:] for i in chosen], dtype=np.float32)
        # By heart: what always is in a well is to be known there, which small leaves alone can say.
        config = ForestConfig(self.params.trees, depth=None, smallest_leaf=1, all_columns=True)
        classes = self._classes([wells[i][0] for i in chosen])
        model = baselines.fit_forest(rows, classes, self.params.seed, config)
        return Fitted(model, Scaler(baselines.POSITION_COLUMNS, (0.0, 0.0), (1.0, 1.0)), len(rows))

    def _logistic(self) -> Fitted:
        cells = self.drawn_cells()
        return self._linear(cells.rows, cells.classes, cells.scaler)

    def _shuffled(self) -> Fitted:
        cells = self.drawn_cells()
        # A class that went to wells without a drawn cell would be in no row.
        drawn = frozenset(cells.wells.tolist())
        labels = {well: label for well, (label, *_) in self._wells().items() if well in drawn}
        before = np.array(list(labels.values()))
        after = np.random.Generator(np.random.PCG64(self.params.seed)).permutation(before)
        given = dict(zip(labels, after.tolist(), strict=True))
        classes = self._classes([given[well] for well in cells.wells.tolist()])
        same = int((before == after).sum())
        note = (
            f"Labels were shuffled between wells; {same:,} of {len(labels):,} wells got their own "
            "label back by chance."
        )
        fitted = self._linear(cells.rows, classes, cells.scaler)
        return replace(fitted, notes=(*fitted.notes, note))

    def _forest(self) -> Fitted:
        cells, params = self.drawn_cells(), self.params
        config = ForestConfig(params.trees, params.depth, params.smallest_leaf)
        model = baselines.fit_forest(cells.rows, cells.classes, params.seed, config)
        return Fitted(model, cells.scaler, len(cells.rows))

    def _linear(self, rows: NDArray[np.float32], classes: Ids, scaler: Any) -> Fitted:
        model, converged = baselines.fit_logistic(rows, classes, self.params.strength)
        note = (
            f"Fitting had not converged after {baselines.STEPS} steps; a larger penalty "
            "(--strength) makes it."
        )
        return Fitted(model, scaler, len(rows), () if converged else (note,))

    def _draw_cells(self) -> DrawnCells:
        """Draw cells evenly over the classes, and read what is to be known of them."""
        from ..learn.normalising import fit_scaler

        params, source = self.params, self.source
        counts: Counter[int] = Counter()
        for block in self.blocks:
            counts[block.label_id] += block.n_cells
        shares = draws.even_shares(counts, params.max_cells)
        lowest = draws.Lowest(shares, params.seed)
        with self.workspace.database.read() as session:
            also = (Subset.VALIDATION, Subset.TEST)
            scaler = fit_scaler(session, source, params.normalise, also)
            query = cells_query(source)
            for groups, ids in stream_groups(session, query, source, SplitMember.label_id):
                lowest.add(groups, ids)
            drawn = lowest.drawn(shares)
            ids = np.sort(np.concatenate(list(drawn.values())))
            label_of = {i: label for label, some in drawn.items() for i in some.tolist()}
            values = read_values(session, source, ids, scaler.names)
            places = wells_and_plates(session, ids)
        rows = np.empty(values.shape, dtype=np.float32)
        for plate in np.unique(places.plates).tolist():
            there = places.plates == plate
            rows[there] = scaler.transform(values[there], plate)
        classes = self._classes([label_of[i] for i in ids.tolist()])
        return DrawnCells(rows, classes, places.wells, scaler)

    def _wells(self) -> dict[int, tuple[int, int, int]]:
        """Label, row and column of the wells of the training images that have cells, by id."""
        query = (
            select(
                Well.id, SplitMember.label_id, Well.well_row, Well.well_column, SplitMember.image_id
            )
            .join(Image, Image.well_id == Well.id)
            .join(SplitMember, SplitMember.image_id == Image.id)
            .where(SplitMember.split_id == self.cells.split.id)
            .where(SplitMember.subset == Subset.TRAIN)
            .order_by(Well.id, Image.id)
            .execution_options(yield_per=10_000)
        )
        seen = {block.image_id for block in self.blocks}
        found: dict[int, tuple[int, int, int]] = {}
        with self.workspace.database.read() as session:
            for well_id, label_id, row, column, image_id in session.execute(query):
                if image_id in seen:
                    found.setdefault(well_id, (label_id, row, column))
        return found

    def _drawn(self, labels: Mapping[int, int]) -> list[int]:
        """Images or wells, by their ids with their label, no more than there may be cells."""
        ids, groups = (np.array(list(x), dtype=np.int64) for x in (labels.keys(), labels.values()))
        lowest = draws.Lowest(self.params.max_cells, self.params.seed)
        lowest.add(groups, ids)
        drawn = lowest.drawn(draws.even_shares(lowest.counts, self.params.max_cells))
        return sorted(np.concatenate(list(drawn.values())).tolist())

    def _classes(self, label_ids: list[int]) -> Ids:
        return np.array([self.class_of[label_id] for label_id in label_ids], dtype=np.int64)
