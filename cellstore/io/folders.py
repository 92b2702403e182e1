"""Folders of image files whose names say everything: no table, no index."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath

from ..errors import ImageError, UserInputError
from .filenames import (
    PATTERN,
    READERS,
    ImageName,
    NamePattern,
    NameReader,
    is_safe_name,
    looks_like_a_mask,
)
from .image_files import SUFFIXES, is_inside, read_stack
from .image_tables import ChannelNames, FileRef, ImageRecord
from .tables import Refusal, RowRefusedError
from .uris import page_name, writable

_SAMPLE = 1000
"""File names that are looked at to recognise the layout of a folder."""

_FIRST = 1
_DATED = re.compile(r"__[0-9]{4}-[0-9]{2}-[0-9]{2}T.*", re.ASCII)
_NO_PLATE = frozenset({"", "image", "images", "tif", "tiff", "tiffs", "png", "raw"})
_ZARR = frozenset({".zgroup", ".zattrs", ".zarray", "zarr.json"})

_FieldKey = tuple[str, int, int, int, int, int]
"""Plate, row, column, site, plane and time point."""


def folder_layouts(folder: Path) -> list[str]:
    """Return the layouts that file names below a folder have, the most frequent first.

    Empty for a folder that cannot be opened, or whose names are of no layout (then a pattern is
    needed). Masks do not count.
    """
    if not folder.is_dir():
        return []
    names = (name for found in _walk(folder.resolve()) for name in found.images)
    counts: Counter[str] = Counter()
    for name in islice(names, _SAMPLE):
        if not looks_like_a_mask(name):
            counts.update(layout for layout, read in READERS.items() if read(name) is not None)
    return [layout for layout, _ in counts.most_common()]


def read_folder(
    folder: Path,
    layout: str,
    *,
    pattern: str | None = None,
    plate: str | None = None,
    channels: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the fields of all images below a folder, each with all channels of its subfolder.

    ``layout`` is one of ``READERS`` or ``pattern-folder``, which needs ``pattern``. The plate is
    ``plate``, else what the names say, else the name of the subfolder. ``channels`` renames by
    number or name. The line of a record or refusal is the position of its (first) file in the
    scan, from 1. Files of several pages become channels and planes, named like
    'stack.tiff#page=2'. What was passed over without being refused is added to ``notes``.

    Raises:
        UnknownNameError: when all is read, and a channel to be renamed was not there.
        UserInputError: no such folder, an unknown layout, no pattern or a wrong one; when all is
            read, and there was no image, or two channels got one name.
    """
    if not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder. Give the folder that has the images.")
    if layout == PATTERN and pattern is None:
        raise UserInputError(
            "Names of this folder need a pattern. Give one with --pattern, like "
            r"'(?P<well>[A-P]\d\d)_s(?P<site>\d+)_w(?P<channel>\d)'."
        )
    if layout != PATTERN and layout not in READERS:
        known = ", ".join([*READERS, PATTERN])
        raise UserInputError(f"{layout!r} is no layout of a folder of images. Known: {known}.")
    read = NamePattern(pattern) if layout == PATTERN and pattern else READERS[layout]
    root = folder.resolve()
    names = ChannelNames(channels)
    ignored: Counter[str] = Counter()
    line = 0
    for found in _walk(root):
        ignored.update(found.ignored)
        if found.problem is not None:
            line += 1
            reason, detail = found.problem
            yield Refusal(line, reason, writable(detail))
        fields: dict[_FieldKey, ImageRecord] = {}
        well: tuple[str | None, int, int] | None = None
        for name in found.images:
            line += 1
            path = found.folder / name
            try:
                parts = _read_name(path, root, read)
                # Names of microscopes begin with the well, so one well at a time is in memory.
                this_well = (parts.plate, parts.row, parts.column)
                if layout != PATTERN and well != this_well:
                    yield from fields.values()
                    well, fields = this_well, {}
                barcode = plate or parts.plate or _plate_of(found.folder)
                if not barcode:
                    detail = f"{found.folder}: name the plate with --plate"
                    raise RowRefusedError("no plate", detail)
                files = _files_of(path, barcode, parts, names)
                for key, file in files:  # all pages of a file or none
                    others = fields[key].files if key in fields else ()
                    if any(file.channel.lower() == other.channel.lower() for other in others):
                        raise RowRefusedError("channel twice", f"{path}: {file.channel}")
            except RowRefusedError as refused:
                reason, detail = refused.args
                yield Refusal(line, reason, writable(detail))
                continue
            for key, file in files:
                empty = ImageRecord(line, barcode, None, *key[1:], parts.core_name, (), None)
                record = fields.get(key, empty)
                in_order = sorted((*record.files, file), key=lambda ref: ref.number or 0)
                fields[key] = record._replace(files=tuple(in_order))
        yield from fields.values()
    if not line:
        raise UserInputError(f"{root} holds no TIFF or PNG images. Give the folder that has them.")
    names.check_used()
    if ignored and notes is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
        notes.append(f"files that are no images, skipped: {kinds}")


def _read_name(path: Path, root: Path, read: NameReader) -> ImageName:
    if writable(str(path)) != str(path):
        # A name that is not UTF-8 could not be found again by what the database keeps of it.
        raise RowRefusedError("name not understood", f"{path}: not UTF-8, rename it")
    if looks_like_a_mask(path.name):
        raise RowRefusedError("looks like a mask", str(path))
    if not is_safe_name(path.name):
        raise RowRefusedError("name not understood", repr(str(path)))
    wants_path = isinstance(read, NamePattern) and read.wants_path
    try:
        parts = read(path.relative_to(root).as_posix() if wants_path else path.name)
    except UserInputError as error:
        raise RowRefusedError("name not understood", f"{path}: {error}") from error
    if parts is None:
        raise RowRefusedError("name not understood", str(path))
    return parts


def _files_of(
    path: Path, plate: str, parts: ImageName, names: ChannelNames
) -> list[tuple[_FieldKey, FileRef]]:
    """Return the channel of a file, or of each page of a stack, and the field that it is of."""
    try:
        stack = read_stack(path)
    except ImageError as error:
        raise RowRefusedError("image cannot be read", str(error)) from error
    field = plate, parts.row, parts.column, parts.site
    own_plane = _FIRST if parts.plane is None else parts.plane
    own_time = _FIRST if parts.time_point is None else parts.time_point
    if stack is None:
        channel = names.name(parts.number, parts.channel or "C1")
        file = FileRef(channel, parts.number, path.name, str(path.parent))
        return [((*field, own_plane, own_time), file)]
    files: list[tuple[_FieldKey, FileRef]] = []
    for page, index, plane, time_point in stack.pages:
        number: int | None = index
        found = stack.channel_names[index - 1] or f"C{index}"
        if len(stack.channel_names) == 1 and parts.channel is not None:
            number, found = parts.number, parts.channel
        name = page_name(path.name, page)
        file = FileRef(names.name(number, found), number, name, str(path.parent))
        key = (
            *field,
            plane if stack.planes > 1 else own_plane,
            time_point if stack.time_points > 1 else own_time,
        )
        files.append((key, file))
    return files


def _plate_of(folder: Path) -> str:
    """Return the plate that a folder is named like; 'Images' is none, so its parent may be."""
    for candidate in (folder, *folder.parents):
        name = _DATED.sub("", candidate.name)
        if name.lower() not in _NO_PLATE:
            return name
    return ""


@dataclass
class _Found:
    """What lies in one folder: names of images in order, and how much of what else."""

    folder: Path
    images: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    problem: tuple[str, str] | None = None


def _walk(root: Path) -> Iterator[_Found]:
    """Yield every folder below ``root``, in the order of their names, one at a time in memory."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        found = _Found(folder)
        folders: list[Path] = []
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
            if any(entry.name in _ZARR for entry in entries):
                detail = f"{folder}: export it to OME-TIFF, or as single TIFFs"
                yield _Found(folder, problem=("OME-Zarr is not read", detail))
                continue
            for entry in entries:
                suffix, hidden = PurePath(entry.name).suffix.lower(), entry.name.startswith(".")
                if entry.is_dir(follow_symlinks=False):
                    folders += [] if hidden else [Path(entry.path)]
                elif suffix in SUFFIXES and not hidden and is_inside(entry, root):
                    found.images.append(entry.name)
                else:
                    kind = "hidden" if hidden else writable(suffix) or "without a suffix"
                    found.ignored[kind] += 1
        except OSError as error:
            detail = f"{folder} ({error.strerror})"
            yield _Found(folder, problem=("folder cannot be opened", detail))
            continue
        found.images.sort()
        waiting += sorted(folders, reverse=True)
        yield found
