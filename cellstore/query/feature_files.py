"""Feature sets: the built-in ones in table ``features``, the others in Parquet files.

:class:`SetReader` reads both alike, by ``cell_id``. A file is rows by ``cell_id``, so that the
values of some cells are a few row groups of a few files. No function holds more than the rows that
it was asked for.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, delete, func, select
from sqlalchemy.orm import Session

from ..analysis.features import FEATURE_NAMES
from ..artifacts import (
    ArtifactFolder,
    StoredFile,
    part_prefix,
    sha256_of,
    sweep,
    sync_folder,
    writing,
)
from ..db.bulk import in_lists, insert_new
from ..enums import ArtifactKind, FeatureStorage
from ..errors import StorageError, UnknownNameError, UserInputError
from ..io.objects import Integers, batch_rows
from ..jobs.lookup import IS_CURRENT, has_results
from ..jobs.runs import keep_files
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Image,
    RecipeInput,
    Run,
    RunArtifact,
    Segmentation,
)

CELL_ID = "cell_id"
ROWS_OF_FILE = 50_000
"""Cells after which a file ends."""

ROW_GROUP = 2_000
"""Cells of a row group: training reads the groups that the cells of an image are in."""


class WrittenFile(NamedTuple):
    """A file of features and its range of cells."""

    stored: StoredFile
    rows: int
    first_cell_id: int
    last_cell_id: int


def make_set(
    session: Session,
    name: str,
    recipe_id: int,
    columns: Sequence[str],
    dtype: str,
    source: str,
    description: str,
) -> FeatureSet | None:
    """Return the feature set in files of a recipe, made on its first use.

    What is said of its ``columns`` is the same for all. None: a set of another recipe has the name.
    """
    details = {"dtype": dtype, "unit": "1", "source": source, "formula": ""}
    details["description"] = description
    described = [{"name": column, **details} for column in columns]
    row = {"name": name, "recipe_id": recipe_id, "columns": described}
    insert_new(session, FeatureSet, [{**row, "storage": FeatureStorage.FILES}])
    return set_of_recipe(session, recipe_id)


def register_files(
    session: Session,
    artifacts: ArtifactFolder,
    feature_set_id: int,
    run_id: int,
    files: Sequence[WrittenFile],
) -> None:
    """Insert the rows of files that are written, unless they are there: a file was lost."""
    for file in files:
        if not artifacts.locate(file.stored.path).is_file():
            raise StorageError(
                f"The file {file.stored.path} was removed while it was written. Run the same "
                "command again."
            )
        (artifact,) = keep_files(session, [file.stored])
        if session.get(FeatureFile, (feature_set_id, artifact)) is not None:
            continue
        keep_files(session, [file.stored], run_id)
        row = FeatureFile(
            feature_set_id=feature_set_id,
            artifact_id=artifact,
            run_id=run_id,
            n_rows=file.rows,
            first_cell_id=file.first_cell_id,
            last_cell_id=file.last_cell_id,
        )
        session.add(row)
    session.flush()


class FeatureWriter:
    """Writes rows by ascending cell id into as many files as they need.

    ``files`` are those that are finished; what is not finished is removed by :meth:`abandon`.
    """

    def __init__(self, artifacts: ArtifactFolder, schema: pa.Schema) -> None:
        self.files: list[WrittenFile] = []
        self._root = artifacts.root
        self._schema = pa.schema([pa.field(CELL_ID, pa.int64(), nullable=False), *schema])
        self._part: Path | None = None
        self._ids: list[int] = []  # the number of rows, the first cell, the last cell

    def write(self, cell_ids: Integers, values: pa.RecordBatch) -> None:
        """Append the features of some cells, as row groups of their own."""
        arrays = [pa.array(cell_ids), *values.columns]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        with writing(self._root):
            if self._part is None:
                self._root.mkdir(parents=True, exist_ok=True)
                sweep(self._root)
                self._part = self._root / f"{part_prefix()}{uuid.uuid4().hex}"
                self._ids = [0, int(cell_ids[0]), 0]
                # Measurements rarely repeat: a dictionary of them is work for nothing.
                texts = [item.name for item in self._schema if pa.types.is_string(item.type)]
                self._writer = pq.ParquetWriter(
                    self._part, self._schema, compression="snappy", use_dictionary=texts or False,
                    write_statistics=[CELL_ID],
                )  # fmt: skip
            size = min(ROW_GROUP, batch_rows(len(self._schema)))
            self._writer.write_batch(batch, row_group_size=size)
        self._ids = [self._ids[0] + len(cell_ids), self._ids[1], int(cell_ids[-1])]
        if self._ids[0] >= ROWS_OF_FILE:
            self.finish()

    def finish(self) -> None:
        """End the file that is being written: durably, under the name of its content."""
        if self._part is None:
            return
        with writing(self._root):
            self._writer.close()
            with self._part.open("rb+") as file:
                os.fsync(file.fileno())
                sha256, size = sha256_of(self._part), file.seek(0, os.SEEK_END)
            path = f"{ArtifactKind.FEATURES.value}/{sha256[:2]}/{sha256}.parquet"
            target = self._root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._part.replace(target)
            sync_folder(target.parent)
        self._part = None
        stored = StoredFile(ArtifactKind.FEATURES, path, sha256, size)
        self.files.append(WrittenFile(stored, *self._ids))

    def abandon(self) -> None:
        """Remove what is not finished."""
        if self._part is None:
            return
        with suppress(OSError, AttributeError, pa.ArrowException):
            self._writer.close()
        with suppress(AttributeError):
            self._writer.is_open = False  # or it would try again when it is collected
        with suppress(OSError):
            self._part.unlink(missing_ok=True)
        self._part = None


Numbers = NDArray[np.float64]
Values = tuple[NDArray[np.bool_], Numbers]


@dataclass(frozen=True)
class SetFile:
    """A file of a feature set and the range of cell ids that it holds."""

    path: Path
    first_cell_id: int
    last_cell_id: int
    sha256: str = ""


@dataclass(frozen=True)
class ReadableSet:
    """The numeric ``columns`` of a feature set, and where they are: ``files``, else the table.

    In the table no value misses; ``has_gaps`` says of others that some may.
    """

    name: str | None = None
    columns: tuple[str, ...] = FEATURE_NAMES
    files: tuple[SetFile, ...] | None = None

    def mark(self, session: Session, segment_id: int, images: Select[int]) -> str | None:
        """Return a digest over the bytes of the files with cells of ``images``; None: the table.

        ``segment_id``: the recipe that found the cells. Plates that come or go change nothing.
        """
        if self.files is None:
            return None
        ranges = select(func.min(Cell.id), func.max(Cell.id)).group_by(Cell.segmentation_id)
        ranges = ranges.join(Segmentation, Segmentation.id == Cell.segmentation_id)
        ranges = ranges.where(Segmentation.recipe_id == segment_id)
        ranges = ranges.where(Segmentation.image_id.in_(images))
        found = np.array([tuple(row) for row in session.execute(ranges)], np.int64).reshape(-1, 2)
        digest = hashlib.sha256()
        for file in self.files:
            begins, ends = found[:, 0] <= file.last_cell_id, found[:, 1] >= file.first_cell_id
            if np.any(begins & ends):
                digest.update(file.sha256.encode())
        return digest.hexdigest()

    @property
    def has_gaps(self) -> bool:
        """Whether a value may be missing."""
        return self.files is not None


BUILT_IN = ReadableSet()


def find_feature_set(session: Session, name: str, segment_id: int | None = None) -> FeatureSet:
    """Return the feature set of this name; of a group (``texture``) the one measured last.

    ``segment_id``: of a group, one of the cells of this recipe.
    """
    from .source import group_of  # it loads DuckDB

    last_run = select(func.max(Run.id)).where(Run.recipe_id == FeatureSet.recipe_id, has_results())
    newest = func.coalesce(last_run.correlate(FeatureSet).scalar_subquery(), 0).desc()
    query = select(FeatureSet).order_by(newest, FeatureSet.id.desc())
    if segment_id is not None:
        inputs = select(RecipeInput.recipe_id).where(RecipeInput.input_id == segment_id)
        query = query.where((FeatureSet.name == name) | FeatureSet.recipe_id.in_(inputs))
    sets = {item.name: item for item in session.scalars(query)}
    groups = {group_of(item.name): item for item in reversed(sets.values())}
    found = sets.get(name) or groups.get(name.lower())
    if found is None:
        groups.pop(None, None)
        known = sorted([*session.scalars(select(FeatureSet.name)), *map(str, groups)])
        raise UnknownNameError.of("feature set", name, known)
    return found


def set_of_recipe(session: Session, recipe_id: int) -> FeatureSet | None:
    """Return the feature set that a measure recipe fills, if it has one."""
    query = select(FeatureSet).where(FeatureSet.recipe_id == recipe_id)
    return session.scalars(query).one_or_none()


def list_files(session: Session, of: ColumnElement[bool]) -> Sequence[Any]:
    """Return the files of feature sets, by first cell: id, path and sha256, first and last cell."""
    query = (
        select(Artifact.id, Artifact.path, Artifact.sha256)
        .add_columns(FeatureFile.first_cell_id, FeatureFile.last_cell_id)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(of)
        .order_by(FeatureFile.first_cell_id, Artifact.sha256)
    )
    return session.execute(query).all()


def open_set(session: Session, artifacts: ArtifactFolder, recipe_id: int) -> ReadableSet:
    """Return what is to be read of the feature set of a measure recipe."""
    found = set_of_recipe(session, recipe_id)
    if found is None or found.storage is FeatureStorage.TABLE:
        return ReadableSet(found.name if found else None)
    columns = tuple(
        str(item["name"])
        for item in found.columns
        if str(item.get("dtype", "")).startswith(("float", "int", "uint"))
    )
    files = [
        SetFile(artifacts.existing(path), first, last, sha256)
        for _, path, sha256, first, last in list_files(session, FeatureSet.id == found.id)
    ]
    if not columns or not files:
        lacks = "has no column of numbers" if files else "holds no cells yet"
        raise UserInputError(
            f"Feature set {found.name!r} {lacks}. Measure or ingest it again, or name another set."
        )
    return ReadableSet(found.name, columns, tuple(files))


def are_chosen(chosen: bytes, cell_ids: Integers) -> NDArray[np.bool_]:
    """Return which ``cell_ids`` (N,) have their bit set: bit ``id % 8`` of byte ``id // 8``."""
    of_bytes, at = np.frombuffer(chosen, np.uint8), np.asarray(cell_ids) >> 3
    bits = np.where(at < len(of_bytes), of_bytes.take(at, mode="clip"), 0)
    found: NDArray[np.bool_] = (bits >> (cell_ids & 7) & 1).astype(bool)
    return found


class SetReader:
    """Call it with cell ids to get their values out of a feature set. Threads may share it.

    The set is ``files``, or what table ``features`` has of the recipe ``measure_id``. With neither
    it is all cells, and has no values. ``chosen``: only of these cells, a bit for each id (see
    :func:`are_chosen`); None: of all.
    """

    def __init__(
        self,
        files: Sequence[SetFile] | None,
        measure_id: int | None = None,
        chosen: bytes | None = None,
    ) -> None:
        self._files, self._measure_id, self._chosen = files, measure_id, chosen
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._last: tuple[object, pa.Table | None] = (None, None)
        self._lock = Lock()

    def restrict(self, query: Select[Any]) -> Select[Any]:
        """Return a query of cells without those that the set lacks, if the database knows them."""
        if self._files is not None or self._measure_id is None:
            return query
        own = and_(CellFeatures.cell_id == Cell.id, CellFeatures.recipe_id == self._measure_id)
        return query.join(CellFeatures, own)

    def has(self, session: Session, cell_ids: Integers) -> NDArray[np.bool_]:
        """Return which of the cells of a restricted query the set has, (N,); raises as a call."""
        if self._files is not None:
            return self(session, cell_ids, ())[0]
        if self._chosen is not None:
            return are_chosen(self._chosen, cell_ids)
        return np.ones(len(cell_ids), dtype=bool)

    def __call__(self, session: Session, cell_ids: Integers, columns: Sequence[str]) -> Values:
        """Return which of the cells the set has, (N,), and their values, (N, F).

        ``cell_ids`` (N,) ascend. A value that was not measured is NaN, and so is every value of a
        cell that the set does not have, or that is not chosen.

        Raises:
            StorageError: a file is gone, damaged, lacks a column, or two have the same cell.

        """
        values = np.full((len(cell_ids), len(columns)), np.nan)
        times = np.zeros(len(cell_ids), dtype=np.int64)
        read = self._of_table if self._files is None else self._of_files
        chosen: Any = True if self._chosen is None else are_chosen(self._chosen, cell_ids)
        if self._files is None and self._measure_id is None:
            return np.broadcast_to(chosen, len(cell_ids)), values
        asked = cell_ids if chosen is True else cell_ids[chosen]
        for found, numbers in read(session, asked, columns) if len(asked) else ():
            positions = np.searchsorted(cell_ids, found)
            wanted = positions < len(cell_ids)
            wanted[wanted] = cell_ids[positions[wanted]] == found[wanted]
            positions = positions[wanted]
            np.add.at(times, positions, 1)
            for index, column in enumerate(numbers):
                values[positions, index] = column[wanted]
        if (times > 1).any():
            twice = int(cell_ids[times > 1][0])
            raise StorageError(
                f"Cell {twice} is more than once in the files of its feature set. "
                "See what is wrong with: cellstore verify"
            )
        return (times == 1) & chosen, values

    def _of_table(
        self, session: Session, cell_ids: Integers, columns: Sequence[str]
    ) -> Iterator[tuple[Integers, Iterable[Numbers]]]:
        asked = [CellFeatures.cell_id, *(getattr(CellFeatures, name) for name in columns)]
        query = select(*asked).where(CellFeatures.recipe_id == self._measure_id)
        first, last = int(cell_ids[0]), int(cell_ids[-1])
        parts = [query.where(CellFeatures.cell_id.between(first, last))]
        if last - first > 4 * len(cell_ids):  # most of the range is not asked for
            parts = [query.where(CellFeatures.cell_id.in_(s)) for s in in_lists(cell_ids.tolist())]
        for part in parts:
            rows = [tuple(row) for row in session.execute(part)]
            table = np.array(rows, dtype=np.float64).reshape(len(rows), len(asked)).T
            yield table[0].astype(np.int64), table[1:]

    def _of_files(
        self, _session: Session, cell_ids: Integers, columns: Sequence[str]
    ) -> Iterator[tuple[Integers, Iterable[Numbers]]]:
        with self._lock:
            for file in self._files or ():
                if file.first_cell_id > cell_ids[-1] or file.last_cell_id < cell_ids[0]:
                    continue
                if file.path not in self._open:
                    if len(self._open) == 16:
                        self._open.popitem(last=False)
                    self._open[file.path] = _OpenFile(file.path)
                self._open.move_to_end(file.path)
                opened = self._open[file.path]
                for group in opened.groups(cell_ids, columns):
                    # The next cells that are asked for are often in the same row group.
                    key = (file.path, group, tuple(columns))
                    if self._last[0] != key:
                        self._last = (None, None)  # never two of them in memory
                        self._last = (key, opened.table(group, columns))
                    table = self._last[1]
                    assert table is not None
                    numbers = (
                        table.column(name).cast(pa.float64(), safe=False).to_numpy()
                        for name in columns
                    )
                    yield table.column(CELL_ID).to_numpy(), numbers


@contextmanager
def _reading(which: str) -> Iterator[None]:
    """Say in a sentence that a file of features cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"The feature file {which} cannot be read ({str(error).splitlines()[0]}). "
            "See what is wrong with: cellstore verify"
        ) from error


def stored_values(
    paths: Sequence[Path], columns: Sequence[str], cell_ids: Integers
) -> tuple[Integers, pa.Table | None]:
    """Return which of the ascending ``cell_ids`` have a row in the files, and the rows of these.

    Values of all types come as they were written; :class:`SetReader` returns numbers.

    Raises:
        StorageError: a file is gone or damaged.
    """
    from pyarrow.dataset import dataset, field

    if not paths:
        return np.empty(0, np.int64), None
    key = field(CELL_ID)
    near = (key >= cell_ids[0]) & (key <= cell_ids[-1])  # by these, row groups are passed over
    with _reading("of these cells"):
        found = dataset([str(path) for path in paths]).to_table(
            columns=[CELL_ID, *columns], filter=near & key.isin(cell_ids)
        )
    return found.column(CELL_ID).to_numpy(), found.select(list(columns))


class _OpenFile:
    """A Parquet file, and the range of cell ids of each of its row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path.name):
            self._parquet = pq.ParquetFile(path)
        self._names = frozenset(self._parquet.schema_arrow.names)
        metadata = self._parquet.metadata
        known = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        self._ranges = [(k.min, k.max) if k is not None and k.has_min_max else None for k in known]

    def groups(self, cell_ids: NDArray[np.int64], columns: Sequence[str]) -> list[int]:
        """Return the row groups that may hold some of the cells."""
        gone = [name for name in (CELL_ID, *columns) if name not in self._names]
        if gone:
            raise StorageError(
                f"{self.path.name} has no column {gone[0]!r}. "
                "See what is wrong with: cellstore verify"
            )
        found = []
        for group, known in enumerate(self._ranges):
            start = 0 if known is None else int(np.searchsorted(cell_ids, known[0]))
            if known is None or (start < len(cell_ids) and cell_ids[start] <= known[1]):
                found.append(group)
        return found

    def table(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return a row group, the cell ids first."""
        with _reading(self.path.name):
            return self._parquet.read_row_group(group, [CELL_ID, *columns])


def stream_ids(path: Path) -> Iterator[NDArray[np.int64]]:
    """Yield the cell ids of a file of a feature set in blocks of at most 10,000.

    Raises:
        StorageError: the file cannot be read, or the ids do not ascend.

    """
    last = -1
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, columns=[CELL_ID]):
                ids = batch.column(CELL_ID).to_numpy(zero_copy_only=False)
                if len(ids) and (ids[0] <= last or (np.diff(ids) <= 0).any()):
                    raise StorageError("its cell ids do not ascend")
                if len(ids):
                    yield ids
                    last = int(ids[-1])
    except (OSError, KeyError, pa.ArrowException) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"it cannot be read as Parquet ({error})") from error


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


def _files_of_recipe(
    session: Session, artifacts: ArtifactFolder, recipe_id: int
) -> tuple[list[SetFile], list[tuple[int, SetFile]]]:
    """The files of features of a recipe: those that are there, and those that are gone by id."""
    rows = list_files(session, FeatureSet.recipe_id == recipe_id)
    gone = artifacts.missing(sorted(row.path for row in rows))
    there, lost = [], []
    for row in rows:
        file = SetFile(artifacts.locate(row.path), row.first_cell_id, row.last_cell_id)
        if row.path in gone:
            lost.append((row.id, file))
        else:
            there.append(file)
    return there, lost


def images_of_lost_files(
    session: Session, artifacts: ArtifactFolder, recipe_id: int
) -> set[int] | None:
    """Return the images whose features were in files that are gone; None: no file is gone."""
    there, lost = _files_of_recipe(session, artifacts, recipe_id)
    if not lost:
        return None
    reader = SetReader(there)
    images: set[int] = set()
    for _, file in lost:
        cells = (
            select(Cell.id, Segmentation.image_id)
            .join(Segmentation, Segmentation.id == Cell.segmentation_id)
            .join(RecipeInput, RecipeInput.input_id == Segmentation.recipe_id)
            .join(Image, IS_CURRENT)
            .where(RecipeInput.recipe_id == recipe_id)
            .where(Cell.id.between(file.first_cell_id, file.last_cell_id))
            .order_by(Cell.id)
        )
        for block in session.execute(cells.execution_options(yield_per=50_000)).partitions():
            ids = np.array([row.id for row in block], dtype=np.int64)
            found = reader.has(session, ids)
            images.update(block[index].image_id for index in np.flatnonzero(~found))
    return images


def forget_lost_files(
    session: Session, artifacts: ArtifactFolder, recipe_id: int, made: Integers | None = None
) -> None:
    """Delete the rows of the files of features that are gone.

    ``made``: the cells whose features are there again; only files of no others are forgotten.
    """
    _, lost = _files_of_recipe(session, artifacts, recipe_id)
    ids = [artifact_id for artifact_id, _ in lost]
    if made is not None:
        files = select(FeatureFile).where(FeatureFile.artifact_id.in_(ids))
        ids = [
            file.artifact_id
            for file in session.scalars(files)
            if np.sum((made >= file.first_cell_id) & (made <= file.last_cell_id)) == file.n_rows
        ]
    for table in (FeatureFile, RunArtifact):
        session.execute(delete(table).where(table.artifact_id.in_(ids)))
    session.execute(delete(Artifact).where(Artifact.id.in_(ids)))
