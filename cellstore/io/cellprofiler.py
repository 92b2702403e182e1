"""CellProfiler's measurements of objects: what its tables and columns are, and their join to cells.

Tables of objects (Cells, Nuclei, Cytoplasm) come in one CSV file each, in one per folder (a site
each), or in one SQLite file: ``cellprofiler_csv`` and ``cellprofiler_sqlite`` read the keys of all
rows, which are joined here; the measurements follow in batches, by row number.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..enums import Severity
from ..errors import BadTableError
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
    batch_rows,
    column_values,
    first_of_each,
    whole_numbers,
)
from .tables import Refusal, TableRow
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
