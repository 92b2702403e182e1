"""Which rows of CellProfiler's tables are one cell: found from their numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cellprofiler_columns import TableColumns, base_of, primary_of
from .model import Integers

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
