"""Inserting many rows, and what SQLite and PostgreSQL spell differently about it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import ARRAY, BigInteger, Select, any_, bindparam, func, select, text, true
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from ..models import METADATA, Base, Run

IN_AT_ONCE = 5_000
"""Values of one ``IN`` list; both databases take more, but not without limit."""

SQLITE_VALUES = 2_000
"""Values in one statement of SQLite."""

WIDE_CACHE_KIB = 160_000

INGEST_LOCK = 0xCE115704E
"""Names the lock under which rows of the outside world are written to PostgreSQL."""

T = TypeVar("T")


def bulk_insert(
    session: Session,
    table: type[Base],
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
) -> None:
    """Insert new ``rows``: statements of many rows on SQLite, COPY on PostgreSQL.

    Values must be what the driver takes as it is: text, numbers, None (an enum is its text; a
    moment is text in ISO format, in UTC).
    """
    if not rows:
        return
    names = ", ".join(f'"{name}"' for name in columns)
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        # Many rows in each statement take half the time of one statement for each.
        marks = f"({', '.join('?' * len(columns))})"
        at_once = max(1, SQLITE_VALUES // len(columns))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            statement = f'INSERT INTO "{table.__tablename__}" ({names}) VALUES '  # noqa: S608
            statement += ", ".join([marks] * len(some))
            connection.exec_driver_sql(statement, tuple(chain.from_iterable(some)))
        return
    if _may_check_together(session):
        _check_references(session, table, columns, rows)
        session.execute(text("SET LOCAL session_replication_role = replica"))
        _copy(session, table, names, rows)
        session.execute(text("SET LOCAL session_replication_role = origin"))
    else:
        _copy(session, table, names, rows)


def _copy(session: Session, table: type[Base], names: str, rows: Sequence[tuple[Any, ...]]) -> None:
    import psycopg

    driver: Any = session.connection().connection.driver_connection
    statement = f'COPY "{table.__tablename__}" ({names}) FROM STDIN'
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except psycopg.Error as error:
        # Made what SQLAlchemy makes of it elsewhere: an IntegrityError, a DataError, ...
        raise DBAPIError.instance(statement, None, error, psycopg.Error) from error


def _may_check_together(session: Session) -> bool:
    """Whether PostgreSQL lets us check foreign keys once for all rows, not again for each.

    Its own check is a query per row, two thirds of the time of a large ingest. To go without needs
    a superuser, or: GRANT SET ON PARAMETER session_replication_role TO ...
    """
    info = session.connection().info
    if "may_check_together" not in info:
        query = text(
            "SELECT current_setting('is_superuser') = 'on' OR "
            "current_setting('server_version_num')::int >= 150000 AND "
            "has_parameter_privilege(current_user, 'session_replication_role', 'SET')"
        )
        info["may_check_together"] = bool(session.scalar(query))
    return bool(info["may_check_together"])


def _check_references(
    session: Session, table: type[Base], columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Do what the foreign keys do: every row that is referred to is there, and stays there.

    Raises:
        IntegrityError: one is not.
    """
    for index, name in enumerate(columns):
        wanted = {row[index] for row in rows} - {None}
        for key in table.__table__.c[name].foreign_keys:
            query = select(key.column).where(
                key.column == any_(bindparam("ids", type_=ARRAY(BigInteger)))
            )
            found = session.execute(
                query.with_for_update(key_share=True, read=True), {"ids": list(wanted)}
            )
            if len(found.all()) != len(wanted):
                error = ValueError(
                    f"{table.__tablename__}.{name} refers to rows that are not there"
                )
                raise IntegrityError(str(query), None, error)
            if key.column.table is Run.__table__:  # as its trigger does, which rests meanwhile
                ended = select(Run.id).where(Run.id.in_(wanted), Run.ended_at.is_not(None))
                if session.scalar(ended.limit(1)) is not None:
                    raise IntegrityError(str(query), None, ValueError("run has ended"))


def insert_new(
    session: Session,
    table: type[Base],
    rows: Sequence[dict[str, Any]] | Select[Any],
    columns: Sequence[str] = (),
) -> None:
    """Insert those ``rows`` whose keys are not there yet.

    They are dictionaries with the same keys each, or a query of values of ``columns``.
    """
    target: Any = table.__table__
    if session.get_bind().dialect.name == "sqlite":
        statement: Any = sqlite.insert(target)
    else:
        from sqlalchemy.dialects import postgresql  # loads slowly

        statement = postgresql.insert(target)
    if isinstance(rows, Select):
        # WHERE true: SQLite cannot tell ON CONFLICT from a join condition without it.
        statement = statement.from_select(list(columns), rows.where(true()))
        session.execute(statement.on_conflict_do_nothing())
    elif rows:
        session.connection().execute(statement.on_conflict_do_nothing(), list(rows))


def take_ids(session: Session, table: type[Base], count: int) -> Sequence[int]:
    """Return ``count`` ids that nobody else will use, ascending.

    On SQLite they follow the largest id that there is or that an event names (its row may be
    deleted, and what is said of it must not be taken for another), so insert their rows before
    taking more; nobody else can write meanwhile. On PostgreSQL they come from the sequence of the
    table.
    """
    if session.get_bind().dialect.name == "sqlite":
        column = table.__table__.c.id
        events = METADATA.tables["events"].c
        named = select(func.max(events.row_id)).where(events.table_name == table.__tablename__)
        last = max(session.scalar(select(func.max(column))) or 0, session.scalar(named) or 0)
        return range(last + 1, last + 1 + count)
    sequence = text(
        "SELECT nextval(pg_get_serial_sequence(:name, 'id')) FROM generate_series(1, :count)"
    )
    values = {"name": table.__tablename__, "count": count}
    return session.scalars(sequence, values).all()


def insert_numbered(
    session: Session, table: type[Base], columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> Sequence[int]:
    """Insert new rows (see :func:`bulk_insert`), without their ids; return these, ascending."""
    ids = take_ids(session, table, len(rows))
    numbered = [(number, *row) for number, row in zip(ids, rows, strict=True)]
    bulk_insert(session, table, ("id", *columns), numbered)
    return ids


@contextmanager
def wide_cache(session: Session) -> Iterator[None]:
    """Let SQLite keep more of its indexes in memory while a great many rows come in.

    Names of files come in an order that is not that of their index; with a small cache its pages
    are written and read again and again, which doubles the time of a million rows.
    """
    if session.get_bind().dialect.name != "sqlite":
        yield
        return
    connection = session.connection()
    usual = connection.exec_driver_sql("PRAGMA cache_size").scalar_one()
    connection.exec_driver_sql(f"PRAGMA cache_size = {-WIDE_CACHE_KIB}")
    try:
        yield
    finally:
        connection.exec_driver_sql(f"PRAGMA cache_size = {int(usual)}")


def one_ingest_at_a_time(session: Session) -> None:
    """Wait for other ingests to end and keep them out until this transaction ends.

    SQLite has one writer anyway.
    """
    if session.get_bind().dialect.name != "sqlite":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": INGEST_LOCK})


def rows_in(
    session: Session, query: Select[*tuple[Any, ...]], column: Any, values: Collection[Any]
) -> list[Any]:
    """Return the rows of a query in which ``column`` has one of ``values``, however many."""
    return [
        row for some in in_lists(values) for row in session.execute(query.where(column.in_(some)))
    ]


def in_lists(values: Collection[T], size: int = IN_AT_ONCE) -> Iterator[list[T]]:
    """Yield ``values`` in pieces that fit an ``IN`` list."""
    items = list(values)
    for start in range(0, len(items), size):
        yield items[start : start + size]
