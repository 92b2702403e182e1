"""How questions are put and their answers handed over: what sql and ask have in common."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.errors import UserInputError

from . import render
from .context import say

if TYPE_CHECKING:
    import pyarrow as pa

    from cellstore.analytics import Limits

SHOWN_ROWS = 1000


class Format(StrEnum):
    """How the answer to a question is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


FormatOption = Annotated[Format, typer.Option("--format", help="How the answer is written.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the answer to a file. Needed for parquet.",
        show_default=False,
    ),
]
JsonFormatOption = Annotated[bool, typer.Option("--json", help="Same as --format json.")]
RowsOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=0,
        metavar="N",
        help=f"Only the first N rows; 0: all. Default: {SHOWN_ROWS:,} of a table on the screen, "
        "else all.",
        show_default=False,
    ),
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", min=0.001, metavar="S", help="Stop after so many seconds.")
]
MemoryOption = Annotated[
    int,
    typer.Option(
        "--memory",
        min=64,
        metavar="MB",
        help="How much memory the question may take; what does not fit goes to the cache folder.",
    ),
]
SpreadsheetOption = Annotated[
    bool,
    typer.Option(
        "--for-spreadsheet",
        help="CSV: put a ' before texts that a spreadsheet would run as formulas.",
    ),
]


@dataclass(frozen=True)
class Wanted:
    """How an answer is handed over."""

    form: Format
    output: Path | None
    limit: int | None
    for_spreadsheet: bool = False

    @property
    def rows(self) -> int | None:
        """How many rows of the answer are wanted; None: all."""
        on_screen = self.form is Format.TABLE and self.output is None
        limit = SHOWN_ROWS if self.limit is None and on_screen else self.limit
        return limit or None

    @property
    def fetched(self) -> int | None:
        """One row more than is wanted: it tells that there are more."""
        return None if self.rows is None else self.rows + 1


def wanted(
    form: Format, as_json: bool, output: Path | None, limit: int | None, for_spreadsheet: bool
) -> Wanted:
    """Return how an answer is handed over.

    Raises:
        UserInputError: the options do not go together.
    """
    chosen = Format.JSON if as_json else form
    if chosen is Format.PARQUET and output is None:
        raise UserInputError("Parquet is no text to print. Say where it goes with --output FILE.")
    if for_spreadsheet and chosen is not Format.CSV:
        raise UserInputError("Only CSV is opened in spreadsheets: give --format csv, too.")
    return Wanted(chosen, output, limit, for_spreadsheet)


def limits_of(seconds: float, memory: int) -> Limits:
    """Return what a question may take."""
    from cellstore.analytics import Limits

    return Limits(seconds=seconds, memory_mb=memory)


def hand_over(answer: pa.Table, how: Wanted) -> None:
    """Print an answer, or write it to its file."""
    more = how.rows is not None and answer.num_rows > how.rows
    answer = answer.slice(0, how.rows) if more else answer
    if how.output is not None:
        _save(answer, how)
        say(f"{render.count(answer.num_rows, 'row')} written to {how.output}")
    elif how.form is Format.TABLE:
        render.table(_names(answer), _rows(answer))
    else:
        typer.echo(_encoded(answer, how), nl=False)
    if more:
        say(f"These are the first {answer.num_rows:,} rows; there are more. All: --limit 0")


def parameters(given: list[str] | None) -> dict[str, Any] | None:
    """Return the values of ``NAME=VALUE`` texts by name, each as :func:`typed`.

    Raises:
        UserInputError: one is not like that, or is given twice.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        name = name.strip().removeprefix("$")
        if not sign or not re.fullmatch(r"\w+", name):
            raise UserInputError(f"{text!r} is no parameter. Example: --param plate=BR00116991")
        if name in found:
            raise UserInputError(f"Parameter {name!r} is given twice.")
        found[name] = typed(value)
    return found or None


def typed(text: str) -> int | float | bool | str | None:
    """Return a value as people mean it: number, true, false, null, else text.

    Numbers with a leading zero are texts (``007``), and so is what stands in quotes (``'12'``).
    """
    words: dict[str, bool | None] = {"null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", text):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?|-?[0-9]+[eE][-+]?[0-9]+", text):
        return float(text)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _names(answer: pa.Table) -> list[str]:
    return [render.cell(name) for name in answer.column_names]


def _rows(answer: pa.Table) -> list[list[Any]]:
    return [list(row.values()) for row in _records(answer)]


def _records(answer: pa.Table) -> list[dict[str, Any]]:
    # Not to_pylist() of the table: two columns of the same name are two columns, and Python has
    # no dates before the year 1 or after 9999.
    names = _unique(answer.column_names)
    columns = [_values(column) for column in answer.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return column.cast("string").to_pylist()  # type: ignore[no-any-return]


def _unique(names: list[str]) -> list[str]:
    """Return names that differ: those given, or with _2, _3 behind where one is taken."""
    unique: list[str] = []
    for name in names:
        number, tried = 1, name
        while tried in unique:
            number += 1
            tried = f"{name}_{number}"
        unique.append(tried)
    return unique


def _save(answer: pa.Table, how: Wanted) -> None:
    from cellstore.artifacts import write_atomically

    assert how.output is not None
    if how.form is Format.TABLE:
        data = render.table_text(_names(answer), _rows(answer)).encode()
    else:
        data = _encoded(answer, how)
    write_atomically(how.output, data)


def _encoded(answer: pa.Table, how: Wanted) -> bytes:
    if how.form is Format.JSON:
        text = json.dumps(render.plain(_records(answer)), indent=2, ensure_ascii=False)
        return (text + "\n").encode()
    target = io.BytesIO()
    if how.form is Format.CSV:
        _write_csv(answer, target, how.for_spreadsheet)
    else:
        _write_parquet(answer, target)
    return target.getvalue()


def _write_csv(answer: pa.Table, target: io.BytesIO, for_spreadsheet: bool) -> None:
    import pyarrow.csv
    from pyarrow.lib import ArrowException

    from cellstore.formats.formulas import disarmed

    flat = answer
    for index, column in enumerate(answer.columns):
        try:
            pyarrow.csv.write_csv(answer.select([index]).slice(0, 1), io.BytesIO())
        except (ArrowException, NotImplementedError):  # lists, records, maps, bytes
            flat = flat.set_column(index, answer.field(index).name, [_texts(column)])
    pyarrow.csv.write_csv(disarmed(flat) if for_spreadsheet else flat, target)


def _write_parquet(answer: pa.Table, target: io.BytesIO) -> None:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    flat = answer.rename_columns(_unique(answer.column_names))
    for index, column in enumerate(flat.columns):
        try:
            pyarrow.parquet.write_table(flat.select([index]).slice(0, 0), io.BytesIO())
        except (ArrowException, NotImplementedError):  # intervals
            flat = flat.set_column(index, flat.field(index).name, [_texts(column)])
    pyarrow.parquet.write_table(flat, target, compression="zstd")


def _texts(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow

    values = [render.plain(value) for value in _values(column)]
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
    return pyarrow.array(texts, pyarrow.string())
