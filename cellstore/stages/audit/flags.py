"""What quality control held to be odd about an image or a cell, run by run."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...db.models import CellFlag, ImageFlag, Run
from ...terms import Status
from .facts import FlagFact


def image_flags(session: Session, image_id: int) -> tuple[FlagFact, ...]:
    """Return the flags of an image by every finished run."""
    flag = ImageFlag
    query = select(flag).where(flag.image_id == image_id)
    query = query.order_by(flag.run_id, flag.reason, flag.channel)
    return tuple(
        FlagFact(row.run_id, row.reason.value, row.channel or None, row.value, row.low, row.high)
        for row in session.scalars(_finished(query, flag))
    )


def cell_flags(session: Session, cell_id: int) -> tuple[FlagFact, ...]:
    """Return the flags of a cell by every finished run."""
    query = select(CellFlag).where(CellFlag.cell_id == cell_id)
    query = query.order_by(CellFlag.run_id, CellFlag.reason)
    return tuple(
        FlagFact(row.run_id, row.reason.value, None, row.value)
        for row in session.scalars(_finished(query, CellFlag))
    )


def _finished(query: Select[Any], flag: Any) -> Select[Any]:
    return query.join(Run, Run.id == flag.run_id).where(Run.status == Status.DONE)
