"""Events: who changed what in the store, from what to what. Rows that no trigger lets change."""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import event, func, insert, inspect, select, text
from sqlalchemy.orm import Session

from ..errors import StoreError
from ..models import (
    Base,
    Event,
    Image,
    ImageFile,
    Perturbation,
    Plate,
    Run,
    Treatment,
    Well,
)
from .session import HARMLESS, Database

_CHAIN_LOCK = 0xE7E4757
"""Names the lock under which events are appended on PostgreSQL; SQLite has one writer anyway."""

_NEW_AFTER = "new_after"
"""Where a session keeps the last id of each table before the run that is recorded."""


@dataclass(frozen=True, slots=True)
class Change:
    """A row that changes: the columns that do, before and after, and their ``line``.

    Without ``row_id``: what is no row. Of several rows: the last id, and the first in ``first_id``
    of ``new`` (they were added) or ``old`` (they were deleted).
    """

    table_name: str
    row_id: int | None
    old: dict[str, Any] | None
    new: dict[str, Any] | None
    line: int | None = None


def record_events(
    session: Session,
    changes: Iterable[Change],
    *,
    run_id: int | None = None,
    reason: str | None = None,
    file: str | None = None,
) -> None:
    """Append an event for each of ``changes``, in the caller's transaction.

    Who made them and with which command is that of the run, if ``run_id`` names one, else of this
    process. Each event has the digest of the one before it in its own, so that none can be changed
    or taken out without notice.
    """
    found = list(changes)
    if not found:
        return
    role = None
    if session.get_bind().dialect.name != "sqlite":
        lock = text("SELECT pg_advisory_xact_lock(:key), current_user")
        role = session.execute(lock, {"key": _CHAIN_LOCK}).one()[1]
    (user_name, command), host = caller(), socket.gethostname()
    if run_id is not None:
        run = session.get_one(Run, run_id)
        user_name, command, host = run.user_name, run.command, run.host
    now = datetime.now(UTC)
    previous = session.scalar(select(Event.sha256).order_by(Event.id.desc()).limit(1))
    rows = []
    for change in found:
        row: dict[str, Any] = {
            "created_at": now,
            "user_name": user_name,
            "host": host[:255],
            "role": role,
            "command": command,
            "run_id": run_id,
            "reason": reason,
            "file": file,
            "line": change.line,
            "table_name": change.table_name,
            "row_id": change.row_id,
            "old": change.old,
            "new": change.new,
        }
        previous, before = event_digest(row, previous), previous
        rows.append({**row, "previous_sha256": before, "sha256": previous})
    session.execute(insert(Event), rows)


def record_files(database: Database, *paths: Path) -> bool:
    """Append an event for files that a command wrote outside the store; whether that went well.

    Who may only read the database may write such files, and nothing is recorded of it.
    """
    changes = [Change("files", None, None, {"path": str(path.resolve())}) for path in paths]
    try:
        with database.begin() as session:
            record_events(session, changes)
    except StoreError:
        return False
    return True


@contextmanager
def recording_new_rows(session: Session, run_id: int) -> Iterator[None]:
    """Record which rows a run adds in a transaction, and what it changes of plates.

    An event for each table, with the first and the last of the new ids: only one ingest writes at
    a time, and an id is never given twice (see ``take_ids``).
    """
    tables: tuple[type[Base], ...] = (Plate, Well, Image, ImageFile, Treatment, Perturbation)
    last_ids = {table: select(func.max(table.__table__.c.id)) for table in tables}
    last = {table: session.scalar(query) or 0 for table, query in last_ids.items()}
    session.info[_NEW_AFTER] = {table.__tablename__: number for table, number in last.items()}
    changes: list[Change] = []

    def note_plates(*_: object) -> None:
        for row in session.dirty:
            if isinstance(row, Plate) and not is_new(session, "plates", row.id):
                history = {item.key.rstrip("_"): item.history for item in inspect(row).attrs}
                values = {
                    name: (item.deleted[0] if item.deleted else None, item.added[0])
                    for name, item in history.items()
                    if name != "wells" and item.added
                }
                old, new = ({k: pair[side] for k, pair in values.items()} for side in (0, 1))
                if new:
                    changes.append(Change("plates", row.id, old, new))

    event.listen(session, "before_flush", note_plates)
    try:
        yield
        session.flush()
    finally:
        event.remove(session, "before_flush", note_plates)
        session.info.pop(_NEW_AFTER)
    for table, before in last.items():
        after = session.scalar(last_ids[table]) or 0
        if after > before:
            new = {"first_id": before + 1, "last_id": after}
            # Their ids may be given again, and what is said of one row is looked up by its id.
            row_id = None if table in (Treatment, Perturbation) else after
            changes.append(Change(table.__tablename__, row_id, None, new))
    record_events(session, changes, run_id=run_id)


def is_new(session: Session, table: str, row_id: int) -> bool:
    """Whether the run that is recorded in this session has added a row."""
    return bool(row_id > session.info.get(_NEW_AFTER, {}).get(table, row_id))


def event_digest(row: dict[str, Any], previous: str | None) -> str:
    """Return the digest of an event and of ``previous``, the digest of the one before it."""
    content = {name: row[name] for name in row if name not in ("id", "created_at", "sha256")}
    content |= {"created_at": row["created_at"].isoformat(), "previous_sha256": previous}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def broken_events(session: Session) -> Iterator[str]:
    """Yield a sentence for each event that is not what was written, or misses the one before."""
    previous = None
    columns = Event.__table__.columns
    query = select(*columns).order_by(Event.id).execution_options(yield_per=10_000)
    for row in session.execute(query).mappings():
        if row["previous_sha256"] != previous:
            yield f"before event {row['id']} an event was taken out or changed"
        if event_digest(dict(row), row["previous_sha256"]) != row["sha256"]:
            yield f"event {row['id']} is not what was written"
        previous = row["sha256"]


def caller() -> tuple[str, str]:
    """Return who runs this process, and the typed command without the passwords of its URLs."""
    try:
        user_name = getpass.getuser()
    except (KeyError, OSError):
        user_name = "unknown"
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    return user_name, shlex.join(without_passwords(word) for word in words)


def without_passwords(word: str) -> str:
    """Return a typed word with the passwords of every URL in it replaced by ``***``.

    In a word that is a URL (or ``--option=URL``) a password may hold spaces and quotes.
    """
    # In a URL inside a longer text (an SQL question), spaces and quotes end the password.
    inner = "" if re.match(r"(-[\w-]+=)?[\w+.-]+://", word) else r"\s'\""
    masked = re.sub(
        rf"([\w+.-]+://[^:/{inner}]*):[^{inner}\0]*@", r"\1:***@", word, flags=re.DOTALL
    )
    masked = re.sub(rf"(?:postgres|sqlite)[\w+.-]*://[^{inner}\0]+", _without_parameters, masked)
    return re.sub(
        rf"([?&][^?&=\s]*(?:pass|pwd|secret|scram|token|key|signature)[^?&=\s]*=)[^&{inner}\0]+",
        r"\1***",
        masked,
        flags=re.IGNORECASE,
    )


def _without_parameters(url: re.Match[str]) -> str:
    """A URL of a database with the values of its parameters hidden, but for harmless ones."""
    return re.sub(
        r"([?&])([^?&=]*)=([^&]+)",
        lambda part: part[0] if part[2].lower() in HARMLESS else f"{part[1]}{part[2]}=***",
        url[0],
    )
