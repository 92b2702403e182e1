"""Measurements become rows of table ``features``, or files of many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.bulk import bulk_insert
from ...db.models import CellFeatures, FeatureSet, Segmentation
from ...errors import CellstoreError
from ...ops.features import BASIC_GROUP
from ...reading.featurefiles import ROWS_OF_FILE, FeatureWriter, WrittenFile, register_files
from ...runs import Tally, Task, Work, Workspace
from ...runs.jobs import close_beside, open_beside
from .groups import GroupPlan
from .orders import orders_of
from .step import Measured, MeasureOrder, MeasureSteps

MOST_TOGETHER = 400
"""Images whose measurements wait for each other, to be written in one file, at most."""

Pairs = Sequence[tuple[Task, Measured]]


class TakenOverError(RuntimeError):
    """Another process measured a group on an image while it was measured here, too."""


@dataclass(frozen=True)
class Target:
    """A group that is measured, and the run in whose name. ``beside``: in another's pass."""

    plan: GroupPlan
    tally: Tally
    beside: bool


@dataclass(frozen=True)
class Packed:
    """What is written of some images: of each group the images, and the files it has."""

    of_group: Mapping[str, Pairs]
    files: Mapping[str, Sequence[WrittenFile]]


def measure_work(workspace: Workspace, targets: Sequence[Target]) -> Work[MeasureOrder, Measured]:
    """Return what is done with each image; the first of ``targets`` is the one with the jobs."""
    writer = _Writer(workspace, targets)
    return Work(
        "measure",
        MeasureSteps(workspace.artifacts),
        writer.orders,
        writer.insert,
        pack=writer.pack,
        together=_together(workspace, targets),
    )


def _together(workspace: Workspace, targets: Sequence[Target]) -> int:
    """Images that fill a file, by what the first ones hold."""
    if all(target.plan.in_table for target in targets):
        return 1
    source_id = targets[0].plan.source.id
    query = select(Segmentation.n_cells).where(Segmentation.recipe_id == source_id).limit(1000)
    with workspace.database.read() as session:
        mean = session.scalar(select(func.avg(query.subquery().c.n_cells)))
    return max(1, min(MOST_TOGETHER, int(ROWS_OF_FILE / max(1.0, float(mean or 0)))))


@dataclass(frozen=True)
class _Writer:
    workspace: Workspace
    targets: Sequence[Target]

    def orders(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, MeasureOrder | CellstoreError]:
        """Return what workers need for the groups that the images lack."""
        lacking = [self._open(session, target, tasks) for target in self.targets]
        wanted = {
            task.image_id: [
                target.plan
                for target, images in zip(self.targets, lacking, strict=True)
                if task.image_id in images
            ]
            for task in tasks
        }
        return orders_of(session, tasks, wanted)

    def _open(self, session: Session, target: Target, tasks: Sequence[Task]) -> set[int]:
        if target.beside:
            return open_beside(session, target.tally.recipe_id, tasks)
        return {task.image_id for task in tasks}

    def pack(self, pairs: Pairs) -> Packed:
        """Write the files of groups that have some.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        of_group, files = {}, {}
        tasks = [task for task, _ in pairs]
        for target in self.targets:
            plan = target.plan
            with self.workspace.database.read() as session:
                images = self._open(session, target, tasks)
            mine = [
                (task, made)
                for task, made in pairs
                if task.image_id in images and plan.name in made.values
            ]
            of_group[plan.name] = mine
            if not plan.in_table:
                files[plan.name] = self._files(plan, [made for _, made in mine])
        return Packed(of_group, files)

    def _files(self, plan: GroupPlan, made: Sequence[Measured]) -> Sequence[WrittenFile]:
        made = [one for one in made if len(one.cell_ids)]
        if not made:
            return ()
        cell_ids = np.concatenate([one.cell_ids for one in made])
        values = np.concatenate([one.values[plan.name] for one in made], axis=1)
        order = np.argsort(cell_ids)
        schema = pa.schema([(feature.name, pa.float64()) for feature in plan.features])
        writer = FeatureWriter(self.workspace.artifacts, schema)
        try:
            writer.write(cell_ids[order], _batch(schema, values[:, order]))
            writer.finish()
        finally:
            writer.abandon()
        return writer.files

    def insert(self, session: Session, packed: Packed) -> None:
        """Write the rows, and close the jobs of the groups that are measured beside.

        Raises:
            TakenOverError: a file holds cells that another process has measured since.
        """
        counts = {}
        for target in self.targets:
            pairs = packed.of_group[target.plan.name]
            if target.beside:
                pairs = self._closed(session, target, pairs)
            if target.plan.in_table:
                _insert(session, target.tally, [made for _, made in pairs])
            else:
                self._register(session, target, packed.files[target.plan.name])
            counts[target.plan.name] = len(pairs), sum(len(made.cell_ids) for _, made in pairs)
        for target in self.targets:  # last, when nothing can go wrong any more
            images, cells = counts[target.plan.name]
            target.tally.add(session, cells, images if target.beside else 0)

    def _closed(self, session: Session, target: Target, pairs: Pairs) -> Pairs:
        tally, tasks = target.tally, [task for task, _ in pairs]
        closed = close_beside(session, tally.run_id, tally.recipe_id, tasks)
        if len(closed) < len(pairs) and not target.plan.in_table:
            raise TakenOverError(f"{target.plan.name} was measured by another process meanwhile.")
        return [(task, made) for task, made in pairs if task.image_id in closed]

    def _register(self, session: Session, target: Target, files: Sequence[WrittenFile]) -> None:
        query = select(FeatureSet.id).where(FeatureSet.recipe_id == target.tally.recipe_id)
        set_id = session.scalars(query).one()
        register_files(session, self.workspace.artifacts, set_id, target.tally.run_id, files)


def _batch(schema: pa.Schema, values: NDArray[np.float64]) -> pa.RecordBatch:
    """What a cell does not have (NaN) is null: averages in SQL pass over it."""
    arrays = [pa.array(row, from_pandas=True) for row in values]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _insert(session: Session, tally: Tally, made: Sequence[Measured]) -> None:
    names = [feature.name for feature in BASIC_GROUP.features]
    rows = []
    for one in made:
        columns = (one.cell_ids.tolist(), *one.values[BASIC_GROUP.name].tolist())
        keys = tally.recipe_id, tally.run_id
        rows += [(*row, *keys) for row in zip(*columns, strict=True)]
    bulk_insert(session, CellFeatures, ("cell_id", *names, "recipe_id", "run_id"), rows)
