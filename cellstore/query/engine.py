"""Any question about a store, answered by DuckDB.

Small tables are read live from the database; the rows that ended runs wrote into the big ones
come from copies in Parquet files, made once per run; a feature set is a relation under its own
name. All that one ``Questions`` answers belongs to one moment of the database, and a table, a view
or a feature set is made when the first question names it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from ..artifacts import BorrowingFolder
from ..config import VoteOptions
from ..enums import ArtifactKind, Stage, Status
from ..errors import QueryError, StorageError, UnknownNameError
from ..jobs.workspace import Workspace
from ..models import EXCLUSIONS
from .feature_sets import SetRelation, list_sets
from .guard import (
    Limits,
    Parameters,
    Statement,
    literal,
    locked_connection,
    not_readable,
    only_reading,
    parsed,
    quoted,
    reading_files,
    run_limited,
)
from .relations import COUNTS, KEPT, LATER, PREDICTIONS, RANKED, VIEWS, view, view_query
from .source import COLUMNS, PREDICTION_COLUMNS, TABLES, Columns, Source, feed_predictions

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

ROWS_AT_ONCE = 4_096
ROWS_OF_BATCH = 65_536

_DESCRIBES = re.compile(r"\s*(describe|desc|show)\b", re.IGNORECASE)


_OF_IMAGE = {
    "images": "WHERE t.well_id = (SELECT well_id FROM images WHERE id = {image})",
    "split_members": (
        "WHERE t.image_id IN (SELECT id FROM images WHERE well_id ="
        " (SELECT well_id FROM images WHERE id = {image}))"
    ),
    "segmentations": "WHERE t.image_id = {image}",
    "cells": "JOIN segmentations AS s ON s.id = t.segmentation_id WHERE s.image_id = {image}",
}
"""What is read of these tables where one image is asked about: of the well what votes depend on."""

# Copies

FORMAT = 4
"""Raised when the copies change, so that older ones are not read."""
BYTES_AT_ONCE = 1 << 20
ROWS_OF_GROUP = 122_880
MAKING_MB = 500
"""The memory in which a copy is made; what does not fit goes to the disk."""

WRITERS = {
    "cells": (Stage.SEGMENT, Stage.INGEST),
    "features": (Stage.MEASURE,),
    "predictions": (Stage.PREDICT,),
    PREDICTIONS: (Stage.PREDICT,),
    COUNTS: (Stage.PREDICT,),
    RANKED: (Stage.PREDICT,),
    "image_quality": (Stage.QC,),
    "cell_flags": (Stage.QC,),
}
"""The big tables, and three views kept in the same way; the stages whose runs write them."""

RANKED_COPIED = "level = 'image' AND vote <> 'median'"
"""Which of the ranked votes are kept: those that most people ask for."""

_CHAINS = {
    COUNTS: (COUNTS,),
    RANKED: ("label_counts", "label_medians", "label_votes", RANKED),
}
"""The views between the copy that a kept view is made from and itself."""

_NOTHING_OF_WELLS = """
    CREATE TABLE run_images (run_id BIGINT, image_id BIGINT, well_id BIGINT, subset VARCHAR);
    CREATE TABLE eligible_predictions (
        run_id BIGINT, image_id BIGINT, label_id BIGINT, probability DOUBLE
    );
"""
"""What the votes that are not kept would be made from."""

_ELIGIBLE = """
    CREATE VIEW eligible_predictions AS
    SELECT run_id, image_id, cell_id, rank, label_id, probability
    FROM predictions_with_image WHERE NOT excluded
"""
"""The copies of votes are for stores without later exclusions; else votes are counted anew."""


@dataclass(frozen=True)
class RunMark:
    """What tells one ended run from any other, also after a store was made anew.

    ``extent``: how much there is of what it wrote, where later runs may add to it.
    """

    id: int
    started_at: str
    ended_at: str
    extent: str = ""


class Answer:
    """What a question is answered with: read it once, as rows, arrays or Arrow.

    Nothing is asked before that. The limit is on the time that DuckDB takes, not on what is done
    between two pieces. Only ``schema``, ``batches`` and ``table`` need Arrow, whose import takes
    longer than a small question.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        limits: Limits,
        statement: str,
        parameters: Parameters | None,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._left = limits.seconds
        self._statement = statement
        self._parameters = parameters

    @cached_property
    def _result(self) -> duckdb.DuckDBPyConnection:
        return self._limited(lambda: self._connection.execute(self._statement, self._parameters))

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [str(column[0]) for column in self._result.description or ()]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows."""
        result = self._result
        while some := self._limited(lambda: result.fetchmany(ROWS_AT_ONCE)):
            yield from some

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of a small answer, each with the names of its columns."""
        return [dict(zip(self.names, row, strict=True)) for row in self.rows()]

    def arrays(self) -> dict[str, Any]:
        """Return the columns, each (N,); one with nulls is a masked array."""
        return dict(self._limited(self._result.fetchnumpy))

    @cached_property
    def _reader(self) -> pa.RecordBatchReader:
        def begin() -> pa.RecordBatchReader:
            relation = self._connection.sql(self._statement, params=self._parameters)
            return relation.to_arrow_reader(ROWS_OF_BATCH)

        return self._limited(begin)

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
        began = time.monotonic()
        try:
            return run_limited(self._connection, self._left, work, allowed=self._limits.seconds)
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - began))


@contextmanager
def open_questions(
    workspace: Workspace,
    limits: Limits | None = None,
    *,
    vote_options: VoteOptions | None = None,
    runs: Collection[int] | None = None,
    only_image_votes: bool = False,
    image: int | None = None,
) -> Iterator[Questions]:
    """Open a store for questions.

    ``vote_options``: how cells vote in the views; by default every cell that is not excluded does.
    ``runs``: the predict runs that are asked about; what others said is not read, as if they had
    said nothing. ``only_image_votes``: of the votes only the hard and soft ones of images are asked
    for, whose winners are kept; the others are left out. ``image``: the one image (by id) whose
    votes are asked for; then nothing is copied, and of images, cells and predictions only those of
    its well or itself are there.

    Raises:
        DatabaseError: the database cannot be reached.
        MissingExtraError: the store is on PostgreSQL and its ADBC driver is not installed.
        StorageError: the cache folder cannot be made.
    """
    folder = workspace.settings.cache
    try:
        for name in ("snapshots", "spill"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"The cache {folder} cannot be made: {error.strerror}. Mend the permissions."
        ) from error
    with ExitStack() as stack:
        source = stack.enter_context(closing(Source(workspace.database)))
        yield Questions(
            workspace,
            source,
            stack,
            limits or Limits(),
            vote_options or VoteOptions(),
            runs,
            only_image_votes=only_image_votes,
            image=image,
        )


class Questions:
    """A store as it is at one moment. Made by :func:`open_questions`.

    Two databases in memory, which hold what questions have named so far: ``empty`` without rows, to
    check a question before anything is read, and without a way to any file; ``full`` with rows.
    """

    def __init__(
        self,
        workspace: Workspace,
        source: Source,
        stack: ExitStack,
        limits: Limits,
        vote_options: VoteOptions,
        predict_runs: Collection[int] | None,
        *,
        only_image_votes: bool,
        image: int | None,
    ) -> None:
        self._source = source
        self._artifacts = workspace.artifacts
        self._stack = stack
        self._limits = limits
        self._vote_options = vote_options
        self._predict_runs = predict_runs
        self._only_image_votes = only_image_votes
        self._image = image
        self._copies = (workspace.settings.cache / "snapshots").resolve()
        self._spill = (workspace.settings.cache / "spill").resolve()
        self._declared: set[str] = set()
        self._loaded: set[str] = set()

    # Opened when they are needed: each takes as long as a small question.
    @cached_property
    def _empty(self) -> duckdb.DuckDBPyConnection:
        return self._stack.enter_context(locked_connection(self._limits, self._spill))

    @cached_property
    def _full(self) -> duckdb.DuckDBPyConnection:
        roots = [self._artifacts.root]
        if isinstance(self._artifacts, BorrowingFolder):
            roots.append(self._artifacts.lender.root)
        sets = [root.resolve() / ArtifactKind.FEATURES.value for root in roots]
        locked = locked_connection(self._limits, self._spill, [self._copies, *sets])
        return self._stack.enter_context(locked)

    @cached_property
    def _kept(self) -> set[str]:
        """The views whose copies can be used: those of votes know of no later exclusion."""
        if self._image is None:
            self._load({LATER})
            if not self._full.execute(f"FROM {LATER} LIMIT 1").fetchall():
                return set(KEPT)
        return {PREDICTIONS}

    @cached_property
    def _sets(self) -> dict[str, SetRelation]:
        """The feature sets by name; one that has the name of a table, which none should, is not."""
        taken = {*TABLES, *VIEWS}
        return {
            item.name.lower(): item
            for item in list_sets(self._source, self._full)
            if item.name.lower() not in taken
        }

    @property
    def names(self) -> list[str]:
        """All that can stand behind FROM: tables, views and feature sets."""
        return [*TABLES, *VIEWS, *(item.name for item in self._sets.values())]

    def ask(self, sql: str, parameters: Parameters | None = None) -> Answer:
        """Answer one reading statement of a user; ``parameters`` fill its ``?`` or ``$name``.

        Read the answer before the next question is asked.

        Raises:
            QueryError: the statement is wrong, would write, reads files, or takes too much; also
                while the answer is read.
            StorageError: the copies cannot be written.
        """
        statement = only_reading(self._empty, sql)
        self._check(statement, parameters)
        return self.ask_ours(statement, parameters)

    def ask_ours(self, sql: str | Statement, parameters: Parameters | None = None) -> Answer:
        """Answer a question that is part of cellstore: known to read, and right."""
        statement = parsed(self._full, sql) if isinstance(sql, str) else sql
        assert statement is not None
        if not statement.tables or _DESCRIBES.match(statement.text):
            return Answer(self._empty, self._limits, statement.text, parameters)
        self._load(statement.tables)
        return Answer(self._full, self._limits, statement.text, parameters)

    def keep(self, name: str, sql: str, parameters: Parameters | None = None) -> None:
        """Keep the answer of such a question as a table, for several questions about it."""
        statement = parsed(self._full, sql)
        assert statement is not None
        self._load(statement.tables)
        create = f"CREATE OR REPLACE TEMP TABLE {quoted(name)} AS {sql}"
        self._full.execute(create, parameters)
        self._loaded.add(name)

    def plan(self, sql: str, parameters: Parameters | None = None) -> str:
        """Return how a question would be answered: one step a line, what it reads below it.

        Raises as :meth:`ask` does.
        """
        statement = only_reading(self._empty, sql)
        answer = self.ask(f"EXPLAIN (FORMAT json) {statement.text}", parameters)
        steps = json.loads(answer.records()[-1]["explain_value"])
        return "\n".join(line for step in steps for line in _plan_lines(step, 0))

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Return name and type of the columns of a table, a view or a feature set.

        Raises:
            UnknownNameError: there is none of that name.
        """
        if name not in self.names:
            raise UnknownNameError.of("table", name, self.names)
        self._declare({name.lower()})
        rows = self._empty.execute(f"DESCRIBE {quoted(name)}").fetchall()
        return [(str(row[0]), str(row[1])) for row in rows]

    def _check(self, statement: Statement, parameters: Parameters | None) -> None:
        """Let DuckDB plan the question on the tables without rows, where no file is in reach."""
        named = statement.tables | statement.shown
        known = {*TABLES, *VIEWS}
        if statement.lists_tables or not named <= known:
            known = set(map(str.lower, self.names))
        if settings := sorted(statement.shown - known):
            raise not_readable(settings[0])
        # All of them where a name is unknown, for DuckDB's hint at similar ones.
        every = statement.lists_tables or not statement.tables <= known
        self._declare(known if every else named)
        text = statement.text if statement.explains else f"EXPLAIN {statement.text}"
        empty = self._empty
        run_limited(empty, self._limits.seconds, lambda: empty.execute(text, parameters))

    def _declare(self, names: set[str]) -> None:
        """Make tables and views without rows, after those that they read."""
        for name in sorted(names):
            if name in self._declared:
                continue
            columns = self._columns_of(name)
            if columns is not None:
                listed = ", ".join(f"{quoted(item)} {kind}" for item, kind in columns.items())
                self._empty.execute(f"CREATE TABLE {quoted(name)} ({listed})")
            elif name in VIEWS or name in self._sets:
                query, tables = self._query_of(name)
                self._declare(tables)
                self._empty.execute(f"CREATE VIEW {quoted(name)} AS {query}")
            self._declared.add(name)

    def _load(self, names: set[str]) -> None:
        """Make tables and views with their rows."""
        for name in sorted(names):
            if name in self._loaded:  # perhaps by one before it
                continue
            statement = f"CREATE TABLE {quoted(name)} AS FROM {{rows}}"
            if self._image is not None and name == PREDICTIONS:
                feed_predictions(self._source, self._full, statement, image=self._image)
            elif name in TABLES and (name not in WRITERS or self._image is not None):
                condition = ""
                if self._image is not None:
                    condition = _OF_IMAGE.get(name, "").format(image=int(self._image))
                self._source.feed_table(self._full, statement, name, condition)
            elif name == LATER:
                # From the database, for the sake of time: of all exclusions few are made later.
                own = "WHERE t.source = 'annotation'"
                self._source.feed_table(self._full, statement, EXCLUSIONS.name, own)
                if (run := self._vote_options.exclude_flagged) is not None:
                    own = f"WHERE t.source = 'quality' AND t.run_id = {int(run)}"
                    statement = f"INSERT INTO {name} FROM {{rows}}"
                    self._source.feed_table(self._full, statement, EXCLUSIONS.name, own)
            elif name in WRITERS and (name in TABLES or name in self._kept):
                self._load_big(name)
            elif name in VIEWS or name in self._sets:
                query, tables = self._query_of(name)
                self._load(tables)
                self._full.execute(f"CREATE VIEW {quoted(name)} AS {query}")
            self._loaded.add(name)

    def _columns_of(self, name: str) -> Columns | None:
        """Return the columns of what is a table where there are no rows."""
        if name in COLUMNS or name in KEPT:
            return COLUMNS.get(name) or KEPT[name]
        if name not in VIEWS and name in self._sets and not self._sets[name].in_table:
            return self._sets[name].columns
        return None

    def _query_of(self, name: str) -> tuple[str, set[str]]:
        """Return the query of a view or a feature set, and the tables and views that it reads."""
        if name in VIEWS:
            query = view_query(name, self._vote_options)
        else:
            query = self._sets[name].query(self._source, self._artifacts, self._full)
        found = parsed(self._full, query)
        assert found is not None
        return query, found.tables

    def _load_big(self, name: str) -> None:
        """Make one of the big tables, or of the views that are kept: copies and what is live."""
        ended, others = self._runs(name)
        columns = COLUMNS.get(name) or KEPT[name]
        names = ", ".join(map(quoted, columns))
        parts = []
        if paths := [self._copy(name, run) for run in ended]:
            parts.append(f"SELECT {names} FROM {reading_files(paths)}")  # noqa: S608
        if name in (COUNTS, RANKED):
            numbers = ", ".join(map(str, others))
            live = f"run_id IN ({numbers})" if others else "false"
            if name == RANKED and not self._only_image_votes:
                live += f" OR NOT ({RANKED_COPIED})"
            if live != "false":
                query, tables = self._query_of(name)
                self._load(tables)
                parts.append(f"SELECT {names} FROM ({query}) WHERE {live}")  # noqa: S608
        elif others:
            live = quoted(f"live {name}")
            statement = f"CREATE TABLE {live} AS SELECT {names} FROM {{rows}}"  # noqa: S608
            if name in (PREDICTIONS, "predictions"):
                feed_predictions(self._source, self._full, statement, runs=others)
            else:
                self._source.feed_table(self._full, statement, name, rows_of_runs(name, others))
            parts.append(f"FROM {live}")
        if not parts:
            nulls = (f"CAST(NULL AS {kind}) AS {quoted(item)}" for item, kind in columns.items())
            parts.append(f"SELECT {', '.join(nulls)} LIMIT 0")
        self._full.execute(f"CREATE VIEW {quoted(name)} AS {' UNION ALL '.join(parts)}")

    def _runs(self, table: str) -> tuple[list[RunMark], list[int]]:
        """Return the runs whose rows of a big table are final, and the numbers of the others."""
        predicts = Stage.PREDICT in WRITERS[table]
        # A failed predict run may be resumed; a failed run of another stage never is.
        final = [Status.DONE.value] if predicts else [Status.DONE.value, Status.FAILED.value]
        self._load({"runs"})
        query = """
            SELECT id, started_at::VARCHAR, ended_at::VARCHAR,
                ended_at IS NOT NULL AND list_contains(?, status)
            FROM runs WHERE list_contains(?, stage) ORDER BY id
        """
        stages = [stage.value for stage in WRITERS[table]]
        rows = self._full.execute(query, [final, stages]).fetchall()
        if predicts and self._predict_runs is not None:
            rows = [row for row in rows if row[0] in self._predict_runs]
        extents = {row[0]: "" for row in rows}
        if table == "cells":  # an ingest may add cells to those of another
            self._load({"segmentations"})
            found = self._full.execute("""
                SELECT run_id, count(*) || ' images, ' || sum(n_cells) || ' cells'
                FROM segmentations GROUP BY run_id
            """)
            extents = dict(found.fetchall())
        ended = [
            RunMark(row[0], row[1], row[2], extents[row[0]])
            for row in rows
            if row[3] and row[0] in extents
        ]
        return ended, [row[0] for row in rows if not row[3]]

    def _copy(self, table: str, run: RunMark) -> Path:
        """Return the copy of what an ended run wrote into ``table``, made if there is none yet.

        Raises:
            StorageError: the folder cannot be written.
        """
        name = "predictions" if table == PREDICTIONS else table
        mark = f"{FORMAT} {run.started_at} {run.ended_at} {run.extent} {self._made_from(table)}"
        stem = f"{name}-run{run.id}-{hashlib.sha256(mark.encode()).hexdigest()[:16]}"
        try:
            self._copies.mkdir(parents=True, exist_ok=True)
            for path in self._copies.glob(f"{glob.escape(stem)}-*.parquet"):
                if path.name == _checked_name(stem, path):
                    return path
                path.unlink(missing_ok=True)  # it is not as it was written
            return self._write_copy(stem, table, run)
        except (OSError, duckdb.IOException) as error:
            if isinstance(error, StorageError):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise StorageError(
                f"The cache {self._copies} cannot be written: {reason}. Free some space or mend "
                "the permissions, then ask again; the cache may also be deleted."
            ) from error

    def _made_from(self, table: str) -> str:
        """Return all that a copy depends on, beside the run."""
        if table in (PREDICTIONS, "predictions"):
            return str(PREDICTION_COLUMNS)
        if table not in KEPT:
            return str(COLUMNS[table])
        found = _ELIGIBLE + "".join(view(item).query for item in _CHAINS[table])
        if table == RANKED:  # the alphabet decides ties, so that other labels make another copy
            labels = self._source.fetch(self._full, "labels")
            found += f"{self._made_from(COUNTS)} {sorted(map(str, labels))}"
        return found

    def _write_copy(self, stem: str, table: str, run: RunMark) -> Path:
        """Write a copy under a temporary name, in a database of its own: no user asks there."""
        handle, temporary = tempfile.mkstemp(dir=self._copies, prefix=".part-")
        os.close(handle)
        spill = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._spill)
        path = Path(temporary)
        copy = (
            f"COPY {{rows}} TO {literal(temporary)} "
            f"(FORMAT parquet, COMPRESSION lz4, ROW_GROUP_SIZE {ROWS_OF_GROUP})"
        )
        try:
            with closing(duckdb.connect(":memory:")) as own:
                own.execute(f"SET memory_limit = '{MAKING_MB}MB'")
                own.execute(f"SET temp_directory = {literal(spill)}")
                own.execute("SET preserve_insertion_order = false")
                own.execute("SET TimeZone = 'UTC'")
                if table in (PREDICTIONS, "predictions"):
                    feed_predictions(self._source, own, copy, ended=run.id)
                elif table not in KEPT:
                    self._source.feed_table(own, copy, table, rows_of_runs(table, [run.id]))
                else:
                    base = PREDICTIONS if table == COUNTS else COUNTS
                    rows = reading_files([self._copy(base, run)])
                    own.execute(f"CREATE VIEW {base} AS FROM {rows}")
                    if table == COUNTS:
                        own.execute(_ELIGIBLE)
                    else:
                        labels = "CREATE TABLE labels AS FROM {rows}"
                        self._source.feed_table(own, labels, "labels")
                        own.execute(_NOTHING_OF_WELLS)
                    for name in _CHAINS[table]:
                        own.execute(f"CREATE VIEW {name} AS {view(name).query}")
                    kept = RANKED_COPIED if table == RANKED else "true"
                    rows = f"(SELECT * FROM {table} WHERE {kept})"  # noqa: S608 - our own words
                    own.execute(copy.replace("{rows}", rows))
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return path.replace(self._copies / _checked_name(stem, path))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def rows_of_runs(table: str, run_ids: Collection[int]) -> str:
    """Return the SQL condition for the rows that these runs wrote into a big table."""
    numbers = ", ".join(str(int(item)) for item in run_ids) or "-1"
    if table == "cells":
        return f"JOIN segmentations AS s ON s.id = t.segmentation_id WHERE s.run_id IN ({numbers})"
    return f"WHERE t.run_id IN ({numbers})"


def _checked_name(stem: str, path: Path) -> str:
    """Return the name of a copy: with the checksum of its bytes; nothing if it is gone."""
    checksum = 0
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BYTES_AT_ONCE):
                checksum = zlib.crc32(block, checksum)
    except FileNotFoundError:  # another process has just removed it
        return ""
    return f"{stem}-{checksum:08x}.parquet"


WIDTH = 80
_SHOWN = {"Conditions": "on", "Expression": "where", "Filters": "where", "Projections": "columns"}


def _plan_lines(step: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Yield a line for each step of a plan, what it reads further in."""
    name = str(step.get("name", "")).strip().lower().replace("_", " ")
    if name != "projection":  # it only hands columns on
        extra = dict(step.get("extra_info", {}))
        rows = extra.pop("Estimated Cardinality", None)
        details = [] if rows is None else [f"rows: about {int(rows):,}"]
        for key, shown in _SHOWN.items():
            value = extra.get(key)
            if value:
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                details.append(f"{shown}: {' '.join(text.split())}")
        line = f"{' ' * depth}{name.removeprefix('python ')}  {'; '.join(details)}".rstrip()
        yield line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}\u2026"
        depth += 1
    for child in step.get("children", ()):
        yield from _plan_lines(child, depth)
