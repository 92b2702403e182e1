"""What people say of plates, wells, images and cells: labels, and that they do not count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..db.bulk import IN_AT_ONCE
from ..db.events import Change, caller
from ..db.fields import is_label_now, stands, table_field
from ..enums import ANNOTATION, AnnotationKind, Level
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import find_cell, find_image, find_plate, find_well, name_of, readable
from ..jobs.workspace import Workspace
from ..models import METADATA, Annotation
from .corrections import (
    LONGEST,
    Correction,
    annotation,
    carry_out,
    concerned,
    images_of_level,
    name_given,
    undoing,
)

Names = str | Sequence[str | int]
"""One name as ``audit`` takes it, or names and ids."""

_FINDERS: dict[Level, Callable[[Session, str], int]] = {
    Level.PLATE: find_plate,
    Level.WELL: find_well,
    Level.IMAGE: find_image,
    Level.CELL: lambda session, number: find_cell(session, number)[0],
}


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
    """
    of = _level_named(level)
    field, who = name_given("field", field), name_given("user", user or caller()[0][:LONGEST])
    wanted = None if label is None else name_given("label", label)

    def act(session: Session) -> tuple[Correction, list[Change]]:
        ids = _rows_named(session, of, names)
        present = _labels(session, of, ids, field, who)
        if wanted is None:
            if not present:
                raise UserInputError(
                    f"{_called(session, of, ids)}: {who} gave no label of the field {field}. See "
                    "all labels: cellstore ask annotations"
                )
            return _take_back(session, list(present.values()), who, reason)
        if table_field(session, field):
            raise UserInputError(
                f"The field {field} is filled by tables. Choose another one, for example: "
                f"--field {ANNOTATION}"
            )
        before = {row_id: row.value for row_id, row in present.items()}
        to_do = [row_id for row_id in ids if before.get(row_id) != wanted]
        more: dict[str, Any] = {"kind": AnnotationKind.LABEL, "field": field, "value": wanted}
        at = datetime.now(UTC)
        new = [annotation(of, row_id, reason, user=who, at=at, **more) for row_id in to_do]
        shown = _shown(session, of, field, {i: (before.get(i), wanted) for i in to_do})
        done = Correction(f"annotate {of.value}", _called(session, of, ids), shown)
        if same := len(ids) - len(to_do):
            done = replace(done, notes=(f"{same} of {len(ids)} had this label already.",))
        return done, _added(session, new, {"level": of.value, "field": field, "label": wanted})

    return carry_out(workspace, reason, dry_run, act, annotating=True)


def set_excluded(
    workspace: Workspace,
    level: str,
    names: Names,
    excluded: bool,
    *,
    user: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Let plates, wells, images or cells count nowhere, with a reason; or let them count again.

    They stay visible. Only what a person excluded can be included again. Of several, those that
    are so already stay as they are.
    """
    of = _level_named(level)
    who = name_given("user", user or caller()[0][:LONGEST])

    def act(session: Session) -> tuple[Correction, list[Change]]:
        ids = _rows_named(session, of, names)
        query = select(Annotation).where(Annotation.level == of, Annotation.row_id.in_(ids))
        query = query.where(Annotation.kind == AnnotationKind.EXCLUSION, stands(Annotation))
        present = {row.row_id: row for row in session.scalars(query.order_by(Annotation.id))}
        to_do = [row_id for row_id in ids if (row_id in present) is not excluded]
        if not to_do:
            called = _called(session, of, ids[:1])
            if excluded:
                why = present[ids[0]].reason
                raise UserInputError(f"{called} is excluded already: {why}.")
            name = ids[0] if of is Level.CELL else called
            raise UserInputError(
                f"Nobody has excluded {called} itself, so there is nothing to include. If it does "
                f"not count, this says why: cellstore audit {of.value} {name}"
            )
        of_cells = to_do if of is Level.CELL else None
        about = concerned(session, images_of_level(of, *to_do), of_cells)
        if excluded:
            why, at = reason and readable(reason), datetime.now(UTC)
            session.add_all(annotation(of, row_id, why, user=who, at=at) for row_id in to_do)
            changes = [_counting(of, row_id, None, why) for row_id in to_do]
            shown = _shown(session, of, "excluded", dict.fromkeys(to_do, (None, why)))
        else:
            done, changes = _take_back(session, [present[i] for i in to_do], who, reason)
            shown = done.changes
        verb = f"{'exclude' if excluded else 'include'} {of.value}"
        same = len(ids) - len(to_do)
        notes = (f"{same} of {len(ids)} stay as they are.",) if same else ()
        return Correction(verb, _called(session, of, to_do), shown, **about, notes=notes), changes

    return carry_out(workspace, reason, dry_run, act, annotating=True)


def _counting(level: Level, row_id: int, old: str | None, new: str | None) -> Change:
    return Change(f"{level.value}s", row_id, {"excluded": old}, {"excluded": new})


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
    at, shown = datetime.now(UTC), list[dict[str, Any]]()
    undone = {row: undoing(row, reason, who, at) for row in rows}
    session.add_all(undone.values())
    excluded = [row for row in rows if row.kind is AnnotationKind.EXCLUSION]
    changes = [_counting(row.level, row.row_id, row.reason, None) for row in excluded]
    labels = [undone[row] for row in rows if row.kind is AnnotationKind.LABEL]
    changes += _added(session, labels, {"undo": len(labels)})
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


def _level_named(level: str) -> Level:
    if level not in list(Level):
        raise UnknownNameError.of("kind", level, [item.value for item in Level])
    return Level(level)


def _rows_named(session: Session, level: Level, names: Names) -> list[int]:
    """The ids of plates, wells, images or cells, each once, in the order of their names."""
    given = [names] if isinstance(names, str) else list(names)
    if not 1 <= len(given) <= IN_AT_ONCE:
        raise UserInputError(f"Name 1 to {IN_AT_ONCE:,} {level.value}s at once.")
    found = list[int]()
    for name in given:
        if isinstance(name, str) and (level is not Level.CELL or not name.strip().isdecimal()):
            found.append(_FINDERS[level](session, readable(name)))
        else:
            found.append(int(name) if len(str(name)) < 19 else -1)
    table = METADATA.tables[f"{level.value}s"].c.id
    there = set(session.scalars(select(table).where(table.in_(set(found)))))
    for name, row_id in zip(given, found, strict=True):
        if row_id not in there:
            if level is Level.CELL:
                find_cell(session, str(name))  # whose error says what a cell is named by
            raise UnknownNameError(f"There is no {level.value} with the id {name}.")
    return list(dict.fromkeys(found))


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
