"""What keeps a question from doing more than read: a locked DuckDB, its own parser, and limits."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from ..artifacts import part_prefix, writing
from ..config import Limits
from ..errors import QueryError

T = TypeVar("T")
Parameters = Sequence[object] | Mapping[str, object]

POLL_SECONDS = 0.1

MAX_CHARACTERS = 1_000_000
"""The longest question: DuckDB reads a longer one for minutes, and cannot be stopped meanwhile."""

MB_OF_THREAD = 60
"""Each thread has rows in hand: with less memory for each a large question ends for want of it."""

SPILL_BYTES = 20 << 30
"""The most that a question may put on the disk where it does not fit into memory."""

_ALLOWED = frozenset(
    [
        *("range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"),
        *("summary", "duckdb_tables", "duckdb_views", "duckdb_columns", "duckdb_schemas"),
        *("duckdb_constraints", "duckdb_functions", "duckdb_types", "duckdb_keywords"),
        *("pragma_table_info", "pragma_version", "pragma_show", "pg_timezone_names"),
        "icu_calendar_names",
    ]
)
"""Functions that stand behind FROM and may be called. Others read files, settings or raw memory,
or run text as SQL."""

_REFUSED = frozenset(("current_setting", "getenv", "write_log"))
"""Functions of values that read settings, or write."""

_EXPLAIN = re.compile(r"\s*explain\b\s*(analyze\b|analyse\b)?\s*(\([^()]*\))?", re.IGNORECASE)


_AFTER_COLUMN = {b",", b")", b"using", b"group", b"order", b"limit", b"offset"}
"""What ends the name of a column, or all of them, in ``PIVOT ... ON``."""


@dataclass
class Statement:
    """One statement that only reads.

    ``tables``: what it reads that is no common table expression of its own, in small letters.
    ``shown``: what it names in SHOW, a table or a setting. ``lists_tables``: it asks what there is
    (SHOW TABLES, information_schema). ``explains``: it begins with EXPLAIN.
    """

    text: str
    tables: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    lists_tables: bool = False
    explains: bool = False
    writes: bool = False


@contextmanager
def locked_connection(
    limits: Limits, parent: Path, readable: Sequence[Path] = ()
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database in memory whose queries see no network and only files in two places.

    These are a folder of its own in ``parent``, which takes what does not fit into memory, and the
    folders ``readable``. No query can change these settings.
    """
    with writing(parent):
        spill = Path(tempfile.mkdtemp(prefix=part_prefix(), dir=parent))
    connection = duckdb.connect(":memory:")
    room = min(SPILL_BYTES, shutil.disk_usage(spill).free // 2)
    folders = ", ".join(
        f"{literal(f'{folder}/')}, {literal(f'{without_wildcards(folder)}/')}"
        for folder in readable
    )
    settings = {
        "TimeZone": "'UTC'",
        "memory_limit": f"'{limits.memory_mb}MB'",
        "temp_directory": literal(str(spill)),
        "max_temp_directory_size": f"'{room >> 20}MiB'",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "python_enable_replacements": "false",
        "allowed_directories": f"[{folders}]",
        "enable_external_access": "false",
        "max_expression_depth": "200",  # planning deeper ones may take minutes, and hears no stop
        "threads": str(max(1, min(os.cpu_count() or 1, limits.memory_mb // MB_OF_THREAD))),
        "lock_configuration": "true",
    }
    try:
        # GLOBAL: also for the cursors of this connection, which begin with settings of their own.
        connection.execute(
            "; ".join(f"SET GLOBAL {name} = {value}" for name, value in settings.items())
        )
        yield connection
    finally:
        connection.close()
        shutil.rmtree(spill, ignore_errors=True)


def literal(text: str) -> str:
    """Return an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def without_wildcards(path: Path) -> str:
    """Return a path as DuckDB takes it where it may hold wildcards."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def reading_files(paths: Sequence[Path]) -> str:
    """Return the SQL that reads Parquet files by their plain names."""
    names = ", ".join(literal(without_wildcards(path)) for path in paths)
    return f"read_parquet([{names}])"


def read_sql(path: Path) -> str:
    """Return the SQL in a file.

    Raises:
        QueryError: it cannot be read, or is longer than any question.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise QueryError(f"{path} cannot be read: {reason}.") from error
    if len(text) > MAX_CHARACTERS:
        raise QueryError(f"{path} is longer than {MAX_CHARACTERS:,} characters.")
    return text


def quoted(name: str) -> str:
    """Return an SQL identifier in quotes."""
    return '"' + name.replace('"', '""') + '"'


def only_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> Statement:
    """Return the one statement of ``sql``, if all that it does is read tables.

    Raises:
        QueryError: it is empty, several statements, wrong SQL, no text, or would write or call
            what reads anything else.
    """
    text, kind = _one_statement(connection, sql)
    prefix = _EXPLAIN.match(text) if kind in ("EXPLAIN", "MULTI") else None
    asked = text[prefix.end() :] if prefix else text
    found = parsed(connection, _with_values(asked) if kind == "MULTI" else asked)
    if found is None or found.writes:
        raise QueryError(
            "A question can only read: SELECT, WITH, EXPLAIN, DESCRIBE, SHOW or SUMMARIZE. "
            "What a store holds is changed by the other commands of cellstore."
            + (" In PIVOT, say the values: ON (a || b) IN ('x', 'y')." if kind == "MULTI" else "")
        )
    suspects = found.functions - _ALLOWED
    refused = sorted(suspects & (_REFUSED | _table_functions())) if suspects else []
    refused = [f"{name}()" for name in refused] + sorted(found.tables & {"pg_settings"})
    if refused:
        raise not_readable(refused[0])
    found.text, found.explains = text, prefix is not None
    return found


def not_readable(what: str) -> QueryError:
    """Return the sentence for a question that would read more than the store."""
    return QueryError(
        f"A question cannot read {what}: it sees the tables of the store only, no files, no "
        "network, no settings."
    )


def _one_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[str, str]:
    """Return the text of a single statement, and its kind."""
    if len(sql) > MAX_CHARACTERS:
        raise QueryError(
            f"The question is longer than {MAX_CHARACTERS:,} characters. Hand values over as "
            "parameters, or ask several questions."
        )
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise QueryError(
            "The question is not text in UTF-8. Save it as UTF-8, or type it again."
        ) from error
    if "\0" in sql:
        raise QueryError("The question holds a NUL character. Take it out.")
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise explained(error) from error
    if not statements:
        raise QueryError("There is no question. Example: cellstore sql 'select * from plates'")
    if len(statements) > 1:
        raise QueryError(f"These are {len(statements)} questions; ask them one at a time.")
    try:
        kind = statements[0].type.name
    except ValueError:  # a kind that the Python module has no name for: UPDATE EXTENSIONS
        kind = ""
    return statements[0].query, kind


def parsed(connection: duckdb.DuckDBPyConnection, sql: str) -> Statement | None:
    """Return what DuckDB's parser finds in one SELECT (or DESCRIBE, SHOW, SUMMARIZE); else None."""
    try:
        row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()[0]
        tree = json.loads(row[0])
        if tree.get("error"):
            return None
        found = Statement(sql)
        _walk(tree, frozenset(), found)
    except duckdb.Error as error:
        raise explained(error) from error
    except RecursionError as error:
        raise QueryError("The question is nested too deeply. Ask it in smaller steps.") from error
    return found


def _walk(node: Any, own_names: frozenset[str], found: Statement) -> None:
    """Note what a node of the tree and those below it read; ``own_names``: of WITH around it."""
    if isinstance(node, list):
        for item in node:
            _walk(item, own_names, found)
    if not isinstance(node, dict):
        return
    for item in node.get("cte_map", {}).get("map", ()):
        _walk(item["value"], own_names, found)
        own_names |= {item["key"].lower()}
    kind = str(node.get("type", ""))
    name = str(node.get("table_name") or "").lower()
    if kind.endswith("_QUERY_NODE"):  # WITH x AS (INSERT ...)
        found.writes = True
    elif kind == "SHOW_REF":
        found.lists_tables |= node.get("show_type") == "SHOW_SPECIAL"
        if node.get("show_type") == "SHOW":
            found.shown.add(name.strip('"'))
    elif kind == "BASE_TABLE":
        found.lists_tables |= bool(node.get("schema_name")) or name.startswith(("duckdb_", "pg_"))
        if name not in own_names:
            found.tables.add(name)
    if "function_name" in node:
        function = str(node["function_name"]).lower()
        found.functions.add(function)
        found.lists_tables |= function.startswith(("duckdb_", "pragma_"))
    for key, value in node.items():
        if key != "cte_map":
            _walk(value, own_names, found)


def _with_values(sql: str) -> str:
    """Return SQL in which every PIVOT names its values, so that it is one SELECT.

    Without ``IN (...)`` DuckDB first looks which values there are, and its parser tells nothing of
    such a question. What this returns is parsed, and never carried out.
    """
    text = sql.encode()
    comment = duckdb.token_type.comment
    starts = [start for start, kind in duckdb.tokenize(sql) if kind != comment]
    pieces, depth = [text[: starts[0]]], 0
    open_pivots: list[tuple[int, str]] = []  # how deep in brackets each is, and what comes now
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        word = text[start:end].split(maxsplit=1)[0].lower()
        at, part = open_pivots[-1] if open_pivots else (-1, "")
        if at == depth:
            if part == "column" and word in _AFTER_COLUMN:
                pieces.append(b"\nIN (NULL) ")  # not within a comment
            if word == b"on" and part == "source":
                open_pivots[-1] = (at, "column")
            elif word == b"in" and part == "column":
                open_pivots[-1] = (at, "values")
            elif word == b"," and part == "values":
                open_pivots[-1] = (at, "column")
            elif word in _AFTER_COLUMN and word != b",":
                open_pivots.pop()
        if word in (b"pivot", b"pivot_wider"):
            open_pivots.append((depth, "source"))
        depth += (word == b"(") - (word == b")")
        pieces.append(text[start:end])
    pieces += [b"\nIN (NULL)" for _, part in open_pivots if part == "column"]
    return b"".join(pieces).decode()


@cache
def _table_functions() -> set[str]:
    """The same in every database of this process, none of which loads an extension."""
    with duckdb.connect(":memory:") as connection:
        rows = connection.execute(
            "SELECT function_name FROM duckdb_functions() WHERE function_type = 'table'"
        ).fetchall()
    return {str(row[0]).lower() for row in rows}


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
    with ThreadPoolExecutor(1, "cellstore-question") as pool:
        job = pool.submit(work)
        try:
            # Not Thread.join: interrupted by Ctrl-C, Python 3.11 takes a living thread for an ended
            # one.
            deadline = time.monotonic() + seconds
            while not job.done() and (left := deadline - time.monotonic()) > 0:
                wait([job], min(left, POLL_SECONDS))
            late = seconds <= 0 or not job.done()  # 0: earlier work has taken all of it
        finally:
            while not job.done():
                connection.interrupt()  # again and again: between two statements it is not heard
                wait([job], POLL_SECONDS)
    try:
        return job.result()
    except (duckdb.Error, OSError) as error:  # OSError: DuckDB's, while Arrow fetches the answer
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if not late:
            raise explained(error) from error
        raise QueryError(
            f"The question took longer than {allowed or seconds:g} seconds and was stopped. "
            "Ask for less, or allow more time."
        ) from error


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
    reason = " ".join(lines) or type(error).__name__
    reason = re.sub(r"^(\w+ ){0,3}Error: ", "", reason)
    reason = "".join(char if char.isprintable() else " " for char in reason)
    found = QueryError(f"The question cannot be answered: {reason}")
    line = re.search(r"\n\nLINE (\d+): ", text)
    found.line = int(line[1]) if line else None
    return found
