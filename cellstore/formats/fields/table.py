"""What the two shapes of image tables have in common: one data row is one field of view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from ...errors import BadTableError, UnknownNameError, UserInputError
from ..files.images import is_safe_name
from ..names import PhenixName, core_file_name, format_well, parse_well
from ..records import FileRef, ImageRecord, Refusal, TreatmentRecord
from ..text.tables import TableRow, TextTable, cell_text, nearest_columns
from ..treatments.cells import TREATMENT_COLUMNS, treatment_of

FILE_PREFIX = "FileName_"
FOLDER_PREFIX = "PathName_"
ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

_FIRST = 1
_MAX_NUMBER = 1_000_000
_NAME_LENGTH, _PATH_LENGTH = 255, 2_000
"""What file systems allow for a name, and what the index of a database can hold."""

_REMEMBERED = 16_384
"""Fields of view kept worked out: they come back with every plate (1,536 wells x 9 sites)."""

_new = tuple.__new__
"""Makes a named tuple from a tuple in half the time: there are millions."""

_PLATE, _BATCH = "Metadata_Plate", "Metadata_Batch"
_WELL = ("Metadata_Well", "Metadata_Row", "Metadata_Col", "Metadata_Column")
_SITE = ("Metadata_Site", "Metadata_FieldID")
_PLANE = ("Metadata_PlaneID", "Metadata_Plane")
_TIME_POINT = ("Metadata_TimepointID", "Metadata_Timepoint")


class RowRefusedError(Exception):
    """One row cannot be used. Never leaves this package: it becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel by the name that its files get, and the columns of its file and folder names."""

    name: str
    file: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class Cells:
    """Some cells of a row, by the name of their column; missing values are None."""

    cells: Sequence[str]
    places: Mapping[str, int]

    def get(self, *columns: str) -> str | None:
        """Return the first of the columns that is there and has a value."""
        for column in columns:
            text = cell_text(self.cells, self.places.get(column))
            if text is not None:
                return text
        return None

    def whole(self, *columns: str) -> int | None:
        """Return the value as a whole number; '3.0', as pandas writes integers, is 3."""
        text = self.get(*columns)
        if text is None:
            return None
        digits = text.removesuffix(".0")
        significant = digits.lstrip("0") or "0"
        if digits.isascii() and digits.isdigit() and len(significant) <= len(str(_MAX_NUMBER)):
            number = int(significant)
            if number <= _MAX_NUMBER:
                return number
        raise RowRefusedError("not a whole number", f"{columns[0]} is {text!r}")


class ColumnGroup:
    """Those of ``columns`` that a table has; ``pick`` takes their cells out of a row at once."""

    def __init__(self, table: TextTable, columns: Sequence[str]) -> None:
        found = {column: table.position(column) for column in dict.fromkeys(columns)}
        present = {column: place for column, place in found.items() if place is not None}
        self.pick = _picker(tuple(present.values()))
        self._places = {column: number for number, column in enumerate(present)}

    def __len__(self) -> int:
        return len(self._places)

    def named(self, picked: tuple[str, ...]) -> Cells:
        """Return picked cells by the names of their columns."""
        return Cells(picked, self._places)


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
        place = [*_WELL, *_SITE, *_PLANE, *_TIME_POINT]
        self._in_place = ColumnGroup(table, place)
        self._in_field = ColumnGroup(table, [*place, *files])
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
        _check_length(_NAME_LENGTH, plate, batch)
        _check_length(_PATH_LENGTH, *folders)
        return plate, batch, folders

    def _field(self, picked: tuple[str, ...]) -> _Field:
        written = self._place_of(picked[: len(self._in_place)])
        files, names = self._files(picked[len(self._in_place) :])
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
            cells.whole(*_PLANE),
            cells.whole(*_TIME_POINT),
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
            _check_length(_NAME_LENGTH, text)
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


def image_channels(table: TextTable) -> tuple[Channel, ...]:
    """Return the image channels of a table in the order of its columns.

    Where there are ``FileName_Orig*`` columns, only these are images; flat fields
    (``FileName_Illum*``) never are.

    Raises:
        BadTableError: there is no such column, or two of them are one channel.
    """
    names = [column for column in table.columns if column.startswith(FILE_PREFIX)]
    original = [name for name in names if name.startswith(FILE_PREFIX + ORIGINAL)]
    chosen = original or [name for name in names if not name.startswith(FILE_PREFIX + "Illum")]
    if not chosen:
        raise BadTableError(
            f"{table.path.name} names no images: it has no column FileName_Orig<channel>. "
            f"{nearest_columns([FILE_PREFIX + 'OrigDNA'], table.columns)}"
        )
    table.require(*chosen)
    channels = tuple(_channel(table, column) for column in chosen)
    _check_distinct(table, channels)
    return channels


def _check_distinct(table: TextTable, channels: tuple[Channel, ...]) -> None:
    names = [channel.name.lower() for channel in channels]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise BadTableError(
            f"{table.path.name} has two FileName columns for the channel {', '.join(repeated)}. "
            "Remove or rename the one that is not meant."
        )


def _channel(table: TextTable, column: str) -> Channel:
    suffix = column.removeprefix(FILE_PREFIX)
    folder = FOLDER_PREFIX + suffix
    name = suffix.removeprefix(ORIGINAL) or suffix
    return Channel(name, column, folder if folder in table.columns else None)


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


def _picker(places: Sequence[int]) -> Callable[[Sequence[str]], tuple[str, ...]]:
    if not places:
        return lambda _cells: ()
    if len(places) == 1:
        return lambda cells: (cells[places[0]],)
    return itemgetter(*places)


def _check_length(limit: int, *texts: str | None) -> None:
    for text in texts:
        if text is not None and len(text) > limit:
            raise RowRefusedError("name too long", f"{text[:40]!r}... has {len(text)} characters")


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
