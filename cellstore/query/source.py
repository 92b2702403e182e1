"""What predict runs said, each answer with the image of its cell: read from the database."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import BigInteger, Column, Float, Integer, Table
from sqlalchemy.types import JSON

from ..db.session import Database
from ..errors import DatabaseError, MissingExtraError
from ..models import METADATA, UtcDateTime

TIMESTAMP = pa.timestamp("us", tz="UTC")

TABLES: dict[str, Table] = dict(METADATA.tables)
"""All tables by name."""

_DUCKDB = {
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    TIMESTAMP: "TIMESTAMP WITH TIME ZONE",
}


def is_json(column: Column[object]) -> bool:
    """Whether the column holds JSON, which comes out as text."""
    return isinstance(column.type, JSON)


def arrow_type(column: Column[object]) -> pa.DataType:
    """Return the Arrow type of a column."""
    if isinstance(column.type, UtcDateTime):
        return TIMESTAMP
    if isinstance(column.type, BigInteger):
        return pa.int64()
    if isinstance(column.type, Integer):
        return pa.int32()
    if isinstance(column.type, Float):
        return pa.float64()
    return pa.string()


def arrow_schema(table: Table) -> pa.Schema:
    """Return the Arrow schema of a table, columns in the order of the models."""
    return pa.schema([pa.field(column.name, arrow_type(column)) for column in table.columns])


def create_statement(table: Table) -> str:
    """Return the DuckDB statement that makes the empty table."""
    columns = ", ".join(
        f"{quoted(column.name)} {_DUCKDB[arrow_type(column)]}" for column in table.columns
    )
    return f"CREATE TABLE {quoted(table.name)} ({columns})"


def literal(text: str) -> str:
    """Return an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Return an SQL identifier in quotes."""
    return '"' + name.replace('"', '""') + '"'


T = TypeVar("T")
AHEAD = 4
"""What each reader may have read that nobody has taken yet."""
_WAIT_SECONDS = 0.2


def side_by_side(readers: Sequence[Callable[[], Iterator[T]]]) -> Iterator[T]:
    """Yield what all ``readers`` yield, as it comes; no more than a few items wait.

    The first exception of a reader is raised; then, and when nobody listens any more, all stop.
    """
    if len(readers) == 1:
        yield from readers[0]()
        return
    shared = _Shared[T](max(1, len(readers)) * AHEAD)
    threads = [
        threading.Thread(target=shared.read, args=(reader,), daemon=True) for reader in readers
    ]
    for thread in threads:
        thread.start()
    try:
        yield from shared.items(len(threads))
    finally:
        shared.stop.set()
        for thread in threads:
            thread.join()


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Shared(Generic[T]):
    def __init__(self, room: int) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(room)
        self.stop = threading.Event()

    def read(self, reader: Callable[[], Iterator[T]]) -> None:
        try:
            for item in reader():
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(_End(error))
        else:
            self._put(_End())

    def _put(self, item: T | _End) -> bool:
        while not self.stop.is_set():
            try:
                self._queue.put(item, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def items(self, readers: int) -> Iterator[T]:
        while readers:
            item = self._queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                readers -= 1


BATCH_ROWS = 65_536

_TYPE_GIVERS = {pa.int64(): "0", pa.int32(): "0", pa.bool_(): "0", pa.float64(): "0.0"}


class Source(Protocol):
    """Something that rows can be read from."""

    def read(self, table: Table, condition: str = "") -> Iterator[pa.RecordBatch]:
        """Yield the rows of ``table`` that meet ``condition``, in the types of its schema.

        ``condition`` is SQL of ours (never of a user), to follow ``FROM table AS t``.
        """

    def select(
        self, schema: pa.Schema, values: Sequence[str], origin: str
    ) -> Iterator[pa.RecordBatch]:
        """Yield ``SELECT values FROM origin`` (SQL of ours) in the types of ``schema``.

        ``{JOIN}`` in ``origin`` stands for a join that takes the left side first.
        """

    def another(self) -> AbstractContextManager[Source]:
        """Open a connection of its own, to read rows that nobody changes beside this one."""


@contextmanager
def open_source(database: Database) -> Iterator[Source]:
    """Open one read transaction on the database; all that is read belongs to one moment.

    Raises:
        DatabaseError: the database cannot be reached or refuses.
        MissingExtraError: PostgreSQL, and its ADBC driver is not installed.
    """
    kind = _SqliteSource if database.is_sqlite else _PostgresSource
    with _explained(database):
        connection = kind.connect(database)
    try:
        yield kind(connection, database)
    finally:
        connection.close()


@contextmanager
def _explained(database: Database) -> Iterator[None]:
    from adbc_driver_manager import Error

    try:
        yield
    except (Error, pa.ArrowInvalid, pa.ArrowIOError) as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise DatabaseError(f"The database {database.shown} failed: {lines[0]}") from error


class _SqliteSource:
    """SQLite types values, not columns, and ADBC takes a column's type from its first rows.

    So a first row of our own, dropped again, gives every column its type.
    """

    def __init__(self, connection: Any, database: Database) -> None:
        self._connection = connection
        self._database = database

    @staticmethod
    def connect(database: Database) -> Any:
        from adbc_driver_sqlite import dbapi

        path = database.engine.url.database or ""
        connection = dbapi.connect(f"file:{quote(path)}?mode=ro")
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM alembic_version")  # the moment begins here
            cursor.fetchall()
        return connection

    def read(self, table: Table, condition: str = "") -> Iterator[pa.RecordBatch]:
        values = [_sqlite_value(column) for column in table.columns]
        return self.select(arrow_schema(table), values, _origin(table, condition))

    def select(
        self, schema: pa.Schema, values: Sequence[str], origin: str
    ) -> Iterator[pa.RecordBatch]:
        types = ", ".join(
            f"{_TYPE_GIVERS.get(field.type, repr(''))} AS {quoted(field.name)}" for field in schema
        )
        query = f"SELECT {types} UNION ALL {_query(values, origin, 'CROSS JOIN')}"
        first = True
        with _explained(self._database), self._connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(BATCH_ROWS)})
            cursor.execute(query)
            for batch in cursor.fetch_record_batch():
                yield _typed(batch.slice(1) if first else batch, schema)
                first = False

    def another(self) -> AbstractContextManager[Source]:
        return open_source(self._database)


class _PostgresSource:
    def __init__(self, connection: Any, database: Database) -> None:
        self._connection = connection
        self._database = database

    @staticmethod
    def connect(database: Database) -> Any:
        try:
            from adbc_driver_postgresql import dbapi
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("adbc-driver-postgresql", "postgres") from error
        url = database.engine.url.set(drivername="postgresql")
        connection = dbapi.connect(url.render_as_string(hide_password=False))
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return connection

    def read(self, table: Table, condition: str = "") -> Iterator[pa.RecordBatch]:
        values = [_postgres_value(column) for column in table.columns]
        return self.select(arrow_schema(table), values, _origin(table, condition))

    def select(
        self, schema: pa.Schema, values: Sequence[str], origin: str
    ) -> Iterator[pa.RecordBatch]:
        with _explained(self._database), self._connection.cursor() as cursor:
            cursor.execute(_query(values, origin, "JOIN"))
            for batch in cursor.fetch_record_batch():
                yield _typed(batch, schema)

    def another(self) -> AbstractContextManager[Source]:
        return open_source(self._database)


def _origin(table: Table, condition: str) -> str:
    return f"{quoted(table.name)} AS t {condition}"


def _query(values: Sequence[str], origin: str, join: str) -> str:
    # Names of our own models and numbers only; nothing here comes from a user.
    return f"SELECT {', '.join(values)} FROM {origin.replace('{JOIN}', join)}"  # noqa: S608


def _sqlite_value(column: Column[object]) -> str:
    name = f"t.{quoted(column.name)}"
    return f"nullif({name}, 'null')" if is_json(column) else name


def _postgres_value(column: Column[object]) -> str:
    name = f"t.{quoted(column.name)}"
    if is_json(column):
        return f"nullif(CAST({name} AS text), 'null') AS {quoted(column.name)}"
    return name


def _typed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        _cast(values, field.type) for values, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(values: pa.Array, wanted: pa.DataType) -> pa.Array:
    if values.type == wanted:
        return values
    if wanted == TIMESTAMP and pa.types.is_string(values.type):
        return pc.assume_timezone(values.cast(pa.timestamp("us")), "UTC")
    return values.cast(wanted)


SCHEMA = pa.schema(
    [
        ("run_id", pa.int64()),
        ("image_id", pa.int64()),
        ("cell_id", pa.int64()),
        ("excluded", pa.bool_()),
        ("rank", pa.int32()),
        ("label_id", pa.int64()),
        ("probability", pa.float64()),
    ]
)
"""The columns of ``placed_predictions``; those of table ``predictions`` are among them."""

VALUES = (
    "p.run_id",
    "s.image_id",
    "p.cell_id",
    "c.excluded IS NOT NULL AS excluded",
    "p.rank",
    "p.label_id",
    "p.probability",
)
ORIGIN = """
    predictions AS p
    {JOIN} cells AS c ON c.id = p.cell_id
    {JOIN} segmentations AS s ON s.id = c.segmentation_id
    WHERE p.run_id IN (%s)
"""
BOUNDS = """
    (SELECT
        (SELECT min(cell_id) FROM predictions WHERE run_id = %(run)d) AS low,
        (SELECT max(cell_id) FROM predictions WHERE run_id = %(run)d) AS high
    ) AS bounds
"""
CELLS_OF_READER = 250_000
"""A range of so many cell ids is worth a connection of its own."""
MOST_READERS = 8


def read_runs(source: Source, run_ids: list[int]) -> Iterator[pa.RecordBatch]:
    """Yield what these runs have said, as of the moment of ``source``."""
    numbers = ", ".join(str(int(item)) for item in run_ids)
    return source.select(SCHEMA, VALUES, ORIGIN % numbers)


def read_ended_run(source: Source, run_id: int) -> Iterator[pa.RecordBatch]:
    """Yield what an ended run said, in no certain order.

    Nobody adds to that, so several connections read it side by side, each a range of cells.
    """
    return side_by_side(
        [partial(_range, source, int(run_id), low, high) for low, high in _ranges(source, run_id)]
    )


def _range(source: Source, run_id: int, low: int, high: int) -> Iterator[pa.RecordBatch]:
    origin = f"{ORIGIN % run_id} AND p.cell_id BETWEEN {low} AND {high}"
    number, *others = SCHEMA
    with source.another() as own:
        for batch in own.select(pa.schema(others), VALUES[1:], origin):
            column = pa.repeat(pa.scalar(run_id, number.type), batch.num_rows)
            yield pa.RecordBatch.from_arrays([column, *batch.columns], schema=SCHEMA)


def _ranges(source: Source, run_id: int) -> list[tuple[int, int]]:
    schema = pa.schema([("low", pa.int64()), ("high", pa.int64())])
    (row,) = (
        row
        for batch in source.select(schema, ("low", "high"), BOUNDS % {"run": run_id})
        for row in batch.to_pylist()
    )
    if row["low"] is None:
        return []
    low, end = row["low"], row["high"] + 1
    parts = max(1, min((end - low) // CELLS_OF_READER, MOST_READERS, os.cpu_count() or 1))
    edges = [low + (end - low) * part // parts for part in range(parts + 1)]
    return [(first, last - 1) for first, last in itertools.pairwise(edges)]
