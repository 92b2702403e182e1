"""DuckDB connections that can only read, and only what they are given."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from ..errors import QueryError

T = TypeVar("T")
POLL_SECONDS = 0.1
Parameters = Sequence[object] | Mapping[str, object]

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_WRITING = re.compile(
    r"\b(insert|update|delete|truncate|merge|copy|create|drop|alter)\b", re.IGNORECASE
)


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
        "max_temp_directory_size": "'20GB'",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "python_enable_replacements": "false",
        "enable_external_access": "false",
        "lock_configuration": "true",
    }
    for name, value in settings.items():
        connection.execute(f"SET {name} = {value}")
    return connection


def only_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Return the one statement of ``sql``, if all that it does is read.

    Raises:
        QueryError: it is empty, several statements, wrong SQL, or would write.
    """
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise explained(error) from error
    if not statements:
        raise QueryError("There is no question. Example: cellstore sql 'select * from plates'")
    if len(statements) > 1:
        raise QueryError(f"These are {len(statements)} questions; ask them one at a time.")
    if statements[0].type not in _READING or _changes(statements[0].query):
        raise QueryError(
            "A question can only read: SELECT, WITH, EXPLAIN, DESCRIBE, SHOW or SUMMARIZE. "
            "What a store holds is changed by the other commands of cellstore."
        )
    return statements[0].query.strip().rstrip(";")


def _changes(sql: str) -> bool:
    """Whether a verb of writing stands where a statement begins: at the start or after a bracket.

    DuckDB calls ``WITH x AS (INSERT ...) SELECT`` a reading statement, and so with another
    ``WITH y AS (...)`` before ``INSERT``. A column named such a verb right after ``)`` takes
    ``AS`` or quotes.
    """
    bare = without_text(sql)
    return any(
        re.search(r"(^|[()]|explain|analyze)\s*$", bare[: match.start()], re.IGNORECASE)
        for match in _WRITING.finditer(bare)
    )


def without_text(sql: str) -> str:
    """Return ``sql`` with comments, string literals and quoted names blanked out."""
    pattern = (
        r"--[^\n]*|/\*.*?\*/|\b[eE]'(?:[^'\\]|''|\\.)*'|'(?:[^']|'')*'"
        r"|\"(?:[^\"]|\"\")*\"|\$(\w*)\$.*?\$\1\$"
    )
    return re.sub(pattern, " ", sql, flags=re.DOTALL)


def run_limited(connection: duckdb.DuckDBPyConnection, seconds: float, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, which may keep ``connection`` busy for so many seconds.

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
    return _outcome(job, seconds if late else None)


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
    if isinstance(error, duckdb.PermissionException):
        return QueryError("A question sees the tables of the store only, no files, no network.")
    lines = [line.strip() for line in text.split("\n\nLINE")[0].splitlines() if line.strip()]
    said = " ".join(lines) or type(error).__name__
    said = re.sub(r"^(\w+ ){0,3}Error: ", "", said)
    return QueryError(f"The question cannot be answered: {said}")


def literal(text: str) -> str:
    """Return an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def parameters_of(given: Parameters | None) -> Any:
    """Return bound values as DuckDB takes them."""
    if given is None:
        return None
    return dict(given) if isinstance(given, Mapping) else list(given)
