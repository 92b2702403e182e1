"""The log of a store: which command changed it, who gave it, where, when and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from ..config import RunName
from ..enums import Stage
from ..jobs.lookup import find_plate, find_run, name_of, readable
from ..jobs.workspace import Workspace
from ..models import Event, Image, Plate, Run, Well
from ..notebooks import Shown

SHOWN = 3
"""Changes of a command that are said one by one."""

_SILENT = ({"tables"}, {"removed"})
"""Events that are for ``verify`` alone: a digest of tables, what is taken from a run."""
_UNSAID = ("first_id", "last_id", "ids", "row", "digests", "tables", "removed")


@dataclass(frozen=True)
class EventLog(Shown):
    """The last entries, the newest first; ``more``: there are older ones.

    An entry is what one command did: of a run all that it changed, else one transaction. ``by`` is
    the login on the machine ``host``, ``role`` that of the database (none on SQLite). ``rows``
    counts the events by table, ``changes`` says the last ones of them.
    """

    entries: tuple[dict[str, Any], ...]
    more: bool


def read_log(
    workspace: Workspace, *, plate: str | None = None, run: RunName | None = None, limit: int = 20
) -> EventLog:
    """Return the last ``limit`` commands that changed a store, or a plate, or that a run did."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    with workspace.database.read() as session:
        columns = (Event.created_at, Event.user_name, Event.host, Event.role, Event.command)
        changed = (Event.table_name, Event.row_id, Event.old, Event.new)
        query = select(*columns, Event.run_id, Run.stage, Event.reason, *changed)
        query = query.outerjoin(Run, Run.id == Event.run_id).order_by(Event.id.desc())
        if plate is not None:
            query = query.where(_of_plate(find_plate(session, readable(plate))))
        if run is not None:
            number = find_run(session, run).id
            itself = and_(Event.table_name == "runs", Event.row_id == number)
            query = query.where(or_(Event.run_id == number, itself))
        with session.execute(query.execution_options(yield_per=1_000)) as rows:
            for row in rows:
                if set(row.new or ()) in _SILENT:
                    continue
                key = (row.run_id,) if row.run_id is not None else (row.created_at, *row[1:5])
                if key not in entries:
                    if len(entries) == limit:
                        return EventLog(tuple(entries.values()), more=True)
                    entries[key] = {
                        "at": row.created_at.isoformat(timespec="seconds"),
                        "by": row.user_name,
                        "host": row.host,
                        "role": row.role,
                        "command": row.command,
                        "run_id": row.run_id,
                        "stage": None if row.stage is None else Stage(row.stage).value,
                        "reason": row.reason,
                        "rows": {},
                        "changes": [],
                    }
                entry, table = entries[key], row.table_name
                if table == "runs" and row.row_id == row.run_id and not row.old:
                    continue  # that it began, which the entry says
                entry["rows"][table] = entry["rows"].get(table, 0) + 1
                if len(entry["changes"]) < SHOWN:
                    summary = _summary_of(session, table, row.row_id, row.old, row.new)
                    entry["changes"].insert(0, summary)
    return EventLog(tuple(entries.values()), more=False)


def _of_plate(plate: int) -> Any:
    """The condition on an event that it is about a plate, its wells or its images.

    An event of many new rows has the first and the last of their ids.
    """
    first, last = (Event.new[key].as_integer() for key in ("first_id", "last_id"))
    images = select(Image.id).join(Well, Well.id == Image.well_id).where(Well.plate_id == plate)
    own = (
        ("plates", select(Plate.id).where(Plate.id == plate), Plate.id),
        ("wells", select(Well.id).where(Well.plate_id == plate), Well.id),
        ("images", images, Image.id),
    )
    conditions = []
    for table, ids, key in own:
        among_new = and_(last.is_not(None), ids.where(key.between(first, last)).exists())
        itself = or_(Event.row_id.in_(ids), among_new)
        conditions.append(and_(Event.table_name == table, itself))
    return or_(*conditions)


def _summary_of(
    session: Session,
    table: str,
    row_id: int | None,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any] | None,
) -> str:
    """One event as a sentence."""
    before, after = old or {}, new or {}
    if table == "files":
        return f"wrote {after.get('path')}"
    if "rows" in before and new is None:
        return f"deleted: {before['rows']:,} {table.replace('_', ' ')}"
    if "last_id" in after:
        number = after["last_id"] - after["first_id"] + 1
        more = ", ".join(f"{n} {_text(value)}" for n, value in after.items() if n not in _UNSAID)
        return f"added: {number:,} {table.replace('_', ' ')}" + (f" ({more})" if more else "")
    named = name_of(session, table, row_id)
    if table == "plates" and row_id is None:
        named = "plates that come later"
    names = [n for n in {**before, **after} if n not in _UNSAID and not n.endswith("_id")]
    values = [
        f"{name.replace('_', ' ')} "
        + ("" if old is None else f"{_text(before.get(name))} -> ")
        + _text(after.get(name))
        for name in names
    ]
    return f"{named}: {', '.join(values)}" if values else named


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)
