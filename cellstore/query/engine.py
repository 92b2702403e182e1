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
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb
import pyarrow as pa

from ..artifacts import ArtifactFolder
from ..config import VoteRules
from ..errors import QueryError, StorageError, UnknownNameError
from ..jobs.workspace import Workspace
from .cache import COUNTS, PLACED, WINNERS, WRITERS, Copies, RunMark, final_states
from .feature_sets import SetRelation, list_sets, open_files
from .source import (
    TABLES,
    Source,
    arrow_schema,
    create_statement,
    literal,
    open_source,
    quoted,
)
from .views import queries

T = TypeVar("T")
POLL_SECONDS = 0.1
Parameters = Sequence[object] | Mapping[str, object]

MAX_CHARACTERS = 1_000_000
"""The longest question: DuckDB reads a longer one for minutes, and cannot be stopped meanwhile."""

SPILL_BYTES = 20 << 30
"""The most that a question may put on the disk where it does not fit into memory."""

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_WRITING = frozenset(
    ["insert", "update", "delete", "truncate", "merge", "copy", "create", "drop", "alter"]
)
_EXPLAINABLE = frozenset(
    [
        "select",
        "with",
        "from",
        "values",
        "table",
        "describe",
        "desc",
        "show",
        "summarize",
        "pivot",
        "unpivot",
        "(",
    ]
)
_TABLE_FUNCTIONS = frozenset(
    [
        "range",
        "generate_series",
        "unnest",
        "repeat",
        "repeat_row",
        "json_each",
        "json_tree",
        "summary",
        "glob",
        "duckdb_tables",
        "duckdb_views",
        "duckdb_columns",
        "duckdb_schemas",
        "duckdb_constraints",
        "duckdb_functions",
        "duckdb_types",
        "duckdb_keywords",
        "pragma_table_info",
        "pragma_version",
        "pragma_show",
        "pg_timezone_names",
        "icu_calendar_names",
    ]
)
"""Those that a question may call. Others read files, settings or raw memory, or run text as SQL."""

_TELLING = frozenset(("current_setting", "getenv", "write_log"))
_NAME = (duckdb.token_type.identifier, duckdb.token_type.keyword)


@dataclass(frozen=True)
class Limits:
    """What one question may take: ``seconds`` of time, memory, and size of the answer."""

    seconds: float = 600.0
    memory_mb: int = 2048
    answer_mb: int = 1024


def locked_connection(limits: Limits, spill: Path) -> duckdb.DuckDBPyConnection:
    """Return a database in memory whose queries see no network and no file outside ``spill``.

    ``spill`` takes what does not fit into memory. DuckDB lets queries read that folder, so it
    must be of this connection alone. No query can change these settings.
    """
    connection = duckdb.connect(":memory:")
    settings = {
        "TimeZone": "'UTC'",
        "memory_limit": f"'{limits.memory_mb}MB'",
        "temp_directory": literal(str(spill)),
        "max_temp_directory_size": f"'{_room(spill) >> 20}MiB'",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "python_enable_replacements": "false",
        "enable_external_access": "false",
        "max_expression_depth": "200",  # planning deeper ones may take minutes, and hears no stop
        "lock_configuration": "true",
    }
    for name, value in settings.items():
        connection.execute(f"SET {name} = {value}")
    return connection


def _room(folder: Path) -> int:
    """Return how many bytes a question may spill: never more than half of what is free."""
    return min(SPILL_BYTES, shutil.disk_usage(folder).free // 2)


def only_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Return the one statement of ``sql``, if all that it does is read the tables of the store.

    Raises:
        QueryError: it is empty, several statements, wrong SQL, no text, or would write or call
            what reads anything else.
    """
    statement = _one_statement(connection, _checked_text(sql))
    words = tokens(statement.query)
    if not _reads(statement) or _changes(words):
        raise QueryError(
            "A question can only read: SELECT, WITH, EXPLAIN, DESCRIBE, SHOW or SUMMARIZE. "
            "What a store holds is changed by the other commands of cellstore."
        )
    _check_functions(words)
    first, last = words[0].start, words[-1].end  # without what is said before and behind it
    return statement.query.encode()[first:last].decode().rstrip("; \n")


def _reads(statement: duckdb.Statement) -> bool:
    try:
        return statement.type in _READING
    except ValueError:  # a kind that the Python module has no name for: UPDATE EXTENSIONS
        return False


def _checked_text(sql: str) -> str:
    if len(sql) > MAX_CHARACTERS:
        raise QueryError(
            f"The question is longer than {MAX_CHARACTERS:,} characters. Hand values over as "
            "parameters, or ask several questions."
        )
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise QueryError("The question is not text in UTF-8. Save or type it anew.") from error
    if "\0" in sql:
        raise QueryError("The question holds a NUL character. Take it out.")
    return sql


def _one_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise explained(error) from error
    if not statements:
        raise QueryError("There is no question. Example: cellstore sql 'select * from plates'")
    if len(statements) > 1:
        raise QueryError(f"These are {len(statements)} questions; ask them one at a time.")
    return statements[0]


class Token(NamedTuple):
    """A word or a sign of a question, at these bytes; texts and numbers have no ``word``."""

    word: str
    start: int
    end: int
    is_name: bool
    is_quoted: bool


def tokens(sql: str) -> list[Token]:
    """Return what DuckDB itself takes for the words of ``sql``; comments are none.

    Names are without their quotes and in small letters.
    """
    raw = sql.encode()
    found = list(duckdb.tokenize(sql))
    ends = [start for start, _ in found[1:]] + [len(raw)]
    return [
        _token(raw, start, end, kind)
        for (start, kind), end in zip(found, ends, strict=True)
        if kind != duckdb.token_type.comment
    ]


def _token(raw: bytes, start: int, end: int, kind: Any) -> Token:
    text = raw[start:end].decode(errors="replace").rstrip()
    shown = kind in _NAME or kind == duckdb.token_type.operator
    word = text.strip('"').replace('""', '"').lower() if shown else ""
    return Token(word, start, start + len(text.encode()), kind in _NAME, text.startswith('"'))


def _changes(words: Sequence[Token]) -> bool:
    """Whether a verb of writing stands where a statement begins: at the start or after a bracket.

    DuckDB calls ``WITH x AS (INSERT ...) SELECT`` a reading statement, and so with another
    ``WITH y AS (...)`` before ``INSERT``. A column named such a verb right after ``)`` takes
    ``AS``.
    """
    before = ["(", *(token.word for token in words)]
    after_bracket = any(
        token.word in _WRITING and not token.is_quoted and previous[-1:] in ("(", ")")
        for previous, token in zip(before, words, strict=False)
    )
    return after_bracket or _explains_other(words)


def _explains_other(words: Sequence[Token]) -> bool:
    """Whether what is explained is no reading statement: ANALYZE would carry it out."""
    if words[0].word != "explain":
        return False
    rest = [token.word for token in words[1:]]
    if rest[:1] == ["("]:
        rest = rest[rest.index(")") + 1 :] if ")" in rest else []
    while rest[:1] in (["analyze"], ["analyse"], ["verbose"]):
        rest = rest[1:]
    return not rest or rest[0] not in _EXPLAINABLE


def _check_functions(words: Sequence[Token]) -> None:
    called = {
        token.word
        for token, following in pairwise(words)
        if token.is_name and following.word.startswith("(")
    }
    suspects = called - _TABLE_FUNCTIONS
    refused = sorted(suspects & (_TELLING | _all_table_functions())) if suspects else []
    if refused:
        raise QueryError(
            f"A question cannot call {refused[0]}(): it sees the tables of the store only, "
            "no files, no network, no settings."
        )


@cache
def _all_table_functions() -> frozenset[str]:
    with closing(duckdb.connect(":memory:")) as connection:
        rows = connection.execute(
            "SELECT function_name FROM duckdb_functions() WHERE function_type = 'table'"
        ).fetchall()
    return frozenset(str(row[0]).lower() for row in rows)


def run_limited(
    connection: duckdb.DuckDBPyConnection,
    seconds: float,
    work: Callable[[], T],
    *,
    allowed: float | None = None,
) -> T:
    """Return what ``work`` returns, which may keep ``connection`` busy for so many seconds.

    ``allowed``: the seconds of the whole question, where earlier work has taken a part of them.
    It runs in a thread of its own: waiting for DuckDB, Python would not hear Ctrl-C.

    Raises:
        QueryError: it took longer, or DuckDB said that the question is wrong.
    """
    job: Future[T] = Future()
    worker = threading.Thread(
        target=_fulfil, args=(job, work), daemon=True, name="cellstore-question"
    )
    worker.start()
    late = False
    try:
        late = not _ends(job, seconds)
    finally:
        _stop(connection, job)
        worker.join()
    return _outcome(job, (allowed or seconds) if late else None)


def _fulfil(job: Future[T], work: Callable[[], T]) -> None:
    try:
        job.set_result(work())
    except BaseException as error:
        job.set_exception(error)


def _ends(job: Future[T], seconds: float) -> bool:
    # Not Thread.join: interrupted by Ctrl-C, Python 3.11 takes a living thread for an ended one.
    deadline = time.monotonic() + seconds
    while not job.done() and (left := deadline - time.monotonic()) > 0:
        wait([job], min(left, POLL_SECONDS))
    return job.done()


def _stop(connection: duckdb.DuckDBPyConnection, job: Future[T]) -> None:
    while not job.done():
        connection.interrupt()  # again and again: between two statements it is not heard
        wait([job], POLL_SECONDS)


def _outcome(job: Future[T], passed: float | None) -> T:
    try:
        return job.result()
    except (duckdb.Error, OSError) as error:  # OSError: DuckDB's, while Arrow fetches the answer
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if passed is None:
            raise explained(error) from error
        raise QueryError(
            f"The question took longer than {passed:g} seconds and was stopped. "
            "Ask for less, or allow more time."
        ) from error


def tables_in(parsed: Any) -> set[str] | None:
    """Return the names in what DuckDB's json_serialize_sql returns, None if it is an error."""
    if isinstance(parsed, dict) and parsed.get("error"):
        return None
    names: set[str] = set()
    waiting = [parsed]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if node.get("type") == "BASE_TABLE":
                names.add(str(node["table_name"]).lower())
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return names


def explained(error: Exception) -> QueryError:
    """Return the sentence for what DuckDB said."""
    text = str(error)
    if isinstance(error, duckdb.OutOfMemoryException) or text.startswith("Out of Memory"):
        return QueryError("The question needs more memory than allowed. Ask for less at a time.")
    if "Max expression depth" in text:
        return QueryError("The question is nested too deeply. Ask it in smaller steps.")
    if isinstance(error, duckdb.PermissionException):
        return QueryError("A question sees the tables of the store only, no files, no network.")
    lines = [line.strip() for line in text.split("\n\nLINE")[0].splitlines() if line.strip()]
    said = " ".join(lines) or type(error).__name__
    said = re.sub(r"^(\w+ ){0,3}Error: ", "", said)
    said = "".join(char if char.isprintable() else " " for char in said)
    return QueryError(f"The question cannot be answered: {said}")


def parameters_of(given: Parameters | None) -> Any:
    """Return bound values as DuckDB takes them."""
    if given is None:
        return None
    return dict(given) if isinstance(given, Mapping) else list(given)


ROWS = 65_536


class Answer:
    """The batches of an answer; ``schema`` is known before the first.

    The limit is on the time that DuckDB takes, not on what is done between two pieces.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        seconds: float,
        statement: str,
        parameters: object,
    ) -> None:
        self._connection = connection
        self._seconds = seconds
        self._left = seconds
        self._reader = self._limited(lambda: self._begin(statement, parameters))
        self.schema: pa.Schema = self._reader.schema

    def _begin(self, statement: str, parameters: object) -> pa.RecordBatchReader:
        relation = self._connection.sql(statement, params=parameters)
        if relation is None:
            raise QueryError("This statement has no answer; ask with SELECT.")
        return relation.to_arrow_reader(ROWS)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yield what is left of the answer."""
        while (batch := self._limited(lambda: next(self._reader, None))) is not None:
            yield batch

    def _limited(self, work: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return run_limited(self._connection, self._left, work, allowed=self._seconds)
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - began))


WIDTH = 80
_SHOWN = {"Conditions": "on", "Expression": "where", "Filters": "where", "Projections": "columns"}


def described_plan(answer: pa.Table) -> str:
    """Return the steps of ``EXPLAIN (FORMAT json)``: a line each, what it reads further in."""
    steps = json.loads(answer.column("explain_value")[-1].as_py())
    return "\n".join(line for step in steps for line in _lines(step, 0))


def _lines(step: Mapping[str, Any], depth: int) -> Iterator[str]:
    name = str(step.get("name", "")).strip().lower().replace("_", " ")
    if name != "projection":  # it only hands columns on
        facts = [f"{key}: {_short(value)}" for key, value in _facts(step)]
        line = f"{' ' * depth}{name.removeprefix('python ')}  {'; '.join(facts)}".rstrip()
        yield line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}\u2026"
        depth += 1
    for child in step.get("children", ()):
        yield from _lines(child, depth)


def _facts(step: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    extra = dict(step.get("extra_info", {}))
    rows = extra.pop("Estimated Cardinality", None)
    if rows is not None:
        yield "rows", f"about {int(rows):,}"
    for key, shown in _SHOWN.items():
        if extra.get(key):
            yield shown, extra[key]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split())


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
            (PLACED, COUNTS, WINNERS)
            if rules is None or rules.exclude_flagged is None
            else (PLACED,)
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
