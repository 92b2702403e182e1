"""A table of treatments, against the treatments that the store has of the same samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from ....db.bulk import in_lists
from ....db.models import Treatment, Well
from ....formats.records import TreatmentRecord
from ....formats.treatments.aliases import Aliases
from ....formats.treatments.tables import TreatmentRow, completed
from ..account import Account
from .writer import TreatmentWriter, record_of

WELLS_AT_ONCE = 20_000
"""Wells that are pointed elsewhere at a time: a control may be in a million."""

_Key = tuple[str, ...]
"""What names a sample: its identifier, else its kind and name."""

_Known = dict[_Key, dict[int, TreatmentRecord]]
"""Treatments by id that the store has of each sample, the oldest first."""


class Corrections:
    """Makes new treatments, and points the wells of corrected ones to what they are now."""

    def __init__(
        self, session: Session, run_id: int, account: Account, aliases: Aliases | None
    ) -> None:
        self._session = session
        self._account = account
        self._aliases = aliases
        self._writer = TreatmentWriter(session, run_id, account.file)
        self._seen: dict[_Key, int] = {}
        self.treatments: set[int] = set()
        """The treatments that the table speaks of."""

    def write(self, rows: Sequence[TreatmentRow]) -> None:
        """Bring rows in; one that says something else of a sample than an earlier is refused."""
        said = list(self._first_said(rows))
        known = self._load([record for _, record in said])
        corrected = {
            treatment: (record, line)
            for line, record in said
            for treatment, old in known[_key(record)].items()
            if completed(record, old) != old
        }
        moved = self._point(corrected)
        wanted = [self._counted(record, known[_key(record)], moved) for _, record in said]
        self.treatments.update(self._writer.ids(wanted).values())

    def _first_said(self, rows: Sequence[TreatmentRow]) -> Iterator[tuple[int, TreatmentRecord]]:
        for line, given in rows:
            if given is None:
                self._account.unchanged += 1
                continue
            record = self._aliases.apply(given) if self._aliases else given
            key, said = _key(record), hash(record)
            if key not in self._seen:
                self._seen[key] = said
                yield line, record
            elif self._seen[key] == said:
                self._account.unchanged += 1
            else:
                detail = f"{record.identifier or record.pert_iname} is described otherwise before"
                self._account.refuse(line, "broad_sample twice", detail)

    def _counted(
        self, record: TreatmentRecord, present: Mapping[int, TreatmentRecord], moved: set[int]
    ) -> TreatmentRecord:
        """Return the treatment as it is to be now, and count what that means."""
        complete = completed(record, present[max(present)]) if present else record
        if not present:
            self._account.created += 1
        elif complete in present.values() and not moved & present.keys():
            self._account.unchanged += 1
        else:
            self._account.updated += 1
        return complete

    def _load(self, records: Sequence[TreatmentRecord]) -> _Known:
        found: _Known = defaultdict(dict)
        identifiers = [item.identifier for item in records if item.identifier is not None]
        for some in in_lists(identifiers):
            self._add(found, Treatment.identifier.in_(some))
        names = [item.pert_iname for item in records if item.identifier is None]
        for some in in_lists(names):
            self._add(found, Treatment.pert_iname.in_(some) & Treatment.identifier.is_(None))
        return found

    def _add(self, found: _Known, condition: ColumnElement[bool]) -> None:
        for row in self._session.scalars(select(Treatment).where(condition)):
            record = record_of(row)
            found[_key(record)][row.id] = record

    def _point(self, corrected: Mapping[int, tuple[TreatmentRecord, int | None]]) -> set[int]:
        """Point wells to corrected treatments; return the treatments that they had."""
        moved: set[int] = set()
        for some in in_lists(corrected):
            for wells in self._wells(some):
                said = {well: corrected[old] for well, old in wells.items()}
                moved |= {wells[well] for well in self._writer.assign(said, ())}
        return moved

    def _wells(self, treatments: Sequence[int]) -> Iterator[dict[int, int]]:
        """Yield the wells of some treatments, in pieces by id: what changes meanwhile is past."""
        last = 0
        while True:
            query = (
                select(Well.id, Well.treatment_id)
                .where(Well.treatment_id.in_(treatments), Well.id > last)
                .order_by(Well.id)
                .limit(WELLS_AT_ONCE)
            )
            found = {row[0]: row[1] for row in self._session.execute(query) if row[1] is not None}
            if not found:
                return
            yield found
            last = max(found)


def _key(record: TreatmentRecord) -> _Key:
    if record.identifier is not None:
        return (record.identifier,)
    return record.kind.value, record.pert_iname
