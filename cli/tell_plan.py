"""How a question would be answered, as an outline that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import typer

from . import render

WIDTH = 80
_SHOWN = ("Table", "Function", "Join Type", "Conditions", "Filters", "Expression", "Groups")
_SHOWN += ("Aggregates", "Order By", "Top", "Projections")
_ROWS = "Estimated Cardinality"


def plan(steps: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print the steps of a plan, each under the one that takes its rows."""
    if as_json:
        render.as_json(list(steps))
        return
    typer.echo("Read from below: each step takes the rows of those under it.\n")
    for step in steps:
        _print(step, 0)


def _print(step: dict[str, Any], depth: int) -> None:
    info = step.get("extra_info") or {}
    name = render.cell(step.get("name", "?")).strip().lower().replace("_", " ")
    rows = f" (about {int(info[_ROWS]):,} rows)" if str(info.get(_ROWS, "")).isdigit() else ""
    margin = "  " * min(depth, 20)
    typer.echo(f"{margin}{name}{rows}")
    for key in _SHOWN:
        if key in info:
            typer.echo(_detail(f"{key.lower()}: {_text(info[key])}", f"{margin}    "))
    for child in step.get("children") or ():
        _print(child, depth + 1)


def _text(value: Any) -> str:
    return ", ".join(map(render.cell, value)) if isinstance(value, list) else render.cell(value)


def _detail(text: str, margin: str) -> str:
    shown = textwrap.shorten(text, 400, placeholder=" ...")
    return textwrap.fill(
        shown, WIDTH, initial_indent=margin, subsequent_indent=f"{margin}  ", break_on_hyphens=False
    )
