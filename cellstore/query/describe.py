"""Every table, view and feature set in words: what a row is, and what each column holds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .engine import Questions
from .source import TABLES
from .views import views


@dataclass(frozen=True)
class ColumnWords:
    """A column: ``key`` is part of what names a row, ``refers_to`` is like ``images.id``."""

    name: str
    type: str
    words: str
    key: bool = False
    refers_to: str | None = None


@dataclass(frozen=True)
class RelationWords:
    """A table, view or feature set (``kind``); ``words`` say what a row is."""

    name: str
    kind: str
    words: str
    columns: tuple[ColumnWords, ...]


@cache
def written_words() -> dict[str, dict[str, str]]:
    """Return the words of ``schema.toml``: by relation, then by column."""
    text = files("cellstore.query").joinpath("schema.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def described(questions: Questions) -> list[RelationWords]:
    """Return everything that can be asked: tables, views, then the feature sets of this store."""
    tables = [_table(questions, name) for name in TABLES]
    seen = [_view(questions, view.name, view.description) for view in views()]
    return [*tables, *seen, *_sets(questions)]


def _table(questions: Questions, name: str) -> RelationWords:
    keys = {column.name for column in TABLES[name].primary_key}
    columns = tuple(
        ColumnWords(column, kind, column_words(name, column), column in keys, _refers(name, column))
        for column, kind in questions.columns(name)
    )
    return RelationWords(name, "table", written_words()[name]["about"], columns)


def _refers(table: str, column: str) -> str | None:
    keys = TABLES[table].columns[column].foreign_keys
    return next((key.target_fullname for key in keys), None)


def _view(questions: Questions, name: str, words: str) -> RelationWords:
    columns = tuple(
        ColumnWords(column, kind, column_words(name, column), refers_to=_seems(column))
        for column, kind in questions.columns(name)
    )
    return RelationWords(name, "view", words, columns)


def _seems(column: str) -> str | None:
    """Return what a column of a view refers to, as its name says: ``image_id`` to ``images.id``."""
    table = f"{column.removesuffix('_id')}s"
    return f"{table}.id" if column.endswith("_id") and table in TABLES else None


def column_words(relation: str, column: str) -> str:
    """Return what a column of a table or view is, in words."""
    words = written_words()
    return words.get(relation, {}).get(column) or words["shared"][column]


def _sets(questions: Questions) -> list[RelationWords]:
    rows = questions.ask("SELECT name, columns FROM feature_sets ORDER BY name").to_pylist()
    known = set(questions.names) - set(TABLES) - {view.name for view in views()}
    return [_set(questions, row["name"], row["columns"]) for row in rows if row["name"] in known]


def _set(questions: Questions, name: str, described: str) -> RelationWords:
    facts = {item["name"]: item for item in json.loads(described)}
    cell = ColumnWords("cell_id", "BIGINT", column_words("features", "cell_id"), True, "cells.id")
    columns = [
        ColumnWords(column, kind, _measured(facts.get(column, {})))
        for column, kind in questions.columns(name)
        if column != "cell_id"
    ]
    return RelationWords(name, "feature set", "Measurements: a row is a cell.", (cell, *columns))


def _measured(fact: Mapping[str, object]) -> str:
    said = (fact.get("source"), f"in {fact['unit']}" if fact.get("unit") else None)
    return ", ".join(str(item) for item in said if item) or "a measurement"


def diagram(relations: Sequence[RelationWords]) -> str:
    """Return the tables and what refers to what, as an entity diagram in Mermaid."""
    tables = [item for item in relations if item.kind == "table"]
    return "\n".join(["erDiagram", *(line for item in tables for line in _entity(item))])


def _entity(item: RelationWords) -> list[str]:
    lines = [f"  {item.name} {{"]
    for column in item.columns:
        marks = [mark for mark, is_so in (("PK", column.key), ("FK", column.refers_to)) if is_so]
        kind = column.type.split(" ")[0].lower()
        lines.append(f"    {kind} {column.name} {', '.join(marks)}".rstrip())
    lines.append("  }")
    for column in item.columns:
        if column.refers_to is not None:
            other = column.refers_to.split(".")[0]
            lines.append(f"  {other} ||--o{{ {item.name} : {column.name}")
    return lines
