"""The rows of the database as Arrow, through ADBC: one consistent moment, read only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Column, Table

from ..db.session import Database
from ..errors import DatabaseError, MissingExtraError
from .schema import TIMESTAMP, arrow_schema, is_json, quoted

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
