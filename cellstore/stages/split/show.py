"""Splits as they stand."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import Image, Run, Split, SplitMember
from ...runs import Workspace, find_split
from ...terms import Subset
from .facts import SplitLine, SplitResult


def show_split(workspace: Workspace, name: str | None = None) -> SplitResult:
    """Return a split as it stands (default: the latest).

    Raises:
        UnknownNameError: there is none of that name.

    """
    with workspace.database.read() as session:
        return result_of(session, find_split(session, name))


def list_splits(workspace: Workspace) -> tuple[SplitLine, ...]:
    """Return all splits, the oldest first."""
    with workspace.database.read() as session:
        runs = select(Run.split_id, func.count()).where(Run.split_id.is_not(None))
        used = dict(session.execute(runs.group_by(Run.split_id)).all())
        splits = session.scalars(select(Split).order_by(Split.id)).all()
        return tuple(_line(session, split, used.get(split.id, 0)) for split in splits)


def _line(session: Session, split: Split, runs: int) -> SplitLine:
    counts = counts_of(session, split.id)
    return SplitLine(
        name=split.name,
        protocol=split.protocol,
        group_level=split.group_level.value,
        field=split.field.value,
        train=counts.get(Subset.TRAIN, 0),
        validation=counts.get(Subset.VALIDATION, 0),
        test=counts.get(Subset.TEST, 0),
        runs=runs,
        frozen=split.frozen_at is not None,
        created_at=split.created_at,
        family=split.family,
        fold=split.fold,
    )


def counts_of(session: Session, split_id: int) -> dict[Subset, int]:
    """Return the images on each side; by the primary key, so only this split's rows are read."""
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    return dict(session.execute(query.group_by(SplitMember.subset)).all())


def result_of(session: Session, split: Split) -> SplitResult:
    """Return what there is to say of a split."""
    found = counts_of(session, split.id)
    mine = SplitMember.split_id == split.id
    classes = select(func.count(SplitMember.label_id.distinct())).where(mine)
    shared = _wells_on_both_sides(session, split.id)
    return SplitResult(
        name=split.name,
        protocol=split.protocol,
        field=split.field.value,
        group_level=split.group_level.value,
        seed=split.seed,
        fingerprint=split.fingerprint,
        created=False,
        frozen=split.frozen_at is not None,
        leaking=shared > 0,
        classes=session.scalar(classes) or 0,
        images=sum(found.values()),
        counts={side.value: found.get(side, 0) for side in Subset},
        wells_on_both_sides=shared,
        left_out=split.left_out,
        query=split.query,
        family=split.family,
        fold=split.fold,
    )


def _wells_on_both_sides(session: Session, split_id: int) -> int:
    shared = (
        select(Image.well_id)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == split_id)
        .group_by(Image.well_id)
        .having(func.count(SplitMember.subset.distinct()) > 1)
    )
    return session.scalar(select(func.count()).select_from(shared.subquery())) or 0
