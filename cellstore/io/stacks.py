"""What the pages of a TIFF are: channels, planes, time points, as the file itself says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import tifffile

from ..errors import ImageError
from .filenames import whole_number
from .image_files import (
    PNG_COLOURS,
    PNG_MAGIC,
    full_pages,
    is_colour,
    ome_elements,
    open_tiff,
    read_plane,
    samples_of,
    tiff_pages,
    unreadable,
)
from .uris import FileStat, local_stat, not_opened, plain_file

_PAGE_NAME = 285
_NUMBERED = re.compile(r"(\D*)(\d+)(.*)", re.ASCII | re.DOTALL)
_CHANNEL_WORDS = {"c", "ch", "chan", "channel", "w", "wavelength"}
_TIME_WORDS = {"t", "time", "timepoint", "time point", "frame"}
_AXES = "CZT"
_IMAGEJ = {"C": "channels", "Z": "slices", "T": "frames"}


class Stack(NamedTuple):
    """The pages of a file, and the names of its channels where it gives them.

    Of each page: its number, its channel, plane and time point; all counted from 1. Each sample of
    a page counts: in a file with two, the third page is the first of the second.
    """

    pages: tuple[tuple[int, int, int, int], ...]
    channel_names: tuple[str | None, ...]


def read_stack(path: Path) -> Stack | None:
    """Return what the planes of a TIFF are; None for a file of one plane, and for what is no TIFF.

    OME-XML, the axes that tifffile writes and ImageJ's description tell channels, planes and time
    points apart, and so do names of pages; pages of other TIFFs are planes. Several samples of a
    pixel are channels, unless the file says that they are alpha or colours. Pages that are reduced
    copies are passed over.

    Raises:
        ImageError: the file cannot be opened or is damaged, its pages differ or are of colours, or
            its description does not fit them or is in another file, which is missing.
    """
    try:
        with plain_file(path).open("rb") as stream:
            head = stream.read(26)
            if head.startswith(PNG_MAGIC) and len(head) == 26 and head[25] in PNG_COLOURS:
                read_plane(path)  # refuses real colours
            stream.seek(0)
            pages = list(islice(tiff_pages(stream), 2))
            is_plain = not pages or (len(pages) == 1 and pages[0][1] == 1)  # or no TIFF
            if is_plain and not path.name.lower().endswith((".ome.tif", ".ome.tiff")):
                return None
            stream.seek(0)
            with open_tiff(str(path), stream) as tiff:
                depth = tiff.pages.first.samplesperpixel
                if not is_plain and len(tiff.pages) == 1 and depth == 1:
                    # Its first page names a second one, at an offset that is none.
                    raise ImageError(unreadable(str(path)))
                first = tiff.pages.first
                if len(full_pages(tiff)) > 1 or "BinaryOnly" in first.description:
                    return _read_stack(path, tiff)
                if is_colour(first):
                    read_plane(path)  # refuses real colours
                    return None
                if len(samples_of(first)) > 1:
                    return _read_stack(path, tiff)
                if tiff.is_ome and "FileName=" in first.description:
                    with suppress(ImageError):  # one plane can be read whatever is said of others
                        return _read_stack(path, tiff)
                return None
    except OSError as error:
        raise ImageError(not_opened(str(path), error)) from error


class _Axes(NamedTuple):
    """What a description says: axes (C, Z, T, S for samples), the fastest first, and their sizes.

    ``names`` are those of the channels; ``planes`` says which plane of the axes, from 0, each page
    is, in which a page has all of its samples. ``is_part``: other files have the other planes.
    """

    order: str
    sizes: dict[str, int]
    names: Sequence[str | None] = ()
    planes: dict[int, int] | None = None
    is_part: bool = False


def _read_stack(path: Path, tiff: tifffile.TiffFile) -> Stack | None:
    name, first = path.name, tiff.pages.first
    full, depth, samples = full_pages(tiff), first.samplesperpixel, samples_of(first)
    count = len(full)
    description = first.description if tiff.is_ome else ""
    kinds = {(page.shape, page.dtype) for page in (tiff.pages[number] for number in full)}
    if len(kinds) > 1 or is_colour(first) or len(first.shape) != (2 if depth == 1 else 3):
        raise ImageError(
            f"{name} has pages that are not grey images of one shape. "
            "Export each channel as a file of its own."
        )
    axes = None
    if tiff.is_ome:
        axes = _read_ome(path, description, count, depth)
    elif tiff.is_shaped:
        axes = _read_shaped(name, tiff.shaped_metadata or ())
    elif tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        sizes = {axis: int(metadata.get(key, 1)) for axis, key in _IMAGEJ.items()}
        # Programs that write plain stacks for ImageJ give only the number of images.
        axes = _Axes(_AXES, sizes) if prod(sizes.values()) > 1 else None
    if axes is None:
        texts = [
            page.tags.valueof(_PAGE_NAME)
            for page in (tiff.pages[number] for number in full)
            if isinstance(page, tifffile.TiffPage)
        ]
        axes = _read_page_names(texts) or _Axes(_AXES, {"Z": count})
    order, sizes, names, planes, is_part = axes
    if count == 1 and len(samples) == 1 and not is_part:
        return None
    if planes is None:
        planes = dict(enumerate(range(count)))
        if depth > 1 and prod(sizes.values()) == count:
            order, sizes = "S" + order, {"S": depth, **sizes}
    elif depth > 1:
        order, sizes = "S" + order, {"S": depth, **sizes}
    total = prod(sizes.values())
    if (
        sorted(planes) != list(range(count))
        or len(set(planes.values())) < count
        or max(planes.values()) * depth >= total
        or not (is_part or total == count * depth)
    ):
        described = " x ".join(f"{sizes[axis]} {axis}" for axis in order if axis in sizes)
        raise ImageError(
            f"{name} has {count} pages, and its description tells of {described}. "
            "Export it again, as one file."
        )
    found: list[tuple[int, int, int, int]] = []
    # Where the samples are an axis of their own, alpha is none of its channels.
    kept = samples if depth > 1 and "S" in sizes else list(range(sizes.get("S", 1)))
    for position, number in enumerate(full):
        for sample in samples:
            rest, index = planes[position] * depth + sample, {}
            for axis in order:  # the first axis changes fastest
                rest, index[axis] = divmod(rest, sizes.get(axis, 1))
            channel = index.get("C", 0) * len(kept) + kept.index(index.get("S", 0))
            where = channel + 1, index.get("Z", 0) + 1, index.get("T", 0) + 1
            found.append((number * depth + sample + 1, *where))
    channels = sizes.get("C", 1) * len(kept)
    if len(kept) > 1 and len(names) != channels:
        names = ()
    return Stack(tuple(found), tuple(([*names] + [None] * channels)[:channels]))


def _read_shaped(name: str, metadata: Sequence[dict[str, Any]]) -> _Axes | None:
    """Return what tifffile's own description (a JSON with ``shape`` and ``axes``) says, if it does.

    An axis of another name, where there is none of planes, is that of the planes.
    """
    axes, shape = (metadata[0].get(key) for key in ("axes", "shape")) if metadata else (None, None)
    if len(metadata) != 1 or not axes or not shape or len(axes) != len(shape):
        return None
    sizes: dict[str, int] = {}
    for axis, size in zip(axes.upper(), shape, strict=True):
        if axis in "YX" or (size == 1 and axis not in "CZTS"):
            continue
        letter = axis if axis in "CZTS" or "Z" in axes.upper() else "Z"
        if letter in sizes or letter not in "CZTS":
            raise ImageError(
                f"{name} names its axes {axes!r}, and cellstore reads C, Z and T "
                "only. Export it with these."
            )
        sizes[letter] = int(size)
    channel = metadata[0].get("Channel")
    names = channel.get("Name") if isinstance(channel, dict) else None
    texts = [str(text) for text in names] if isinstance(names, list | tuple) else []
    return _Axes("".join(reversed(sizes)), sizes, texts)


def _read_page_names(texts: Sequence[object]) -> _Axes | None:
    """Return what the names of pages say: channels, unless they only count planes or times."""
    names = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    distinct = list(dict.fromkeys(names))
    if len(names) < len(texts) or len(distinct) == 1:
        return None
    matches = [match for name in names if (match := _NUMBERED.match(name))]
    numbers = [int(match[2]) for match in matches]
    if (
        len(matches) == len(names) == len(distinct)
        and len({(match[1], match[3]) for match in matches}) == 1
        and numbers == list(range(numbers[0], numbers[0] + len(names)))
        and numbers[0] in {0, 1}
    ):
        word = matches[0][1].strip(" _=:#-").lower()
        axis = "C" if word in _CHANNEL_WORDS else "T" if word in _TIME_WORDS else "Z"
        return _Axes(axis, {axis: len(names)}, names if axis == "C" else ())
    if any(names.count(name) * len(distinct) != len(names) for name in distinct):
        return None
    seen: Counter[str] = Counter()
    planes = {}
    for position, name in enumerate(names):
        planes[position] = seen[name] * len(distinct) + distinct.index(name)
        seen[name] += 1
    return _Axes("CZ", {"C": len(distinct), "Z": len(names) // len(distinct)}, distinct, planes)


_OmeImage: TypeAlias = tuple[dict[str, str], list[str | None], list[dict[str, str]]]
"""An image of an OME-XML: its attributes, names of its channels, blocks of its planes."""


def _described(
    name: str, description: str
) -> tuple[list[_OmeImage], dict[str | None, list[int]], str | None]:
    """Return the images that an OME-XML describes, and which of them have planes in each file.

    A file None: it does not say which. The last is the name of the file that says all this instead.
    """
    images: list[_OmeImage] = []
    by_file: dict[str | None, list[int]] = {}
    for tag, values in ome_elements(name, description):
        if tag == "BinaryOnly":
            return [], {}, values.get("MetadataFile", "")
        if tag == "Image":
            images.append(({}, [], []))
        elif images and tag == "Pixels":
            images[-1][0].update(values)
        elif images and tag == "Channel":
            images[-1][1].append(values.get("Name", "").strip() or None)
        elif images and tag == "TiffData":
            images[-1][2].append(values)
        elif images and tag == "UUID" and images[-1][2] and "FileName" in values:
            images[-1][2][-1]["FileName"] = values["FileName"]
    for number, (_, _, blocks) in enumerate(images):
        for file in {block.get("FileName") for block in blocks} or {None}:
            by_file.setdefault(file, []).append(number)
    return images, by_file, None


@lru_cache(maxsize=2)
def _read_companion(path: Path, _state: FileStat) -> Any:
    """Read the file that describes all files of a plate, once for all of them."""
    return _described(path.name, path.read_text(encoding="utf-8"))


def _read_ome(path: Path, description: str, count: int, depth: int) -> _Axes:
    """Return what an OME-XML says of the ``count`` pages of its file.

    It may be in another file (``*.companion.ome``), and about several files of which this is one.
    """
    name = path.name
    images, by_file, told_in = _described(name, description)
    if told_in is not None:
        companion = path.with_name(told_in.rpartition("/")[2] or "?")
        try:
            images, by_file, _ = _read_companion(companion, local_stat(companion))
        except (OSError, ValueError) as error:
            raise ImageError(
                f"{name} is described in {companion.name}, which is not beside it or cannot be "
                "read. Copy it there."
            ) from error
    its_name = name
    if name not in by_file and None not in by_file and by_file:
        if len(by_file) > 1:
            some = sorted(filter(None, islice(by_file, 100)))[:3]
            raise ImageError(
                f"{name} is none of the files that its OME-XML describes: {', '.join(some)}. "
                "Give it the name that it had."
            )
        its_name = next(iter(by_file)) or name  # one file may have a new name
    numbers = {*by_file.get(its_name, ()), *by_file.get(None, ())}
    own = [images[number] for number in sorted(numbers)]
    if len(own) != 1:
        raise ImageError(
            f"{name} holds {len(own)} images (series). Export each as a file of its own."
        )
    pixels, names, blocks = own[0]
    order = pixels.get("DimensionOrder", "XYCZT")[2:]
    if sorted(order) != sorted(_AXES):
        raise ImageError(f"{name} has the DimensionOrder {order[:9]!r}. Export it again.")
    sizes = {axis: _count(name, pixels.get(f"Size{axis}", "1")) for axis in _AXES}
    sizes["C"] = max(1, sizes["C"] // depth)  # it counts the samples of each page, too
    mine = [block for block in blocks if block.get("FileName", its_name) == its_name] or [{}]

    def planes() -> Iterator[tuple[int, int]]:
        for block in mine:
            start = _count(name, block.get("IFD", "0"), least=0)
            plane, step = 0, 1
            for axis in order:
                plane += step * _count(name, block.get(f"First{axis}", "0"), least=0)
                step *= sizes[axis]
            default = "1" if "IFD" in block else str(count)
            for offset in range(_count(name, block.get("PlaneCount", default))):
                yield start + offset, plane + offset

    # A description may claim any number of planes; one too many is enough to see that.
    is_part = len(mine) < len(blocks)
    return _Axes(order, sizes, names, dict(islice(planes(), count + 1)), is_part)


def _count(name: str, text: str, least: int = 1) -> int:
    number = whole_number(text)
    if number is None or number < least:
        raise ImageError(f"{name} has the number {text[:20]!r} in its OME-XML. Export it again.")
    return number
