"""Engines, connections and transactions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Engine,
    ExceptionContext,
    column,
    create_engine,
    event,
    exists,
    inspect,
    make_url,
    select,
    table,
)
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoResultFound,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import DatabaseError as SqlDatabaseError
from sqlalchemy.orm import Session

from ..errors import (
    CellstoreError,
    ConflictError,
    DatabaseError,
    MissingExtraError,
    StorageError,
    UserInputError,
    first_line,
)

SQLITE_BUSY_MS = 300_000  # a table of a million rows is one transaction of a minute
UNWRITABLE = re.compile(
    r"disk is full|disk full|no space left|readonly database|read-only|disk i/o error"
)
DAMAGED = re.compile(r"malformed|not a database|corrupt|could not decode")
CONFLICTS = ("40001", "40P01")  # PostgreSQL: serialization failure, deadlock
READ_ONLY = ("42501", "25006")  # PostgreSQL: no right to a table, a transaction that only reads
DAMAGES_SHOWN = 20
DANGLING = "refers to a row"
VERSION_TABLE = "alembic_version"
SQLITE_CACHE_KIB = 16_384  # of each connection; more makes no ingest faster, only trainings larger
HARMLESS = (
    *("host", "hostaddr", "port", "dbname", "user", "sslmode", "connect_timeout", "sslrootcert"),
    *("application_name", "target_session_attrs", "client_encoding", "mode", "cache", "timeout"),
    *("sslcert", "channel_binding", "gssencmode", "keepalives"),
)
"""Parameters of the URL of a database that are shown; libpq takes secrets in many others."""

_NEW = "Make a new one with: cellstore split create NAME"
_SPLIT = (
    "A split, its protocol, and what it is about (images, their wells and plates, classes) stays "
    f"as it is. {_NEW}"
)
_RUN = (
    "What a run did stays as it is, and a run is never deleted: what others made with it would "
    "lose its origin. Rows of an ingest can be taken back with: cellstore undo RUN"
)
REFUSALS = {
    "split is frozen": (
        f"A run relies on this split, so it can neither change nor be deleted. {_NEW}"
    ),
    "split keeps its protocol and group level": _SPLIT,
    "split says what it is about": _SPLIT,
    "split keeps each group in one subset": (
        "In this split a well (plate, perturbation: its group level) is in one subset only, and "
        f"this would put one in two subsets or move it. {_NEW}"
    ),
    "split member is in no group": (
        "This split goes by perturbation, and an image without a treatment cannot be in it. "
        "Give its well a treatment first: cellstore ingest TABLE"
    ),
    "split is there already": (
        "A split of this name is there already, and a split never changes. Choose another name."
    ),
    "run has ended": (
        "This run has ended, so no row can be added to it. Run the command of its stage "
        "again: that makes a new run."
    ),
    "run stays as it began": _RUN,
    "run is opened again by an event only": _RUN,
    "run is never deleted": _RUN,
    "table is never emptied": _RUN,
}
"""What the triggers of the first revision raise, and the sentence for it."""


@dataclass(frozen=True)
class Database:
    """One database: SQLite (embedded) or PostgreSQL (for teams)."""

    engine: Engine

    @property
    def is_sqlite(self) -> bool:
        """Whether this is the embedded database."""
        return self.engine.dialect.name == "sqlite"

    @property
    def shown(self) -> str:
        """The URL without its secrets, fit for people and logs."""
        return without_secrets(self.engine.url).render_as_string()

    @contextmanager
    def begin(self, wait_ms: int = SQLITE_BUSY_MS) -> Iterator[Session]:
        """Yield a session in one transaction: committed at the end, undone by an error.

        ``wait_ms``: how long it waits on SQLite for others that write.
        """
        engine = self.engine.execution_options(writes=True, wait_ms=wait_ms)
        with _translated(self), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self, *, steady: bool = False) -> Iterator[Session]:
        """Yield a session for reading; nothing is committed.

        ``steady``: all its questions see the rows of one moment, as they do on SQLite anyway.
        """
        engine = self.engine
        if steady and not self.is_sqlite:
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with _translated(self), Session(engine) as session:
            yield session

    def revision(self) -> str | None:
        """Return the revision of the schema; ``None``: the database has none."""
        with _translated(self), self.engine.connect() as connection:
            if not inspect(connection).has_table(VERSION_TABLE):
                return None
            return connection.scalar(
                select(column("version_num")).select_from(table(VERSION_TABLE))
            )

    def size(self) -> int:
        """Return how many bytes it takes."""
        query = "page_count * page_size FROM pragma_page_count, pragma_page_size"
        if not self.is_sqlite:
            query = "pg_database_size(current_database())"
        with _translated(self), self.engine.connect() as connection:
            return int(connection.exec_driver_sql(f"SELECT {query}").scalar_one())

    def damage(self, *, quick: bool) -> list[str]:
        """Return what is broken in the database, a sentence each.

        Of an embedded one the file is checked (``quick``: whether indexes have all rows of their
        tables is not looked at). Of both, every row that another refers to must be there.

        Raises:
            DatabaseError: the file cannot be read at all.
        """
        from ..models import METADATA  # loads slowly

        found: list[str] = []
        with _translated(self), self.engine.connect() as connection:
            if self.is_sqlite:
                pragma = "quick_check" if quick else "integrity_check"
                try:
                    for (text,) in connection.exec_driver_sql(f"PRAGMA {pragma}({DAMAGES_SHOWN})"):
                        # After "*** in database main ***" each line is a finding.
                        lines = text.splitlines() if text != "ok" else []
                        found += [line for line in lines if not line.startswith("***")]
                except SqlDatabaseError as error:
                    found.append(str(error.orig))
            if found:
                return found
            if self.is_sqlite:
                rows = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(
                    DAMAGES_SHOWN
                )
                lost = [(table, number, other) for table, number, other, _ in rows]
            else:
                lost = []
                for name, child in METADATA.tables.items():
                    for key in child.foreign_keys:
                        other, column = key.column.table.alias(), key.column
                        there = exists().where(other.c[column.name] == key.parent)
                        query = select(*child.primary_key).where(key.parent.is_not(None), ~there)
                        lost += [
                            (name, "/".join(map(str, row)), column.table.name)
                            for row in connection.execute(query.limit(DAMAGES_SHOWN))
                        ]
        return [
            f"row {number} of {table} {DANGLING} of {other} that is not there"
            for table, number, other in lost[:DAMAGES_SHOWN]
        ]

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


@contextmanager
def _translated(database: Database) -> Iterator[None]:
    try:
        yield
    except SqlDatabaseError as error:
        for refusal, sentence in REFUSALS.items():
            if refusal in str(error.orig):
                raise UserInputError(sentence) from error
        # Its other kinds (integrity, programming) are not about the database's own health,
        # but for a parameter of the URL that the driver does not know.
        unconnected = type(error) is ProgrammingError and error.statement is None
        denied = getattr(error.orig, "sqlstate", None) in READ_ONLY
        if not (unconnected or denied) and type(error) not in (SqlDatabaseError, OperationalError):
            raise
        raise explain(error, database) from error
    except (LookupError, ValueError, AttributeError, NoResultFound) as error:
        is_text = type(error) in (JSONDecodeError, UnicodeDecodeError)
        if is_text or "defined enum values" in str(error):
            raise _damaged(database, first_line(error)) from error
        # A row that another one names may be gone.
        expected = isinstance(error, CellstoreError)
        if not expected and (found := database.damage(quick=True)):
            raise _damaged(database, found[0]) from error
        raise


def _damaged(database: Database, why: str) -> DatabaseError:
    return DatabaseError(
        f"The database {database.shown} is damaged: {why.rstrip('.')}. Put it back from a backup "
        "(cellstore restore FILE), then see whether all is there with: cellstore verify"
    )


def explain(error: DBAPIError, database: Database) -> DatabaseError | StorageError:
    """Return the sentence for a database that failed."""
    text = first_line(error.orig or error)
    lowered = text.lower()
    if "unable to open database file" in lowered or (database.is_sqlite and "readonly" in lowered):
        return StorageError(
            f"The database {database.shown} cannot be opened: {text}. Check that the file and its "
            "folder exist and that you may write to both, which cellstore needs for reading, too. "
            "An archived store can be used from a copy in a folder that can be written to."
        )
    if UNWRITABLE.search(lowered) or getattr(error.orig, "sqlstate", None) in READ_ONLY:
        return StorageError(
            f"The database {database.shown} cannot be written: {text}. "
            "Free some space or correct the permissions, then run the same command again."
        )
    if getattr(error.orig, "sqlstate", None) in CONFLICTS:
        return ConflictError(
            f"Another command changed the same rows of {database.shown} at the same time. "
            "Run this one again."
        )
    if "locked" in lowered:
        return DatabaseError(
            f"Another program holds {database.shown} for longer than "
            f"{SQLITE_BUSY_MS // 1000} seconds. Wait for it to end, then run the command again."
        )
    if DAMAGED.search(lowered):
        return _damaged(database, text)
    unreachable = lowered.startswith("connection failed") or "name or service" in lowered
    advice = " Check that its server runs and that the URL is right." if unreachable else ""
    return DatabaseError(f"The database {database.shown} failed: {text.rstrip('.')}.{advice}")


def parse_url(text: str) -> URL:
    """Return the URL of a database, with the driver that cellstore uses.

    Raises:
        UserInputError: it is not a URL, or not of SQLite or PostgreSQL. The message does not
            repeat the URL, which may hold a password.

    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # "from None": the reason may quote a piece of the password.
        raise UserInputError(
            "The database URL cannot be read. It should look like "
            "postgresql://user@host:5432/name, where the port is a number."
        ) from None
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        # Of "bob:a@b@host" the piece "b@host" is taken for the host, and a host is shown.
        if "@" in (url.host or "") + (url.database or ""):
            raise UserInputError(
                "The database URL has an '@' too many. Write an '@' in a password as %40, "
                "and a '/' as %2F."
            )
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        return url.set(drivername="sqlite+pysqlite")
    raise UserInputError(f"cellstore works on SQLite and PostgreSQL, not on {backend!r}.")


def without_secrets(url: URL) -> URL:
    """Return ``url`` without its password, with those parameters alone that hold no secret."""
    secret = [name for name in url.query if name.lower() not in HARMLESS]
    return url._replace(password=None).difference_update_query(secret)


def connect(url: URL | Path) -> Database:
    """Open a database, or a file of SQLite, without reading from it yet.

    Raises:
        MissingExtraError: PostgreSQL is asked for and its driver is not installed.

    """
    if isinstance(url, Path):
        url = URL.create("sqlite+pysqlite", database=os.fspath(url))
    try:
        engine = create_engine(url, pool_pre_ping=url.get_backend_name() != "sqlite")
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise MissingExtraError.of("psycopg", "postgres") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        event.listen(engine, "handle_error", _keep_on_interrupt)
    return Database(engine)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, see _begin_sqlite
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA cache_size = {-SQLITE_CACHE_KIB}")
    # As PostgreSQL and DuckDB do, so that one --where chooses the same images everywhere.
    cursor.execute("PRAGMA case_sensitive_like = ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    # A writer takes its lock at once: one that first reads cannot wait for another and fails.
    options = connection.get_execution_options()
    if options.get("rebuilds", False):  # can only be said before the transaction begins
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
    if writes := options.get("writes", False):
        wait_ms = options.get("wait_ms", SQLITE_BUSY_MS)
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(wait_ms)}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _keep_on_interrupt(context: ExceptionContext) -> None:
    # Else SQLAlchemy drops the connection at Ctrl-C instead of undoing its transaction, whose
    # lock then keeps out the rest of this very command.
    if isinstance(context.original_exception, KeyboardInterrupt):
        context.is_disconnect = False
