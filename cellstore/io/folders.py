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
from .image_files import SUFFIXES, Stack, is_inside, read_stack
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

_Fields = dict[_FieldKey, ImageRecord]
"""Fields with the files found so far."""


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
    return _FolderReader(folder.resolve(), read, plate, channels).records(notes)


class _FolderReader:
    """Reads the names of the images below ``root`` with ``read``."""

    def __init__(
        self, root: Path, read: NameReader, plate: str | None, channels: Mapping[str, str] | None
    ) -> None:
        self._root, self._read, self._plate = root, read, plate
        self._names = ChannelNames(channels)

    def records(self, notes: list[str] | None) -> Iterator[ImageRecord | Refusal]:
        """Yield the fields, folder by folder.

        Names of microscopes begin with the well, so that one well at a time is in memory.
        """
        ignored: Counter[str] = Counter()
        line = 0
        for found in _walk(self._root):
            ignored.update(found.ignored)
            if found.problem is not None:
                line += 1
                reason, detail = found.problem
                yield Refusal(line, reason, writable(detail))
            fields: _Fields = {}
            well: tuple[str | None, int, int] | None = None
            for name in found.images:
                line += 1
                try:
                    parts = self._parse(found.folder / name)
                    this_well = (parts.plate, parts.row, parts.column)
                    if not isinstance(self._read, NamePattern) and well != this_well:
                        yield from fields.values()
                        well, fields = this_well, {}
                    self._add(fields, line, found.folder, name, parts)
                except RowRefusedError as refused:
                    reason, detail = refused.args
                    yield Refusal(line, reason, writable(detail))
            yield from fields.values()
        if not line:
            raise UserInputError(
                f"{self._root} holds no TIFF or PNG images. Give the folder that has them."
            )
        self._names.check_used()
        if ignored and notes is not None:
            kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
            notes.append(f"files that are no images, skipped: {kinds}")

    def _parse(self, path: Path) -> ImageName:
        if writable(str(path)) != str(path):
            # A name that is not UTF-8 could not be found again by what the database keeps of it.
            raise RowRefusedError("name not understood", f"{path}: not UTF-8, rename it")
        if looks_like_a_mask(path.name):
            raise RowRefusedError("looks like a mask", str(path))
        if not is_safe_name(path.name):
            raise RowRefusedError("name not understood", repr(str(path)))
        text = path.name
        if isinstance(self._read, NamePattern) and self._read.wants_path:
            text = path.relative_to(self._root).as_posix()
        try:
            parts = self._read(text)
        except UserInputError as error:
            raise RowRefusedError("name not understood", f"{path}: {error}") from error
        if parts is None:
            raise RowRefusedError("name not understood", str(path))
        return parts

    def _add(self, fields: _Fields, line: int, folder: Path, name: str, parts: ImageName) -> None:
        """Add the file, or each of its pages, to its field; all of them or none."""
        plate = self._plate or parts.plate or _plate_of(folder)
        if not plate:
            raise RowRefusedError("no plate", f"{folder}: name the plate with --plate")
        try:
            stack = read_stack(folder / name)
        except ImageError as error:
            raise RowRefusedError("image cannot be read", str(error)) from error
        files: list[tuple[_FieldKey, FileRef]] = []
        for position, file in self._pages(stack, folder, name, parts):
            plane, time_point = (_FIRST if number is None else number for number in position)
            key = (plate, parts.row, parts.column, parts.site, plane, time_point)
            known = fields[key].files if key in fields else ()
            if any(file.channel.lower() == other.channel.lower() for other in known):
                raise RowRefusedError("channel twice", f"{folder / name}: {file.channel}")
            files.append((key, file))
        for key, file in files:
            empty = ImageRecord(line, plate, None, *key[1:], parts.core_name, (), None)
            field = fields.get(key, empty)
            in_order = sorted((*field.files, file), key=lambda ref: ref.number or 0)
            fields[key] = field._replace(files=tuple(in_order))

    def _pages(
        self, stack: Stack | None, folder: Path, name: str, parts: ImageName
    ) -> Iterator[tuple[tuple[int | None, int | None], FileRef]]:
        """Yield (plane, time point) and channel of a file, or of each page of a stack."""
        if stack is None:
            channel = self._names.name(parts.number, parts.channel or "C1")
            file = FileRef(channel, parts.number, name, str(folder))
            yield (parts.plane, parts.time_point), file
            return
        for page, number, plane, time_point in stack.pages:
            named: int | None = number
            found = stack.channel_names[number - 1] or f"C{number}"
            if len(stack.channel_names) == 1 and parts.channel is not None:
                named, found = parts.number, parts.channel
            channel = self._names.name(named, found)
            where = (
                plane if stack.planes > 1 else parts.plane,
                time_point if stack.time_points > 1 else parts.time_point,
            )
            yield where, FileRef(channel, named, page_name(name, page), str(folder))


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
