"""Feature sets: the built-in ones in table ``features``, the others in Parquet files.

A file is rows by ``cell_id``, so that the values of some cells are a few row groups of a few files.
No function holds more than the rows that it was asked for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..db.models import Artifact, CellFeatures, FeatureFile, FeatureSet
from ..errors import StorageError, UnknownNameError, UserInputError
from ..terms import FeatureStorage

_KEYS = ("cell_id", "recipe_id", "run_id")
FEATURE_COLUMNS: tuple[str, ...] = tuple(
    column.name for column in CellFeatures.__table__.columns if column.name not in _KEYS
)
"""The built-in measurements, in the order in which a network reads them."""

CELL_ID = "cell_id"
_NUMERIC = ("float", "int", "uint")
_OPEN_FILES = 16

Values = tuple[NDArray[np.bool_], NDArray[np.float64]]


@dataclass(frozen=True)
class SetFile:
    """A file of a feature set and the range of cell ids that it holds."""

    path: Path
    first_cell_id: int
    last_cell_id: int


@dataclass(frozen=True)
class ReadableSet:
    """The numeric ``columns`` of a feature set, and where they are: ``files``, else the table.

    ``mark`` is a digest over the bytes of all files, ``None`` for the table.
    """

    name: str | None = None
    columns: tuple[str, ...] = FEATURE_COLUMNS
    files: tuple[SetFile, ...] | None = None
    mark: str | None = None

    @property
    def in_table(self) -> bool:
        """Whether the values are in table ``features``."""
        return self.files is None


BUILT_IN = ReadableSet()


def find_feature_set(session: Session, name: str) -> FeatureSet:
    """Return the feature set of this name.

    Raises:
        UnknownNameError: there is none.

    """
    found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
    if found is None:
        known = session.scalars(select(FeatureSet.name).order_by(FeatureSet.id))
        raise UnknownNameError.of("feature set", name, list(known))
    return found


def set_of_recipe(session: Session, recipe_id: int) -> FeatureSet | None:
    """Return the feature set that a measure recipe fills, if it has one."""
    query = select(FeatureSet).where(FeatureSet.recipe_id == recipe_id)
    return session.scalars(query).one_or_none()


def open_set(
    session: Session, artifacts: ArtifactFolder, recipe_id: int, name: str | None = None
) -> ReadableSet:
    """Return what is to be read of the feature set of a measure recipe; ``name`` checks it.

    Raises:
        UserInputError: no column of the set holds numbers, or it has no files.
        StorageError: a file of the set is gone.

    """
    found = set_of_recipe(session, recipe_id)
    if found is None or found.storage is FeatureStorage.TABLE:
        return ReadableSet(name=found.name if found else name)
    columns = numeric_columns(found.columns)
    files, mark = _files_of(session, artifacts, found.id)
    if not columns or not files:
        lacks = "has no column of numbers" if files else "holds no cells yet"
        raise UserInputError(
            f"Feature set {found.name!r} {lacks}. Measure or ingest it again, or name another set."
        )
    return ReadableSet(found.name, columns, files, mark)


def numeric_columns(columns: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the columns that hold numbers, in their order."""
    return tuple(
        str(item["name"]) for item in columns if str(item.get("dtype", "")).startswith(_NUMERIC)
    )


def _files_of(
    session: Session, artifacts: ArtifactFolder, set_id: int
) -> tuple[tuple[SetFile, ...], str]:
    query = (
        select(Artifact.path, Artifact.sha256, FeatureFile.first_cell_id, FeatureFile.last_cell_id)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .where(FeatureFile.feature_set_id == set_id)
        .order_by(FeatureFile.first_cell_id, Artifact.sha256)
    )
    files, digest = [], hashlib.sha256()
    for path, sha256, first, last in session.execute(query):
        files.append(SetFile(_there(artifacts, path), first, last))
        digest.update(sha256.encode())
    return tuple(files), digest.hexdigest()


def _there(artifacts: ArtifactFolder, path: str) -> Path:
    found = artifacts.locate(path)
    if not found.is_file():
        raise StorageError(
            f"The stored file {path} is gone. See what else is affected with: cellstore verify"
        )
    return found


class SetReader:
    """Call it with cell ids to get their values out of the files of a feature set."""

    def __init__(self, files: Sequence[SetFile]) -> None:
        self._files = tuple(files)
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._last: tuple[object, pa.Table | None] = (None, None)

    def __call__(self, cell_ids: NDArray[np.int64], columns: Sequence[str]) -> Values:
        """Return which of the cells the set has, (N,), and their values, (N, F).

        ``cell_ids`` (N,) ascend. A value that was not measured is NaN, and so is every value of a
        cell that the set does not have.

        Raises:
            StorageError: a file is gone, damaged, lacks a column, or two have the same cell.

        """
        values = np.full((len(cell_ids), len(columns)), np.nan)
        times = np.zeros(len(cell_ids), dtype=np.int64)
        for file in self._files_with(cell_ids):
            opened = self._opened(file)
            for group in opened.groups(cell_ids, columns):
                table = self._table(opened, group, tuple(columns))
                _place(table, columns, cell_ids, values, times)
        if (times > 1).any():
            twice = int(cell_ids[times > 1][0])
            raise StorageError(
                f"Cell {twice} is more than once in the files of its feature set. "
                "See what is wrong with: cellstore verify"
            )
        return times == 1, values

    def _files_with(self, cell_ids: NDArray[np.int64]) -> list[SetFile]:
        if len(cell_ids) == 0:
            return []
        first, last = cell_ids[0], cell_ids[-1]
        return [f for f in self._files if f.first_cell_id <= last and f.last_cell_id >= first]

    def _table(self, file: _OpenFile, group: int, columns: tuple[str, ...]) -> pa.Table:
        # The next cells that are asked for are often in the same row group.
        key = (file.path, group, columns)
        if self._last[0] != key:
            self._last = (None, None)  # never two of them in memory
            self._last = (key, file.table(group, columns))
        return self._last[1]

    def _opened(self, file: SetFile) -> _OpenFile:
        if file.path not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[file.path] = _OpenFile(file.path)
        self._open.move_to_end(file.path)
        return self._open[file.path]


class _OpenFile:
    """A Parquet file, and the range of cell ids of each of its row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._parquet = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        self._names = frozenset(self._parquet.schema_arrow.names)
        self._ranges = [self._range(i) for i in range(self._parquet.metadata.num_row_groups)]

    def _range(self, group: int) -> tuple[int, int] | None:
        known = self._parquet.metadata.row_group(group).column(0).statistics
        return (known.min, known.max) if known is not None and known.has_min_max else None

    def groups(self, cell_ids: NDArray[np.int64], columns: Sequence[str]) -> list[int]:
        """Return the row groups that may hold some of the cells."""
        gone = [name for name in (CELL_ID, *columns) if name not in self._names]
        if gone:
            raise StorageError(
                f"{self.path.name} has no column {gone[0]!r}. "
                "See what is wrong with: cellstore verify"
            )
        return [i for i, known in enumerate(self._ranges) if _meets(known, cell_ids)]

    def table(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return a row group."""
        try:
            return self._parquet.read_row_group(group, [CELL_ID, *columns])
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StorageError:
        return StorageError(
            f"The feature file {self.path.name} cannot be read ({str(error).splitlines()[0]}). "
            "See what is wrong with: cellstore verify"
        )


@dataclass(frozen=True)
class FileFacts:
    """How many rows a file of a feature set has, and its first and last cell."""

    rows: int
    first_cell_id: int
    last_cell_id: int

    def with_ids(self, cell_ids: NDArray[np.int64]) -> FileFacts:
        """Return the facts after more rows."""
        first = self.first_cell_id if self.rows else int(cell_ids[0])
        return FileFacts(self.rows + len(cell_ids), first, int(cell_ids[-1]))

    def __str__(self) -> str:
        return f"{self.rows} rows of cells {self.first_cell_id} to {self.last_cell_id}"


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


def _meets(known: tuple[int, int] | None, cell_ids: NDArray[np.int64]) -> bool:
    if known is None:
        return True
    start = int(np.searchsorted(cell_ids, known[0]))
    return start < len(cell_ids) and bool(cell_ids[start] <= known[1])


def _place(
    table: pa.Table,
    columns: Sequence[str],
    cell_ids: NDArray[np.int64],
    values: NDArray[np.float64],
    times: NDArray[np.int64],
) -> None:
    """Write the rows of ``table`` that are of one of the cells to their places."""
    found = table.column(CELL_ID).to_numpy()
    places = np.searchsorted(cell_ids, found)
    wanted = places < len(cell_ids)
    wanted[wanted] = cell_ids[places[wanted]] == found[wanted]
    places = places[wanted]
    np.add.at(times, places, 1)
    for index, name in enumerate(columns):
        values[places, index] = _numbers(table.column(name))[wanted]


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()
    return numbers
