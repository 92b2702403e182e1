"""What the two shapes of image tables have in common: one data row is one field of view."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ...errors import UnknownNameError, UserInputError
from ..files.images import is_safe_name
from ..files.places import page_name
from ..names import (
    PLANE_COLUMNS,
    TIME_COLUMNS,
    PhenixName,
    core_file_name,
    format_well,
    parse_well,
)
from ..records import LONGEST, FileRef, ImageRecord, Refusal, TreatmentRecord
from ..text.tables import TableRow, TextTable, cell_text
from ..treatments.cells import TREATMENT_COLUMNS, treatment_of
from .columns import Cells, Channel, ColumnGroup, RowRefusedError, image_channels

_FIRST = 1
_PATH_LENGTH = 2_000
"""What the index of a database can hold."""

_REMEMBERED = 16_384
"""Fields of view kept worked out: they come back with every plate (1,536 wells x 9 sites)."""

_new = tuple.__new__
"""Makes a named tuple from a tuple in half the time: there are millions."""

_PLATE, _BATCH = "Metadata_Plate", "Metadata_Batch"
_WELL = ("Metadata_Well", "Metadata_Row", "Metadata_Col", "Metadata_Column")
_SITE = ("Metadata_Site", "Metadata_FieldID")


_NamedFile = tuple[str, int | None, str]
"""Channel name, channel number and file name: a ``FileRef`` that lacks its folder."""


class _Place(NamedTuple):
    """Where a field of view is, as its columns say it; None where they do not."""

    well: tuple[int, int] | None
    site: int | None
    plane: int | None
    time_point: int | None


class _Field(NamedTuple):
    """What a row says but for its plate, folders and treatment.

    ``place`` is row, column, site, plane, time point and core file name; ``files`` has the place
    of each file's channel among the channels of the table.
    """

    place: tuple[int, int, int, int, int, str | None]
    files: tuple[tuple[int, _NamedFile], ...]


@dataclass(frozen=True, slots=True)
class ImageTable:
    """How to read one table of images.

    ``plate`` and ``batch`` are used where the table does not say; rows of another plate than
    ``plate`` are refused. ``needs_treatment``: a row without one is refused. ``numbers`` renames
    the channel of files with that Phenix channel number.
    """

    table: TextTable
    channels: tuple[Channel, ...]
    plate: str | None
    batch: str | None
    needs_treatment: bool
    numbers: Mapping[int, str]

    def records(self) -> Iterator[ImageRecord | Refusal]:
        """Yield one record or refusal per data row, in the order of the file."""
        read = _RowReader(self).read
        for row in self.table.rows():
            yield row if isinstance(row, Refusal) else read(row)


class _RowReader:
    """Turns rows into records. Cells that come again are worked out once, in bounded memory."""

    def __init__(self, images: ImageTable) -> None:
        self._images = images
        table, channels = images.table, images.channels
        files = [channel.file for channel in channels]
        folders = [channel.folder for channel in channels if channel.folder]
        self._in_plate = ColumnGroup(table, [_PLATE, _BATCH, *folders])
        place = [*_WELL, *_SITE, *PLANE_COLUMNS, *TIME_COLUMNS]
        self._in_place = ColumnGroup(table, place)
        parts = [part for channel in channels for part in (channel.frame, channel.series) if part]
        self._in_field = ColumnGroup(table, [*place, *files, *parts])
        self._has_parts = bool(parts)
        self._in_treatment = ColumnGroup(table, TREATMENT_COLUMNS)
        remember = lru_cache(maxsize=_REMEMBERED)
        self._plate_of = remember(self._plate)
        self._place_of = remember(self._place)
        self._field_of = remember(self._field)
        self._treatment_of = remember(self._treatment)

    def read(self, row: TableRow) -> ImageRecord | Refusal:
        """Return the image of a row, or why it has none."""
        line, cells = row
        try:
            field = self._field_of(self._in_field.pick(cells))
            plate, batch, folders = self._plate_of(self._in_plate.pick(cells))
            treatment = self._treatment_of(self._in_treatment.pick(cells))
        except RowRefusedError as refused:
            return Refusal(line, refused.reason, refused.detail)
        files = tuple([_new(FileRef, (*named, folders[at])) for at, named in field.files])
        return _new(ImageRecord, (line, plate, batch, *field.place, files, treatment))

    def _plate(self, picked: tuple[str, ...]) -> tuple[str, str | None, tuple[str | None, ...]]:
        """Return plate, batch and the folder of each channel, which is that of the plate."""
        cells = self._in_plate.named(picked)
        written, wanted = cells.get(_PLATE), self._images.plate
        if written and wanted and written != wanted:
            raise RowRefusedError("another plate", f"plate {written}, not {wanted}")
        plate = written or wanted
        if plate is None:
            raise RowRefusedError("no plate", f"{_PLATE} is empty")
        batch, folders = cells.get(_BATCH) or self._images.batch, self._folders(cells)
        _check_length(LONGEST, plate, batch)
        _check_length(_PATH_LENGTH, *folders)
        return plate, batch, folders

    def _field(self, picked: tuple[str, ...]) -> _Field:
        written = self._place_of(picked[: len(self._in_place)])
        at = len(self._in_place)
        files, names = self._files(picked[at : at + len(self._images.channels)])
        if self._has_parts:
            files = self._pages(self._in_field.named(picked), files)
        name = _common_name(names)
        place = (
            *_well(written.well, name),
            _site(written.site, name),
            _first_known(written.plane, name.plane if name else None),
            _first_known(written.time_point, name.time_point if name else None),
            name.core if name else None,
        )
        return _Field(place, tuple(files))

    def _place(self, picked: tuple[str, ...]) -> _Place:
        cells = self._in_place.named(picked)
        return _Place(
            _written_well(cells),
            cells.whole(*_SITE),
            cells.whole(*PLANE_COLUMNS),
            cells.whole(*TIME_COLUMNS),
        )

    def _files(
        self, picked: tuple[str, ...]
    ) -> tuple[list[tuple[int, _NamedFile]], list[PhenixName]]:
        """Return the files of a row, and what those with a Phenix name say."""
        files: list[tuple[int, _NamedFile]] = []
        names: list[PhenixName] = []
        for at, channel in enumerate(self._images.channels):
            text = cell_text(picked, at)
            if text is None:
                continue
            _check_length(LONGEST, text)
            if not is_safe_name(text):
                raise RowRefusedError("file name with a folder in it", f"{channel.name}: {text!r}")
            name = core_file_name(text)
            if name is None:
                files.append((at, (channel.name, None, text)))
                continue
            names.append(name)
            files.append((at, (self._channel_name(channel, name.channel), name.channel, text)))
        _check_files([named[0] for _, named in files])
        return files, names

    def _pages(
        self, cells: Cells, files: Sequence[tuple[int, _NamedFile]]
    ) -> list[tuple[int, _NamedFile]]:
        """Return the files with their pages, in a row or channel that has others than the first."""
        columns = [self._images.channels[at] for at, _ in files]
        frames = [_frame(cells, column) for column in columns]
        several = any(frames)
        return [
            (at, _on_page(named, frame) if several or column.paged else named)
            for (at, named), column, frame in zip(files, columns, frames, strict=True)
        ]

    def _channel_name(self, channel: Channel, number: int | None) -> str:
        return channel.name if number is None else self._images.numbers.get(number, channel.name)

    def _folders(self, cells: Cells) -> tuple[str | None, ...]:
        return tuple(
            cells.get(channel.folder) if channel.folder else None
            for channel in self._images.channels
        )

    def _treatment(self, picked: tuple[str, ...]) -> TreatmentRecord | None:
        treatment = treatment_of(self._in_treatment.named(picked).get)
        if treatment is None and self._images.needs_treatment:
            raise RowRefusedError("no treatment", "Metadata_pert_iname is empty")
        return treatment


def image_table(
    table: TextTable,
    plate: str | None,
    batch: str | None,
    channels: Mapping[str, str] | None,
    needs_treatment: bool,
) -> ImageTable:
    """Return how to read a table of images; ``channels`` renames, by number or name as found.

    Raises:
        BadTableError: there is no file name column, or two of them are one channel.
        UnknownNameError: ``channels`` has a key that is neither a channel nor its number.
        UserInputError: ``channels`` gives two channels one name.
    """
    found = image_channels(table)
    wanted = {key.strip().lower(): name for key, name in (channels or {}).items()}
    names = {channel.name.lower() for channel in found}
    numbers = {int(key): name for key, name in wanted.items() if _is_number(key, names)}
    _check_known(table, found, list(channels or {}), numbers)
    renamed = tuple(replace(item, name=wanted.get(item.name.lower(), item.name)) for item in found)
    if len({item.name.lower() for item in renamed}) < len(renamed):
        raise UserInputError(
            f"{table.path.name} would have two channels of one name "
            f"({', '.join(item.name for item in renamed)}). Give each channel its own."
        )
    return ImageTable(table, renamed, plate, batch, needs_treatment, numbers)


def _check_known(
    table: TextTable,
    found: Sequence[Channel],
    asked: Sequence[str],
    numbers: Collection[int],
) -> None:
    """Check that the table has the channels ``asked`` for; it is read until all numbers came."""
    names = {channel.name.lower(): channel.name for channel in found}
    seen: set[int] = set()
    for number in _channel_numbers(table, found) if numbers else ():
        seen.add(number)
        if seen.issuperset(numbers):
            break
    lower = {key.strip().lower(): key for key in asked}
    unknown = [lower[key] for key in lower if key not in names and not _is_number(key, names)]
    for key in [*unknown, *sorted(set(numbers) - seen)]:
        raise UnknownNameError.of("channel", key, [*names.values(), *sorted(seen)])


def _channel_numbers(table: TextTable, found: Sequence[Channel]) -> Iterator[int]:
    pick = ColumnGroup(table, [channel.file for channel in found]).pick
    for row in table.rows():
        if not isinstance(row, Refusal):
            names = (core_file_name(text.strip()) for text in pick(row.cells))
            yield from (name.channel for name in names if name and name.channel is not None)


def _is_number(key: str, names: Container[str]) -> bool:
    return key not in names and key.isascii() and key.isdigit() and len(key) <= 4


def _check_length(limit: int, *texts: str | None) -> None:
    for text in texts:
        if text is not None and len(text) > limit:
            raise RowRefusedError("name too long", f"{text[:40]!r}... has {len(text)} characters")


def _frame(cells: Cells, channel: Channel) -> int | None:
    """Return the frame of a channel in a row, from 0; None where no column says it."""
    series = cells.whole(channel.series) if channel.series else None
    if series:
        detail = f"{channel.series} is {series}: export each image of the file as one of its own"
        raise RowRefusedError("another series of a file", detail)
    return cells.whole(channel.frame) if channel.frame else None


def _on_page(named: _NamedFile, frame: int | None) -> _NamedFile:
    channel, number, name = named
    if frame is None:
        return named
    try:
        paged = page_name(name, frame + 1)
    except UserInputError as error:
        raise RowRefusedError("no such page", str(error)) from error
    _check_length(LONGEST, paged)
    return channel, number, paged


def _check_files(channels: Sequence[str]) -> None:
    if not channels:
        raise RowRefusedError("no image file", "every FileName column is empty")
    if len(set(channels)) < len(channels):
        raise RowRefusedError("two files of one channel", ", ".join(channels))


def _common_name(names: list[PhenixName]) -> PhenixName | None:
    """Return what the Phenix names of all channels agree on; None without any such name."""
    for name in names[1:]:
        if not _is_same_field(name, names[0]):
            detail = f"{name.core} beside {names[0].core}"
            raise RowRefusedError("files of different fields", detail)
    return names[0] if names else None


def _is_same_field(one: PhenixName, other: PhenixName) -> bool:
    written = (one.core, one.plane, one.time_point) == (other.core, other.plane, other.time_point)
    return written or _numbers(one) == _numbers(other)


def _numbers(name: PhenixName) -> tuple[int, ...]:
    plane, time_point = _first_known(name.plane), _first_known(name.time_point)
    return name.row, name.column, name.field, plane, time_point


def _well(written: tuple[int, int] | None, name: PhenixName | None) -> tuple[int, int]:
    if name is None:
        if written is None:
            raise RowRefusedError("no well", "neither a well column nor a file name like r01c01f01")
        return written
    if written is not None and written != (name.row, name.column):
        detail = f"well {format_well(*written)}, file of {format_well(name.row, name.column)}"
        raise RowRefusedError("well and file name disagree", detail)
    return name.row, name.column


def _written_well(cells: Cells) -> tuple[int, int] | None:
    text = cells.get("Metadata_Well")
    row, column = cells.get("Metadata_Row"), cells.get("Metadata_Col", "Metadata_Column")
    if text is None and row and column:
        text = f"r{row}c{column}" if row.isdigit() else f"{row}{column}"
    if text is None:
        return None
    try:
        return parse_well(text)
    except UserInputError as error:
        raise RowRefusedError("not a well", str(error)) from error


def _site(written: int | None, name: PhenixName | None) -> int:
    if written is not None:
        return written
    if name is None:
        raise RowRefusedError("no site", "neither Metadata_Site nor a file name like r01c01f01")
    return name.field


def _first_known(written: int | None, named: int | None = None) -> int:
    if written is not None:
        return written
    return _FIRST if named is None else named
