"""The database of a store, read through ADBC: Arrow streams that DuckDB takes as they come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import duckdb
from sqlalchemy import BigInteger, Boolean, Float, Integer, Table
from sqlalchemy.types import JSON

from ..db.session import Database
from ..errors import DatabaseError, MissingExtraError
from ..models import EXCLUSIONS, METADATA, UtcDateTime

TABLES: dict[str, Table] = {**METADATA.tables, EXCLUSIONS.name: EXCLUSIONS}
"""All tables by name, and the view that the database itself has."""

BATCH_ROWS = 65_536

Columns = dict[str, str]
"""The type in DuckDB of each column, by name."""

_TYPE_GIVERS = {"BIGINT": "0", "INTEGER": "0", "BOOLEAN": "0", "DOUBLE": "0.0"}

CELLS_OF_READER = 250_000
"""A range of so many cell ids is worth a connection of its own."""
MOST_READERS = 8


_TYPES = (
    (UtcDateTime, "TIMESTAMP WITH TIME ZONE"),
    (Boolean, "BOOLEAN"),
    (BigInteger, "BIGINT"),
    (Integer, "INTEGER"),
    (Float, "DOUBLE"),
)
COLUMNS: dict[str, Columns] = {
    name: {
        column.name: next(
            (kind for types, kind in _TYPES if isinstance(column.type, types)), "VARCHAR"
        )
        for column in table.columns
    }
    for name, table in TABLES.items()
}
"""The columns of each table, in the order of the models. JSON is text in DuckDB."""


class Source:
    """One read transaction on a database; all that is read through it belongs to one moment."""

    def __init__(self, database: Database) -> None:
        """Begin the transaction; end it with :meth:`close`.

        Raises:
            DatabaseError: the database cannot be reached or refuses.
            MissingExtraError: PostgreSQL, and its ADBC driver is not installed.
        """
        import adbc_driver_manager as adbc

        self.database = database
        self._is_sqlite = database.is_sqlite
        self._adbc = adbc
        url = database.engine.url
        # The drivers themselves: their DB-API layer imports pandas, half a second for a short
        # answer.
        if self._is_sqlite:
            import adbc_driver_sqlite

            driver = adbc_driver_sqlite._driver_path()
            address = f"file:{quote(url.database or '')}?mode=ro"
            begin = "SELECT count(*) FROM alembic_version"  # the moment begins with a read
        else:
            try:
                import adbc_driver_postgresql
            except ModuleNotFoundError as error:
                raise MissingExtraError.of("adbc-driver-postgresql", "postgres") from error
            driver = adbc_driver_postgresql._driver_path()
            address = url.set(drivername="postgresql").render_as_string(hide_password=False)
            begin = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        with self._explained():
            self._handle = adbc.AdbcDatabase(driver=driver, uri=address)
            self._connection = adbc.AdbcConnection(self._handle)
            self._connection.set_autocommit(False)
            with self._stream(begin):
                pass

    def fetch(
        self, target: duckdb.DuckDBPyConnection, name: str, condition: str = ""
    ) -> list[dict[str, Any]]:
        """Return rows of a small table by way of ``target``; ``condition`` as for feed_table."""
        self.feed_table(
            target, 'CREATE OR REPLACE TEMP TABLE "fetched" AS FROM {rows}', name, condition
        )
        rows = target.execute('FROM "fetched"').fetchall()
        target.execute('DROP TABLE "fetched"')
        return [dict(zip(TABLES[name].columns.keys(), row, strict=True)) for row in rows]

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()
        self._handle.close()

    def feed(
        self,
        target: duckdb.DuckDBPyConnection,
        statement: str,
        columns: Columns,
        values: Sequence[str],
        origins: Sequence[str],
    ) -> None:
        """Carry out a statement of DuckDB, in which ``{rows}`` stands for rows of the database.

        They are ``SELECT values FROM origin`` of all ``origins`` (SQL of ours, never of a user),
        with the names and types of ``columns``. Of several origins each is read through a
        connection of its own, side by side: only for rows that nobody changes any more.
        """
        if len(origins) > 1:
            # DuckDB itself reads one stream after the other.
            def read(number: int) -> str:
                with closing(Source(self.database)) as source, closing(target.cursor()) as own:
                    part = f'"part {number}"'
                    create = f"CREATE TABLE {part} AS FROM {{rows}}"
                    source.feed(own, create, columns, values, [origins[number]])
                return part

            with ThreadPoolExecutor(len(origins)) as pool:
                parts = list(pool.map(read, range(len(origins))))
            rows = " UNION ALL ".join(f"FROM {part}" for part in parts)
            target.execute(statement.replace("{rows}", f"({rows})"))
            for part in parts:
                target.execute(f"DROP TABLE {part}")
            return
        first = ""
        if self._is_sqlite:
            # SQLite types values, not columns, and ADBC takes a column's type from its first rows:
            # a first row gives every column its type.
            empty = "''"
            typed = (
                f'{_TYPE_GIVERS.get(kind, empty)} AS "{name}"' for name, kind in columns.items()
            )
            first = f'SELECT 1 AS "first", {", ".join(typed)} UNION ALL SELECT 0, '
        cast = ", ".join(f'CAST("{name}" AS {kind}) AS "{name}"' for name, kind in columns.items())
        where = ' WHERE "first" = 0' if first else ""
        query = f"{first or 'SELECT '}{', '.join(values)} FROM {origins[0]}"  # noqa: S608
        with self._stream(query) as stream:
            target.register("stream", stream)
            try:
                rows = f'(SELECT {cast} FROM "stream"{where})'  # noqa: S608
                target.execute(statement.replace("{rows}", rows))
            finally:
                target.unregister("stream")

    def feed_table(
        self, target: duckdb.DuckDBPyConnection, statement: str, name: str, condition: str = ""
    ) -> None:
        """Carry out ``statement`` as :meth:`feed` does, with rows of a table.

        ``condition`` is SQL of ours, to follow ``FROM table AS t``.
        """
        table = TABLES[name]
        # JSON is text in DuckDB, and its null is no value. Names are those of the models.
        text = "t.{0}" if self._is_sqlite else "CAST(t.{0} AS text)"
        json = f"nullif({text}, 'null') AS {{0}}"
        values = [
            (json if isinstance(column.type, JSON) else "t.{0}").format(f'"{column.name}"')
            for column in table.columns
        ]
        origin = f'"{name}" AS t {condition}'
        self.feed(target, statement, COLUMNS[name], values, [origin])

    @contextmanager
    def _stream(self, query: str) -> Iterator[Any]:
        """Open the Arrow stream of what a query yields."""
        with self._explained():
            statement = self._adbc.AdbcStatement(self._connection)
            try:
                if self._is_sqlite:
                    statement.set_options(**{"adbc.sqlite.query.batch_rows": str(BATCH_ROWS)})
                statement.set_sql_query(query)
                stream = statement.execute_query()[0]
                try:
                    yield stream
                finally:
                    stream.release()
            finally:
                statement.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._adbc.Error as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            raise DatabaseError(f"The database {self.database.shown} failed: {lines[0]}") from error


PREDICTION_COLUMNS: Columns = {
    "run_id": "BIGINT",
    "image_id": "BIGINT",
    "cell_id": "BIGINT",
    "excluded": "BOOLEAN",
    "rank": "INTEGER",
    "label_id": "BIGINT",
    "probability": "DOUBLE",
}
"""The columns of ``predictions_with_image``; those of table ``predictions`` are among them."""

_PREDICTION_VALUES = (
    *("p.run_id", "s.image_id", "p.cell_id", "c.excluded IS NOT NULL AS excluded"),
    *("p.rank", "p.label_id", "p.probability"),
)

# Two questions, each of which an index answers at once.
_BOUNDS = """
    (SELECT
        (SELECT min(cell_id) FROM predictions WHERE run_id = %(run)d) AS low,
        (SELECT max(cell_id) FROM predictions WHERE run_id = %(run)d) AS high
    ) AS bounds
"""


def feed_predictions(
    source: Source,
    target: duckdb.DuckDBPyConnection,
    statement: str,
    *,
    runs: Sequence[int] = (),
    ended: int | None = None,
    image: int | None = None,
) -> None:
    """Carry out ``statement`` as :meth:`Source.feed` does, with rows of ``PREDICTION_COLUMNS``.

    They are what some ``runs`` said so far, what an ``ended`` run said, in no certain order because
    several connections read it, or what all runs said of one ``image``.
    """
    # SQLite joins in the order that is written with CROSS JOIN, so that every step goes through an
    # index.
    join = "CROSS JOIN" if source.database.is_sqlite else "JOIN"
    joined = f"""predictions AS p
        {join} cells AS c ON c.id = p.cell_id
        {join} segmentations AS s ON s.id = c.segmentation_id"""
    if image is not None:
        origins = [predictions_of_image(image, is_sqlite=source.database.is_sqlite)]
    elif ended is None:
        numbers = ", ".join(str(int(run)) for run in runs)
        origins = [f"{joined} WHERE p.run_id IN ({numbers})"]
    else:
        source.feed(
            target,
            "CREATE OR REPLACE TEMP TABLE bounds AS FROM {rows}",
            {"low": "BIGINT", "high": "BIGINT"},
            ["low", "high"],
            [_BOUNDS % {"run": int(ended)}],
        )
        (row,) = target.execute("FROM bounds").fetchall()
        low, end = (row[0], row[1] + 1) if row[0] is not None else (0, 1)
        parts = max(1, min((end - low) // CELLS_OF_READER, MOST_READERS, os.cpu_count() or 1))
        edges = [low + (end - low) * part // parts for part in range(parts + 1)]
        origins = [
            f"{joined} WHERE p.run_id = {int(ended)} AND p.cell_id BETWEEN {first} AND {last - 1}"
            for first, last in pairwise(edges)
        ]
    source.feed(target, statement, PREDICTION_COLUMNS, _PREDICTION_VALUES, origins)


def predictions_of_image(image_id: int, *, is_sqlite: bool) -> str:
    """Return what follows FROM to read what was said of an image: each step goes by an index."""
    join = "CROSS JOIN" if is_sqlite else "JOIN"
    return f"""segmentations AS s
        {join} cells AS c ON c.segmentation_id = s.id
        {join} predictions AS p ON p.cell_id = c.id
        WHERE s.image_id = {int(image_id)}"""
