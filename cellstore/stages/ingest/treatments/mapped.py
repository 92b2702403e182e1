"""The wells of plates that the store has, treated as plate maps say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from ....config import IngestParams
from ....db.bulk import bulk_insert, in_lists, take_ids
from ....db.models import Plate, Well
from ....errors import UserInputError
from ....formats.files.places import writable
from ....formats.names import format_well
from ....formats.records import TreatmentRecord
from ....formats.treatments.aliases import Aliases
from ....formats.treatments.platemaps import PlateAnnotation, PlateMap, Position, read_annotation
from ..account import Account
from .writer import TreatmentWriter

PLATES_AT_ONCE = 100
"""Plates of one map whose wells are held at a time: 38,400 of 384-well plates."""

_WELL = ("id", "plate_id", "row", "column", "name")
_Wells = dict[tuple[int, Position], tuple[int, int | None]]
"""Well id and treatment id by plate and position."""


class MappedWells:
    """Applies plate maps, in the caller's transaction."""

    def __init__(
        self, session: Session, run_id: int, params: IngestParams, account: Account
    ) -> None:
        self._session = session
        self._run_id = run_id
        self._params = params
        self._account = account
        self._aliases = Aliases.read(params.aliases) if params.aliases else None
        self.treatments: set[int] = set()
        """The treatments that the wells have now of which the maps speak."""

    def ingest(self, source: Path) -> tuple[int, ...]:
        """Point the wells of the plates of the maps in ``source``; return these plates (ids).

        Raises:
            BadTableError: a table cannot be used as a plate map, or what goes with it.
            UserInputError: it is not said which plates a map is for, or the store has none.
        """
        annotation = read_annotation(source, self._params.compounds, self._params.barcodes)
        plates = self._plates(source, annotation)
        self._account.notes += annotation.notes
        self._refuse(annotation)
        for found in annotation.maps.values():
            self._account.rows += len(found.wells)
            self._apply(found, plates.get(found.name, ()))
        return tuple(sorted(plate for some in plates.values() for plate in some))

    def _refuse(self, annotation: PlateAnnotation) -> None:
        """Refuse the rows of maps that cannot be used; those of other tables are problems."""
        maps = {found.path for found in annotation.maps.values()}
        for path, refusal in annotation.issues:
            if path in maps:
                self._account.rows += 1
                self._account.refuse(*refusal, file=writable(path.name))
            else:
                self._account.problem(*refusal, file=writable(path.name))

    def _plates(self, source: Path, annotation: PlateAnnotation) -> Mapping[str, Sequence[int]]:
        """Return the plates (ids) of the store that use each map."""
        barcodes = annotation.barcodes
        if barcodes is None:
            if self._params.plate is None:
                raise UserInputError(
                    f"Which plates is {source.name} for? Say it with --plate NAME, or with "
                    "--barcodes FILE (Assay_Plate_Barcode, Plate_Map_Name)."
                )
            barcodes = {self._params.plate: next(iter(annotation.maps))}
        known = self._known(list(barcodes))
        if not known:
            raise UserInputError(
                f"The store has none of the plates that {source.name} is for "
                f"({', '.join(sorted(barcodes)[:3])}). Ingest their images first."
            )
        return self._by_map(annotation, barcodes, known)

    def _by_map(
        self, annotation: PlateAnnotation, barcodes: Mapping[str, str], known: Mapping[str, int]
    ) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        unmapped: dict[str, list[str]] = defaultdict(list)
        for barcode, plate in known.items():
            name = barcodes[barcode]
            if name in annotation.maps:
                found[name].append(plate)
            else:
                unmapped[name].append(barcode)
        for name, missing in sorted(unmapped.items()):
            detail = f"{', '.join(sorted(missing))} use {name}, which was not given"
            self._account.problem(None, "no such plate map", detail)
        if len(known) < len(barcodes):
            absent = len(barcodes) - len(known)
            self._account.notes.append(f"{absent} of {len(barcodes)} plates are not in the store")
        return found

    def _known(self, barcodes: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for some in in_lists(barcodes):
            query = select(Plate.barcode, Plate.id).where(Plate.barcode.in_(some))
            found.update((row[0], row[1]) for row in self._session.execute(query))
        return found

    def _apply(self, found: PlateMap, plates: Sequence[int]) -> None:
        writer = TreatmentWriter(self._session, self._run_id, writable(found.path.name))
        created: set[Position] = set()
        updated: set[Position] = set()
        pieces = iter(plates)
        while some := list(islice(pieces, PLATES_AT_ONCE)):
            wells = self._wells(some)
            self._note_emptied(found, some, wells)
            made = self._make(found, some, wells)
            changed = writer.assign(self._wanted(found, some, {**wells, **made}), _ids(made))
            created |= {position for _, position in made}
            updated |= {key[1] for key, (well, _) in wells.items() if well in changed}
        if not plates:
            self._account.notes.append(f"no plate of the store uses the plate map {found.name}")
        self.treatments |= writer.used
        self._account.updated += len(updated)
        self._account.created += len(created - updated)
        self._account.unchanged += len(found.wells) - len(created | updated)

    def _wells(self, plates: Sequence[int]) -> _Wells:
        query = select(Well.plate_id, Well.row, Well.column, Well.id, Well.treatment_id)
        rows = self._session.execute(query.where(Well.plate_id.in_(plates)))
        return {(row[0], (row[1], row[2])): (row[3], row[4]) for row in rows}

    def _make(self, found: PlateMap, plates: Sequence[int], wells: _Wells) -> _Wells:
        """Make the wells that have a treatment and are not there."""
        treated = [position for position, record in found.wells.items() if record is not None]
        new = [(plate, at) for plate in plates for at in treated if (plate, at) not in wells]
        ids = take_ids(self._session, Well, len(new))
        rows = [
            (well, plate, *position, format_well(*position))
            for well, (plate, position) in zip(ids, new, strict=True)
        ]
        bulk_insert(self._session, Well, _WELL, rows)
        return {key: (well, None) for key, well in zip(new, ids, strict=True)}

    def _wanted(
        self, found: PlateMap, plates: Sequence[int], wells: _Wells
    ) -> dict[int, tuple[TreatmentRecord, int | None]]:
        return {
            wells[plate, position][0]: (self._named(record), found.lines[position])
            for plate in plates
            for position, record in found.wells.items()
            if record is not None
        }

    def _named(self, record: TreatmentRecord) -> TreatmentRecord:
        return self._aliases.apply(record) if self._aliases else record

    def _note_emptied(self, found: PlateMap, plates: Sequence[int], wells: _Wells) -> None:
        for plate, position in _emptied(found, plates, wells):
            self._account.suspicious(
                found.lines[position],
                "an empty well that has a treatment",
                f"well {format_well(*position)} of plate {self._barcode(plate)} is empty on the "
                "map, and keeps the treatment that it has",
                file=writable(found.path.name),
            )

    def _barcode(self, plate: int) -> str:
        return self._session.get_one(Plate, plate).barcode


def _emptied(
    found: PlateMap, plates: Sequence[int], wells: _Wells
) -> Iterator[tuple[int, Position]]:
    empty = [position for position, record in found.wells.items() if record is None]
    for plate in plates:
        for position in empty:
            if wells.get((plate, position), (0, None))[1] is not None:
                yield plate, position


def _ids(wells: _Wells) -> set[int]:
    return {well for well, _ in wells.values()}
