"""Every table, view and feature set in words: what a row is, and what each column holds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..models import METADATA
from .engine import Questions
from .relations import VIEWS, view
from .source import TABLES


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


def column_words(relation: str, column: str) -> str:
    """Return what a column of a table or view is, in words.

    ``[shared]`` has what is the same in several; the columns of ``cell_table`` that are
    measurements are those of ``features``.
    """
    words = written_words()
    own = words.get(relation, {}).get(column) or words["shared"].get(column)
    return own or words["features"][column]


def described(questions: Questions) -> list[RelationWords]:
    """Return everything that can be asked: tables, views, then the feature sets of this store."""
    tables = [_table(questions, name) for name in TABLES]
    views = [_view(questions, name) for name in VIEWS]
    return [*tables, *views, *_sets(questions)]


def _table(questions: Questions, name: str) -> RelationWords:
    columns = []
    for column, kind in questions.columns(name):
        declared = TABLES[name].columns[column]
        refers = next((key.target_fullname for key in declared.foreign_keys), None)
        words = column_words(name, column)
        columns.append(ColumnWords(column, kind, words, declared.primary_key, refers))
    kind = "table" if name in METADATA.tables else "view"
    return RelationWords(name, kind, written_words()[name]["about"], tuple(columns))


def _view(questions: Questions, name: str) -> RelationWords:
    columns = []
    for column, kind in questions.columns(name):
        # As its name says: image_id refers to images.id.
        table = f"{column.removesuffix('_id')}s"
        refers = f"{table}.id" if column.endswith("_id") and table in TABLES else None
        columns.append(ColumnWords(column, kind, column_words(name, column), refers_to=refers))
    return RelationWords(name, "view", view(name).description, tuple(columns))


def _sets(questions: Questions) -> list[RelationWords]:
    rows = questions.ask_ours("SELECT name, columns FROM feature_sets ORDER BY name").records()
    known = set(questions.names) - {*TABLES, *VIEWS}
    return [_set(questions, row["name"], row["columns"]) for row in rows if row["name"] in known]


def _set(questions: Questions, name: str, described_columns: str) -> RelationWords:
    details = {item["name"]: item for item in json.loads(described_columns)}
    cell = ColumnWords("cell_id", "BIGINT", column_words("features", "cell_id"), True, "cells.id")
    columns = [
        ColumnWords(column, kind, _measured(details.get(column, {})))
        for column, kind in questions.columns(name)
        if column != "cell_id"
    ]
    return RelationWords(name, "feature set", "Measurements: a row is a cell.", (cell, *columns))


def _measured(details: Mapping[str, object]) -> str:
    unit = f"in {details['unit']}" if details.get("unit") else None
    return ", ".join(str(item) for item in (details.get("source"), unit) if item) or "a measurement"


def diagram(relations: Sequence[RelationWords]) -> str:
    """Return the tables and what refers to what, as an entity diagram in Mermaid."""
    lines = ["erDiagram"]
    for item in relations:
        if item.kind != "table":
            continue
        lines.append(f"  {item.name} {{")
        for column in item.columns:
            marks = ["PK"] * column.key + ["FK"] * (column.refers_to is not None)
            kind = column.type.split(" ")[0].lower()
            lines.append(f"    {kind} {column.name} {', '.join(marks)}".rstrip())
        lines.append("  }")
        for column in item.columns:
            if column.refers_to is not None:
                other = column.refers_to.split(".")[0]
                lines.append(f"  {other} ||--o{{ {item.name} : {column.name}")
    return "\n".join(lines)
