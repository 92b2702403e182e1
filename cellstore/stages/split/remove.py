"""Delete splits that nothing relies on."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from ...db.models import Run, Split, SplitGroup, SplitMember
from ...errors import UnknownNameError, UserInputError
from ...runs import Workspace
from .facts import Deleted


def find_deletable(workspace: Workspace, name: str) -> Deleted:
    """Return what :func:`delete_split` would delete, without doing it.

    Raises:
        UnknownNameError: there is no split or family of that name.
        UserInputError: a run relies on it.

    """
    with workspace.database.read() as session:
        return _deleted(session, _named(session, name))


def delete_split(workspace: Workspace, name: str) -> Deleted:
    """Delete a split that no run uses, or all folds of a family of that name; all or none.

    Raises:
        UnknownNameError: there is no split or family of that name.
        UserInputError: a run relies on it.

    """
    with workspace.database.begin() as session:
        splits = _named(session, name)
        result = _deleted(session, splits)
        ids = [split.id for split in splits]
        for table in (SplitMember, SplitGroup):
            session.execute(delete(table).where(table.split_id.in_(ids)))
        session.execute(delete(Split).where(Split.id.in_(ids)))
        return result


def _named(session: Session, name: str) -> list[Split]:
    found = list(session.scalars(select(Split).where(Split.name == name)))
    found = found or list(session.scalars(select(Split).where(Split.family == name)))
    if not found:
        known = session.scalars(select(Split.name).order_by(Split.id.desc()))
        raise UnknownNameError.of("split", name, known)
    for split in found:
        _check_unused(session, split)
    return sorted(found, key=lambda split: split.id)


def _check_unused(session: Session, split: Split) -> None:
    runs = session.scalars(select(Run.id).where(Run.split_id == split.id).order_by(Run.id)).all()
    if runs:
        shown = ", ".join(map(str, runs[:5])) + (", ..." if len(runs) > 5 else "")
        who = f"run {shown} relies" if len(runs) == 1 else f"runs {shown} rely"
        raise UserInputError(
            f"The split {split.name!r} stays: {who} on it, and what a network was "
            "trained and tested on must be known as long as the network is."
        )
    if split.frozen_at is not None:
        raise UserInputError(
            f"The split {split.name!r} stays: it was frozen for a run on "
            f"{split.frozen_at:%Y-%m-%d}. Make a new one with: cellstore split create NAME"
        )


def _deleted(session: Session, splits: Sequence[Split]) -> Deleted:
    ids = [split.id for split in splits]
    images = select(func.count()).select_from(SplitMember).where(SplitMember.split_id.in_(ids))
    return Deleted(tuple(split.name for split in splits), session.scalar(images) or 0)
