"""The few statements that SQLite and PostgreSQL spell differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from .types import Base


def insert_new(
    session: Session, table: type[Base], rows: Sequence[dict[str, Any]], chunk: int = 1000
) -> int:
    """Insert those ``rows`` whose keys are not there yet; return how many were new.

    All rows must have the same columns.
    """
    new = 0
    if not rows:
        return new
    statement = _insert(session, table)
    for start in range(0, len(rows), _fitting(rows, chunk)):
        piece = list(rows[start : start + _fitting(rows, chunk)])
        done: Any = session.execute(statement.values(piece).on_conflict_do_nothing())
        new += done.rowcount
    return new


def insert_from(
    session: Session, table: type[Base], columns: Sequence[str], rows: Select[Any]
) -> None:
    """Insert what the query ``rows`` yields, but for rows whose keys are there already."""
    # WHERE true: SQLite cannot tell ON CONFLICT from a join condition without it.
    statement = _insert(session, table).from_select(list(columns), rows.where(true()))
    session.execute(statement.on_conflict_do_nothing())


def _insert(session: Session, table: type[Base]) -> Any:
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def _fitting(rows: Sequence[dict[str, Any]], chunk: int) -> int:
    # Both databases take at most 32,766 bound values (SQLite's default limit).
    return max(1, min(chunk, 32_000 // max(1, len(rows[0]))))
