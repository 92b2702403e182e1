"""CellProfiler's measurements of objects, as CSV files or in SQLite, joined to cells."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..enums import PerturbationKind
from ..errors import BadTableError, UserInputError
from .filenames import (
    PLANE_COLUMNS,
    TIME_COLUMNS,
    PhenixName,
    cellomics_name,
    core_file_name,
    format_well,
    parse_well,
    wellsite_name,
)
from .image_files import SQLITE, is_safe_name
from .platemaps import TREATMENT_COLUMNS, treatment_of
from .records import (
    BOX,
    CENTRE,
    Cells,
    FeatureColumn,
    FileRef,
    ImageRecord,
    ImageRow,
    Integers,
    Notice,
    ObjectBatch,
    ObjectSource,
    Place,
    Refusal,
    RefusedRows,
    RowOrigin,
    SourceFile,
    TreatmentRecord,
    batch_rows,
    place_values,
)
from .wide_tables import (
    CsvBlock,
    CsvHeader,
    Spool,
    as_integers,
    as_numbers,
    batch_of,
    mask_lines,
    read_blocks,
    read_header,
    union,
)

IMAGE, EXPERIMENT = "image", "experiment"
NOT_OBJECTS = frozenset({IMAGE, EXPERIMENT, "load_data", "load_data_with_illum", "relationship"})

COMPARTMENTS = ("Cells", "Nuclei", "Cytoplasm")
_COMPARTMENT = re.compile(r"(?P<name>cells?|nuclei|nucleus|cytoplasm)(?P<rest>_.+)?", re.IGNORECASE)
_CANONICAL = {"cell": "Cells", "nucleus": "Nuclei"}
_EXPORTED = re.compile(r"(?:.*_)?Per_(?P<name>.+)", re.IGNORECASE)

IMAGE_NUMBER, OBJECT_NUMBER, TABLE_NUMBER = "ImageNumber", "ObjectNumber", "TableNumber"
_NUMBER = "Number_Object_Number"
_PARENT = "Parent_"
_KEYS = frozenset({IMAGE_NUMBER, OBJECT_NUMBER, TABLE_NUMBER, _NUMBER, "", "Unnamed: 0"})
_ABOUT = ("Metadata_", "FileName_", "PathName_", "URL_", "MD5Digest_", "Group_", _PARENT)

_BOX = {
    "min_row": "AreaShape_BoundingBoxMinimum_Y",
    "min_col": "AreaShape_BoundingBoxMinimum_X",
    "max_row": "AreaShape_BoundingBoxMaximum_Y",
    "max_col": "AreaShape_BoundingBoxMaximum_X",
}
_CENTRES = (
    {"centroid_row": "AreaShape_Center_Y", "centroid_col": "AreaShape_Center_X"},
    {"centroid_row": "Location_Center_Y", "centroid_col": "Location_Center_X"},
)


@dataclass(frozen=True)
class TableColumns:
    """The columns of one table of objects by what they are for, as the table writes them.

    ``features`` maps each to the name of its feature; ``parents`` maps compartments to columns.
    """

    name: str
    role: str
    features: dict[str, str]
    object_number: str
    parents: dict[str, str]

    def place(self) -> Place:
        """Return the columns of box and centre; CellProfiler's boxes are half open, from 0."""
        by_measure = self._by_measure()
        found = {key: by_measure[name] for key, name in _BOX.items() if name in by_measure}
        box = found if len(found) == len(_BOX) else {}
        for centre in _CENTRES:
            if all(name in by_measure for name in centre.values()):
                return {**box, **{key: by_measure[name] for key, name in centre.items()}}
        return box

    def _by_measure(self) -> dict[str, str]:
        if self.name.lower() != "object":
            return {_without(name, self.name): name for name in self.features}
        for role in COMPARTMENTS:
            own = {_without(name, role): name for name in self.features if _is_of(name, role)}
            if own:
                return own
        return {}


def table_name(written: str) -> str:
    """Return what a table or file is about: 'Cells' of 'Cells', 'Image' of 'MyExpt_Per_Image'."""
    exported = _EXPORTED.fullmatch(written)
    return exported["name"] if exported else written


def is_image_table(written: str) -> bool:
    """Whether a table is the one with a row per image."""
    return table_name(written).lower() == IMAGE


def is_object_table(written: str, columns: Iterable[str]) -> bool:
    """Whether a table has a row per object."""
    if table_name(written).lower() in NOT_OBJECTS:
        return False
    present = set(columns)
    return IMAGE_NUMBER in present and _object_number(table_name(written), present) is not None


def table_columns(written: str, columns: Sequence[str]) -> TableColumns:
    """Sort the columns of a table of objects.

    Raises:
        BadTableError: it has no object number.
    """
    name = table_name(written)
    number = _object_number(name, columns)
    if number is None:
        raise BadTableError(f"Table {written} has no column {OBJECT_NUMBER}; export it with one.")
    features = {
        column: feature_name(name, column)
        for column in columns
        if is_feature(_without_object(column, name)) and column != number
    }
    return TableColumns(name, role_of(name), features, number, _parents(name, columns))


def is_feature(measure: str) -> bool:
    """Whether a column (without the name of its object) measures something."""
    return measure not in _KEYS and not measure.startswith(_ABOUT)


def feature_name(table: str, column: str) -> str:
    """Return ``<table>_<column>``; a column that begins with its object keeps its name."""
    if table.lower() == "object" or column.startswith(f"{table}_"):
        return column
    return f"{table}_{column}"


def role_of(table: str) -> str:
    """Return 'Cells', 'Nuclei' or 'Cytoplasm', or the name of the table itself."""
    match = _COMPARTMENT.fullmatch(table)
    if match is None:
        return table
    word = match["name"].lower()
    return _CANONICAL.get(word, word.capitalize())


def choose_tables(tables: Sequence[TableColumns], where: str) -> tuple[list[TableColumns], str]:
    """Return the tables that together describe the cells, and a note on those left out.

    Raises:
        BadTableError: there is none, or several segmentations are side by side.
    """
    measured = [table for table in tables if table.features]
    compartments = [table for table in measured if table.role in COMPARTMENTS]
    chosen = compartments or measured
    if not chosen:
        raise BadTableError(f"{where} has no table of objects with measurements (Cells, Nuclei).")
    sets = {_suffix(table.name) for table in chosen} if compartments else {t.name for t in chosen}
    if len(sets) > 1 or len({table.role for table in chosen}) < len(chosen):
        names = ", ".join(table.name for table in chosen)
        raise BadTableError(
            f"{where} has several sets of objects ({names}). Move all but one of them out."
        )
    left = [table.name for table in tables if table not in chosen]
    note = f"left out, as they are no part of the cells: {', '.join(left)}" if left else ""
    return sorted(chosen, key=_rank), note


def primary_of(tables: Iterable[TableColumns]) -> TableColumns:
    """Return the table whose object numbers are the labels of the cells."""
    by_role = {table.role: table for table in tables}
    for role in COMPARTMENTS:
        if role in by_role:
            return by_role[role]
    return next(iter(by_role.values()))


def base_of(tables: Iterable[TableColumns]) -> TableColumns:
    """Return the table that the others are joined to: it names their objects as its parents."""
    by_role = {table.role: table for table in tables}
    for role in ("Cytoplasm", "Cells", "Nuclei"):
        if role in by_role:
            return by_role[role]
    return next(iter(by_role.values()))


def joined_headers(first: Sequence[str], second: Sequence[str]) -> list[str] | None:
    """Return the columns of a table with two header lines (objects, measures); None: it has one.

    So does cytominer-database collate the tables of an image.
    """
    if IMAGE_NUMBER in first or IMAGE_NUMBER not in second or len(first) != len(second):
        return None
    return [
        measure
        if owner.lower() in (IMAGE, "object") or measure == IMAGE_NUMBER
        else feature_name(owner, measure)
        for owner, measure in zip(first, second, strict=True)
    ]


def without_repeats(names: Iterable[str]) -> list[str]:
    """Return ``names`` with a mark after each that came before; see :func:`is_repeat`."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}\0{seen[name]}")
    return found


def is_repeat(name: str) -> bool:
    """Whether a column of this name came before in the same table."""
    return "\0" in name


def _rank(table: TableColumns) -> int:
    return COMPARTMENTS.index(table.role) if table.role in COMPARTMENTS else len(COMPARTMENTS)


def _suffix(name: str) -> str:
    match = _COMPARTMENT.fullmatch(name)
    return (match["rest"] or "") if match else name


def _without(column: str, table: str) -> str:
    return column.removeprefix(f"{table}_")


def _is_of(column: str, role: str) -> bool:
    return column.startswith(f"{role}_")


def _without_object(column: str, table: str) -> str:
    """Return a column without the name of its object, also in tables of several objects."""
    if table.lower() != "object":
        return _without(column, table)
    first, _, rest = column.partition("_")
    return rest if role_of(first) in COMPARTMENTS else column


def _object_number(table: str, columns: Iterable[str]) -> str | None:
    present = set(columns)
    candidates = (OBJECT_NUMBER, f"{table}_{OBJECT_NUMBER}", _NUMBER, f"{table}_{_NUMBER}")
    numbers = (OBJECT_NUMBER, _NUMBER)
    several = tuple(f"{role}_{number}" for role in COMPARTMENTS for number in numbers)
    return next((name for name in (*candidates, *several) if name in present), None)


def _parents(table: str, columns: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for column in columns:
        measure = _without(column, table)
        if measure.startswith(_PARENT):
            role = role_of(measure.removeprefix(_PARENT))
            if role in COMPARTMENTS:
                found.setdefault(role, column)
    return found


FILE, FOLDER, METADATA = "FileName_", "PathName_", "Metadata_"
_ORIGINAL = "Orig"
_DRAWN = re.compile(r"Illum|Outline|Overlay", re.IGNORECASE)
_MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "<NA>", "None"})
_CELLPROFILER_IMAGES_LARGEST = 1_000_000

_SITE_FOLDER = re.compile(r"(?P<plate>.+)-(?P<well>[A-Z]{1,2}[0-9]{1,2})-(?P<site>[0-9]+)")

WELLS = ("Metadata_Well", "Metadata_well")
SITES = ("Metadata_Site", "Metadata_site", "Metadata_FieldID", "Metadata_Field")
PLATES = ("Metadata_Plate", "Metadata_plate", "Metadata_Barcode", "Metadata_PlateBarcode")
ROWS, COLUMNS = ("Metadata_Row",), ("Metadata_Col", "Metadata_Column")
PLANES, TIMES = PLANE_COLUMNS, TIME_COLUMNS
BATCHES = ("Metadata_Batch",)
NEEDED = frozenset(
    {*WELLS, *SITES, *PLATES, *ROWS, *COLUMNS, *PLANES, *TIMES, *BATCHES, *TREATMENT_COLUMNS}
    | {"Metadata_CoreName"}
)
"""The columns (without ``Image_``) that say which image it is and what was done to it."""

NO_PLATE = "no plate"
"""Reason of a row that does not say which plate it is of."""

Values = Mapping[str, str | None]


class _RefusedError(Exception):
    """The row is no image; becomes a ``Refusal``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.refusal = (reason, detail)


@dataclass(frozen=True)
class _Said:
    """What the names of the files, or of the folder of the table, say.

    ``scan`` is a number of the instrument: the plate, if nothing else says which it is.
    """

    well: tuple[int, int] | None
    site: int | None
    phenix: PhenixName | None
    plate: str | None = None
    scan: str | None = None


def plain_column(column: str) -> str:
    """Return the name of a column of an image table without the prefix ``Image_``."""
    return column.removeprefix("Image_")


def is_needed(column: str) -> bool:
    """Whether a column (without ``Image_``) is read to know which image a row is."""
    return column in NEEDED or column.startswith((FILE, FOLDER))


def channels_of(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the channels that ``FileName_*`` columns name; flat fields and drawings are none.

    Where there are ``FileName_Orig*`` columns, only these are images.
    """
    named = [name.removeprefix(FILE) for name in columns if name.startswith(FILE)]
    images = [name for name in named if not _DRAWN.search(name)]
    original = [name for name in images if name.startswith(_ORIGINAL)]
    return tuple(original or images)


def image_record(
    line: int,
    values: Values,
    channels: Sequence[str],
    plate: str | None = None,
    folder: str | None = None,
) -> ImageRecord | Refusal:
    """Return the image of one row; ``values`` by column without ``Image_``.

    What the columns say goes before what the file names say, and that before the name of the
    ``folder`` of the table (``<plate>-<well>-<site>``).
    """
    try:
        return _record(line, values, channels, plate, folder)
    except _RefusedError as refused:
        return Refusal(line, *refused.refusal)


def _record(
    line: int, values: Values, channels: Sequence[str], plate: str | None, folder: str | None
) -> ImageRecord:
    files = tuple(_files(values, channels))
    said = _said(files, folder)
    well = _well(values, said)
    agrees = said.phenix is not None and (said.phenix.row, said.phenix.column) == well
    return ImageRecord(
        line=line,
        plate=_plate(values, said, plate),
        batch=_first(values, BATCHES),
        row=well[0],
        column=well[1],
        site=_site(values, said),
        plane=_number_or_1(values, PLANES),
        time_point=_number_or_1(values, TIMES),
        core_name=_core_name(values, said) if agrees else _first(values, ("Metadata_CoreName",)),
        files=files,
        treatment=_treatment(values),
    )


def _treatment(values: Values) -> TreatmentRecord | None:
    """Return the treatment of a row; pycytominer's ``pert_type`` may name its kind."""

    def get(*columns: str) -> str | None:
        return _first(values, columns)

    found = treatment_of(get)
    kind = (get("Metadata_pert_type") or "").lower()
    if found is None or kind not in list(PerturbationKind):
        return found
    return replace(found, kind=PerturbationKind(kind))


def disagreement(record: ImageRecord) -> str | None:
    """Return what is odd where a file name of a record says another well than its columns."""
    for file in record.files:
        name = core_file_name(file.name)
        if name is not None and (name.row, name.column) != (record.row, record.column):
            written = format_well(record.row, record.column)
            return f"well {written}, file {file.name}"
    return None


def _files(values: Values, channels: Sequence[str]) -> Iterable[FileRef]:
    for channel in channels:
        name = _first(values, (FILE + channel,))
        if name is None:
            continue
        if not is_safe_name(name):
            raise _RefusedError("file name with a folder in it", f"{channel}: {name!r}")
        phenix = core_file_name(name)
        plain = channel.removeprefix(_ORIGINAL) or channel
        number = phenix.channel if phenix else None
        yield FileRef(plain, number, name, _first(values, (FOLDER + channel,)))


def _said(files: Sequence[FileRef], folder: str | None) -> _Said:
    for file in files:
        phenix = core_file_name(file.name)
        if phenix is not None:
            return _Said((phenix.row, phenix.column), phenix.field, phenix)
    for file in files:
        name = cellomics_name(file.name) or wellsite_name(file.name)
        if name is not None:
            return _Said((name.row, name.column), name.site, None, None, name.plate)
    match = _SITE_FOLDER.fullmatch(folder or "")
    if match is not None and (well := _parsed(match["well"])):
        return _Said(well, int(match["site"]), None, match["plate"])
    return _Said(None, None, None)


def _parsed(text: str) -> tuple[int, int] | None:
    try:
        return parse_well(text)
    except UserInputError:
        return None


def _well(values: Values, said: _Said) -> tuple[int, int]:
    text = _first(values, WELLS)
    row, column = _first(values, ROWS), _first(values, COLUMNS)
    if text is None and row and column:
        text = f"r{row}c{column}" if row.isdigit() else f"{row}{column}"
    if text is None:
        if said.well is None:
            raise _RefusedError("no well", "neither a well column nor a file name with a well")
        return said.well
    found = _parsed(text)
    if found is None:
        raise _RefusedError("not a well", f"{text!r}: write wells like A01")
    return found


def _site(values: Values, said: _Said) -> int:
    site = _cellprofiler_images_whole(values, SITES)
    site = said.site if site is None else site
    if site is None:
        raise _RefusedError("no site", "neither Metadata_Site nor a file name with a field")
    return site


def _plate(values: Values, said: _Said, plate: str | None) -> str:
    written = _first(values, PLATES) or said.plate
    if written and plate and written != plate:
        raise _RefusedError("another plate", f"plate {written}, not {plate}")
    found = written or plate or said.scan
    if found is None:
        raise _RefusedError(NO_PLATE, "nothing says which plate it is; name it with --plate")
    return found


def _core_name(values: Values, said: _Said) -> str | None:
    written = _first(values, ("Metadata_CoreName",))
    return written or (said.phenix.core if said.phenix else None)


def _number_or_1(values: Values, columns: Sequence[str]) -> int:
    written = _cellprofiler_images_whole(values, columns)
    return 1 if written is None else written


def _first(values: Values, columns: Iterable[str]) -> str | None:
    for column in columns:
        text = (values.get(column) or "").strip()
        if text not in _MISSING:
            return text
    return None


def _cellprofiler_images_whole(values: Values, columns: Iterable[str]) -> int | None:
    text = _first(values, columns)
    if text is None:
        return None
    digits = text.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and int(digits) <= _CELLPROFILER_IMAGES_LARGEST):
        raise _RefusedError("not a whole number", f"{next(iter(columns))} is {text!r}")
    return int(digits)


UNKNOWN = -1
"""An image that no image table has, or a number that is none."""

_SHIFT = 32
_LARGEST = 1 << 31


@dataclass(frozen=True)
class TableKeys:
    """The numbers of every row of one kind of table, an item each.

    ``image`` counts into the images (``UNKNOWN``: none such); ``parents`` by role; ``file`` and
    ``line`` say where the row is.
    """

    columns: TableColumns
    image: Integers
    number: Integers
    parents: dict[str, Integers]
    file: Integers
    line: Integers

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class LeftOut:
    """Rows of one table that are no part of a cell, and why."""

    table: TableKeys
    rows: Integers
    reason: str
    detail: str


@dataclass(frozen=True)
class Joined:
    """``rows[t][i]`` is the row of table ``t`` of cell ``i``; labels are object numbers."""

    tables: tuple[TableKeys, ...]
    rows: tuple[Integers, ...]
    image: Integers
    label: Integers
    left_out: tuple[LeftOut, ...]


def join_tables(tables: Sequence[TableKeys]) -> Joined:
    """Join tables by image and object number: a cell has one row of each.

    The parents that Cytoplasm names (else those that Cells name, else equal numbers) decide.
    Every row is part of a cell, or left out with its reason.
    """
    return _Join(tuple(tables)).run()


class _Join:
    def __init__(self, tables: tuple[TableKeys, ...]) -> None:
        self._tables = tables
        self._left: list[LeftOut] = []
        columns = [table.columns for table in tables]
        self._base = columns.index(base_of(columns))
        self._primary = columns.index(primary_of(columns))
        self._usable = [self._with_keys(table) for table in tables]

    def run(self) -> Joined:
        base = self._usable[self._base]
        rows = {self._base: base}
        # Cells first: they say which nucleus is theirs where Cytoplasm does not.
        others = [number for number in range(len(self._tables)) if number != self._base]
        for number in sorted(others, key=lambda n: self._tables[n].columns.role != "Cells"):
            found, kept = self._partners(number, rows)
            rows = {other: chosen[kept] for other, chosen in rows.items()}
            rows[number] = found
        rows = self._each_once(rows)
        self._unused(rows)
        primary, chosen = self._tables[self._primary], rows[self._primary]
        return Joined(
            self._tables,
            tuple(rows[number] for number in range(len(self._tables))),
            primary.image[chosen],
            primary.number[chosen],
            tuple(item for item in self._left if len(item.rows)),
        )

    def _with_keys(self, table: TableKeys) -> Integers:
        """Return the rows of ``table`` that have a key of their own, in their order."""
        unknown = table.image == UNKNOWN
        self._leave(table, unknown, "image unknown", "no image table has its ImageNumber")
        odd = ~unknown & ((table.number < 0) | (table.number >= _LARGEST))
        self._leave(table, odd, "no object number", "it is missing, or no whole number")
        rows = np.flatnonzero(~unknown & ~odd)
        keys = _keys(table.image[rows], table.number[rows])
        _, first = np.unique(keys, return_index=True)
        again = np.ones(len(rows), bool)
        again[first] = False
        self._add(table, rows[again], "duplicate key", "an earlier row has the same numbers")
        unique: Integers = rows[~again]
        return unique

    def _partners(
        self, number: int, rows: dict[int, Integers]
    ) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Return the rows of table ``number`` that belong to ``rows``, and which have one."""
        table, usable = self._tables[number], self._usable[number]
        base = self._tables[self._base]
        image = base.image[rows[self._base]]
        wanted = _keys(image, self._wanted(table.columns.role, rows))
        keys = _keys(table.image[usable], table.number[usable])
        order = np.argsort(keys, kind="stable")
        place = np.searchsorted(keys[order], wanted)
        place[place == len(keys)] = 0
        kept = keys[order][place] == wanted if len(keys) else np.zeros(len(wanted), bool)
        lost = rows[self._base][~kept]
        self._add(base, lost, "no parent", f"its object is not in table {table.columns.name}")
        return usable[order[place[kept]]] if len(keys) else usable[:0], kept

    def _wanted(self, role: str, rows: dict[int, Integers]) -> Integers:
        for number in (self._base, *rows):
            table = self._tables[number]
            if role in table.parents:
                return table.parents[role][rows[number]]
        return self._tables[self._base].number[rows[self._base]]

    def _each_once(self, rows: dict[int, Integers]) -> dict[int, Integers]:
        """Leave out a second row of the base that names the same object as its parent."""
        _, first = np.unique(rows[self._primary], return_index=True)
        kept = np.zeros(len(rows[self._primary]), bool)
        kept[first] = True
        again = rows[self._base][~kept]
        self._add(self._tables[self._base], again, "duplicate key", "its cell has a row already")
        return {number: chosen[kept] for number, chosen in rows.items()}

    def _unused(self, rows: dict[int, Integers]) -> None:
        for number, table in enumerate(self._tables):
            if number == self._base:
                continue
            idle = np.zeros(len(table), bool)
            idle[self._usable[number]] = True
            idle[rows[number]] = False
            base = self._tables[self._base].columns.name
            self._leave(table, idle, "not joined", f"no row of {base} belongs to it")

    def _leave(
        self, table: TableKeys, rows: npt.NDArray[np.bool_], reason: str, detail: str
    ) -> None:
        self._add(table, np.flatnonzero(rows), reason, detail)

    def _add(self, table: TableKeys, rows: Integers, reason: str, detail: str) -> None:
        self._left.append(LeftOut(table, rows, reason, detail))


def _keys(image: Integers, number: Integers) -> Integers:
    usable = np.where((number < 0) | (number >= _LARGEST), _LARGEST, number)
    return np.asarray((image << _SHIFT) | usable, np.int64)


_DEEPEST = 6
_SUFFIXES = (".csv", ".csv.gz")


@dataclass(frozen=True)
class CsvFile:
    """One CSV file of a folder; ``name`` is relative to the source, ``folder`` counts folders."""

    path: Path
    name: str
    table: str
    folder: int
    header: CsvHeader


@dataclass
class CsvFolder:
    """The tables that a folder and its subfolders have, by what they are."""

    root: Path
    folders: list[str] = field(default_factory=list)
    images: list[CsvFile] = field(default_factory=list)
    objects: list[CsvFile] = field(default_factory=list)
    empty: list[CsvFile] = field(default_factory=list)


@dataclass(frozen=True)
class CsvImage:
    """A row of an image table, or why it cannot be read."""

    file: CsvFile
    line: int
    number: int | None
    values: Mapping[str, str | None]
    refusal: Refusal | None = None


@dataclass
class CsvTable:
    """One kind of table ('Cells') over all files that have it."""

    columns: TableColumns
    files: list[CsvFile]
    spool: Spool
    rows: dict[str, int] = field(default_factory=dict)
    refused: list[RefusedRows] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def is_csv(path: Path) -> bool:
    """Whether a file is called like a CSV file."""
    return path.name.lower().endswith(_SUFFIXES)


def stem_of(path: Path) -> str:
    """Return the name of a CSV file without its ending."""
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    return Path(name).stem


def find_image_table(folder: Path) -> Path | None:
    """Return the first image table of a folder or its subfolders, without reading any."""
    for path in _csv_files(folder):
        if is_image_table(stem_of(path)):
            return path
    return None


def scan(root: Path) -> CsvFolder:
    """Look at the headers of all CSV files below ``root``.

    Raises:
        BadTableError: one is damaged.
        UserInputError: one cannot be read.
    """
    found = CsvFolder(root)
    numbers: dict[Path, int] = {}
    for path in _csv_files(root):
        if path.parent not in numbers:
            numbers[path.parent] = len(found.folders)
            found.folders.append(path.parent.name)
        _sort_in(found, path, numbers[path.parent])
    return found


def image_rows(folder: CsvFolder) -> Iterator[CsvImage]:
    """Yield the rows of all image tables, with the columns that say which image each is.

    Raises:
        BadTableError: a file is damaged.
    """
    for file in folder.images:
        names = without_repeats(file.header.columns)
        needed = [name for name in names if is_needed(plain_column(name))]
        bad: list[Refusal] = []
        only = [IMAGE_NUMBER, *needed]
        for block in read_blocks(file.header, names, bad.append, only):
            numbers = as_integers(block.batch.column(0)).tolist()
            plain = block.batch.rename_columns([IMAGE_NUMBER, *map(plain_column, needed)])
            rows = zip(block.lines.tolist(), numbers, plain.to_pylist(), strict=True)
            for line, number, values in rows:
                yield CsvImage(file, line, number if number >= 0 else None, values)
        for refusal in bad:
            yield CsvImage(file, refusal.line, None, {}, refusal)


def spool_table(
    name: str,
    files: Sequence[CsvFile],
    target: Path,
    image_of: Callable[[int, Integers], Integers],
    first_file: int,
) -> tuple[CsvTable, TableKeys]:
    """Move the rows of all ``files`` into ``target``; return the table and its keys.

    ``image_of(folder, image numbers)`` gives the images, ``first_file`` the number of the first
    file in ``RowOrigin.file``.

    Raises:
        BadTableError: a file is damaged.
    """
    columns = table_columns(name, _plain_union(files))
    schema = pa.schema([(column, pa.float64()) for column in columns.features])
    table = CsvTable(columns, list(files), Spool(target, schema))
    reader = _Spooler(table)
    for number, file in enumerate(files):
        reader.read(file, first_file + number, image_of)
    table.spool.finish()
    return table, reader.keys()


def _plain_union(files: Sequence[CsvFile]) -> list[str]:
    names = union(without_repeats(file.header.columns) for file in files)
    return [name for name in names if not is_repeat(name)]


class _Spooler:
    """Reads the files of one kind of table, one after the other."""

    def __init__(self, table: CsvTable) -> None:
        self._table = table
        self._parts: dict[str, list[Integers]] = {
            key: [] for key in ("image", "number", "file", "line", *table.columns.parents)
        }
        self._odd: dict[str, tuple[int, int]] = {}

    def read(
        self, file: CsvFile, number: int, image_of: Callable[[int, Integers], Integers]
    ) -> None:
        names = without_repeats(file.header.columns)
        bad: list[Refusal] = []
        rows = 0
        self._odd = {}
        for block in self._blocks(file, names, bad):
            rows += block.batch.num_rows
            self._add_keys(block, file, number, image_of)
            self._table.spool.append(self._values(block))
        self._table.rows[file.name] = rows + len(bad)
        self._refuse(file, bad)
        self._tell(file, rows + len(bad))

    def _blocks(
        self, file: CsvFile, names: Sequence[str], bad: list[Refusal]
    ) -> Iterator[CsvBlock]:
        """Read a file as numbers; from where one of them is none, go on with texts."""
        columns = self._table.columns
        known = {IMAGE_NUMBER, columns.object_number, *columns.parents.values()} | set(
            columns.features
        )
        numbers = {name for name in names if name.partition("\0")[0] in known}
        done = 0
        try:
            for block in read_blocks(file.header, names, bad.append, numbers=numbers):
                done += block.batch.num_rows
                yield block
        except BadTableError:
            bad.clear()
        else:
            return
        for block in read_blocks(file.header, names, bad.append):
            skipped = min(done, block.batch.num_rows)
            done -= skipped
            yield CsvBlock(block.batch.slice(skipped), block.lines[skipped:])

    def keys(self) -> TableKeys:
        """Return the keys of all rows read."""
        whole = {
            key: np.concatenate(parts) if parts else np.empty(0, np.int64)
            for key, parts in self._parts.items()
        }
        parents = {role: whole[role] for role in self._table.columns.parents}
        return TableKeys(
            self._table.columns,
            whole["image"],
            whole["number"],
            parents,
            whole["file"],
            whole["line"],
        )

    def _add_keys(
        self,
        block: CsvBlock,
        file: CsvFile,
        number: int,
        image_of: Callable[[int, Integers], Integers],
    ) -> None:
        columns = self._table.columns
        rows = block.batch.num_rows
        self._parts["image"].append(image_of(file.folder, _whole(block, IMAGE_NUMBER)))
        self._parts["number"].append(_whole(block, columns.object_number))
        self._parts["file"].append(np.full(rows, number, np.int64))
        self._parts["line"].append(block.lines)
        for role, column in columns.parents.items():
            self._parts[role].append(_whole(block, column))

    def _values(self, block: CsvBlock) -> pa.RecordBatch:
        found: dict[str, pa.Array] = {}
        for name, texts in zip(block.batch.schema.names, block.batch.columns, strict=True):
            if name in self._table.columns.features:
                found[name], odd = as_numbers(texts)
                if odd is not None:
                    self._note(f"{name} is not a number", mask_lines(block.lines, odd))
        for name in filter(is_repeat, block.batch.schema.names):
            self._compare(block, name)
        return batch_of(found, block.batch.num_rows)

    def _compare(self, block: CsvBlock, name: str) -> None:
        first = name.partition("\0")[0]
        places = map(block.batch.schema.get_field_index, (first, name))
        other = pc.not_equal(*(as_numbers(block.batch.column(place))[0] for place in places))
        other = pc.fill_null(other, False)
        if pc.any(other).as_py():
            self._note(f"{first} comes twice, the first is used", mask_lines(block.lines, other))

    def _note(self, what: str, lines: Integers) -> None:
        count, first = self._odd.get(what, (0, int(lines[0])))
        self._odd[what] = count + len(lines), first

    def _refuse(self, file: CsvFile, bad: Sequence[Refusal]) -> None:
        self._table.refused += [
            RefusedRows(file.name, [item.line], item.reason, item.detail) for item in bad
        ]

    def _tell(self, file: CsvFile, rows: int) -> None:
        notices = self._table.notices
        if rows == 0:
            notices.append(Notice(file.name, None, "no rows", "the file has a header only"))
        for what, (count, line) in self._odd.items():
            notices.append(Notice(file.name, line, "odd value", f"{what} in {count} rows"))


def _whole(block: CsvBlock, column: str) -> Integers:
    place = block.batch.schema.get_field_index(column)
    if place < 0:
        return np.full(block.batch.num_rows, -1, np.int64)
    return as_integers(block.batch.column(place))


def _sort_in(found: CsvFolder, path: Path, folder: int) -> None:
    header = read_header(path, joined_headers)
    name = path.relative_to(found.root).as_posix()
    file = CsvFile(path, name, table_name(stem_of(path)), folder, header)
    if not header.columns:
        found.empty.append(file)
    elif is_image_table(stem_of(path)) and IMAGE_NUMBER in header.columns:
        found.images.append(file)
    elif is_object_table(stem_of(path), header.columns):
        found.objects.append(file)


def _csv_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders.sort()
        if len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        yield from (here / name for name in sorted(names) if is_csv(here / name))


_TEXT_TYPES = ("CHAR", "CLOB", "TEXT")
_NOT_A_NUMBER = ("nan", "-nan", "")


@dataclass
class SqliteTable:
    """A table of objects; ``rowids`` of its rows in their order, ``odd`` columns hold text, too."""

    path: Path
    name: str
    columns: TableColumns
    texts: frozenset[str]
    has_table_number: bool
    rowids: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    odd: set[str] = field(default_factory=set)
    unread: dict[str, int] = field(default_factory=dict)

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return the features of ``rows`` (counted from 0, in any order, repeated or not).

        Numbers are float64, exactly as they are stored; the text 'nan' is null.

        Raises:
            BadTableError: the file is damaged.
        """
        wanted = self.rowids[rows]
        asked = np.unique(wanted)
        names = list(self.columns.features)
        with _adbc(self.path) as cursor:
            found, rowids = self._select(cursor, names, asked)
        place = np.searchsorted(rowids, wanted)
        return found if _is_whole(place, len(rowids)) else found.take(pa.array(place))

    def _select(
        self, cursor: Any, names: Sequence[str], asked: Integers
    ) -> tuple[pa.RecordBatch, Integers]:
        plain = [name for name in names if name not in self.odd]
        condition = _condition(asked)
        table = _fetch(cursor, self._statement(map(self._value, plain), condition), len(asked))
        rowids = table.column(0).to_numpy()
        columns = dict(zip(plain, table.columns[1:], strict=True))
        self.odd |= {name for name in plain if self._is_odd(name, columns[name])}
        for name in sorted(self.odd):  # a copy: another thread may add to it
            columns[name] = self._odd_column(cursor, name, condition, len(asked))
        arrays = [self._typed(name, columns[name]) for name in names]
        return pa.RecordBatch.from_arrays(arrays, names=list(names)), rowids

    def _is_odd(self, name: str, values: pa.Array) -> bool:
        return name not in self.texts and not _is_number(values.type)

    def _value(self, name: str) -> str:
        return _quoted(name) if name in self.texts else f"nullif({_quoted(name)}, 'nan')"

    def _typed(self, name: str, values: pa.Array) -> pa.Array:
        return values.cast(pa.string() if name in self.texts else pa.float64())

    def _odd_column(self, cursor: Any, name: str, condition: str, rows: int) -> pa.Array:
        """Read a column of numbers that also holds text: 'inf' is a number, 'nan' is none."""
        column = _quoted(name)
        # Numbers come before all texts in SQLite's order, so this tells them apart.
        parts = (
            f"CASE WHEN {column} < '' THEN {column} END",
            f"CASE WHEN {column} >= '' THEN CAST({column} AS TEXT) END",
        )
        table = _fetch(cursor, self._statement(parts, condition), rows)
        numbers = table.column(1).cast(pa.float64())
        texts = table.column(2).cast(pa.string())
        return pc.coalesce(numbers, self._numbers(name, texts))

    def _numbers(self, name: str, texts: pa.Array) -> pa.Array:
        found = []
        for text in texts.to_pylist():
            number = _number(text)
            if number is None and text is not None and text.strip().lower() not in _NOT_A_NUMBER:
                self.unread[name] = self.unread.get(name, 0) + 1
            found.append(number)
        return pa.array(found, pa.float64())

    def _statement(self, values: Iterable[str], condition: str) -> str:
        # Names come from the file itself and are quoted; the condition holds numbers of ours.
        listed = ", ".join(["rowid", *values])
        return f"SELECT {listed} FROM {_quoted(self.name)} WHERE {condition}"  # noqa: S608


@dataclass(frozen=True)
class SqliteKeys:
    """The key columns of a table as Arrow, in the order of its rows; ``group`` is text or null."""

    rowid: pa.Array
    group: pa.Array
    image: pa.Array
    number: pa.Array
    parents: dict[str, pa.Array]


@dataclass(frozen=True)
class SqliteImage:
    """A row of the image table: where it is, its keys, and its columns without ``Image_``."""

    line: int
    group: str | None
    number: int | None
    values: Mapping[str, str | None]


def is_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


def tables_of(path: Path) -> dict[str, dict[str, str]]:
    """Return the declared type of each column of each table (not of views).

    Raises:
        BadTableError: the file is damaged.
    """
    with _reading(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {
            name: {
                row[1]: row[2].upper() for row in db.execute(f"PRAGMA table_info({_quoted(name)})")
            }
            for name in names
        }


def object_tables(path: Path, tables: Mapping[str, Mapping[str, str]]) -> list[SqliteTable]:
    """Return the tables of objects."""
    return [
        SqliteTable(
            path,
            name,
            table_columns(name, list(columns)),
            frozenset(
                c for c, kind in columns.items() if any(text in kind for text in _TEXT_TYPES)
            ),
            TABLE_NUMBER in columns,
        )
        for name, columns in tables.items()
        if is_object_table(name, columns)
    ]


def image_table(tables: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return the name of the table of images."""
    found = (
        name for name, columns in tables.items() if is_image_table(name) and IMAGE_NUMBER in columns
    )
    return next(found, None)


def read_keys(table: SqliteTable) -> SqliteKeys:
    """Read the keys of all rows of a table, and remember where its rows are.

    Raises:
        BadTableError: the file is damaged, or the table has no row numbers.
    """
    parents = table.columns.parents
    group = _quoted(TABLE_NUMBER) if table.has_table_number else "NULL"
    numbers = [IMAGE_NUMBER, table.columns.object_number, *parents.values()]
    listed = ", ".join(
        [
            "rowid",
            f"CAST({group} AS TEXT)",
            *(f"CAST({_quoted(name)} AS INTEGER)" for name in numbers),
        ]
    )
    statement = f"SELECT {listed} FROM {_quoted(table.name)} ORDER BY rowid"  # noqa: S608
    with _adbc(table.path) as cursor:
        found = _fetch(cursor, statement, 65_536)
    rowid, texts, image, number, *others = found.columns
    table.rowids = rowid.cast(pa.int64()).to_numpy()
    return SqliteKeys(
        rowid, texts.cast(pa.string()), image, number, dict(zip(parents, others, strict=True))
    )


def read_images(path: Path, name: str, columns: Iterable[str]) -> Iterator[SqliteImage]:
    """Yield the rows of the image table, with the columns that say which image each is.

    Raises:
        BadTableError: the file is damaged.
    """
    present = list(columns)
    group = _quoted(TABLE_NUMBER) if TABLE_NUMBER in present else "NULL"
    needed = [column for column in present if is_needed(plain_column(column))]
    keys = ["rowid", f"CAST({group} AS TEXT)", _quoted(IMAGE_NUMBER)]
    listed = ", ".join([*keys, *(f"CAST({_quoted(column)} AS TEXT)" for column in needed)])
    statement = f"SELECT {listed} FROM {_quoted(name)} ORDER BY rowid"  # noqa: S608
    plain = [plain_column(column) for column in needed]
    with _reading(path) as db:
        for line, code, number, *values in db.execute(statement):
            whole = number if isinstance(number, int) else None
            yield SqliteImage(line, code, whole, dict(zip(plain, values, strict=True)))


def _condition(asked: Integers) -> str:
    if len(asked) == 0:
        return "0"
    first, last = int(asked[0]), int(asked[-1])
    if last - first < 2 * len(asked):
        return f"rowid BETWEEN {first} AND {last} ORDER BY rowid"
    return f"rowid IN ({','.join(map(str, asked.tolist()))}) ORDER BY rowid"


def _is_whole(place: Integers, rows: int) -> bool:
    return len(place) == rows and bool((place == np.arange(rows)).all())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _number(text: str | None) -> float | None:
    try:
        found = float(text) if text is not None else np.nan
    except ValueError:
        return None
    return None if np.isnan(found) else float(found)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _fetch(cursor: Any, statement: str, rows: int) -> pa.RecordBatch:
    # ADBC takes the types from its first batch of rows: let that be all of them.
    cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(2 * rows + 2)})
    cursor.execute(statement)
    table = cursor.fetch_arrow_table().combine_chunks()
    columns = [
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.columns
    ]
    # Values of one name may be asked for twice, so by place, not by name.
    return pa.RecordBatch.from_arrays(columns, names=[str(n) for n in range(len(columns))])


@contextmanager
def _adbc(path: Path) -> Iterator[Any]:
    from adbc_driver_manager import Error
    from adbc_driver_sqlite import dbapi

    try:
        with dbapi.connect(_uri(path)) as connection, connection.cursor() as cursor:
            yield cursor
    except (Error, pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise _damaged(path, error) from error


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(_uri(path), uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> BadTableError:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return BadTableError(f"{path} cannot be read as SQLite ({reason}). Copy or export it again.")


def _uri(path: Path) -> str:
    # immutable is not said: a tool may still be writing; mode=ro never makes a file.
    return f"file:{quote(str(path.resolve()))}?mode=ro"


TOOL = "CellProfiler"
_GROUP = 32
_READERS = 2

Reader = Callable[[Integers], pa.RecordBatch]
ImageKey = tuple[int, int]
"""The group (folder, or TableNumber) and the ImageNumber."""


def is_cellprofiler_folder(path: Path) -> bool:
    """Whether a folder has CellProfiler's ``Image.csv``, itself or in subfolders."""
    table = find_image_table(path) if path.is_dir() else None
    if table is None:
        return False
    try:
        header = read_header(table, joined_headers, glance=True)
    except UserInputError:
        return False
    return not header.columns or IMAGE_NUMBER in header.columns


def is_cellprofiler_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database with a table of images and tables of objects."""
    if not (path.is_file() and is_sqlite(path)):
        return False
    try:
        tables = tables_of(path)
    except BadTableError:
        return False
    return image_table(tables) is not None


def open_cellprofiler(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a folder of CSV files, or an SQLite database; close the source after use.

    ``plate`` is the barcode where the tables name none.

    Raises:
        BadTableError: there is no such table, several segmentations, or damage.
        UserInputError: nothing says which plate it is.
    """
    if path.is_dir():
        return _open_folder(path, plate)
    return _open_sqlite(path, plate)


class _Images:
    """The images of all image tables, found by group and ImageNumber."""

    def __init__(self) -> None:
        self.rows: list[ImageRow] = []
        self.notices: list[Notice] = []
        self._keys: dict[ImageKey, int] = {}
        self._sorted: tuple[Integers, Integers] | None = None

    def add(
        self, file: str, line: int, key: tuple[int, int | None], content: ImageRecord | Refusal
    ) -> None:
        """Add a row, whatever it is."""
        group, number = key
        if number is not None and not 0 <= number < 1 << _GROUP:
            number = None
        if number is None and isinstance(content, ImageRecord):
            content = Refusal(line, "no image number", f"{IMAGE_NUMBER} is not a whole number")
        elif number is not None and (group, number) in self._keys:
            content = Refusal(line, "duplicate key", f"an earlier row has {IMAGE_NUMBER} {number}")
        elif number is not None and isinstance(content, ImageRecord):
            self._keys[group, number] = len(self.rows)
            self._notice(file, content)
        self.rows.append(ImageRow(file, content))

    def check_plate(self, where: str) -> None:
        """Raise what to do if no row at all says which plate it is of."""
        rows = [row.content for row in self.rows]
        if rows and all(isinstance(row, Refusal) and row.reason == NO_PLATE for row in rows):
            raise UserInputError(f"{where} does not say which plate it is. Name it with --plate.")

    def find(self, group: Integers | int, number: Integers) -> Integers:
        """Return the image of each row, ``UNKNOWN`` where there is none."""
        if self._sorted is None:
            keys = np.array([(g << _GROUP) | n for g, n in self._keys], np.int64)
            order = np.argsort(keys)
            self._sorted = keys[order], np.array(list(self._keys.values()), np.int64)[order]
        keys, images = self._sorted
        if len(keys) == 0:
            return np.full(len(number), UNKNOWN, np.int64)
        wanted = np.where((number < 0) | (number >= 1 << _GROUP), -1, (group << _GROUP) | number)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, images[place], UNKNOWN)

    def _notice(self, file: str, record: ImageRecord) -> None:
        odd = disagreement(record)
        if odd is not None:
            self.notices.append(
                Notice(file, record.line, "well and file name disagree", odd, suspicious=True)
            )


@dataclass(frozen=True)
class _Opened:
    """What both kinds of sources have in common once their keys are read."""

    images: _Images
    files: list[SourceFile]
    readers: list[Reader]
    keys: list[TableKeys]
    dtypes: dict[str, str]
    close: Callable[[], None]
    refused: list[RefusedRows]
    notices: list[Notice]
    notes: list[str]


def _open_folder(path: Path, plate: str | None) -> ObjectSource:
    folder = scan(path)
    if not folder.images and not folder.objects:
        raise BadTableError(f"{path} has no Image.csv of CellProfiler, nor tables of objects.")
    images = _csv_images(folder, plate)
    images.check_plate(path.name)
    chosen, note = _choose(_csv_columns(folder), path.name)
    rows = Counter(row.file for row in images.rows)
    files = [SourceFile(file.name, file.path, rows[file.name]) for file in folder.images]
    target = Path(tempfile.mkdtemp(prefix="cellstore-"))
    try:
        opened = _spooled(folder, images, chosen, files, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    opened.notes.extend([note] if note else [])
    return _source(opened)


def _csv_images(folder: CsvFolder, plate: str | None) -> _Images:
    images = _Images()
    for row in image_rows(folder):
        name = folder.folders[row.file.folder]
        content = row.refusal or image_record(
            row.line, row.values, channels_of(row.values), plate, name
        )
        images.add(row.file.name, row.line, (row.file.folder, row.number), content)
    return images


def _csv_columns(folder: CsvFolder) -> list[TableColumns]:
    names = dict.fromkeys(file.table for file in folder.objects)
    return [
        table_columns(name, union(f.header.columns for f in folder.objects if f.table == name))
        for name in names
    ]


def _choose(tables: Sequence[TableColumns], where: str) -> tuple[list[TableColumns], str]:
    if not tables:
        return [], "there is no table of objects: only images are read"
    return choose_tables(tables, where)


def _spooled(
    folder: CsvFolder,
    images: _Images,
    chosen: Sequence[TableColumns],
    files: list[SourceFile],
    target: Path,
) -> _Opened:
    readers: list[Reader] = []
    keys: list[TableKeys] = []
    refused: list[RefusedRows] = []
    notices = list(images.notices)
    for number, columns in enumerate(chosen):
        own = [file for file in folder.objects if file.table == columns.name]
        table, found = spool_table(
            columns.name, own, target / f"{number}.arrow", images.find, len(files)
        )
        files.extend(SourceFile(f.name, f.path, table.rows[f.name]) for f in own)
        readers.append(table.spool.read)
        keys.append(found)
        refused += table.refused
        notices += table.notices
    for file in folder.empty:
        files.append(SourceFile(file.name, file.path, 0))
        notices.append(Notice(file.name, None, "empty file", "the file has 0 bytes"))
    notices += [
        Notice(file.name, None, "no rows", "the image table has a header only")
        for file in files[: len(folder.images)]
        if file.rows == 0
    ]
    return _Opened(
        images, files, readers, keys, {}, lambda: shutil.rmtree(target, ignore_errors=True),
        refused, notices, [],
    )  # fmt: skip


def _open_sqlite(path: Path, plate: str | None) -> ObjectSource:
    tables = tables_of(path)
    images_name = image_table(tables)
    if images_name is None:
        raise BadTableError(f"{path} has no table Image of CellProfiler with an {IMAGE_NUMBER}.")
    names = [plain_column(name) for name in tables[images_name]]
    groups: dict[str | None, int] = {}
    images = _sqlite_images(path, images_name, names, groups, plate)
    images.check_plate(path.name)
    found = object_tables(path, tables)
    chosen, note = _choose([table.columns for table in found], path.name)
    by_name = {table.columns.name: table for table in found}
    used = [by_name[columns.name] for columns in chosen]
    files = [SourceFile(f"{path.name}:{images_name}", path, len(images.rows))]
    keys = [
        _sqlite_keys(table, groups, images, number) for number, table in enumerate(used, start=1)
    ]
    files += [
        SourceFile(f"{path.name}:{table.name}", path, len(of_table))
        for table, of_table in zip(used, keys, strict=True)
    ]
    strings = {table.columns.features[name]: "string" for table in used for name in table.texts
               if name in table.columns.features}  # fmt: skip
    return _source(
        _Opened(
            images, files, [table.read for table in used], keys, strings, lambda: None, [],
            list(images.notices), [note] if note else [],
        )
    )  # fmt: skip


def _sqlite_images(
    path: Path, table: str, columns: Sequence[str], groups: dict[str | None, int], plate: str | None
) -> _Images:
    images = _Images()
    channels = channels_of(columns)
    present = tables_of(path)[table]
    for row in read_images(path, table, present):
        group = groups.setdefault(row.group, len(groups))
        content = image_record(row.line, row.values, channels, plate)
        images.add(f"{path.name}:{table}", row.line, (group, row.number), content)
    return images


def _sqlite_keys(
    table: SqliteTable, groups: dict[str | None, int], images: _Images, file: int
) -> TableKeys:
    keys = read_keys(table)
    encoded = keys.group.dictionary_encode()
    codes = [groups.get(text, -1) for text in encoded.dictionary.to_pylist()]
    null = groups.get(None, -1)
    places = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
    group = np.array([*codes, null], np.int64)[places]
    number = _integers(keys.image)
    image = np.where(group < 0, UNKNOWN, images.find(np.maximum(group, 0), number))
    return TableKeys(
        table.columns,
        image,
        _integers(keys.number),
        {role: _integers(values) for role, values in keys.parents.items()},
        np.full(len(number), file, np.int64),
        table.rowids,
    )


def _integers(values: pa.Array) -> Integers:
    whole = pc.fill_null(values.cast(pa.int64()), UNKNOWN)
    return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)


def _source(opened: _Opened) -> ObjectSource:
    nothing = np.empty(0, np.int64)
    source = ObjectSource(
        tool=TOOL,
        objects=(),
        columns=(),
        files=tuple(opened.files),
        images=tuple(opened.images.rows),
        own_images=True,
        cells=Cells(nothing, nothing, ()),
        batches=_no_batches,
        close=opened.close,
        refused=opened.refused,
        notices=opened.notices,
        notes=opened.notes,
    )
    return replace(source, **_joined_parts(opened)) if opened.keys else source


def _joined_parts(opened: _Opened) -> dict[str, Any]:
    joined = join_tables(opened.keys)
    origins = tuple(
        RowOrigin(table.file[rows], table.line[rows])
        for table, rows in zip(joined.tables, joined.rows, strict=True)
    )
    columns = _feature_columns(joined.tables, opened.dtypes)
    return {
        "objects": tuple(table.columns.name for table in joined.tables),
        "columns": columns,
        "cells": Cells(joined.image, joined.label, origins),
        "batches": _Batches(joined, opened.readers, columns),
        "refused": [*opened.refused, *_left_out(joined, opened.files)],
    }


def _no_batches() -> Iterator[ObjectBatch]:
    return iter(())


def _feature_columns(
    tables: Sequence[TableKeys], dtypes: dict[str, str]
) -> tuple[FeatureColumn, ...]:
    names = [name for table in tables for name in table.columns.features.values()]
    return tuple(FeatureColumn(name, dtypes.get(name, "float64"), None, TOOL) for name in names)


def _left_out(joined: Joined, files: Sequence[SourceFile]) -> list[RefusedRows]:
    found = []
    for item in joined.left_out:
        of_file = item.table.file[item.rows]
        for number in np.unique(of_file):
            lines = item.table.line[item.rows[of_file == number]]
            found.append(RefusedRows(files[number].name, lines.tolist(), item.reason, item.detail))
    return found


class _Batches:
    """Reads the tables side by side: what comes next is read while the last is being used."""

    def __init__(
        self, joined: Joined, readers: Sequence[Reader], columns: Sequence[FeatureColumn]
    ) -> None:
        self._joined = joined
        self._readers = readers
        self._names = [column.name for column in columns]
        tables = [table.columns for table in joined.tables]
        primary = primary_of(tables)
        self._primary = tables.index(primary)
        self._place = primary.place()

    def __call__(self) -> Iterator[ObjectBatch]:
        step = batch_rows(len(self._names))
        starts = range(0, len(self._joined.label), step)
        with ThreadPoolExecutor(_READERS) as pool:
            waiting: deque[tuple[int, list[Future[pa.RecordBatch]]]] = deque()
            for start in starts:
                waiting.append((start, self._ask(pool, start, start + step)))
                if len(waiting) > 1:
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())

    def _ask(self, pool: ThreadPoolExecutor, start: int, end: int) -> list[Future[pa.RecordBatch]]:
        pairs = zip(self._readers, self._joined.rows, strict=True)
        return [pool.submit(reader, rows[start:end]) for reader, rows in pairs]

    def _batch(self, start: int, asked: Sequence[Future[pa.RecordBatch]]) -> ObjectBatch:
        parts = [future.result() for future in asked]
        arrays = [array for part in parts for array in part.columns]
        primary = parts[self._primary]
        return ObjectBatch(
            start,
            pa.RecordBatch.from_arrays(arrays, names=self._names),
            place_values(primary, self._place, BOX),
            place_values(primary, self._place, CENTRE),
        )
