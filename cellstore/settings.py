"""What is known before a store is open: where it is, what is installed, who hears of progress."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from .errors import MissingExtraError, StorageError, StoreNotFoundError, UserInputError

T = TypeVar("T")

MARKER = "cellstore.toml"
SQLITE_NAME = "cellstore.db"
ENV_STORE = "CELLSTORE_STORE"
ENV_DATABASE = "CELLSTORE_DATABASE_URL"

EXTRAS = {
    "segment": ("cellpose", "skimage", "scipy", "safetensors"),
    "segment-sam": ("cellpose", "segment_anything", "skimage", "scipy", "safetensors"),
    "train": ("torch", "torchvision", "lightning", "sklearn", "skops", "safetensors"),
    "onnx": ("onnxruntime",),
    "embed": ("timm", "transformers", "huggingface_hub"),
    "hits": ("pycytominer", "copairs", "scipy", "sklearn"),
    "harmony": ("harmonypy",),
    "report": ("matplotlib", "jinja2", "networkx"),
    "postgres": ("psycopg", "adbc_driver_postgresql"),
    "cloud": ("fsspec", "s3fs"),
    "anndata": ("anndata",),
    "zarr": ("zarr",),
    "distributed": ("distributed",),
    "explore": ("starlette", "uvicorn", "jinja2"),
    "napari": ("napari",),
}
"""The optional parts of cellstore, and the modules that each brings.

``segment`` (Cellpose 3) and ``segment-sam`` (Cellpose 4) bring the same package and exclude each
other: either serves what needs ``segment``, and which one it is decides the networks that run.
"""


@dataclass(frozen=True)
class StoreSettings:
    """Where a store keeps its rows and files. ``database`` is a URL, perhaps with a password."""

    root: Path
    database: str | None = field(default=None, repr=False)

    @property
    def cache(self) -> Path:
        """Folder of what can be made again at any time."""
        return self.root / "cache"

    def make_cache(self, name: str = "") -> Path:
        """Return the cache, or a folder in it, made if it is not there.

        Raises:
            StorageError: it cannot be made.
        """
        folder = self.cache / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"The cache {self.cache} cannot be made: {error.strerror}. Correct the permissions."
            ) from error
        return folder

    @property
    def sqlite(self) -> Path:
        """The embedded database."""
        return self.root / SQLITE_NAME


def need(extra: str) -> None:
    """Check that an extra is installed, without importing it.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise MissingExtraError.of(module, extra)


def find_store(given: Path | None = None, *, as_written: bool = False) -> StoreSettings:
    """Return the store named by ``given``, else by the environment, else the nearest upwards.

    Its database is that of the environment, else the one written in its marker file;
    ``as_written``: always the latter.

    Raises:
        StoreNotFoundError: there is none.
        UserInputError: its marker file cannot be read.
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
    database = None if as_written else os.environ.get(ENV_DATABASE)
    if database:
        return StoreSettings(folder.resolve(), database)
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
    return StoreSettings(folder.resolve(), database)


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


def check_new_file(path: Path, *, replace: bool, option: str = "--replace") -> None:
    """Refuse a file that would replace another, or lie in a folder that is not there.

    ``option`` lets it ``replace`` one; a pipe or a device is no file that is lost.

    Raises:
        UserInputError: it is so, or ``path`` is part of a store.
    """
    check_not_of_a_store(path)
    if path.is_dir():
        raise UserInputError(f"{path} is a folder. Name a file in it.")
    if path.is_file() and not replace:
        raise UserInputError(f"{path} is there already. Name another file, or add {option}.")
    if not path.parent.is_dir():
        raise UserInputError(f"There is no folder {path.parent}. Make it, or name another.")


class Progress:
    """A listener: one ``start`` per piece of work, then ``advance``, then ``finish``.

    This one shows nothing; others override what they show.
    """

    def start(self, label: str, total: int | None) -> None:
        """Begin a piece of work of ``total`` steps (``None``: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""

    def note(self, text: str) -> None:
        """Show one line beside the bar, for example the metrics of an epoch."""

    def finish(self) -> None:
        """The piece of work is over."""


def track(progress: Progress, label: str, total: int | None, items: Iterable[T]) -> Iterator[T]:
    """Yield ``items``, reporting each to ``progress`` once it has been worked on."""
    progress.start(label, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
