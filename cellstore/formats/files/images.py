"""Image files: what they are, their pixels, and the folder they are found in."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from ...errors import ImageError, UserInputError
from ...terms import Projection
from .pixels import grey_pixels, header, shape_text, tiff_pixels
from .places import is_remote, local_path, page_name, read_bytes, shown, split_page, stat

SUFFIXES = frozenset({".tif", ".tiff", ".png"})
_UNSAFE = re.compile(r"[/\\\0:\n\r]")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image file without reading its pixels. Height, width in pixels.

    ``sha256`` is that of the file; for a page of a file, that of the file's hash and the page's
    number. ``mtime_ns`` is None where a server does not tell it.
    """

    sha256: str
    size_bytes: int
    mtime_ns: int | None
    height: int
    width: int
    dtype: str


def probe(place: Path | str) -> ImageInfo:
    """Return size, hash, shape and dtype of a TIFF or PNG, here or elsewhere (``s3://``).

    A TIFF of several pages needs the page: ``stack.tiff#page=2``.

    Raises:
        ImageError: the file cannot be opened, or its header is that of no TIFF or PNG.
        MissingExtraError: a remote place, and its reader is not installed.
        UserInputError: a kind of place that is not read.
    """
    uri = str(place)
    if is_remote(uri):
        return _probe_remote(uri)
    try:
        return _probe_local(uri)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(_closed(uri, error)) from error


def read_plane(place: Path | str, sha256: str | None = None) -> NDArray[np.generic]:
    """Return the pixels (H, W) of a single-channel image, or of the page that ``place`` names.

    A colour PNG or TIFF is read only where its colours are equal (a grey saved as colour). Where
    ``sha256`` is given, other bytes than ``probe`` saw are refused.

    Raises:
        ImageError: the file is missing, changed, truncated, no TIFF or PNG, or has real colours.
        MissingExtraError: as ``probe``.
        UserInputError: as ``probe``.
    """
    uri = str(place)
    _, page = split_page(uri)
    if is_remote(uri) or sha256 is not None:
        data = read_bytes(uri)
        if sha256 not in {None, _of_page(hashlib.sha256(data).hexdigest(), page)}:
            raise ImageError(f"{shown(uri)} has changed since it was ingested. Ingest it again.")
        return grey_pixels(shown(uri), io.BytesIO(data), page)
    try:
        with local_path(uri).open("rb") as stream:
            return grey_pixels(uri, stream, page)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(_closed(uri, error)) from error


def _probe_local(uri: str) -> ImageInfo:
    path, (_, page) = local_path(uri), split_page(uri)
    with path.open("rb") as stream:
        found = os.fstat(stream.fileno())
        if page is None:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            sha256 = _of_page(_digest(path, found.st_size, found.st_mtime_ns), page)
        stream.seek(0)
        height, width, dtype = header(uri, stream, page)
    return ImageInfo(sha256, found.st_size, found.st_mtime_ns, height, width, dtype)


def _probe_remote(uri: str) -> ImageInfo:
    _, page = split_page(uri)
    found, data = stat(uri), read_bytes(uri)
    height, width, dtype = header(shown(uri), io.BytesIO(data), page)
    sha256 = _of_page(hashlib.sha256(data).hexdigest(), page)
    return ImageInfo(sha256, len(data), found.mtime_ns, height, width, dtype)


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """The hash of a stack, which is asked for once for each of its pages."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_page(sha256: str, page: int | None) -> str:
    """Pages of one file must not look like copies of each other."""
    return sha256 if page is None else hashlib.sha256(f"{sha256}#page={page}".encode()).hexdigest()


def _closed(uri: str, error: OSError | ValueError) -> str:
    reason = error.strerror if isinstance(error, OSError) else "not a path"
    return f"{uri} cannot be opened ({reason})."


def project(planes: Sequence[NDArray[np.generic]], projection: Projection) -> NDArray[np.float32]:
    """Return the projection (H, W) of planes (H, W) of one field, pixel by pixel, as float32.

    Raises:
        ImageError: there is no plane, or the planes differ in shape.
    """
    if not planes:
        raise ImageError("This image has no channel to look at. Ingest its files first.")
    for plane in planes[1:]:
        if plane.shape != planes[0].shape:
            raise ImageError(
                f"The channels differ in shape: {shape_text(planes[0])} and {shape_text(plane)} "
                "pixels. Leave the odd channel out, or export the field again."
            )
    if len(planes) == 1:
        return planes[0].astype(np.float32)
    return _reduce(np.stack(planes), projection).astype(np.float32)


def _reduce(stack: NDArray[np.generic], projection: Projection) -> NDArray[np.generic]:
    if projection is Projection.MEDIAN:
        return _median(list(stack))
    if projection is Projection.MEAN:
        return np.asarray(stack.mean(axis=0, dtype=np.float64))
    return np.asarray(stack.max(axis=0))


def _median(planes: list[NDArray[Any]]) -> NDArray[np.generic]:
    """The values of ``numpy.median``, which takes thirty times as long for three planes."""
    number = len(planes)
    for turn in range(number):
        for lower in range(turn % 2, number - 1, 2):
            pair = planes[lower], planes[lower + 1]
            planes[lower], planes[lower + 1] = np.minimum(*pair), np.maximum(*pair)
    if number % 2:
        return planes[number // 2]
    between: NDArray[np.float64] = planes[number // 2 - 1].astype(np.float64) + planes[number // 2]
    return between / 2


def encode_tiff(array: NDArray[np.generic]) -> bytes:
    """Return a deflate-compressed TIFF of (H, W) or (H, W, C): the same bytes each time.

    Channels lie together in each pixel; no date, software or description is written.
    """
    buffer = io.BytesIO()
    depth = array.shape[2] if array.ndim == 3 else 1
    tifffile.imwrite(
        buffer,
        np.ascontiguousarray(array),
        byteorder="<",
        photometric="minisblack",
        planarconfig="contig" if depth > 1 else None,
        extrasamples=["unspecified"] * (depth - 1) if depth > 1 else None,
        compression="zlib",
        predictor=array.dtype.kind in "ui",
        metadata=None,
        software=False,
    )
    return buffer.getvalue()


def decode_tiff(source: bytes | Path) -> NDArray[np.generic]:
    """Return the array (H, W) or (H, W, C) of a TIFF: a label image or a flow image.

    Raises:
        ImageError: missing, truncated or not a TIFF.
    """
    if isinstance(source, bytes):
        return tiff_pixels("The image", io.BytesIO(source))
    try:
        with source.open("rb") as stream:
            return tiff_pixels(str(source), stream)
    except OSError as error:
        raise ImageError(f"{source} cannot be opened ({error.strerror}).") from error


class ImageFolder:
    """The image files below a folder, found by name. One scan, on construction.

    Links to places outside the folder are not followed. ``duplicates`` counts the names that
    occur more than once; such a name is found only in a subfolder named like its plate.

    Raises:
        UserInputError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserInputError(f"{folder} is not a folder. Give the folder that has the images.")
        self.folder = folder.resolve()
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(_walk(self.folder, self.folder)):
            self._by_name.setdefault(path.name.lower(), []).append(path)

    @property
    def duplicates(self) -> int:
        """How many file names occur in more than one place."""
        return sum(len(paths) > 1 for paths in self._by_name.values())

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(
        self, name: str, core_name: str | None = None, plate: str | None = None
    ) -> Path | None:
        """Return the file ``name``, else the projection ``core_name`` with an image suffix.

        Upper and lower case are the same. None where no file has the name. Of a name with a page
        ('stack.tiff#page=2') the path has the page too.

        Raises:
            ImageError: several files have it, and none or several lie in a folder of the plate.
        """
        found = self._pick(name, plate)
        return found or self.find_core(core_name, plate)

    def find_core(self, core_name: str | None, plate: str | None = None) -> Path | None:
        """Return the file named by core file name ('r01c01f01.tif'), or None.

        Raises:
            ImageError: as ``find``.
        """
        if core_name is None:
            return None
        tried = (self._pick(core_name + suffix, plate) for suffix in sorted(SUFFIXES))
        return next((path for path in tried if path), None)

    def _pick(self, name: str, plate: str | None) -> Path | None:
        file, page = split_page(name)
        paths = self._by_name.get(file.lower(), [])
        if plate and len(paths) > 1:
            paths = [path for path in paths if self._is_of_plate(path, plate)] or paths
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(self.folder)) for path in paths[:3])
            raise ImageError(
                f"{name} is in several places ({shown}). Put each plate's images in a folder "
                "named like the plate."
            )
        return _with_page(paths[0], page) if paths else None

    def _is_of_plate(self, path: Path, plate: str) -> bool:
        """Tell a folder 'BR00117035' or 'BR00117035__2021-05-02T...' of the plate from others."""
        parents = path.relative_to(self.folder).parts[:-1]
        return any(part == plate or part.startswith(plate + "__") for part in parents)


def _with_page(path: Path, page: int | None) -> Path:
    return path if page is None else path.with_name(page_name(path.name, page))


def is_safe_name(name: str) -> bool:
    """Tell whether ``name`` is one file name, and no path to somewhere else."""
    return name not in {"", ".", ".."} and _UNSAFE.search(name) is None


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return  # an unreadable subfolder has no images for us; what is in it shows as missing
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root)
        elif path.suffix.lower() in SUFFIXES and is_inside(entry, root):
            yield path


def is_inside(entry: os.DirEntry[str], root: Path) -> bool:
    """Tell whether an entry is a file, and no link to a place outside ``root``."""
    if not entry.is_symlink():
        return entry.is_file()
    target = Path(entry.path).resolve()
    return target.is_file() and target.is_relative_to(root)
