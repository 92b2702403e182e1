"""What TIFF and PNG files hold: their headers, and the pixels of one grey page."""

from __future__ import annotations

import logging
import os
import struct
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from ...errors import ImageError

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
            found = _page(name, tiff, page)
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
            found = _page(name, tiff, page)
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


def _page(name: str, tiff: tifffile.TiffFile, page: int | None) -> tifffile.TiffPage:
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
