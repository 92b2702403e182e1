"""What people say of plates, wells, images and cells: labels, and taking back what was said."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..db.bulk import IN_AT_ONCE
from ..db.events import Change, caller
from ..db.fields import is_label_now, stands, table_field
from ..enums import ANNOTATION, AnnotationKind, Level
from ..errors import UserInputError
from ..jobs.workspace import Workspace
from ..models import Annotation
from .corrections import (
    LONGEST,
    Correction,
    Names,
    annotation,
    carry_out,
    level_named,
    name_given,
    name_of,
    rows_named,
    undoing,
)


def annotate(
    workspace: Workspace,
    level: str,
    names: Names,
    label: str | None,
    *,
    field: str = ANNOTATION,
    user: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Give a label to plates, wells, images or cells; without ``label`` take one's last back.

    Each person (``user``, if not who runs this process) has a label of their own for the same
    thing and field; the last one counts, and once it is taken back, the one before it. What has
    the label already stays as it is.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: the label, field or user is no name, tables fill the field, or there is
            nothing to take back.
    """
    of = level_named(level)
    field, who = name_given("field", field), name_given("user", user or caller()[0][:LONGEST])
    said = None if label is None else name_given("label", label)

    def act(session: Session) -> tuple[Correction, list[Change]]:
        ids = rows_named(session, of, names)
        present = _labels(session, of, ids, field, who)
        if said is None:
            if not present:
                raise UserInputError(
                    f"{_called(session, of, ids)}: {who} gave no label of the field {field}. See "
                    "all labels: cellstore annotate --list"
                )
            return _take_back(session, list(present.values()), who, reason)
        if table_field(session, field):
            raise UserInputError(
                f"The field {field} is filled by tables. Choose another one, for example: "
                f"--field {ANNOTATION}"
            )
        before = {row_id: row.value for row_id, row in present.items()}
        to_do = [row_id for row_id in ids if before.get(row_id) != said]
        more: dict[str, Any] = {"kind": AnnotationKind.LABEL, "field": field, "value": said}
        at = datetime.now(UTC)
        new = [annotation(of, row_id, reason, user=who, at=at, **more) for row_id in to_do]
        shown = _shown(session, of, field, {i: (before.get(i), said) for i in to_do})
        done = Correction(f"annotate {of.value}", _called(session, of, ids), shown)
        if same := len(ids) - len(to_do):
            done = replace(done, notes=(f"{same} of {len(ids)} had this label already.",))
        return done, _added(session, new, {"level": of.value, "field": field, "label": said})

    return carry_out(workspace, reason, dry_run, act, annotating=True)


def undo_annotations(
    workspace: Workspace,
    ids: Collection[int] | None = None,
    *,
    user: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Take rows of ``annotations`` back, labels and exclusions; without ``ids`` one's last ones.

    These are what a person (``user``, if not who runs this process) said last in one go, and has
    not taken back.

    Raises:
        UserInputError: there is nothing to take back.
    """
    who = name_given("user", user or caller()[0][:LONGEST])

    def act(session: Session) -> tuple[Correction, list[Change]]:
        standing = select(Annotation).where(stands(Annotation)).order_by(Annotation.id)
        if ids is None:
            mine = standing.where(Annotation.user_name == who)
            last = session.scalar(mine.order_by(None).order_by(Annotation.id.desc()).limit(1))
            if last is None:
                raise UserInputError(f"{who} has given no label that could be taken back.")
            mine = mine.where(Annotation.created_at == last.created_at)
            rows = session.scalars(mine.where(Annotation.id > last.id - IN_AT_ONCE)).all()
        else:
            if len(ids) > IN_AT_ONCE:
                raise UserInputError(f"Take back at most {IN_AT_ONCE:,} at once.")
            rows = session.scalars(standing.where(Annotation.id.in_(ids))).all()
        if not rows:
            raise UserInputError("Nothing to take back: that was taken back already.")
        return _take_back(session, rows, who, reason)

    return carry_out(workspace, reason, dry_run, act, annotating=True)


def _take_back(
    session: Session, rows: Sequence[Annotation], who: str, reason: str | None
) -> tuple[Correction, list[Change]]:
    at, changes, shown = datetime.now(UTC), list[Change](), list[dict[str, Any]]()
    excluded = [row for row in rows if row.kind is AnnotationKind.EXCLUSION]
    changes += (
        Change(f"{row.level.value}s", row.row_id, {"excluded": row.reason}, {"excluded": None})
        for row in excluded
    )
    changes += _added(session, [undoing(row, reason, who, at) for row in rows], {"undo": len(rows)})
    groups: dict[tuple[Level, str | None, str], dict[int, Annotation]] = {}
    for row in rows:
        groups.setdefault((row.level, row.field, row.user_name), {})[row.row_id] = row
    for (level, field, author), some in groups.items():
        now = _labels(session, level, list(some), field, author) if field else {}
        pairs: dict[int, Pair] = {
            i: (row.value if field else row.reason, now[i].value if i in now else None)
            for i, row in some.items()
        }
        shown += _shown(session, level, field or "excluded", pairs)
    name = shown[0]["name"] if len(shown) == 1 else f"{len(rows)} annotations"
    return Correction("take back", name, tuple(shown)), changes


Pair = tuple[str | None, str | None]
"""What was said of something before, and what is now."""


def _shown(
    session: Session, level: Level, field: str, pairs: Mapping[int, Pair]
) -> tuple[dict[str, Any], ...]:
    """The changes as people see them: together those that are the same."""
    alike: dict[Pair, list[int]] = {}
    for row_id, pair in pairs.items():
        alike.setdefault(pair, []).append(row_id)
    return tuple(
        {"name": _called(session, level, some), "old": {field: old}, "new": {field: new}}
        for (old, new), some in alike.items()
    )


def _called(session: Session, level: Level, ids: Sequence[int]) -> str:
    table = f"{level.value}s"
    return name_of(session, table, ids[0]) if len(ids) == 1 else f"{len(ids):,} {table}"


def _labels(
    session: Session, level: Level, ids: Sequence[int], field: str, who: str
) -> dict[int, Annotation]:
    """What a person's labels of these rows are now, by their ids."""
    query = select(Annotation).where(Annotation.level == level, Annotation.row_id.in_(ids))
    query = query.where(Annotation.field == field, Annotation.user_name == who)
    return {row.row_id: row for row in session.scalars(query.where(is_label_now(Annotation)))}


def _added(session: Session, rows: Sequence[Annotation], new: dict[str, Any]) -> list[Change]:
    """Add rows; return the event of them all."""
    session.add_all(rows)
    session.flush()
    if not rows:
        return []
    ids = [row.id for row in rows]
    return [
        Change("annotations", max(ids), None, {"first_id": min(ids), "last_id": max(ids), **new})
    ]
