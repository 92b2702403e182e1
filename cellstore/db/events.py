"""Events: who changed what in the store, from what to what. Rows that no trigger lets change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from ..models import Event, Run

_CHAIN_LOCK = 0xE7E4757
"""Names the lock under which events are appended on PostgreSQL; SQLite has one writer anyway."""


@dataclass(frozen=True, slots=True)
class Change:
    """A row that changes: the columns that do, before and after; ``line`` of the file says so."""

    table_name: str
    row_id: int
    old: dict[str, Any] | None
    new: dict[str, Any] | None
    line: int | None = None


def record_events(
    session: Session,
    changes: Iterable[Change],
    *,
    user_name: str,
    command: str,
    run_id: int | None = None,
    reason: str | None = None,
    file: str | None = None,
) -> None:
    """Append an event for each of ``changes``, in the caller's transaction.

    Each event has the digest of the one before it in its own, so that none can be changed or taken
    out without notice.
    """
    found = list(changes)
    if not found:
        return
    if session.get_bind().dialect.name != "sqlite":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CHAIN_LOCK})
    previous = session.scalar(select(Event.sha256).order_by(Event.id.desc()).limit(1))
    rows = []
    for change in found:
        row: dict[str, Any] = {
            "created_at": datetime.now(UTC),
            "user_name": user_name,
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


def record_run_events(
    session: Session, run_id: int, changes: Iterable[Change], *, file: str | None = None
) -> None:
    """Append events that a run causes; it knows by whom and with which command."""
    found = list(changes)
    if not found:
        return
    run = session.get_one(Run, run_id)
    record_events(
        session, found, user_name=run.user_name, command=run.command, run_id=run_id, file=file
    )


def event_digest(row: dict[str, Any], previous: str | None) -> str:
    """Return the digest of an event and of ``previous``, the digest of the one before it."""
    said = {name: row[name] for name in sorted(row) if name not in ("id", "created_at", "sha256")}
    said |= {"created_at": row["created_at"].isoformat(), "previous_sha256": previous}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
