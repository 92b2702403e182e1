"""What a store without the triggers of splits could hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import text
from sqlalchemy.orm import Session

from cellstore.jobs.workspace import Workspace


@contextmanager
def unguarded(workspace: Workspace) -> Iterator[Session]:
    """A transaction in which no trigger that keeps splits fires."""
    with workspace.database.begin() as session:
        if not workspace.database.is_sqlite:
            session.execute(text("SET LOCAL session_replication_role = replica"))
            yield session
            return
        query = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        triggers = [row for row in session.execute(query).all() if "_keep_" not in row.name]
        for row in triggers:
            session.execute(text(f"DROP TRIGGER {row.name}"))
        yield session
        session.flush()
        for row in triggers:
            session.connection().exec_driver_sql(row.sql)
