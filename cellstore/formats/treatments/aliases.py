"""Alias tables: which spellings of a treatment's name are one, and how it is to be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import BadTableError
from ..records import Refusal, TreatmentRecord
from ..text.tables import TextTable, cell_text, open_table

_COLUMNS = (("alias", "name"), ("from", "to"))


@dataclass(frozen=True)
class Aliases:
    """Names by alias; a name is never itself an alias."""

    names: Mapping[str, str]
    _done: dict[TreatmentRecord, TreatmentRecord] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> Aliases:
        """Read a table with the columns ``alias`` and ``name`` (or ``from`` and ``to``).

        An alias of an alias is followed to its end.

        Raises:
            BadTableError: a column is missing, a row is incomplete, an alias has two names, or
                names go round in a circle. Nothing is guessed.
            UserInputError: the file is missing or unreadable.
        """
        given = _read(open_table(path))
        return cls({alias: _followed(path, given, alias) for alias in given})

    def apply(self, record: TreatmentRecord) -> TreatmentRecord:
        """Return the treatment under its name; the same object for the same treatment.

        Only ``pert_iname`` is renamed: two samples of one compound stay two samples.
        """
        if record.pert_iname not in self.names:
            return record
        if record not in self._done:
            self._done[record] = replace(record, pert_iname=self.names[record.pert_iname])
        return self._done[record]


def _read(table: TextTable) -> dict[str, str]:
    columns = next((pair for pair in _COLUMNS if set(pair) <= set(table.columns)), _COLUMNS[0])
    table.require(*columns)
    old, new = (table.position(column) for column in columns)
    given: dict[str, str] = {}
    for row in table.rows():
        if isinstance(row, Refusal):
            raise _bad(table.path, row.line, row.detail)
        alias, name = cell_text(row.cells, old), cell_text(row.cells, new)
        if alias is None or name is None:
            raise _bad(table.path, row.line, "both names are needed")
        if given.setdefault(alias, name) != name:
            raise _bad(table.path, row.line, f"{alias!r} is {given[alias]!r} already")
    return {alias: name for alias, name in given.items() if alias != name}


def _followed(path: Path, given: Mapping[str, str], alias: str) -> str:
    name, seen = given[alias], {alias}
    while name in given:
        if name in seen:
            circle = ", ".join(repr(item) for item in sorted(seen))
            raise BadTableError(
                f"{path.name}: {circle} are aliases of each other. Choose one name for them."
            )
        seen.add(name)
        name = given[name]
    return name


def _bad(path: Path, line: int, detail: str) -> BadTableError:
    return BadTableError(f"{path.name}, line {line}: {detail}. Mend this row of the alias table.")
