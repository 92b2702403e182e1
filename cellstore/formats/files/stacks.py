"""Image files of several pages: which channel, plane and time point each page is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import tifffile

from ...errors import ImageError
from .pixels import has_more_pages, unreadable

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
