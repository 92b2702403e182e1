"""Answers as text, CSV, JSON or Parquet, written as they come."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from cellstore.errors import UserInputError
from cellstore.settings import check_not_of_a_store

from . import render
from .context import say

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 1000


class Format(StrEnum):
    """How the answer to a question is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


class Batches(Protocol):
    """An answer that comes piece by piece."""

    @property
    def schema(self) -> pa.Schema:
        """The columns."""

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yield the pieces."""


@dataclass(frozen=True)
class Wanted:
    """How an answer is written, and where; ``limit`` rows of it, None: as many as are usual."""

    form: Format = Format.TABLE
    output: Path | None = None
    limit: int | None = None
    for_spreadsheet: bool = False
    replace: bool = False


def checked(wanted: Wanted) -> Wanted:
    """Return ``wanted`` if that can be done.

    Raises:
        UserInputError: Parquet on the screen, a spreadsheet of something else than CSV, or a file
            that is there already, or that has no folder.
    """
    if wanted.output is not None:
        check_output(wanted.output, replace=wanted.replace)
    if wanted.form is Format.PARQUET and wanted.output is None:
        raise UserInputError("Parquet is no text to print. Say where it goes with --output FILE.")
    if wanted.for_spreadsheet and wanted.form is not Format.CSV:
        raise UserInputError("Only CSV is opened in spreadsheets: give --format csv, too.")
    return wanted


def check_output(output: Path, *, replace: bool) -> None:
    """Refuse a file that would take the place of another, or lie in a folder that is not there.

    Raises:
        UserInputError: it is so.
    """
    check_not_of_a_store(output)
    if output.is_dir():
        raise UserInputError(f"{output} is a folder. Name a file in it.")
    if output.exists() and output.is_file() and not replace:
        raise UserInputError(f"{output} is there already. Name another file, or give --replace.")
    if not output.parent.is_dir():
        raise UserInputError(f"There is no folder {output.parent}. Make it, or name another.")


def write(answer: Batches, wanted: Wanted) -> None:
    """Write an answer; a table holds the first rows only, all else as much as there is."""
    limit = wanted.limit
    if limit is None and wanted.form is Format.TABLE:
        limit = SHOWN_ROWS
    taken = _First(answer, limit)
    with _opened(wanted.output) as file:
        _WRITERS[wanted.form](answer.schema, taken, file, wanted)
    if wanted.output is not None:
        say(f"{render.count(taken.rows, 'row')} written to {wanted.output}")
    if taken.more and wanted.limit is None:
        say(
            f"These are the first {taken.rows:,} rows; there are more. Say how many with --limit, "
            "or take all with --format csv."
        )


class _First:
    """The batches of an answer up to so many rows; ``more``: there were others."""

    def __init__(self, answer: Iterable[pa.RecordBatch], limit: int | None) -> None:
        self._answer = answer
        self._limit = limit
        self.rows = 0
        self.more = False

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._answer:
            left = batch.num_rows if self._limit is None else self._limit - self.rows
            self.more = left < batch.num_rows
            kept = batch.slice(0, left) if self.more else batch
            self.rows += kept.num_rows
            if kept.num_rows:
                yield kept
            if self.more:
                return


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    from cellstore.artifacts import open_atomically

    with open_atomically(output) as file:
        yield file


def _table(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: BinaryIO, wanted: Wanted
) -> None:
    rows = [row for batch in batches for row in _rows(batch)]
    on_screen = wanted.output is None and sys.stdout.isatty()
    room = shutil.get_terminal_size().columns if on_screen else None
    headers = [render.cell(name) for name in schema.names]
    file.write(render.table_text(headers, rows, room).encode(errors="replace"))


def _rows(batch: pa.RecordBatch) -> Iterable[Sequence[Any]]:
    # Not to_pylist() of the batch: two columns of the same name are two columns.
    return zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _json(schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: BinaryIO, _: Wanted) -> None:
    names = _unique(schema.names)
    file.write(b"[")
    first = True
    for row in chain.from_iterable(_rows(batch) for batch in batches):
        record = render.plain(dict(zip(names, row, strict=True)))
        text = json.dumps(record, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        file.write(("\n  " if first else ",\n  ").encode() + text.encode(errors="replace"))
        first = False
    file.write(b"]\n" if first else b"\n]\n")


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _csv(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: BinaryIO, wanted: Wanted
) -> None:
    import pyarrow.csv

    def shaped(batch: pa.RecordBatch) -> pa.RecordBatch:
        flat = _flat(batch)
        if not wanted.for_spreadsheet:
            return flat
        from cellstore.io.tables import disarmed

        return disarmed(flat)

    with pyarrow.csv.CSVWriter(file, shaped(_empty(schema)).schema) as writer:
        for batch in batches:
            writer.write_batch(shaped(batch))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([], item.type) for item in schema], schema=schema)


def _flat(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with lists, records and bytes as JSON texts: CSV knows no such values."""
    import pyarrow as pa

    columns = [_flat_column(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _flat_column(column: pa.Array) -> pa.Array:
    import pyarrow as pa

    kind = column.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if plain or pa.types.is_string(kind) or pa.types.is_decimal(kind):
        return column
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column
    return pa.array([_as_text(value) for value in column.to_pylist()], pa.string())


def _as_text(value: object) -> str | None:
    value = render.plain(value)
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _parquet(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: BinaryIO, _: Wanted
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserInputError(
            f"Parquet cannot hold this answer: {str(error).splitlines()[0]}. Cast the column to "
            "text, or take another --format."
        ) from error


_WRITERS = {
    Format.TABLE: _table,
    Format.CSV: _csv,
    Format.JSON: _json,
    Format.PARQUET: _parquet,
}
