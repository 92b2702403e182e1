"""CellProfiler's measurements of objects, as CSV files or in SQLite, joined to cells.

Tables of objects (Cells, Nuclei, Cytoplasm) come in one CSV file each, in one per folder (a site
each), or in one SQLite file. First the keys of all rows are read and joined; the measurements
follow in batches, by row number: SQLite has them by rowid, CSV files are moved once into a
temporary Arrow file.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from ..enums import PerturbationKind, Severity
from ..errors import BadTableError, StorageError, UserInputError, first_line
from .filenames import (
    PLANE_COLUMNS,
    TIME_COLUMNS,
    cellomics_name,
    core_file_name,
    format_well,
    is_safe_name,
    parse_well,
    wellsite_name,
)
from .image_files import SQLITE
from .objects import (
    BOX,
    CENTRE,
    LARGEST_NUMBER,
    Integers,
    ObjectBatch,
    ObjectSource,
    RowIssue,
    SourceFile,
    as_numbers,
    batch_rows,
    column_values,
    first_of_each,
    whole_numbers,
    without_nan,
)
from .platemaps import TREATMENT_COLUMNS, treatment_of
from .records import FileRef, ImageRecord, Refusal, TreatmentRecord
from .tables import MISSING, TextTable, open_table

TOOL = "CellProfiler"
IMAGE_NUMBER, OBJECT_NUMBER, TABLE_NUMBER = "ImageNumber", "ObjectNumber", "TableNumber"
UNKNOWN = -1
"""An image that no image table has, or a number that is none."""

# ---- What the columns of a table of objects are ----

COMPARTMENTS = ("Cells", "Nuclei", "Cytoplasm")

_IMAGE = "image"
_NOT_OBJECTS = frozenset(
    {_IMAGE, "experiment", "load_data", "load_data_with_illum", "relationship"}
)
_COMPARTMENT = re.compile(r"(?P<name>cells?|nuclei|nucleus|cytoplasm)(?P<rest>_.+)?", re.IGNORECASE)
_CANONICAL = {"cell": "Cells", "nucleus": "Nuclei"}
_EXPORTED = re.compile(r"(?:.*_)?Per_(?P<name>.+)", re.IGNORECASE)
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


@dataclass(frozen=True)
class ObjectColumns:
    """The columns of one kind of table by what they are for, as the table writes them.

    ``features`` maps each to the name of its feature; ``parents`` maps compartments to columns.
    """

    name: str
    role: str
    features: dict[str, str]
    object_number: str
    parents: dict[str, str]

    def place(self) -> dict[str, str]:
        """Return the columns of box and centre."""
        owners = [self.name] if self.name.lower() != "object" else COMPARTMENTS
        for owner in owners:
            own = [c for c in self.features if owner == self.name or c.startswith(f"{owner}_")]
            if own:
                return place_columns({name.removeprefix(f"{owner}_"): name for name in own})
        return {}


def place_columns(by_measure: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of ``BOX`` and ``CENTRE``; CellProfiler's boxes are half open, from 0."""
    box = {key: by_measure[name] for key, name in _BOX.items() if name in by_measure}
    found = box if len(box) == len(_BOX) else {}
    for centre in ("AreaShape_Center", "Location_Center"):
        if f"{centre}_Y" in by_measure and f"{centre}_X" in by_measure:
            names = (by_measure[f"{centre}_Y"], by_measure[f"{centre}_X"])
            return {**found, **dict(zip(CENTRE, names, strict=True))}
    return found


def table_name(written: str) -> str:
    """Return what a table or file is about: 'Cells' of 'Cells', 'Image' of 'MyExpt_Per_Image'."""
    exported = _EXPORTED.fullmatch(written)
    return exported["name"] if exported else written


def object_columns(written: str, columns: Sequence[str]) -> ObjectColumns | None:
    """Sort the columns of a table; None where it has no row per object."""
    name = table_name(written)
    number = _object_number(name, columns)
    if name.lower() in _NOT_OBJECTS or number is None or IMAGE_NUMBER not in columns:
        return None
    features: dict[str, str] = {}
    parents: dict[str, str] = {}
    for column in columns:
        measure = column.removeprefix(f"{name}_")
        role = role_of(measure.removeprefix(_PARENT))
        if measure.startswith(_PARENT) and role in COMPARTMENTS:
            parents.setdefault(role, column)
        if name.lower() == "object":  # a table of several objects names them in its columns
            owner, _, rest = column.partition("_")
            measure = rest if role_of(owner) in COMPARTMENTS else column
        if is_feature(measure) and column != number:
            features[column] = feature_name(name, column)
    return ObjectColumns(name, role_of(name), features, number, parents)


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


def choose_tables(tables: Sequence[ObjectColumns], where: str) -> tuple[list[ObjectColumns], str]:
    """Return the tables that together describe the cells, and a note on what is not used.

    The object numbers of the first are those of the cells: Cells, else Nuclei.

    Raises:
        BadTableError: none has measurements, or several segmentations are side by side.
    """
    if not tables:
        return [], "there is no table of objects: only images are read"
    measured = [table for table in tables if table.features]
    compartments = [table for table in measured if table.role in COMPARTMENTS]
    chosen = compartments or measured
    if not chosen:
        raise BadTableError(f"{where} has no table of objects with measurements (Cells, Nuclei).")
    sets = {table.name for table in chosen}
    if compartments:  # Cells_One and Nuclei_One belong together
        sets = {(m["rest"] or "") for name in sets if (m := _COMPARTMENT.fullmatch(name))}
    if len(sets) > 1 or len({table.role for table in chosen}) < len(chosen):
        names = ", ".join(table.name for table in chosen)
        raise BadTableError(
            f"{where} has several sets of objects ({names}). Move all but one of them out."
        )
    left = [table.name for table in tables if table not in chosen]
    note = f"left out, as they are no part of the cells: {', '.join(left)}" if left else ""
    return sorted(chosen, key=lambda table: [*COMPARTMENTS, table.role].index(table.role)), note


def _object_number(table: str, columns: Iterable[str]) -> str | None:
    present = set(columns)
    owners = ("", f"{table}_", *(f"{role}_" for role in COMPARTMENTS))
    names = [
        *(OBJECT_NUMBER, f"{table}_{OBJECT_NUMBER}"),
        *(owner + number for owner in owners for number in (OBJECT_NUMBER, _NUMBER)),
    ]
    return next((name for name in names if name in present), None)


# ---- Which image a row of an image table is ----

FILE, FOLDER = "FileName_", "PathName_"
WELLS = ("Metadata_Well", "Metadata_well")
SITES = ("Metadata_Site", "Metadata_site", "Metadata_FieldID", "Metadata_Field")
PLATES = ("Metadata_Plate", "Metadata_plate", "Metadata_Barcode", "Metadata_PlateBarcode")
ROWS, COLUMNS = ("Metadata_Row",), ("Metadata_Col", "Metadata_Column")
_BATCHES = ("Metadata_Batch",)
_CORE_NAME = ("Metadata_CoreName",)
_NEEDED = frozenset(
    {*WELLS, *SITES, *PLATES, *ROWS, *COLUMNS, *PLANE_COLUMNS, *TIME_COLUMNS, *_BATCHES}
    | {*_CORE_NAME, *TREATMENT_COLUMNS}
)
_ORIGINAL = "Orig"
_DRAWN = re.compile(r"Illum|Outline|Overlay", re.IGNORECASE)
_NO_VALUE = MISSING | {"None"}
_LARGEST_SITE = 1_000_000
_SITE_FOLDER = re.compile(r"(?P<plate>.+)-(?P<well>[A-Z]{1,2}[0-9]{1,2})-(?P<site>[0-9]+)")

NO_PLATE = "no plate"
"""Reason of a row that does not say which plate it is of."""

Values = Mapping[str, str | None]


class _RefusedError(Exception):
    """The row is no image; becomes a ``Refusal``."""


def is_needed(column: str) -> bool:
    """Whether a column (without ``Image_``) is read to know which image a row is."""
    return column in _NEEDED or column.startswith((FILE, FOLDER))


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
        return Refusal(line, *refused.args)


def _record(
    line: int, values: Values, channels: Sequence[str], plate: str | None, folder: str | None
) -> ImageRecord:
    files = tuple(_files(values, channels))
    well, site, core, own_plate, scan = _from_names(files, folder)
    text = _first(values, WELLS)
    row, column = _first(values, ROWS), _first(values, COLUMNS)
    if text is None and row and column:
        text = f"r{row}c{column}" if row.isdigit() else f"{row}{column}"
    written = well if text is None else _parsed_well(text)
    if text is None and written is None:
        raise _RefusedError("no well", "neither a well column nor a file name with a well")
    if written is None:
        raise _RefusedError("not a well", f"{text!r}: write wells like A01")
    named = _first(values, PLATES) or own_plate
    if named and plate and named != plate:
        raise _RefusedError("another plate", f"plate {named}, not {plate}")
    barcode = named or plate or scan
    if barcode is None:
        raise _RefusedError(NO_PLATE, "nothing says which plate it is; name it with --plate")
    number = _whole(values, SITES)
    number = site if number is None else number
    if number is None:
        raise _RefusedError("no site", "neither Metadata_Site nor a file name with a field")
    plane, time_point = _whole(values, PLANE_COLUMNS), _whole(values, TIME_COLUMNS)
    return ImageRecord(
        line=line,
        plate=barcode,
        batch=_first(values, _BATCHES),
        row=written[0],
        column=written[1],
        site=number,
        plane=1 if plane is None else plane,
        time_point=1 if time_point is None else time_point,
        core_name=_first(values, _CORE_NAME) or (core if written == well else None),
        files=files,
        treatment=_treatment(values),
    )


def _files(values: Values, channels: Sequence[str]) -> Iterator[FileRef]:
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


class _Named(NamedTuple):
    """What names say; ``scan`` is a number of the instrument, the plate if nothing else is."""

    well: tuple[int, int] | None = None
    site: int | None = None
    core: str | None = None
    plate: str | None = None
    scan: str | None = None


def _from_names(files: Sequence[FileRef], folder: str | None) -> _Named:
    for file in files:
        phenix = core_file_name(file.name)
        if phenix is not None:
            return _Named((phenix.row, phenix.column), phenix.field, phenix.core)
    for file in files:
        name = cellomics_name(file.name) or wellsite_name(file.name)
        if name is not None:
            return _Named((name.row, name.column), name.site, scan=name.plate)
    match = _SITE_FOLDER.fullmatch(folder or "")
    if match is not None and (well := _parsed_well(match["well"])):
        return _Named(well, int(match["site"]), plate=match["plate"])
    return _Named()


def _parsed_well(text: str) -> tuple[int, int] | None:
    try:
        return parse_well(text)
    except UserInputError:
        return None


def _first(values: Values, columns: Iterable[str]) -> str | None:
    for column in columns:
        text = (values.get(column) or "").strip()
        if text not in _NO_VALUE:
            return text
    return None


def _whole(values: Values, columns: Sequence[str]) -> int | None:
    text = _first(values, columns)
    if text is None:
        return None
    digits = text.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and int(digits) <= _LARGEST_SITE):
        raise _RefusedError("not a whole number", f"{columns[0]} is {text!r}")
    return int(digits)


def _treatment(values: Values) -> TreatmentRecord | None:
    """Return the treatment of a row; pycytominer's ``pert_type`` may name its kind."""

    def get(*columns: str) -> str | None:
        return _first(values, columns)

    found = treatment_of(get)
    kind = (get("Metadata_pert_type") or "").lower()
    if found is None or kind not in list(PerturbationKind):
        return found
    return replace(found, kind=PerturbationKind(kind))


class _Images:
    """Adds images to a source; finds them by group (a folder, a TableNumber) and ImageNumber."""

    def __init__(self, source: ObjectSource) -> None:
        self._source = source
        self._indices: dict[tuple[int, int], int] = {}
        self._sorted: tuple[Integers, Integers] | None = None

    def add(
        self, file: str, line: int, group: int, number: int, content: ImageRecord | Refusal
    ) -> None:
        """Add a row, whatever it is."""
        if isinstance(content, ImageRecord) and not 0 <= number < 1 << 32:
            content = Refusal(line, "no image number", f"{IMAGE_NUMBER} is not a whole number")
        elif (group, number) in self._indices:
            content = Refusal(line, "duplicate key", f"an earlier row has {IMAGE_NUMBER} {number}")
        elif isinstance(content, ImageRecord):
            self._indices[group, number] = len(self._source.images)
            self._note_disagreement(file, content)
        self._source.images.append((file, content))

    def check_plate(self, where: str) -> None:
        """Raise what to do if no row at all says which plate it is of."""
        rows = [content for _, content in self._source.images]
        if rows and all(isinstance(row, Refusal) and row.reason == NO_PLATE for row in rows):
            raise UserInputError(f"{where} does not say which plate it is. Name it with --plate.")

    def find(self, group: Integers | int, number: Integers) -> Integers:
        """Return the index of the image of each row, ``UNKNOWN`` where there is none."""
        if self._sorted is None:
            keys = np.array([(g << 32) | n for g, n in self._indices], np.int64)
            order = np.argsort(keys)
            self._sorted = keys[order], np.array(list(self._indices.values()), np.int64)[order]
        keys, images = self._sorted
        if len(keys) == 0:
            return np.full(len(number), UNKNOWN, np.int64)
        groups = np.asarray(group, np.int64)
        usable = (groups >= 0) & (number >= 0) & (number < 1 << 32)
        wanted = np.where(usable, (groups << 32) | number, UNKNOWN)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[found] == wanted, images[found], UNKNOWN)

    def _note_disagreement(self, file: str, record: ImageRecord) -> None:
        for ref in record.files:
            name = core_file_name(ref.name)
            if name is not None and (name.row, name.column) != (record.row, record.column):
                detail = f"well {format_well(record.row, record.column)}, file {ref.name}"
                reason = "well and file name disagree"
                self._source.issues.append(
                    RowIssue(Severity.SUSPICIOUS, file, [record.line], reason, detail)
                )
                return


# ---- Joining the tables to cells ----


@dataclass(frozen=True)
class TableKeys:
    """The numbers of every row of one kind of table, an item each.

    ``image`` is the index of the image (``UNKNOWN``: none such); ``parents`` by role; ``file`` and
    ``line`` say where the row is. ``read`` returns the features of rows by their number from 0.
    """

    columns: ObjectColumns
    image: Integers
    number: Integers
    parents: dict[str, Integers]
    file: Integers
    line: Integers
    read: Callable[[Integers], pa.RecordBatch]


class _Join:
    """Joins tables by image and object number: a cell has one row of each.

    The parents that Cytoplasm names (else those that Cells name, else equal numbers) decide.
    Every row is part of a cell, or refused with its reason.
    """

    def __init__(self, source: ObjectSource, tables: Sequence[TableKeys]) -> None:
        self._source = source
        self._tables = tables
        # Cytoplasm comes last, and names the objects of the others as its parents.
        self._base = len(tables) - 1 if tables[-1].columns.role == "Cytoplasm" else 0

    def rows(self) -> list[Integers]:
        """Return the row of each cell in each table; the object numbers are those of table 0."""
        usable = [self._with_own_key(table) for table in self._tables]
        rows = {self._base: usable[self._base]}
        # Cells before Nuclei: they say which nucleus is theirs where Cytoplasm does not.
        for number in range(len(self._tables)):
            if number != self._base:
                found, kept = self._partners(number, usable[number], rows)
                rows = {other: chosen[kept] for other, chosen in rows.items()}
                rows[number] = found
        base = self._tables[self._base]
        first = first_of_each(rows[0])
        self._refuse(base, rows[self._base][~first], "duplicate key", "its cell has a row already")
        rows = {number: chosen[first] for number, chosen in rows.items()}
        for number, table in enumerate(self._tables):
            if number != self._base:
                idle = np.setdiff1d(usable[number], rows[number])
                detail = f"no row of {base.columns.name} belongs to it"
                self._refuse(table, idle, "not joined", detail)
        return [rows[number] for number in range(len(self._tables))]

    def _with_own_key(self, table: TableKeys) -> Integers:
        """Return the rows of ``table`` that have a key of their own, in their order."""
        unknown = table.image == UNKNOWN
        why = "no image table has its ImageNumber"
        self._refuse(table, np.flatnonzero(unknown), "image unknown", why)
        odd = ~unknown & ((table.number < 0) | (table.number >= LARGEST_NUMBER))
        why = "it is missing, or no whole number"
        self._refuse(table, np.flatnonzero(odd), "no object number", why)
        rows = np.flatnonzero(~unknown & ~odd)
        first = first_of_each(_cell_keys(table.image[rows], table.number[rows]))
        why = "an earlier row has the same numbers"
        self._refuse(table, rows[~first], "duplicate key", why)
        unique: Integers = rows[first]
        return unique

    def _partners(
        self, number: int, usable: Integers, rows: dict[int, Integers]
    ) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Return the rows of table ``number`` that belong to ``rows``, and which have one."""
        table, base = self._tables[number], self._tables[self._base]
        role = table.columns.role
        wanted_numbers = base.number[rows[self._base]]
        for other in rows:
            if role in self._tables[other].parents:
                wanted_numbers = self._tables[other].parents[role][rows[other]]
                break
        wanted = _cell_keys(base.image[rows[self._base]], wanted_numbers)
        keys = _cell_keys(table.image[usable], table.number[usable])
        order = np.argsort(keys, kind="stable")
        found = np.searchsorted(keys[order], wanted)
        found[found == len(keys)] = 0
        kept = keys[order][found] == wanted if len(keys) else np.zeros(len(wanted), bool)
        why = f"its object is not in table {table.columns.name}"
        self._refuse(base, rows[self._base][~kept], "no parent", why)
        return usable[order[found[kept]]] if len(keys) else usable[:0], kept

    def _refuse(self, table: TableKeys, rows: Integers, reason: str, detail: str) -> None:
        for file in np.unique(table.file[rows]):
            lines = table.line[rows[table.file[rows] == file]].tolist()
            name = self._source.files[file].name
            self._source.issues.append(RowIssue(Severity.REFUSED, name, lines, reason, detail))


def _cell_keys(image: Integers, number: Integers) -> Integers:
    usable = np.where((number < 0) | (number >= LARGEST_NUMBER), LARGEST_NUMBER, number)
    return np.asarray((image << 32) | usable, np.int64)


def _add_cells(
    source: ObjectSource, tables: Sequence[TableKeys], texts: Iterable[str] = ()
) -> None:
    """Make the rows of ``tables`` the cells of ``source``; ``texts`` are features of words."""
    if not tables:
        return
    rows = _Join(source, tables).rows()
    names = [name for table in tables for name in table.columns.features.values()]
    texts = frozenset(texts)
    source.objects = tuple(table.columns.name for table in tables)
    source.schema = pa.schema(
        [(name, pa.string() if name in texts else pa.float64()) for name in names]
    )
    source.image_index, source.object_number = tables[0].image[rows[0]], tables[0].number[rows[0]]
    source.origins = [
        (table.file[chosen], table.line[chosen]) for table, chosen in zip(tables, rows, strict=True)
    ]
    place = tables[0].columns.place()

    def batch(start: int, asked: Sequence[Future[pa.RecordBatch]]) -> ObjectBatch:
        parts = [future.result() for future in asked]
        arrays = [array for part in parts for array in part.columns]
        return ObjectBatch(
            start,
            pa.RecordBatch.from_arrays(arrays, names=names),
            column_values(parts[0], place, BOX),
            column_values(parts[0], place, CENTRE),
        )

    def batches() -> Iterator[ObjectBatch]:
        # Tables are read side by side, and the next batch while the last is being used.
        step = batch_rows(len(names))
        waiting: deque[tuple[int, list[Future[pa.RecordBatch]]]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(rows[0]), step):
                asked = [
                    pool.submit(table.read, chosen[start : start + step])
                    for table, chosen in zip(tables, rows, strict=True)
                ]
                waiting.append((start, asked))
                if len(waiting) > 1:
                    yield batch(*waiting.popleft())
            while waiting:
                yield batch(*waiting.popleft())

    source.batches = batches


# ---- CSV files ----

_DEEPEST = 6


class _CsvFile(NamedTuple):
    """One CSV file: ``name`` is relative to the source, ``columns`` are called as in CellProfiler.

    ``kind`` is what it is about ('Cells'), ``folder`` the index of its folder.
    """

    name: str
    kind: str
    folder: int
    table: TextTable
    columns: list[str]


def is_cellprofiler_folder(path: Path) -> bool:
    """Whether a folder has CellProfiler's ``Image.csv``, itself or in subfolders."""
    tables = _csv_files(path) if path.is_dir() else iter(())
    first = next((table for table in tables if _kind(table).lower() == _IMAGE), None)
    try:
        columns = _columns(open_table(first, empty=True)) if first else ["none"]
    except UserInputError:
        return False
    return not columns or IMAGE_NUMBER in columns


def open_cellprofiler(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a folder of CSV files, or an SQLite database; close the source after use.

    ``plate`` is the barcode where the tables name none.

    Raises:
        BadTableError: there is no such table, several segmentations, or damage.
        UserInputError: nothing says which plate it is.
    """
    source = ObjectSource(TOOL, own_images=True)
    if not path.is_dir():
        _open_sqlite(source, path, plate)
        return source
    try:
        _open_folder(source, path, plate)
    except BaseException:
        source.close()
        raise
    return source


def _open_folder(source: ObjectSource, root: Path, plate: str | None) -> None:
    folders: dict[Path, int] = {}
    files: list[_CsvFile] = []
    for path in _csv_files(root):
        table = open_table(path, empty=True)
        folder = folders.setdefault(path.parent, len(folders))
        name = path.relative_to(root).as_posix()
        files.append(_CsvFile(name, _kind(path), folder, table, _columns(table)))
    of_images = [f for f in files if f.kind.lower() == _IMAGE and IMAGE_NUMBER in f.columns]
    kinds: dict[str, list[_CsvFile]] = {}
    for file in files:
        if object_columns(file.kind, file.columns):
            kinds.setdefault(file.kind, []).append(file)
    if not of_images and not kinds:
        raise BadTableError(f"{root} has no Image.csv of CellProfiler, nor tables of objects.")
    images = _Images(source)
    folder_names = [folder.name for folder in folders]
    for file in of_images:
        _add_images(source, images, file, plate, folder_names[file.folder])
    images.check_plate(root.name)
    merged = [
        object_columns(kind, list(dict.fromkeys(name for file in own for name in file.columns)))
        for kind, own in kinds.items()
    ]
    chosen, note = choose_tables([columns for columns in merged if columns], root.name)
    source.notes += [note] if note else []
    target = Path(tempfile.mkdtemp(prefix="cellstore-"))
    source.close = lambda: shutil.rmtree(target, ignore_errors=True)
    tables = [
        _spooled(source, columns, kinds[columns.name], target / f"{number}.arrow", images)
        for number, columns in enumerate(chosen)
    ]
    for file in files:
        if not file.columns:
            source.files.append(SourceFile(file.name, file.table.path, 0))
            _note(source, file, None, "empty file", "the file has 0 bytes")
    _add_cells(source, tables)


def _csv_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders.sort()
        if len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        yield from (
            here / name for name in sorted(names) if name.lower().endswith((".csv", ".csv.gz"))
        )


def _kind(path: Path) -> str:
    return table_name(Path(path.name.removesuffix(".gz").removesuffix(".GZ")).stem)


def _columns(table: TextTable) -> list[str]:
    """Return the columns; of two header lines (cytominer-database has them) the first has objects.

    A table of that kind says ``Cells`` and ``Area`` for what is ``Cells_Area`` elsewhere.
    """
    if len(table.headers) < 2:
        return list(table.columns)
    owners, measures = ([name.strip() for name in header] for header in table.headers)
    return [
        measure
        if owner.lower() in (_IMAGE, "object") or measure == IMAGE_NUMBER
        else feature_name(owner, measure)
        for owner, measure in zip(owners, measures, strict=True)
    ]


def _add_images(
    source: ObjectSource, images: _Images, file: _CsvFile, plate: str | None, folder: str
) -> None:
    needed: dict[str, int] = {}
    for at, name in enumerate(file.columns):
        if is_needed(plain := name.removeprefix("Image_")):
            needed.setdefault(plain, at)
    channels = channels_of(needed)
    number_at = file.columns.index(IMAGE_NUMBER)
    rows = 0
    for row in file.table.rows():
        rows += 1
        if isinstance(row, Refusal):
            images.add(file.name, row.line, file.folder, UNKNOWN, row)
            continue
        values = {name: row.cells[at] for name, at in needed.items()}
        number = int(whole_numbers(pa.array([row.cells[number_at]]))[0])
        record = image_record(row.line, values, channels, plate, folder)
        images.add(file.name, row.line, file.folder, number, record)
    source.files.append(SourceFile(file.name, file.table.path, rows))
    if rows == 0:
        _note(source, file, None, "no rows", "the image table has a header only")


def _note(source: ObjectSource, file: _CsvFile, line: int | None, reason: str, detail: str) -> None:
    source.issues.append(RowIssue(Severity.PROBLEM, file.name, [line], reason, detail))


def _spooled(
    source: ObjectSource,
    columns: ObjectColumns,
    files: Sequence[_CsvFile],
    target: Path,
    images: _Images,
) -> TableKeys:
    """Move the features of all ``files`` of one kind to ``target``; return the keys of their rows.

    Raises:
        BadTableError: a file is damaged.
        StorageError: the temporary folder is full.
    """
    spool = _Spool(target, list(columns.features))
    keys = {"image": IMAGE_NUMBER, "number": columns.object_number, **columns.parents}
    parts: dict[str, list[Integers]] = {key: [] for key in ("file", "line", *keys)}
    for file in files:
        rows = 0
        odd: _Odd = {}
        wanted = {*keys.values(), *columns.features}
        used = [(at, name) for at, name in enumerate(file.columns) if name in wanted]
        positions = [at for at, _ in used]
        for batch in file.table.batches(positions, numbers=positions):
            lines = np.asarray(batch.lines, np.int64)
            rows += len(lines) + len(batch.refused)
            source.issues += [
                RowIssue(Severity.REFUSED, file.name, [line], reason, detail)
                for line, reason, detail in batch.refused
            ]
            found: dict[str, pa.Array] = {}
            for (_, name), values in zip(used, batch.columns, strict=True):
                if name in found:
                    _compare(name, found[name], values, lines, odd)
                else:
                    found[name] = values
            for key, name in keys.items():
                nothing = np.full(len(lines), UNKNOWN, np.int64)
                parts[key].append(whole_numbers(found[name]) if name in found else nothing)
            parts["image"][-1] = images.find(file.folder, parts["image"][-1])
            parts["file"].append(np.full(len(lines), len(source.files), np.int64))
            parts["line"].append(lines)
            spool.append(
                {name: _numbers(name, found[name], lines, odd) for name in columns.features
                 if name in found}, len(lines),
            )  # fmt: skip
        if rows == 0:
            _note(source, file, None, "no rows", "the file has a header only")
        for what, (count, line) in odd.items():
            _note(source, file, line, "odd value", f"{what} in {count} rows")
        source.files.append(SourceFile(file.name, file.table.path, rows))
    spool.finish()
    whole = {
        key: np.concatenate(some) if some else np.empty(0, np.int64) for key, some in parts.items()
    }
    parents = {role: whole[role] for role in columns.parents}
    return TableKeys(
        columns, whole["image"], whole["number"], parents, whole["file"], whole["line"], spool.read
    )


_Odd = dict[str, tuple[int, int]]
"""How many rows of a file have something odd, and the line of the first."""


def _numbers(name: str, values: pa.Array, lines: Integers, odd: _Odd) -> pa.Array:
    numbers, words = as_numbers(values)
    if words is not None:
        _count(odd, f"{name} is not a number", lines, words)
    return numbers


def _compare(name: str, first: pa.Array, again: pa.Array, lines: Integers, odd: _Odd) -> None:
    other = pc.fill_null(pc.not_equal(as_numbers(first)[0], as_numbers(again)[0]), False)
    if pc.any(other).as_py():
        _count(odd, f"{name} comes twice, the first is used", lines, other)


def _count(odd: _Odd, what: str, lines: Integers, where: pa.Array) -> None:
    chosen = lines[where.to_numpy(zero_copy_only=False).astype(bool)]
    count, first = odd.get(what, (0, int(chosen[0])))
    odd[what] = count + len(chosen), first


class _Spool:
    """Numbers in a temporary Arrow file; its rows are read by their number, from 0."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._schema = pa.schema([(name, pa.float64()) for name in names])
        self._starts: list[int] = []
        self._rows = 0
        self._file: Any = None
        self._writer: Any = None

    def append(self, columns: Mapping[str, pa.Array], rows: int) -> None:
        """Add rows; those columns of the spool that ``columns`` lacks are null."""
        arrays = [columns.get(f.name, None) for f in self._schema]
        whole = pa.RecordBatch.from_arrays(
            [pa.nulls(rows, pa.float64()) if array is None else array for array in arrays],
            schema=self._schema,
        )
        step = batch_rows(len(arrays))
        with self._writing():
            if self._writer is None:
                self._file = pa.OSFile(str(self._path), "wb")
                self._writer = pa.ipc.new_file(self._file, self._schema)
            for start in range(0, rows, step):
                self._starts.append(self._rows + start)
                self._writer.write_batch(whole.slice(start, step))
        self._rows += rows

    def finish(self) -> None:
        """End writing; from now on rows can be read."""
        if self._writer is not None:
            with self._writing():
                self._writer.close()
                self._file.close()

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return ``rows``, in any order, repeated or not."""
        if len(rows) == 0 or self._rows == 0:
            nothing = [pa.array([], pa.float64()) for _ in self._schema]
            return pa.RecordBatch.from_arrays(nothing, schema=self._schema)
        part_of = np.searchsorted(np.asarray(self._starts), rows, side="right") - 1
        parts = np.unique(part_of)
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_file(source) as reader:
            batches = [reader.get_batch(int(part)) for part in parts]
        offsets = np.cumsum([0, *(batch.num_rows for batch in batches)])
        positions = rows - np.asarray(self._starts)[part_of]
        positions += offsets[np.searchsorted(parts, part_of)]
        table = pa.Table.from_batches(batches)
        if len(positions) != table.num_rows or not (np.diff(positions) == 1).all():
            table = table.take(pa.array(positions))
        columns = [without_nan(column.combine_chunks()) for column in table.columns]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"The temporary folder {self._path.parent.parent} cannot be written "
                f"({first_line(error)}). Free some space there, or name another in TMPDIR."
            ) from error


# ---- SQLite ----

_TEXT_TYPES = ("CHAR", "CLOB", "TEXT")
_NOT_A_NUMBER = ("nan", "-nan", "")


@dataclass
class SqliteTable:
    """A table of objects; ``rowids`` of its rows in their order, ``odd`` columns hold text, too."""

    path: Path
    name: str
    columns: ObjectColumns
    texts: frozenset[str]
    has_table_number: bool
    rowids: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    odd: set[str] = field(default_factory=set)

    def keys(self, groups: Mapping[str | None, int], images: _Images, file: int) -> TableKeys:
        """Read the keys of all rows; ``groups`` are the TableNumbers that the images have.

        Raises:
            BadTableError: the file is damaged, or the table has no row numbers.
        """
        parents = self.columns.parents
        group = _quoted(TABLE_NUMBER) if self.has_table_number else "NULL"
        numbers = [IMAGE_NUMBER, self.columns.object_number, *parents.values()]
        listed = ["rowid", f"CAST({group} AS TEXT)"]
        listed += [f"CAST({_quoted(name)} AS INTEGER)" for name in numbers]
        # Names come from the file itself and are quoted.
        query = f"SELECT {', '.join(listed)} FROM {_quoted(self.name)} ORDER BY rowid"  # noqa: S608
        with _adbc(self.path) as cursor:
            rowid, texts, image, number, *others = _fetch(cursor, query, 65_536).columns
        self.rowids = rowid.cast(pa.int64()).to_numpy()
        encoded = texts.cast(pa.string()).dictionary_encode()
        codes = [groups.get(text, UNKNOWN) for text in encoded.dictionary.to_pylist()]
        at = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
        of_rows = np.array([*codes, groups.get(None, UNKNOWN)], np.int64)[at]
        return TableKeys(
            self.columns,
            images.find(of_rows, whole_numbers(image)),
            whole_numbers(number),
            {role: whole_numbers(some) for role, some in zip(parents, others, strict=True)},
            np.full(len(self.rowids), file, np.int64),
            self.rowids,
            self.read,
        )

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return the features of ``rows`` (counted from 0, in any order, repeated or not).

        Numbers are float64, exactly as they are stored; the text 'nan' is null.

        Raises:
            BadTableError: the file is damaged.
        """
        wanted = self.rowids[rows]
        asked = np.unique(wanted)
        names = list(self.columns.features)
        plain = [name for name in names if name not in self.odd]
        values = [
            _quoted(name) if name in self.texts else f"nullif({_quoted(name)}, 'nan')"
            for name in plain
        ]
        with _adbc(self.path) as cursor:
            table = _fetch(cursor, self._query(values, asked), len(asked))
            columns = dict(zip(plain, table.columns[1:], strict=True))
            self.odd |= {
                name
                for name, found in columns.items()
                if name not in self.texts and not _is_number(found.type)
            }
            for name in sorted(self.odd):  # a copy: another thread may add to it
                columns[name] = self._odd_column(cursor, name, asked)
        types = [pa.string() if name in self.texts else pa.float64() for name in names]
        arrays = [columns[name].cast(kind) for name, kind in zip(names, types, strict=True)]
        found = pa.RecordBatch.from_arrays(arrays, names=names)
        positions = np.searchsorted(table.column(0).to_numpy(), wanted)
        if len(positions) == found.num_rows and (np.diff(positions) == 1).all():
            return found
        return found.take(pa.array(positions))

    def _odd_column(self, cursor: Any, name: str, asked: Integers) -> pa.Array:
        """Read a column of numbers that also holds text: 'inf' is a number, 'nan' is none."""
        column = _quoted(name)
        # Numbers come before all texts in SQLite's order, so this tells them apart.
        parts = (
            f"CASE WHEN {column} < '' THEN {column} END",
            f"CASE WHEN {column} >= '' THEN CAST({column} AS TEXT) END",
        )
        table = _fetch(cursor, self._query(parts, asked), len(asked))
        numbers = table.column(1).cast(pa.float64())
        texts = as_numbers(table.column(2).cast(pa.string()))[0]
        return pc.coalesce(numbers, without_nan(texts))

    def _query(self, values: Iterable[str], asked: Integers) -> str:
        # Names come from the file itself and are quoted; the row numbers are ours.
        rows = "0"
        if len(asked):
            first, last = int(asked[0]), int(asked[-1])
            rows = f"rowid BETWEEN {first} AND {last}"
            if last - first >= 2 * len(asked):
                rows = f"rowid IN ({','.join(map(str, asked.tolist()))})"
        listed = ", ".join(["rowid", *values])
        return f"SELECT {listed} FROM {_quoted(self.name)} WHERE {rows} ORDER BY rowid"  # noqa: S608


def is_cellprofiler_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database with a table of images."""
    try:
        with path.open("rb") as file:
            if file.read(len(SQLITE)) != SQLITE:
                return False
        return _image_table(_sqlite_tables(path)) is not None
    except (OSError, BadTableError):
        return False


def _open_sqlite(source: ObjectSource, path: Path, plate: str | None) -> None:
    tables = _sqlite_tables(path)
    image_table = _image_table(tables)
    if image_table is None:
        raise BadTableError(f"{path} has no table Image of CellProfiler with an {IMAGE_NUMBER}.")
    images = _Images(source)
    groups = _add_sqlite_images(source, images, path, image_table, tables[image_table], plate)
    images.check_plate(path.name)
    found: dict[str, SqliteTable] = {}
    for name, columns in tables.items():
        sorted_columns = object_columns(name, list(columns))
        if sorted_columns:
            texts = {c for c, kind in columns.items() if any(text in kind for text in _TEXT_TYPES)}
            found[sorted_columns.name] = SqliteTable(
                path, name, sorted_columns, frozenset(texts), TABLE_NUMBER in columns
            )
    chosen, note = choose_tables([table.columns for table in found.values()], path.name)
    source.notes += [note] if note else []
    used = [found[columns.name] for columns in chosen]
    keys = []
    for number, table in enumerate(used, start=1):
        keys.append(table.keys(groups, images, number))
        source.files.append(SourceFile(f"{path.name}:{table.name}", path, len(table.rowids)))
    texts_of = (table.columns.features.get(name) for table in used for name in table.texts)
    _add_cells(source, keys, [name for name in texts_of if name])


def _sqlite_tables(path: Path) -> dict[str, dict[str, str]]:
    """Return the declared type of each column of each table (not of views)."""
    with _sqlite(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {
            name: {
                row[1]: row[2].upper() for row in db.execute(f"PRAGMA table_info({_quoted(name)})")
            }
            for name in names
        }


def _image_table(tables: Mapping[str, Mapping[str, str]]) -> str | None:
    found = (
        name
        for name, columns in tables.items()
        if table_name(name).lower() == _IMAGE and IMAGE_NUMBER in columns
    )
    return next(found, None)


def _add_sqlite_images(
    source: ObjectSource,
    images: _Images,
    path: Path,
    name: str,
    columns: Iterable[str],
    plate: str | None,
) -> dict[str | None, int]:
    """Add the rows of the image table; return the number that each TableNumber got."""
    present = list(columns)
    group = _quoted(TABLE_NUMBER) if TABLE_NUMBER in present else "NULL"
    needed = [column for column in present if is_needed(column.removeprefix("Image_"))]
    listed = ["rowid", f"CAST({group} AS TEXT)", _quoted(IMAGE_NUMBER)]
    listed += [f"CAST({_quoted(column)} AS TEXT)" for column in needed]
    query = f"SELECT {', '.join(listed)} FROM {_quoted(name)} ORDER BY rowid"  # noqa: S608
    plain = [column.removeprefix("Image_") for column in needed]
    channels = channels_of(column.removeprefix("Image_") for column in present)
    groups: dict[str | None, int] = {}
    file = f"{path.name}:{name}"
    with _sqlite(path) as db:
        for line, code, number, *values in db.execute(query):
            whole = number if isinstance(number, int) else UNKNOWN
            record = image_record(line, dict(zip(plain, values, strict=True)), channels, plate)
            images.add(file, line, groups.setdefault(code, len(groups)), whole, record)
    source.files.append(SourceFile(file, path, len(source.images)))
    return groups


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _fetch(cursor: Any, query: str, rows: int) -> pa.RecordBatch:
    # ADBC takes the types from its first batch of rows: let that be all of them.
    cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": str(2 * rows + 2)})
    cursor.execute(query)
    table = cursor.fetch_arrow_table().combine_chunks()
    columns = [
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.columns
    ]
    # Values of one name may be asked for twice, so by position, not by name.
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
def _sqlite(path: Path) -> Iterator[sqlite3.Connection]:
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
