"""A source that was read before, byte by byte the same: its rows are there already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, literal, select
from sqlalchemy.orm import Session

from ...db.bulk import in_lists
from ...db.models import IngestIssue, Run, Well, WellChange
from ...terms import Severity, Stage, Status
from .account import SHOWN, Account, Issue


@dataclass(frozen=True)
class Earlier:
    """The run that read the source, and what it said of it."""

    run_id: int
    recipe_id: int
    result: dict[str, Any]

    @property
    def rows(self) -> int:
        """How many rows the source has."""
        return int(self.result["rows"])

    @property
    def refused(self) -> int:
        """How many of them cannot be used."""
        return int(self.result["refused"])

    @property
    def plates(self) -> tuple[int, ...]:
        """The plates (ids) that it is about."""
        return tuple(self.result["plates"])


def find_earlier(session: Session, recipe_id: int) -> Earlier | None:
    """Return the last run that read the very same files in the very same way.

    What has been corrected since stays corrected: an old table that is ingested again, by habit or
    by a clock, must not undo it.
    """
    query = select(Run).where(
        Run.recipe_id == recipe_id, Run.stage == Stage.INGEST, Run.status == Status.DONE
    )
    run = session.scalars(query.order_by(Run.id.desc()).limit(1)).first()
    if run is None or run.result is None:
        return None
    return Earlier(run.id, run.recipe_id, run.result)


def corrected_since(session: Session, earlier: Earlier) -> int:
    """Return how many wells of its plates have got another treatment since."""
    query = select(func.count(WellChange.well_id.distinct())).join(Well)
    later = query.where(WellChange.run_id > earlier.run_id)
    return sum(
        session.scalar(later.where(Well.plate_id.in_(some))) or 0
        for some in in_lists(earlier.plates)
    )


def updated_since(session: Session, earlier: Earlier) -> int | None:
    """Return the last run that updated rows of its plates since, by reading another source."""
    query = select(Run.id, Run.result).where(
        Run.stage == Stage.INGEST,
        Run.status == Status.DONE,
        Run.id > earlier.run_id,
        Run.recipe_id != earlier.recipe_id,
    )
    plates = set(earlier.plates)
    found = None
    for run_id, result in session.execute(query.order_by(Run.id)):
        if result and result.get("updated") and plates.intersection(result.get("plates", ())):
            found = run_id
    return found


def repeat_issues(session: Session, earlier: Earlier, account: Account) -> None:
    """Say of this run, too, what was said of the rows of the earlier one."""
    columns = (
        IngestIssue.severity,
        IngestIssue.file,
        IngestIssue.line,
        IngestIssue.reason,
        IngestIssue.detail,
    )
    of_rows = (IngestIssue.run_id == earlier.run_id, IngestIssue.line.is_not(None))
    names = ["run_id", *(column.key for column in columns)]
    copied = select(literal(account.run_id), *columns).where(*of_rows).order_by(IngestIssue.id)
    shown = session.execute(select(*columns).where(*of_rows).order_by(IngestIssue.id).limit(SHOWN))
    account.shown += [Issue(*row) for row in shown]
    counts = select(IngestIssue.severity, IngestIssue.reason, func.count()).where(*of_rows)
    for severity, reason, number in session.execute(
        counts.group_by(IngestIssue.severity, IngestIssue.reason)
    ):
        account.reasons[Severity(severity), reason] += number
    session.execute(insert(IngestIssue).from_select(names, copied))
