"""What a store without the triggers of splits could hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, create_engine, text
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


def open_runs(workspace: Workspace) -> None:
    """Let rows come to runs that have ended, from now on: tests make rows as it is easiest."""
    if workspace.database.is_sqlite:
        query = text("SELECT name FROM sqlite_master WHERE name LIKE '%\\_closed' ESCAPE '\\'")
        with workspace.database.read() as session:
            names = session.scalars(query).all()
        statements = [f"DROP TRIGGER {name}" for name in names]
    else:
        statements = [
            f"CREATE OR REPLACE FUNCTION {name}_closed() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RETURN NULL; END'"
            for name in ("runs", "cells")
        ]
    if statements:
        with workspace.database.begin() as session:
            for statement in statements:
                session.execute(text(statement))


@contextmanager
def as_owner(workspace: Workspace) -> Iterator[Connection]:
    """A connection of who owns the database: no trigger and no foreign key stands in the way."""
    engine = workspace.database.engine
    if not workspace.database.is_sqlite:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            yield connection
        return
    engine = create_engine(engine.url)  # a bare one minds no foreign keys
    with engine.begin() as connection:
        query = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        triggers = connection.execute(query).all()
        for row in triggers:
            connection.execute(text(f"DROP TRIGGER {row.name}"))
        yield connection
        for row in triggers:
            connection.exec_driver_sql(row.sql)
    engine.dispose()
