"""Cells that other tools found become rows and Parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ....db.bulk import bulk_insert, in_lists, take_ids
from ....db.models import Artifact, Cell, FeatureFile, Segmentation
from ....formats.objects.model import BOX, CENTRE, Integers, ObjectBatch, ObjectSource
from ....formats.records import LONGEST
from ....reading.featurefiles import FeatureWriter, register_files, stored_values
from ....runs import Workspace
from .accounts import Accounts
from .target import TargetSet

_CELL = ("id", "segmentation_id", "label", *BOX, *CENTRE, "excluded")
_UNKNOWN = -1


class CellWriter:
    """Writes the cells of ``source``; ``image_ids`` has the image of each cell, -1 for none.

    Cells of images that the set has already are compared, not written.
    """

    def __init__(
        self,
        workspace: Workspace,
        session: Session,
        run_id: int,
        source: ObjectSource,
        target: TargetSet,
        image_ids: Integers,
        accounts: Accounts,
    ) -> None:
        self._workspace = workspace
        self._session = session
        self._run_id = run_id
        self._source = source
        self._target = target
        self._images = image_ids
        self._accounts = accounts
        self._writer = FeatureWriter(workspace.artifacts, target.schema)
        self._files: list[tuple[str, int, int]] | None = None
        self.created = self.unchanged = self.new_images = 0

    def write(self) -> None:
        """Bring all cells in.

        Raises:
            BadTableError: the source turns out damaged.
            StorageError: the disk is full.
        """
        known = self._known_segmentations()
        images = self._images
        is_known = np.isin(images, np.fromiter(known, np.int64, len(known)))
        is_new = (images != _UNKNOWN) & ~is_known
        of_image = self._make_segmentations(images[is_new]) | known
        self._refuse_homeless()
        try:
            for batch in self._source.batches():
                end = batch.start + batch.values.num_rows
                here = np.arange(batch.start, end)
                self._create(batch, here[is_new[batch.start : end]], of_image)
                self._compare(batch, here[is_known[batch.start : end]], known)
                self._workspace.progress.advance(len(here))
            self._writer.finish()
        finally:
            self._writer.abandon()
        register_files(
            self._session,
            self._workspace.artifacts,
            self._target.id,
            self._run_id,
            self._writer.files,
        )

    def _refuse_homeless(self) -> None:
        lost = np.flatnonzero(self._images == _UNKNOWN)
        self._accounts.refuse(lost, "image refused", "the row of its image could not be used")

    def _known_segmentations(self) -> dict[int, int]:
        """Return the segmentations of those images that the set has already."""
        found: dict[int, int] = {}
        wanted = np.unique(self._images[self._images != _UNKNOWN]).tolist()
        query = select(Segmentation.image_id, Segmentation.id).where(
            Segmentation.recipe_id == self._target.segment_id
        )
        for some in in_lists(wanted):
            for image, segmentation in self._session.execute(
                query.where(Segmentation.image_id.in_(some))
            ):
                found[image] = segmentation
        return found

    def _make_segmentations(self, images: Integers) -> dict[int, int]:
        found, counts = np.unique(images, return_counts=True)
        ids = take_ids(self._session, Segmentation, len(found))
        shared = {
            "recipe_id": self._target.segment_id,
            "run_id": self._run_id,
            "created_at": datetime.now(UTC),
        }
        rows = [
            {"id": key, "image_id": image, "n_cells": count, **shared}
            for key, image, count in zip(ids, found.tolist(), counts.tolist(), strict=True)
        ]
        if rows:
            self._session.execute(insert(Segmentation), rows)
        self.new_images = len(rows)
        return {row["image_id"]: row["id"] for row in rows}

    def _create(self, batch: ObjectBatch, cells: Integers, of_image: Mapping[int, int]) -> None:
        if len(cells) == 0:
            return
        ids = take_ids(self._session, Cell, len(cells))
        places = cells - batch.start
        segmentations = [of_image[image] for image in self._images[cells].tolist()]
        labels = self._source.cells.label[cells].tolist()
        boxes = _columns(batch.boxes[places], whole=True)
        centres = _columns(batch.centres[places], whole=False)
        excluded = _excluded(batch, places)
        rows = list(zip(ids, segmentations, labels, *boxes, *centres, excluded, strict=True))
        bulk_insert(self._session, Cell, _CELL, rows)
        values = self._target.conform(_chosen(batch.values, places), self._source.files[0].name)
        self._writer.write(np.asarray(ids, np.int64), values)
        self._accounts.created(cells)
        self.created += len(cells)

    def _compare(self, batch: ObjectBatch, cells: Integers, known: Mapping[int, int]) -> None:
        """Count cells of known images as unchanged, or refuse those that are other ones."""
        if len(cells) == 0:
            return
        ids = self._known_cells(cells, known)
        same = ids != _UNKNOWN
        places = np.flatnonzero(same)
        order = places[np.argsort(ids[places], kind="stable")]
        values = self._target.conform(
            _chosen(batch.values, cells[order] - batch.start), self._source.files[0].name
        )
        same[order] = self._equal(ids[order], values)
        self._accounts.unchanged(cells[same])
        detail = (
            f"feature set {self._target.name!r} has other values for this image; to keep both, "
            "give another --name"
        )
        self._accounts.refuse(cells[~same], "other values than before", detail)
        self.unchanged += int(same.sum())

    def _known_cells(self, cells: Integers, known: Mapping[int, int]) -> Integers:
        """Return the id of each cell, -1 where its image has no cell of that label."""
        images = self._images[cells].tolist()
        by_key: dict[tuple[int, int], int] = {}
        query = select(Cell.segmentation_id, Cell.label, Cell.id)
        for some in in_lists({known[image] for image in images}):
            for row in self._session.execute(query.where(Cell.segmentation_id.in_(some))):
                by_key[row[0], row[1]] = row[2]
        labels = self._source.cells.label[cells].tolist()
        pairs = zip(images, labels, strict=True)
        return np.array([by_key.get((known[i], label), _UNKNOWN) for i, label in pairs], np.int64)

    def _equal(self, ids: Integers, values: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Return which of the cells (ascending ids) have these very values in the files."""
        found, table = stored_values(self._paths(ids), self._target.schema.names, ids)
        equal = np.isin(ids, found)
        if table is None:
            return equal
        mine = _chosen(values, np.flatnonzero(equal))
        theirs = _in_order(table, found)
        same = np.ones(len(found), bool)
        for name in self._target.schema.names:
            one, other = mine.column(name), theirs.column(name).combine_chunks()
            if not one.equals(other):
                same &= _same(one, other)
        equal[equal] = same
        return equal

    def _paths(self, ids: Integers) -> Sequence[Any]:
        if self._files is None:
            query = (
                select(Artifact.path, FeatureFile.first_cell_id, FeatureFile.last_cell_id)
                .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
                .where(FeatureFile.feature_set_id == self._target.id)
                .order_by(FeatureFile.first_cell_id)
            )
            self._files = [(row[0], row[1], row[2]) for row in self._session.execute(query)]
        if len(ids) == 0:
            return []
        return [
            self._workspace.artifacts.locate(path)
            for path, first, last in self._files
            if first <= ids[-1] and last >= ids[0]
        ]


def _chosen(values: pa.RecordBatch, places: Integers) -> pa.RecordBatch:
    if len(places) == values.num_rows and bool((places == np.arange(len(places))).all()):
        return values
    return values.take(pa.array(places))


def _in_order(table: pa.Table, ids: Integers) -> pa.Table:
    if bool((np.diff(ids) > 0).all()):
        return table
    return table.take(pa.array(np.argsort(ids, kind="stable")))


def _same(one: pa.Array, other: pa.Array) -> npt.NDArray[np.bool_]:
    both_null = pc.and_(pc.is_null(one), pc.is_null(other))
    equal = pc.or_(both_null, pc.fill_null(pc.equal(one, other), False))
    return np.asarray(equal.to_numpy(zero_copy_only=False), bool)


def _columns(values: npt.NDArray[np.float64], *, whole: bool) -> list[list[Any]]:
    found: list[list[Any]] = []
    for column in values.T:
        known = np.isfinite(column)
        if whole:
            known &= np.abs(column) < 1 << 31
        numbers = (np.where(known, column, 0).astype(np.int64) if whole else column).tolist()
        found.append([
            number if there else None
            for number, there in zip(numbers, known.tolist(), strict=True)
        ])  # fmt: skip
    return found


def _excluded(batch: ObjectBatch, places: Integers) -> list[str | None]:
    if batch.excluded is None:
        return [None] * len(places)
    texts = [batch.excluded[place] for place in places.tolist()]
    return [text[:LONGEST].replace("\0", "?") if text else None for text in texts]
