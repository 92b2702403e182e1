"""CellProfiler's tables in SQLite, as ExportToDatabase and cytominer-database write them."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BadTableError, first_line
from .cellprofiler import (
    IMAGE_NUMBER,
    IMAGE_TABLE,
    TABLE_NUMBER,
    TOOL,
    UNKNOWN,
    ImageIndex,
    ObjectColumns,
    TableKeys,
    about_image,
    add_cells,
    check_keys,
    choose_tables,
    object_columns,
    table_name,
)
from .objects import Integers, ObjectSource, SourceFile, as_numbers, whole_numbers, without_nan
from .tables import TableRow

_TEXT_TYPES = ("CHAR", "CLOB", "TEXT")


@dataclass
class SqliteTable:
    """A table of objects; ``rowids`` of its rows in their order, ``odd`` columns hold text, too."""

    path: Path
    name: str
    columns: ObjectColumns
    texts: frozenset[str]
    present: Collection[str]
    rowids: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    odd: set[str] = field(default_factory=set)

    def keys(self, groups: Mapping[str | None, int], images: ImageIndex, file: int) -> TableKeys:
        """Read the keys of all rows; ``groups`` are the TableNumbers that the images have."""
        parents = self.columns.parents
        keys = [TABLE_NUMBER, IMAGE_NUMBER, self.columns.object_number]
        group, *numbers = (_quoted(name) if name in self.present else "NULL" for name in keys)
        numbers += map(_quoted, parents.values())
        listed = ["rowid", f"CAST({group} AS TEXT)"]
        # A number may be text; what is none ('x', 1.5) is another one when it is cast.
        listed += [
            f"CASE WHEN CAST({n} AS INTEGER) = {n} THEN CAST({n} AS INTEGER) END" for n in numbers
        ]
        # Names come from the file itself and are quoted.
        query = f"SELECT {', '.join(listed)} FROM {_quoted(self.name)} ORDER BY rowid"  # noqa: S608
        with _adbc(self.path) as cursor:
            rowid, texts, image, number, *others = _fetch(cursor, query, 65_536).columns
        self.rowids = rowid.cast(pa.int64()).to_numpy()
        encoded = texts.cast(pa.string()).dictionary_encode()
        codes = [groups.get(text, UNKNOWN) for text in encoded.dictionary.to_pylist()]
        at = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
        of_rows = np.array([*codes, groups.get(None, UNKNOWN)], np.int64)[at]
        return TableKeys(
            self.columns,
            images.find(of_rows, whole_numbers(image)),
            whole_numbers(number),
            {role: whole_numbers(some) for role, some in zip(parents, others, strict=True)},
            np.full(len(self.rowids), file, np.int64),
            self.rowids,
            self.read,
        )

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return the features of ``rows`` (counted from 0, in any order, repeated or not).

        Numbers are float64, exactly as they are stored; the text 'nan' is null.
        """
        wanted = self.rowids[rows]
        asked = np.unique(wanted)
        names = list(self.columns.features)
        plain = [name for name in names if name not in self.odd]
        values = [
            _quoted(name) if name in self.texts else f"nullif({_quoted(name)}, 'nan')"
            for name in plain
        ]
        with _adbc(self.path) as cursor:
            table = _fetch(cursor, self._query(values, asked), len(asked))
            columns = dict(zip(plain, table.columns[1:], strict=True))
            are_numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
            self.odd |= {
                name
                for name, found in columns.items()
                if name not in self.texts and not any(test(found.type) for test in are_numbers)
            }
            for name in sorted(self.odd):  # a copy: another thread may add to it
                columns[name] = self._odd_column(cursor, name, asked)
        types = [pa.string() if name in self.texts else pa.float64() for name in names]
        arrays = [columns[name].cast(kind) for name, kind in zip(names, types, strict=True)]
        found = pa.RecordBatch.from_arrays(arrays, names=names)
        positions = np.searchsorted(table.column(0).to_numpy(), wanted)
        if len(positions) == found.num_rows and (np.diff(positions) == 1).all():
            return found
        return found.take(pa.array(positions))

    def _odd_column(self, cursor: Any, name: str, asked: Integers) -> pa.Array:
        """Read a column of numbers that also holds text: 'inf' is a number, 'nan' is none."""
        column = _quoted(name)
        # Numbers come before all texts in SQLite's order, so this tells them apart.
        parts = (
            f"CASE WHEN {column} < '' THEN {column} END",
            f"CASE WHEN {column} >= '' THEN CAST({column} AS TEXT) END",
        )
        table = _fetch(cursor, self._query(parts, asked), len(asked))
        numbers = table.column(1).cast(pa.float64())
        texts = as_numbers(table.column(2).cast(pa.string()))[0]
        return pc.coalesce(numbers, without_nan(texts))

    def _query(self, values: Iterable[str], asked: Integers) -> str:
        # Names come from the file itself and are quoted; the row numbers are ours.
        rows = "0"
        if len(asked):
            first, last = int(asked[0]), int(asked[-1])
            rows = f"rowid BETWEEN {first} AND {last}"
            if last - first >= 2 * len(asked):
                rows = f"rowid IN ({','.join(map(str, asked.tolist()))})"
        listed = ", ".join(["rowid", *values])
        return f"SELECT {listed} FROM {_quoted(self.name)} WHERE {rows} ORDER BY rowid"  # noqa: S608


def is_cellprofiler_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database with a table of images."""
    try:
        return _image_table(_sqlite_tables(path)) is not None
    except (OSError, BadTableError):
        return False


def open_cellprofiler_sqlite(path: Path, plate: str | None = None) -> ObjectSource:
    """Open an SQLite database with a table of images (:func:`is_cellprofiler_sqlite`).

    ``plate`` is the barcode where the tables name none.
    """
    source = ObjectSource(TOOL, own_images=True)
    tables = _sqlite_tables(path)
    image_table = str(_image_table(tables))
    images = ImageIndex(source)
    keys = {IMAGE_NUMBER, TABLE_NUMBER}
    read = [name for name in tables[image_table] if name in keys or about_image(name)]
    groups: dict[str | None, int] = {}
    """The number that each TableNumber got."""
    group_at = read.index(TABLE_NUMBER) if TABLE_NUMBER in read else None
    images.add_table(
        SourceFile(f"{path.name}:{image_table}", path, 0),
        read,
        lambda: _image_rows(path, image_table, read),
        lambda cells: groups.setdefault(None if group_at is None else cells[group_at], len(groups)),
        plate,
    )
    source.check_plate(path.name)
    found: dict[str, SqliteTable] = {}
    for name, columns in tables.items():
        sorted_columns = object_columns(name, list(columns))
        if sorted_columns:
            texts = {c for c, kind in columns.items() if any(text in kind for text in _TEXT_TYPES)}
            found[sorted_columns.name] = SqliteTable(
                path, name, sorted_columns, frozenset(texts), columns
            )
    chosen = choose_tables(source, [table.columns for table in found.values()], path.name)
    used = [found[columns.name] for columns in chosen]
    check_keys(source, f"{path.name}:{image_table}", tables[image_table])
    for table in used:
        check_keys(source, f"{path.name}:{table.name}", table.present, table.columns.object_number)
    found_keys = []
    for number, table in enumerate(used, start=1):
        found_keys.append(table.keys(groups, images, number))
        source.files.append(SourceFile(f"{path.name}:{table.name}", path, len(table.rowids)))
    texts_of = (table.columns.features.get(name) for table in used for name in table.texts)
    add_cells(source, images, found_keys, [name for name in texts_of if name])
    return source


def _sqlite_tables(path: Path) -> dict[str, dict[str, str]]:
    """Return the declared type of each column of each table (not of views)."""
    with _sqlite(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {
            name: {
                row[1]: row[2].upper() for row in db.execute(f"PRAGMA table_info({_quoted(name)})")
            }
            for name in names
        }


def _image_table(tables: Mapping[str, Mapping[str, str]]) -> str | None:
    numbered = [name for name, columns in tables.items() if IMAGE_NUMBER in columns]
    found = [name for name in tables if table_name(name).lower() == IMAGE_TABLE and numbered]
    return min(found, key=lambda name: name not in numbered, default=None)


def _image_rows(path: Path, name: str, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the rows of the image table, as texts; the line is the row number."""
    listed = ["rowid", *(f"CAST({_quoted(column)} AS TEXT)" for column in columns)]
    query = f"SELECT {', '.join(listed)} FROM {_quoted(name)} ORDER BY rowid"  # noqa: S608
    with _sqlite(path) as db:
        for line, *values in db.execute(query):
            yield TableRow(line, values)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _fetch(cursor: Any, query: str, rows: int) -> pa.RecordBatch:
    # ADBC takes the types from its first batch of rows: let that be all of them.
    cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(2 * rows + 2)})
    cursor.execute(query)
    table = cursor.fetch_arrow_table().combine_chunks()
    columns = [
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.columns
    ]
    # Values of one name may be asked for twice, so by position, not by name.
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
def _sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(_uri(path), uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> BadTableError:
    reason = first_line(error)
    return BadTableError(f"{path} cannot be read as SQLite ({reason}). Copy or export it again.")


def _uri(path: Path) -> str:
    # Not immutable=1: a tool may still be writing; mode=ro never makes a file.
    return f"file:{quote(str(path.resolve()))}?mode=ro"
