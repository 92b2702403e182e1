"""Any question about a store, answered by DuckDB.

Small tables are read live from the database; the rows that finished runs wrote into the big ones
come from snapshots. All that one ``Questions`` answers belongs to one moment of the database, and
a table is read when the first question needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
from pyarrow.dataset import dataset

from ..errors import QueryError, StorageError, UnknownNameError
from ..runs.workspace import Workspace
from ..terms import Stage
from .guard import (
    Limits,
    Parameters,
    explained,
    locked_connection,
    only_reading,
    parameters_of,
    time_limit,
)
from .schema import TABLES, arrow_schema, create_statement, quoted
from .snapshots import RunMark, rows_of_runs, snapshot
from .source import Source, open_source
from .views import views

WRITERS = {
    "cells": Stage.SEGMENT,
    "features": Stage.MEASURE,
    "predictions": Stage.PREDICT,
}
"""The big tables, read from snapshots, and the stage whose runs write them."""

ANSWER_ROWS = 65_536
_CATALOG_WORDS = re.compile(r"\s*(show|describe|desc)\b", re.IGNORECASE)


@contextmanager
def open_questions(workspace: Workspace, limits: Limits | None = None) -> Iterator[Questions]:
    """Open a store for questions.

    Raises:
        DatabaseError: the database cannot be reached.
        MissingExtraError: the store is on PostgreSQL and its ADBC driver is not installed.
        StorageError: the cache folder cannot be made.
    """
    limits = limits or Limits()
    folder = _cache_folder(workspace)
    with open_source(workspace.database) as source:
        spill = workspace.settings.cache / "spill"
        empty, full = (locked_connection(limits, spill) for _ in range(2))
        try:
            yield Questions(source, folder, limits, empty, full)
        finally:
            empty.close()
            full.close()


def _cache_folder(workspace: Workspace) -> Path:
    folder = workspace.settings.cache / "snapshots"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The cache {folder} cannot be made: {error.strerror}. Mend the permissions."
        ) from error
    return folder.resolve()


class Questions:
    """A store as it is at one moment. Made by :func:`open_questions`.

    Two databases in memory: ``empty`` holds all tables and views without rows, to check a
    question before anything is read; ``full`` those that questions have needed so far.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        limits: Limits,
        empty: duckdb.DuckDBPyConnection,
        full: duckdb.DuckDBPyConnection,
    ) -> None:
        self._source = source
        self._folder = folder
        self._limits = limits
        self._empty = empty
        self._full = full
        self._loaded: set[str] = set()
        self._views_made: set[str] = set()
        for table in TABLES.values():
            empty.execute(create_statement(table))
        for view in views():
            empty.execute(f"CREATE VIEW {view.name} AS {view.query}")
        self._bases = {view.name: self._tables_of(f"FROM {view.name}") for view in views()}

    def ask(self, sql: str, parameters: Parameters | None = None) -> pa.Table:
        """Return the answer of one reading statement; ``parameters`` fill its ``?`` or ``$name``.

        Raises:
            QueryError: the statement is wrong, would write, reads files, or takes too much.
        """
        statement = only_reading(self._empty, sql)
        bound = parameters_of(parameters)
        self._check(statement, bound)
        if _CATALOG_WORDS.match(statement):
            return self._run(self._empty, statement, bound)
        needed = self._tables_of(statement)
        if not needed:
            return self._run(self._empty, statement, bound)
        self._load(needed)
        return self._run(self._full, statement, bound)

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Return name and type of the columns of a table or view.

        Raises:
            UnknownNameError: there is none of that name.
        """
        known = [*TABLES, *(view.name for view in views())]
        if name not in known:
            raise UnknownNameError.of("table", name, known)
        rows = self._empty.execute(f"DESCRIBE {quoted(name)}").fetchall()
        return [(str(row[0]), str(row[1])) for row in rows]

    def _check(self, statement: str, bound: object) -> None:
        prefix = "" if re.match(r"\s*explain\b", statement, re.IGNORECASE) else "EXPLAIN "
        if _CATALOG_WORDS.match(statement) or re.match(r"\s*summarize\b", statement, re.I):
            return
        with time_limit(self._empty, self._limits.seconds):
            self._empty.execute(prefix + statement, bound)

    def _tables_of(self, statement: str) -> set[str]:
        try:
            names = self._empty.get_table_names(statement)
        except duckdb.BinderException:
            return self._tables_named(statement)  # it has parameters, which DuckDB cannot tell
        except duckdb.Error as error:
            raise explained(error) from error
        return {name.lower() for name in names} & TABLES.keys()

    def _tables_named(self, statement: str) -> set[str]:
        """Return every table whose name, or that of a view on it, is a word of the statement."""
        words = set(re.findall(r"\w+", statement.lower()))
        behind = [self._bases[name] for name in words & self._bases.keys()]
        return (words & TABLES.keys()).union(*behind)

    def _run(
        self, connection: duckdb.DuckDBPyConnection, statement: str, bound: object
    ) -> pa.Table:
        with time_limit(connection, self._limits.seconds):
            relation = connection.sql(statement, params=bound)
            if relation is None:
                raise QueryError("This statement has no answer; ask with SELECT.")
            reader = relation.to_arrow_reader(ANSWER_ROWS)
            return self._collected(reader)

    def _collected(self, reader: pa.RecordBatchReader) -> pa.Table:
        batches, size = [], 0
        for batch in reader:
            batches.append(batch)
            size += batch.nbytes
            if size > self._limits.answer_mb << 20:
                raise QueryError(
                    f"The answer is larger than {self._limits.answer_mb} MB. "
                    "Ask for fewer rows or columns, for example with LIMIT."
                )
        return pa.Table.from_batches(batches, schema=reader.schema)

    def _load(self, names: set[str]) -> None:
        for name in sorted(names - self._loaded):
            self._load_table(name)
            self._loaded.add(name)
        for view in views():
            if view.name not in self._views_made and self._bases[view.name] <= self._loaded:
                self._full.execute(f"CREATE VIEW {view.name} AS {view.query}")
                self._views_made.add(view.name)

    def _load_table(self, name: str) -> None:
        if name not in WRITERS:
            self._full.register(name, self._live(name))
            return
        finished, others = self._runs(WRITERS[name])
        files = [snapshot(self._folder, self._source, name, run) for run in finished]
        # Handed over as an Arrow dataset: the connection itself may open no file at all.
        self._full.register(f"copied {name}", dataset(files, arrow_schema(TABLES[name])))
        self._full.register(f"live {name}", self._live(name, rows_of_runs(name, others or [-1])))
        self._full.execute(
            f'CREATE VIEW {name} AS FROM "copied {name}" UNION ALL FROM "live {name}"'
        )

    def _live(self, name: str, condition: str = "") -> pa.Table:
        batches = list(self._source.read(TABLES[name], condition))
        return pa.Table.from_batches(batches, schema=arrow_schema(TABLES[name]))

    def _runs(self, stage: Stage) -> tuple[list[RunMark], list[int]]:
        """Return the finished runs of a stage, and the numbers of the others."""
        self._load({"runs"})
        query = "SELECT id, started_at::VARCHAR, ended_at::VARCHAR, status = 'done' FROM runs"
        rows = self._full.execute(f"{query} WHERE stage = ? ORDER BY id", [stage.value]).fetchall()
        finished = [RunMark(row[0], row[1], row[2]) for row in rows if row[3]]
        return finished, [row[0] for row in rows if not row[3]]
