"""Results as text for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import typer

SHOWN_PER_REASON = 10
MIN_COLUMN = 6
GAP = "  "
WIDTH = 80


def as_json(value: Any) -> None:
    """Print a result, or a list of rows, as JSON."""
    typer.echo(json_text(value), nl=False)


def json_text(value: Any) -> str:
    """Return a result, or a list of rows, as JSON."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def wrapped(text: str, width: int = WIDTH) -> None:
    """Print a sentence in lines that fit a terminal."""
    typer.echo(textwrap.fill(cell(text), width))


def shortened(value: Any, width: int) -> str:
    """Return a value as one line of at most ``width`` characters."""
    return _cut(cell(value), width)


def plain(value: Any) -> Any:
    """Return ``value`` as what JSON knows; numbers that are none become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return _text_of(value)


def _text_of(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return str(value)


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one pair a line, values aligned."""
    rows = [(name, cell(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"{name:<{width}}{GAP}{value}")


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns; on a terminal long cells are cut to fit, in a pipe never."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(table_text(headers, rows, room), nl=False)


def table_text(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], room: int | None = None
) -> str:
    """Return aligned columns, numbers to the right, cut to ``room`` characters a line."""
    numeric = [True] * len(headers)
    cells: list[list[str]] = []
    for row in rows:
        numeric = [was and _is_number(value) for was, value in zip(numeric, row, strict=True)]
        cells.append([cell(value) for value in row])
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    if room is not None:
        widths = _fitted(widths, room)
    aligned = [number and bool(cells) for number in numeric]
    rule = GAP.join("-" * width for width in widths)
    lines = [_line(headers, widths, aligned), rule]
    lines += [_line(row_cells, widths, aligned) for row_cells in cells]
    return "\n".join(lines) + "\n"


def tree(value: Mapping[str, Any], indent: int = 0) -> None:
    """Print a nested result: names and values, lists of records as tables."""
    margin = GAP * indent
    for name, item in value.items():
        title = name.replace("_", " ")
        if isinstance(item, Mapping):
            typer.echo(f"{margin}{title}:")
            tree(item, indent + 1)
        elif _is_records(item):
            typer.echo(f"{margin}{title}:")
            headers = list(item[0])
            typer.echo(table_text(headers, [[row.get(key) for key in headers] for row in item]))
        else:
            typer.echo(f"{margin}{title}: {_inline(item)}")


def _is_records(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(row, Mapping) for row in item)


def _inline(item: Any) -> str:
    if isinstance(item, list):
        return ", ".join(cell(part) for part in item) or "-"
    return cell(item)


def cell(value: Any) -> str:
    """Return a value as one line of text without control characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.6g}"
    text = str(plain(value))
    return "".join(char if char.isprintable() else " " for char in text)


def span(low: float | None, high: float | None) -> str:
    """Return ``1 to 2``, ``1 or more`` or ``2 or less``."""
    if low is None or high is None:
        return f"{cell(low)} or more" if high is None else f"{cell(high)} or less"
    return f"{cell(low)} to {cell(high)}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 image`` or ``2 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def grouped(problems: Sequence[tuple[str, str, str]]) -> None:
    """Print problems (place, reason, detail) by reason, the first few lines of each."""
    reasons = Counter(reason for _, reason, _ in problems)
    for reason, number in reasons.most_common():
        typer.echo(f"{GAP}{cell(reason)}: {count(number, 'row')}")
        matching = [problem for problem in problems if problem[1] == reason]
        for place, _, detail in matching[:SHOWN_PER_REASON]:
            typer.echo(f"{GAP * 2}{cell(place)}: {cell(detail)}")
        if number > SHOWN_PER_REASON:
            typer.echo(f"{GAP * 2}and {number - SHOWN_PER_REASON} more (all with --json)")


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    )


def _fitted(widths: Sequence[int], room: int) -> list[int]:
    fitted = list(widths)
    excess = sum(fitted) + len(GAP) * (len(fitted) - 1) - room
    while excess > 0:
        widest = max(range(len(fitted)), key=fitted.__getitem__)
        if fitted[widest] <= MIN_COLUMN:
            break
        fitted[widest] -= 1
        excess -= 1
    return fitted


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    pieces = [
        f"{_cut(text, width):>{width}}" if numeric else f"{_cut(text, width):<{width}}"
        for text, width, numeric in zip(cells, widths, right, strict=True)
    ]
    return GAP.join(pieces).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
