"""Tables of images: LoadData of CellProfiler and JUMP, and the table of the published study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from ..errors import BadTableError, UnknownNameError, UserInputError
from .filenames import (
    PLANE_COLUMNS,
    TIME_COLUMNS,
    ImageName,
    core_file_name,
    format_well,
    is_safe_name,
    join_well,
    parse_well,
)
from .image_files import micrometres
from .tables import (
    LONGEST,
    Refusal,
    RowRefusedError,
    TextTable,
    first_text,
    known_text,
    nearest_columns,
)
from .treatments import TREATMENT_COLUMNS, TreatmentRecord, dose_columns, treatment_of
from .uris import page_name, split_url

FILE_PREFIX, URL_PREFIX = "FileName_", "URL_"
ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

_PLATE_COLUMNS = ("Metadata_Plate", "Metadata_Batch")
_WELL_COLUMNS, _COLUMN_COLUMNS = ("Metadata_Well",), ("Metadata_Col", "Metadata_Column")
_SITE_COLUMNS = ("Metadata_Site", "Metadata_FieldID")
_PIXEL_COLUMNS = ("Metadata_ImageResolutionX", "Metadata_ImageResolutionY")
"""Metres per pixel, as Harmony has it and pe2loaddata passes it on."""

_WHERE_COLUMNS = (
    *(*_WELL_COLUMNS, "Metadata_Row", *_COLUMN_COLUMNS),
    *(*_SITE_COLUMNS, *PLANE_COLUMNS, *TIME_COLUMNS),
)

_FIRST = 1
_MAX_NUMBER = 1_000_000
_LONGEST_FOLDER = 2_000
"""What the index of a database can hold."""

_REMEMBERED = 16_384
"""Fields of view kept worked out: they come back with every plate (1,536 wells x 9 sites)."""

_File = tuple[int, tuple[str, int | None, str], str | None]
"""Index of the channel; its name, its number and the file name; the folder of a URL."""

_Field = tuple[tuple[int, int, int, int, int, str | None], list[_File]]
"""Row, column, site, plane, time point and core file name; files."""

_CHANNELS_REMEMBERED = 1000

_new = tuple.__new__
"""Makes a named tuple from a tuple in half the time: there are millions."""


class FileRef(NamedTuple):
    """One channel of an image, as a table names it.

    ``channel`` is the name of the stain ('RNA'), ``number`` the channel number of a Phenix file
    name, ``folder`` the ``PathName_*`` of the row as written, which may be on another machine.
    """

    channel: str
    number: int | None
    name: str
    folder: str | None = None


class ImageRecord(NamedTuple):
    """One field of view from line ``line`` of a table; row, column, site as numbers.

    ``row`` and ``column`` count from 1; ``site``, ``plane`` and ``time_point`` are as written.
    ``pixel_size`` is in micrometres; ``metadata`` are the columns that have no field of their own.
    """

    line: int
    plate: str
    batch: str | None
    row: int
    column: int
    site: int
    plane: int
    time_point: int
    core_name: str | None
    files: tuple[FileRef, ...]
    treatment: TreatmentRecord | None
    pixel_size: float | None = None
    metadata: Mapping[str, str] | None = None


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
        if len(self._seen) < _CHANNELS_REMEMBERED:
            self._seen.add(found)
        name = found
        for key in ("" if number is None else str(number), found.strip().lower()):
            if key in self._wanted:
                self._used.add(key)
                name = self._wanted[key]
                break
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


@dataclass(frozen=True, slots=True)
class _Channel:
    """A channel by the name that its files get, and the columns of its file and folder names.

    ``frame`` and ``series`` are CellProfiler's columns for the page of a file, from 0, and for
    the image of a file that holds several. ``paged``: some frame of the channel is above 0.
    """

    name: str
    file: str
    folder: str | None
    frame: str | None
    series: str | None
    paged: bool = False


class _Columns:
    """Those of ``columns`` that a table has; ``pick`` takes their cells out of a row at once."""

    def __init__(self, table: TextTable, columns: Iterable[str | None]) -> None:
        found = {column: table.position(column) for column in columns if column}
        present = {column: index for column, index in found.items() if index is not None}
        self.names = tuple(present)
        indexes = tuple(present.values())
        self.pick: Callable[[Sequence[str]], tuple[str, ...]]
        if len(indexes) > 1:
            self.pick = itemgetter(*indexes)
        else:  # itemgetter returns no tuple for one index
            self.pick = lambda cells: tuple([cells[index] for index in indexes])

    def texts(self, picked: Sequence[str]) -> dict[str, str]:
        """Return those picked cells that hold a value, by the name of their column."""
        texts = (
            (name, known_text(name, cell)) for name, cell in zip(self.names, picked, strict=True)
        )
        return {name: text for name, text in texts if text is not None}


def whole_number(texts: Mapping[str, str], columns: Iterable[str]) -> int | None:
    """Return ``first_text`` as a whole number; '3.0', as pandas writes integers, is 3.

    Raises:
        RowRefusedError: it is none.
    """
    column = next((column for column in columns if column in texts), None)
    if column is None:
        return None
    digits = texts[column].removesuffix(".0")
    significant = digits.lstrip("0") or "0"
    plain = digits.isascii() and digits.isdigit() and len(significant) <= 7
    if not plain or int(significant) > _MAX_NUMBER:
        raise RowRefusedError("not a whole number", f"{column} is {texts[column][:50]!r}")
    return int(significant)


def written_well(
    texts: Mapping[str, str], wells: Iterable[str], columns: Iterable[str]
) -> str | None:
    """Return the well of a row as text: of one of ``wells``, else of a row and a column.

    Raises:
        RowRefusedError: both are there, and differ.
    """
    well, row = first_text(texts, wells), texts.get("Metadata_Row")
    column = first_text(texts, columns)
    if well is None:
        return join_well(row, column) if row and column else None
    if row or column:
        with suppress(UserInputError):  # a text that is no well is refused by who asked
            expected = parse_well(well)
            joined = join_well(row or str(expected[0]), column or str(expected[1]))
            try:
                differs = parse_well(joined) != expected
            except UserInputError:
                differs = True
            if differs:
                said = [f"row {row}"] * bool(row) + [f"column {column}"] * bool(column)
                detail = f"well {well}, but {' and '.join(said)}"
                raise RowRefusedError("well and row or column disagree", detail)
    return well


def _check_length(limit: int, *texts: str | None) -> None:
    for text in texts:
        if text is not None and len(text) > limit:
            raise RowRefusedError("name too long", f"{text[:40]!r}... has {len(text)} characters")


def read_image_table(
    table: TextTable,
    plate: str | None = None,
    channels: Mapping[str, str] | None = None,
    *,
    needs_treatment: bool = False,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a table, one record or refusal per data row.

    Columns: ``FileName_Orig*`` or ``FileName_*`` with ``PathName_*``, or ``URL_*``; a file name may
    be a URL, too; ``Metadata_Plate``,
    ``Metadata_Well`` (or ``Metadata_Row`` and ``Metadata_Col``), ``Metadata_Site``; optional
    ``Metadata_Batch`` and the treatment (``Metadata_pert_iname``, ``Metadata_target`` or
    ``Metadata_gene``, ``Metadata_broad_sample``, ``Metadata_control_type``). Well and site may
    come from the core file name, too (``r01c01f01`` is field 1 of A01). A channel whose file name
    is empty was not taken. Plane and time point are read from the first of ``PLANE_COLUMNS`` and
    ``TIME_COLUMNS`` that says it. ``Frame_*``: the page of a file, from 0; rows with a
    ``Series_*`` above 0 are refused.

    ``plate`` is needed only without ``Metadata_Plate``; ``channels`` gives a channel, by its
    Phenix number or its name here, another name: a number alone never names a stain.
    ``needs_treatment``: a row without one is refused, as the published study has none.

    Raises:
        BadTableError: a column is missing.
        UnknownNameError: ``channels`` renames a channel that is not there.
        UserInputError: a table without ``Metadata_Plate`` and no ``plate``; ``channels`` gives
            two channels one name.
    """
    if needs_treatment:
        table.require("Metadata_pert_iname")
    if plate is None and table.position("Metadata_Plate") is None:
        raise UserInputError(f"{table.path.name} does not name its plate. Name it with --plate.")
    found, numbers = _find_channels(table, channels or {})
    of_files = [column for item in found for column in (item.file, item.frame, item.series)]
    # A column that is there twice cannot be told apart; the notes of the table say so.
    described = (*TREATMENT_COLUMNS, *dose_columns(table.columns))
    read = {*_PLATE_COLUMNS, *_WHERE_COLUMNS, *described, *table.repeated}
    others = [name for name in table.columns if name.startswith("Metadata_") and name not in read]
    plate_columns = _Columns(table, [*_PLATE_COLUMNS, *(item.folder for item in found)])
    field_columns = _Columns(table, [*_WHERE_COLUMNS, *of_files])
    treatment_columns = _Columns(table, described)
    other_columns = _Columns(table, others)
    # Cells that come again (the plate, the well and site of each plate, the treatment) are worked
    # out once: a million rows say little that is new.
    plates: dict[tuple[str, ...], tuple[str, str | None, list[str | None]]] = {}
    fields: dict[tuple[str, ...], _Field] = {}
    treatments: dict[tuple[str, ...], TreatmentRecord | None] = {}
    metadata: dict[tuple[str, ...], tuple[float | None, dict[str, str] | None]] = {}
    remembered: tuple[dict[Any, Any], ...] = (plates, fields, treatments, metadata)
    pick_plate, pick_field = plate_columns.pick, field_columns.pick
    pick_treatment, pick_others = treatment_columns.pick, other_columns.pick
    for count, row in enumerate(table.rows()):
        if isinstance(row, Refusal):
            yield row
            continue
        line, cells = row
        if count % _REMEMBERED == 0:
            for some in remembered:
                if len(some) > _REMEMBERED:
                    some.clear()
        try:
            key = pick_field(cells)
            if (of_field := fields.get(key)) is None:
                texts = field_columns.texts(key)
                of_field = fields[key] = _read_field(texts, found, numbers)
            key = pick_plate(cells)
            if (of_plate := plates.get(key)) is None:
                texts = plate_columns.texts(key)
                barcode, batch = texts.get("Metadata_Plate") or plate, texts.get("Metadata_Batch")
                if barcode is None:
                    raise RowRefusedError("no plate", "Metadata_Plate is empty")
                if plate and barcode != plate:
                    raise RowRefusedError("another plate", f"plate {barcode}, not {plate}")
                folders = [texts.get(item.folder or "") for item in found]
                _check_length(LONGEST, barcode, batch)
                _check_length(_LONGEST_FOLDER, *folders)
                of_plate = plates[key] = barcode, batch, folders
            key = pick_treatment(cells)
            if key not in treatments:
                treatments[key] = treatment_of(treatment_columns.texts(key))
            treatment = treatments[key]
            if treatment is None and needs_treatment:
                raise RowRefusedError("no treatment", "Metadata_pert_iname is empty")
        except RowRefusedError as refused:
            yield Refusal(line, *refused.args)
            continue
        key = pick_others(cells)
        if (of_well := metadata.get(key)) is None:
            texts = other_columns.texts(key)
            sizes = {micrometres(texts.pop(column, None), "m") for column in _PIXEL_COLUMNS}
            more = {name.removeprefix("Metadata_"): text for name, text in texts.items()}
            of_well = metadata[key] = sizes.pop() if len(sizes) == 1 else None, more or None
        barcode, batch, folders = of_plate
        where, named = of_field
        files = tuple([_new(FileRef, (*file, own or folders[index])) for index, file, own in named])
        yield _new(ImageRecord, (line, barcode, batch, *where, files, treatment, *of_well))


def _read_field(
    texts: Mapping[str, str], channels: Sequence[_Channel], numbers: Mapping[int, str]
) -> _Field:
    """Return where an image is, and its files by the index of their channel.

    A file is the name of its channel, its Phenix number and its own name, with the page in a
    row or channel that has other pages than the first. What the names of the files say has to be
    the same for all, and what the other cells say.
    """
    written = written_well(texts, _WELL_COLUMNS, _COLUMN_COLUMNS)
    try:
        well = None if written is None else parse_well(written)
    except UserInputError as error:
        raise RowRefusedError("not a well", str(error)) from error
    site, plane, time_point = (
        whole_number(texts, some) for some in (_SITE_COLUMNS, PLANE_COLUMNS, TIME_COLUMNS)
    )
    files: list[_File] = []
    frames: list[int | None] = []
    numbers_of = attrgetter("row", "column", "site", "plane", "time_point")
    agreed: ImageName | None = None
    for index, channel in enumerate(channels):
        text = texts.get(channel.file)
        if text is None:
            continue
        folder, text = split_url(text)
        _check_length(_LONGEST_FOLDER, folder)
        _check_length(LONGEST, text)
        if not is_safe_name(text):
            raise RowRefusedError("file name with a folder in it", f"{channel.name}: {text!r}")
        name = core_file_name(text)
        renamed, number = channel.name, name.number if name else None
        if name is not None:
            agreed = agreed or name
            # r1c1f1 is r01c01f01, and no plane or time point means the first.
            first, other = (
                [_FIRST if number is None else number for number in numbers_of(item)]
                for item in (agreed, name)
            )
            if first != other:
                detail = f"{name.core_name} beside {agreed.core_name}"
                raise RowRefusedError("files of different fields", detail)
            if number is not None:
                renamed = numbers.get(number, channel.name)
        files.append((index, (renamed, number, text), folder))
        if channel.series and (series := whole_number(texts, (channel.series,))):
            detail = f"{channel.series} is {series}: export each image of the file by itself"
            raise RowRefusedError("another series of a file", detail)
        frames.append(whole_number(texts, (channel.frame,)) if channel.frame else None)
    if not files:
        raise RowRefusedError("no image file", "every FileName column is empty")
    names = [file[0] for _, file, _ in files]
    if len(set(names)) < len(names):
        raise RowRefusedError("two files of one channel", ", ".join(names))
    for position, ((index, file, folder), frame) in enumerate(zip(files, frames, strict=True)):
        if frame is not None and (any(frames) or channels[index].paged):
            try:
                paged = page_name(file[2], frame + 1)
            except UserInputError as error:
                raise RowRefusedError("no such page", str(error)) from error
            _check_length(LONGEST, paged)
            files[position] = index, (*file[:2], paged), folder
    if agreed is not None:
        if well is not None and well != (agreed.row, agreed.column):
            of_file = format_well(agreed.row, agreed.column)
            detail = f"well {format_well(*well)}, file of {of_file}"
            raise RowRefusedError("well and file name disagree", detail)
        well = agreed.row, agreed.column
        site = agreed.site if site is None else site
        plane = agreed.plane if plane is None else plane
        time_point = agreed.time_point if time_point is None else time_point
    if well is None:
        raise RowRefusedError("no well", "neither a well column nor a file name like r01c01f01")
    if site is None:
        raise RowRefusedError("no site", "neither Metadata_Site nor a file name like r01c01f01")
    plane = _FIRST if plane is None else plane
    time_point = _FIRST if time_point is None else time_point
    return (*well, site, plane, time_point, agreed.core_name if agreed else None), files


def _find_channels(
    table: TextTable, wanted: Mapping[str, str]
) -> tuple[tuple[_Channel, ...], Mapping[int, str]]:
    """Return the image channels by the names that are wanted, and names by Phenix number.

    The channels are in the order of the columns. Where there are ``FileName_Orig*`` columns, only
    these are images; flat fields (``FileName_Illum*``) never are.

    Raises:
        BadTableError: there is no such column, or two of them are one channel.
        UnknownNameError: a key of ``wanted`` is neither a channel nor the number of one; to know
            that, the table is read until all numbers came.
        UserInputError: two channels would get one name.
    """
    named = [column for column in table.columns if column.startswith(FILE_PREFIX)]
    urls = [column for column in table.columns if column.startswith(URL_PREFIX)]
    columns = named + [
        FILE_PREFIX + column.removeprefix(URL_PREFIX)
        for column in urls
        if FILE_PREFIX + column.removeprefix(URL_PREFIX) not in named
    ]
    original = [column for column in columns if column.startswith(FILE_PREFIX + ORIGINAL)]
    chosen = original or [item for item in columns if not item.startswith(FILE_PREFIX + "Illum")]
    if not chosen:
        raise BadTableError(
            f"{table.path.name} names no images: it has no column FileName_Orig<channel>. "
            f"{nearest_columns([FILE_PREFIX + 'OrigDNA'], table.columns)}"
        )
    by_key = {key.strip().lower(): name for key, name in wanted.items()}
    channels = []
    found: list[str] = []
    for column in chosen:
        suffix = column.removeprefix(FILE_PREFIX)
        others = (prefix + suffix for prefix in ("PathName_", "Frame_", "Series_"))
        folder, frame, series = (item if item in table.columns else None for item in others)
        found.append(suffix.removeprefix(ORIGINAL) or suffix)
        name = by_key.get(found[-1].lower(), found[-1])
        url = URL_PREFIX + suffix
        is_url = url in urls and (folder is None or column not in named)
        file = url if is_url else column
        channels.append(_Channel(name, file, folder, frame, series))
    names = [name.lower() for name in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BadTableError(
            f"{table.path.name} has two FileName columns for the channel {', '.join(repeated)}. "
            "Remove or rename the one that is not meant."
        )
    if len({channel.name.lower() for channel in channels}) < len(channels):
        raise UserInputError(
            f"{table.path.name} would have two channels of one name "
            f"({', '.join(channel.name for channel in channels)}). Give each channel its own."
        )
    numbers = {
        int(key): name
        for key, name in by_key.items()
        if key not in names and key.isascii() and key.isdigit() and len(key) <= 4
    }
    # Only the table tells which Phenix numbers its files have, and which channels have other
    # frames than 0: the first plane of a stack has the frame 0, as all files of one page have.
    seen: set[int] = set()
    paged: set[str | None] = set()
    files = _Columns(table, [item.file for item in channels] if numbers else ())
    frames = _Columns(table, [channel.frame for channel in channels])
    for row in table.rows() if numbers or frames.names else ():
        if isinstance(row, Refusal):
            continue
        phenix = [core_file_name(split_url(text.strip())[1]) for text in files.pick(row.cells)]
        seen |= {name.number for name in phenix if name and name.number is not None}
        texts = frames.texts(frames.pick(row.cells))
        paged |= {column for column, text in texts.items() if text.strip("0.")}
        if seen.issuperset(numbers) and len(paged) == len(frames.names):
            break
    for key in wanted:
        plain = key.strip().lower()
        if plain not in names and not (plain.isdigit() and int(plain) in seen):
            raise UnknownNameError.of("channel", key.strip(), [*found, *sorted(seen)])
    return tuple(replace(item, paged=item.frame in paged) for item in channels), numbers
