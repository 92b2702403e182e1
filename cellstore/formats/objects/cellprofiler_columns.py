"""What the tables and columns of CellProfiler are called, and which of them measure an object."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import BadTableError
from .model import Place

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
