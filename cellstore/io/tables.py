"""The one reader of tables: plate maps, LoadData, treatments, splits, tables of features.

A Parquet file is read as the CSV file that has its rows. What is missing or unreadable is a
``UserInputError``; what is empty, damaged, no table, or lacks columns, a ``BadTableError``.

We split lines into rows ourselves because after a quote that is never closed DuckDB drops the rows
that follow and pyarrow joins them into one cell, while here such a quote costs its own line only;
pieces of a file in which every line is one whole row go through pyarrow, ten times as fast.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain, islice, product
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from ..errors import BadTableError, UserInputError, first_line, some_of
from ..notebooks import json_value
from .uris import plain_file

if TYPE_CHECKING:  # Arrow is slow to import, and a plate map does without
    import pyarrow as pa

LONGEST = 255
"""Characters of a name that every database and file system can keep."""

QUOTED_LINES = 100
"""A quoted cell of more lines is taken for a quote that was never closed."""

MISSING = frozenset({"", "-"}).union(
    "".join(letters)
    for word in ("na", "n/a", "#n/a", "<na>", "nan", "none", "null", "nat")
    for letters in product(*({letter, letter.upper()} for letter in word))
)
"""What means 'no value', as a whole cell, in any case: for every reader the same."""

MISSING_NUMBERS = (
    *sorted(MISSING),
    *("-nan", "-NaN", "-NAN", "-Nan", "+nan", "+NaN", "+NAN", "+Nan"),
)
"""What means 'no value' where a number is expected."""

T = TypeVar("T")

_new = tuple.__new__
_END = "\r\n"
_BOM = "\ufeff"
_CHUNK = 1 << 20
BLOCK = 8 << 20
_LONGEST_LINE = 16
"""Chunks that may pass without the end of a line."""

_GZIP_MAGIC = b"\x1f\x8b"
PARQUET = b"PAR1"
_DELIMITERS = "\t,;"
_HEADER_LINES = 5
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""How .xlsx and .ods begin, and .xls."""
_SHEET_ROWS = 1_100_000
_CELL_LINES = 20_000
"""Lines of a text table that are split into cells to look for a grid or for a header."""
_COLUMN_SIGNS = ("ImageNumber", "ObjectNumber", "Metadata_", "FileName_", "AreaShape_")


KEYS: Mapping[str, tuple[str, ...]] = {
    "plate": ("plate", "assayplatebarcode", "barcode", "platebarcode"),
    "well": ("well", "wellposition"),
    "site": ("site", "field", "fieldid", "fov"),
}
"""Names of the columns that say which image a row is about, as :func:`plain_name` gives them."""


class Refusal(NamedTuple):
    """A row that cannot be used: the line it starts at, a reason to count by, and its details."""

    line: int
    reason: str
    detail: str


class RowRefusedError(Exception):
    """A row, element or file cannot be used. Its arguments are the reason and the detail.

    Never leaves this package: readers make a ``Refusal`` of it.
    """


class TableRow(NamedTuple):
    """The cells of one data row and the line of the file (header = 1) where it starts."""

    line: int
    cells: Sequence[str]


class TableBatch(NamedTuple):
    """Some columns of consecutive rows as Arrow, the line of each row, and the rows refused."""

    columns: list[pa.Array]
    lines: Sequence[int]
    refused: list[Refusal]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table that has been looked at but not read; its rows can be streamed again and again.

    Where a first header line names the object of each column (``Image,Cells,Cells``), a column
    of that name in several objects is called ``Cells_AreaShape_Area``; ``headers`` has the header
    lines as they are written. ``notes`` says what a user should know, for example that the file
    was read as Latin-1.
    """

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    encoding: str
    notes: tuple[str, ...] = ()
    headers: tuple[tuple[str, ...], ...] = ()
    header_lines: int = 1
    repeated: frozenset[str] = field(default_factory=frozenset)

    def rows(self) -> Generator[TableRow | Refusal, None, None]:
        """Yield every data row, or why it is none; blank lines are not rows."""
        with opened(self.path, self.encoding, self.header_lines) as text:
            yield from RowSplitter(self, text, self.header_lines).rows()

    def batches(
        self, positions: Sequence[int], numbers: Collection[int] = ()
    ) -> Iterator[TableBatch]:
        """Yield the columns at ``positions``, some MB of the file at a time, as Arrow texts.

        Those of ``numbers`` are float64 instead, missing ones null, until one of their values is
        no number: from there on they are texts, too.
        """
        numeric = set(numbers)
        line, left = self.header_lines, ""
        with opened(self.path, self.encoding, self.header_lines) as text:
            while block := left + text.read(BLOCK) + text.readline():
                left = ""
                columns = _arrow_columns(self, block, positions, numeric)
                if columns is not None:
                    end = line + len(columns[0])
                    yield TableBatch(columns, range(line + 1, end + 1), [])
                    line = end
                    continue
                here = list(io.StringIO(block, newline=""))
                splitter = RowSplitter(self, chain(here, text), line)
                yield splitter.batch(positions, line + len(here))
                line, left = splitter.line, "".join(splitter.returned)

    def records(
        self, columns: Iterable[str], make: Callable[[dict[str, str]], T]
    ) -> Iterator[tuple[int, T] | Refusal]:
        """Yield the line of each row and what ``make`` makes of it, or why it is refused.

        ``make`` gets the known values by column, of those ``columns`` that are there.
        """
        positions = {name: at for name in columns if (at := self.position(name)) is not None}
        for row in self.rows():
            if isinstance(row, Refusal):
                yield row
                continue
            cells = ((name, known_text(name, row.cells[at])) for name, at in positions.items())
            try:
                made = make({name: text for name, text in cells if text is not None})
            except RowRefusedError as refused:
                yield Refusal(row.line, *refused.args)
                continue
            yield row.line, made

    def position(self, column: str) -> int | None:
        """Return the index of a column in ``TableRow.cells``, or None where it is absent."""
        if column in self.repeated:
            raise BadTableError(
                f"{self.path.name} has the column {column!r} more than once. "
                "Remove or rename the ones that are not meant."
            )
        return self.columns.index(column) if column in self.columns else None

    def require(self, *columns: str) -> None:
        """Check that the columns are there, each once."""
        absent = [column for column in columns if self.position(column) is None]
        if absent:
            raise BadTableError(
                f"{self.path.name} has no column {' or '.join(map(repr, absent))}. "
                f"{nearest_columns(absent, self.columns)}"
            )

    def with_repeated(self) -> Self:
        """Return the table with its repeated columns named in ``repeated`` and in a note."""
        counts = Counter(self.columns).items()
        repeated = frozenset(name for name, count in counts if name and count > 1)
        if not repeated:
            return self
        names = ", ".join(map(repr, sorted(repeated)[:5]))
        note = f"columns that occur more than once, not used: {names}"
        return replace(self, repeated=repeated, notes=(*self.notes, note))


@dataclass(frozen=True, slots=True)
class CellTable(TextTable):
    """A table whose rows are in memory: of a spreadsheet, or made of a grid."""

    cells: tuple[TableRow, ...] = ()

    def rows(self) -> Generator[TableRow | Refusal, None, None]:
        """Yield every data row."""
        yield from self.cells


@dataclass
class RowSplitter:
    """Splits the lines of a table into rows; each line that is not blank is accounted for.

    ``lines`` are the lines with their ends, after ``line`` others that were read before. ``line``
    becomes the number of lines that are done; ``returned`` are lines that were looked at beyond.
    """

    table: TextTable
    lines: Iterator[str]
    line: int
    returned: deque[str] = field(default_factory=deque)

    def rows(self) -> Iterator[TableRow | Refusal]:
        """Yield each data row, or why it is none; blank lines are not rows."""
        written = self.table.headers or (self.table.columns,)
        headers = [tuple(name.strip() for name in header) for header in written]
        names = {name for header in headers for name in header if name}
        names |= {_BOM + header[0] for header in written}
        delimiter, width = self.table.delimiter, len(headers[-1])
        lines, returned = self.lines, self.returned
        while text := returned.popleft() if returned else next(lines, ""):
            self.line = line = self.line + 1
            if "\0" in text:
                detail = f"line {line} has a NUL byte: the file is damaged"
                yield Refusal(line, "not text", detail)
                continue
            if '"' not in text:
                cells = text.split(delimiter)
                cells[-1] = cells[-1].rstrip(_END)
            else:
                taken = [text]
                quoted = self._quoted_cells(taken, width)
                if quoted is None:
                    after = [more for more in taken[1:] if more]
                    returned.extendleft(reversed(after))
                    end = line + len(after)
                    detail = f"line {line}: a quote is not closed before the end of the file"
                    if after:
                        detail = (
                            f"a quote opened on line {line} does not close well in lines {line} "
                            f"to {end}; lines {line + 1} to {end} were read without it"
                        )
                    yield Refusal(line, "quote left open", detail)
                    continue
                self.line += len(taken) - 1
                cells, text = quoted, taken[-1]
            if len(cells) != width:
                if text.strip(_END):
                    cut = "" if text[-1] in _END else "; the file ends inside of this row"
                    detail = f"line {line}: {len(cells)} cells, not {width}{cut}"
                    yield Refusal(line, "wrong number of cells", detail)
                continue
            if cells[0].strip() in names:
                found = tuple(cell.strip().removeprefix(_BOM) for cell in cells)
                if found in headers:
                    detail = f"line {line} is the header of line 1 again"
                    yield Refusal(line, "header repeated", detail)
                    continue
                if sorted(found) in map(sorted, headers):
                    raise BadTableError(
                        f"Line {line} is a header with its columns in another order. "
                        "Two tables were put together: ingest them one by one."
                    )
            if len(text) > 2 or text.strip(_END):  # of one column, a blank line has the width
                yield _new(TableRow, (line, cells))

    def batch(self, positions: Sequence[int], last: int) -> TableBatch:
        """Return the rows that start on the lines up to ``last``."""
        import pyarrow as pa

        rows: list[TableRow] = []
        refused: list[Refusal] = []
        for item in self.rows():
            if isinstance(item, Refusal):
                refused.append(item)
            else:
                rows.append(item)
            if self.line >= last:
                break
        columns = [pa.array([row.cells[at] for row in rows], pa.string()) for at in positions]
        return TableBatch(columns, [row.line for row in rows], refused)

    def _quoted_cells(self, taken: list[str], width: int) -> list[str] | None:
        """Return the cells of the row that starts with ``taken``, to which its lines are added.

        None: the quote was left open. One line is split as leniently as spreadsheets do it; what
        spans lines has to be quoted properly and to have ``width`` cells, because a stray quote
        would else swallow the rows up to the next one.
        """
        delimiter, returned = self.table.delimiter, self.returned

        def take() -> Iterator[str]:
            yield taken[0]
            while len(taken) <= QUOTED_LINES and taken[-1]:
                taken.append(returned.popleft() if returned else next(self.lines, ""))
                yield taken[-1]

        try:
            cells = next(csv.reader(take(), delimiter=delimiter))
            if len(taken) == 1:
                return cells
            cells = next(csv.reader(taken, delimiter=delimiter, strict=True))
        except csv.Error:
            return None
        # A line inside of the cell that looks like a row by itself is one, or it is damaged.
        inside = (text for text in taken[1:-1] if '"' not in text)
        rows = width > 2 and any(text.count(delimiter) == width - 1 for text in inside)
        swallows = rows or any("\0" in text for text in taken)
        return None if swallows or len(cells) != width else cells


def _arrow_columns(
    table: TextTable, block: str, positions: Sequence[int], numbers: set[int]
) -> list[pa.Array] | None:
    """Read the columns of ``block`` with pyarrow; None where a line of it is not just one row.

    ``numbers`` are read as such, and emptied where one of them is none.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    # The header again, or a part of another file: these are for the splitter.
    first = {name for header in table.headers for name in (header[0], header[0].strip())}
    starts = [start for name in first if name for start in (name, f'"{name}"')]
    if (
        len(table.columns) < 2
        or "\0" in block
        or _BOM in block
        or ("\r" in block and block.count("\r") != block.count("\r\n"))
        or any(block.startswith(name) or f"\n{name}" in block for name in starts)
    ):
        return None
    last = block[block.rfind("\n", 0, len(block) - 2) + 1 :]
    if '"' in last:  # it may be open, and go on in the next block
        try:
            next(csv.reader([last], delimiter=table.delimiter, strict=True))
        except csv.Error:
            return None
    data = pa.py_buffer(block.encode())
    names = [str(at) for at in range(len(table.columns))]
    types = {str(at): pa.float64() if at in numbers else pa.string() for at in positions}
    try:
        found = arrow_csv.read_csv(
            data,
            arrow_csv.ReadOptions(column_names=names, use_threads=False, block_size=data.size + 1),
            arrow_csv.ParseOptions(delimiter=table.delimiter),
            arrow_csv.ConvertOptions(
                column_types=types,
                null_values=list(MISSING_NUMBERS),
                strings_can_be_null=False,
                include_columns=[str(at) for at in positions],
            ),
        )
    except pa.ArrowInvalid:
        if not numbers:
            return None
        numbers.clear()
        return _arrow_columns(table, block, positions, numbers)
    # Counting bytes is several times as fast as counting letters.
    lines = np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    if found.num_rows != lines + (not block.endswith("\n")):
        return None
    return [column.chunk(0) for column in found.columns]


def open_table(
    path: Path, *, empty: bool = False, whole: bool = True, sheet: str | None = None
) -> TextTable:
    """Look at a table: its encoding, delimiter and columns; of a spreadsheet, one sheet.

    That is the ``sheet`` named, or the first.
    UTF-8 (with or without BOM) is tried on the whole file; only if that fails is it Latin-1.
    A repeated column is noted, and an error only when it is asked for. ``empty``: a table without
    rows, and a file without content (no columns), are no errors. ``whole=False``: only the header
    is read, to tell what the table is; then letters beyond ASCII may be wrong.

    Raises:
        BadTableError: the file is empty, has a header only, or is no text.
        UserInputError: there is no such file, or it may not be read.
    """
    if first_bytes(path) in SPREADSHEETS:
        return _open_sheet(path, sheet, empty)
    if not whole and first_bytes(path) == PARQUET:
        import pyarrow.parquet as pq

        with readable(path):
            return TextTable(path, tuple(pq.read_schema(path).names), ",", "utf-8")
    encoding, notes = _encoding(path, whole=whole, empty=empty)
    if encoding is None:
        return TextTable(path, (), ",", "utf-8-sig")
    with opened(path, encoding) as text:
        longest = -1 if whole else _CHUNK
        lines = [text.readline(longest) for _ in range(_HEADER_LINES)]
        if not lines[0].strip():
            raise BadTableError("The first line is blank. The column names must be on line 1.")
        parsed = {mark: _first_row(lines, mark) for mark in _DELIMITERS}
        delimiter = max(_DELIMITERS, key=lambda mark: len(parsed[mark][0]))
        written, end = parsed[delimiter]
        second, more = _first_row(lines[end:], delimiter)
    columns, below = (tuple(name.strip() for name in names) for names in (written, second))
    headers: tuple[tuple[str, ...], ...] = (written,)
    # A line of the objects (again and again) above the line of the columns.
    if (
        len(columns) == len(below)
        and (len(set(columns)) < len(columns) or "ImageNumber" in below)
        and any(name.startswith(_COLUMN_SIGNS) for name in below)
        and not any(name.startswith(_COLUMN_SIGNS) for name in columns)
    ):
        counts = Counter(below)
        columns = tuple(
            f"{item}_{name}" if counts[name] > 1 else name
            for item, name in zip(columns, below, strict=True)
        )
        headers, end = (written, second), end + more
        notes += ("two header lines: the first names the object of each column",)
    table = TextTable(path, columns, delimiter, encoding, notes, headers, end).with_repeated()
    if whole and not empty:
        with closing(table.rows()) as rows:
            if next(rows, None) is None:
                raise BadTableError(
                    f"{path} has a header but no rows. Export it again with its data."
                )
    return table


def _encoding(
    path: Path, *, whole: bool, empty: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """Return the encoding of a text, by all or by the first piece of it, and a note if it is odd.

    None: it is ``empty``, which is allowed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    notes: tuple[str, ...] = ()
    endless = 0
    with opened(path) as stream:
        chunk = stream.read(_CHUNK)
        head = chunk.removeprefix(codecs.BOM_UTF8)
        if empty and not head.strip():
            return None, ()
        if not head:
            raise BadTableError(f"{path} is empty. Export it again, or give another file.")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadTableError(f"{path} is UTF-16. Save it as 'CSV UTF-8' and try again.")
        if b"\0" in head[:4096]:
            raise BadTableError(
                f"{path} is not a text table. Give .csv, .tsv, .txt, .xlsx, .xls or .ods."
            )
        while chunk:
            endless = 0 if b"\n" in chunk or b"\r" in chunk else endless + 1
            if endless >= _LONGEST_LINE:  # it would have to be held in memory as one line
                raise BadTableError(f"{path} has a line of more than 16 MiB. Give a table of rows.")
            following = stream.read(_CHUNK) if whole else b""
            if not notes:
                try:
                    decoder.decode(chunk, whole and not following)
                except UnicodeDecodeError:
                    notes = ("not valid UTF-8, so read as Latin-1: check letters like µ and é",)
            chunk = following
    return "latin-1" if notes else "utf-8-sig", notes


# ---- Spreadsheets, and text as rows of cells ----


def first_bytes(path: Path) -> bytes:
    """Return how a file begins, for example ``PARQUET``; nothing where it cannot be read."""
    try:
        with plain_file(path).open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


_CELL = re.compile(rb'[ <]r="([A-Z]{1,3})([0-9]{1,7})"')
"""Where a cell of .xlsx says that it is."""
_MOST_CELLS = 20_000_000
_LARGEST_PART = 1 << 30
_ERROR_CELLS = (
    (re.compile(rb' t="e"'), b' t="str"'),
    (re.compile(rb' office:string-value="[^"]*"(?=[^>]* calcext:value-type="error")'), b""),
)
"""What makes a cell of .xlsx or .ods an error, and what makes a text of it."""
_XLS_ERROR = re.compile(
    rb"(?:\x05\x02\x08\0(.{4})..[\0\x07\x0f\x17\x1d\x24\x2a]\x01"
    rb"|\x06\0..(.{4})..\x02.[\0\x07\x0f\x17\x1d\x24\x2a]...\xff\xff)",
    re.DOTALL,
)
"""A cell of .xls with an error, as a value or of a formula; the group is its row and column."""


def _with_errors(path: Path) -> Path | io.BytesIO:
    """Return a workbook whose errors are texts like ``#N/A``: calamine leaves these cells blank.

    It is refused where it does not fit into memory, which is read from A1 to the last cell.
    """
    import zipfile

    has_errors = False
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.file_size > _LARGEST_PART:
                    raise BadTableError(f"{path} is larger than 1 GB. Save the table as CSV.")
                if not part.filename.startswith(("xl/worksheets/", "content.xml")):
                    continue
                rows = columns = 1
                with archive.open(part) as stream:
                    rest = b""
                    while chunk := stream.read(_CHUNK):
                        chunk = rest + chunk
                        for letters, row in _CELL.findall(chunk):
                            column = 0
                            for letter in letters:
                                column = column * 26 + letter - 64
                            rows, columns = max(rows, int(row)), max(columns, column)
                        has_errors |= any(mark in chunk for mark in (b' t="e"', b'type="error"'))
                        rest = chunk[-20:]
                if rows * columns > _MOST_CELLS:
                    raise BadTableError(
                        f"{path} has a sheet of {rows:,} rows and {columns:,} columns, which is "
                        "too large. Delete what lies far from the table, or save it as CSV."
                    )
            if not has_errors:
                return path
            copy = io.BytesIO()
            with zipfile.ZipFile(copy, "w") as changed:
                for part in archive.infolist():
                    data = archive.read(part)
                    if part.filename.startswith(("xl/worksheets/", "content.xml")):
                        for error, text in _ERROR_CELLS:
                            data = error.sub(text, data)
                    changed.writestr(part, data)
            copy.seek(0)
            return copy
    except zipfile.BadZipFile:  # .xls, or damaged: the reader says it
        if found := _XLS_ERROR.search(path.read_bytes()):
            row, column = (
                int.from_bytes((found[1] or found[2])[at : at + 2], "little") for at in (0, 2)
            )
            raise BadTableError(
                f"{path} has an error of Excel in row {row + 1}, column {column + 1} of a sheet. "
                "Correct it, or save the file as .xlsx."
            ) from None
    except (zlib.error, EOFError, OSError, NotImplementedError, RuntimeError):
        pass  # damaged: the reader says it
    return path


@contextmanager
def _workbook(path: Path) -> Iterator[Any]:
    import python_calamine

    try:
        with python_calamine.load_workbook(_with_errors(path)) as book:
            yield book
    except (python_calamine.CalamineError, OSError) as error:
        raise BadTableError(
            f"{path} cannot be read as .xlsx, .xls or .ods. If it has a password, remove it; else "
            "save it again, or as CSV."
        ) from error


def sheet_names(path: Path) -> list[str]:
    """Return the names of the sheets of a spreadsheet."""
    with _workbook(path) as book:
        return list(book.sheet_names)


def read_sheet(path: Path, name: str) -> list[TableRow]:
    """Return the rows of a sheet that are not blank, as texts; merged cells all have their value.

    Whole numbers are written without a point, dates as 2026-03-12, errors as #N/A.
    """
    with _workbook(path) as book:
        sheet = book.get_sheet_by_name(name)
        found = sheet.to_python(skip_empty_area=False, nrows=_SHEET_ROWS)
        for (top, left), (bottom, right) in sheet.merged_cell_ranges or ():
            for row in range(top, min(bottom + 1, len(found))):
                for column in range(left, min(right + 1, len(found[row]))):
                    found[row][column] = found[top][left]
    rows = (TableRow(at, tuple(map(_sheet_text, cells))) for at, cells in enumerate(found, 1))
    return [row for row in rows if any(map(str.strip, row.cells))]


def _sheet_text(value: Any) -> str:
    if isinstance(value, datetime):
        return str(value).removesuffix(" 00:00:00")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def _open_sheet(path: Path, name: str | None, empty: bool) -> CellTable:
    names = [name] if name is not None else sheet_names(path)
    rows = read_sheet(path, names[0]) if names else []
    if not rows and not empty:
        raise BadTableError(f"The sheet {names[0]!r} of {path} is empty. Choose another: --sheet.")
    columns = tuple(cell.strip() for cell in rows[0].cells) if rows else ()
    if len(rows) < 2 and not empty:
        raise BadTableError(f"{path} has a header but no rows. Export it again with its data.")
    return CellTable(path, columns, ",", "", cells=tuple(rows[1:])).with_repeated()


def text_cells(path: Path) -> CellTable:
    """Split the first lines of a text table into cells; titles may be above its header.

    The delimiter is what most lines have; of two that all lines have, tab goes before semicolon
    and that before comma, which may be a decimal comma. No line is taken for the header.
    """
    encoding, notes = _encoding(path, whole=False)
    with opened(path, encoding) as text:
        lines = list(islice(text, _CELL_LINES))
        some = [line for line in lines[:200] if line.strip()]
        delimiter = max("\t;,", key=lambda mark: sum(mark in line for line in some))
        reader = csv.reader(lines, delimiter=delimiter)
        rows = [TableRow(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    return CellTable(path, (), delimiter, encoding or "", notes, cells=tuple(rows))


def plain_name(column: str) -> str:
    """Return the name of a column without ``Metadata_``, case, spaces and underscores."""
    return column.removeprefix("Metadata_").replace("_", "").replace(" ", "").casefold()


def known_text(column: str, text: str) -> str | None:
    """Return the stripped value of a column, or None where it is missing: a word of ``MISSING``.

    'Null' is a genotype, and 'none' is how our exports write the kind of an untreated well.
    """
    text = text.strip()
    is_value = (text == "Null" and column.lower().endswith("genotype")) or (
        text == "none" and column == "Metadata_pert_type"
    )
    return None if text in MISSING and not is_value else text


def first_text(texts: Mapping[str, str], columns: Iterable[str]) -> str | None:
    """Return the first of the columns that has a value."""
    return next((texts[column] for column in columns if column in texts), None)


def nearest_columns(absent: Sequence[str], present: Sequence[str]) -> str:
    """Return a sentence with the present columns that look most like the absent ones."""
    lower = {name.lower(): name for name in present if name}
    near = [
        lower[match]
        for name in absent
        for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    ]
    if near:
        return f"The nearest are {', '.join(map(repr, dict.fromkeys(near)))}: rename them if meant."
    return f"Its columns are {some_of([repr(name) for name in present if name], 8)}."


def _first_row(lines: Sequence[str], delimiter: str) -> tuple[tuple[str, ...], int]:
    """Return the cells of the first row of ``lines`` and on how many lines it is."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        cells, end = next(reader, []), reader.line_num
    except csv.Error:
        cells, end = next(csv.reader(lines[:1], delimiter=delimiter), []), 1
    return tuple(cells), end


@contextmanager
def opened(path: Path, encoding: str | None = None, header_lines: int = 0) -> Iterator[Any]:
    """Open a file, gzip and Parquet too: its bytes, or with ``encoding`` its text below the header.

    What can go wrong while it is read is turned into one sentence.
    """
    with readable(path):
        head = first_bytes(path)
        with (
            gzip.open(path)
            if head.startswith(_GZIP_MAGIC)
            else _parquet_as_csv(path)
            if head == PARQUET
            else path.open("rb", buffering=0)
        ) as stream:
            if encoding is None:
                yield stream
                return
            # A mark of UTF-8 before Latin-1 is no part of the first column.
            mark = codecs.BOM_UTF8
            if encoding == "latin-1" and stream.read(len(mark)) != mark:
                stream.seek(0)
            text = io.TextIOWrapper(
                io.BufferedReader(stream, _CHUNK), encoding, errors="replace", newline=""
            )
            for _ in range(header_lines):
                text.readline()
            yield text


@contextmanager
def _parquet_as_csv(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq
    from pyarrow import csv as arrow_csv

    with pq.ParquetFile(path) as file, TemporaryFile(buffering=0) as target:
        with arrow_csv.CSVWriter(target, file.schema_arrow) as writer:
            for batch in file.iter_batches(max(1, _CHUNK // max(1, len(file.schema_arrow)))):
                writer.write_batch(batch)
        target.seek(0)
        yield target


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what can go wrong while a file is read into one sentence."""
    try:
        plain_file(path)
        yield
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file {path}. Check the path.") from error
    except IsADirectoryError as error:
        raise UserInputError(f"{path} is a folder. Give the table inside it.") from error
    except PermissionError as error:
        raise UserInputError(f"{path} may not be read. Change its permissions.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadTableError(f"{path} is a damaged gzip file. Copy or export it again.") from error
    except csv.Error as error:
        raise BadTableError(
            f"{path} cannot be split into cells ({error}). A quote is probably left open."
        ) from error
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error
        if not isinstance(error, OSError) and type(error).__module__ != "pyarrow.lib":
            raise
        raise BadTableError(  # what Arrow raises, sometimes as an OSError without a number
            f"{path} is damaged, or has values that are neither text nor numbers "
            f"({first_line(error)}). Export it again."
        ) from error


_FORMULA = "^[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]"
"""What a spreadsheet takes for the beginning of a formula; the last four are full-width signs."""

Rows = TypeVar("Rows", bound="pa.Table | pa.RecordBatch")


def disarmed(rows: Rows) -> Rows:
    """Return a table or batch with a ' before every text, and name, that begins a formula."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, column in enumerate(rows.schema):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            texts = pc.replace_substring_regex(rows.column(index), f"({_FORMULA})", r"'\1")
            rows = rows.set_column(index, column, texts)
    renamed: Rows = rows.rename_columns([disarmed_name(name) for name in rows.schema.names])
    return renamed


def disarmed_name(name: str) -> str:
    """Return a text, for example the name of a column, as :func:`disarmed` has it."""
    return re.sub(f"({_FORMULA})", r"'\1", name)


class _Parts(io.RawIOBase):
    """A file that keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._written, self._taken = bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += data
        return len(data)

    def tell(self) -> int:
        return self._taken + len(self._written)

    def take(self) -> bytes:
        found = bytes(self._written)
        self._taken += len(found)
        self._written.clear()
        return found


def csv_parts(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], *, for_spreadsheet: bool = False
) -> Iterator[bytes]:
    """Yield the bytes of a CSV file with the rows of ``batches``, piece by piece.

    Lists, records and bytes are JSON texts: CSV knows no such values. ``for_spreadsheet``: texts
    that a spreadsheet would run are :func:`disarmed`.
    """
    import pyarrow as pa
    import pyarrow.csv

    def shaped(batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = [_flat(column) for column in batch.columns]
        flat = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        return disarmed(flat) if for_spreadsheet else flat

    header = pa.RecordBatch.from_pylist([], schema)
    for number, batch in enumerate(chain([header], batches)):
        part = pa.BufferOutputStream()
        options = pyarrow.csv.WriteOptions(include_header=number == 0)
        pyarrow.csv.write_csv(shaped(batch), part, options)
        yield part.getvalue().to_pybytes()


def _flat(column: pa.Array) -> pa.Array:
    import pyarrow as pa

    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if number or pa.types.is_string(kind) or pa.types.is_decimal(kind):
        return column
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column
    values = [json_value(value) for value in column.to_pylist()]
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
    return pa.array(texts, pa.string())


def parquet_parts(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """Yield the bytes of a Parquet file with the rows of ``batches``, a row group of each.

    Raises:
        UserInputError: Parquet has no such type.
    """
    import pyarrow as pa
    import pyarrow.parquet

    parts = _Parts()
    try:
        with pyarrow.parquet.ParquetWriter(parts, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                yield parts.take()
        yield parts.take()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserInputError(
            f"Parquet cannot hold this answer: {first_line(error)}. Cast the column to text, or "
            "take another format."
        ) from error
