"""The plan of a question as text for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

WIDTH = 80
_SHOWN = {"Conditions": "on", "Expression": "where", "Filters": "where", "Projections": "columns"}


def described_plan(answer: pa.Table) -> str:
    """Return the steps of ``EXPLAIN (FORMAT json)``: a line each, what it reads further in."""
    steps = json.loads(answer.column("explain_value")[-1].as_py())
    return "\n".join(line for step in steps for line in _lines(step, 0))


def _lines(step: Mapping[str, Any], depth: int) -> Iterator[str]:
    name = str(step.get("name", "")).strip().lower().replace("_", " ")
    if name != "projection":  # it only hands columns on
        facts = [f"{key}: {_short(value)}" for key, value in _facts(step)]
        line = f"{' ' * depth}{name.removeprefix('python ')}  {'; '.join(facts)}".rstrip()
        yield line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}\u2026"
        depth += 1
    for child in step.get("children", ()):
        yield from _lines(child, depth)


def _facts(step: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    extra = dict(step.get("extra_info", {}))
    rows = extra.pop("Estimated Cardinality", None)
    if rows is not None:
        yield "rows", f"about {int(rows):,}"
    for key, shown in _SHOWN.items():
        if extra.get(key):
            yield shown, extra[key]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split())
