"""An audit as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .audit import Audit

WIDTH = 80
SHOWN = 20
"""Records of a list."""
SHOWN_VALUES = 6
"""Values of a list, or of a record within a record, that stand in one line."""
SHORT = 12
"""Digits of a sha256."""
GAP = "  "


def audit_text(audit: Audit) -> str:
    """Return the record of an audit as lines of 80 characters at most, where names allow it."""
    record = {name: value for name, value in audit.record.items() if name != "notes"}
    lines = [audit.title, *_lines(record, "")]
    for note in audit.record.get("notes", ()):
        lines += ["", *textwrap.wrap(note, WIDTH)]
    return "\n".join(lines) + "\n"


def _lines(record: Mapping[str, Any], margin: str) -> Iterable[str]:
    """Values, then the parts of a record, each below its name.

    The records of a list are a table if that fits, else one below the other, without what is
    unknown.
    """
    parts = {name: value for name, value in record.items() if _is_part(value)}
    yield from _pairs({k: v for k, v in record.items() if k not in parts and v != []}, margin)
    for name, part in parts.items():
        if not part:
            continue
        yield ""
        yield f"{margin}{name.replace('_', ' ')}"
        if isinstance(part, Mapping):
            yield from _lines(part, margin + GAP)
            continue
        table = _table(part[:SHOWN], margin + GAP)
        nested = any(isinstance(value, list) and _is_part(value) for value in part[0].values())
        if not nested and max(map(len, table)) <= WIDTH:
            yield from table
        else:
            for number, row in enumerate(part[:SHOWN]):
                if number:
                    yield ""
                known = {
                    key: _text(key, value) if isinstance(value, Mapping) else value
                    for key, value in row.items()
                    if value is not None
                }
                yield from _lines(known, margin + GAP)
        if len(part) > SHOWN:
            yield f"{margin}{GAP}and {len(part) - SHOWN:,} more (all with --json)"


def _is_part(value: Any) -> bool:
    """Whether a value is a record, or a list of records."""
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _table(rows: Sequence[Mapping[str, Any]], margin: str) -> list[str]:
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[_text(key, value) for key, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        margin + GAP.join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _pairs(record: Mapping[str, Any], margin: str) -> Iterable[str]:
    """Names and values; what is too long for a line goes on below."""
    width = max((len(name) for name in record), default=0)
    for name, value in record.items():
        lead = f"{margin}{name.replace('_', ' '):<{width}}{GAP}"
        text = _text(name, value)
        lines = textwrap.wrap(text, max(20, WIDTH - len(lead)), break_on_hyphens=False) or [""]
        yield f"{lead}{lines[0]}".rstrip()
        yield from (f"{' ' * len(lead)}{line}" for line in lines[1:])


def _text(name: str, value: Any) -> str:
    """Return a value as one line; digests by their start, the first of long lists."""
    if isinstance(value, Mapping | list):
        if isinstance(value, Mapping):
            parts = [f"{key.replace('_', ' ')} {_text(key, x)}" for key, x in value.items()]
        else:
            parts = [_text(name, item) for item in value]
        more = [f"and {len(parts) - SHOWN_VALUES} more"] if len(parts) > SHOWN_VALUES else []
        return ", ".join([*parts[:SHOWN_VALUES], *more]) or "-"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not name.endswith("id"):
        return f"{value:,}"
    text = str(value)
    if name.endswith(("sha256", "fingerprint", "checkpoints", "weights")):
        text = text[:SHORT]
    elif name.endswith("_at"):
        text = text[:19].replace("T", " ")
    return "".join(char if char.isprintable() else " " for char in text)
