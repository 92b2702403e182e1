"""DuckDB connections that can only read, and only what they are given."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ..errors import QueryError

Parameters = Sequence[object] | Mapping[str, object]

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_WRITING = re.compile(r"\b(insert|update|delete|merge|copy|create|drop|alter)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """What one question may take: ``seconds`` of time, memory, and size of the answer."""

    seconds: float = 600.0
    memory_mb: int = 2048
    answer_mb: int = 1024


def locked_connection(limits: Limits, spill: Path) -> duckdb.DuckDBPyConnection:
    """Return a database in memory whose queries see no file and no network.

    ``spill`` takes what does not fit into memory. No query can change these settings.
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

    DuckDB calls ``WITH x AS (INSERT ...) SELECT`` a reading statement.
    """
    bare = without_text(sql)
    return any(
        re.search(r"(^|\(|explain|analyze)\s*$", bare[: match.start()], re.IGNORECASE)
        for match in _WRITING.finditer(bare)
    )


def without_text(sql: str) -> str:
    """Return ``sql`` with comments, string literals and quoted names blanked out."""
    pattern = r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\$(\w*)\$.*?\$\1\$"
    return re.sub(pattern, " ", sql, flags=re.DOTALL)


@contextmanager
def time_limit(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what runs on ``connection`` after so many seconds.

    Raises:
        QueryError: it took longer.
    """
    timer = threading.Timer(seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException as error:
        raise QueryError(
            f"The question took longer than {seconds:g} seconds and was stopped. "
            "Ask for less, or allow more time."
        ) from error
    except duckdb.Error as error:
        raise explained(error) from error
    finally:
        timer.cancel()


def explained(error: duckdb.Error) -> QueryError:
    """Return the sentence for what DuckDB said."""
    text = str(error)
    if isinstance(error, duckdb.OutOfMemoryException):
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
