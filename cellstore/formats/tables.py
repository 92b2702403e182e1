"""Text tables as laboratories have them: comma, tab or semicolon, BOM, CRLF, gzip, Latin-1."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import BadTableError, UserInputError
from .records import Refusal

_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_DELIMITERS = "\t,;"
_MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "<NA>"})


@dataclass(frozen=True, slots=True)
class TableRow:
    """The cells of one data row and the line of the file (header = 1) where it starts."""

    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table that has been looked at but not read; ``rows()`` streams it as often as wanted.

    ``notes`` says what a user should know, for example that the file was read as Latin-1.
    """

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    encoding: str
    notes: tuple[str, ...] = ()

    def rows(self) -> Generator[TableRow | Refusal, None, None]:
        """Yield every data row, or why it is none; blank lines are not rows.

        Raises:
            BadTableError: the file ends in the middle of its compression, or a cell never ends.
            UserInputError: the file has become unreadable.
        """
        with _reading(self.path), _open_text(self.path, self.encoding) as text:
            yield from self._parse(text)

    def _parse(self, text: io.TextIOWrapper) -> Iterator[TableRow | Refusal]:
        reader = csv.reader(text, delimiter=self.delimiter)
        next(reader)
        end = reader.line_num
        for cells in reader:
            start, end = end + 1, reader.line_num
            if len(cells) == len(self.columns):
                yield TableRow(start, tuple(cells))
            elif cells:
                yield _odd_row(start, end, len(cells), len(self.columns))

    def position(self, column: str) -> int | None:
        """Return the place of a column in ``TableRow.cells``, or None where it is absent."""
        return self.columns.index(column) if column in self.columns else None

    def require(self, *columns: str) -> None:
        """Check that the columns are there.

        Raises:
            BadTableError: some are not; the message names them and the nearest present ones.
        """
        absent = [column for column in columns if column not in self.columns]
        if absent:
            raise BadTableError(
                f"{self.path.name} has no column {' or '.join(map(repr, absent))}. "
                f"{nearest_columns(absent, self.columns)}"
            )


def open_table(path: Path) -> TextTable:
    """Look at a text table: its encoding, delimiter and columns.

    UTF-8 (with or without BOM) is tried on the whole file; only if that fails is it Latin-1.

    Raises:
        BadTableError: the file is empty, has a header only, repeats a column, or is no text.
        UserInputError: there is no such file, or it may not be read.
    """
    with _reading(path):
        encoding, size = _encoding(path)
        if size == 0:
            raise BadTableError(f"{path} is empty. Export it again, or give another file.")
        with _open_text(path, encoding) as text:
            header, delimiter = _header(text)
    table = TextTable(path, _clean_header(path, header), delimiter, encoding, _notes(encoding))
    _check_has_rows(table)
    return table


def cell_text(cells: Sequence[str], position: int | None) -> str | None:
    """Return the stripped cell; None where there is no such column or the value is missing.

    Missing is '', NA, N/A, NaN, nan or <NA> as the whole cell; 'NAD' is a value.
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


def _header(text: io.TextIOWrapper) -> tuple[list[str], str]:
    first = text.readline()
    if not first.strip():
        raise BadTableError("The first line is blank. The column names must be on line 1.")
    if first.count('"') % 2:
        first += text.readline()
    parsed = {mark: next(csv.reader([first], delimiter=mark)) for mark in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda mark: len(parsed[mark]))
    return parsed[delimiter], delimiter


def _clean_header(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in header)
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        raise BadTableError(
            f"{path.name} has the column {', '.join(map(repr, repeated))} more than once. "
            "Remove or rename the ones that are not meant."
        )
    return columns


def _check_has_rows(table: TextTable) -> None:
    with closing(table.rows()) as rows:
        if next(rows, None) is None:
            raise BadTableError(
                f"{table.path} has a header but no rows. Export it again with its data."
            )


def _notes(encoding: str) -> tuple[str, ...]:
    if encoding != "latin-1":
        return ()
    return ("not valid UTF-8, so read as Latin-1: check letters like µ and é",)


def _odd_row(start: int, end: int, found: int, expected: int) -> Refusal:
    lines = f"line {start}" if start == end else f"lines {start} to {end} (a quote left open?)"
    return Refusal(start, "wrong number of cells", f"{lines}: {found} cells, not {expected}")


def _encoding(path: Path) -> tuple[str, int]:
    """Return the encoding and the number of bytes of the (unpacked) file."""
    decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
    size = 0
    with _open(path) as stream:
        while chunk := stream.read(_CHUNK):
            if size == 0:
                _check_text(path, chunk)
            size += len(chunk)
            decoder = _feed(decoder, chunk)
    if decoder is not None:
        decoder = _feed(decoder, b"", final=True)
    return ("latin-1" if decoder is None else "utf-8-sig"), size


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
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadTableError(f"{path} is UTF-16. Save it as 'CSV UTF-8' and try again.")
    if b"\0" in head[:4096]:
        raise BadTableError(f"{path} is not a text table. Give a CSV or tab-separated file.")


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP_MAGIC
    return cast("BinaryIO", gzip.open(path)) if packed else path.open("rb")


def _open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding, newline="")


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
