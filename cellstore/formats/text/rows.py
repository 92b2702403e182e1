"""The rows of an opened text table; an open quote, a cut or a second header costs its own line."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from ...errors import BadTableError
from ..records import Refusal

QUOTED_LINES = 100
"""A quoted cell of more lines is taken for a quote that was never closed."""

_new = tuple.__new__
_END = "\r\n"
_BOM = "\ufeff"


class TableRow(NamedTuple):
    """The cells of one data row and the line of the file (header = 1) where it starts."""

    line: int
    cells: Sequence[str]


class RowSplitter:
    """Splits the lines after the header into rows; each line that is not blank is accounted for.

    ``lines`` are the lines with their ends, ``headers`` the header lines as written,
    ``line`` is the number of lines already read.
    """

    def __init__(
        self,
        lines: Iterable[str],
        delimiter: str,
        headers: Sequence[tuple[str, ...]],
        line: int,
    ) -> None:
        self._source = lines
        self._delimiter = delimiter
        self._headers = [tuple(name.strip() for name in header) for header in headers]
        self._width = len(headers[-1])
        self._names = {name for header in (*headers, *self._headers) for name in header if name}
        self._names |= {_BOM + header[0] for header in headers}
        self._line = line
        self._returned: deque[str] = deque()
        self._lines = self._endless()

    def rows(self) -> Iterator[TableRow | Refusal]:
        """Yield each data row, or why it is none; blank lines are not rows.

        Raises:
            BadTableError: the header comes again with its columns in another order.
        """
        delimiter, width, names = self._delimiter, self._width, self._names
        for text in self._lines:
            if not text:
                return
            self._line = line = self._line + 1
            if '"' in text or "\0" in text:
                yield self._unusual(text)
                continue
            cells = text.split(delimiter)
            cells[-1] = cells[-1].rstrip(_END)
            if len(cells) == width and cells[0] not in names and len(text) > 2:
                yield _new(TableRow, (line, cells))
            elif text.strip(_END):
                yield self._checked(line, cells, text)

    def _endless(self) -> Iterator[str]:
        """Yield the lines, after each those that were given back, and '' after the last."""
        for text in chain(self._source, repeat("")):
            yield text
            while self._returned:
                yield self._returned.popleft()

    def _unusual(self, text: str) -> TableRow | Refusal:
        line = self._line
        if "\0" in text:
            return Refusal(line, "not text", f"line {line} has a NUL byte: the file is damaged")
        taken = [text]
        cells = self._quoted_cells(taken)
        if cells is not None:
            self._line += len(taken) - 1
            return self._checked(line, cells, taken[-1])
        after = [more for more in taken[1:] if more]
        self._returned.extendleft(reversed(after))
        return Refusal(line, "quote left open", _open_quote(line, len(after)))

    def _quoted_cells(self, taken: list[str]) -> list[str] | None:
        """Return the cells of the row that starts with ``taken``, to which its lines are added.

        None: the quote was left open. One line is split as leniently as spreadsheets do it; what
        spans lines has to be quoted properly and to have the right number of cells, because a
        stray quote would else swallow the rows up to the next one.
        """
        try:
            cells = next(csv.reader(self._take(taken), delimiter=self._delimiter))
            if len(taken) == 1:
                return cells
            cells = next(csv.reader(taken, delimiter=self._delimiter, strict=True))
        except csv.Error:
            return None
        return None if len(cells) != self._width or self._swallows_rows(taken) else cells

    def _take(self, taken: list[str]) -> Iterator[str]:
        yield taken[0]
        while len(taken) <= QUOTED_LINES and taken[-1]:
            taken.append(next(self._lines))
            yield taken[-1]

    def _swallows_rows(self, taken: Sequence[str]) -> bool:
        """Tell whether a line inside of a quoted cell looks like a row, or is damaged."""
        commas = self._width - 1
        inside = (text for text in taken[1:-1] if '"' not in text)
        rows = commas >= 2 and any(text.count(self._delimiter) == commas for text in inside)
        return rows or any("\0" in text for text in taken)

    def _checked(self, line: int, cells: list[str], text: str) -> TableRow | Refusal:
        """Return the row, unless it has too many or few cells or is the header once more."""
        if len(cells) != self._width:
            cut = "" if text.endswith(("\n", "\r")) else "; the file ends inside of this row"
            detail = f"line {line}: {len(cells)} cells, not {self._width}{cut}"
            return Refusal(line, "wrong number of cells", detail)
        if cells[0].strip() not in self._names:
            return TableRow(line, cells)
        names = tuple(cell.strip().removeprefix(_BOM) for cell in cells)
        if names in self._headers:
            return Refusal(line, "header repeated", f"line {line} is the header of line 1 again")
        if any(sorted(names) == sorted(header) for header in self._headers):
            raise BadTableError(
                f"Line {line} is a header with its columns in another order. "
                "Two tables were put together: ingest them one by one."
            )
        return TableRow(line, cells)


def _open_quote(line: int, more: int) -> str:
    if more == 0:
        return f"line {line}: a quote is not closed before the end of the file"
    return (
        f"a quote opened on line {line} does not close well in lines {line} to {line + more}; "
        f"lines {line + 1} to {line + more} were read without it"
    )
