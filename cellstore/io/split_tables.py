"""Split tables of others: which compounds, wells or images train, validate and test.

A table with a column ``split`` names the subset of each row; what it splits may be images (plate,
well, site), wells (plate, well) or treatments (``broad_sample``, or ``pert_iname``). JUMP-CP's
``datasplits`` have a column for each sort of treatment (ORF, CRISPR, Compound), or name treatments
together with the cell line and time point of their plates: a second table
without a column ``split`` names these plates. It is joined by all columns that both have.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..enums import Subset
from ..errors import BadTableError, UserInputError
from .filenames import format_well, parse_well
from .tables import KEYS, Refusal, known_text, nearest_columns, open_table, plain_name

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "split": ("split", "subset", "side", "set"),
    **KEYS,
    "identifier": ("broadsample", "identifier", "jcp2022"),
    "name": ("pertiname", "compoundname"),
    "target": ("target", "gene", "genes"),
    "inchikey": ("inchikey",),
    "smiles": ("smiles",),
}
"""Names of columns, as ``plain_name`` gives them; the first that is there counts."""
IDENTIFIERS = ("orf", "crispr", "compound")
"""Columns of JUMP-CP's pairs; each holds a treatment of its own."""
SUBSETS: Mapping[str, Subset] = {
    **dict.fromkeys(("train", "training"), Subset.TRAIN),
    **dict.fromkeys(("validate", "validation", "valid", "val", "dev"), Subset.VALIDATION),
    **dict.fromkeys(("test", "testing", "holdout"), Subset.TEST),
}


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One line of a split table: what it puts into a subset. Of an image it may say only a part."""

    file: str
    line: int
    subset: Subset
    plate: str | None = None
    well: str | None = None
    site: int | None = None
    name: str | None = None
    identifier: str | None = None
    target: str | None = None
    inchikey: str | None = None
    smiles: str | None = None

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class SplitTables:
    """All rows; the lines that could not be used (file, and why); the SHA-256 of each file."""

    rows: tuple[SplitRow, ...]
    refusals: tuple[tuple[str, Refusal], ...]
    digests: Mapping[str, str]


@dataclass
class _Table:
    """A table in memory: its rows by normalised column, with their line."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_split_tables(paths: Sequence[Path]) -> SplitTables:
    """Read split tables, joined with the tables among ``paths`` that have no column ``split``.

    Raises:
        BadTableError: no table has a column ``split``; one does not name what it splits; two
            have no column in common.
        UserInputError: a file cannot be read, or no row can be used.
    """
    splits: list[_Table] = []
    others: list[_Table] = []
    refusals: list[tuple[str, Refusal]] = []
    digests = {}
    headers = [set(map(plain_name, open_table(path, whole=False).columns)) for path in paths]
    counts = Counter(chain.from_iterable(headers))
    wanted = {name for names in COLUMNS.values() for name in names} | set(IDENTIFIERS)
    wanted |= {name for name, count in counts.items() if count > 1}  # they join two tables
    for path in paths:
        table = _read(path, wanted, refusals)
        is_split = not set(COLUMNS["split"]).isdisjoint(table.columns)
        (splits if is_split else others).append(table)
        with path.open("rb") as stream:
            digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if not splits:
        raise BadTableError(
            f"{paths[0].name} has no column 'split' with train, validation or test. "
            f"{nearest_columns(COLUMNS['split'], open_table(paths[0], whole=False).columns)}"
        )
    rows: list[SplitRow] = []
    for table in splits:
        for other in others:
            _join(table, other, refusals)
        for item in _split_rows(table):
            if isinstance(item, Refusal):
                refusals.append((table.path.name, item))
            else:
                rows.append(item)
    if not rows:
        why = refusals[0][1].detail if refusals else "there is none"
        raise UserInputError(f"No row of the split tables can be used ({why}).")
    return SplitTables(tuple(rows), tuple(refusals), digests)


def _read(path: Path, wanted: Collection[str], refusals: list[tuple[str, Refusal]]) -> _Table:
    table = open_table(path)
    positions: dict[str, int] = {}
    for position, column in enumerate(table.columns):
        if plain_name(column) in wanted:
            positions.setdefault(plain_name(column), position)
    found = _Table(path, list(positions), [])
    for row in table.rows():
        if isinstance(row, Refusal):
            refusals.append((path.name, row))
            continue
        cells = ((name, known_text(name, row.cells[at])) for name, at in positions.items())
        known = {name: sys.intern(text) for name, text in cells if text is not None}
        found.rows.append((row.line, known))
    return found


def _join(table: _Table, other: _Table, refusals: list[tuple[str, Refusal]]) -> None:
    """Add the columns of ``other`` to ``table``; a row comes once for each row that fits it."""
    common = [name for name in table.columns if name in other.columns]
    if not common:
        raise BadTableError(
            f"{table.path.name} and {other.path.name} have no column in common, so they cannot be "
            "joined. Give a table that names the wells of what is split."
        )
    partners: dict[tuple[str | None, ...], list[dict[str, str]]] = {}
    for _, cells in other.rows:
        partners.setdefault(tuple(map(cells.get, common)), []).append(cells)
    rows: list[tuple[int, dict[str, str]]] = []
    for line, cells in table.rows:
        found = partners.get(tuple(map(cells.get, common)), [])
        if not found:
            detail = f"line {line}: no row of {other.path.name} has the same {', '.join(common)}"
            refusals.append((table.path.name, Refusal(line, "not in the other table", detail)))
        rows += [(line, {**partner, **cells}) for partner in found]
    table.columns = list(dict.fromkeys((*table.columns, *other.columns)))
    table.rows = rows


def _split_rows(table: _Table) -> Iterator[SplitRow | Refusal]:
    names = {
        what: next((name for name in known if name in table.columns), "")
        for what, known in COLUMNS.items()
    }
    pairs = [name for name in IDENTIFIERS if name in table.columns]
    if not any((names["well"], names["identifier"], names["name"], pairs)):
        raise BadTableError(
            f"{table.path.name} does not say what it splits: it has no column for wells, "
            "broad_sample or pert_iname. Give a table that names the wells as a further FILE."
        )
    for line, cells in table.rows:
        values: dict[str, Any] = {what: cells.get(name) for what, name in names.items()}
        written = values.pop("split") or ""
        subset = SUBSETS.get(written.casefold())
        if subset is None:
            detail = f"line {line}: {written!r} is none of train, validation, test"
            yield Refusal(line, "unknown subset", detail)
            continue
        try:
            if values["well"] is not None:
                values["well"] = format_well(*parse_well(values["well"]))
            if values["site"] is not None:
                values["site"] = int(values["site"])
        except ValueError as error:
            yield Refusal(line, "unreadable well or site", f"line {line}: {error}")
            continue
        row = SplitRow(table.path.name, line, subset, **values)
        if names["identifier"] or not pairs:
            yield row
        else:
            yield from (replace(row, identifier=cells[name]) for name in pairs if name in cells)
