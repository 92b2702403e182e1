"""Files that a store writes: addressed by their sha256, whole or not there at all.

This module knows paths and bytes, no database.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from .enums import ArtifactKind
from .errors import StorageError

CHUNK = 1 << 20
PART = ".part-"
"""How the name of a file or folder begins that is there until a command ends."""
_PART = re.compile(re.escape(PART) + r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-\w+")


@dataclass(frozen=True)
class StoredFile:
    """A file of the store; ``path`` is relative to the artifacts folder, with ``/``."""

    kind: ArtifactKind
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ArtifactFolder:
    """The folder of all files of a store."""

    root: Path

    def write(self, kind: ArtifactKind, data: bytes, suffix: str) -> StoredFile:
        """Keep ``data`` durably: temporary name, fsync, rename. Known bytes are not written again.

        Raises:
            StorageError: the folder is full or read-only; nothing is left behind.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        stored = StoredFile(kind, f"{kind.value}/{sha256[:2]}/{sha256}{suffix}", sha256, len(data))
        target = self.root / stored.path
        # An orphan that gets its row now must look young to a `verify --fix` that runs beside us.
        with suppress(OSError):
            os.utime(target)
        if not (target.is_file() and sha256_of(target) == sha256):
            with open_atomically(target, self.root) as file:
                file.write(data)
        return stored

    def read(self, path: str, sha256: str) -> bytes:
        """Return the bytes of a stored file, compared with their ``sha256``.

        Raises:
            StorageError: the file is gone, or is not what was written.
        """
        target = self.locate(path)
        try:
            data = target.read_bytes()
        except OSError as error:
            raise StorageError(
                f"The stored file {path} cannot be read ({error.strerror}). "
                "See what else is affected with: cellstore verify"
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"The stored file {path} is not what was written (its sha256 differs). "
                "See what else is affected with: cellstore verify"
            )
        return data

    def locate(self, path: str) -> Path:
        """Return where a stored file is; a path that leads out of the folder is refused."""
        target = (self.root / path).resolve()
        if not target.is_relative_to(self.root.resolve()):
            raise StorageError(f"The stored path {path!r} leads out of the store; it is not used.")
        return target

    def existing(self, path: str) -> Path:
        """Return where a stored file is.

        Raises:
            StorageError: the file is gone.
        """
        found = self.locate(path)
        if not found.is_file():
            raise StorageError(
                f"The stored file {path} is gone. See what else is affected with: cellstore verify"
            )
        return found

    def remove(self, path: str) -> None:
        """Remove a file that no row names any more; one that is gone is as good.

        A file that cannot be removed stays, and ``cellstore verify --fix`` finds it.
        """
        with suppress(OSError):
            self.locate(path).unlink(missing_ok=True)

    def missing(self, paths: Iterable[str]) -> set[str]:
        """Return those of some stored paths whose file is not there; the ``paths`` are sorted.

        Each folder is listed once: a network disk answers that faster than a question per file.
        """
        gone: set[str] = set()
        for folder, group in groupby(paths, key=lambda path: path.rpartition("/")[0]):
            names = {path[len(folder) + 1 :] for path in group}
            with suppress(OSError):
                names.difference_update(os.listdir(self.root / folder))  # noqa: PTH208 - only names
            gone.update(f"{folder}/{name}" for name in names)
        return gone

    def walk(self) -> Iterator[str]:
        """Yield the relative path of every file that is there, temporary ones too."""
        for folder, _, names in os.walk(self.root):
            for name in sorted(names):
                yield (Path(folder) / name).relative_to(self.root).as_posix()


@dataclass(frozen=True)
class BorrowingFolder(ArtifactFolder):
    """A folder that also reads the files of another one, and never writes there."""

    lender: ArtifactFolder

    def locate(self, path: str) -> Path:
        """Return where a stored file is: here, else in the folder it is borrowed from."""
        here = super().locate(path)
        return here if here.exists() else self.lender.locate(path)

    def missing(self, paths: Iterable[str]) -> set[str]:
        """Return those of some stored paths whose file is neither here nor there."""
        return self.lender.missing(sorted(super().missing(paths)))

    def remove(self, path: str) -> None:
        """Remove a file that is here; what is borrowed stays."""
        with suppress(OSError):
            super().locate(path).unlink(missing_ok=True)


@cache
def machine() -> str:
    """Return what tells this machine since it was started, and this container, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        found = f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not on Linux
        found = socket.gethostname()
    return hashlib.sha256(found.encode()).hexdigest()[:8]


def part_prefix() -> str:
    """Return how the names of this process begin for what is there until it ends."""
    return f"{PART}{machine()}-{os.getpid()}-"


def sweep(folder: Path) -> None:
    """Remove the parts that killed commands left in a folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _PART.fullmatch(entry.name)
            if found is None or _goes_on(found, entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    Path(entry.path).unlink()


def _goes_on(part: re.Match[str], entry: os.DirEntry[str]) -> bool:
    """Whether the command that began a part may still go on."""
    try:
        if part["machine"] == machine():
            os.kill(int(part["pid"]), 0)
            return True
        changed = entry.stat(follow_symlinks=False).st_mtime
    except PermissionError:  # the process of another user
        return True
    except (OSError, OverflowError):
        return False
    return time.time() - changed < 2 * 24 * 3600  # on another machine: two days


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say in a sentence why a file or a folder cannot be written.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}. Free some space, correct the "
            "permissions, or name another file; then run the same command again. What is done "
            "stays done."
        ) from error


@contextmanager
def open_atomically(target: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that replaces ``target`` when it is whole, also after a power cut.

    ``scratch``: the folder, on the same disk, where it is until then; by default that of the
    target. What killed commands left there is removed. Raises as :func:`writing` does.
    """
    temporary = (scratch or target.parent) / f"{part_prefix()}{uuid.uuid4().hex}"
    sweep(temporary.parent)
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # "x" and the umask give the file the rights that the user's other files have.
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names of the files in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
