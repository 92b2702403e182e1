"""Tables, columns and saved questions as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from cellstore.errors import UnknownNameError

from . import render

if TYPE_CHECKING:
    from cellstore.query.describe import ColumnWords, RelationWords
    from cellstore.query.saved_queries import SavedParameter, SavedQuestion

WIDTH = 80
NAMES = 24
_TITLES = (("table", "Tables"), ("view", "Views"), ("feature set", "Feature sets"))


def overview(relations: Sequence[RelationWords]) -> None:
    """Print what can be asked: a name and its words a line."""
    for kind, title in _TITLES:
        found = [item for item in relations if item.kind == kind]
        if found:
            typer.echo(f"{title}:")
            for item in found:
                _pair(item.name, _first_sentence(item.words))
            typer.echo("")
    typer.echo("The columns of one of them: cellstore schema NAME")


def relation(relations: Sequence[RelationWords], name: str) -> None:
    """Print one table, view or feature set with its columns.

    Raises:
        UnknownNameError: there is none of that name.
    """
    item = named(relations, name)
    typer.echo(f"{render.cell(item.name)} ({item.kind})")
    typer.echo(_wrapped(item.words, GAP))
    typer.echo("")
    for column in item.columns:
        _pair(column.name, _column(column))
    others = _referring(relations, item.name)
    if others:
        typer.echo(f"\nReferred to by:\n{_wrapped(', '.join(others), GAP)}")


GAP = "  "


def named(relations: Sequence[RelationWords], name: str) -> RelationWords:
    """Return the relation of this name, however its letters are written.

    Raises:
        UnknownNameError: there is none.
    """
    for item in relations:
        if item.name.lower() == name.lower():
            return item
    raise UnknownNameError.of("table", name, [item.name for item in relations])


def _column(column: ColumnWords) -> str:
    marks = ["key"] if column.key else []
    marks += [f"refers to {column.refers_to}"] if column.refers_to else []
    kind = {"TIMESTAMP WITH TIME ZONE": "TIMESTAMPTZ"}.get(column.type, column.type)
    return f"{column.words} [{', '.join([kind, *marks])}]"


def _referring(relations: Iterable[RelationWords], name: str) -> list[str]:
    return [
        f"{item.name}.{column.name}"
        for item in relations
        if item.kind == "table"
        for column in item.columns
        if column.refers_to == f"{name}.id"
    ]


def questions(found: Sequence[SavedQuestion]) -> None:
    """Print the saved questions: a name, its words, and what it takes."""
    for item in found:
        mark = ""
        if item.path is not None:
            mark = " (your own, in place of the one of this name)" if item.replaces else " (yours)"
        _pair(item.name, _first_sentence(item.words) + mark)
    typer.echo("\nAsk one: cellstore ask accuracy. Read one: cellstore ask accuracy --sql")


def parameters(found: Sequence[SavedParameter]) -> None:
    """Print what a saved question takes."""
    for item in found:
        default = "" if item.default is None else f" Default: {item.default}."
        need = " Needed." if item.default is None else default
        _pair(f"--{item.name}", f"{item.words}{need} [{item.kind}]")


def _first_sentence(words: str) -> str:
    head, mark, _ = words.partition(". ")
    return f"{head}." if mark else head


def _pair(name: str, words: str) -> None:
    shown = render.cell(name)
    lines = textwrap.wrap(render.cell(words), WIDTH - NAMES - 2) or [""]
    if len(shown) > NAMES - 2:
        typer.echo(f"{GAP}{shown}")
        shown = ""
    for index, line in enumerate(lines):
        typer.echo(f"{GAP}{shown if index == 0 else '':<{NAMES}}{line}".rstrip())


def _wrapped(words: str, margin: str) -> str:
    return textwrap.fill(render.cell(words), WIDTH, initial_indent=margin, subsequent_indent=margin)
