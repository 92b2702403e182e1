"""Rows about images: which image a row is, and its files, by what the columns are called.

:class:`ImageRows` reads them in tables of images (LoadData of CellProfiler and JUMP, the table of
the published study), in CellProfiler's own tables, and in tables of single cells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
    microscope_name,
    parse_well,
    whole_number,
    written_well,
)
from .image_files import pixel_size
from .tables import Refusal, RowRefusedError, TextTable, first_text, known_text, nearest_columns
from .treatments import TREATMENT_COLUMNS, TreatmentRecord, dose_columns, treatment_of
from .uris import page_name, split_page, split_url

FILE_PREFIX, URL_PREFIX, METADATA = "FileName_", "URL_", "Metadata_"
_ORIGINAL = "Orig"
"""JUMP names raw images ``FileName_OrigDNA`` and flat fields ``FileName_IllumDNA``."""

PLATES = ("Metadata_Plate", "Metadata_plate", "Metadata_Barcode", "Metadata_PlateBarcode")
WELLS = ("Metadata_Well", "Metadata_well")
ROWS, COLUMNS = ("Metadata_Row",), ("Metadata_Col", "Metadata_Column")
SITES = ("Metadata_Site", "Metadata_site", "Metadata_FieldID", "Metadata_Field")
_BATCH, _CORE_NAME = "Metadata_Batch", "Metadata_CoreName"
_PIXEL_COLUMNS = ("Metadata_ImageResolutionX", "Metadata_ImageResolutionY")
"""Metres per pixel, as Harmony has it and pe2loaddata passes it on."""

_WHERE = (*WELLS, *ROWS, *COLUMNS, *SITES, *PLANE_COLUMNS, *TIME_COLUMNS, _CORE_NAME)
_KNOWN = frozenset({*PLATES, _BATCH, *_WHERE, *TREATMENT_COLUMNS})
_OF_FILES = (FILE_PREFIX, URL_PREFIX, "PathName_", "Frame_", "Series_")
_DRAWN = re.compile(r"Illum|Outline|Overlay", re.IGNORECASE)
_SITE_FOLDER = re.compile(r"(?P<plate>.+)-(?P<well>[A-Z]{1,2}[0-9]{1,2})-(?P<site>[0-9]+)")

NO_PLATE = "no plate"
"""Reason of a row that does not name its plate."""

_FIRST = 1
_REMEMBERED = 16_384
"""Fields of view kept worked out: they come back with every plate (1,536 wells x 9 sites)."""

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
    ``problem`` (reason, detail): what could not be used of the row.
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
    problem: tuple[str, str] | None = None


class ChannelNames:
    """Gives channels the names that a user wants, and keeps two of one image apart.

    ``wanted`` is number or name as found -> name wanted; a number does not fix a stain, so what
    is not in it keeps the name it came with.

    Raises:
        UserInputError: two channels are wanted with one name, or a name is empty.
    """

    def __init__(self, wanted: Mapping[str, str] | None = None) -> None:
        self._written = {key.strip().lower(): key.strip() for key in wanted or {}}
        self._wanted = {key.strip().lower(): name.strip() for key, name in (wanted or {}).items()}
        self._names = {name.lower() for name in self._wanted.values()}
        if "" in self._names or len(self._names) < len(self._wanted):
            raise UserInputError(
                "--channels must give each channel a name of its own, like 1=Mito,5=DNA."
            )
        self._used: set[str] = set()
        self._seen: set[str] = set()
        self._owners: dict[str, int] = {}

    def wanted(self, number: int | None, found: str) -> str:
        """Return the name that is wanted for the channel ``number`` that came as ``found``."""
        if len(self._seen) < _CHANNELS_REMEMBERED:
            self._seen.add(found)
        for key in ("" if number is None else str(number), found.strip().lower()):
            if key in self._wanted:
                self._used.add(key)
                return self._wanted[key]
        return found

    def name(self, number: int | None, found: str) -> str:
        """Return the name of a channel, of which only the number tells what it is.

        Of two numbers with one name, as some microscopes have two 'Brightfield', the later one
        gets its number added.

        Raises:
            UserInputError: a channel was wanted with the name that another one came with.
        """
        name = self.wanted(number, found)
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
        """Check that each name wanted was for a channel that came."""
        for key in self._wanted:
            if key not in self._used:
                raise UnknownNameError.of("channel", self._written[key], sorted(self._seen))


class _Channel(NamedTuple):
    """A channel, and the columns of its file and folder names.

    ``frame`` and ``series`` are CellProfiler's columns for the page of a file, from 0, and for
    the image of a file that holds several.
    """

    name: str
    file: str
    folder: str
    frame: str
    series: str


class _Cells:
    """Those of the ``wanted`` columns that a row has; ``pick`` takes their cells out at once.

    ``known``: what cells that came already mean. The plate, the well and site of each plate, the
    treatment come again and again: a million rows say little that is new.
    """

    def __init__(self, columns: Mapping[str, int], wanted: Iterable[str]) -> None:
        self.known: dict[Any, Any] = {}
        self.names = tuple(name for name in dict.fromkeys(wanted) if name in columns)
        indexes = [columns[name] for name in self.names]
        self.pick: Callable[[Sequence[str | None]], tuple[str | None, ...]]
        if len(indexes) > 1:
            self.pick = itemgetter(*indexes)
        else:  # itemgetter returns no tuple for one index
            self.pick = lambda cells: tuple([cells[index] for index in indexes])

    def texts(self, picked: Sequence[str | None]) -> dict[str, str]:
        """Return those picked cells that hold a value, by the name of their column."""
        if len(self.known) > _REMEMBERED:
            self.known.clear()
        pairs = zip(self.names, picked, strict=True)
        found = ((name, known_text(name, cell)) for name, cell in pairs if cell)
        return {name: text for name, text in found if text is not None}


def is_needed(column: str) -> bool:
    """Whether a column says which image a row is, or what was done to its well."""
    return column in _KNOWN or column.startswith(_OF_FILES)


def _whole_number(texts: Mapping[str, str], columns: Iterable[str]) -> int | None:
    """Return ``first_text`` as a whole number; '3.0', as pandas writes integers, is 3."""
    column = next((column for column in columns if column in texts), None)
    if column is None:
        return None
    number = whole_number(texts[column].removesuffix(".0"))
    if number is None:
        raise RowRefusedError("not a whole number", f"{column} is {texts[column][:50]!r}")
    return number


_File = tuple[int, tuple[str, int | None, str], str | None]
"""Index of the channel, then name, number and file name, then the folder of a URL."""
_Field = tuple[tuple[int, int, int, int, int, str | None], list[_File], str | None]
"""Row, column, site, plane, time point and core file name; the files; the plate of the folder."""


def _microscope_name(files: Sequence[_File]) -> ImageName | None:
    """Return what the first of the file names says that is one of a microscope."""
    found = (microscope_name(split_page(file[2])[0]) for _, file, _ in files)
    return next((name for name in found if name), None)


class ImageRows:
    """Makes images of rows. ``columns``: the position of each column in a row, by its name.

    Channels are the columns ``FileName_Orig*`` or ``FileName_*`` with ``PathName_*``, or ``URL_*``;
    a file name may be a URL, too. A channel whose file name is empty was not taken. ``Frame_*`` is
    the page of a file, from 0. Further columns: ``PLATES``, ``WELLS`` (or ``ROWS`` and
    ``COLUMNS``), ``SITES``, ``PLANE_COLUMNS``, ``TIME_COLUMNS``, ``Metadata_Batch`` and the
    treatment (``TREATMENT_COLUMNS`` and a dose). What no column says may be in the file names
    (``r01c01f01`` is field 1 of A01), or in the name of the ``folder`` of the table
    (``<plate>-<well>-<site>``).

    ``strict``: a row names a file, and its columns and file names must agree; rows with a
    ``Series_*`` above 0 are refused. Else, as for measurements, columns go before file names.
    """

    def __init__(
        self,
        columns: Mapping[str, int],
        plate: str | None = None,
        channels: ChannelNames | None = None,
        *,
        folder: str = "",
        strict: bool = False,
    ) -> None:
        self._plate, self._strict = plate, strict
        self._renaming = channels
        self._folder = _SITE_FOLDER.fullmatch(folder)
        # Where there are FileName_Orig* columns, only these are images; flat fields and drawings
        # never are. A URL stands in for a file name that is not there, or has no folder.
        found = dict.fromkeys(
            name.removeprefix(prefix)
            for prefix in (FILE_PREFIX, URL_PREFIX)
            for name in columns
            if name.startswith(prefix) and not _DRAWN.search(name)
        )
        self.channels: list[_Channel] = []
        for suffix in [name for name in found if name.startswith(_ORIGINAL)] or found:
            file, url, *others = (prefix + suffix for prefix in _OF_FILES)
            if url in columns and (file not in columns or others[0] not in columns):
                file = url
            self.channels.append(_Channel(suffix.removeprefix(_ORIGINAL) or suffix, file, *others))
        of_files = [name for item in self.channels for name in (item.file, item.frame, item.series)]
        doses = dose_columns(tuple(columns))
        known = _KNOWN.union(doses) - {*[name for name in PLATES if name in columns][1:]}
        others = [name for name in columns if name.startswith(METADATA) and name not in known]
        self._of_plate = _Cells(columns, [*PLATES, _BATCH, *(c.folder for c in self.channels)])
        self._of_field = _Cells(columns, [*_WHERE, *of_files])
        self._of_treatment = _Cells(columns, [*TREATMENT_COLUMNS, *doses])
        self._others = _Cells(columns, others)
        self._frames = _Cells(columns, [item.frame for item in self.channels])
        self._paged: set[str] = set()
        """Columns of frames of which some is above 0."""

    def find_pages(self, rows: Iterable[Sequence[str | None]]) -> None:
        """Find the channels that have other frames than 0, of all rows before the first is read.

        The first plane of a stack has the frame 0, as all files of one page have.
        """
        for cells in rows if self._frames.names else ():
            texts = self._frames.texts(self._frames.pick(cells))
            self._paged |= {column for column, text in texts.items() if text.strip("0.")}
            if len(self._paged) == len(self._frames.names):
                break

    def read(self, line: int, cells: Sequence[str | None]) -> ImageRecord | Refusal:
        """Return the image of a row, or why it is none."""
        try:
            key = self._of_field.pick(cells)
            if (field := self._of_field.known.get(key)) is None:
                field = self._read_field(self._of_field.texts(key))
                self._of_field.known[key] = field
            place, named, of_folder = field
            key = self._of_plate.pick(cells)
            if (of_plate := self._of_plate.known.get(key)) is None:
                texts = self._of_plate.texts(key)
                folders = [texts.get(item.folder) for item in self.channels]
                of_plate = first_text(texts, PLATES), texts.get(_BATCH), folders
                self._of_plate.known[key] = of_plate
            written, batch, folders = of_plate
            barcode = written or of_folder
            if barcode and self._plate and barcode != self._plate:
                raise RowRefusedError("another plate", f"plate {barcode}, not {self._plate}")
            barcode = barcode or self._plate
            if barcode is None and (found := _microscope_name(named)):
                barcode = found.plate  # a number of the instrument, where nothing else is known
            if barcode is None:
                detail = "the table does not name the plate; name it with --plate"
                raise RowRefusedError(NO_PLATE, detail)
            key = self._of_treatment.pick(cells)
            if (treated := self._of_treatment.known.get(key)) is None:
                texts, problem, treatment = self._of_treatment.texts(key), None, None
                try:
                    treatment = treatment_of(texts)
                except RowRefusedError as error:  # nothing is known of the well: the image is there
                    problem = error.args
                doses = () if treatment else dose_columns(tuple(texts))
                untold = {name.removeprefix(METADATA): texts[name] for name in doses}
                treated = self._of_treatment.known[key] = treatment, untold, problem
        except RowRefusedError as refused:
            return Refusal(line, *refused.args)
        treatment, untold, problem = treated
        key = self._others.pick(cells)
        if (of_well := self._others.known.get(key)) is None:
            texts = self._others.texts(key)
            size = None
            if texts:
                size = pixel_size((texts.get(column), "m") for column in _PIXEL_COLUMNS)
            for column in _PIXEL_COLUMNS if size else ():
                del texts[column]
            more = {name.removeprefix(METADATA): text for name, text in texts.items()}
            of_well = self._others.known[key] = size, more or None
        size, metadata = of_well
        if untold:
            metadata = {**(metadata or {}), **untold}
        files = tuple([_new(FileRef, (*file, own or folders[at])) for at, file, own in named])
        where = (line, barcode, batch, *place, files)
        return _new(ImageRecord, (*where, treatment, size, metadata, problem))

    def _read_field(self, texts: Mapping[str, str]) -> _Field:
        """Return where an image is, and its files, as the columns and the file names say."""
        well = written_well(*(first_text(texts, some) for some in (WELLS, ROWS, COLUMNS)))
        site, plane, time_point = (
            _whole_number(texts, some) for some in (SITES, PLANE_COLUMNS, TIME_COLUMNS)
        )
        files: list[_File] = []
        frames: list[int | None] = []
        numbers_of = attrgetter("row", "column", "site", "plane", "time_point")
        agreed: ImageName | None = None
        for index, channel in enumerate(self.channels):
            text = texts.get(channel.file)
            if text is None:
                continue
            folder, text = split_url(text)
            if not is_safe_name(text):
                raise RowRefusedError("file name with a folder in it", f"{channel.name}: {text!r}")
            name = core_file_name(text)
            number = name.number if name else None
            if name is not None:
                agreed = agreed or name
                # r1c1f1 is r01c01f01, and no plane or time point means the first.
                first, other = (
                    [_FIRST if number is None else number for number in numbers_of(item)]
                    for item in (agreed, name)
                )
                if self._strict and first != other:
                    detail = f"{name.core_name} beside {agreed.core_name}"
                    raise RowRefusedError("files of different fields", detail)
            own = channel.name
            renamed = self._renaming.wanted(number, own) if self._renaming else own
            files.append((index, (renamed, number, text), folder))
            if self._strict and (series := _whole_number(texts, (channel.series,))):
                detail = f"{channel.series} is {series}: export each image of the file by itself"
                raise RowRefusedError("another series of a file", detail)
            frames.append(_whole_number(texts, (channel.frame,)))
        if self._strict and not files:
            raise RowRefusedError("no image file", "every FileName column is empty")
        names = [file[0] for _, file, _ in files]
        if len(set(names)) < len(names):
            raise RowRefusedError("two files of one channel", ", ".join(names))
        for position, ((index, file, folder), frame) in enumerate(zip(files, frames, strict=True)):
            if frame is not None and (any(frames) or self.channels[index].frame in self._paged):
                try:
                    paged = page_name(file[2], frame + 1)
                except UserInputError as error:
                    raise RowRefusedError("no such page", str(error)) from error
                files[position] = index, (*file[:2], paged), folder
        if agreed and self._strict and well not in (None, (agreed.row, agreed.column)):
            of_file = format_well(agreed.row, agreed.column)
            detail = f"well {format_well(*well)}, file of {of_file}"
            raise RowRefusedError("well and file name disagree", detail)
        if agreed is None and None in (well, site):
            agreed = _microscope_name(files)
        plate = None
        if agreed is None and self._folder:
            with suppress(UserInputError):
                where, plate = parse_well(self._folder["well"]), self._folder["plate"]
                agreed = ImageName(plate, *where, int(self._folder["site"]))
        core_name = None
        if agreed is not None:
            well = well or (agreed.row, agreed.column)
            site = agreed.site if site is None else site
            plane = agreed.plane if plane is None else plane
            time_point = agreed.time_point if time_point is None else time_point
            core_name = agreed.core_name if well == (agreed.row, agreed.column) else None
        if well is None:
            raise RowRefusedError("no well", "neither a well column nor a file name with a well")
        if site is None:
            raise RowRefusedError("no site", "neither Metadata_Site nor a file name with a field")
        plane = _FIRST if plane is None else plane
        time_point = _FIRST if time_point is None else time_point
        core_name = texts.get(_CORE_NAME, core_name)
        return (*well, site, plane, time_point, core_name), files, plate


def read_image_table(
    table: TextTable,
    plate: str | None = None,
    channels: Mapping[str, str] | None = None,
) -> Iterator[ImageRecord | Refusal]:
    """Yield the images of a table (see :class:`ImageRows`), one record or refusal per data row.

    ``plate`` is needed only where no column names it; ``channels`` gives a channel, by its
    Phenix number or its name here, another name: a number alone never names a stain.

    Raises:
        BadTableError: a column is missing, or two of them are one channel.
        UnknownNameError: ``channels`` renames a channel that is not there; of numbers that is
            known when all is read.
        UserInputError: a table that does not name its plate, and no ``plate``.
    """
    for name in sorted(filter(is_needed, table.repeated)):
        table.position(name)  # which cannot be told apart
    columns = {name: at for at, name in enumerate(table.columns) if name not in table.repeated}
    if plate is None and columns.keys().isdisjoint(PLATES):
        raise UserInputError(f"{table.path.name} does not name its plate. Name it with --plate.")
    renaming = ChannelNames(channels) if channels else None
    images = ImageRows(columns, plate, renaming, strict=True)
    if not images.channels:
        raise BadTableError(
            f"{table.path.name} names no images: it has no column FileName_Orig<channel>. "
            f"{nearest_columns([FILE_PREFIX + 'OrigDNA'], table.columns)}"
        )
    names = [channel.name for channel in images.channels]
    if renaming:
        names = [renaming.wanted(None, name) for name in names]
    names = [name.lower() for name in names]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BadTableError(
            f"{table.path.name} would have two channels of one name ({', '.join(repeated)}). "
            "Rename one of the FileName columns, or give each a name of its own with --channels."
        )
    if renaming and not any(key.strip().isdigit() for key in channels or ()):
        renaming.check_used()
    images.find_pages(row.cells for row in table.rows() if not isinstance(row, Refusal))
    for row in table.rows():
        yield row if isinstance(row, Refusal) else images.read(*row)
    if renaming:
        renaming.check_used()
