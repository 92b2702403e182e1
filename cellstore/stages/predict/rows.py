"""What is done with each image: read its cells, label them, write rows and files of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.bulk import bulk_insert
from ...db.models import Prediction, Segmentation
from ...reading.featurefiles import ROWS_OF_FILE, FeatureWriter, WrittenFile, register_files
from ...reading.models import OpenModel
from ...runs import Tally, Task, Work, Workspace
from ...runs.jobs import close_beside, open_beside
from .embedding import Embedding

if TYPE_CHECKING:
    from ...ops.crops import CellBlock

MOST_TOGETHER = 400
"""Images whose embeddings wait for each other, to be written in one file, at most."""

MOST_ROWS = 2_000_000
"""Predictions that wait with them, at most."""

ROWS_AT_ONCE = 100_000

_COLUMNS = ("run_id", "cell_id", "rank", "label_id", "probability")


class TakenOverError(RuntimeError):
    """Another process embedded an image while it was embedded here, too."""


@dataclass(frozen=True)
class Labelled:
    """What is said of the N cells of an image: K labels each, the most probable first.

    ``cell_ids`` (N,) ascend; ``label_ids`` and ``probabilities`` are (N, K), ``vectors``
    (N, width), if embeddings are wanted.
    """

    cell_ids: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    vectors: NDArray[np.float32] | None


@dataclass(frozen=True)
class Labeller:
    """A model, the label id of each of its classes, how many are kept, and whether it embeds."""

    model: OpenModel
    label_ids: NDArray[np.int64]
    top_k: int
    embeds: bool

    def read(self, order: int) -> CellBlock:
        """Return the cells of the image with this id."""
        return self.model.reader(order)

    def compute(self, loaded: Sequence[CellBlock]) -> list[Labelled]:
        """Return what is said of the cells of each image."""
        return [self._labelled(cells) for cells in loaded]

    def keep(self, made: Labelled) -> Labelled:
        """Keep no file: files of features hold many images, and are written where rows are."""
        return made

    def _labelled(self, cells: CellBlock) -> Labelled:
        if self.embeds:
            chances, vectors = self.model.predict_and_embed(cells)
        else:
            chances, vectors = self.model.predict(cells), None
        order = np.argsort(-chances, axis=1, kind="stable")[:, : self.top_k]
        best = np.clip(np.take_along_axis(chances, order, axis=1), 0.0, 1.0)
        return Labelled(cells.cell_ids.cpu().numpy(), self.label_ids[order], best, vectors)


Pairs = Sequence[tuple[Task, Labelled]]


@dataclass(frozen=True)
class Target:
    """The feature set that embeddings go to: what it is, and the numbers of its two rows."""

    embedding: Embedding
    recipe_id: int
    set_id: int


@dataclass(frozen=True)
class Packed:
    """What is written of some images; ``embedded`` are those that ``files`` hold cells of."""

    pairs: Pairs
    embedded: Sequence[Task]
    files: Sequence[WrittenFile]


def predict_work(
    workspace: Workspace, labeller: Labeller, tally: Tally, target: Target | None
) -> Work[int, Labelled]:
    """Return what is done with each image: rows, and files of embeddings if there is a target."""
    writer = _Writer(workspace, tally, target)
    return Work(
        "predict",
        lambda: labeller,
        _orders,
        writer.insert,
        pack=writer.pack,
        together=1 if target is None else _together(workspace, labeller),
    )


def _orders(_session: Session, tasks: Sequence[Task]) -> dict[int, int]:
    return {task.job_id: task.image_id for task in tasks}


def _together(workspace: Workspace, labeller: Labeller) -> int:
    """Images that fill a file, by what the first ones hold."""
    source_id = labeller.model.segment.id
    query = select(Segmentation.n_cells).where(Segmentation.recipe_id == source_id).limit(1000)
    with workspace.database.read() as session:
        mean = session.scalar(select(func.avg(query.subquery().c.n_cells)))
    cells = min(ROWS_OF_FILE, MOST_ROWS // labeller.top_k)
    return max(1, min(MOST_TOGETHER, int(cells / max(1.0, float(mean or 0)))))


@dataclass(frozen=True)
class _Writer:
    workspace: Workspace
    tally: Tally
    target: Target | None

    def pack(self, pairs: Pairs) -> Packed:
        """Write the embeddings of images that have none yet.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        if self.target is None:
            return Packed(pairs, (), ())
        tasks = [task for task, _ in pairs]
        with self.workspace.database.read() as session:
            images = open_beside(session, self.target.recipe_id, tasks)
        mine = [(task, made) for task, made in pairs if task.image_id in images]
        files = self._files(self.target.embedding.schema, [made for _, made in mine])
        return Packed(pairs, [task for task, _ in mine], files)

    def _files(self, schema: pa.Schema, made: Sequence[Labelled]) -> Sequence[WrittenFile]:
        vectors = [one.vectors for one in made if one.vectors is not None and len(one.cell_ids)]
        if not vectors:
            return ()
        cell_ids = np.concatenate([one.cell_ids for one in made])
        order = np.argsort(cell_ids)
        values = np.concatenate(vectors)[order]
        arrays = [pa.array(column) for column in values.T]
        writer = FeatureWriter(self.workspace.artifacts, schema)
        try:
            writer.write(cell_ids[order], pa.RecordBatch.from_arrays(arrays, schema=schema))
            writer.finish()
        finally:
            writer.abandon()
        return writer.files

    def insert(self, session: Session, packed: Packed) -> None:
        """Write the predictions, and say of the files whose embeddings they are.

        Raises:
            TakenOverError: a file holds cells that another process has embedded since.
        """
        waiting: list[tuple[Any, ...]] = []
        for _, made in packed.pairs:
            waiting += _rows(self.tally.run_id, made)
            if len(waiting) >= ROWS_AT_ONCE:
                bulk_insert(session, Prediction, _COLUMNS, waiting)
                waiting = []
        bulk_insert(session, Prediction, _COLUMNS, waiting)
        if self.target is not None:
            self._register(session, self.target, packed)
        self.tally.add(session, sum(len(made.cell_ids) for _, made in packed.pairs))

    def _register(self, session: Session, target: Target, packed: Packed) -> None:
        run_id = self.tally.run_id
        closed = close_beside(session, run_id, target.recipe_id, packed.embedded)
        if len(closed) < len(packed.embedded):
            raise TakenOverError("Another process embedded some of these images meanwhile.")
        artifacts = self.workspace.artifacts
        register_files(session, artifacts, target.set_id, run_id, packed.files)


def _rows(run_id: int, made: Labelled) -> list[tuple[Any, ...]]:
    cells, kept = made.label_ids.shape
    columns = (
        np.repeat(made.cell_ids, kept).tolist(),
        np.tile(np.arange(1, kept + 1), cells).tolist(),
        made.label_ids.ravel().tolist(),
        made.probabilities.ravel().tolist(),
    )
    return [(run_id, *row) for row in zip(*columns, strict=True)]
