"""Train baselines: one run of stage ``train`` each, with a checkpoint like any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from ..analysis import draws
from ..config import BaselineParams, Sources
from ..enums import Stage, Subset
from ..errors import UserInputError
from ..jobs.runs import RecipeSpec, finished_run, keep_files, result_of, running
from ..jobs.workspace import Workspace
from ..learn import baselines
from ..learn.baselines import NULLS, ON_FEATURES, choose
from ..learn.branches import TABULAR
from ..learn.training_cells import TrainingCells, excluded_columns, find_training_cells
from ..models import Image, Run, SplitMember, Well
from ..notebooks import Shown
from ..query.cells import (
    cells_query,
    list_blocks,
    read_drawn,
    stream_groups,
)
from ..settings import need, track

VERSION = 1
USED = {
    baselines.MAJORITY: (),
    baselines.SHUFFLED: ("max_cells", "seed", "strength"),
    baselines.CELLCOUNT: ("max_cells", "seed", "strength"),
    baselines.POSITION: ("max_cells", "seed", "trees"),
    baselines.LOGISTIC: ("max_cells", "seed", "strength"),
    baselines.KNN: ("max_cells", "seed", "neighbours"),
    baselines.FOREST: ("max_cells", "seed", "trees", "depth", "smallest_leaf"),
}
"""The parameters that decide what each baseline learns."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class BaselineResult(Shown):
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
    """Train baselines on the training subset of a split; see ``Store.train_baselines``."""
    need("train")
    chosen, params = choose(kinds), params or BaselineParams()
    with workspace.database.read() as session:
        sources = Sources(split, segmentation, measurement)
        cells = find_training_cells(session, workspace, sources, params, (Subset.TRAIN,))
    fitting = Fitting(workspace, params, cells)
    results = []
    for kind in track(workspace.progress, "train", len(chosen), chosen):
        used = {name: getattr(params, name) for name in USED[kind]}
        parameters = {"baseline": kind, **used, **cells.parameters}
        if kind in ON_FEATURES:
            parameters["normalise"] = params.normalise
        spec = RecipeSpec(Stage.TRAIN, VERSION, parameters, None, cells.inputs, cells.local)
        with workspace.database.read() as session:
            found = None if force else finished_run(session, spec, cells.split.id)
            earlier = None if found is None else _result(found)
        results.append(earlier or _train(workspace, fitting, kind, spec))
    return tuple(results)


def _train(workspace: Workspace, fitting: Fitting, kind: str, spec: RecipeSpec) -> BaselineResult:
    from ..learn.normalising import describe_plates
    from ..learn.trained_models import ModelRecord, write_model

    cells = fitting.cells
    with running(
        workspace.database,
        spec,
        split_id=cells.split.id,
        seed=fitting.params.seed,
        query=cells.query(Subset.TRAIN),
    ) as run:
        estimator, scaler, rows, fit_notes = fitting.fit(kind)
        record = ModelRecord(
            model=kind,
            labels=tuple(fitting.labels),
            field=cells.split.field,
            scaler=scaler,
            fingerprints=cells.fingerprints(spec),
            feature_set=cells.source.features.name,
        )
        files = write_model(workspace, estimator, record, {"rows": rows})
        with workspace.database.begin() as session:
            keep_files(session, files, run.id)
        columns = cells.source.features.columns if kind in ON_FEATURES else ()
        excluded, column_notes = excluded_columns(columns, scaler.names)
        notes = [*cells.notes, *fit_notes, *describe_plates(scaler)]
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
            "rows": rows,
            "notes": notes + column_notes,
            "feature_set": cells.source.features.name if kind in ON_FEATURES else None,
            "columns_excluded": excluded,
            "qc_run_id": cells.source.unflagged_by,
            "checkpoint_sha256": files[0].sha256,
        }
    with workspace.database.read() as session:
        return replace(_result(session.get_one(Run, run.id)), already_done=False)


def _result(run: Run) -> BaselineResult:
    assert run.split is not None
    return result_of(run, BaselineResult, split=run.split.name, already_done=True)


class Fitting:
    """Fits baselines to the training subset; what several of them need is read once.

    ``blocks`` are its images that have cells, ``labels`` the classes of these by value, ``without``
    the classes that have no cell to learn from.
    """

    def __init__(self, workspace: Workspace, params: BaselineParams, cells: TrainingCells) -> None:
        self.workspace, self.params, self.cells = workspace, params, cells
        self.source = replace(cells.source, subset=Subset.TRAIN)
        self.blocks = cells.blocks[Subset.TRAIN]
        seen = {block.label_id for block in self.blocks}
        self.labels = {value: i for value, i in cells.labels.items() if i in seen}
        self.without = [value for value in cells.labels if value not in self.labels]
        self.class_of = {label_id: index for index, label_id in enumerate(self.labels.values())}
        self.drawn: tuple[Any, NDArray[np.float32], Ids, Ids] | None = None
        cells.check(self.labels, Subset.TRAIN)
        if params.max_cells < len(self.labels):
            raise UserInputError(
                f"{params.max_cells} cells cannot be of all {len(self.labels)} classes. Give more "
                "--max-cells."
            )

    def fit(self, kind: str) -> tuple[Any, Any, int, tuple[str, ...]]:
        """Return an estimator, what scales its input, how many rows it learned from, and notes.

        Rows are cells, images or wells.
        """
        from ..learn.normalising import Scaler

        params, scaler, notes = self.params, Scaler(), tuple[str, ...]()
        if kind == baselines.MAJORITY:
            classes = self._classes([block.label_id for block in self.blocks])
            return baselines.fit_majority(classes), scaler, len(classes), notes
        if kind == baselines.POSITION:
            wells = self._wells()
            chosen = self._draw({well_id: label_id for well_id, (label_id, *_) in wells.items()})
            rows = np.array([wells[i][1:] for i in chosen], dtype=np.float32)
            classes = self._classes([wells[i][0] for i in chosen])
            scaler = Scaler(baselines.POSITION_COLUMNS, (0.0, 0.0), (1.0, 1.0))
        elif kind == baselines.CELLCOUNT:
            # Cells count whether they are flagged or selected or not: later, nobody will know.
            with self.workspace.database.read() as session:
                every = list_blocks(session, replace(self.source, unflagged_by=None, chosen=None))
            images = {block.image_id for block in self.blocks}
            counts = {block.image_id: block for block in every if block.image_id in images}
            chosen = self._draw({image_id: block.label_id for image_id, block in counts.items()})
            measured = baselines.count_rows([counts[image_id].n_cells for image_id in chosen])
            scaler = Scaler.fit(baselines.COUNT_COLUMNS, [measured])
            rows = scaler.transform(measured)
            classes = self._classes([counts[image_id].label_id for image_id in chosen])
        else:
            self.drawn = self.drawn or self._draw_cells()
            scaler, rows, classes, wells_of = self.drawn
            if kind == baselines.SHUFFLED:
                classes, notes = self._shuffled(wells_of)
        model: Any
        if kind == baselines.POSITION:
            # By heart: what always is in a well is to be known there, which small leaves alone can
            # say.
            model = baselines.fit_forest(
                rows, classes, params.seed, params.trees, None, 1, all_columns=True
            )
        elif kind == baselines.FOREST:
            sizes = (params.trees, params.depth, params.smallest_leaf)
            model = baselines.fit_forest(rows, classes, params.seed, *sizes)
        elif kind == baselines.KNN:
            model = baselines.fit_knn(rows, classes, params.neighbours)
        else:
            model, converged = baselines.fit_logistic(rows, classes, params.strength)
            if not converged:
                slow = f"Fitting had not converged after {baselines.STEPS} steps; a larger penalty"
                notes = (f"{slow} (--strength) makes it.", *notes)
        return model, scaler, len(rows), notes

    def _shuffled(self, wells: Ids) -> tuple[Ids, tuple[str, ...]]:
        """Classes of cells whose wells have exchanged their labels, and how many kept theirs."""
        # A class that went to wells without a drawn cell would be in no row.
        drawn = frozenset(wells.tolist())
        labels = {well: label for well, (label, *_) in self._wells().items() if well in drawn}
        before = np.array(list(labels.values()))
        after = np.random.Generator(np.random.PCG64(self.params.seed)).permutation(before)
        given = dict(zip(labels, after.tolist(), strict=True))
        note = (
            f"Labels were shuffled between wells; {int((before == after).sum()):,} of "
            f"{len(labels):,} wells got their own label back by chance."
        )
        return self._classes([given[well] for well in wells.tolist()]), (note,)

    def _draw_cells(self) -> tuple[Any, NDArray[np.float32], Ids, Ids]:
        """Draw cells evenly over the classes, and read what is to be known of them.

        Returns a scaler, features (N, F) scaled by it, class indices (N,) and ids of wells (N,).
        """
        from ..learn.normalising import fit_inputs

        params, source, database = self.params, self.source, self.workspace.database
        counts: Counter[int] = Counter()
        for block in self.blocks:
            counts[block.label_id] += block.n_cells
        shares = draws.even_shares(counts, params.max_cells)
        lowest = draws.Lowest(shares, params.seed)
        with database.read() as session:
            also = (Subset.VALIDATION, Subset.TEST)
            scaler = fit_inputs(session, database, source, params.normalise, also=also)
            query = cells_query(source)
            for groups, ids in stream_groups(session, query, source, SplitMember.label_id):
                lowest.add(groups, ids)
            drawn = lowest.drawn(shares)
            ids = np.sort(np.concatenate(list(drawn.values())))
            label_of = {i: label for label, some in drawn.items() for i in some.tolist()}
            values, wells, plates = read_drawn(session, source, ids, scaler.names)
        rows = np.empty(values.shape, dtype=np.float32)
        for plate in np.unique(plates).tolist():
            on_plate = plates == plate
            rows[on_plate] = scaler.transform(values[on_plate], plate)
        return scaler, rows, self._classes([label_of[i] for i in ids.tolist()]), wells

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

    def _draw(self, labels: Mapping[int, int]) -> list[int]:
        """Images or wells, by their ids with their label, no more than there may be cells."""
        ids, groups = (np.array(list(x), dtype=np.int64) for x in (labels.keys(), labels.values()))
        lowest = draws.Lowest(self.params.max_cells, self.params.seed)
        lowest.add(groups, ids)
        drawn = lowest.drawn(draws.even_shares(lowest.counts, self.params.max_cells))
        return sorted(np.concatenate(list(drawn.values())).tolist())

    def _classes(self, label_ids: list[int]) -> Ids:
        return np.array([self.class_of[label_id] for label_id in label_ids], dtype=np.int64)
