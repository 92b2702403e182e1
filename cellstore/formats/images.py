"""Image files: what they are, their pixels, and the folder they are found in."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from ..errors import ImageError, UserInputError
from ..terms import Projection

# Damage is reported as an ImageError; without a handler tifffile would also print to the terminal.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

SUFFIXES = frozenset({".tif", ".tiff", ".png"})
_CHUNK = 1 << 20
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_PIXELS = 1 << 30
_UNSAFE = re.compile(r"[/\\\0:\n\r]")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image file without reading its pixels. Height, width in pixels."""

    sha256: str
    size_bytes: int
    mtime_ns: int
    height: int
    width: int
    dtype: str


def probe(path: Path) -> ImageInfo:
    """Return size, hash, shape and dtype of a TIFF (of one page) or PNG file.

    Raises:
        ImageError: the file cannot be opened, or its header is that of no TIFF or PNG.
    """
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            height, width, dtype = _header(path, stream)
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror}).") from error
    return ImageInfo(sha256, found.st_size, found.st_mtime_ns, height, width, dtype)


def read_plane(path: Path) -> NDArray[np.generic]:
    """Return the pixels (H, W) of a single-channel image; a TIFF has one page.

    A colour PNG or TIFF is read only where its colours are equal (a grey saved as colour).

    Raises:
        ImageError: the file is missing, truncated, no TIFF or PNG, or has real colours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror}).") from error
    return _grey(path, _decode(path, data))


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
                f"The channels differ in shape: {_shape(planes[0])} and {_shape(plane)} pixels. "
                "Leave the odd channel out, or export the field again."
            )
    if len(planes) == 1:
        return planes[0].astype(np.float32)
    stack = np.stack(planes).astype(np.float64, copy=False)
    return _reduce(stack, projection).astype(np.float32)


def _reduce(stack: NDArray[np.float64], projection: Projection) -> NDArray[np.float64]:
    if projection is Projection.MEDIAN:
        return np.asarray(np.median(stack, axis=0))
    if projection is Projection.MEAN:
        return np.asarray(stack.mean(axis=0))
    return np.asarray(stack.max(axis=0))


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
        return _decode_tiff("The image", source)
    try:
        return _decode_tiff(str(source), source.read_bytes())
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

        Upper and lower case are the same. None where no file has the name.

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
        paths = self._by_name.get(name.lower(), [])
        if plate and len(paths) > 1:
            paths = [path for path in paths if self._is_of_plate(path, plate)] or paths
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(self.folder)) for path in paths[:3])
            raise ImageError(
                f"{name} is in several places ({shown}). Put each plate's images in a folder "
                "named like the plate."
            )
        return paths[0] if paths else None

    def _is_of_plate(self, path: Path, plate: str) -> bool:
        """Tell a folder 'BR00117035' or 'BR00117035__2021-05-02T...' of the plate from others."""
        parents = path.relative_to(self.folder).parts[:-1]
        return any(part == plate or part.startswith(plate + "__") for part in parents)


def recorded_path(folder: str | None, name: str) -> Path | None:
    """Return the image where a table's ``PathName_*`` says it is, if that is on this machine.

    Only absolute folders count (a relative one is relative to a place that is not known), and only
    names that are one file name with the suffix of an image.
    """
    if folder is None or not is_safe_name(name) or "\0" in folder:
        return None
    path = Path(folder) / name
    known = path.is_absolute() and path.suffix.lower() in SUFFIXES
    try:
        return path if known and path.is_file() else None
    except OSError:  # a path too long, or a folder that may not be entered
        return None


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
        elif path.suffix.lower() in SUFFIXES and _is_inside(entry, root):
            yield path


def _is_inside(entry: os.DirEntry[str], root: Path) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    target = Path(entry.path).resolve()
    return target.is_file() and target.is_relative_to(root)


def _header(path: Path, stream: io.BufferedReader) -> tuple[int, int, str]:
    head = stream.read(26)
    stream.seek(0)
    if head.startswith(_PNG_MAGIC):
        return _png_header(path, head)
    try:
        with tifffile.TiffFile(stream) as tiff:
            page = _only_page(str(path), tiff)
            shape, dtype = (page.imagelength, page.imagewidth), page.dtype
            _check_extent(path, page, os.fstat(stream.fileno()).st_size)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_unreadable(str(path))) from error
    if dtype is None or 0 in shape:
        raise ImageError(_unreadable(str(path)))
    return shape[0], shape[1], str(dtype)


def _only_page(name: str, tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    """Taking the first of several planes in silence would be a guess about the others."""
    count = len(tiff.pages)
    if count != 1:
        raise ImageError(f"{name} holds {count} planes. Export each plane as a file of its own.")
    return tiff.pages.first


def _check_extent(path: Path, page: tifffile.TiffPage, size: int) -> None:
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > size:
        raise ImageError(_unreadable(str(path)))


def _png_header(path: Path, head: bytes) -> tuple[int, int, str]:
    if len(head) < 26:
        raise ImageError(_unreadable(str(path)))
    width, height, depth = struct.unpack(">IIB", head[16:25])
    return height, width, "uint16" if depth == 16 else "uint8"


def _decode(path: Path, data: bytes) -> NDArray[np.generic]:
    if not data.startswith(_PNG_MAGIC):
        return _decode_tiff(str(path), data)
    try:
        return np.asarray(imagecodecs.png_decode(data))
    except Exception as error:  # imagecodecs has a class of its own for each codec
        raise ImageError(_unreadable(str(path))) from error


def _decode_tiff(name: str, data: bytes) -> NDArray[np.generic]:
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = _only_page(name, tiff)
            if page.imagelength * page.imagewidth > _MAX_PIXELS:
                raise ImageError(f"{name} claims {page.imagelength}x{page.imagewidth} pixels.")
            return np.asarray(page.asarray())
    except ImageError:
        raise
    except Exception as error:  # tifffile raises whatever the damaged bytes lead it to
        raise ImageError(_unreadable(name)) from error


def _grey(path: Path, array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or not _is_grey(array):
        raise ImageError(
            f"{path} has shape {_shape(array)} and is not one grey channel. "
            "Export each channel as a grey image of its own."
        )
    return np.ascontiguousarray(array[:, :, 0])


def _is_grey(array: NDArray[np.generic]) -> bool:
    if array.shape[2] == 2:  # grey and alpha
        return True
    colours = array[:, :, :3]
    return array.shape[2] in {3, 4} and bool((colours == colours[:, :, :1]).all())


def _shape(array: NDArray[np.generic]) -> str:
    return "x".join(map(str, array.shape))


def _unreadable(name: str) -> str:
    return f"{name} is truncated or not a TIFF or PNG image. Copy or export it again."
