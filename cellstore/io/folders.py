"""Folders of image files whose names say everything: no table, no index."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..errors import ImageError, UserInputError
from .filenames import (
    ImageName,
    NamePattern,
    NameReader,
    is_safe_name,
    kind_beside_images,
    looks_like_a_mask,
    microscope_name,
)
from .harmony import INDEX_NAME
from .image_files import SUFFIXES, is_inside, micrometres
from .image_tables import ChannelNames, FileRef, ImageRecord
from .ome_zarr import is_ome_zarr, read_ome_zarr
from .stacks import read_stack
from .tables import Refusal, RowRefusedError
from .uris import page_name, split_page, writable

_SAMPLE = 1000
"""File names that are looked at to recognise the layout of a folder."""

_FIRST = 1
_DATED = re.compile(r"__[0-9]{4}-[0-9]{2}-[0-9]{2}T.*", re.ASCII)
_NO_PLATE = re.compile(
    # Also wells, and the folders of time points and planes that MetaXpress makes.
    r"|images?|tiffs?|tif|png|raw|thumbs?|[a-z]{1,2}[0-9]{2}|r[0-9]{1,2}c[0-9]{1,2}"
    r"|(?:timepoint|zstep)_?[0-9]+",
    re.IGNORECASE | re.ASCII,
)
_NUMBERED = re.compile(
    r"(?P<kind>timepoint|zstep)_?(?P<number>[0-9]{1,6})", re.IGNORECASE | re.ASCII
)
_PIXEL = re.compile(rb'(?:Horizontal|Vertical)PixelDimension="([0-9.eE+-]{1,30})"')
_ZARR = frozenset({".zgroup", ".zattrs", ".zarray", "zarr.json"})

_FieldKey = tuple[str, int, int, int, int, int]
"""Plate, row, column, site, plane and time point."""


def has_image_names(folder: Path) -> bool:
    """Whether a folder has files that are named as microscopes name images, or is OME-Zarr.

    Masks do not count. If not, or if it cannot be opened, its names need a pattern.
    """
    looked_at = 0
    for found in _walk(folder.resolve()) if folder.is_dir() else ():
        names = [name for name in found.images[:_SAMPLE] if not looks_like_a_mask(name)]
        if found.is_plate or any(map(microscope_name, names)):
            return True
        looked_at += len(found.images)
        if looked_at > _SAMPLE:
            break
    return False


def first_image(folder: Path) -> str | None:
    """Return the name of an image below a folder."""
    return next((name for found in _walk(folder.resolve()) for name in found.images), None)


def read_folder(
    folder: Path,
    *,
    pattern: str | None = None,
    plate: str | None = None,
    channels: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the fields of all images below a folder, each with all channels of its subfolder.

    File names are read by ``pattern``, else as those of the known microscopes. The plate is
    ``plate``, else what the names say, else the name of the subfolder. ``channels`` renames by
    number or name. The line of a record or refusal is the position of its (first) file in the
    scan, from 1. Files of several pages become channels and planes, named like
    'stack.tiff#page=2'. What was passed over without being refused is added to ``notes``.

    Raises:
        UnknownNameError: when all is read, and a channel to be renamed was not there.
        UserInputError: no such folder, or a wrong pattern; when all is read, and there was no
            image, or two channels got one name.
    """
    if not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder. Give the folder that has the images.")
    read: NameReader = NamePattern(pattern) if pattern else microscope_name
    root = folder.resolve()
    names = ChannelNames(channels)
    ignored: Counter[str] = Counter()
    indexes: list[str] = []
    skipped: Counter[str] = Counter()
    line = 0
    for found in _walk(root):
        ignored.update(found.ignored)
        indexes += found.indexes
        skipped.update(found.skipped)
        if found.problem is not None:
            line += 1
            reason, detail = found.problem
            yield Refusal(line, reason, writable(detail))
        if found.is_plate:
            for item in read_ome_zarr(found.folder, plate, names, line):
                line = max(line, item.line)
                yield item
        fields: dict[_FieldKey, ImageRecord] = {}
        lines: dict[FileRef, int] = {}
        well: tuple[str | None, int, int] | None = None
        for name in found.images:
            path = found.folder / name
            if kind := kind_beside_images(found.folder.name, name):
                skipped[kind] += 1
                continue
            line += 1
            try:
                parts = _read_name(path, root, read)
                # Names of microscopes begin with the well, so one well at a time is in memory.
                this_well = (parts.plate, parts.row, parts.column)
                if pattern is None and well != this_well:
                    yield from _complete(fields, lines)
                    well, fields, lines = this_well, {}, {}
                barcode = plate or parts.plate or _plate_of(found.folder)
                if not barcode:
                    detail = f"{found.folder}: name the plate with --plate"
                    raise RowRefusedError("no plate", detail)
                files = _files_of(path, barcode, parts, names)
            except RowRefusedError as refused:
                reason, detail = refused.args
                yield Refusal(line, reason, writable(detail))
                continue
            for key, file in files:
                lines[file] = line
                empty = ImageRecord(
                    line, barcode, None, *key[1:], parts.core_name, (), None, found.pixel_size
                )
                record = fields.get(key, empty)
                fields[key] = record._replace(files=(*record.files, file))
        yield from _complete(fields, lines)
    if not line:
        raise UserInputError(f"{root} holds no TIFF or PNG images. Give the folder that has them.")
    names.check_used()
    if notes is None:
        return
    notes += [f"{kind}, skipped: {count:,}" for kind, count in skipped.items() if count]
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
        notes.append(f"files that are no images, skipped: {kinds}")
    if indexes:
        notes.append(
            f"an index of Harmony was not read: {', '.join(indexes[:3])}. It names the channels; "
            "to read it, ingest the folder that it is in."
        )


def _complete(
    fields: Mapping[_FieldKey, ImageRecord], lines: Mapping[FileRef, int]
) -> Iterator[ImageRecord | Refusal]:
    """Yield the fields that are complete, each with one row of the account.

    Files that claim the same channel of a field are refused, all of them: which one is meant, its
    name does not say. Of a file with several pages, all go.
    """
    refused: dict[tuple[str, str | None], tuple[int, str]] = {}
    for record in fields.values():
        claims: dict[str, list[FileRef]] = {}
        for file in record.files:
            claims.setdefault(file.channel.lower(), []).append(file)
        for some in claims.values():
            if len(some) > 1:
                both = " and ".join(file.name for file in some[:3])
                for file in some:
                    key = split_page(file.name)[0], file.folder
                    detail = f"{file.folder}: {both} are both {file.channel}"
                    refused[key] = lines[file], detail
    for line, detail in sorted(refused.values()):
        yield Refusal(line, "channel twice", writable(detail))
    for record in fields.values():
        files = [
            file for file in record.files if (split_page(file.name)[0], file.folder) not in refused
        ]
        if files:
            files.sort(key=lambda file: file.number or 0)
            yield record._replace(line=min(lines[file] for file in files), files=tuple(files))


def _read_name(path: Path, root: Path, read: NameReader) -> ImageName:
    if writable(str(path)) != str(path):
        # A name that is not UTF-8 could not be found again by what the database keeps of it.
        raise RowRefusedError("name not understood", f"{path}: not UTF-8, rename it")
    if looks_like_a_mask(path.name):
        raise RowRefusedError("looks like a mask", str(path))
    if not is_safe_name(path.name):
        raise RowRefusedError("name not understood", repr(str(path)))
    pattern = read if isinstance(read, NamePattern) else None
    name = path.relative_to(root).as_posix() if pattern and pattern.wants_path else path.name
    try:
        parts = read(name)
    except UserInputError as error:
        raise RowRefusedError("name not understood", f"{path}: {error}") from error
    if parts is None:
        why = pattern.explain(name) if pattern else "no microscope names files so. Use --pattern."
        raise RowRefusedError("name not understood", f"{path}: {why}")
    for folder in path.parents:  # MetaXpress has a folder for each time point and plane
        match = _NUMBERED.fullmatch(folder.name)
        if match is None:
            break
        if match[1].lower() == "zstep" and parts.plane is None:
            parts = parts._replace(plane=int(match[2]))
        elif parts.time_point is None:
            parts = parts._replace(time_point=int(match[2]))
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
    planes, time_points = (max(numbers) for numbers in list(zip(*stack.pages, strict=True))[2:])
    files: list[tuple[_FieldKey, FileRef]] = []
    for page, index, plane, time_point in stack.pages:
        number: int | None = index
        found = stack.channel_names[index - 1] or f"C{index}"
        if parts.channel is not None and 1 in {len(stack.channel_names), len(stack.pages)}:
            number, found = parts.number, parts.channel
        name = page_name(path.name, page)
        file = FileRef(names.name(number, found), number, name, str(path.parent))
        key = (
            *field,
            plane if planes > 1 else own_plane,
            time_point if time_points > 1 else own_time,
        )
        files.append((key, file))
    return files


def _plate_of(folder: Path) -> str:
    """Return the plate that a folder is named like; 'Images' is none, so its parent may be."""
    for candidate in (folder, *folder.parents):
        name = _DATED.sub("", candidate.name)
        if not _NO_PLATE.fullmatch(name):
            return name
    return ""


@dataclass
class _Found:
    """What lies in one folder: names of images in order, and how much of what else."""

    folder: Path
    images: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    indexes: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    pixel_size: float | None = None
    is_plate: bool = False
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
                found.is_plate = is_ome_zarr(folder)
                if not found.is_plate:
                    detail = f"{folder}: export it to OME-TIFF, or as single TIFFs"
                    found.problem = "Zarr that is no plate of OME-Zarr", detail
                yield found
                continue
            for entry in entries:
                suffix, hidden = PurePath(entry.name).suffix.lower(), entry.name.startswith(".")
                if entry.is_dir(follow_symlinks=False):
                    folders += [] if hidden else [Path(entry.path)]
                elif suffix in SUFFIXES and not hidden and is_inside(entry, root):
                    found.images.append(entry.name)
                else:
                    if INDEX_NAME.fullmatch(entry.name):
                        found.indexes.append(writable(entry.path))
                    elif suffix == ".mrf":  # Yokogawa's account of the measurement
                        with Path(entry.path).open("rb") as stream:
                            sizes = {size for line in stream for size in _PIXEL.findall(line)}
                        if len(sizes) == 1:
                            found.pixel_size = micrometres(sizes.pop().decode(), "um")
                    elif suffix == ".mlf":
                        with Path(entry.path).open("rb") as stream:
                            count = sum(line.count(b'Type="ERR"') for line in stream)
                        found.skipped.update({"images that could not be taken (.mlf)": count})
                    kind = "hidden" if hidden else writable(suffix) or "without a suffix"
                    found.ignored[kind] += 1
        except OSError as error:
            detail = f"{folder} ({error.strerror})"
            yield _Found(folder, problem=("folder cannot be opened", detail))
            continue
        found.images.sort()
        waiting += sorted(folders, reverse=True)
        yield found
