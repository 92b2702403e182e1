"""Any question about a store, answered by DuckDB.

Small tables are read live from the database; the rows that ended runs wrote into the big ones
come from snapshots; a feature set is a relation under its own name. All that one ``Questions``
answers belongs to one moment of the database, and a table or a feature set is read when the first
question needs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from ..artifacts import ArtifactFolder
from ..config import VoteRules
from ..errors import QueryError, StorageError, UnknownNameError
from ..runs.workspace import Workspace
from .answer import Answer
from .copies import COUNTS, PLACED, WINNERS, WRITERS, Copies, final_states
from .guard import (
    Limits,
    Parameters,
    explained,
    locked_connection,
    only_reading,
    parameters_of,
    run_limited,
    tables_in,
)
from .plans import described_plan
from .schema import TABLES, arrow_schema, create_statement, quoted
from .sets import SetRelation, list_sets, open_files
from .snapshots import RunMark
from .source import Source, open_source
from .views import queries

EXTENTS = """
    SELECT run_id, count(*) || ' images, ' || sum(n_cells) || ' cells' FROM segmentations
    GROUP BY run_id
"""

_COUNTED_FROM = {COUNTS: {PLACED}, WINNERS: {COUNTS, "labels"}}
"""What the kept views read, of runs that may be gone on with."""

_CATALOG_WORDS = re.compile(r"\s*(show|describe|desc)\b", re.IGNORECASE)


@contextmanager
def open_questions(
    workspace: Workspace,
    limits: Limits | None = None,
    *,
    rules: VoteRules | None = None,
    runs: Collection[int] | None = None,
) -> Iterator[Questions]:
    """Open a store for questions.

    ``rules``: how cells vote in the views; by default every cell that is not excluded does.
    ``runs``: the predict runs that are asked about; what others said is not read, as if they had
    said nothing.

    Raises:
        DatabaseError: the database cannot be reached.
        MissingExtraError: the store is on PostgreSQL and its ADBC driver is not installed.
        StorageError: the cache folder cannot be made.
    """
    limits = limits or Limits()
    cache = workspace.settings.cache
    folder = _made(cache / "snapshots")
    with (
        open_source(workspace.database) as source,
        _connection(limits, cache) as empty,
        _connection(limits, cache) as full,
    ):
        views = queries(rules or VoteRules())
        # Votes among cells that are not flagged are counted anew: flags may be added.
        kept = (
            (PLACED, COUNTS, WINNERS) if rules is None or rules.unflagged_by is None else (PLACED,)
        )
        copies = Copies(source, folder, _made(cache / "spill"), runs)
        yield Questions(source, workspace.artifacts, copies, limits, empty, full, views, kept)


@contextmanager
def _connection(limits: Limits, cache: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    spill = _private_folder(_made(cache / "spill"))
    try:
        with closing(locked_connection(limits, spill)) as connection:
            yield connection
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    return folder.resolve()


def _private_folder(parent: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    except OSError as error:
        raise _unusable(parent, error) from error


def _unusable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"The cache {folder} cannot be made: {error.strerror}. Mend the permissions."
    )


class Questions:
    """A store as it is at one moment. Made by :func:`open_questions`.

    Two databases in memory: ``empty`` holds all tables and views without rows, to check a
    question before anything is read; ``full`` those that questions have needed so far.
    """

    def __init__(
        self,
        source: Source,
        artifacts: ArtifactFolder,
        copies: Copies,
        limits: Limits,
        empty: duckdb.DuckDBPyConnection,
        full: duckdb.DuckDBPyConnection,
        view_queries: Mapping[str, str],
        kept_views: Collection[str],
    ) -> None:
        self._source = source
        self._artifacts = artifacts
        self._copies = copies
        self._limits = limits
        self._empty = empty
        self._full = full
        self._loaded: set[str] = set()
        self._views_made: set[str] = set()
        for table in TABLES.values():
            empty.execute(create_statement(table))
        sets = list_sets(source, {*TABLES, *view_queries})
        self._sets = {item.name.lower(): item for item in sets if not item.in_table}
        self._views = dict(view_queries)
        self._views |= {item.name: item.query for item in sets if item.in_table}
        self._known = frozenset({*TABLES, *self._sets, *kept_views})
        for item in self._sets.values():
            self._make_empty(item)
        for name, query in self._views.items():
            if name in kept_views:
                empty.execute(f"CREATE TABLE {quoted(name)} AS {query}")
            else:
                empty.execute(f"CREATE VIEW {quoted(name)} AS {query}")
        self._bases: dict[str, set[str]] = {}

    def _make_empty(self, found: SetRelation) -> None:
        # From an Arrow table, as it will be when it is full: DuckDB then renames columns whose
        # names differ in case only in the same way.
        self._empty.register("columns of a set", found.schema.empty_table())
        self._empty.execute(f'CREATE TABLE {quoted(found.name)} AS FROM "columns of a set" LIMIT 0')
        self._empty.unregister("columns of a set")

    def ask(self, sql: str, parameters: Parameters | None = None) -> pa.Table:
        """Return the answer of one reading statement; ``parameters`` fill its ``?`` or ``$name``.

        Raises:
            QueryError: the statement is wrong, would write, reads files, or takes too much.
            StorageError: the snapshots cannot be written.
        """
        return self._collected(self.stream(sql, parameters))

    def ask_ours(self, sql: str, parameters: Parameters | None = None) -> pa.Table:
        """Return the answer of a question that is part of cellstore: known to read, and right."""
        return self._collected(self._answer(sql.strip(), parameters_of(parameters)))

    def stream(self, sql: str, parameters: Parameters | None = None) -> Answer:
        """Return the answer of one reading statement piece by piece, however large it is.

        Ask nothing else before its last piece. Raises as :meth:`ask` does, also between pieces.
        """
        statement = only_reading(self._empty, sql)
        bound = parameters_of(parameters)
        self._check(statement, bound)
        return self._answer(statement, bound)

    def _answer(self, statement: str, bound: object) -> Answer:
        needed = set() if _CATALOG_WORDS.match(statement) else self._tables_of(statement)
        if not needed:
            return self._run(self._empty, statement, bound)
        self._load(needed)
        self._make_views(statement)
        return self._run(self._full, statement, bound)

    def plan(self, sql: str, parameters: Parameters | None = None) -> str:
        """Return how a question would be answered: one step a line, what it reads below it.

        Raises as :meth:`ask` does.
        """
        statement = only_reading(self._empty, sql)
        return described_plan(self.ask(f"EXPLAIN (FORMAT json) {statement}", parameters))

    @property
    def names(self) -> list[str]:
        """All that can stand behind FROM: tables, views and feature sets."""
        return [*TABLES, *self._views, *(item.name for item in self._sets.values())]

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Return name and type of the columns of a table, a view or a feature set.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if name not in self.names:
            raise UnknownNameError.of("table", name, self.names)
        rows = self._empty.execute(f"DESCRIBE {quoted(name)}").fetchall()
        return [(str(row[0]), str(row[1])) for row in rows]

    def _check(self, statement: str, bound: object) -> None:
        prefix = "" if re.match(r"\s*explain\b", statement, re.IGNORECASE) else "EXPLAIN "
        if _CATALOG_WORDS.match(statement) or re.match(r"\s*summarize\b", statement, re.I):
            return
        run_limited(
            self._empty,
            self._limits.seconds,
            lambda: self._empty.execute(prefix + statement, bound),
        )

    def _tables_of(self, statement: str) -> set[str]:
        try:
            names = self._empty.get_table_names(statement)
        except duckdb.BinderException:
            return self._tables_named(statement)  # it has parameters, which DuckDB cannot tell
        except duckdb.Error as error:
            raise explained(error) from error
        return {name.lower() for name in names} & self._known

    def _tables_named(self, statement: str) -> set[str]:
        """Return every table that the statement names, itself or by a view on it."""
        parsed = self._empty.execute(
            "SELECT json_serialize_sql(?::VARCHAR)", [statement]
        ).fetchall()[0]
        names = tables_in(json.loads(parsed[0]))
        if names is None:  # no plain SELECT: every word of it may be one
            names = set(re.findall(r"\w+", statement.lower()))
        behind = [self._tables_behind(name) for name in names & self._views.keys()]
        return (names & self._known).union(*behind)

    def _tables_behind(self, view: str) -> set[str]:
        if view not in self._bases:
            self._bases[view] = self._tables_of(f"FROM {quoted(view)}")
        return self._bases[view]

    def _run(self, connection: duckdb.DuckDBPyConnection, statement: str, bound: object) -> Answer:
        return Answer(connection, self._limits.seconds, statement, bound)

    def _collected(self, answer: Answer) -> pa.Table:
        return pa.Table.from_batches(self._within_memory(answer), schema=answer.schema)

    def _within_memory(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        size = 0
        for batch in batches:
            size += batch.nbytes
            if size > self._limits.answer_mb << 20:
                raise QueryError(
                    f"The answer is larger than {self._limits.answer_mb} MB. "
                    "Ask for fewer rows or columns, for example with LIMIT."
                )
            yield batch

    def _load(self, names: set[str]) -> None:
        for name in sorted(names):
            if name not in self._loaded:  # one may load another
                self._load_table(name)
                self._loaded.add(name)

    def _make_views(self, statement: str) -> None:
        """Make the views that the statement may name, after those that they read."""
        named = self._views_in(statement)
        for name, query in self._views.items():
            missing = name in named and name not in self._known | self._views_made
            if missing and self._tables_behind(name) <= self._loaded:
                self._full.execute(f"CREATE VIEW {quoted(name)} AS {query}")
                self._views_made.add(name)

    def _views_in(self, statement: str) -> set[str]:
        words = statement.lower()
        named: set[str] = set()
        for name in reversed(self._views):  # a view comes after those it reads
            if name.lower().replace('"', '""') in words:
                named.add(name)
                words += self._views[name].lower()
        return named

    def _load_table(self, name: str) -> None:
        if name in self._sets:
            found = self._sets[name]
            self._full.register(found.name, open_files(self._source, self._artifacts, found))
        elif name not in WRITERS:
            batches = list(self._source.read(TABLES[name]))
            table = pa.Table.from_batches(batches, schema=arrow_schema(TABLES[name]))
            self._full.register(name, table)
        else:
            self._load_big(name)

    def _load_big(self, name: str) -> None:
        ended, others = self._runs(name)
        # Handed over as an Arrow dataset: the connection itself may open no file at all.
        self._full.register(f"copied {name}", self._copies.of_ended(name, ended))
        columns = ", ".join(quoted(column) for column, _ in self.columns(name))
        # Names of our own models and numbers; nothing here comes from a user.
        query = f'SELECT {columns} FROM "copied {name}"'  # noqa: S608
        if others and name in _COUNTED_FROM:
            self._load(_COUNTED_FROM[name])
            self._make_views(self._views[name])
            numbers = ", ".join(map(str, others))
            query += f" UNION ALL FROM ({self._views[name]}) WHERE run_id IN ({numbers})"
        elif others:
            self._full.register(f"live {name}", self._copies.live(name, others))
            query += f' UNION ALL SELECT {columns} FROM "live {name}"'  # noqa: S608
        self._full.execute(f"CREATE VIEW {quoted(name)} AS {query}")

    def _runs(self, table: str) -> tuple[list[RunMark], list[int]]:
        """Return the runs whose rows of a big table are final, and the numbers of the others."""
        self._load({"runs"})
        stages = [stage.value for stage in WRITERS[table]]
        query = """
            SELECT id, started_at::VARCHAR, ended_at::VARCHAR,
                ended_at IS NOT NULL AND list_contains(?, status)
            FROM runs WHERE list_contains(?, stage) ORDER BY id
        """
        found = self._full.execute(query, [final_states(table), stages]).fetchall()
        rows = [row for row in found if self._copies.looked_at(table, row[0])]
        extents = self._extents() if table == "cells" else {row[0]: "" for row in rows}
        ended = [
            RunMark(row[0], row[1], row[2], extents[row[0]])
            for row in rows
            if row[3] and row[0] in extents
        ]
        return ended, [row[0] for row in rows if not row[3]]

    def _extents(self) -> dict[int, str]:
        """How much there is of what each run found: an ingest may add cells to those of another."""
        self._load({"segmentations"})
        return dict(self._full.execute(EXTENTS).fetchall())
