"""Texts that a spreadsheet would run as formulas, made harmless."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import re
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BadTableError, UserInputError
from .records import Refusal

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


_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_DELIMITERS = "\t,;"
_MISSING = frozenset({"", "NA", "N/A", "#N/A", "NaN", "nan", "<NA>"})
_HEADER_LINES = 5
_COLUMN_SIGNS = ("ImageNumber", "ObjectNumber", "Metadata_", "FileName_", "AreaShape_")


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table that has been looked at but not read; ``rows()`` streams it as often as wanted.

    Where a first header line names the object of each column (``Image,Cells,Cells``), a column
    of that name in several objects is called ``Cells_AreaShape_Area``. ``notes`` says what a user
    should know, for example that the file was read as Latin-1.
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
        """Yield every data row, or why it is none; blank lines are not rows.

        Raises:
            BadTableError: the file ends in the middle of its compression, or is two tables.
            UserInputError: the file has become unreadable.
        """
        with _reading(self.path), _open_text(self.path, self.encoding) as text:
            for _ in range(self.header_lines):
                text.readline()
            headers = self.headers or (self.columns,)
            yield from RowSplitter(text, self.delimiter, headers, self.header_lines).rows()

    def position(self, column: str) -> int | None:
        """Return the place of a column in ``TableRow.cells``, or None where it is absent.

        Raises:
            BadTableError: there are several columns of that name.
        """
        if column in self.repeated:
            raise BadTableError(
                f"{self.path.name} has the column {column!r} more than once. "
                "Remove or rename the ones that are not meant."
            )
        return self.columns.index(column) if column in self.columns else None

    def require(self, *columns: str) -> None:
        """Check that the columns are there, each once.

        Raises:
            BadTableError: some are not; the message names them and the nearest present ones.
        """
        absent = [column for column in columns if self.position(column) is None]
        if absent:
            raise BadTableError(
                f"{self.path.name} has no column {' or '.join(map(repr, absent))}. "
                f"{nearest_columns(absent, self.columns)}"
            )


def open_table(path: Path) -> TextTable:
    """Look at a text table: its encoding, delimiter and columns.

    UTF-8 (with or without BOM) is tried on the whole file; only if that fails is it Latin-1.
    A repeated column is noted, and an error only when it is asked for.

    Raises:
        BadTableError: the file is empty, has a header only, or is no text.
        UserInputError: there is no such file, or it may not be read.
    """
    with _reading(path):
        encoding = _encoding(path)
        with _open_text(path, encoding) as text:
            header = _header(text)
    notes = (*_encoding_notes(encoding), *header.notes())
    table = TextTable(
        path,
        header.columns,
        header.delimiter,
        encoding,
        notes,
        header.names,
        header.lines,
        header.repeated,
    )
    _check_has_rows(table)
    return table


def read_columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a text table from its first lines only, to tell what it is.

    Raises:
        BadTableError: the file is empty or is no text.
        UserInputError: there is no such file, or it may not be read.
    """
    with _reading(path):
        with _open(path) as stream:
            head = stream.read(_CHUNK)
        _check_text(path, head)
        text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
        return _header(io.StringIO(text, newline="")).columns


def cell_text(cells: Sequence[str], position: int | None) -> str | None:
    """Return the stripped cell; None where there is no such column or the value is missing.

    Missing is '', NA, N/A, #N/A, NaN, nan or <NA> as the whole cell; 'NAD' is a value.
    """
    if position is None:
        return None
    text = cells[position].strip()
    return None if text in _MISSING else text


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
    shown = ", ".join(map(repr, [name for name in present if name][:8]))
    return f"Its columns are {shown}{', ...' if len(present) > 8 else ''}."


@dataclass(frozen=True, slots=True)
class _Header:
    """The columns, and the header lines as they are written: ``lines`` lines of the file."""

    columns: tuple[str, ...]
    delimiter: str
    names: tuple[tuple[str, ...], ...]
    lines: int

    @property
    def repeated(self) -> frozenset[str]:
        counts = Counter(self.columns)
        return frozenset(name for name, count in counts.items() if name and count > 1)

    def notes(self) -> Iterator[str]:
        if len(self.names) > 1:
            yield "two header lines: the first was taken for the objects of the columns"
        if self.repeated:
            names = ", ".join(map(repr, sorted(self.repeated)[:5]))
            yield f"columns that are there more than once, and not used: {names}"


def _header(text: io.TextIOBase) -> _Header:
    lines = [text.readline() for _ in range(_HEADER_LINES)]
    if not lines[0].strip():
        raise BadTableError("The first line is blank. The column names must be on line 1.")
    parsed = {mark: _names(lines, mark) for mark in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda mark: len(parsed[mark][0]))
    written, end = parsed[delimiter]
    second, more = _names(lines[end:], delimiter)
    names, below = _stripped(written), _stripped(second)
    if _names_objects(names, below):
        return _Header(_object_columns(names, below), delimiter, (written, second), end + more)
    return _Header(names, delimiter, (written,), end)


def _names(lines: Sequence[str], delimiter: str) -> tuple[tuple[str, ...], int]:
    """Return the cells of the first row of ``lines`` and on how many lines it is."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        cells, end = next(reader, []), reader.line_num
    except csv.Error:
        cells, end = next(csv.reader(lines[:1], delimiter=delimiter), []), 1
    return tuple(cells), end


def _stripped(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip() for name in names)


def _names_objects(first: Sequence[str], second: Sequence[str]) -> bool:
    """Tell whether the first line holds objects (repeated), the second the columns of each."""
    return (
        len(first) == len(second)
        and len(set(first)) < len(first)
        and any(name.startswith(_COLUMN_SIGNS) for name in second)
        and not any(name.startswith(_COLUMN_SIGNS) for name in first)
    )


def _object_columns(objects: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(names)
    return tuple(
        f"{item}_{name}" if counts[name] > 1 else name
        for item, name in zip(objects, names, strict=True)
    )


def _check_has_rows(table: TextTable) -> None:
    with closing(table.rows()) as rows:
        if next(rows, None) is None:
            raise BadTableError(
                f"{table.path} has a header but no rows. Export it again with its data."
            )


def _encoding_notes(encoding: str) -> tuple[str, ...]:
    if encoding != "latin-1":
        return ()
    return ("not valid UTF-8, so read as Latin-1: check letters like µ and é",)


def _encoding(path: Path) -> str:
    """Return the encoding of the (unpacked) file, read to its end."""
    decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as stream:
        chunk = stream.read(_CHUNK)
        _check_text(path, chunk)
        while chunk:
            _check_line_ends(path, chunk)
            decoder = _feed(decoder, chunk)
            chunk = stream.read(_CHUNK)
    if decoder is not None:
        decoder = _feed(decoder, b"", final=True)
    return "latin-1" if decoder is None else "utf-8-sig"


def _feed(
    decoder: codecs.IncrementalDecoder | None, chunk: bytes, final: bool = False
) -> codecs.IncrementalDecoder | None:
    if decoder is None:
        return None
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError:
        return None
    return decoder


def _check_text(path: Path, head: bytes) -> None:
    if not head.removeprefix(codecs.BOM_UTF8):
        raise BadTableError(f"{path} is empty. Export it again, or give another file.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadTableError(f"{path} is UTF-16. Save it as 'CSV UTF-8' and try again.")
    if b"\0" in head[:4096]:
        raise BadTableError(f"{path} is not a text table. Give a CSV or tab-separated file.")


def _check_line_ends(path: Path, chunk: bytes) -> None:
    """Refuse what would have to be held in memory as one endless line."""
    if len(chunk) == _CHUNK and b"\n" not in chunk and b"\r" not in chunk:
        raise BadTableError(f"{path} has a line of more than 1 MiB. Give a table of rows.")


def _open(path: Path) -> io.RawIOBase:
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP_MAGIC
    return cast("io.RawIOBase", gzip.open(path) if packed else path.open("rb", buffering=0))


def _open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    stream = _open(path)
    if encoding == "latin-1":
        _skip_bom(stream)
    return io.TextIOWrapper(_Chunks(stream), encoding, newline="")


class _Chunks(io.BufferedReader):
    """Hands out more at a time than the 8 KiB that a text reader asks for: a third faster."""

    def read1(self, size: int = -1) -> bytes:
        return super().read1(max(size, _CHUNK // 4))


def _skip_bom(stream: io.RawIOBase) -> None:
    if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        stream.seek(0)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong while reading ``path`` into one sentence."""
    try:
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
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}).") from error


_FORMULA = "^[=+\\-@\t\r]"
"""What a spreadsheet takes for the beginning of a formula."""

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def disarmed(rows: Rows) -> Rows:
    """Return a table or batch with a ' before every text, and name, that begins a formula."""
    for index, column in enumerate(rows.schema):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            texts = pc.replace_substring_regex(rows.column(index), f"({_FORMULA})", r"'\1")
            rows = rows.set_column(index, column, texts)
    return rows.rename_columns([disarmed_name(name) for name in rows.schema.names])


def disarmed_name(name: str) -> str:
    """Return a text, for example the name of a column, as :func:`disarmed` has it."""
    return re.sub(f"({_FORMULA})", r"'\1", name)
