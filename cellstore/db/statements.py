"""The few statements that SQLite and PostgreSQL spell differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ..models import Base


def insert_new(session: Session, table: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert those ``rows`` whose keys are not there yet.

    All rows must have the same columns.
    """
    if rows:
        statement = _insert(session, table).on_conflict_do_nothing()
        session.connection().execute(statement, list(rows))


def insert_from(
    session: Session, table: type[Base], columns: Sequence[str], rows: Select[Any]
) -> None:
    """Insert what the query ``rows`` yields, but for rows whose keys are there already."""
    # WHERE true: SQLite cannot tell ON CONFLICT from a join condition without it.
    statement = _insert(session, table).from_select(list(columns), rows.where(true()))
    session.execute(statement.on_conflict_do_nothing())


def _insert(session: Session, table: type[Base]) -> Any:
    target: Any = table.__table__
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(target)
    return postgresql.insert(target)
