"""Image files: what they are, their pixels, and the folder they are found in."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from ..enums import Projection
from ..errors import CellstoreError, ImageError, MissingExtraError, UserInputError
from .uris import (
    FETCHED,
    KEEPING,
    KEPT_BYTES,
    FileStat,
    array_files,
    is_remote,
    local_path,
    local_stat,
    not_opened,
    page_name,
    plain_file,
    read_bytes,
    shown,
    split_page,
)

SQLITE = b"SQLite format 3\0"
SUFFIXES = frozenset({".tif", ".tiff", ".png"})

# Damage is reported as an ImageError; without a handler tifffile would also print to the terminal.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SAMPLES_PER_PIXEL = 277
_WHITE_IS_ZERO, _GREY, _ALPHA, _PLANAR = 0, {0, 1}, {1, 2}, 2
"""Values of the TIFF tags PhotometricInterpretation, ExtraSamples and PlanarConfiguration."""
_LZW = 5
"""Value of the TIFF tag Compression."""
_COPY = 1 | 4
"""Bits of NewSubfileType: a reduced copy of another page, a transparency mask."""
PNG_COLOURS = {2, 3, 6}
_MAX_PIXELS = 1 << 30
_MICROMETRES = {
    "\N{MICRO SIGN}m": 1.0,
    "\N{GREEK SMALL LETTER MU}m": 1.0,
    "um": 1.0,
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "millimeter": 1e3,
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "nm": 1e-3,
}
"""How long one of each unit is that microscopes write."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image file without reading its pixels. Height, width in pixels.

    ``sha256`` is that of the file; for a page of a file, that of the file's hash and the page's
    number. ``mtime_ns`` is None for a remote file. ``pixel_size``: micrometres per pixel, None
    where the file does not say it.
    """

    sha256: str
    size_bytes: int
    mtime_ns: int | None
    height: int
    width: int
    dtype: str
    pixel_size: float | None = None
    remarks: tuple[str, ...] = ()
    """What a person should know of how its pixels are read."""


def probe(where: Path | str) -> ImageInfo:
    """Return size, hash, shape and dtype of a TIFF or PNG, here or elsewhere (``s3://``).

    A TIFF of several planes needs the plane: ``stack.tiff#page=2``, the second one. Samples of a
    page that are channels count as planes of their own. The array of a Zarr is a folder that counts
    as one file.

    Raises:
        ImageError: the file cannot be opened, its header is that of no TIFF or PNG, it has several
            planes and none is named, or colours.
        MissingExtraError: a remote file, and its reader is not installed.
        UserInputError: a kind of URI that is not read.
    """
    uri = str(where)
    page = split_page(uri)[1]
    if is_remote(uri):
        data = read_bytes(uri)
        header = _read_header(shown(uri), io.BytesIO(data), page)
        sha256 = _page_digest(hashlib.sha256(data).hexdigest(), page)
        return ImageInfo(sha256, len(data), None, *header)
    try:
        path = local_path(uri)
        found = local_stat(path)
        sha256 = _page_digest(_whole_digest(path, found), page)
        if path.is_dir():
            array, _ = _open_array(uri, path, page)
            height, width = array.shape[-2:]
            state = sha256, found.size_bytes, found.mtime_ns
            return ImageInfo(*state, height, width, str(array.dtype))
        offsets = None if page is None else _page_offsets(path, found)
        with path.open("rb") as stream:
            header = _read_header(uri, stream, page, offsets)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(not_opened(uri, error)) from error
    return ImageInfo(sha256, found.size_bytes, found.mtime_ns, *header)


def read_plane(
    where: Path | str, sha256: str | None = None, rows: slice = slice(None)
) -> NDArray[np.generic]:
    """Return the pixels (H, W) of a single-channel image, or of the page that ``where`` names.

    ``rows``: only these (from the first to before the last), which takes less time.

    A colour PNG or TIFF is read only where its colours are equal (a grey saved as colour). An alpha
    channel is passed over. Values are as stored, also where 0 is white. ``sha256``: that of a
    remote file, as ``probe`` saw it; other bytes are refused.

    Raises:
        ImageError: the file is missing, changed, truncated, no TIFF or PNG, or has real colours.
        MissingExtraError, UserInputError: as ``probe``.
    """
    uri = str(where)
    name, page, offsets = uri, split_page(uri)[1], None
    try:
        if is_remote(uri):
            name = shown(uri)
            opened: BinaryIO = io.BytesIO(_fetched(uri, page, sha256))
        else:
            path = local_path(uri)
            state = local_stat(path)
            if path.is_dir():
                array, index = _open_array(uri, path, page)
                try:
                    return np.asarray(array[(*index, rows)])
                except Exception as error:  # what the codec of a damaged chunk raises
                    raise ImageError(f"{uri} is damaged. Copy or export it again.") from error
            # One pass over the file for all of its pages.
            offsets = None if page is None else _page_offsets(path, state)
            opened = path.open("rb")
        with opened as stream:
            head = stream.read(len(PNG_MAGIC))
            stream.seek(0)
            if head == PNG_MAGIC:
                if page not in {None, 1}:
                    raise ImageError(_no_page(name, page, 1))
                return _grey_png(name, stream)[rows]
            with open_tiff(name, stream) as tiff:
                return _grey(name, *_find_page(name, tiff, page, offsets), rows)
    except CellstoreError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(not_opened(name, error)) from error


def _fetched(uri: str, page: int | None, known: str | None) -> bytes:
    """Return the bytes of a remote file, once for the whole run; others than ``known`` are refused.

    ``known``: the hash of the file, or of its page.
    """
    file = split_page(uri)[0]
    with KEEPING:
        sha256, data = FETCHED.get(file, ("", b""))
    if not data or _page_digest(sha256, page) != known:
        data = read_bytes(uri)
        sha256 = hashlib.sha256(data).hexdigest()
        with KEEPING:
            FETCHED[file] = sha256, data
            while sum(len(kept) for _, kept in FETCHED.values()) > KEPT_BYTES:
                del FETCHED[next(iter(FETCHED))]
    if known not in {None, _page_digest(sha256, page)}:
        raise ImageError(f"{shown(uri)} has changed since it was ingested. Ingest it again.")
    return data


def _grey_png(name: str, stream: BinaryIO) -> NDArray[np.generic]:
    try:
        array = np.asarray(imagecodecs.png_decode(stream.read()))
    except Exception as error:  # imagecodecs has a class of its own for each codec
        raise ImageError(unreadable(name)) from error
    if array.ndim == 2:
        return array
    # Two samples are grey and alpha; three or four are grey where the colours are equal.
    return _equal_colours(name, array, 3 if array.shape[2] > 2 else 1)


def _grey(
    name: str, page: tifffile.TiffPage, sample: int | None, rows: slice = slice(None)
) -> NDArray[np.generic]:
    """Return the pixels (H, W) of a page, or of the sample of it that is asked for."""
    if page.imagelength * page.imagewidth > _MAX_PIXELS:
        raise ImageError(too_large(name, page.imagelength, page.imagewidth))
    first, last, _ = rows.indices(page.imagelength)
    if (first, last) != (0, page.imagelength) and page.samplesperpixel == 1:
        return _rows(page, first, max(first, last))
    array = np.asarray(page.asarray())
    if array.ndim == 2:
        return array[rows]
    if page.planarconfig == _PLANAR:
        array = np.moveaxis(array, 0, -1)
    array = array[rows]
    if sample is None:
        return _equal_colours(name, array[..., samples_of(page)])
    return np.ascontiguousarray(array[..., sample])


def _rows(page: tifffile.TiffPage, first: int, last: int) -> NDArray[np.generic]:
    """Return some rows (H, W) of a page of one sample; the others are read only if they must be."""
    file, (height, width) = page.parent.filehandle, (last - first, page.imagewidth)
    kind = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    line = width * kind.itemsize
    plain = page.predictor == 1 and page.fillorder == 1
    if page.is_contiguous and plain:
        file.seek(page.dataoffsets[0] + first * line)
        return np.frombuffer(file.read(height * line), kind).reshape(height, width)
    whole = page.bitspersample == 8 * kind.itemsize
    if page.compression == _LZW and plain and whole and len(page.dataoffsets) == 1:
        file.seek(page.dataoffsets[0])
        # It stops after the last of these rows.
        data = imagecodecs.lzw_decode(file.read(page.databytecounts[0]), out=last * line)
        return np.frombuffer(data, kind)[first * width :].reshape(height, width)
    tall, across = page.chunks[0], page.chunked[1]
    found = np.empty((height, width), page.dtype)
    for index in range(first // tall * across, -(-last // tall) * across):
        file.seek(page.dataoffsets[index])
        piece, (*_, top, left, _), _ = page.decode(file.read(page.databytecounts[index]), index)
        if piece is None:  # an empty tile
            piece = np.full((1, *page.chunks, 1), page.nodata, page.dtype)
        there = piece[0, max(0, first - top) : last - top, : width - left, 0]
        at = max(0, top - first)
        found[at : at + there.shape[0], left : left + there.shape[1]] = there
    return found


def _equal_colours(name: str, array: NDArray[np.generic], colours: int = 3) -> NDArray[np.generic]:
    """Return the one plane of colours (H, W, C) that are equal; the rest of C is alpha."""
    if (array[..., :colours] == array[..., :1]).all():
        return np.ascontiguousarray(array[..., 0])
    raise ImageError(
        f"{name} has shape {_shape_text(array)} and is not one grey channel. "
        "Export each channel as a grey image of its own."
    )


def samples_of(page: tifffile.TiffPage) -> list[int]:
    """Return the samples of the pixels of a page, from 0, without those that are alpha."""
    count = page.samplesperpixel
    first = count - len(page.extrasamples)
    return [n for n in range(count) if n < first or page.extrasamples[n - first] not in _ALPHA]


def is_colour(page: tifffile.TiffPage) -> bool:
    """Whether the samples of a page are colours; samples that nothing is said of are channels."""
    return len(samples_of(page)) > 1 and page.photometric not in _GREY


def full_pages(tiff: tifffile.TiffFile) -> list[int]:
    """Return the pages of a file, from 0, that are no reduced copies, masks or the like."""
    kinds = (getattr(page, "subfiletype", 0) for page in tiff.pages)
    pages = [number for number, kind in enumerate(kinds) if not kind & _COPY]
    return pages or list(range(len(tiff.pages)))


@lru_cache(maxsize=16)
def _whole_digest(path: Path, state: FileStat) -> str:
    """The hash of a file or Zarr array; of a stack it is asked for once for each of its planes.

    That of an array is over the names and hashes of its files: its description and its chunks.
    """
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in array_files(path):
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path).as_posix()}\t{sha256}\n".encode())
    return digest.hexdigest()


def tiff_pages(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield where each page of a TIFF begins, and how many samples its pixels have.

    Nothing of what is no TIFF; where it is cut off or damaged, reading it says so. ``tifffile``
    would read much more, of each of the million files of a folder.
    """
    head = stream.read(16)
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(head[:4], "")
    # The offset of a page; the number and the size of its entries; where their values are.
    offset, count, size, value, first = ("I", "H", 12, 8, 4)
    if head[2:4] in (b"+\0", b"\0+"):
        offset, count, size, value, first = ("Q", "Q", 20, 12, 8)
    seen: set[int] = set()
    with suppress(struct.error):
        (start,) = struct.unpack_from(order + offset, head, first) if order else (0,)
        while start and start not in seen:
            seen.add(start)
            samples, following = 1, 0
            with suppress(struct.error, ValueError, OverflowError):
                stream.seek(start)
                (entries,) = struct.unpack(order + count, stream.read(struct.calcsize(count)))
                for _ in range(entries):
                    tag = stream.read(size)
                    if struct.unpack_from(order + "H", tag)[0] == _SAMPLES_PER_PIXEL:
                        (samples,) = struct.unpack_from(order + "H", tag, value)
                (following,) = struct.unpack(order + offset, stream.read(struct.calcsize(offset)))
            yield start, samples
            start = following


@lru_cache(maxsize=16)
def _page_offsets(path: Path, _state: FileStat) -> tuple[int, ...]:
    """Where the pages of a TIFF begin: asked once for all, since each names the next one only."""
    with path.open("rb") as stream:
        return tuple(start for start, _ in tiff_pages(stream))


def _open_array(name: str, path: Path, page: int | None) -> tuple[Any, tuple[int, ...]]:
    """Return a Zarr array and where in it a plane is; the plane is its last two axes."""
    try:
        array: Any = import_module("zarr").open_array(str(path), mode="r")
    except ImportError:
        raise MissingExtraError.of("zarr", "zarr") from None
    except Exception as error:  # zarr and its codecs raise what they like
        raise ImageError(f"{name} is not a Zarr array, or it is damaged. Copy it again.") from error
    if array.ndim < 2 or array.shape[-1] * array.shape[-2] > _MAX_PIXELS:
        raise ImageError(f"{name} has the shape {array.shape}, which is not the shape of an image.")
    count = prod(array.shape[:-2])
    if page is None and count > 1:
        raise ImageError(f"{name} holds {count} planes. Ingest the plate that it is of.")
    if (page or 1) > count:
        raise ImageError(_no_page(name, page, count))
    index = np.unravel_index((page or 1) - 1, array.shape[:-2]) if array.ndim > 2 else ()
    return array, tuple(map(int, index))


def _page_digest(sha256: str, page: int | None) -> str:
    """Pages of one file must not look like copies of each other."""
    return sha256 if page is None else hashlib.sha256(f"{sha256}#page={page}".encode()).hexdigest()


@contextmanager
def open_tiff(name: str, stream: BinaryIO) -> Iterator[tifffile.TiffFile]:
    """Read a TIFF; whatever its damaged bytes lead tifffile to becomes an ``ImageError``."""
    try:
        with tifffile.TiffFile(stream) as tiff:
            yield tiff
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(unreadable(name)) from error


def too_large(name: str, height: int, width: int) -> str:
    """Return the sentence for an image of more pixels than a camera has."""
    return f"{name} claims {height}x{width} pixels, which is too many. Export it again."


def unreadable(name: str) -> str:
    """Return the sentence for a damaged file."""
    return f"{name} is truncated or not a TIFF or PNG image. Copy or export it again."


def _read_header(
    name: str, stream: BinaryIO, page: int | None, offsets: Sequence[int] | None = None
) -> tuple[int, int, str, float | None, tuple[str, ...]]:
    """Return height, width, dtype, pixel size and remarks of an image, or of a page of it."""
    head = stream.read(26)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if head.startswith(PNG_MAGIC):
        if page not in {None, 1}:
            raise ImageError(_no_page(name, page, 1))
        if len(head) < 26:
            raise ImageError(unreadable(name))
        width, height, depth, kind = struct.unpack(">IIBB", head[16:26])
        if kind in PNG_COLOURS:
            _grey_png(name, stream)
        return height, width, "uint16" if depth == 16 else "uint8", None, ()
    with open_tiff(name, stream) as tiff:
        found, sample = _find_page(name, tiff, page, offsets)
        height, width, dtype = found.imagelength, found.imagewidth, found.dtype
        depth, is_first = found.samplesperpixel, page in {None, 1}
        if depth > 1 and sample is None and is_colour(found):
            _grey(name, found, sample)
        remarks = []
        if found.photometric == _WHITE_IS_ZERO:
            remarks.append("white is zero, values not inverted")
        if depth > 1 and is_first and len(samples_of(found)) < depth:
            remarks.append("alpha channel, skipped")
        if is_first and len(tiff.pages) > 1 and len(full_pages(tiff)) < len(tiff.pages):
            remarks.append("reduced copies of the image, skipped")
        ends = map(sum, zip(found.dataoffsets, found.databytecounts, strict=True))
        is_cut_off = max(ends, default=0) > size
        pixel_size = _ome_pixel_size(tiff.pages.first.description) if tiff.is_ome else None
    if is_cut_off or dtype is None or 0 in (height, width):
        raise ImageError(unreadable(name))
    return height, width, str(dtype), pixel_size, tuple(remarks)


def decode_tiff(
    source: bytes | Path | BinaryIO, name: str = "The image", most: int = _MAX_PIXELS
) -> NDArray[np.generic]:
    """Return the pixels (H, W) or (H, W, C) of a TIFF, for example a label image.

    ``name`` is what messages call it, unless ``source`` is a path.

    Raises:
        ImageError: missing, no TIFF, cut off, of several pages, or of more than ``most`` pixels.
    """
    if isinstance(source, Path):
        try:
            with plain_file(source).open("rb") as opened:
                return decode_tiff(opened, str(source), most)
        except OSError as error:
            raise ImageError(not_opened(str(source), error)) from error
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with open_tiff(name, stream) as tiff:
        found = _find_page(name, tiff, None, any_samples=True)[0]
        if found.imagelength * found.imagewidth > most:
            raise ImageError(too_large(name, found.imagelength, found.imagewidth))
        return np.asarray(found.asarray())


def _find_page(
    name: str,
    tiff: tifffile.TiffFile,
    page: int | None,
    offsets: Sequence[int] | None = None,
    *,
    any_samples: bool = False,
) -> tuple[tifffile.TiffPage, int | None]:
    """Return a page, and which of its samples, from 0, if it has several that are channels.

    Taking the first of several planes in silence would be a guess about the others. ``offsets``:
    where the pages begin, where that is known.
    """
    first, count = tiff.pages.first, len(offsets or tiff.pages)
    depth = first.samplesperpixel
    if page is None or count == 1:
        # Some programs describe one page and write the pixels of many behind it.
        shape = tiff.series[0].shape if count == 1 and (tiff.is_shaped or tiff.is_imagej) else ()
        if shape and prod(map(int, shape)) > first.imagelength * first.imagewidth * depth:
            raise ImageError(
                f"{name} holds {'x'.join(map(str, shape))} pixels behind one page. "
                "Export each plane as a file of its own."
            )
    if page is None:
        full = full_pages(tiff) if count > 1 else [0]
        found = tiff.pages[full[0]]
        planes = len(full)
        if depth > 1 and not any_samples and isinstance(found, tifffile.TiffPage):
            planes *= 1 if is_colour(found) else len(samples_of(found))
        if planes > 1:
            raise ImageError(
                f"{name} holds {planes} planes. Ingest its folder, which reads stacks, "
                "or export each plane as a file of its own."
            )
        sample = None
    else:
        if page > count * depth:
            raise ImageError(_no_page(name, page, count * depth))
        number, sample = divmod(page - 1, depth)
        if offsets and number > 0:
            tiff.filehandle.seek(offsets[number])
            found = tifffile.TiffPage(tiff, number)
        else:
            found = tiff.pages[number]
        if depth > 1 and isinstance(found, tifffile.TiffPage) and is_colour(found):
            raise ImageError(f"{name} has colours. Export each channel as a grey image of its own.")
    if not isinstance(found, tifffile.TiffPage):
        raise ImageError(unreadable(name))
    return found, sample


def _no_page(name: str, page: int | None, count: int) -> str:
    return f"{name} has no page {page}, only {count}. Ingest it again."


def _shape_text(array: NDArray[np.generic]) -> str:
    return "x".join(map(str, array.shape))


def ome_elements(name: str, description: str) -> list[tuple[str, dict[str, str]]]:
    """Return the elements of an OME-XML in their order: name without namespace, attributes."""
    elements: list[tuple[str, dict[str, str]]] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        elements.append((tag.rpartition(":")[2], attributes))

    def refuse(*_declaration: object) -> None:
        raise ImageError(f"{name} has a DOCTYPE in its OME-XML, which no microscope writes.")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(description, True)
    except expat.ExpatError as error:
        raise ImageError(f"{name} has a damaged OME-XML. Export it again.") from error
    return elements


@lru_cache(maxsize=4)
def _ome_pixel_size(description: str) -> float | None:
    """Return the micrometres per pixel that an OME-XML gives, if it gives one."""
    try:
        elements = ome_elements("the file", description)
    except ImageError:
        return None  # pixels can be read all the same
    names = [
        (values, f"PhysicalSize{axis}")
        for tag, values in elements
        if tag == "Pixels"
        for axis in "XY"
    ]
    return pixel_size((values.get(name), values.get(f"{name}Unit", "um")) for values, name in names)


def pixel_size(lengths: Iterable[tuple[str | None, str]]) -> float | None:
    """Return the one length (text, unit) of all, in micrometres; None where they differ.

    Pixels that are not square count as unknown: one number would make areas wrong.
    """
    sizes = {micrometres(text, unit) for text, unit in lengths}
    return sizes.pop() if len(sizes) == 1 else None


def micrometres(text: str | None, unit: str) -> float | None:
    """Return a length that a microscope wrote, in micrometres; None where it is none.

    Nine digits, so that what two files of one microscope say is the same number.
    """
    try:
        found = float(text or "") * _MICROMETRES[unit.strip().lower()]
    except (ValueError, KeyError):
        return None
    return float(f"{found:.9g}") if isfinite(found) and found > 0 else None


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
                f"The channels differ in shape: {_shape_text(planes[0])} and {_shape_text(plane)} "
                "pixels. Leave the odd channel out, or export the field again."
            )
    if len(planes) == 1:
        return planes[0].astype(np.float32)
    stack: NDArray[Any] = np.stack(planes)
    if projection is Projection.MEDIAN:
        return _median(list(stack)).astype(np.float32)
    if projection is Projection.MEAN:
        return np.asarray(stack.mean(axis=0, dtype=np.float64), np.float32)
    return np.asarray(stack.max(axis=0), np.float32)


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


class ImageFolder:
    """The image files below a folder, found by name. One scan, on construction.

    Links that leave the folder are not followed. A name that occurs more than once is found only
    in a subfolder named like its plate.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserInputError(f"{folder} is not a folder. Give the folder that has the images.")
        self.folder = folder.resolve()
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(path for paths in files_below(self.folder, SUFFIXES) for path in paths):
            self._by_name.setdefault(path.name.lower(), []).append(path)

    def find(self, name: str, plate: str | None = None) -> Path | None:
        """Return the file ``name``, or None. Upper and lower case are the same.

        Of a name with a page ('stack.tiff#page=2') the path has the page too.

        Raises:
            ImageError: several files have it, and none or several lie in a folder of the plate.
        """
        file, page = split_page(name)
        paths = self._by_name.get(file.lower(), [])
        if plate and len(paths) > 1:
            # A parent is called like the plate, or 'BR00117035__2021-05-02T...'.
            parents = [(path, path.relative_to(self.folder).parts[:-1]) for path in paths]
            paths = [
                path
                for path, parts in parents
                if any(part == plate or part.startswith(plate + "__") for part in parts)
            ] or paths
        if len(paths) > 1:
            some = ", ".join(str(path.relative_to(self.folder)) for path in paths[:3])
            raise ImageError(
                f"{name} is in several folders ({some}). Put each plate's images in a folder "
                "named like the plate."
            )
        if not paths or page is None:
            return paths[0] if paths else None
        return paths[0].with_name(page_name(paths[0].name, page))


def files_below(root: Path, suffixes: Collection[str]) -> Iterator[list[Path]]:
    """Yield the files with one of the suffixes, folder by folder, each in the order of its names.

    Links that leave ``root`` are not followed. A folder that cannot be opened has no files for us.
    """
    waiting = [root]
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:
            continue
        files, folders = [], []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif path.suffix.lower() in suffixes and is_inside(entry, root):
                files.append(path)
        yield files
        waiting += reversed(folders)


def is_inside(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether an entry is a file, and no link to one outside ``root``."""
    if not entry.is_symlink():
        return entry.is_file()
    target = Path(entry.path).resolve()
    return target.is_file() and target.is_relative_to(root)
