"""Plates that a table names, with their batches."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ....db.bulk import in_lists
from ....db.models import Plate
from ....db.statements import insert_new
from ....formats.treatments.jump import PlateRow
from ..account import Account


def write_plates(
    session: Session, rows: Sequence[PlateRow], seen: dict[str, str | None], account: Account
) -> list[int]:
    """Make plates, or set the batch of those that are there; return their ids.

    ``seen`` holds the batch of each plate of the rows before, and is added to: a plate of two
    batches is refused the second time. A changed batch is noted as suspicious.
    """
    known = _batches(session, [row.barcode for row in rows])
    new: dict[str, str | None] = {}
    changed: list[dict[str, str | None]] = []
    for row in rows:
        if row.barcode in seen:
            _seen_before(row, seen[row.barcode], account)
            continue
        seen[row.barcode] = row.batch
        if row.barcode not in known:
            new[row.barcode] = row.batch
            account.created += 1
        elif row.batch in (None, known[row.barcode]):
            account.unchanged += 1
        else:
            _note_change(row, known[row.barcode], account)
            changed.append({"code": row.barcode, "new": row.batch})
    insert_new(session, Plate, [{"barcode": code, "batch": batch} for code, batch in new.items()])
    for item in changed:  # of a whole project some hundred at most
        statement = update(Plate).where(Plate.barcode == item["code"])
        session.execute(statement.values(batch=item["new"]))
    return _ids(session, [row.barcode for row in rows])


def _seen_before(row: PlateRow, batch: str | None, account: Account) -> None:
    if batch == row.batch:
        account.unchanged += 1
    else:
        detail = f"{row.barcode} is of batch {batch} already, not of {row.batch}"
        account.refuse(row.line, "plate twice", detail)


def _note_change(row: PlateRow, old: str | None, account: Account) -> None:
    account.updated += 1
    if old is not None:
        detail = f"{row.barcode}: the batch was {old}, and is {row.batch} now"
        account.suspicious(row.line, "another batch", detail)


def _batches(session: Session, barcodes: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for some in in_lists(barcodes):
        query = select(Plate.barcode, Plate.batch).where(Plate.barcode.in_(some))
        found.update((row[0], row[1]) for row in session.execute(query))
    return found


def _ids(session: Session, barcodes: Sequence[str]) -> list[int]:
    found: list[int] = []
    for some in in_lists(barcodes):
        found += session.scalars(select(Plate.id).where(Plate.barcode.in_(some)))
    return found
