"""CellProfiler's measurements in SQLite: cytominer-database, or ExportToDatabase."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BadTableError
from ..files.magic import SQLITE
from .cellprofiler_columns import (
    IMAGE_NUMBER,
    TABLE_NUMBER,
    TableColumns,
    is_image_table,
    is_object_table,
    table_columns,
)
from .cellprofiler_images import is_needed, plain_column
from .model import Integers

_TEXT_TYPES = ("CHAR", "CLOB", "TEXT")
_NOT_A_NUMBER = ("nan", "-nan", "")


@dataclass
class SqliteTable:
    """A table of objects; ``rowids`` of its rows in their order, ``odd`` columns hold text, too."""

    path: Path
    name: str
    columns: TableColumns
    texts: frozenset[str]
    has_table_number: bool
    rowids: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    odd: set[str] = field(default_factory=set)
    unread: dict[str, int] = field(default_factory=dict)

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return the features of ``rows`` (counted from 0, in any order, repeated or not).

        Numbers are float64, exactly as they are stored; the text 'nan' is null.

        Raises:
            BadTableError: the file is damaged.
        """
        wanted = self.rowids[rows]
        asked = np.unique(wanted)
        names = list(self.columns.features)
        with _adbc(self.path) as cursor:
            found, rowids = self._select(cursor, names, asked)
        place = np.searchsorted(rowids, wanted)
        return found if _is_whole(place, len(rowids)) else found.take(pa.array(place))

    def _select(
        self, cursor: Any, names: Sequence[str], asked: Integers
    ) -> tuple[pa.RecordBatch, Integers]:
        plain = [name for name in names if name not in self.odd]
        condition = _condition(asked)
        table = _fetch(cursor, self._statement(map(self._value, plain), condition), len(asked))
        rowids = table.column(0).to_numpy()
        columns = dict(zip(plain, table.columns[1:], strict=True))
        self.odd |= {name for name in plain if self._is_odd(name, columns[name])}
        for name in sorted(self.odd):  # a copy: another thread may add to it
            columns[name] = self._odd_column(cursor, name, condition, len(asked))
        arrays = [self._typed(name, columns[name]) for name in names]
        return pa.RecordBatch.from_arrays(arrays, names=list(names)), rowids

    def _is_odd(self, name: str, values: pa.Array) -> bool:
        return name not in self.texts and not _is_number(values.type)

    def _value(self, name: str) -> str:
        return _quoted(name) if name in self.texts else f"nullif({_quoted(name)}, 'nan')"

    def _typed(self, name: str, values: pa.Array) -> pa.Array:
        return values.cast(pa.string() if name in self.texts else pa.float64())

    def _odd_column(self, cursor: Any, name: str, condition: str, rows: int) -> pa.Array:
        """Read a column of numbers that also holds text: 'inf' is a number, 'nan' is none."""
        column = _quoted(name)
        # Numbers come before all texts in SQLite's order, so this tells them apart.
        parts = (
            f"CASE WHEN {column} < '' THEN {column} END",
            f"CASE WHEN {column} >= '' THEN CAST({column} AS TEXT) END",
        )
        table = _fetch(cursor, self._statement(parts, condition), rows)
        numbers = table.column(1).cast(pa.float64())
        texts = table.column(2).cast(pa.string())
        return pc.coalesce(numbers, self._numbers(name, texts))

    def _numbers(self, name: str, texts: pa.Array) -> pa.Array:
        found = []
        for text in texts.to_pylist():
            number = _number(text)
            if number is None and text is not None and text.strip().lower() not in _NOT_A_NUMBER:
                self.unread[name] = self.unread.get(name, 0) + 1
            found.append(number)
        return pa.array(found, pa.float64())

    def _statement(self, values: Iterable[str], condition: str) -> str:
        # Names come from the file itself and are quoted; the condition holds numbers of ours.
        listed = ", ".join(["rowid", *values])
        return f"SELECT {listed} FROM {_quoted(self.name)} WHERE {condition}"  # noqa: S608


@dataclass(frozen=True)
class SqliteKeys:
    """The key columns of a table as Arrow, in the order of its rows; ``group`` is text or null."""

    rowid: pa.Array
    group: pa.Array
    image: pa.Array
    number: pa.Array
    parents: dict[str, pa.Array]


@dataclass(frozen=True)
class SqliteImage:
    """A row of the image table: where it is, its keys, and its columns without ``Image_``."""

    line: int
    group: str | None
    number: int | None
    values: Mapping[str, str | None]


def is_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


def tables_of(path: Path) -> dict[str, dict[str, str]]:
    """Return the declared type of each column of each table (not of views).

    Raises:
        BadTableError: the file is damaged.
    """
    with _reading(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {
            name: {
                row[1]: row[2].upper() for row in db.execute(f"PRAGMA table_info({_quoted(name)})")
            }
            for name in names
        }


def object_tables(path: Path, tables: Mapping[str, Mapping[str, str]]) -> list[SqliteTable]:
    """Return the tables of objects."""
    return [
        SqliteTable(
            path,
            name,
            table_columns(name, list(columns)),
            frozenset(
                c for c, kind in columns.items() if any(text in kind for text in _TEXT_TYPES)
            ),
            TABLE_NUMBER in columns,
        )
        for name, columns in tables.items()
        if is_object_table(name, columns)
    ]


def image_table(tables: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return the name of the table of images."""
    found = (
        name for name, columns in tables.items() if is_image_table(name) and IMAGE_NUMBER in columns
    )
    return next(found, None)


def read_keys(table: SqliteTable) -> SqliteKeys:
    """Read the keys of all rows of a table, and remember where its rows are.

    Raises:
        BadTableError: the file is damaged, or the table has no row numbers.
    """
    parents = table.columns.parents
    group = _quoted(TABLE_NUMBER) if table.has_table_number else "NULL"
    numbers = [IMAGE_NUMBER, table.columns.object_number, *parents.values()]
    listed = ", ".join(
        [
            "rowid",
            f"CAST({group} AS TEXT)",
            *(f"CAST({_quoted(name)} AS INTEGER)" for name in numbers),
        ]
    )
    statement = f"SELECT {listed} FROM {_quoted(table.name)} ORDER BY rowid"  # noqa: S608
    with _adbc(table.path) as cursor:
        found = _fetch(cursor, statement, 65_536)
    rowid, texts, image, number, *others = found.columns
    table.rowids = rowid.cast(pa.int64()).to_numpy()
    return SqliteKeys(
        rowid, texts.cast(pa.string()), image, number, dict(zip(parents, others, strict=True))
    )


def read_images(path: Path, name: str, columns: Iterable[str]) -> Iterator[SqliteImage]:
    """Yield the rows of the image table, with the columns that say which image each is.

    Raises:
        BadTableError: the file is damaged.
    """
    present = list(columns)
    group = _quoted(TABLE_NUMBER) if TABLE_NUMBER in present else "NULL"
    needed = [column for column in present if is_needed(plain_column(column))]
    keys = ["rowid", f"CAST({group} AS TEXT)", _quoted(IMAGE_NUMBER)]
    listed = ", ".join([*keys, *(f"CAST({_quoted(column)} AS TEXT)" for column in needed)])
    statement = f"SELECT {listed} FROM {_quoted(name)} ORDER BY rowid"  # noqa: S608
    plain = [plain_column(column) for column in needed]
    with _reading(path) as db:
        for line, code, number, *values in db.execute(statement):
            whole = number if isinstance(number, int) else None
            yield SqliteImage(line, code, whole, dict(zip(plain, values, strict=True)))


def _condition(asked: Integers) -> str:
    if len(asked) == 0:
        return "0"
    first, last = int(asked[0]), int(asked[-1])
    if last - first < 2 * len(asked):
        return f"rowid BETWEEN {first} AND {last} ORDER BY rowid"
    return f"rowid IN ({','.join(map(str, asked.tolist()))}) ORDER BY rowid"


def _is_whole(place: Integers, rows: int) -> bool:
    return len(place) == rows and bool((place == np.arange(rows)).all())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _number(text: str | None) -> float | None:
    try:
        found = float(text) if text is not None else np.nan
    except ValueError:
        return None
    return None if np.isnan(found) else float(found)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _fetch(cursor: Any, statement: str, rows: int) -> pa.RecordBatch:
    # ADBC takes the types from its first batch of rows: let that be all of them.
    cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(2 * rows + 2)})
    cursor.execute(statement)
    table = cursor.fetch_arrow_table().combine_chunks()
    columns = [
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.columns
    ]
    # Values of one name may be asked for twice, so by place, not by name.
    return pa.RecordBatch.from_arrays(columns, names=[str(n) for n in range(len(columns))])


@contextmanager
def _adbc(path: Path) -> Iterator[Any]:
    from adbc_driver_manager import Error
    from adbc_driver_sqlite import dbapi

    try:
        with dbapi.connect(_uri(path)) as connection, connection.cursor() as cursor:
            yield cursor
    except (Error, pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise _damaged(path, error) from error


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(_uri(path), uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> BadTableError:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return BadTableError(f"{path} cannot be read as SQLite ({reason}). Copy or export it again.")


def _uri(path: Path) -> str:
    # immutable is not said: a tool may still be writing; mode=ro never makes a file.
    return f"file:{quote(str(path.resolve()))}?mode=ro"
