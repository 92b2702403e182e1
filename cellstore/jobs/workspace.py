"""An open store: its settings, its database, its files, and who listens to its progress."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import ArtifactFolder, open_atomically
from ..db import migrate
from ..db.session import VERSION_TABLE, Database, connect, parse_url, without_secrets
from ..errors import StoreError, UserInputError
from ..settings import ENV_DATABASE, MARKER, Progress, StoreSettings, find_store


@dataclass(frozen=True)
class Workspace:
    """What every stage works on."""

    settings: StoreSettings
    database: Database
    artifacts: ArtifactFolder
    progress: Progress = field(default_factory=Progress)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what opens the store again in a worker: its folder and its URL without secrets.

        They are in the environment there, too: in ``CELLSTORE_DATABASE_URL``, or as libpq reads
        them (``PGPASSWORD``, ``~/.pgpass``).
        """
        url = self.settings.database
        shown = None if url is None else without_secrets(parse_url(url)).render_as_string()
        return _reopened, (self.settings.root, shown)


def _reopened(root: Path, shown: str | None) -> Workspace:
    settings = find_store(root)  # its URL may be that of the environment, with the password
    here = settings.database
    if here is None or without_secrets(parse_url(here)).render_as_string() != shown:
        settings = StoreSettings(settings.root, shown)
    return open_workspace(settings)


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
        found = workspace.database.revision()
        if not any_schema and found != migrate.HEAD:
            migrate.refuse(workspace.database, found)
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
    is_new = not (root / MARKER).is_file()
    if is_new:
        settings = StoreSettings(root, database or os.environ.get(ENV_DATABASE) or None)
    else:
        settings = find_store(root)
        settings = StoreSettings(settings.root, database or settings.database)
        asked = _connect(settings).database.shown
        written = _connect(find_store(root, as_written=True)).database.shown
        if asked != written:
            raise UserInputError(
                f"There is already a store in {root}, on the database {written}; it cannot be made "
                f"on {asked}. Make that one in another folder, or leave --database and "
                f"{ENV_DATABASE} out."
            )
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    sqlite = settings.sqlite
    had_sqlite, workspace = sqlite.exists(), None
    try:
        if is_new:
            lines = ["# This folder is a cellstore. See: cellstore status", "format = 1"]
            if settings.database is not None:
                # JSON escapes quotes and backslashes as TOML does.
                url = without_secrets(parse_url(settings.database)).render_as_string()
                lines.append(
                    f"database = {json.dumps(url)}  # the password comes from the environment"
                )
            with open_atomically(root / MARKER) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
        workspace = _connect(settings)
        if workspace.database.revision() is None:
            upgrade_schema(workspace.database)
        found = workspace.database.revision()
        if found != migrate.HEAD:
            migrate.refuse(workspace.database, found)
    except BaseException:
        if workspace is not None:
            workspace.database.close()
        with suppress(OSError):
            if is_new:
                (root / MARKER).unlink(missing_ok=True)
                # A table has a page of its own, after the first one (4,096 bytes) with their list.
                wal = sqlite.with_name(f"{sqlite.name}-wal")
                is_empty = sqlite.is_file() and sqlite.stat().st_size <= 4096
                if is_empty and not had_sqlite and not wal.exists():
                    sqlite.unlink()
                for folder in made:
                    folder.rmdir()  # only if it is empty
        raise
    return workspace, is_new


def upgrade_schema(database: Database) -> tuple[str | None, str | None]:
    """Bring the schema up to date; return its revision before and after."""
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
