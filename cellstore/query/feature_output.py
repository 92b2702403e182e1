"""Features of many images in one Parquet file: written before their rows, and made again if lost.

What ``measure`` and ``predict`` (embeddings) have in common when they write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..jobs.queue import requeue_done
from ..jobs.selection import is_current
from ..models import (
    Artifact,
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    RecipeInput,
    RunArtifact,
    Segmentation,
)
from .feature_files import FeatureWriter, SetFile, SetReader, WrittenFile

MOST_IMAGES = 400
"""Images whose features wait for each other, to be written in one file, at most."""


def images_per_file(session: Session, segment_id: int, most_cells: int) -> int:
    """Return how many images fill a file of ``most_cells``, by what the first ones hold."""
    query = select(Segmentation.n_cells).where(Segmentation.recipe_id == segment_id).limit(1000)
    mean = session.scalar(select(func.avg(query.subquery().c.n_cells)))
    return max(1, min(MOST_IMAGES, int(most_cells / max(1.0, float(mean or 0)))))


def write_features(
    artifacts: ArtifactFolder,
    schema: pa.Schema,
    cell_ids: Sequence[NDArray[np.int64]],
    values: Sequence[NDArray[np.float64 | np.float32]],
) -> Sequence[WrittenFile]:
    """Write the features of some images: ``cell_ids`` (N,) and ``values`` (F, N) of each.

    A value that is not a number is null: averages in SQL pass over it.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    if not any(len(ids) for ids in cell_ids):
        return ()
    ids = np.concatenate(cell_ids)
    order = np.argsort(ids)
    rows = np.concatenate(values, axis=1)[:, order]
    arrays = [pa.array(row, from_pandas=True) for row in rows]
    writer = FeatureWriter(artifacts, schema)
    try:
        writer.write(ids[order], pa.RecordBatch.from_arrays(arrays, schema=schema))
        writer.finish()
    finally:
        writer.abandon()
    return writer.files


def requeue_lost_features(session: Session, artifacts: ArtifactFolder, recipe_id: int) -> int:
    """Open the jobs again whose features were in files that are gone; return how many.

    The rows of these files go, too.
    """
    rows = session.execute(
        select(FeatureFile, Artifact)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .join(Artifact, Artifact.id == FeatureFile.artifact_id)
        .where(FeatureSet.recipe_id == recipe_id)
    ).all()
    gone = artifacts.missing(file.path for _, file in rows)
    lost = [row for row in rows if row.Artifact.path in gone]
    if not lost:
        return 0
    kept = [
        SetFile(artifacts.locate(file.path), found.first_cell_id, found.last_cell_id)
        for found, file in rows
        if file.path not in gone
    ]
    reader = SetReader(kept)
    images: set[int] = set()
    for found, _ in lost:
        cells = (
            select(Cell.id, Segmentation.image_id)
            .join(Segmentation, Segmentation.id == Cell.segmentation_id)
            .join(RecipeInput, RecipeInput.input_id == Segmentation.recipe_id)
            .join(Image, is_current())
            .where(RecipeInput.recipe_id == recipe_id)
            .where(Cell.id.between(found.first_cell_id, found.last_cell_id))
            .order_by(Cell.id)
        )
        for block in session.execute(cells.execution_options(yield_per=50_000)).partitions():
            ids = np.array([row.id for row in block], dtype=np.int64)
            there, _ = reader(ids, ())
            images.update(block[index].image_id for index in np.flatnonzero(~there))
    files = [file.id for _, file in lost]
    for table in (FeatureFile, RunArtifact):
        session.execute(delete(table).where(table.artifact_id.in_(files)))
    session.execute(delete(Artifact).where(Artifact.id.in_(files)))
    return requeue_done(session, recipe_id, images)
