"""The table of the published study: one projected image per row, named by core file name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from ..errors import BadTableError, UnknownNameError, UserInputError
from .filenames import (
    PLANE_COLUMNS,
    TIME_COLUMNS,
    PhenixName,
    core_file_name,
    format_well,
    parse_well,
)
from .image_files import is_safe_name
from .platemaps import TREATMENT_COLUMNS, treatment_of
from .records import LONGEST, FileRef, ImageRecord, Refusal, TreatmentRecord
from .tables import TableRow, TextTable, cell_text, nearest_columns
from .uris import page_name

_CHANNELS_REMEMBERED = 1000


class ChannelNames:
    """Gives channels the names that a user wants, and keeps two of one image apart.

    ``wanted`` is number or name as found -> name wanted; a number does not fix a stain, so what
    is not in it keeps the name it came with.

    Raises:
        UserInputError: two channels are wanted with one name, or a name is empty.
    """

    def __init__(self, wanted: Mapping[str, str] | None = None) -> None:
        self._wanted = {key.strip().lower(): name.strip() for key, name in (wanted or {}).items()}
        self._names = {name.lower() for name in self._wanted.values()}
        if "" in self._names or len(self._names) < len(self._wanted):
            raise UserInputError(
                "--channels must give each channel a name of its own, like 1=Mito,5=DNA."
            )
        self._used: set[str] = set()
        self._seen: set[str] = set()
        self._owners: dict[str, int] = {}

    def name(self, number: int | None, found: str) -> str:
        """Return the name of the channel numbered ``number`` that came as ``found``.

        Of two numbers with one name, as some microscopes have two 'Brightfield', the later one
        gets its number added.

        Raises:
            UserInputError: a channel was wanted with the name that another one came with.
        """
        name = self._renamed(number, found)
        owner = number if number is None else self._owners.setdefault(name.lower(), number)
        if owner == number:
            return name
        if name.lower() in self._names:
            raise UserInputError(
                f"Channels {owner} and {number} would both be {name!r}. "
                "Give each a name of its own with --channels."
            )
        return f"{name} (ch{number})"

    def check_used(self) -> None:
        """Check that each name wanted was for a channel that came.

        Raises:
            UnknownNameError: one was not; the message has channels that did come.
        """
        for key in self._wanted:
            if key not in self._used:
                raise UnknownNameError.of("channel", key, sorted(self._seen))

    def _renamed(self, number: int | None, found: str) -> str:
        if len(self._seen) < _CHANNELS_REMEMBERED:
            self._seen.add(found)
        for key in ("" if number is None else str(number), found.strip().lower()):
            if key in self._wanted:
                self._used.add(key)
                return self._wanted[key]
        return found


FILE_PREFIX = "FileName_"
FOLDER_PREFIX = "PathName_"
FRAME_PREFIX, SERIES_PREFIX = "Frame_", "Series_"
ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

_MAX_NUMBER = 1_000_000


class RowRefusedError(Exception):
    """One row cannot be used. Never leaves this package: it becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel by the name that its files get, and the columns of its file and folder names.

    ``frame`` and ``series`` are CellProfiler's columns for the page of a file, from 0, and for
    the image of a file that holds several. ``paged``: some frame of the channel is above 0.
    """

    name: str
    file: str
    folder: str | None
    frame: str | None = None
    series: str | None = None
    paged: bool = False


@dataclass(frozen=True, slots=True)
class Cells:
    """Some cells of a row, by the name of their column; missing values are None."""

    cells: Sequence[str]
    places: Mapping[str, int]

    def get(self, *columns: str) -> str | None:
        """Return the first of the columns that is there and has a value."""
        return next((text for _, text in self._said(columns)), None)

    def whole(self, *columns: str) -> int | None:
        """Return the value as a whole number; '3.0', as pandas writes integers, is 3."""
        column, text = next(self._said(columns), ("", None))
        if text is None:
            return None
        digits = text.removesuffix(".0")
        significant = digits.lstrip("0") or "0"
        if digits.isascii() and digits.isdigit() and len(significant) <= len(str(_MAX_NUMBER)):
            number = int(significant)
            if number <= _MAX_NUMBER:
                return number
        raise RowRefusedError("not a whole number", f"{column} is {text[:50]!r}")

    def _said(self, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
        for column in columns:
            text = cell_text(self.cells, self.places.get(column))
            if text is not None:
                yield column, text


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
    return _with_pages(table, channels)


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
    name = suffix.removeprefix(ORIGINAL) or suffix
    beside = (prefix + suffix for prefix in (FOLDER_PREFIX, FRAME_PREFIX, SERIES_PREFIX))
    folder, frame, series = (item if item in table.columns else None for item in beside)
    return Channel(name, column, folder, frame, series)


def _with_pages(table: TextTable, channels: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """Return the channels, those ``paged`` that have a frame above 0 anywhere in the table.

    The first plane of a stack has the frame 0, as all files of one page have.
    """
    waiting = {channel.frame for channel in channels if channel.frame}
    paged: set[str | None] = set()
    group = ColumnGroup(table, [column for column in waiting if column])
    rows = (row for row in table.rows() if not isinstance(row, Refusal)) if waiting else ()
    for row in rows:
        cells = group.named(group.pick(row.cells))
        paged |= {column for column in waiting if column and _is_later(cells.get(column))}
        waiting -= paged
        if not waiting:
            break
    return tuple(replace(channel, paged=channel.frame in paged) for channel in channels)


def _is_later(frame: str | None) -> bool:
    return frame is not None and frame.strip("0.") != ""


def _picker(places: Sequence[int]) -> Callable[[Sequence[str]], tuple[str, ...]]:
    if not places:
        return lambda _cells: ()
    if len(places) == 1:
        return lambda cells: (cells[places[0]],)
    return itemgetter(*places)


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


def read_loaddata(
    table: TextTable,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a LoadData table, one record or refusal per data row.

    Columns: ``FileName_Orig*`` or ``FileName_*``, ``PathName_*``, ``Metadata_Plate``,
    ``Metadata_Well`` (or ``Metadata_Row`` and ``Metadata_Col``), ``Metadata_Site``; optional
    ``Metadata_Batch`` and the treatment (``Metadata_pert_iname``, ``Metadata_target`` or
    ``Metadata_gene``, ``Metadata_broad_sample``, ``Metadata_control_type``). A channel whose
    file name is empty was not taken. Plane and time point are read from the first of
    ``names.PLANE_COLUMNS`` and ``names.TIME_COLUMNS`` that says it. ``Frame_*``: the page of a
    file, from 0; rows with a ``Series_*`` above 0 are refused. ``plate`` is needed only
    without ``Metadata_Plate``; ``channels`` gives a channel, by its Phenix number or its name
    here, another name.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
    """
    if plate is None:
        table.require("Metadata_Plate")
    return image_table(table, plate, batch, channels, needs_treatment=False).records()


def read_published(
    table: TextTable,
    plate: str | None = None,
    batch: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a published-style table, one record or refusal per data row.

    Columns: ``FileName_OrigRNA`` (or another ``FileName_*``), ``Metadata_pert_iname``, optional
    ``Metadata_target``. Well and site come from the core file name (``r01c01f01`` is field 1 of
    A01). A row without treatment is refused: the study has none. ``plate`` is needed only
    without ``Metadata_Plate``; ``channels`` renames, by Phenix number or by name.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
    """
    table.require("Metadata_pert_iname", *([] if plate else ["Metadata_Plate"]))
    return image_table(table, plate, batch, channels, needs_treatment=True).records()
