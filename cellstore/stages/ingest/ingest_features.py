"""Features that other tools measured: images, segmentations without masks, cells, a feature set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ...artifacts import ArtifactFolder
from ...db.bulk import bulk_insert, in_lists, take_ids
from ...enums import FeatureStorage, Stage
from ...errors import BadTableError, StorageError, UserInputError
from ...io.cellprofiler import open_cellprofiler
from ...io.layouts import Layout
from ...io.records import (
    BOX,
    CENTRE,
    DTYPES,
    LONGEST,
    Cells,
    FeatureColumn,
    ImageRecord,
    ImageRow,
    Integers,
    ObjectBatch,
    ObjectSource,
    SourceFile,
)
from ...io.single_cells import open_single_cells
from ...io.uris import PathMap
from ...jobs.recipes import RecipeSpec, register
from ...jobs.workspace import Workspace
from ...models import Artifact, Cell, FeatureFile, FeatureSet, Recipe, RecipeInput, Segmentation
from ...query.feature_files import FeatureWriter, register_files, stored_values
from ...query.feature_sets import check_set_name
from .account import SHOWN, Account, FileIdentity
from .ingest_images import RowWriter

_AT_ONCE = 5_000

Chosen = npt.NDArray[np.bool_]


class Accounts:
    """An account per file of ``source``; who they are is found out in the background.

    ``known``: files that were looked at already.
    """

    def __init__(
        self,
        session: Session,
        run_id: int,
        source: ObjectSource,
        known: Mapping[Path, FileIdentity],
    ) -> None:
        self._session = session
        self._source = source
        self.of_files = [Account(run_id, file.name, rows=file.rows) for file in source.files]
        self.by_name = {account.file: account for account in self.of_files}
        self._first = [_first_uses(source.cells, kind) for kind in range(_kinds(source.cells))]
        self._pool = ThreadPoolExecutor(1)
        paths = {file.path for file in source.files} - set(known)
        self._known = dict(known)
        self._asked = {path: self._pool.submit(FileIdentity.of, path) for path in sorted(paths)}

    def say_all(self) -> None:
        """Refuse the rows that are no part of a cell, and say what was noticed."""
        for rows in self._source.refused:
            self._refuse_lines(self.by_name[rows.file], rows.lines, rows.reason, rows.detail)
        for notice in self._source.notices:
            account = self.by_name[notice.file]
            tell = account.suspicious if notice.suspicious else account.problem
            tell(notice.line, notice.reason, notice.detail)
            self._flush(account)

    def created(self, cells: Integers) -> None:
        """Count the rows of cells (numbers) that are new."""
        for account, rows in self._rows_of(cells):
            account.created += len(rows)

    def unchanged(self, cells: Integers) -> None:
        """Count the rows of cells (numbers) that were there already."""
        for account, rows in self._rows_of(cells):
            account.unchanged += len(rows)

    def refuse(self, cells: Integers, reason: str, detail: str) -> None:
        """Leave cells (numbers) out."""
        for account, lines in self._rows_of(cells):
            self._refuse_lines(account, lines.tolist(), reason, detail)

    def close(self, layout: str) -> None:
        """Write all that is left, and a row per file."""
        for account, file in zip(self.of_files, self._source.files, strict=True):
            account.close(self._session, layout, self._identity(file))

    def stop(self) -> None:
        """End the work in the background."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _identity(self, file: SourceFile) -> FileIdentity:
        known = self._known.get(file.path) or self._asked[file.path].result()
        return replace(known, name=file.name)

    def _rows_of(self, cells: Integers) -> list[tuple[Account, Integers]]:
        """Return the lines of the rows of cells by file; each row belongs to its first cell."""
        found: list[tuple[Account, Integers]] = []
        for origin, first in zip(self._source.cells.origins, self._first, strict=True):
            chosen = cells[first[cells]]
            files, lines = origin.file[chosen], origin.line[chosen]
            for number in np.unique(files):
                found.append((self.of_files[number], lines[files == number]))
        return found

    def _refuse_lines(
        self, account: Account, lines: Sequence[int], reason: str, detail: str
    ) -> None:
        for start in range(0, len(lines), _AT_ONCE):
            for line in lines[start : start + _AT_ONCE]:
                account.refuse(line, reason, detail)
            self._flush(account)

    def _flush(self, account: Account) -> None:
        account.flush(self._session)


def _kinds(cells: Cells) -> int:
    return len(cells.origins)


def _first_uses(cells: Cells, kind: int) -> Chosen:
    origin = cells.origins[kind]
    found = np.zeros(len(cells), bool)
    # Lines may be any numbers: those of SQLite count to 2 ** 63.
    lines, line = np.unique(origin.line, return_inverse=True)
    _, first = np.unique(origin.file * max(1, len(lines)) + line, return_index=True)
    found[first] = True
    return found


VERSION = 1
_SHOWN = 5


@dataclass(frozen=True)
class TargetSet:
    """A feature set, its recipes, and the type of each of its columns in their order."""

    id: int
    name: str
    segment_id: int
    measure_id: int
    schema: pa.Schema

    def conform(self, values: pa.RecordBatch, where: str) -> pa.RecordBatch:
        """Return ``values`` with the columns of the set, in its order and types.

        Raises:
            BadTableError: a column of whole numbers has others in this source.
        """
        arrays = []
        for column in self.schema:
            found = values.column(values.schema.get_field_index(column.name))
            try:
                arrays.append(found.cast(column.type))
            except pa.ArrowInvalid as error:
                raise BadTableError(
                    f"{where}: column {column.name} has other values than whole numbers, unlike "
                    f"in feature set {self.name!r}. Give another --name."
                ) from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def target_set(session: Session, source: ObjectSource, name: str) -> TargetSet:
    """Return the feature set ``name`` for the columns of ``source``, made if it is new.

    Raises:
        UserInputError: there is one with other columns.
    """
    found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
    if found is None:
        return _make(session, source, name)
    return _existing(session, found, source)


def check_files(session: Session, artifacts: ArtifactFolder, name: str) -> None:
    """Check that the files of the feature set ``name`` are there.

    Raises:
        StorageError: one is gone; what it held cannot be told from what the database says.
    """
    query = (
        select(Artifact.path)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.name == name)
    )
    for path in session.scalars(query):
        if not artifacts.locate(path).is_file():
            raise StorageError(
                f"The file {path} of feature set {name!r} is gone. Restore it from a backup (see "
                "cellstore verify), or ingest its source under another --name."
            )


def _existing(session: Session, found: FeatureSet, source: ObjectSource) -> TargetSet:
    old = {item["name"]: item["dtype"] for item in found.columns}
    _check_columns(found, old, {column.name: column.dtype for column in source.columns})
    inputs = select(RecipeInput.input_id).where(RecipeInput.recipe_id == found.recipe_id)
    query = select(Recipe).where(Recipe.id.in_(inputs), Recipe.stage == Stage.SEGMENT)
    segment = session.scalars(query).one()
    objects = segment.parameters.get("objects")
    if objects != list(source.objects):
        raise UserInputError(
            f"Feature set {found.name!r} is of other objects ({', '.join(objects or ['?'])}). "
            "Give another --name."
        )
    schema = pa.schema([(name, DTYPES[dtype]) for name, dtype in old.items()])
    return TargetSet(found.id, found.name, segment.id, found.recipe_id, schema)


def _check_columns(found: FeatureSet, old: dict[str, str], new: dict[str, str]) -> None:
    if found.storage is not FeatureStorage.FILES:
        raise UserInputError(f"Feature set {found.name!r} is measured here. Give another --name.")
    gone = [name for name in old if name not in new]
    more = [name for name in new if name not in old]
    text = [
        name for name in old if name in new and (old[name] == "string") != (new[name] == "string")
    ]
    parts = [("lacks", gone), ("has besides", more), ("has of another type", text)]
    said = [f"{verb} {_listed(names)}" for verb, names in parts if names]
    if said:
        raise UserInputError(
            f"Feature set {found.name!r} has other columns: this source {'; '.join(said)}. "
            "Give another --name."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _make(session: Session, source: ObjectSource, name: str) -> TargetSet:
    columns = sorted([column.name, column.dtype] for column in source.columns)
    base: dict[str, Any] = {
        "imported": source.tool, "name": name, "objects": list(source.objects),
    }  # fmt: skip
    segment = register(session, RecipeSpec(Stage.SEGMENT, VERSION, base))
    measured = {**base, "columns": columns}
    measure = register(session, RecipeSpec(Stage.MEASURE, VERSION, measured, None, (segment,)))
    row = FeatureSet(
        name=name,
        recipe_id=measure.id,
        columns=[_as_json(column) for column in source.columns],
        storage=FeatureStorage.FILES,
    )
    session.add(row)
    session.flush()
    return TargetSet(row.id, name, segment.id, measure.id, source.schema)


def _as_json(column: FeatureColumn) -> dict[str, Any]:
    return column._asdict()


_CELL = ("id", "segmentation_id", "object_number", *BOX, *CENTRE, "excluded")
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
        query = select(Cell.segmentation_id, Cell.object_number, Cell.id)
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


DEFAULT_NAMES = {
    Layout.CELLPROFILER_CSV: "cellprofiler",
    Layout.CELLPROFILER_SQLITE: "cellprofiler",
    Layout.SINGLE_CELLS: "single_cells",
}
_BATCH = 1_000


@dataclass(frozen=True)
class FeaturesDone:
    """What a source of features brought; ``accounts`` has one per file (closed).

    ``feature_set`` is None where the source has images only; ``segmentation`` is the id of the
    recipe that its cells belong to.
    """

    feature_set: str | None
    segmentation: int | None
    columns: int
    plates: tuple[int, ...]
    new_images: int
    cells: int
    unchanged: int
    accounts: tuple[Account, ...]
    notes: tuple[str, ...]


def ingest_features(
    workspace: Workspace,
    session: Session,
    run_id: int,
    source: Path,
    layout: Layout,
    *,
    name: str | None,
    plate: str | None,
    account: Account,
    maps: PathMap | None = None,
    identity: FileIdentity | None = None,
) -> FeaturesDone:
    """Bring the objects and features of ``source`` in, in the open transaction of ``session``.

    The rows of each file are accounted for in an account of its own; ``account`` gets the notes.
    ``name`` is the feature set (default: that of the tool), ``plate`` the barcode where the source
    names none; ``identity`` is that of a ``source`` that was looked at. Files of features are
    written at once, their rows count with the transaction.

    Raises:
        BadTableError: the source is damaged, or holds no objects that can be told apart.
        UserInputError: no plate is known, or the feature set has other columns.
        StorageError: a file cannot be written.
    """
    checked = check_set_name(name or DEFAULT_NAMES[layout])
    if layout is Layout.SINGLE_CELLS:
        opened = open_single_cells(source, plate)
    else:
        opened = open_cellprofiler(source, plate)
    try:
        known = {source: identity} if identity and source.is_file() else {}
        accounts = Accounts(session, run_id, opened, known)
        work = _Work(workspace, session, run_id, opened, maps, accounts)
        done = work.run(checked, layout)
    finally:
        opened.close()
    account.notes.extend(done.notes)
    return done


class _Work:
    """One source on its way in."""

    def __init__(
        self,
        workspace: Workspace,
        session: Session,
        run_id: int,
        source: ObjectSource,
        maps: PathMap | None,
        accounts: Accounts,
    ) -> None:
        self._workspace = workspace
        self._session = session
        self._run_id = run_id
        self._source = source
        self._scratch = Account(run_id, source.files[0].name)
        self._rows = RowWriter(session, run_id, source.files[0].name, self._scratch, maps)
        self._accounts = accounts

    def run(self, name: str, layout: Layout) -> FeaturesDone:
        self._workspace.progress.start("ingest", len(self._source.cells))
        try:
            self._accounts.say_all()
            images = self._images()
            target = self._target(name)
            cells = self._cells(images, target)
            self._accounts.close(layout.value)
        finally:
            self._workspace.progress.finish()
            self._accounts.stop()
        return self._done(target, cells)

    def _target(self, name: str) -> TargetSet | None:
        if not len(self._source.cells):
            return None  # nothing to measure: a set without cells would only be in the way
        return target_set(self._session, self._source, name)

    def _done(self, target: TargetSet | None, cells: CellWriter | None) -> FeaturesDone:
        return FeaturesDone(
            feature_set=target.name if target else None,
            segmentation=target.segment_id if target else None,
            columns=len(self._source.columns),
            plates=tuple(sorted(self._rows.plates)),
            new_images=cells.new_images if cells else 0,
            cells=cells.created if cells else 0,
            unchanged=cells.unchanged if cells else 0,
            accounts=tuple(self._accounts.of_files),
            notes=tuple(self._source.notes),
        )

    def _cells(self, images: Integers, target: TargetSet | None) -> CellWriter | None:
        if target is None:
            return None
        of_cells = images[self._source.cells.image]
        writer = CellWriter(
            self._workspace,
            self._session,
            self._run_id,
            self._source,
            target,
            of_cells,
            self._accounts,
        )
        writer.write()
        return writer

    def _images(self) -> Integers:
        """Return the id of each image, -1 where there is none for cells."""
        found: list[int] = []
        for file, rows in groupby(self._source.images, key=lambda row: row.file):
            listed = list(rows)
            for start in range(0, len(listed), _BATCH):
                found += self._batch(file, listed[start : start + _BATCH])
        return self._each_once(np.array(found, np.int64))

    def _batch(self, file: str, rows: Sequence[ImageRow]) -> list[int]:
        records = [row.content for row in rows if isinstance(row.content, ImageRecord)]
        scratch, account = self._scratch, self._accounts.by_name[file]
        scratch.file = file
        before = scratch.mark()
        ids = iter(self._rows.write(records))
        found: list[int] = []
        for row in rows:
            image = next(ids) if isinstance(row.content, ImageRecord) else None
            found.append(-1 if image is None else image)
            if self._source.own_images and not isinstance(row.content, ImageRecord):
                account.refuse(*row.content)
        if self._source.own_images:
            account.created += scratch.created - before.created
            account.updated += scratch.updated - before.updated
            account.unchanged += scratch.unchanged - before.unchanged
            account.refused += scratch.refused - before.refused
        _hand_over(scratch, account)
        scratch.flush(self._session)
        account.flush(self._session)
        return found

    def _each_once(self, ids: Integers) -> Integers:
        """Take the first of several rows that are the same field; a field has one set of cells."""
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        again &= ids != -1
        for number in np.flatnonzero(again):
            row = self._source.images[number]
            assert isinstance(row.content, ImageRecord)
            detail = "an earlier row is the same field: the cells of this one are left out"
            self._accounts.by_name[row.file].problem(row.content.line, "same field twice", detail)
        ids[again] = -1
        return ids


def _hand_over(scratch: Account, account: Account) -> None:
    """Let ``account`` say what was said of its rows."""
    account.reasons += scratch.reasons
    account.shown += scratch.shown[: SHOWN - len(account.shown)]
    scratch.reasons.clear()
    scratch.shown.clear()
