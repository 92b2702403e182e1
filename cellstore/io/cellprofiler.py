"""CellProfiler's measurements of objects: what its tables and columns are, and their join to cells.

Tables of objects (Cells, Nuclei, Cytoplasm) come in one CSV file each, in one per folder (a site
each), or in one SQLite file (``cellprofiler_sqlite``). The keys of all rows are read and joined
first; the measurements follow in batches, by row number. CSV files have no way to a row by its
number: their measurements are moved once into a temporary Arrow file.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from ..enums import Severity
from ..errors import BadTableError, StorageError, UserInputError, first_line
from .filenames import core_file_name, format_well
from .image_tables import METADATA, ImageRecord, ImageRows, is_needed
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
from .tables import Refusal, TableRow, TextTable, open_table
from .uris import split_page

TOOL = "CellProfiler"
IMAGE_NUMBER, OBJECT_NUMBER, TABLE_NUMBER = "ImageNumber", "ObjectNumber", "TableNumber"
UNKNOWN = -1
"""An image that no image table has, or a number that is none."""

# ---- What the columns of a table of objects are ----

COMPARTMENTS = ("Cells", "Nuclei", "Cytoplasm")

IMAGE_TABLE = "image"
_NOT_OBJECTS = frozenset(
    {IMAGE_TABLE, "experiment", "load_data", "load_data_with_illum", "relationship"}
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

    @property
    def objects(self) -> str:
        """What the rows are: the name of the table, or of the first of several in one table."""
        if self.name.lower() != "object":
            return self.name
        owners = {column.partition("_")[0] for column in self.features}
        return next((role for role in COMPARTMENTS if role in owners), self.name)

    def positions(self) -> dict[str, str]:
        """Return the columns of box and centre."""
        owner, whole = self.objects, self.objects == self.name
        own = [name for name in self.features if whole or name.startswith(f"{owner}_")]
        return position_columns({name.removeprefix(f"{owner}_"): name for name in own})


def position_columns(by_measure: Mapping[str, str]) -> dict[str, str]:
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
    """Sort the columns of a table; None where it has no row per object.

    A table Cells, Nuclei or Cytoplasm is one also where it lacks its keys: the rows are refused.
    """
    name = table_name(written)
    owners = ("", f"{name}_", *(f"{role}_" for role in COMPARTMENTS))
    numbers = [
        *(OBJECT_NUMBER, f"{name}_{OBJECT_NUMBER}"),
        *(owner + number for owner in owners for number in (OBJECT_NUMBER, _NUMBER)),
    ]
    number = next((column for column in numbers if column in columns), None)
    has_keys = number is not None and IMAGE_NUMBER in columns
    if name.lower() in _NOT_OBJECTS or not columns:
        return None
    if not has_keys and role_of(name) not in COMPARTMENTS:
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
    return ObjectColumns(name, role_of(name), features, number or OBJECT_NUMBER, parents)


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


def choose_tables(
    source: ObjectSource, tables: Sequence[ObjectColumns], where: str
) -> list[ObjectColumns]:
    """Return the tables that together describe the cells; what is not used is noted in ``source``.

    The object numbers of the first are those of the cells: Cells, else Nuclei.
    """
    if not tables:
        source.notes.append("there is no table of objects: only images are read")
        return []
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
            f"{where} has several sets of objects ({names}). Move all but one to another folder."
        )
    if unused := ", ".join(table.name for table in tables if table not in chosen):
        source.notes.append(f"tables not used, because they do not describe the cells: {unused}")
    return sorted(chosen, key=lambda table: [*COMPARTMENTS, table.role].index(table.role))


# ---- Which image a row of an image table is ----

COUNT = "Count_"


def about_image(column: str) -> str | None:
    """Return the name, without ``Image_``, of a column of an image table that is read."""
    plain = column.removeprefix("Image_")
    return plain if is_needed(plain) or plain.startswith((METADATA, COUNT)) else None


class ImageIndex:
    """Adds images to a source; finds them by group (a folder, a TableNumber) and ImageNumber."""

    def __init__(self, source: ObjectSource) -> None:
        self._source = source
        self.empty: dict[str, list[int]] = {}
        """By kind of object: the images (indices) in which the image table counts none."""
        self._indices: dict[tuple[int, int], int] = {}
        self._sorted: tuple[Integers, Integers] | None = None

    def add_table(
        self,
        file: SourceFile,
        columns: Sequence[str],
        rows: Callable[[], Iterable[TableRow | Refusal]],
        group_of: Callable[[Sequence[str | None]], int],
        plate: str | None = None,
        folder: str = "",
    ) -> None:
        """Add the rows of an image table, whatever they are; ``group_of`` the cells of a row.

        What columns say goes before the file names, and these before the name of the ``folder``.
        """
        positions: dict[str, int] = {}
        for at, column in enumerate(columns):
            if plain := about_image(column):
                positions.setdefault(plain, at)
        counts = {
            name.removeprefix(COUNT): positions[name]
            for name in positions
            if name.startswith(COUNT)
        }
        number_at = columns.index(IMAGE_NUMBER) if IMAGE_NUMBER in columns else None
        reader = ImageRows(positions, plate, folder=folder)
        reader.find_pages(row.cells for row in rows() if not isinstance(row, Refusal))
        source, before = self._source, len(self._source.images)
        for row in rows():
            if isinstance(row, Refusal):
                source.images.append((file.name, row))
                continue
            content = reader.read(*row)
            written = None if number_at is None else row.cells[number_at]
            number = int(whole_numbers(pa.array([written], pa.string()))[0])
            key = group_of(row.cells), number
            if isinstance(content, ImageRecord) and not 0 <= number < 1 << 32:
                detail = f"{IMAGE_NUMBER} is missing, or no whole number"
                content = Refusal(row.line, "no image number", detail)
            elif key in self._indices:
                detail = f"an earlier row has {IMAGE_NUMBER} {number}"
                content = Refusal(row.line, "duplicate key", detail)
            elif isinstance(content, ImageRecord):
                self._indices[key] = len(source.images)
                for objects, at in counts.items():
                    if re.fullmatch(r"0(\.0*)?", (row.cells[at] or "").strip()):
                        self.empty.setdefault(objects, []).append(len(source.images))
                well = content.row, content.column
                for ref in content.files:
                    name = core_file_name(split_page(ref.name)[0])
                    if name is not None and (name.row, name.column) != well:
                        detail = f"well {format_well(*well)}, file {ref.name}"
                        reason = "well and file name disagree"
                        issue = RowIssue(Severity.SUSPICIOUS, file.name, [row.line], reason, detail)
                        source.issues.append(issue)
                        break
            source.images.append((file.name, content))
        source.files.append(file._replace(rows=len(source.images) - before))
        if len(source.images) == before:
            source.problem(file.name, None, "no rows", "the image table has a header only")

    def groups_without(self, objects: str) -> set[int]:
        """Return the groups of images in which the image table counts no ``objects``."""
        filled = set(self._indices.values()).difference(self.empty.get(objects, ()))
        groups = {index: group for (group, _), index in self._indices.items()}
        return set(groups.values()) - {groups[index] for index in filled}

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


# ---- Joining the tables to cells ----


def check_keys(source: ObjectSource, file: str, present: Container[str], *more: str) -> None:
    """Name the keys that a table lacks; then all of its rows are refused."""
    for key in (IMAGE_NUMBER, *more):
        if key not in present:
            source.problem(file, None, "missing column", f"there is no column {key}")


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


def _join(source: ObjectSource, tables: Sequence[TableKeys]) -> list[Integers]:
    """Return the row of each cell in each table; the object numbers are those of table 0.

    A cell has one row of each table. The parents that Cytoplasm names (else those that Cells
    name, else equal numbers) decide. Every row is part of a cell, or refused with its reason.
    """

    def refuse(table: TableKeys, rows: Integers, reason: str, detail: str) -> None:
        for file in np.unique(table.file[rows]):
            lines = table.line[rows[table.file[rows] == file]]
            source.refuse(source.files[file].name, lines, reason, detail)

    usable: list[Integers] = []  # the rows of each table that have a key of their own
    for table in tables:
        unknown = table.image == UNKNOWN
        why = "no image table has its ImageNumber"
        refuse(table, np.flatnonzero(unknown), "image unknown", why)
        odd = ~unknown & ((table.number < 0) | (table.number >= LARGEST_NUMBER))
        why = "it is missing, or no whole number"
        refuse(table, np.flatnonzero(odd), "no object number", why)
        own = np.flatnonzero(~unknown & ~odd)
        first = first_of_each(_cell_keys(table.image[own], table.number[own]))
        why = "an earlier row has the same numbers"
        refuse(table, own[~first], "duplicate key", why)
        usable.append(own[first])
    # Cytoplasm comes last, and names the objects of the others as its parents.
    base_at = len(tables) - 1 if tables[-1].columns.role == "Cytoplasm" else 0
    base = tables[base_at]
    rows = {base_at: usable[base_at]}
    # Cells before Nuclei: they say which nucleus is theirs where Cytoplasm does not.
    for at, table in enumerate(tables):
        if at == base_at:
            continue
        role = table.columns.role
        numbers = base.number[rows[base_at]]
        for other, chosen in rows.items():
            if role in tables[other].parents:
                numbers = tables[other].parents[role][chosen]
                break
        wanted = _cell_keys(base.image[rows[base_at]], numbers)
        keys = _cell_keys(table.image[usable[at]], table.number[usable[at]])
        order = np.argsort(keys, kind="stable")
        found = np.searchsorted(keys[order], wanted)
        found[found == len(keys)] = 0
        kept = keys[order][found] == wanted if len(keys) else np.zeros(len(wanted), bool)
        why = f"its object is not in table {table.columns.name}"
        refuse(base, rows[base_at][~kept], "no parent", why)
        rows = {other: chosen[kept] for other, chosen in rows.items()}
        rows[at] = usable[at][order[found[kept]]] if len(keys) else usable[at][:0]
    first = first_of_each(rows[0])
    refuse(base, rows[base_at][~first], "duplicate key", "an earlier row is the same cell")
    rows = {at: chosen[first] for at, chosen in rows.items()}
    for at, table in enumerate(tables):
        if at != base_at:
            idle = np.setdiff1d(usable[at], rows[at])
            refuse(table, idle, "not joined", f"no row of {base.columns.name} belongs to it")
    return [rows[at] for at in range(len(tables))]


def _cell_keys(image: Integers, number: Integers) -> Integers:
    usable = np.where((number < 0) | (number >= LARGEST_NUMBER), LARGEST_NUMBER, number)
    return np.asarray((image << 32) | usable, np.int64)


def add_cells(
    source: ObjectSource,
    images: ImageIndex,
    tables: Sequence[TableKeys],
    texts: Iterable[str] = (),
) -> None:
    """Make the rows of ``tables`` the cells of ``source``; ``texts`` are features of words."""
    if not tables:
        return
    rows = _join(source, tables)
    names = [name for table in tables for name in table.columns.features.values()]
    texts = frozenset(texts)
    source.objects = tuple(table.columns.name for table in tables)
    source.empty = images.empty.get(tables[0].columns.objects, [])
    source.schema = pa.schema(
        [(name, pa.string() if name in texts else pa.float64()) for name in names]
    )
    source.image_index, source.object_number = tables[0].image[rows[0]], tables[0].number[rows[0]]
    source.origins = [
        (table.file[chosen], table.line[chosen]) for table, chosen in zip(tables, rows, strict=True)
    ]
    positions = tables[0].columns.positions()

    def batch(start: int, asked: Sequence[Future[pa.RecordBatch]]) -> ObjectBatch:
        parts = [future.result() for future in asked]
        arrays = [array for part in parts for array in part.columns]
        return ObjectBatch(
            start,
            pa.RecordBatch.from_arrays(arrays, names=names),
            column_values(parts[0], positions, BOX),
            column_values(parts[0], positions, CENTRE),
        )

    def batches() -> Iterator[ObjectBatch]:
        # All tables are read at the same time, and the next batch while the last is being used.
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


# ---- Tables as CSV files in a folder and its subfolders ----

_DEEPEST = 6
_TABLES = (".csv", ".csv.gz")


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
    first = next((table for table in tables if _kind(table).lower() == IMAGE_TABLE), None)
    try:
        columns = _columns(open_table(first, empty=True)) if first else ["none"]
    except UserInputError:
        return False
    if not columns or IMAGE_NUMBER in columns:
        return True
    # Beside tables of cells it is CellProfiler's, and the reader says what it lacks.
    return first is not None and any(_kind(at) in COMPARTMENTS for at in _csv_files(path))


def open_cellprofiler_folder(path: Path, plate: str | None = None) -> ObjectSource:
    """Open a folder of CSV files; close the source after use.

    ``plate`` is the barcode where the tables name none.
    """
    source = ObjectSource(TOOL, own_images=True)
    folders: dict[Path, int] = {}
    files: list[_CsvFile] = []
    for file_path in _csv_files(path):
        table = open_table(file_path, empty=True)
        folder = folders.setdefault(file_path.parent, len(folders))
        name = file_path.relative_to(path).as_posix()
        files.append(_CsvFile(name, _kind(file_path), folder, table, _columns(table)))
    of_images = [file for file in files if file.kind.lower() == IMAGE_TABLE and file.columns]
    kinds: dict[str, list[_CsvFile]] = {}
    for file in files:
        if object_columns(file.kind, file.columns):
            kinds.setdefault(file.kind, []).append(file)
    images = ImageIndex(source)
    folder_names = [folder.name for folder in folders]
    for file in of_images:
        images.add_table(
            SourceFile(file.name, file.table.path, 0),
            file.columns,
            file.table.rows,
            lambda _, file=file: file.folder,  # type: ignore[misc]
            plate,
            folder_names[file.folder],
        )
    source.check_plate(path.name)
    merged = [
        object_columns(kind, list(dict.fromkeys(name for file in own for name in file.columns)))
        for kind, own in kinds.items()
    ]
    chosen = choose_tables(source, [columns for columns in merged if columns], path.name)
    for file in of_images:
        check_keys(source, file.name, file.columns)
    for of_kind in chosen:
        for file in kinds[of_kind.name]:
            check_keys(source, file.name, file.columns, of_kind.object_number)
    target = Path(tempfile.mkdtemp(prefix="cellstore-"))
    source.close = lambda: shutil.rmtree(target, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(source.close)
        tables = [
            _buffered(source, columns, kinds[columns.name], target / f"{number}.arrow", images)
            for number, columns in enumerate(chosen)
        ]
        for file in files:
            if not file.columns:
                source.files.append(SourceFile(file.name, file.table.path, 0))
                source.problem(file.name, None, "empty file", "the file has 0 bytes")
        add_cells(source, images, tables)
        stack.pop_all()  # the caller closes the source
    return source


def _csv_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders.sort()
        if len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        tables = (here / name for name in sorted(names) if name.lower().endswith(_TABLES))
        yield from filter(Path.is_file, tables)  # no pipe or device


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
        if owner.lower() in (IMAGE_TABLE, "object") or measure == IMAGE_NUMBER
        else feature_name(owner, measure)
        for owner, measure in zip(owners, measures, strict=True)
    ]


def _buffered(
    source: ObjectSource,
    columns: ObjectColumns,
    files: Sequence[_CsvFile],
    target: Path,
    images: ImageIndex,
) -> TableKeys:
    """Move the features of ``files`` of one kind to ``target``; return the keys of their rows."""
    schema = pa.schema([(name, pa.float64()) for name in columns.features])
    keys = {"image": IMAGE_NUMBER, "number": columns.object_number, **columns.parents}
    without = images.groups_without(columns.objects)
    parts: dict[str, list[Integers]] = {
        key: [np.empty(0, np.int64)] for key in ("file", "line", *keys)
    }
    with _arrow_file(target, schema) as writer:
        for file in files:
            rows = 0
            odd: _Odd = {}
            wanted = {*keys.values(), *columns.features}
            used = [(at, name) for at, name in enumerate(file.columns) if name in wanted]
            positions = [at for at, _ in used]
            for batch in file.table.batches(positions, numbers=positions):
                lines = np.asarray(batch.lines, np.int64)
                rows += len(lines) + len(batch.refused)
                for line, reason, detail in batch.refused:
                    source.refuse(file.name, np.array([line]), reason, detail)
                found: dict[str, pa.Array] = {}
                for (_, name), values in zip(used, batch.columns, strict=True):
                    if name not in found:
                        found[name] = values
                        continue
                    one, other = as_numbers(found[name])[0], as_numbers(values)[0]
                    what = f"{name} occurs twice with different values, the first is used"
                    _count(odd, what, lines, pc.fill_null(pc.not_equal(one, other), False))
                for key, name in keys.items():
                    nothing = np.full(len(lines), UNKNOWN, np.int64)
                    parts[key].append(whole_numbers(found[name]) if name in found else nothing)
                parts["image"][-1] = images.find(file.folder, parts["image"][-1])
                parts["file"].append(np.full(len(lines), len(source.files), np.int64))
                parts["line"].append(lines)
                arrays = []
                for name in columns.features:
                    numbers = pa.nulls(len(lines), pa.float64())
                    if name in found:
                        numbers, words = as_numbers(found[name])
                        _count(odd, f"{name} is not a number", lines, words)
                    arrays.append(numbers)
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            if rows == 0 and file.folder not in without:
                source.problem(file.name, None, "no rows", "the file has a header only")
            for what, (count, line) in odd.items():
                source.problem(file.name, line, "odd value", f"{what}: {count} rows")
            source.files.append(SourceFile(file.name, file.table.path, rows))
    whole = {key: np.concatenate(some) for key, some in parts.items()}
    parents = {role: whole[role] for role in columns.parents}
    read = partial(_read_rows, target)
    return TableKeys(
        columns, whole["image"], whole["number"], parents, whole["file"], whole["line"], read
    )


_Odd = dict[str, tuple[int, int]]
"""How many rows of a file have something odd, and the line of the first."""


def _count(odd: _Odd, what: str, lines: Integers, where: pa.Array | None) -> None:
    chosen = lines[:0] if where is None else lines[np.asarray(where).astype(bool)]
    if len(chosen):
        count, first = odd.get(what, (0, int(chosen[0])))
        odd[what] = count + len(chosen), first


@contextmanager
def _arrow_file(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Open a temporary Arrow file to write batches to."""
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield writer
    except OSError as error:
        raise StorageError(
            f"The temporary folder {path.parent.parent} cannot be written "
            f"({first_line(error)}). Free some space there, or name another in TMPDIR."
        ) from error


def _read_rows(path: Path, rows: Integers) -> pa.RecordBatch:
    """Return ``rows`` of an Arrow file (from 0), in any order, repeated or not."""
    first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        table = reader.read_all().slice(first, end - first)  # nothing is read before it is used
    if len(rows) != table.num_rows or not (np.diff(rows) == 1).all():
        table = table.take(pa.array(rows - first))
    columns = [without_nan(column.combine_chunks()) for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)
