"""What commands print: names and values, tables of 80 columns, JSON, CSV, Parquet, progress."""

# No "from __future__ import annotations": the types of AnswerOptions' fields are read.

import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from cellstore.config import option
from cellstore.errors import MissingExtraError, UserInputError
from cellstore.notebooks import json_value
from cellstore.settings import Progress, check_new_file

if TYPE_CHECKING:
    import pyarrow as pa

    from cellstore.query.engine import Answer

WIDTH = 80
GAP = "  "
MIN_COLUMN = 10
"""No column is made narrower."""
LINES = 4
"""Of a text in a table, at most."""
SHOWN_PER_REASON = 10
_QUOTED = re.compile("'[^']*'")
SHOWN_ROWS = 1000


def say(*texts: str) -> None:
    """Tell a person something, beside the data on stdout.

    A line that begins with a space is a command to copy: it stays one line.
    """
    for text in texts:
        lines = text.split("\n")
        if sys.stderr.isatty():
            lines = [line if line.startswith(" ") else filled(line) for line in lines]
        typer.echo("\n".join(lines), err=True)


def say_more(number: int, what: str = "", how: str = "all with --json") -> None:
    """Tell a person that a list goes on, if it does."""
    if number > 0:
        typer.echo(f"and {number:,} more{what} ({how})")


def json_text(value: Any) -> str:
    """Return a result, or a list of rows, as JSON."""
    return json.dumps(json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def print_json(value: Any) -> None:
    """Print a result, or a list of rows, as JSON."""
    typer.echo(json_text(value), nl=False)


def cell(value: Any, width: int | None = None) -> str:
    """Return a value as one line of text without control characters, of at most ``width`` of them.

    Names are cut in the middle, because barcodes and identifiers often differ at their end only.
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1e6 else f"{value:.6g}"
    else:
        plain = value if isinstance(value, str | int) else json_value(value)
        text = "".join(char if char.isprintable() else " " for char in str(plain))
    if width is None or len(text) <= width:
        return text
    end = 0 if " " in text else (width - 1) // 2
    return text[: width - 1 - end] + "…" + text[len(text) - end :]


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 image`` or ``2 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(*shares: float | None) -> str:
    """Return a share as a percentage, ``17.4 %``, or an interval of shares, ``15.1 to 19.8 %``."""
    known = [f"{100 * share:.1f}" for share in shares if share is not None]
    return f"{' to '.join(known)} %" if len(known) == len(shares) else "-"


def span(low: float | None, high: float | None) -> str:
    """Return ``1 to 2``, ``1 or more`` or ``2 or less``."""
    if low is None or high is None:
        return f"{cell(low)} or more" if high is None else f"{cell(high)} or less"
    return f"{cell(low)} to {cell(high)}"


def filled(text: str, margin: str = "", first: str | None = None) -> str:
    """Return a sentence in lines that fit a terminal, below its margin; no word is cut."""
    first = margin if first is None else first
    lines = textwrap.TextWrapper(
        max(WIDTH, len(margin) + 20),
        initial_indent=first,
        subsequent_indent=margin,
        break_long_words=False,  # a path, for example
        break_on_hyphens=False,
    )
    return lines.fill(text) or first.rstrip()


def wrapped(text: str, margin: str = "") -> None:
    """Print a sentence in lines that fit a terminal."""
    typer.echo(filled(cell(text), margin))


def pairs(rows: Mapping[str, Any] | Iterable[tuple[str, Any]], margin: str = "") -> None:
    """Print names and values side by side; whole numbers get their thousands marked."""
    shown = [
        (cell(name), f"{value:,}" if type(value) is int and name not in _NUMBERS else cell(value))
        for name, value in (rows.items() if isinstance(rows, Mapping) else rows)
    ]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        lead = f"{margin}{name:<{width}}{GAP}"
        typer.echo(filled(value, " " * len(lead), lead))


_NUMBERS = ("run", "id", "recipe", "trained in run", "predict run", "train run", "seed")
"""Names of values that are numbers of something, not counts."""


def grouped(problems: Sequence[tuple[str, str, str]]) -> None:
    """Print problems (where, reason, detail) by reason, the first few of each.

    What differs in quoted texts alone, as a mistake in each row of a table does, is said once.
    """
    reasons = Counter(reason for _, reason, _ in problems)
    for reason, number in reasons.most_common():
        typer.echo(f"{GAP}{cell(reason)}: {count(number, 'row')}")
        alike: dict[str, list[str]] = {}
        for where, _, detail in (problem for problem in problems if problem[1] == reason):
            alike.setdefault(_QUOTED.sub("", detail), []).append(f"{where}: {detail}")
        kinds = list(alike.values())
        for line, *others in kinds[:SHOWN_PER_REASON]:
            if others:
                line = f"{line.rstrip('.')}. And {len(others):,} more like this."  # noqa: PLW2901
            typer.echo(filled(cell(line), GAP * 3, GAP * 2))
        if left := sum(map(len, kinds[SHOWN_PER_REASON:])):
            typer.echo(f"{GAP * 2}and {left:,} more (all with --json)")


def narrowed(widths: Sequence[int], room: int, least: Sequence[int]) -> list[int]:
    """Return the widths of columns that fit ``room``, the widest made narrower; none: no such.

    ``least``: what each column needs.
    """
    found = list(widths)
    for _ in range(sum(widths) + len(GAP) * (len(widths) - 1) - room):
        wide = [at for at, width in enumerate(found) if width > least[at]]
        if not wide:
            return []
        found[max(wide, key=found.__getitem__)] -= 1
    return found


# Not rich's Table, which takes 1.8 s for a thousand rows of ten columns.
def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Any]],
    file: BinaryIO | None = None,
    margin: str = "",
    widths: Sequence[int] = (),
) -> None:
    """Print aligned columns, numbers to the right, or write them to a file.

    The width of a terminal, or ``widths`` of columns, are kept: long texts go on in the next line,
    and are cut after ``LINES``; where that is not enough, the last columns are dropped, and named.
    """
    numeric = [True] * len(headers)
    cells: list[list[str]] = []
    for row in rows:
        for column, value in enumerate(row):
            number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
            numeric[column] &= number or value is None
        cells.append([cell(value) for value in row])
    shown = len(headers)
    if not widths:
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        if file is None and sys.stdout.isatty():
            room = shutil.get_terminal_size().columns
            least = [min(width, MIN_COLUMN) for width in widths]
            while not (fitting := narrowed(widths[:shown], room, least)) and shown > 1:
                shown -= 1
            widths = fitting or [room]
    lines = []
    for line in (headers, ["-" * width for width in widths], *cells):
        pieces = [
            _lines(value, width) if len(value) > width else [value]
            for value, width in zip(line, widths, strict=False)
        ]
        for texts in zip_longest(*pieces, fillvalue=""):
            aligned = (
                f"{text:{'>' if number and cells else '<'}{width}}"
                for text, width, number in zip(texts, widths, numeric, strict=False)
            )
            lines.append((margin + GAP.join(aligned)).rstrip())
    if shown < len(headers):
        lines.append(cell(f"Columns not shown: {', '.join(map(cell, headers[shown:]))}", room))
    data = "\n".join([*lines, ""]).encode(errors="replace")
    if file is None:
        typer.echo(data, nl=False)
    else:
        file.write(data)


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines at spaces, and after -, _ and /."""

    wordsep_simple_re = re.compile(r"(\s+|(?<=[-_/])(?=\w))")


def _lines(text: str, width: int) -> list[str]:
    lines = _Wrapper(width, break_on_hyphens=False).wrap(cell(text, LINES * width))
    if len(lines) > LINES:
        lines[LINES - 1 :] = [cell(" ".join(lines[LINES - 1 :]), width)]
    return lines


class Format(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"
    XLSX = "xlsx"


EXACT = 1 << 53
"""From here on Excel changes the last digits of a whole number."""


@dataclass(frozen=True)
class AnswerOptions:
    """How the rows of an answer are written, and where to."""

    limit: int | None = option(
        None,
        "Only the first N rows. Default: 1,000 in a table, all in other formats.",
        metavar="N",
        min=0,
    )
    format: Format | None = option(
        None, "How the answer is written. Default: by the ending of --output, else as a table."
    )
    output: Path | None = option(
        None, "Write the answer to a file. Needed for parquet and xlsx (Excel).", metavar="FILE"
    )
    replace: bool = option(False, "Replace the file of --output if it is there.")
    for_spreadsheet: bool = option(
        False, "CSV: put a ' before texts that a spreadsheet would run as formulas."
    )

    def checked(self) -> "AnswerOptions":
        """Return the options with their format; refuse what cannot be written, before any work."""
        found = self.format
        if self.output is not None:
            check_new_file(self.output, replace=self.replace)
            ending = self.output.suffix.lower().removeprefix(".")
            if found is None and ending in [item.value for item in Format]:
                found = Format(ending)
        elif found in (Format.PARQUET, Format.XLSX):
            name = "Excel" if found is Format.XLSX else "Parquet"
            raise UserInputError(f"{name} cannot be printed. Write it to a file: --output FILE.")
        if self.for_spreadsheet and found is not Format.CSV:
            raise UserInputError("--for-spreadsheet is for CSV only: add --format csv.")
        return replace(self, format=found or Format.TABLE)


def write(
    answer: "Answer",
    wanted: AnswerOptions,
    shown: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write an answer as it comes; a table holds the first rows only, all else all rows.

    ``shown`` returns what a table shows of a row.
    """
    limit = wanted.limit
    if limit is None and wanted.format is Format.TABLE:
        limit = SHOWN_ROWS
    taken = _First(answer, limit)
    with ExitStack() as stack:
        file: BinaryIO = sys.stdout.buffer
        if wanted.output is not None:
            from cellstore.artifacts import open_atomically

            file = stack.enter_context(open_atomically(wanted.output))
        match wanted.format:
            case Format.TABLE:
                names, rows = answer.names, list(taken.rows())
                if shown is not dict:
                    records = [shown(dict(zip(names, row, strict=True))) for row in rows]
                    rows = [tuple(record.values()) for record in records]
                    names = list(shown(dict.fromkeys(names)))
                on_screen = wanted.output is None
                table([cell(name) for name in names], rows, None if on_screen else file)
            case Format.JSON:
                _write_json(taken, file)
            case Format.CSV:
                from cellstore.io.tables import csv_parts

                disarm = wanted.for_spreadsheet
                for part in csv_parts(answer.schema, taken.batches(), for_spreadsheet=disarm):
                    file.write(part)
            case Format.PARQUET:
                from cellstore.io.tables import parquet_parts

                for part in parquet_parts(answer.schema, taken.batches()):
                    file.write(part)
            case Format.XLSX:
                _write_excel(taken, file)
        file.flush()
    if wanted.output is not None:
        say(f"{count(taken.number, 'row')} written to {wanted.output}")
    if taken.more and wanted.limit is None:
        say(
            f"These are the first {taken.number:,} rows; there are more. To see more: --limit N, "
            "or all of them with --format csv."
        )


@dataclass
class _First:
    """The first rows of an answer: ``number`` of them so far; ``more``: there are others."""

    answer: "Answer"
    limit: int | None
    number: int = 0
    more: bool = False

    def rows(self) -> Iterator[tuple[Any, ...]]:
        for row in self.answer.rows():
            self.more = self.number == self.limit
            if self.more:
                return
            self.number += 1
            yield row

    def batches(self) -> "Iterator[pa.RecordBatch]":
        for batch in self.answer.batches():
            left = batch.num_rows if self.limit is None else self.limit - self.number
            self.more = left < batch.num_rows
            kept = batch.slice(0, left) if self.more else batch
            self.number += kept.num_rows
            if kept.num_rows:
                yield kept
            if self.more:
                return


def _write_json(taken: _First, file: BinaryIO) -> None:
    seen: Counter[str] = Counter()
    names = []
    for name in taken.answer.names:  # a second column x becomes x_2
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    file.write(b"[")
    separator = "\n  "
    for row in taken.rows():
        record = json_value(dict(zip(names, row, strict=True)))
        text = json.dumps(record, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        file.write(f"{separator}{text}".encode(errors="replace"))
        separator = ",\n  "
    file.write(b"]\n" if separator == "\n  " else b"\n]\n")


def _write_excel(taken: _First, file: BinaryIO) -> None:
    """Write one sheet, row by row; no text becomes a formula, a number or a link."""
    try:
        xlsxwriter = import_module("xlsxwriter")
    except ImportError as error:
        raise MissingExtraError.of("xlsxwriter", "excel") from error

    def value(found: Any) -> Any:
        found = found if isinstance(found, float) else json_value(found)
        if isinstance(found, dict | list):
            found = json.dumps(found, ensure_ascii=False)
        number = isinstance(found, int) and not isinstance(found, bool)
        if number and abs(found) > EXACT:
            found = str(found)
        return found

    keeping = {"constant_memory": True, "nan_inf_to_errors": True}
    as_it_is = dict.fromkeys(
        ("strings_to_formulas", "strings_to_urls", "strings_to_numbers"), False
    )
    with xlsxwriter.Workbook(file, {**keeping, **as_it_is}) as book:
        sheet = book.add_worksheet("answer")
        sheet.freeze_panes(1, 0)
        sheet.write_row(0, 0, taken.answer.names, book.add_format({"bold": True}))
        for number, row in enumerate(taken.rows(), start=1):
            if sheet.write_row(number, 0, map(value, row)) != 0:
                raise UserInputError(
                    "Excel cannot hold this answer: it has more than 1,048,575 rows or 16,384 "
                    "columns, or a text of more than 32,767 characters. Take --format csv or "
                    "parquet, or ask for less."
                )


class Notes(Progress):
    """Writes the notes to stderr, for logs and pipes, and draws no bar."""

    def note(self, text: str) -> None:
        """Write one line."""
        say(text)


class Bar(Progress):
    """A bar on stderr: what is done, how much is left, and how long that will take."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: list[Any] = []

    @cached_property
    def console(self) -> Any:
        """The terminal; made when something is shown, since rich loads slowly."""
        from rich.console import Console

        return Console(stderr=True)

    def start(self, label: str, total: int | None) -> None:
        """Show a bar for ``total`` steps; work inside other work gets a bar below it."""
        from rich import progress

        if self._progress is None:
            columns = (
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self._progress = progress.Progress(*columns, console=self.console, transient=True)
            self._progress.start()
        self._tasks.append(self._progress.add_task(label, total=total))

    def advance(self, steps: int = 1) -> None:
        """Move the innermost bar on."""
        if self._tasks:
            self._progress.advance(self._tasks[-1], steps)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def finish(self) -> None:
        """Take the innermost bar away."""
        if not self._tasks:
            return
        self._progress.remove_task(self._tasks.pop())
        if not self._tasks:
            self._progress.stop()
            self._progress = None
