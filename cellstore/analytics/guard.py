"""DuckDB connections that can only read, and only what they are given."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb

from ..errors import QueryError

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


def literal(text: str) -> str:
    """Return an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def parameters_of(given: Parameters | None) -> Any:
    """Return bound values as DuckDB takes them."""
    if given is None:
        return None
    return dict(given) if isinstance(given, Mapping) else list(given)
