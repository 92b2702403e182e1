"""Folders of image files whose names say everything: no table, no index."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple

from ..errors import ImageError, UserInputError
from .filenames import PATTERN, READERS, ImageName, NamePattern, NameReader, looks_like_a_mask
from .image_files import SUFFIXES, Stack, is_inside, is_safe_name, read_stack
from .image_tables import ChannelNames
from .records import FileRef, ImageRecord, Refusal
from .uris import page_name, writable

_SAMPLE = 1000
"""File names that are looked at to tell the layout of a folder."""

_FIRST = 1
_DATED = re.compile(r"__[0-9]{4}-[0-9]{2}-[0-9]{2}T.*", re.ASCII)
_NO_PLATE = frozenset({"", "image", "images", "tif", "tiff", "tiffs", "png", "raw"})
_ZARR = frozenset({".zgroup", ".zattrs", ".zarray", "zarr.json"})


class _Key(NamedTuple):
    plate: str
    row: int
    column: int
    site: int
    plane: int
    time_point: int


@dataclass(slots=True)
class _Field:
    """The files of one field, collected within a folder."""

    line: int
    core_name: str | None
    files: list[FileRef]


class _RefusedError(Exception):
    """A file cannot be used; becomes a ``Refusal``."""


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
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> FolderImages:
    """Return the fields of all images below a folder, each with all channels of its subfolder.

    ``layout`` is one of ``READERS`` or ``pattern-folder``, which needs ``pattern``. The plate is
    ``plate``, else what the names say, else the name of the subfolder. ``channels`` renames by
    number or name. The line of a record or refusal is the place of its (first) file in the scan,
    from 1. Files of several pages become channels and planes, named like 'stack.tiff#page=2'.

    Raises:
        UserInputError: no such folder, an unknown layout, no pattern or a wrong one.
    """
    if not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder. Give the folder that has the images.")
    return FolderImages(folder.resolve(), _reader(layout, pattern), plate, batch, channels)


def _reader(layout: str, pattern: str | None) -> NameReader:
    if layout == PATTERN:
        if pattern is None:
            raise UserInputError(
                "Names of this folder need a pattern. Give one with --pattern, like "
                r"'(?P<well>[A-P]\d\d)_s(?P<site>\d+)_w(?P<channel>\d)'."
            )
        return NamePattern(pattern)
    if layout not in READERS:
        known = ", ".join([*READERS, PATTERN])
        raise UserInputError(f"{layout!r} is no layout of a folder of images. Known: {known}.")
    return READERS[layout]


class FolderImages(Iterator[ImageRecord | Refusal]):
    """The records and refusals of a folder, read while they are asked for.

    ``notes`` says, of what has been read so far, what a user should know.

    Raises:
        UnknownNameError: when all is read, and a channel to be renamed was not there.
        UserInputError: when all is read, and there was no image; or two channels got one name.
    """

    def __init__(
        self,
        folder: Path,
        read: NameReader,
        plate: str | None,
        batch: str | None,
        channels: Mapping[str, str] | None,
    ) -> None:
        self._folder = folder
        self._read_name = read
        self._begins_with_well = not isinstance(read, NamePattern)
        self._plate = plate
        self._batch = batch
        self._names = ChannelNames(channels)
        self._ignored: Counter[str] = Counter()
        self._line = 0
        self._items = self._scan()

    def __next__(self) -> ImageRecord | Refusal:
        """Return the next record or refusal."""
        return next(self._items)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over without being refused."""
        if not self._ignored:
            return ()
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._ignored.most_common(6))
        return (f"passed over, no images: {kinds}",)

    def _scan(self) -> Iterator[ImageRecord | Refusal]:
        for found in _walk(self._folder):
            self._ignored.update(found.ignored)
            if found.problem is not None:
                self._line += 1
                yield self._refusal(*found.problem)
            yield from self._of_folder(found)
        if not self._line:
            raise UserInputError(
                f"{self._folder} holds no TIFF or PNG images. Give the folder that has them."
            )
        self._names.check_used()

    def _of_folder(self, found: _Found) -> Iterator[ImageRecord | Refusal]:
        """Names of microscopes begin with the well, so that one well at a time is in memory."""
        fields: dict[_Key, _Field] = {}
        well: tuple[str | None, int, int] | None = None
        for name in found.images:
            self._line += 1
            try:
                told = self._told(found.folder, name)
                if self._begins_with_well and well != (told.plate, told.row, told.column):
                    yield from self._records(fields)
                    well, fields = (told.plate, told.row, told.column), {}
                self._add(fields, told, found.folder, name)
            except _RefusedError as refused:
                yield self._refusal(*refused.args)
        yield from self._records(fields)

    def _refusal(self, reason: str, detail: str) -> Refusal:
        return Refusal(self._line, reason, writable(detail))

    def _records(self, fields: Mapping[_Key, _Field]) -> Iterator[ImageRecord]:
        for key, field in fields.items():
            yield self._record(key, field)

    def _record(self, key: _Key, field: _Field) -> ImageRecord:
        return ImageRecord(
            line=field.line,
            plate=key.plate,
            batch=self._batch,
            row=key.row,
            column=key.column,
            site=key.site,
            plane=key.plane,
            time_point=key.time_point,
            core_name=field.core_name,
            files=tuple(sorted(field.files, key=lambda ref: ref.number or 0)),
            treatment=None,
        )

    def _add(self, fields: dict[_Key, _Field], told: ImageName, folder: Path, name: str) -> None:
        """Add the file, or each of its pages, to its field; all of them or none."""
        stack = _stack(folder / name)
        if stack is None:
            files = [self._file(told, name, folder)]
        else:
            files = list(self._pages(told, stack, name, folder))
        keys = [self._key(told, page, folder) for page, _ in files]
        taken = zip(keys, files, strict=True)
        if any(key in fields and _has(fields[key], ref) for key, (_, ref) in taken):
            raise _RefusedError("channel twice", f"{folder / name}: {files[0][1].channel}")
        for key, (_, ref) in zip(keys, files, strict=True):
            field = fields.setdefault(key, _Field(self._line, told.core_name, []))
            field.files.append(ref)

    def _told(self, folder: Path, name: str) -> ImageName:
        path = folder / name
        if writable(str(path)) != str(path):
            # A name that is not UTF-8 could not be found again by what the database keeps of it.
            raise _RefusedError("name not understood", f"{path}: not UTF-8, rename it")
        if looks_like_a_mask(name):
            raise _RefusedError("looks like a mask", str(path))
        if not is_safe_name(name):
            raise _RefusedError("name not understood", repr(str(path)))
        try:
            told = self._read_name(self._asked(path))
        except UserInputError as error:
            raise _RefusedError("name not understood", f"{path}: {error}") from error
        if told is None:
            raise _RefusedError("name not understood", str(path))
        return told

    def _asked(self, path: Path) -> str:
        if isinstance(self._read_name, NamePattern) and self._read_name.wants_path:
            return path.relative_to(self._folder).as_posix()
        return path.name

    def _file(self, told: ImageName, name: str, folder: Path) -> tuple[_Page, FileRef]:
        channel = self._names.name(told.number, told.channel or "C1")
        page = _Page(told.plane, told.time_point)
        return page, FileRef(channel, told.number, name, str(folder))

    def _pages(
        self, told: ImageName, stack: Stack, name: str, folder: Path
    ) -> Iterator[tuple[_Page, FileRef]]:
        for page, channel, plane, time_point in stack.pages:
            where = _Page(
                plane if stack.planes > 1 else told.plane,
                time_point if stack.time_points > 1 else told.time_point,
            )
            number: int | None = channel
            found = stack.channel_names[channel - 1] or f"C{channel}"
            if len(stack.channel_names) == 1 and told.channel is not None:
                number, found = told.number, told.channel
            named = self._names.name(number, found)
            yield where, FileRef(named, number, page_name(name, page), str(folder))

    def _key(self, told: ImageName, page: _Page, folder: Path) -> _Key:
        plate = self._plate or told.plate or _plate_of(folder)
        if not plate:
            raise _RefusedError("no plate", f"{folder}: name the plate with --plate")
        plane = _FIRST if page.plane is None else page.plane
        time_point = _FIRST if page.time_point is None else page.time_point
        return _Key(plate, told.row, told.column, told.site, plane, time_point)


class _Page(NamedTuple):
    """Plane and time point of a file or page; None where nothing tells."""

    plane: int | None
    time_point: int | None


def _has(field: _Field, ref: FileRef) -> bool:
    return any(file.channel.lower() == ref.channel.lower() for file in field.files)


def _stack(path: Path) -> Stack | None:
    try:
        return read_stack(path)
    except ImageError as error:
        raise _RefusedError("image cannot be read", str(error)) from error


def _plate_of(folder: Path) -> str:
    """Return the plate that a folder is named like; 'Images' is none, so its parent may be."""
    for place in (folder, *folder.parents):
        name = _DATED.sub("", place.name)
        if name.lower() not in _NO_PLATE:
            return name
    return ""


class _Found(NamedTuple):
    """What lies in one folder: names of images in order, and how much of what else."""

    folder: Path
    images: list[str]
    ignored: Counter[str]
    problem: tuple[str, str] | None = None


def _walk(root: Path) -> Iterator[_Found]:
    """Yield every folder below ``root``, in the order of their names, one at a time in memory."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found, folders = _look(folder, root, entries)
        except OSError as error:
            problem = ("folder cannot be opened", f"{folder} ({error.strerror})")
            yield _Found(folder, [], Counter(), problem)
            continue
        waiting += sorted(folders, reverse=True)
        yield found


def _look(
    folder: Path, root: Path, entries: Iterator[os.DirEntry[str]]
) -> tuple[_Found, list[Path]]:
    images: list[str] = []
    folders: list[Path] = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        if entry.name in _ZARR:
            return _zarr(folder), []
        if entry.is_dir(follow_symlinks=False):
            folders += [] if entry.name.startswith(".") else [Path(entry.path)]
        elif _is_image(entry, root):
            images.append(entry.name)
        else:
            ignored[_kind(entry.name)] += 1
    return _Found(folder, sorted(images), ignored), folders


def _zarr(folder: Path) -> _Found:
    problem = ("OME-Zarr is not read", f"{folder}: export it to OME-TIFF, or as single TIFFs")
    return _Found(folder, [], Counter(), problem)


def _is_image(entry: os.DirEntry[str], root: Path) -> bool:
    return (
        _suffix(entry.name) in SUFFIXES
        and not entry.name.startswith(".")
        and is_inside(entry, root)
    )


def _kind(name: str) -> str:
    if name.startswith("."):
        return "hidden"
    return writable(_suffix(name)) or "without a suffix"


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()
