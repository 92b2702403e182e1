"""Which plate, well and folder a name of the outside world is in the store; made where new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from ....db.bulk import bulk_insert, in_lists, take_ids
from ....db.models import Folder, Plate, Well
from ....db.statements import insert_new
from ....formats.files.places import PathMap, shown
from ....formats.names import format_well
from ....formats.records import ImageRecord
from ..account import Account

WellKey = tuple[str, int, int]
"""Barcode, row, column."""

MANY_WELLS = 200_000
"""Wells whose ids are remembered; a file that goes on past them asks the database again."""

_WELL = ("id", "plate_id", "row", "column", "name")


class WellIndex:
    """The ids of wells by barcode, row and column."""

    def __init__(self, session: Session, account: Account) -> None:
        self._session = session
        self._account = account
        self._plates: dict[str, int] = {}
        self._wells: dict[WellKey, int] = {}

    def resolve(self, records: Sequence[ImageRecord]) -> tuple[list[int], set[int]]:
        """Return the well of each record, and those wells that were made for it."""
        if len(self._wells) > MANY_WELLS:
            self._wells.clear()
        known = self._wells
        keys = [(record.plate, record.row, record.column) for record in records]
        missing = {key for key in keys if key not in known}
        made: set[int] = set()
        if missing:
            batches = {record.plate: record.batch for record in records}
            self._resolve_plates({key[0]: batches[key[0]] for key in missing})
            self._load(missing)
            made = self._make([key for key in dict.fromkeys(keys) if key not in known])
        return [known[key] for key in keys], made

    def plates_of(self, records: Iterable[ImageRecord]) -> set[int]:
        """Return the plates of records that were resolved."""
        return {self._plates[barcode] for barcode in {record.plate for record in records}}

    def forget(self) -> None:
        """Ask the database again: what was made last was undone."""
        self._plates.clear()
        self._wells.clear()

    def _resolve_plates(self, batches: Mapping[str, str | None]) -> None:
        absent = [barcode for barcode in batches if barcode not in self._plates]
        for some in in_lists(absent):
            for plate in self._session.scalars(select(Plate).where(Plate.barcode.in_(some))):
                self._plates[plate.barcode] = plate.id
                self._complete_batch(plate, batches[plate.barcode])
        self._session.flush()
        new = [barcode for barcode in absent if barcode not in self._plates]
        ids = take_ids(self._session, Plate, len(new))
        rows = [(key, barcode, batches[barcode]) for key, barcode in zip(ids, new, strict=True)]
        bulk_insert(self._session, Plate, ("id", "barcode", "batch"), rows)
        self._plates.update(zip(new, ids, strict=True))

    def _complete_batch(self, plate: Plate, batch: str | None) -> None:
        plate.batch = plate.batch or batch
        if batch is not None and batch != plate.batch:
            detail = f"plate {plate.barcode} is of batch {plate.batch} in the store, {batch} here"
            self._account.problem(None, "another batch", detail)

    def _load(self, keys: Iterable[WellKey]) -> None:
        barcodes = {self._plates[key[0]]: key[0] for key in keys}
        for some in in_lists(barcodes):
            query = select(Well.plate_id, Well.row, Well.column, Well.id)
            for row in self._session.execute(query.where(Well.plate_id.in_(some))):
                self._wells[barcodes[row[0]], row[1], row[2]] = row[3]

    def _make(self, keys: Sequence[WellKey]) -> set[int]:
        ids = take_ids(self._session, Well, len(keys))
        rows = [
            (well, self._plates[barcode], row, column, format_well(row, column))
            for well, (barcode, row, column) in zip(ids, keys, strict=True)
        ]
        bulk_insert(self._session, Well, _WELL, rows)
        self._wells.update(zip(keys, ids, strict=True))
        return set(ids)


class FolderIndex(dict[str | None, int | None]):
    """The ids of folders by what a table calls them, made where new; ``maps`` says where they are.

    A dictionary, because it is asked for every file.
    """

    def __init__(self, session: Session, maps: PathMap) -> None:
        super().__init__({None: None})
        self._session = session
        self._maps = maps

    def __missing__(self, written: str | None) -> int | None:
        """Find or make a folder that was not asked for before."""
        assert written is not None
        self[written] = found = folder_id(self._session, self._maps.apply(written))
        return found

    def uri(self, written: str | None) -> str | None:
        """Return where a folder is here."""
        return None if written is None else self._maps.apply(written)

    def forget(self) -> None:
        """Ask the database again: what was made last was undone."""
        self.clear()
        self[None] = None


def folder_id(session: Session, uri: str) -> int:
    """Return the id of the folder ``uri``, made if it is new. A closing slash means nothing.

    A user, a password or a signature in it are not kept.
    """
    uri = shown(uri).rstrip("/") or "/"
    query = select(Folder.id).where(Folder.uri == uri)
    found = session.scalar(query)
    if found is None:
        insert_new(session, Folder, [{"uri": uri}])
        found = session.scalars(query).one()
    return found
