"""Any question about a store, answered by DuckDB.

Small tables are read live from the database; the rows that ended runs wrote into the big ones
come from copies in Parquet files, made once per run; a feature set is a relation under its own
name. All that one ``Questions`` answers belongs to one moment of the database, and a table, a view
or a feature set is made when the first question names it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from ..artifacts import BorrowingFolder, part_prefix, sweep, writing
from ..config import Limits, VoteOptions
from ..enums import ArtifactKind, Stage
from ..errors import QueryError, StorageError, UnknownNameError
from ..jobs.workspace import Workspace
from .guard import (
    Parameters,
    Statement,
    literal,
    locked_connection,
    not_readable,
    only_reading,
    quoted,
    reading_files,
    run_limited,
)
from .source import (
    EXCLUDED,
    LATER,
    PREDICTION_COLUMNS,
    PREDICTIONS,
    PROFILES,
    VIEWS,
    Columns,
    SetRelation,
    Source,
    list_sets,
    no_rows,
    view,
)

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

ROWS_AT_ONCE = 4_096

_DESCRIBES = re.compile(r"\s*(describe|desc|show)\b", re.IGNORECASE)
_COMMENT = re.compile(r"--.*")
_END = re.compile(r";\s*((--[^\n]*|/\*.*?\*/)\s*)*\Z", re.DOTALL)
_IN_WITH = re.compile(r"\b(\w+)(?:\([\w, ]+\))? as \(")
_SOURCE = re.compile(r'(?<!distinct )\b(?:from|join)\s+"?(\w+)(?![\w(])')

# Copies

FORMAT = 5
"""Raised when the copies change, so that older ones are not read."""
MAKING_MB = 500
"""The memory in which a copy is made; what does not fit goes to the disk."""

KEPT_BYTES = 20 << 30
"""The most that all copies of a store may take on the disk."""
KEPT_SECONDS = 30 * 24 * 3600
"""How long a copy is kept that no question uses."""
BUSY_SECONDS = 3600
"""A copy that was used so lately may be in use."""

FEW = 10_000
"""A view of tables with so few rows is made once, as a table: planning it again takes longer."""

COUNTS = "image_label_counts"
RANKED = "ranked_votes"
WRITERS = {
    "cells": (Stage.SEGMENT, Stage.INGEST),
    "features": (Stage.MEASURE,),
    PREDICTIONS: (Stage.PREDICT,),
    COUNTS: (Stage.PREDICT,),
    RANKED: (Stage.PREDICT,),
    "image_quality": (Stage.QC,),
    "cell_flags": (Stage.QC,),
}
"""The big tables, and three views kept in the same way; the stages whose runs write them."""

KEPT_COLUMNS: dict[str, Columns] = {
    PREDICTIONS: PREDICTION_COLUMNS,
    COUNTS: {
        "run_id": "BIGINT",
        "image_id": "BIGINT",
        "label_id": "BIGINT",
        "cells": "BIGINT",
        "named": "BIGINT",
        "probability": "DOUBLE",
    },
    RANKED: {
        "run_id": "BIGINT",
        "level": "VARCHAR",
        "vote": "VARCHAR",
        "unit_id": "BIGINT",
        "subset": "VARCHAR",
        "winner_id": "BIGINT",
        "votes": "DOUBLE",
        "runner_up_id": "BIGINT",
        "runner_up_votes": "DOUBLE",
        "n_cells": "BIGINT",
    },
}
"""The columns of the views of which copies are kept."""

PROFILE_COLUMNS: Columns = dict.fromkeys(("run_id", "well_id", "n_cells", "n_images"), "BIGINT")
"""The columns that the profiles of every run have, before their features."""
_PROFILED = (
    "run_artifacts",
    """JOIN runs AS r ON r.id = t.run_id JOIN artifacts AS a ON a.id = t.artifact_id
    WHERE r.stage = 'profile' AND r.status = 'done' AND a.kind = 'profiles'
""",
)

_VOTE_VIEWS = {
    COUNTS: (COUNTS,),
    RANKED: ("label_counts", "label_medians", "label_votes", RANKED),
}
"""The views between the copy that a kept view is made from and itself."""
MOST_RECOUNTED = 10_000
"""Images with later exclusions: of more than so many the votes of all images are counted anew."""
RANKED_COPIED = "level = 'image' AND vote <> 'median'"
"""Which of the ranked votes are kept: those that most people ask for."""

_FOLD_IMAGES = """
    SELECT p.id AS run_id, m.image_id FROM runs AS p
    LEFT JOIN runs AS t ON t.id = p.parent_id
    JOIN split_members AS m ON m.split_id = coalesce(p.split_id, t.split_id)
    WHERE m.subset = 'test' AND list_contains(?, p.id)
"""
_ELIGIBLE = """
    CREATE VIEW eligible_predictions AS
    SELECT run_id, image_id, cell_id, rank, label_id, probability
    FROM predictions_with_image WHERE NOT excluded
"""
"""The copies of votes know of no later exclusion; the images that one is about are counted anew."""
_NOTHING_OF_WELLS = """
    CREATE TABLE run_images (run_id BIGINT, image_id BIGINT, well_id BIGINT, subset VARCHAR);
    CREATE TABLE eligible_predictions (
        run_id BIGINT, image_id BIGINT, label_id BIGINT, probability DOUBLE
    );
"""
"""What the votes that are not kept would be made from."""


@dataclass
class Answer:
    """What a question is answered with: read it once, as rows, arrays or Arrow.

    Nothing is asked before that. The limit is on the time that DuckDB takes, not on what is done
    between two pieces. Only ``schema``, ``batches`` and ``table`` need Arrow, whose import takes
    longer than a small question.
    """

    _connection: duckdb.DuckDBPyConnection
    _limits: Limits
    _statement: str
    _parameters: Parameters | None
    _seconds_used: float = 0.0
    _executed: duckdb.DuckDBPyConnection | None = None
    _opened: pa.RecordBatchReader | None = None

    # No cached_property: in Python 3.11 one that is slow keeps those of all other threads waiting.
    @property
    def _result(self) -> duckdb.DuckDBPyConnection:
        if self._executed is None:
            self._executed = self._limited(
                lambda: self._connection.execute(self._statement, self._parameters)
            )
        return self._executed

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [str(column[0]) for column in self._result.description or ()]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows."""
        result = self._result
        more = True
        while more:
            some = self._limited(lambda: result.fetchmany(ROWS_AT_ONCE))
            yield from some
            more = len(some) == ROWS_AT_ONCE

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of a small answer, each with the names of its columns."""
        return [dict(zip(self.names, row, strict=True)) for row in self.rows()]

    def arrays(self) -> dict[str, Any]:
        """Return the columns, each (N,); one with nulls is a masked array."""
        return dict(self._limited(self._result.fetchnumpy))

    @property
    def _reader(self) -> pa.RecordBatchReader:
        def begin() -> pa.RecordBatchReader:
            relation = self._connection.sql(self._statement, params=self._parameters)
            return relation.to_arrow_reader(65_536)

        if self._opened is None:
            self._opened = self._limited(begin)
        return self._opened

    @property
    def schema(self) -> pa.Schema:
        """The columns as Arrow has them."""
        return self._reader.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows as batches of Arrow."""
        reader = self._reader
        while (batch := self._limited(lambda: next(reader, None))) is not None:
            yield batch

    def table(self) -> pa.Table:
        """Return the whole answer as an Arrow table.

        Raises:
            QueryError: it is larger than the limits allow.
        """
        import pyarrow as pa

        size, batches = 0, []
        for batch in self.batches():
            size += batch.nbytes
            if size > self._limits.answer_mb << 20:
                raise QueryError(
                    f"The answer is larger than {self._limits.answer_mb} MB. "
                    "Ask for fewer rows or columns, for example with LIMIT."
                )
            batches.append(batch)
        return pa.Table.from_batches(batches, schema=self.schema)

    def _limited(self, work: Callable[[], T]) -> T:
        began, allowed = time.monotonic(), self._limits.seconds
        left = max(0.0, allowed - self._seconds_used)
        try:
            return run_limited(self._connection, left, work, allowed=allowed)
        finally:
            self._seconds_used += time.monotonic() - began


@contextmanager
def open_questions(
    workspace: Workspace,
    limits: Limits | None = None,
    *,
    vote_options: VoteOptions | None = None,
    runs: Collection[int] | None = None,
    only_image_votes: bool = False,
) -> Iterator[Questions]:
    """Open a store for questions.

    ``vote_options``: how cells vote in the views; by default every cell that is not excluded does.
    ``runs``: the predict runs that are asked about; what others said is not read, as if they had
    said nothing. In a mapping several of them have one number (``NamedRun.read_as``): they are the
    folds of a cross-validation, and read as one run of that number, of each only what it said of
    the test images of its fold. ``only_image_votes``: of the votes only the hard and soft ones of
    images are asked for, whose winners are kept; the others are left out.
    """
    limits, artifacts = limits or Limits(), workspace.artifacts
    make = workspace.settings.make_cache
    copies, spill = (make(name).resolve() for name in ("snapshots", "spill"))
    sweep(spill)
    roots = [artifacts.root]
    if isinstance(artifacts, BorrowingFolder):
        roots.append(artifacts.lender.root)
    kinds = (ArtifactKind.FEATURES, ArtifactKind.PROFILES)
    readable = [copies, *(root.resolve() / kind.value for root in roots for kind in kinds)]
    with ExitStack() as stack:
        yield Questions(
            workspace,
            limits,
            vote_options or VoteOptions(),
            runs,
            only_image_votes,
            stack.enter_context(closing(Source(workspace.database))),
            stack.enter_context(locked_connection(limits, spill, readable)),
            copies,
            spill,
            stack,
        )


@dataclass
class Questions:
    """A store as it is at one moment. Made by :func:`open_questions`, which explains the fields.

    Two databases in memory, which hold what questions have named so far: ``empty`` without rows, to
    check a question before anything is read, and without a way to any file; ``full`` with rows.
    A thread of its own needs :meth:`another`.
    """

    workspace: Workspace
    limits: Limits
    vote_options: VoteOptions
    runs: Collection[int] | None
    only_image_votes: bool
    _source: Source
    _full: duckdb.DuckDBPyConnection
    _copies: Path
    _spill: Path
    _stack: ExitStack
    _declared: set[str] = field(default_factory=set)
    _loaded: set[str] = field(default_factory=set)
    _few: set[str] = field(default_factory=set)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while tables are made: they are there for all threads."""
    _is_shared: bool = False

    @property
    def seconds_loading(self) -> float:
        """How long it has taken to make the tables and views that are there."""
        return sum(self._seconds.values())

    def another(self) -> Questions:
        """Return the same questions for another thread: what one has loaded, all have.

        Close it with :meth:`close`, before these are closed.
        """
        made = copy(self)
        made._is_shared = True
        made._full, made._empty = self._full.cursor(), self._empty.cursor()
        return made

    def close(self) -> None:
        """Close what :meth:`another` has returned."""
        self._full.close()
        self._empty.close()

    @cached_property
    def _empty(self) -> duckdb.DuckDBPyConnection:
        # Opened when it is needed: that takes as long as a small question.
        return self._stack.enter_context(locked_connection(self.limits, self._spill))

    @cached_property
    def _folds(self) -> dict[int, int]:
        """The predict runs that are folds, each with the number under which it is read."""
        runs = self.runs if isinstance(self.runs, Mapping) else {}
        counts = Counter(runs.values())
        folds = {run: number for run, number in runs.items() if counts[number] > 1}
        if folds:
            self.keep("fold_images", _FOLD_IMAGES, [list(folds)])
        return folds

    def _of_folds(self, query: str, image: str = "image_id") -> str:
        """Return a query of rows of runs, so that those of folds have one number; see there."""
        if not self._folds:
            return query
        cases = " ".join(f"WHEN {run} THEN {number}" for run, number in self._folds.items())
        return f"""SELECT q.* REPLACE (CASE q.run_id {cases} ELSE q.run_id END AS run_id)
            FROM ({query}) AS q LEFT JOIN fold_images AS f
            ON f.run_id = q.run_id AND f.image_id = q.{image}
            WHERE f.run_id IS NOT NULL OR q.run_id NOT IN ({", ".join(map(str, self._folds))})
        """  # noqa: S608 - numbers and our own words

    @cached_property
    def _sets(self) -> dict[str, SetRelation]:
        """The feature sets by name; one that has the name of a table, which none should, is not."""
        taken = {*self._source.columns, *VIEWS}
        return {
            item.name.lower(): item
            for item in list_sets(self._source, self._full)
            if item.name.lower() not in taken
        }

    @cached_property
    def _profiles(self) -> list[tuple[int, str]]:
        """The profile runs that are done, each with the path of its file."""
        rows = self._source.fetch(self._full, "artifacts", "WHERE t.kind = 'profiles'")
        paths = {row["id"]: row["path"] for row in rows}
        links = self._source.fetch(self._full, *_PROFILED)
        return sorted((row["run_id"], paths[row["artifact_id"]]) for row in links)

    @property
    def names(self) -> list[str]:
        """All that can stand behind FROM: tables, views and feature sets."""
        return [*self._source.columns, *VIEWS, *(item.name for item in self._sets.values())]

    def ask(self, sql: str, parameters: Parameters | None = None) -> Answer:
        """Answer one reading statement of a user; ``parameters`` fill its ``?`` or ``$name``.

        Read the answer before the next question is asked.
        """
        statement = only_reading(self._empty, sql)
        self._check(statement, parameters)
        read = statement.tables
        if statement.lists_tables:  # information_schema, which only the empty database has in full
            read = read & set(map(str.lower, self.names))
            if read and read != statement.tables:
                raise QueryError(
                    "Ask two questions: one for the list of tables, one for what they hold."
                )
        if not read or _DESCRIBES.match(statement.text):
            return Answer(self._empty, self.limits, statement.text, parameters)
        self._load(read)
        return Answer(self._full, self.limits, statement.text, parameters)

    def read(self, sql: str) -> tuple[Statement, dict[str, str]]:
        """Check a question and return it, to be a part of another, and its columns with types.

        It is not answered. Raises as :meth:`ask` does.
        """
        statement = only_reading(self._empty, sql)
        statement.text = _END.sub("", statement.text)
        question = f"DESCRIBE SELECT * FROM (\n{statement.text}\n)"  # noqa: S608 - as checked
        rows = self.ask(question).records()
        return statement, {str(row["column_name"]): str(row["column_type"]) for row in rows}

    def behind(self, names: set[str]) -> set[str]:
        """Return relations with all that the views among them read."""
        found, waiting = set[str](), list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += sources_of(view(name)) if name in VIEWS else ()
        return found

    def interrupt(self) -> None:
        """Stop the question that is being answered, if there is one; for another thread."""
        self._full.interrupt()
        if "_empty" in self.__dict__:
            self._empty.interrupt()

    def ask_ours(self, sql: str, parameters: Parameters | None = None) -> Answer:
        """Answer a question that is part of cellstore: known to read, and right."""
        self._load(sources_of(sql))
        return Answer(self._full, self.limits, sql, parameters)

    def keep(self, name: str, sql: str, parameters: Parameters | None = None) -> None:
        """Keep the answer of such a question as a table, for several questions about it."""
        self._load(sources_of(sql))
        self._full.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(name)} AS {sql}", parameters)
        self._loaded.add(name)

    def bring(self, name: str, rows: pa.RecordBatchReader | pa.Table) -> None:
        """Keep rows from elsewhere as a table, for such questions about them."""
        self._full.register("brought", rows)
        self._full.execute(f"CREATE OR REPLACE TEMP TABLE {quoted(name)} AS FROM brought")
        self._full.unregister("brought")
        self._loaded.add(name)

    def reading(self, name: str, first: int, last: int, columns: Sequence[str] = ()) -> str:
        """Return the SQL that reads ``cell_id`` and ``columns`` of a feature set.

        Only of cells from one id to another: files without such cells are not opened.
        """
        found = self._sets[name.lower()]
        if found.in_table:
            self._load({"features"})
        kinds = {column: found.columns[column] for column in ("cell_id", *columns)}
        found = replace(found, columns=kinds)
        between = (int(first), int(last))
        rows = found.query(self._source, self.workspace.artifacts, self._full, between)
        return f"SELECT * FROM ({rows}) WHERE cell_id BETWEEN {between[0]} AND {between[1]}"  # noqa: S608

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Return name and type of the columns of a table, a view or a feature set."""
        if name not in self.names:
            raise UnknownNameError.of("table", name, self.names)
        self._declare({name.lower()})
        rows = self._empty.execute(f"DESCRIBE {quoted(name)}").fetchall()
        return [(str(row[0]), str(row[1])) for row in rows]

    def _check(self, statement: Statement, parameters: Parameters | None) -> None:
        """Let DuckDB plan the question on the tables without rows, where no file is in reach."""
        named = statement.tables | statement.shown
        known = {*self._source.columns, *VIEWS}
        if statement.lists_tables or not named <= known:
            known = set(map(str.lower, self.names))
        if settings := sorted(statement.shown - known):
            raise not_readable(settings[0])
        # All of them where a name is unknown, for DuckDB's hint at similar ones.
        every = statement.lists_tables or not statement.tables <= known
        if PROFILES in named:  # else a column of a file that is gone would be called unknown
            self._query_of(PROFILES)
        self._declare(known if every else named)
        text = statement.text if statement.explains else f"EXPLAIN {statement.text}"
        empty = self._empty
        run_limited(empty, self.limits.seconds, lambda: empty.execute(text, parameters))

    def _query_of(self, name: str, *, files: bool = True) -> str | None:
        """Return the query of a view or a feature set; ``None``: there is neither of that name.

        ``files``: whether it may read the files of profiles.
        """
        if name == PROFILES:
            parts = [f"({no_rows(PROFILE_COLUMNS)})"]
            for run, path in self._profiles:
                with nullcontext() if files else suppress(StorageError):
                    rows = reading_files([self.workspace.artifacts.existing(path)])
                    parts.append(
                        f"SELECT CAST({run} AS BIGINT) AS run_id, "  # noqa: S608
                        f"COLUMNS(lambda c: lower(c) <> 'run_id') FROM {rows}"
                    )
            values = " UNION ALL BY NAME ".join(parts)
            if not files:
                found = self._full.execute(f"DESCRIBE {values}").fetchall()
                values = no_rows({column: kind for column, kind, *_ in found})
            return view(name).replace("{values}", f"({values})")
        if name in VIEWS:
            return view(name, self.vote_options)
        if name == "predictions":
            columns = ", ".join(self._source.columns[name])
            return f"SELECT {columns} FROM {PREDICTIONS} WHERE cell_id IS NOT NULL"  # noqa: S608
        if name in self._source.columns or name not in self._sets:
            return None
        return self._sets[name].query(self._source, self.workspace.artifacts, self._full)

    def _declare(self, names: set[str]) -> None:
        """Make tables and views without rows, after those that they read.

        Views are tables here, also in information_schema: as views they would be planned again and
        again. ``cellstore schema`` says which is which.
        """
        if names <= self._declared:
            return
        with self._lock:
            for name in sorted(names):
                if name in self._declared:  # perhaps by one before it
                    continue
                columns = self._source.columns.get(name) or KEPT_COLUMNS.get(name)
                if columns is None and name not in VIEWS and name in self._sets:
                    columns = self._sets[name].columns
                query = None if columns is not None else self._query_of(name, files=False)
                if query is not None:
                    self._declare(sources_of(query))
                elif columns is not None:
                    query = no_rows(columns)
                if query is not None:
                    self._empty.execute(f"CREATE TABLE {quoted(name)} AS {query} WITH NO DATA")
                self._declared.add(name)

    def _load(self, names: set[str]) -> None:
        """Make tables and views with their rows."""
        for name in sorted(names - self._loaded):
            copied = name in WRITERS
            if copied and name in _VOTE_VIEWS:  # their copies know of no later exclusion
                copied = len(self._images_with_later_exclusions()) <= MOST_RECOUNTED
            if copied:
                self._load_copies(name)
                continue
            is_table = name in self._source.columns and name != "predictions"
            query = None if is_table or name in (LATER, EXCLUDED) else self._query_of(name)
            if query is not None:
                self._load(sources_of(query))
            with self._lock:
                if name in self._loaded:  # by another thread
                    continue
                began, made = time.monotonic(), []
                create = f'CREATE TABLE "{name}" AS FROM {{rows}}'
                flagged = self.vote_options.exclude_flagged
                flags = "" if flagged is None else f" OR t.run_id = {int(flagged)}"
                if name == LATER:
                    # From the database, for the sake of time: of all exclusions few are made later.
                    own = f"WHERE t.source = 'annotation'{flags}"
                    made = self._source.feed_table(self._full, create, "exclusions", own)
                elif name == EXCLUDED:  # from the database, too: it need not read the others
                    made = self._source.feed_excluded(self._full, create, flags)
                elif query is not None:
                    # Of profiles, with their many columns, a question reads a few.
                    once = sources_of(query) <= self._few and name != PROFILES
                    if name == "run_images" and self.runs is not None:
                        # Other views name it many times; made once, it is read as often for
                        # nothing.
                        numbers = ", ".join(str(int(run)) for run in self.runs)
                        once = True
                        query = self._of_folds(f"FROM ({query}) WHERE run_id IN ({numbers or -1})")
                    self._make(name, query, once=once)
                elif is_table:
                    made = self._source.feed_table(self._full, create, name)
                if made and made[0][0] <= FEW:
                    self._few.add(name)
                self._loaded.add(name)
                self._seconds[name] += time.monotonic() - began

    def _images_with_later_exclusions(self) -> list[int]:
        """The images that do not count, or have cells that do not, since somebody said so."""
        self._load({LATER})
        levels = self._full.execute(f"SELECT DISTINCT level FROM {LATER}").fetchall()  # noqa: S608
        parts = []
        if set(levels) - {("cell",)}:
            parts.append("SELECT image_id FROM excluded_images")
        if ("cell",) in levels:
            parts.append(f"""SELECT s.image_id FROM {LATER} AS e JOIN cells AS c ON c.id = e.id
                JOIN segmentations AS s ON s.id = c.segmentation_id WHERE e.level = 'cell'
            """)  # noqa: S608 - our own words
        if not parts:
            return []
        query = " UNION ".join(parts)
        self._load(sources_of(query))
        return [row[0] for row in self._full.execute(query).fetchall()]

    def _make(self, name: str, query: str, *, once: bool) -> None:
        """Make a view, or a table of its rows, for which the query is carried out ``once``."""
        kind = "TABLE" if once else "VIEW"
        rows = self._full.execute(f"CREATE {kind} {quoted(name)} AS {query}").fetchall()
        if once and rows[0][0] <= FEW:
            self._few.add(name)

    def _load_copies(self, name: str) -> None:
        """Make one of ``WRITERS``: copies of what ended runs wrote, and the rest as it is now."""
        self._load({"runs"})
        query = """
            SELECT id, concat_ws(' ', started_at, ended_at, changed_rows, sum(changed_rows)
                FILTER (WHERE list_contains(?, stage)) OVER ()), ended_at IS NOT NULL
            FROM runs QUALIFY list_contains(?, stage) ORDER BY id
        """
        stages = [[stage.value for stage in WRITERS[some]] for some in ("cells", name)]
        runs = self._full.execute(query, stages).fetchall()
        if Stage.PREDICT in WRITERS[name] and self.runs is not None:
            runs = [row for row in runs if row[0] in self.runs]
        extents = {row[0]: "" for row in runs}
        if name == "cells":  # an ingest may add cells to those of another
            self._load({"segmentations"})
            found = self._full.execute("""
                SELECT run_id, count(*) || ' images, ' || sum(n_cells) || ' cells'
                FROM segmentations GROUP BY run_id
            """)
            extents = dict(found.fetchall())
        columns = KEPT_COLUMNS.get(name) or self._source.columns[name]
        names = ", ".join(map(quoted, columns))
        parts = []
        few = True
        ended = [run for run, _, ended in runs if ended and run in extents]
        paths = [
            self._copy(name, run, f"{times} {extents[run]}")
            for run, times, _ in runs
            if run in ended
        ]
        recounted = None
        if paths:
            files = reading_files(paths)
            piece = f"SELECT {names} FROM {files}"  # noqa: S608
            image = "unit_id" if name == RANKED else "image_id"
            if name in _VOTE_VIEWS and (images := self._images_with_later_exclusions()):
                listed = ", ".join(map(str, images))
                piece += f" WHERE {image} NOT IN ({listed})"
                query = view(name)
                self._load(sources_of(query))
                numbers = ", ".join(str(self._folds.get(run, run)) for run in ended)
                recounted = f"""SELECT {names} FROM ({query})
                    WHERE {image} IN ({listed}) AND run_id IN ({numbers})
                """  # noqa: S608 - numbers and our own words
                recounted += f" AND {RANKED_COPIED}" if name == RANKED else ""
            if Stage.PREDICT in WRITERS[name]:
                piece = self._of_folds(piece, image)
            parts.append(piece)
            counted = self._full.execute(f"SELECT count(*) FROM {files}")  # noqa: S608
            few = counted.fetchall()[0][0] <= FEW
        others = [run for run, _, ended in runs if not ended]
        if name in _VOTE_VIEWS:
            live = f"run_id IN ({', '.join(map(str, others))})" if others else "false"
            if name == RANKED and not self.only_image_votes:
                live += f" OR NOT ({RANKED_COPIED})"
            if live != "false":
                query = view(name)
                self._load(sources_of(query))
                few = few and sources_of(query) <= self._few
                parts.append(f"SELECT {names} FROM ({query}) WHERE {live}")  # noqa: S608
        with self._lock:
            if name in self._loaded:  # by another thread
                return
            began = time.monotonic()
            if recounted:
                again = quoted(f"recounted {name}")
                self._full.execute(f"CREATE TABLE {again} AS {recounted}")
                parts.append(f"FROM {again}")
            if others and name not in _VOTE_VIEWS:
                live = quoted(f"live {name}")
                create = f"CREATE TABLE {live} AS SELECT {names} FROM {{rows}}"  # noqa: S608
                made = self._source.feed_runs(self._full, create, name, others)
                few = few and made[0][0] <= FEW
                parts.append(f"FROM {live}")
            self._make(name, " UNION ALL ".join(parts) or no_rows(columns), once=few)
            self._loaded.add(name)
            self._seconds[name] += time.monotonic() - began

    def _copy(self, name: str, run: int, mark: str) -> Path:
        """Return the copy of what an ended run wrote into one of ``WRITERS``; make it if needed.

        ``mark`` tells the run from any other, also after a store was made anew, says how much it
        wrote, where later runs may add to it, and how many of its rows and of those of cells were
        changed since. The copy is made in a database and a folder of its
        own: no user asks there.
        """
        made_from = str(KEPT_COLUMNS.get(name) or self._source.columns[name])
        if name in _VOTE_VIEWS:
            made_from += _ELIGIBLE + view(COUNTS)
        if name == RANKED:  # the alphabet decides ties, so that other labels make another copy
            self._load({"labels"})
            labels = self._full.execute("SELECT id, field, value FROM labels ORDER BY id")
            made_from += f"{[view(item) for item in _VOTE_VIEWS[name]]} {labels.fetchall()}"
        digest = hashlib.sha256(f"{FORMAT} {mark} {made_from}".encode()).hexdigest()
        stem = f"{name}-run{run}-{digest[:16]}"
        try:
            with writing(self._copies), _copying[stem]:  # of all threads one makes it
                self._copies.mkdir(parents=True, exist_ok=True)
                for path in self._copies.glob(f"{glob.escape(stem)}-*.parquet"):
                    if path.name == _checked_name(stem, path):
                        with suppress(OSError):  # the file of another user
                            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
                        return path
                    path.unlink(missing_ok=True)  # it is not as it was written
                with (
                    tempfile.TemporaryDirectory(
                        prefix=part_prefix(), dir=self._spill, ignore_cleanup_errors=True
                    ) as folder,
                    # Other threads may want to use ours meanwhile.
                    closing(Source(self.workspace.database))
                    if self._is_shared
                    else nullcontext(self._source) as source,
                    closing(duckdb.connect(":memory:")) as own,
                ):
                    part = Path(folder, "part.parquet")
                    into = (
                        f"COPY {{rows}} TO {literal(str(part))} (FORMAT parquet, COMPRESSION lz4)"
                    )
                    own.execute(f"SET memory_limit = '{MAKING_MB}MB'")
                    own.execute(f"SET temp_directory = {literal(folder)}")
                    own.execute("SET preserve_insertion_order = false")
                    own.execute("SET TimeZone = 'UTC'")
                    if name == PREDICTIONS:
                        own.execute("SET threads = 1")  # each would have a group of rows in hand
                    if name not in _VOTE_VIEWS:
                        source.feed_runs(own, into, name, [run], have_ended=True)
                    else:
                        base = PREDICTIONS if name == COUNTS else COUNTS
                        rows = reading_files([self._copy(base, run, mark)])
                        own.execute(f"CREATE VIEW {base} AS FROM {rows}")
                        if name == COUNTS:
                            own.execute(_ELIGIBLE)
                        else:
                            source.feed_table(own, "CREATE TABLE labels AS FROM {rows}", "labels")
                            own.execute(_NOTHING_OF_WELLS)
                        for item in _VOTE_VIEWS[name]:
                            own.execute(f"CREATE VIEW {item} AS {view(item)}")
                        kept = RANKED_COPIED if name == RANKED else "true"
                        rows = f"(SELECT * FROM {name} WHERE {kept})"  # noqa: S608 - our own words
                        own.execute(into.replace("{rows}", rows))
                    with part.open("rb") as file:
                        os.fsync(file.fileno())
                    made = part.replace(self._copies / _checked_name(stem, part))
                    _make_room(self._copies, KEPT_BYTES)
                    return made
        except duckdb.IOException as error:
            raise StorageError(
                f"The cache {self._copies} cannot be written: {str(error).splitlines()[0]}. Free "
                "some space or correct the permissions, then ask again."
            ) from error


_copying: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""For each copy a lock."""
_checksums: dict[tuple[Path, int, int, int], int] = {}
"""Of copies that this process has read: by path, inode, size and time of the last change."""

_running = cache(duckdb.connect)
"""A DuckDB that goes on: to start one for a few rows would take longer than the answer."""

_COUNTS_OF_IMAGE = """
    WITH label_votes AS (
        SELECT 'image' AS level, NULL AS unit_id, NULL AS subset, unnest(['hard', 'soft']) AS vote,
            unnest([CAST(cells AS DOUBLE), probability]) AS votes, *
        FROM (
            SELECT unnest($run_id) AS run_id, unnest($label_id) AS label_id,
                unnest($cells) AS cells, unnest($probability) AS probability,
                unnest($position) AS position
        )
    )
"""
"""What ``label_votes`` says, of what the database has counted for one image."""


def rank_counts(counts: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Rank the labels of one image as ``ranked_votes`` does; return its rows by run and vote.

    ``counts``: what the database has counted, of each label of each run the ``run_id``,
    ``label_id``, ``label``, ``cells`` that chose it and summed ``probability``.
    """
    keys = ("run_id", "label_id", "cells", "probability")
    columns = {key: [row[key] for row in counts] for key in keys}
    alphabet = sorted({(row["label"], row["label_id"]) for row in counts})
    places = {label_id: place for place, (_, label_id) in enumerate(alphabet)}
    columns["position"] = [places[label_id] for label_id in columns["label_id"]]
    with _running(":memory:").cursor() as connection:
        connection.execute("PRAGMA disable_optimizer")  # to look for the best plan takes longer
        found = connection.execute(_COUNTS_OF_IMAGE + view(RANKED), columns)
        names = [column[0] for column in found.description]
        rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return {(row["run_id"], row["vote"]): row for row in rows}


def sources_of(sql: str) -> set[str]:
    """Return what stands behind FROM and JOIN in SQL of ours, but for what it names in WITH."""
    plain = _COMMENT.sub("", sql).lower()
    return set(_SOURCE.findall(plain)) - set(_IN_WITH.findall(plain))


def _make_room(copies: Path, most: int) -> None:
    """Remove the copies that were not used for long, and of the others the oldest, down to a size.

    What was used a short while ago stays: another question may be about to read it.
    """
    found = []
    with suppress(OSError), os.scandir(copies) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_atime, entry.stat().st_size, Path(entry.path)))
    now, total = time.time(), sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        unused = now - used
        if unused > KEPT_SECONDS or (total > most and unused > BUSY_SECONDS):
            with suppress(OSError):
                path.unlink()
            total -= size


def _checked_name(stem: str, path: Path) -> str:
    """Return the name of a copy: with the checksum of its bytes; nothing if it is gone."""
    try:
        found = path.stat()
        key = path, found.st_ino, found.st_size, found.st_mtime_ns
        if (checksum := _checksums.get(key)) is None:
            checksum = 0
            with path.open("rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    checksum = zlib.crc32(block, checksum)
            _checksums[key] = checksum
    except FileNotFoundError:  # another process has just removed it
        return ""
    return f"{stem}-{checksum:08x}.parquet"
