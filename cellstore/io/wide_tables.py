"""Wide CSV tables of numbers, moved once into a temporary columnar file to be read by row.

A table may be spread over many files with different columns; every row is counted.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc

from ..errors import BadTableError, StorageError, UserInputError, first_line
from .records import Integers, Refusal, batch_rows, without_nan

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 8 << 20
_LONGEST_HEADER = 16 << 20
_NANS = [sign + text for text in ("nan", "NaN", "NAN", "Nan") for sign in ("", "-", "+")]
_MISSING = pa.array(["", *_NANS, "NA", "N/A", "<NA>", "None", "null", "NULL"])
_NUMBER = r"(?i)^\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?)\s*$"


@dataclass(frozen=True)
class CsvHeader:
    """The columns of a CSV file; ``lines`` of header are to be skipped. No columns: 0 bytes."""

    path: Path
    columns: tuple[str, ...]
    lines: int
    delimiter: str = ","
    encoding: str = "utf-8"


@dataclass
class CsvBlock:
    """Some rows of a file as text, and the line of each."""

    batch: pa.RecordBatch
    lines: Integers


def read_header(
    path: Path,
    joined: Callable[[list[str], list[str]], list[str] | None],
    *,
    glance: bool = False,
) -> CsvHeader:
    """Return the columns of a CSV file.

    ``joined`` gets the first two lines and returns the columns, if both are header lines. The
    encoding is that of the whole file; at a ``glance`` only the beginning is looked at.

    Raises:
        BadTableError: it is no text, or a damaged gzip file.
        UserInputError: it cannot be read.
    """
    with reading(path):
        encoding = _encoding(path, glance=glance)
        with (
            _open(path) as stream,
            io.TextIOWrapper(stream, encoding, errors="replace", newline="") as text,
        ):
            head = list(itertools.islice(_lines(text), 2))
    if not head or not head[0].strip():
        return CsvHeader(path, (), 0)
    delimiter = max(",\t;", key=head[0].count)
    first, *rest = ([c.strip() for c in row] for row in csv.reader(head, delimiter=delimiter))
    both = joined(first, rest[0]) if rest else None
    columns = first if both is None else both
    return CsvHeader(path, tuple(columns), 1 if both is None else 2, delimiter, encoding)


def read_blocks(
    header: CsvHeader,
    columns: Sequence[str],
    refuse: Callable[[Refusal], None],
    only: Sequence[str] = (),
    numbers: Collection[str] = (),
) -> Iterator[CsvBlock]:
    """Yield the rows of a file as text, ``columns`` being names for all of its columns.

    ``only``: the columns that are wanted (none: all); ``numbers``: those to be read as float64,
    which is faster, and fails where one of their values is no number. A row with another number of
    cells (cut in the middle) is refused.

    Raises:
        BadTableError: the file is damaged.
        UserInputError: it cannot be read.
    """
    lines = _Lines(header, refuse)
    options = {
        "read_options": pyarrow.csv.ReadOptions(
            column_names=list(columns), skip_rows=header.lines, use_threads=False,
            block_size=_BLOCK, encoding="latin1" if header.encoding == "latin-1" else "utf8",
        ),
        "parse_options": pyarrow.csv.ParseOptions(
            delimiter=header.delimiter, invalid_row_handler=lines.refuse
        ),
        "convert_options": pyarrow.csv.ConvertOptions(
            column_types={n: pa.float64() if n in numbers else pa.string() for n in columns},
            null_values=_MISSING.to_pylist(), strings_can_be_null=False,
            include_columns=list(only),
        ),
    }  # fmt: skip
    with reading(header.path), _open(header.path) as stream:
        if not _skip_to_rows(stream, header):
            return
        stream.seek(0)
        with pyarrow.csv.open_csv(stream, **options) as reader:
            for batch in reader:
                if batch.num_rows:
                    yield CsvBlock(batch, lines.take(batch.num_rows))


class _Lines:
    """Tells the line of each row: rows that were refused are not among those that come."""

    def __init__(self, header: CsvHeader, refuse: Callable[[Refusal], None]) -> None:
        self._expected = len(header.columns)
        self._refuse = refuse
        self._next = header.lines + 1
        self._bad: set[int] = set()

    def refuse(self, row: Any) -> str:
        """Note a row that has not the cells of the header."""
        line = int(row.number)
        self._bad.add(line)
        detail = f"{row.actual_columns} cells, not {self._expected}"
        self._refuse(Refusal(line, "wrong number of cells", detail))
        return "skip"

    def take(self, rows: int) -> Integers:
        """Return the lines of the next ``rows`` rows."""
        found = np.empty(rows, np.int64)
        if not self._bad:
            found[:] = np.arange(self._next, self._next + rows)
            self._next += rows
            return found
        for number in range(rows):
            while self._next in self._bad:
                self._next += 1
            found[number] = self._next
            self._next += 1
        return found


def as_numbers(texts: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Return texts as float64, missing ones null, and a mask of those that are no number.

    Numbers stay what they are.
    """
    if pa.types.is_floating(texts.type):
        return texts, None
    missing = pc.is_in(texts, value_set=_MISSING)
    plain = pc.if_else(missing, pa.scalar(None, pa.string()), texts)
    try:
        return plain.cast(pa.float64()), None
    except pa.ArrowInvalid:
        pass
    usable = pc.fill_null(pc.match_substring_regex(plain, _NUMBER), False)
    trimmed = pc.utf8_trim_whitespace(pc.if_else(usable, plain, pa.scalar(None, pa.string())))
    empty = pc.is_in(pc.utf8_trim_whitespace(texts), value_set=_MISSING)
    odd = pc.and_(pc.invert(usable), pc.invert(empty))
    plus = pc.replace_substring_regex(trimmed, r"^\+", "")
    return plus.cast(pa.float64()), odd if pc.any(odd).as_py() else None


def as_integers(texts: pa.Array) -> Integers:
    """Return texts as whole numbers; -1 where they are none."""
    numbers = as_numbers(texts)[0].to_numpy(zero_copy_only=False)
    whole = np.isfinite(numbers) & (np.floor(numbers) == numbers) & (np.abs(numbers) < 1 << 53)
    return np.where(whole, numbers, -1).astype(np.int64)


@dataclass
class Spool:
    """A table in a temporary Arrow file; rows are read by their number, from 0."""

    path: Path
    schema: pa.Schema
    rows: int = 0
    _starts: list[int] = field(default_factory=list)
    _writer: Any = None
    _file: Any = None

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows; those columns of the schema that ``batch`` lacks are null.

        Raises:
            StorageError: the temporary folder is full.
        """
        with _writing(self.path):
            self._append(batch)

    def _append(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            self._file = pa.OSFile(str(self.path), "wb")
            self._writer = pa.ipc.new_file(self._file, self.schema)
        present = {name: batch.column(n) for n, name in enumerate(batch.schema.names)}
        arrays = [
            present[f.name] if f.name in present else pa.nulls(batch.num_rows, f.type)
            for f in self.schema
        ]
        whole = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        step = batch_rows(len(self.schema))
        for start in range(0, whole.num_rows, step):
            part = whole.slice(start, step)
            self._starts.append(self.rows)
            self._writer.write_batch(part)
            self.rows += part.num_rows

    def finish(self) -> None:
        """End writing; from now on rows can be read.

        Raises:
            StorageError: the temporary folder is full.
        """
        if self._writer is not None:
            with _writing(self.path):
                self._writer.close()
                self._file.close()
            self._writer = None

    def read(self, rows: Integers) -> pa.RecordBatch:
        """Return ``rows``, in any order, repeated or not."""
        if len(rows) == 0 or self.rows == 0:
            return pa.RecordBatch.from_arrays(
                [pa.array([], f.type) for f in self.schema], schema=self.schema
            )
        starts = np.asarray(self._starts)
        parts = np.unique(np.searchsorted(starts, np.unique(rows), side="right") - 1)
        with pa.OSFile(str(self.path)) as source, pa.ipc.open_file(source) as reader:
            batches = [reader.get_batch(int(part)) for part in parts]
        lengths = [batch.num_rows for batch in batches]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        part_of = np.searchsorted(starts, rows, side="right") - 1
        places = rows - starts[part_of] + offsets[np.searchsorted(parts, part_of)]
        table = pa.Table.from_batches(batches)
        if len(places) == table.num_rows and bool((np.diff(places) == 1).all()):
            return _one_batch(table)
        return _one_batch(table.take(pa.array(places)))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The temporary folder {path.parent.parent} cannot be written ({first_line(error)}). "
            "Free some space there, or name another in TMPDIR."
        ) from error


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [without_nan(column.combine_chunks()) for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


class reading:  # noqa: N801 - a context manager is named like a function
    """Turn what can go wrong while reading ``path`` into one sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Translate.

        Raises:
            BadTableError: the content is damaged.
            UserInputError: the file cannot be read.
        """
        if isinstance(error, gzip.BadGzipFile | EOFError | pa.ArrowInvalid | csv.Error):
            raise BadTableError(
                f"{self._path} is damaged ({first_line(error)}). Copy or export it again."
            ) from error
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise UserInputError(f"{self._path} cannot be read ({reason}).") from error


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_LONGEST_HEADER):
        yield line


def _skip_to_rows(stream: BinaryIO, header: CsvHeader) -> bool:
    """Whether there is anything after the header; pyarrow takes an empty rest for an error."""
    for _ in range(header.lines):
        stream.readline()
    while piece := stream.read(1 << 16):
        if piece.strip():
            return True
    return False


def _encoding(path: Path, *, glance: bool) -> str:
    with _open(path) as stream:
        head = stream.read(1 << 16)
    if b"\0" in head:
        raise BadTableError(f"{path} is not a text table. Save it as 'CSV UTF-8' and try again.")
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    return "utf-8" if glance or _is_utf8(path) else "latin-1"


def _is_utf8(path: Path) -> bool:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as stream:
        try:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                decoder.decode(piece)
            decoder.decode(b"", True)
        except UnicodeDecodeError:
            return False
    return True


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP_MAGIC
    return cast("BinaryIO", gzip.open(path)) if packed else path.open("rb")


def nothing_joined(_first: list[str], _second: list[str]) -> list[str] | None:
    """Say that the second line of a file is never a header."""
    return None


def union(headers: Iterable[Sequence[str]]) -> list[str]:
    """Return all names in the order in which they first come."""
    return list(dict.fromkeys(name for header in headers for name in header))


def mask_lines(lines: Integers, mask: pa.Array) -> Integers:
    """Return the lines where ``mask`` is true."""
    chosen: npt.NDArray[np.bool_] = mask.to_numpy(zero_copy_only=False).astype(bool)
    return lines[chosen]


def batch_of(columns: Mapping[str, pa.Array], rows: int) -> pa.RecordBatch:
    """Return columns by name as a batch, also if there are none."""
    if not columns:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
