"""Where a store is: what its marker file and the environment say."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from .errors import StoreNotFoundError, UserInputError

MARKER = "cellstore.toml"
SQLITE_NAME = "cellstore.db"
ENV_STORE = "CELLSTORE_STORE"
ENV_DATABASE = "CELLSTORE_DATABASE_URL"


@dataclass(frozen=True)
class StoreSettings:
    """Where a store keeps its rows and files. ``database`` is a URL without a password."""

    root: Path
    database: str | None = None

    @property
    def artifacts(self) -> Path:
        """Folder of masks, flows, checkpoints."""
        return self.root / "artifacts"

    @property
    def cache(self) -> Path:
        """Folder of what can be made again at any time."""
        return self.root / "cache"

    @property
    def sqlite(self) -> Path:
        """The embedded database."""
        return self.root / SQLITE_NAME


def find_store(given: Path | None = None) -> StoreSettings:
    """Return the store named by ``given``, else by the environment, else the nearest upwards.

    Raises:
        StoreNotFoundError: there is none.

    """
    named = given or os.environ.get(ENV_STORE)
    start = Path.cwd()
    if named:
        folder = Path(named)
        if folder.is_file():
            raise StoreNotFoundError(f"{folder} is a file. Name the folder of the store.")
        if not (folder / MARKER).is_file():
            raise StoreNotFoundError(
                f"{folder} is not a store. Make one there with: cellstore init {folder}"
            )
    else:
        above = (item for item in (start, *start.parents) if (item / MARKER).is_file())
        found = next(above, None)
        if found is None:
            raise StoreNotFoundError(
                f"No store in {start} or in a folder above it. Make one with: cellstore init, "
                "or name one with --store DIR."
            )
        folder = found
    database = os.environ.get(ENV_DATABASE) or written_database(folder)
    return StoreSettings(folder.resolve(), database)


def written_database(folder: Path) -> str | None:
    """Return the URL that the marker in ``folder`` holds; ``None``: the embedded database.

    Raises:
        UserInputError: the marker cannot be read.

    """
    marker = folder / MARKER
    try:
        values = tomllib.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"{marker} cannot be read: {error}. Put it back from a backup; for a store on SQLite "
            "an empty file is enough."
        ) from error
    database = values.get("database")
    if database is not None and not isinstance(database, str):
        raise UserInputError(f"{marker}: 'database' should be a URL in quotes.")
    return database


def check_not_of_a_store(path: Path) -> None:
    """Refuse to write an answer over what a store itself consists of.

    Raises:
        UserInputError: ``path`` is the database, the marker, an artifact or the cache of a store.
    """
    target = path.resolve()
    for root in target.parents:
        if not (root / MARKER).is_file():
            continue
        first = target.relative_to(root).parts[0]
        if first in (MARKER, "artifacts", "cache") or first.startswith(SQLITE_NAME):
            raise UserInputError(f"{path} is part of the store {root}. Name another file.")
