"""What every model that learns from a split has to know, be it a network or a baseline."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..db.models import Label, Run, SplitMember
from ..terms import Subset
from .flags import check_cells, check_plates, count_unseen, find_qc_run, unseen_note


def training_labels(session: Session, split_id: int) -> dict[str, int]:
    """Return label ids by value, sorted by value: the order of a model's outputs."""
    query = (
        select(Label.value, Label.id)
        .join(SplitMember, SplitMember.label_id == Label.id)
        .where(SplitMember.split_id == split_id, SplitMember.subset == Subset.TRAIN)
        .distinct()
    )
    return dict(sorted(session.execute(query).all()))


def flags_that_count(
    session: Session, reference: str | None, split_id: int, segment_id: int
) -> tuple[Run | None, str | None]:
    """Return the quality-control run whose flags count, and what must be said of it.

    Raises:
        UnknownNameError: there is no such run.
        UserInputError: it has not looked at these plates or these cells.
    """
    if reference is None:
        return None, None
    run = find_qc_run(session, reference)
    members = select(SplitMember.image_id).where(SplitMember.split_id == split_id)
    check_plates(session, run, members)
    check_cells(session, run, segment_id)
    unseen = count_unseen(session, run, members)
    return run, unseen_note(run, unseen) if unseen else None
