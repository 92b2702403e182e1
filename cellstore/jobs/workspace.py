"""An open store: its settings, its database, its files, and who listens to its progress."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..artifacts import ArtifactFolder, open_atomically
from ..db import migrate
from ..db.session import VERSION_TABLE, Database, connect, parse_url, without_secrets
from ..errors import StoreError, UserInputError
from ..settings import ENV_DATABASE, MARKER, Progress, StoreSettings, find_store

SQLITE_PAGE = 4096  # bytes, of a new database


@dataclass(frozen=True)
class Workspace:
    """What every stage works on."""

    settings: StoreSettings
    database: Database
    artifacts: ArtifactFolder
    progress: Progress = field(default_factory=Progress)


def open_workspace(
    settings: StoreSettings, progress: Progress | None = None, *, any_schema: bool = False
) -> Workspace:
    """Open an existing store; ``any_schema``: whatever its schema, for commands that mend it.

    Raises:
        StoreError: its database is gone.
        SchemaError: its schema is not the one of this library.
        DatabaseError: it cannot be reached.
    """
    if settings.database is None and not settings.sqlite.is_file():
        raise StoreError(
            f"The database {settings.sqlite} is gone. Put it back from a backup, "
            "or start a new store with: cellstore init"
        )
    workspace = _connect(settings, progress)
    try:
        if not any_schema and workspace.database.revision() != migrate.HEAD:
            migrate.refuse(workspace.database)
    except BaseException:
        workspace.database.close()
        raise
    return workspace


def _connect(settings: StoreSettings, progress: Progress | None = None) -> Workspace:
    url = settings.sqlite if settings.database is None else parse_url(settings.database)
    folder = ArtifactFolder(settings.root / "artifacts")
    return Workspace(settings, connect(url), folder, progress or Progress())


def create_workspace(root: Path, database: str | None = None) -> tuple[Workspace, bool]:
    """Make a store in ``root``; return it and whether it is new. An existing one is kept.

    The URL is kept without its secrets. Without ``database`` the one of
    ``CELLSTORE_DATABASE_URL`` is taken, else the embedded one. What fails leaves nothing.

    Raises:
        UserInputError: the URL is none of ours, the store is on another database, or ``root`` is
            a file.
        StorageError: the folder cannot be written.
        SchemaError: the database holds a store of another version.

    """
    root = root.resolve()
    if root.is_file():
        raise UserInputError(f"{root} is a file. Name a folder for the store.")
    if (root / MARKER).is_file():
        return _migrated(_settings_of_existing(root, database)), False
    database = database or os.environ.get(ENV_DATABASE) or None
    with _undone_by_errors(root):
        with open_atomically(root / MARKER) as file:
            file.write(_marker_text(database).encode())
        return _migrated(StoreSettings(root.resolve(), database)), True


def _migrated(settings: StoreSettings) -> Workspace:
    workspace = _connect(settings)
    try:
        if workspace.database.revision() is None:
            upgrade_schema(workspace.database)
        if workspace.database.revision() != migrate.HEAD:
            migrate.refuse(workspace.database)
    except BaseException:
        workspace.database.close()
        raise
    return workspace


def upgrade_schema(database: Database) -> tuple[str | None, str | None]:
    """Bring the schema up to date; return its revision before and after.

    Raises:
        SchemaError: it is newer than this library, or its mark is lost.

    """
    before = database.revision()
    migrate.upgrade(database)
    after = database.revision()
    if before != after:
        from ..db.events import Change, record_events  # most commands upgrade nothing

        old = None if before is None else {"version_num": before}
        change = Change(VERSION_TABLE, None, old, {"version_num": after})
        with database.begin() as session:
            record_events(session, [change])
    return before, after


def _settings_of_existing(root: Path, database: str | None) -> StoreSettings:
    found = find_store(root)
    settings = StoreSettings(found.root, database or found.database)
    asked, written = (
        _connect(item).database.shown for item in (settings, find_store(root, as_written=True))
    )
    if asked != written:
        raise UserInputError(
            f"There is already a store in {root}, on the database {written}; it cannot be made "
            f"on {asked}. Make that one in another folder, or leave --database and "
            f"{ENV_DATABASE} out."
        )
    return settings


@contextmanager
def _undone_by_errors(root: Path) -> Iterator[None]:
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    sqlite = StoreSettings(root).sqlite
    had_sqlite = sqlite.exists()
    try:
        yield
    except BaseException:
        with suppress(OSError):
            (root / MARKER).unlink(missing_ok=True)
            if not had_sqlite and _holds_no_table(sqlite):
                sqlite.unlink()
            for folder in made:
                folder.rmdir()  # only if it is empty
        raise


def _holds_no_table(sqlite: Path) -> bool:
    # A table has a page of its own, after the first page with the list of tables.
    wal = sqlite.with_name(f"{sqlite.name}-wal")
    return sqlite.is_file() and not wal.exists() and sqlite.stat().st_size <= SQLITE_PAGE


def _marker_text(database: str | None) -> str:
    lines = ["# This folder is a cellstore. See: cellstore status", "format = 1"]
    if database is not None:
        # JSON escapes quotes and backslashes as TOML does.
        shown = json.dumps(without_secrets(parse_url(database)).render_as_string())
        lines.append(f"database = {shown}  # the password comes from the environment")
    return "\n".join(lines) + "\n"
