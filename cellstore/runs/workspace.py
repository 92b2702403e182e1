"""An open store: its settings, its database, its files, and who listens to its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..artifacts import ArtifactFolder, write_atomically
from ..config import MARKER, StoreSettings
from ..db import migrate
from ..db.session import Database, connect, parse_url, sqlite_url
from ..errors import StoreError
from ..progress import Progress, Silent


@dataclass(frozen=True)
class Workspace:
    """What every stage works on."""

    settings: StoreSettings
    database: Database
    artifacts: ArtifactFolder
    progress: Progress = field(default_factory=Silent)


def open_workspace(settings: StoreSettings, progress: Progress | None = None) -> Workspace:
    """Open an existing store.

    Raises:
        SchemaError: its schema is not the one of this library.
        DatabaseError: it cannot be reached.

    """
    workspace = connect_workspace(settings, progress)
    try:
        migrate.ensure_current(workspace.database)
    except BaseException:
        workspace.database.close()
        raise
    return workspace


def connect_workspace(settings: StoreSettings, progress: Progress | None = None) -> Workspace:
    """Open a store whatever its schema, for the commands that mend it."""
    if settings.database is None and not settings.sqlite.is_file():
        raise StoreError(
            f"The database {settings.sqlite} is gone. Put it back from a backup, "
            "or start a new store with: cellstore init"
        )
    return Workspace(
        settings, _database(settings), ArtifactFolder(settings.artifacts), progress or Silent()
    )


def create_workspace(root: Path, database: str | None = None) -> tuple[Workspace, bool]:
    """Make a store in ``root``; return it and whether it is new. An existing one is kept.

    The URL is kept without its password.

    Raises:
        StorageError: the folder cannot be written.
        SchemaError: the database holds a store of another version.

    """
    marker = root / MARKER
    existed = marker.is_file()
    if not existed:
        write_atomically(marker, _marker_text(database).encode())
    settings = StoreSettings(root.resolve(), database)
    workspace = Workspace(settings, _database(settings), ArtifactFolder(settings.artifacts))
    try:
        if migrate.current(workspace.database) is None:
            migrate.upgrade(workspace.database)
        migrate.ensure_current(workspace.database)
    except BaseException:
        workspace.database.close()
        if not existed:
            marker.unlink(missing_ok=True)
        raise
    return workspace, not existed


def _database(settings: StoreSettings) -> Database:
    if settings.database is None:
        return connect(sqlite_url(settings.sqlite))
    return connect(parse_url(settings.database))


def _marker_text(database: str | None) -> str:
    lines = ["# This folder is a cellstore. See: cellstore status", "format = 1"]
    if database is not None:
        shown = parse_url(database)._replace(password=None).render_as_string()
        lines.append(f'database = "{shown}"  # the password comes from the environment')
    return "\n".join(lines) + "\n"
