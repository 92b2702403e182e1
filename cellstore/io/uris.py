"""Where files are: folders of this machine, of others (as they wrote them), and object stores.

A URI is a path of this machine or what ``fsspec`` reads (``s3://``, ``https://``, ``memory://``).
Messages name it without the secrets that it may carry. One page of a file is named like
``stack.tiff#page=2``, pages counted from 1; what is asked of a page is asked of its file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EINVAL, EISDIR
from importlib import import_module
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from threading import Lock
from typing import Any
from urllib.parse import unquote

from ..errors import CellstoreError, ImageError, MissingExtraError, UserInputError

_ARRAYS = (".zarray", "zarr.json")
"""What describes a Zarr array, a folder that is read as one file."""

KEPT_BYTES = 256 << 20
FETCHED: dict[str, tuple[str, bytes]] = {}
"""Remote files that the run in hand has fetched last, each with its sha256: every channel of an
image, and every plane of a stack, is asked for several times. At most ``KEPT_BYTES``."""
KEEPING = Lock()

_READERS = {"s3": "s3fs", "https": "aiohttp", "http": "aiohttp", "memory": "fsspec"}
"""What reads each kind of remote file. Others (``zip://``, ``a::b``) could reach anything."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE | re.ASCII)
_FILE = "file://"
_DRIVE = re.compile(r"[a-z]:", re.IGNORECASE | re.ASCII)
_PAGE = re.compile(r"(.+)#page=([1-9][0-9]{0,5})", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes and time of the last change in ns since 1970; None for a remote file."""

    size_bytes: int
    mtime_ns: int | None


def map_folder(folder: str, maps: Iterable[tuple[str, str]]) -> str:
    r"""Return a folder with its beginning rewritten: where another machine kept what is here now.

    ``maps`` are (old, new). The longest old one that fits wins; it fits only whole folders
    (``/data/a`` is no beginning of ``/data/ab``). ``C:\data`` and ``c:/data`` are the same.
    A folder that none fits stays as it is, without a ``file://`` before it.
    """
    targets: dict[str, str] = {}
    for written, target in maps:
        old, new = _plain(written.strip()), target.strip()
        if not old or not new:
            raise UserInputError("A folder of --map is empty. Write --map /old/folder=/new/folder.")
        if targets.setdefault(old, new) != new:
            raise UserInputError(f"--map names {shown(old)} twice. Keep the one that is meant.")
    plain = _plain(folder) if targets else ""
    for old in sorted(targets, key=len, reverse=True):
        rest = plain.removeprefix(old)
        if plain.startswith(old) and (old.endswith("/") or rest[:1] in {"", "/"}):
            rest = rest.lstrip("/")
            return join(targets[old], rest) if rest else targets[old]
    return _without_file(folder)


def _plain(folder: str) -> str:
    """Write a folder in one way: '/' between its parts, a drive in lower case, no end mark."""
    folder = _without_file(folder)
    drive = _DRIVE.match(folder)
    if drive or folder.startswith("\\\\"):
        folder = folder.replace("\\", "/")
    if drive:
        folder = folder[0].lower() + folder[1:]
    return folder.rstrip("/") or folder[:1]


def _without_file(uri: str) -> str:
    if not uri.lower().startswith(_FILE):
        return uri
    path = unquote(uri[len(_FILE) :])
    return path[1:] if _DRIVE.match(path[1:]) else path


def join(folder: str, name: str) -> str:
    """Return the URI of the file ``name`` in a folder of this machine or of elsewhere."""
    mark = "\\" if "\\" in folder and "/" not in folder else "/"
    return folder + name if folder.endswith(mark) else folder + mark + name


def split_url(text: str) -> tuple[str | None, str]:
    """Return the folder and the name of a file that is named by a URL; a plain name has no folder.

    What comes after a '?' is left away: it may be a secret, and is not valid for long.
    """
    if not re.match(r"file:/|[a-z][a-z0-9+.-]+://", text, re.IGNORECASE | re.ASCII):
        return None, text
    is_file = text[:5].lower() == "file:"
    text = _without_file(f"file:///{text[5:].lstrip('/')}") if is_file else shown(text)
    folder, _, name = text.replace("\\", "/").rpartition("/")
    return folder or "/", name


def split_page(name: str) -> tuple[str, int | None]:
    """Return the file of a name or URI and the page of it, from 1; None where none is named."""
    match = _PAGE.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def page_name(name: str, page: int) -> str:
    """Return the name of a page of a file; the first is page 1."""
    if not 1 <= page <= 999_999:
        raise UserInputError(f"{page} is not a page of {name}. The first page is 1.")
    return f"{name}#page={page}"


def writable(text: str) -> str:
    """Return a name of the file system as text that a database takes: odd bytes become '?'."""
    return text.encode(errors="replace").decode()


def is_remote(uri: str) -> bool:
    """Whether a URI is of an object store or server, not of this machine."""
    scheme = _SCHEME.match(uri)
    return scheme is not None and scheme[1].lower() != "file"


def local_path(uri: str) -> Path:
    """Return the path of a file of this machine, written plainly or as ``file://``."""
    if is_remote(uri):
        raise UserInputError(f"{shown(uri)} is not on this machine. Give a folder that is.")
    return Path(_without_file(split_page(uri)[0]))


def shown(uri: str) -> str:
    """Return a URI as a message may name it: without user, password and signed query."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return uri
    server, slash, path = uri[scheme.end() :].partition("?")[0].partition("/")
    return scheme[0] + server.rpartition("@")[2] + slash + path


def read_bytes(uri: str) -> bytes:
    """Return the content of a remote file.

    Raises:
        ImageError: it is not there, may not be read, or its server does not answer.
        MissingExtraError: its reader is not installed.
        UserInputError: a kind of URI that is not read.
    """
    return bytes(_remote(uri, "cat_file"))


def stat(uri: str) -> FileStat:
    """Return size and time of change of a file here or elsewhere."""
    if is_remote(uri):
        size = _remote(uri, "info").get("size")
        if not isinstance(size, int):
            raise ImageError(f"The server gives no size of {shown(uri)}. Copy the file here.")
        return FileStat(size, None)  # times differ from server to server
    try:
        return local_stat(local_path(uri))
    except (OSError, ValueError) as error:
        raise ImageError(not_opened(uri, error)) from error


def plain_file(path: Path) -> Path:
    """Return the path of a file that can be opened. A pipe or a device could be read for ever.

    Raises:
        OSError: it is not there, may not be looked at, or is no file.
    """
    mode = path.stat().st_mode
    if S_ISDIR(mode):
        raise IsADirectoryError(EISDIR, "it is a folder", str(path))
    if not S_ISREG(mode):
        raise OSError(EINVAL, "it is a pipe or a device, not a file", str(path))
    return path


def local_stat(path: Path) -> FileStat:
    """Return size and time of change of a file of this machine; of a Zarr array, of all its files.

    Raises:
        OSError: it is not there, may not be read, or is another folder, a pipe or a device.
    """
    found = path.stat()
    if not S_ISDIR(found.st_mode):
        plain_file(path)
        return FileStat(found.st_size, found.st_mtime_ns)
    states = [file.stat() for file in array_files(path)]
    return FileStat(
        sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
    )


def array_files(path: Path) -> list[Path]:
    """Return the files of a Zarr array, in an order that is always the same."""
    if not any((path / name).is_file() for name in _ARRAYS):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return sorted(file for file in found if file.name in _ARRAYS or not file.name.startswith("."))


def exists(uri: str) -> bool:
    """Whether there is such a file; a server that does not answer is an error."""
    if is_remote(uri):
        return bool(_remote(uri, "isfile"))
    try:
        path = local_path(uri)
        return path.is_file() or any((path / name).is_file() for name in _ARRAYS)
    except (OSError, ValueError):  # a path too long, a folder that may not be entered, a NUL
        return False


def not_opened(uri: str, error: OSError | ValueError) -> str:
    """Return the sentence for a file that cannot be opened."""
    reason = error.strerror if isinstance(error, OSError) else "not a path"
    return f"{shown(uri)} cannot be opened ({reason}). Check the path, or use --map."


def _remote(uri: str, method: str) -> Any:
    """Call one method of the file system that has ``uri``.

    ``from None``: the errors of a service quote the request, with its secrets.
    """
    files = file_system(uri)
    try:
        return getattr(files, method)(split_page(uri)[0])
    except FileNotFoundError:
        raise ImageError(f"{shown(uri)} is not there. Check the path, or use --map.") from None
    except Exception as error:  # each service has errors of its own
        raise ImageError(_unanswered(uri, error)) from None


def file_system(uri: str) -> Any:
    """Return the file system of fsspec that has the files of a scheme."""
    scheme = uri.partition("://")[0].lower()
    if scheme not in _READERS or "::" in uri:
        known = ", ".join(f"{name}://" for name in sorted(_READERS))
        raise UserInputError(
            f"{shown(uri)} cannot be read: files must be in a folder or at {known}. "
            "Copy the files here, or use --map."
        )
    try:
        import_module(_READERS[scheme])
        return import_module("fsspec").filesystem(scheme)
    except ImportError:
        raise MissingExtraError.of(_READERS[scheme], "cloud") from None
    except CellstoreError:
        raise
    except Exception as error:
        raise ImageError(_unanswered(uri, error)) from None


def _unanswered(uri: str, error: Exception) -> str:
    hint = ""
    if uri.lower().startswith("s3://"):
        hint = " A public bucket is read without an account where FSSPEC_S3_ANON=true is set."
    number = error.errno if isinstance(error, OSError) else None
    reason = type(error).__name__ if number is None else os.strerror(number)
    return (
        f"{shown(uri)} cannot be read ({reason}). Check your access to it, or copy it here.{hint}"
    )
