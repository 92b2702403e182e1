"""Image files: what they are, their pixels, and the folder they are found in."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from ..enums import Projection
from ..errors import ImageError, UserInputError
from .uris import is_remote, local_path, page_name, read_bytes, shown, split_page, stat

SQLITE = b"SQLite format 3\0"
PARQUET = b"PAR1"


# Damage is reported as an ImageError; without a handler tifffile would also print to the terminal.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_PIXELS = 1 << 30


def header(name: str, stream: BinaryIO, page: int | None = None) -> tuple[int, int, str]:
    """Return height, width and dtype of an image (of page ``page``, from 1), reading no pixels.

    Raises:
        ImageError: no TIFF or PNG, cut off, no such page, or several pages and none is asked for.
    """
    head = stream.read(26)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if head.startswith(_PNG_MAGIC):
        _check_only_page(name, page)
        return _png_header(name, head)
    try:
        with tifffile.TiffFile(stream) as tiff:
            found = _pixels_page(name, tiff, page)
            shape, dtype = (found.imagelength, found.imagewidth), found.dtype
            _check_extent(name, found, size)
    except ImageError:
        raise
    except Exception as error:  # tifffile raises whatever the damaged bytes lead it to
        raise ImageError(unreadable(name)) from error
    if dtype is None or 0 in shape:
        raise ImageError(unreadable(name))
    return shape[0], shape[1], str(dtype)


def grey_pixels(name: str, stream: BinaryIO, page: int | None = None) -> NDArray[np.generic]:
    """Return the pixels (H, W) of an image, or of its page ``page``, from 1.

    Raises:
        ImageError: as ``header``, or the colours of the image differ.
    """
    head = stream.read(len(_PNG_MAGIC))
    stream.seek(0)
    if head != _PNG_MAGIC:
        return _grey(name, tiff_pixels(name, stream, page))
    _check_only_page(name, page)
    try:
        return _grey(name, np.asarray(imagecodecs.png_decode(stream.read())))
    except ImageError:
        raise
    except Exception as error:  # imagecodecs has a class of its own for each codec
        raise ImageError(unreadable(name)) from error


def tiff_pixels(name: str, stream: BinaryIO, page: int | None = None) -> NDArray[np.generic]:
    """Return the pixels (H, W) or (H, W, C) of a page of a TIFF.

    Raises:
        ImageError: as ``header``.
    """
    try:
        with tifffile.TiffFile(stream) as tiff:
            found = _pixels_page(name, tiff, page)
            if found.imagelength * found.imagewidth > _MAX_PIXELS:
                raise ImageError(f"{name} claims {found.imagelength}x{found.imagewidth} pixels.")
            return np.asarray(found.asarray())
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(unreadable(name)) from error


def has_more_pages(stream: BinaryIO) -> bool:
    """Tell a TIFF of several pages from other files by the few bytes that say so."""
    try:
        return _second_page(stream)
    except (struct.error, ValueError, OverflowError):  # cut off or damaged: reading it will tell
        return False


def unreadable(name: str) -> str:
    """Return the sentence for bytes that are no image."""
    return f"{name} is truncated or not a TIFF or PNG image. Copy or export it again."


def shape_text(array: NDArray[np.generic]) -> str:
    """Return a shape as a person writes it: 1080x1080."""
    return "x".join(map(str, array.shape))


def _second_page(stream: BinaryIO) -> bool:
    order = {b"II": "<", b"MM": ">"}.get(stream.read(2))
    if order is None:
        return False
    (version,) = struct.unpack(order + "H", stream.read(2))
    if version not in {42, 43}:
        return False
    offset, count, entry = ("I", "H", 12) if version == 42 else ("Q", "Q", 20)
    stream.seek(4 if version == 42 else 8)
    stream.seek(_number(stream, order + offset))
    stream.seek(_number(stream, order + count) * entry, os.SEEK_CUR)
    return _number(stream, order + offset) != 0


def _number(stream: BinaryIO, code: str) -> int:
    (number,) = struct.unpack(code, stream.read(struct.calcsize(code)))
    return int(number)


def _pixels_page(name: str, tiff: tifffile.TiffFile, page: int | None) -> tifffile.TiffPage:
    """Taking the first of several planes in silence would be a guess about the others."""
    count = len(tiff.pages)
    if count == 1:
        _check_only_page(name, page)
        _check_nothing_behind(name, tiff)
        return tiff.pages.first
    if page is None:
        raise ImageError(
            f"{name} holds {count} planes. Ingest its folder, which reads stacks, "
            "or export each plane as a file of its own."
        )
    if page > count:
        raise ImageError(f"{name} has no page {page}, only {count}. Ingest it again.")
    found = tiff.pages[page - 1]
    if not isinstance(found, tifffile.TiffPage):
        raise ImageError(unreadable(name))
    return found


def _check_only_page(name: str, page: int | None) -> None:
    if page not in {None, 1}:
        raise ImageError(f"{name} has no page {page}, only 1. Ingest it again.")


def _check_nothing_behind(name: str, tiff: tifffile.TiffFile) -> None:
    """Some programs describe one page and write the pixels of many behind it."""
    shape = tiff.series[0].shape if tiff.is_shaped or tiff.is_imagej else ()
    page = tiff.pages.first
    pixels = page.imagelength * page.imagewidth * page.samplesperpixel
    if shape and int(np.prod(shape, dtype=np.int64)) > pixels:
        raise ImageError(
            f"{name} holds {'x'.join(map(str, shape))} pixels behind one page. "
            "Export each plane as a file of its own."
        )


def _check_extent(name: str, page: tifffile.TiffPage, size: int) -> None:
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > size:
        raise ImageError(unreadable(name))


def _png_header(name: str, head: bytes) -> tuple[int, int, str]:
    if len(head) < 26:
        raise ImageError(unreadable(name))
    width, height, depth = struct.unpack(">IIB", head[16:25])
    return height, width, "uint16" if depth == 16 else "uint8"


def _grey(name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or not _is_grey(array):
        raise ImageError(
            f"{name} has shape {shape_text(array)} and is not one grey channel. "
            "Export each channel as a grey image of its own."
        )
    return np.ascontiguousarray(array[:, :, 0])


def _is_grey(array: NDArray[np.generic]) -> bool:
    if array.shape[2] == 2:  # grey and alpha
        return True
    colours = array[:, :, :3]
    return array.shape[2] in {3, 4} and bool((colours == colours[:, :, :1]).all())


_AXES = "CZT"
_IMAGEJ = {"C": "channels", "Z": "slices", "T": "frames"}


class StackPage(NamedTuple):
    """A page, and its channel, plane and time point; all counted from 1."""

    page: int
    channel: int
    plane: int
    time_point: int


@dataclass(frozen=True, slots=True)
class Stack:
    """The pages of a file, and the names of its channels where it tells them."""

    pages: tuple[StackPage, ...]
    channel_names: tuple[str | None, ...]

    @property
    def planes(self) -> int:
        """How many planes each channel has."""
        return max(page.plane for page in self.pages)

    @property
    def time_points(self) -> int:
        """How many time points each plane has."""
        return max(page.time_point for page in self.pages)


@dataclass(slots=True)
class _Ome:
    """What an OME-XML says of its images."""

    images: int = 0
    pixels: dict[str, str] = field(default_factory=dict)
    channels: list[str | None] = field(default_factory=list)
    blocks: list[dict[str, str]] = field(default_factory=list)


def read_stack(path: Path) -> Stack | None:
    """Return what the pages of a TIFF are; None for a file of one page, and for what is no TIFF.

    OME-XML and ImageJ's description tell channels, planes and time points apart; pages of other
    TIFFs are planes. Pages must be grey and of one shape.

    Raises:
        ImageError: the file cannot be opened or is damaged, its pages differ, or its description
            does not fit them.
    """
    try:
        with path.open("rb") as stream:
            if not has_more_pages(stream):
                return None
            stream.seek(0)
            with tifffile.TiffFile(stream) as tiff:
                return _stack(path.name, tiff)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror}).") from error
    except Exception as error:  # tifffile raises whatever the damaged bytes lead it to
        raise ImageError(unreadable(str(path))) from error


def _stack(name: str, tiff: tifffile.TiffFile) -> Stack:
    kinds = {(page.shape, page.dtype) for page in tiff.pages}
    shape = next(iter(kinds))[0]
    if len(kinds) > 1 or len(shape) != 2:
        raise ImageError(
            f"{name} has pages that are no grey images of one shape. "
            "Export each channel as a file of its own."
        )
    count = len(tiff.pages)
    if count == 1:  # its first page names a second one, at a place that is none
        raise ImageError(unreadable(name))
    if tiff.is_ome:
        return _ome_stack(name, tiff.pages.first.description, count)
    sizes = _imagej_sizes(tiff) if tiff.is_imagej else {"Z": count}
    return _numbered(name, _AXES, sizes, dict(enumerate(range(count))), count, [])


def _imagej_sizes(tiff: tifffile.TiffFile) -> dict[str, int]:
    metadata = tiff.imagej_metadata or {}
    sizes = {axis: int(metadata.get(key, 1)) for axis, key in _IMAGEJ.items()}
    # Programs that write plain stacks for ImageJ give only the number of images.
    return sizes if prod(sizes.values()) > 1 else {"Z": len(tiff.pages)}


def _ome_stack(name: str, description: str, count: int) -> Stack:
    ome = _parse_ome(name, description)
    if ome.images != 1:
        raise ImageError(
            f"{name} holds {ome.images} images (series). Export each as a file of its own."
        )
    order = ome.pixels.get("DimensionOrder", "XYCZT")[2:]
    if sorted(order) != sorted(_AXES):
        raise ImageError(f"{name} has the DimensionOrder {order[:9]!r}. Export it again.")
    sizes = {axis: _count(name, ome.pixels.get(f"Size{axis}", "1")) for axis in _AXES}
    places = dict(islice(_places(name, ome.blocks, order, sizes, count), count + 1))
    return _numbered(name, order, sizes, places, count, ome.channels)


def _places(
    name: str,
    blocks: Sequence[Mapping[str, str]],
    order: str,
    sizes: Mapping[str, int],
    count: int,
) -> Iterator[tuple[int, int]]:
    """Yield (page from 0, which plane of the series it is) of each TiffData."""
    for block in blocks or ({},):
        start = _count(name, block.get("IFD", "0"), least=0)
        place, step = 0, 1
        for axis in order:
            place += step * _count(name, block.get(f"First{axis}", "0"), least=0)
            step *= sizes[axis]
        default = "1" if "IFD" in block else str(count)
        for offset in range(_count(name, block.get("PlaneCount", default))):
            yield start + offset, place + offset


def _numbered(
    name: str,
    order: str,
    sizes: Mapping[str, int],
    places: Mapping[int, int],
    count: int,
    names: Sequence[str | None],
) -> Stack:
    """Return the stack whose page ``p`` is the ``places[p]``-th plane, the first axis fastest."""
    every = list(range(count))
    fits = prod(sizes.values()) == count
    if not fits or sorted(places) != every or sorted(places.values()) != every:
        told = " x ".join(f"{sizes[axis]} {axis}" for axis in order if axis in sizes)
        raise ImageError(
            f"{name} has {count} pages, and its description tells of {told}. "
            "Export it again, as one file."
        )
    pages = tuple(_page(page, places[page], order, sizes) for page in every)
    known = list(names)[: sizes.get("C", 1)]
    return Stack(pages, tuple(known + [None] * (sizes.get("C", 1) - len(known))))


def _page(page: int, place: int, order: str, sizes: Mapping[str, int]) -> StackPage:
    found = {}
    for axis in order:
        place, found[axis] = divmod(place, sizes.get(axis, 1))
    return StackPage(page + 1, found["C"] + 1, found["Z"] + 1, found["T"] + 1)


def _count(name: str, text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) >= least):
        raise ImageError(f"{name} has the number {text[:20]!r} in its OME-XML. Export it again.")
    return int(text)


def _parse_ome(name: str, description: str) -> _Ome:
    ome = _Ome()

    def start(tag: str, attributes: dict[str, str]) -> None:
        _take(ome, tag.rpartition(":")[2], attributes)

    def refuse(*_declaration: object) -> None:
        raise ImageError(f"{name} has a DOCTYPE in its OME-XML, which no microscope writes.")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(description, True)
    except expat.ExpatError as error:
        raise ImageError(f"{name} has a damaged OME-XML. Export it again.") from error
    return ome


def _take(ome: _Ome, tag: str, attributes: Mapping[str, str]) -> None:
    if tag == "Image":
        ome.images += 1
    elif tag == "Pixels":
        ome.pixels = dict(attributes)
    elif tag == "Channel":
        ome.channels.append(attributes.get("Name", "").strip() or None)
    elif tag == "TiffData":
        ome.blocks.append(dict(attributes))


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
