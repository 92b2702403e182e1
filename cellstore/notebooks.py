"""Results as a notebook shows them: tables in HTML, without scripts, in the colours of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, datetime
from decimal import Decimal
from html import escape
from typing import Any, TypeVar

T = TypeVar("T")

SHOWN_ROWS = 20
LONG, CUT = 200, 100
"""Letters of a text that gets a place of its own, and of one in a table."""
_NUMBERS = ("id", "ids", "run", "recipe", "recipes", "seed", "year", "row", "column", "site")
"""Last words of names whose numbers are names, not counts."""
_PICTURES = 0x2400  # of the control characters from 0: U+2400 is the picture of U+0000
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    "|[\ud800-\udfff\ufff9-\uffff]"
)
_LEFT = ' style="text-align:left;vertical-align:top"'
_RIGHT = ' style="text-align:right;vertical-align:top;font-variant-numeric:tabular-nums"'


def plain(text: str) -> str:
    """Return ``text`` with control characters and marks of direction written out.

    Such characters could hide a part of a name or turn what follows around. Tabs and line feeds
    stay as they are.
    """

    def written(found: re.Match[str]) -> str:
        code = ord(found[0])
        return chr(_PICTURES + code) if code < 0x20 else f"\\u{code:04x}"

    return _HIDDEN.sub(written, text)


def json_value(value: Any) -> Any:
    """Return ``value`` as what JSON knows; NaN and infinities become null.

    Of a result: its fields, after whether all is well (``ok``), if it says that.
    """
    if is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it spoils a Counter, of which it makes one that counts pairs.
        found = {item.name: json_value(getattr(value, item.name)) for item in fields(value)}
        return {"ok": value.ok, **found} if hasattr(value, "ok") else found
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return json_value(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return str(value)


class Shown:
    """A dataclass that a notebook shows as tables: single values first, then each of its lists."""

    def _repr_html_(self) -> str:
        return html_of(self)


class Rows(tuple[T, ...]):
    """Results of one kind, which a notebook shows as one table, and pandas takes as one.

    >>> pandas.DataFrame(store.list_splits())
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        return table(self)


def html_of(result: Any, title: str | None = None) -> str:
    """Return a result, or names and values, as HTML; what is empty is left out.

    Lists are folded up but the first; of each the first ``SHOWN_ROWS`` rows are shown.
    """
    if title is None:
        name = type(result).__name__.removesuffix("Result")
        title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()
    rows, notes, parts = "", "", ""
    for name, value in _record(result).items():
        words = name.replace("_", " ")
        if value is None or (isinstance(value, str | Sequence | Mapping) and not value):
            continue
        if name == "notes":
            notes += "".join(f"<p>{_text(note)}</p>" for note in value)
        elif isinstance(value, str) and (len(value) > LONG or "\n" in value):
            text = f'<pre style="white-space:pre-wrap">{escape(plain(value))}</pre>'
            parts += _folded(words, text, is_open=False)
        elif hasattr(value, "num_rows") or (_is_list(value) and not _is_single(value[0])):
            number = value.num_rows if hasattr(value, "num_rows") else len(value)
            parts += _folded(f"{words} ({number:,})", table(value), is_open=not parts)
        elif _is_record(value) and not all(map(_is_single, _record(value).values())):
            parts += _folded(words, html_of(value, ""), is_open=not parts)
        else:
            rows += f"<tr><th{_LEFT}>{_text(words)}</th><td{_LEFT}>{_text(value, name)}</td></tr>"
    head = f"<p><strong>{_text(title)}</strong></p>" if title else ""
    return f"<div>{head}{rows and f'<table>{rows}</table>'}{notes}{parts}</div>"


def table(rows: Any) -> str:
    """Return rows as an HTML table: records or plain values, or a table of Arrow."""
    of_arrow = hasattr(rows, "num_rows")
    number = rows.num_rows if of_arrow else len(rows)
    records = [
        _record(row) if _is_record(row) else dict(enumerate(row if _is_list(row) else (row,)))
        for row in (rows.slice(0, SHOWN_ROWS).to_pylist() if of_arrow else rows[:SHOWN_ROWS])
    ]
    names = dict.fromkeys(name for record in records for name in record)
    names = {name: None for name in names if any(r.get(name) not in (None, ()) for r in records)}

    def line(tag: str, texts: Mapping[Any, str]) -> str:
        cells = ""
        for name, text in texts.items():
            right = all(isinstance(r.get(name), int | float | None) for r in records)
            cells += f"<{tag}{_RIGHT if right else _LEFT}>{text}</{tag}>"
        return f"<tr>{cells}</tr>"

    head = line("th", {name: _text(str(name).replace("_", " ")) for name in names})
    head = f"<thead>{head}</thead>" if any(isinstance(name, str) for name in names) else ""
    body = "".join(
        line("td", {name: _text(record.get(name), str(name), CUT) for name in names})
        for record in records
    )
    more = f"<p>and {number - len(records):,} more</p>" if number > len(records) else ""
    return f"<table>{head}<tbody>{body}</tbody></table>{more}"


def _folded(title: str, inner: str, *, is_open: bool) -> str:
    return f"<details{' open' * is_open}><summary>{_text(title)}</summary>{inner}</details>"


def _is_list(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str | bytes) and not _is_record(value)
    )


def _is_record(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return isinstance(value, Mapping) or is_dataclass(value) or hasattr(value, "_asdict")


def _is_single(value: Any) -> bool:
    return not _is_record(value) and not _is_list(value)


def _record(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    shown = (item.name for item in fields(value) if item.repr and item.name[0] != "_")
    return {name: getattr(value, name) for name in shown}


def _text(value: Any, name: str = "", most: int = 10_000) -> str:
    """A value in a line of ``most`` letters, escaped; ``name`` says whether it is an id."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if name.split("_")[-1] in _NUMBERS else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if _is_record(value):
        pairs = _record(value).items()
        return ", ".join(f"{_text(str(key))} {_text(item, str(key))}" for key, item in pairs)
    if _is_list(value):
        return ", ".join(_text(item, name) for item in value[:SHOWN_ROWS]) + (
            ", \u2026" if len(value) > SHOWN_ROWS else ""
        )
    text = " ".join(str(value).split())
    return escape(plain(text if len(text) <= most else f"{text[: most - 1]}\u2026"))
