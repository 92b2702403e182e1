"""Every table, view and feature set in words: what a row is, and what each column holds."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..models import METADATA
from ..notebooks import Shown
from .engine import Questions
from .source import PROFILES, STEPS, group_of, view_words

_OF_PROFILE = "value of the well; its unit is what the run normalised it to"


@dataclass(frozen=True)
class ColumnWords:
    """A column: ``key`` is part of what names a row, ``refers_to`` is like ``images.id``."""

    name: str
    type: str
    words: str
    key: bool = False
    refers_to: str | None = None


@dataclass(frozen=True)
class RelationWords(Shown):
    """A table, view, feature set, or a step of votes (``kind``); ``words`` say what a row is."""

    name: str
    kind: str
    words: str
    columns: tuple[ColumnWords, ...]


@cache
def written_words() -> dict[str, dict[str, str]]:
    """Return the words of ``schema.toml``: by relation, then by column.

    ``[shared]`` has what is the same in several; the columns of ``cell_table`` that are
    measurements are those of ``features``.
    """
    text = files("cellstore.query").joinpath("schema.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def described(questions: Questions) -> list[RelationWords]:
    """Return everything that can be asked: tables, views, then the feature sets of this store."""
    words, tables = written_words(), METADATA.tables
    rows = questions.ask_ours("SELECT name, columns FROM feature_sets").records()
    sets = {row["name"]: json.loads(row["columns"]) for row in rows}
    groups: dict[str, list[Any]] = {}
    for name, listed in sets.items():
        if group := group_of(name):
            groups.setdefault(group, []).extend(listed)
    measured = groups | sets
    found = []
    for name in [*tables, *(name for name in questions.names if name not in tables)]:
        own = words.get(name, {})
        kind, about = "feature set", "Measurements: a row is a cell."
        if name not in sets:
            about += " The set of this group that was measured last."
        if name in tables:
            kind, about = "table", own["about"]
        elif name not in measured:
            kind = "step" if name in STEPS else "view"
            about = own["about"] if "about" in own else view_words(name)
        details = {item["name"]: item for item in measured.get(name, ())}
        columns = []
        for column, type_ in questions.columns(name):
            key, refers = False, None
            if kind == "table":
                declared = tables[name].columns.get(column)
                if declared is not None:  # else features has it from cells
                    key = declared.primary_key
                    refers = next((key.target_fullname for key in declared.foreign_keys), None)
            elif column.endswith("_id") and f"{column.removesuffix('_id')}s" in tables:
                key = kind == "feature set"
                refers = f"{column.removesuffix('_id')}s.id"  # as its name says
            if kind == "feature set" and column != "cell_id":
                item = details.get(column, {})
                unit = f"in {item['unit']}" if item.get("unit") else None
                parts = [str(part) for part in (item.get("source"), unit) if part]
                text = ", ".join(parts) or "a measurement"
            else:
                text = own.get(column) or words["shared"].get(column) or ""
                if not text:
                    text = _OF_PROFILE if name == PROFILES else words["features"][column]
            columns.append(ColumnWords(column, type_, text, key, refers))
        found.append(RelationWords(name, kind, about, tuple(columns)))
    return found
