"""Annotations alone: plate maps and tables of treatments or plates, without any image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import ColumnElement, Row, exists, select, update
from sqlalchemy.orm import Session

from ...analysis.leaks import normalised_name
from ...config import IngestParams
from ...db.bulk import bulk_insert, in_lists, take_ids
from ...db.statements import insert_new
from ...enums import Control, PerturbationKind
from ...errors import UserInputError
from ...io.filenames import format_well
from ...io.layouts import Layout
from ...io.platemaps import (
    Aliases,
    PlateAnnotation,
    PlateMap,
    PlateRow,
    Position,
    TreatmentRow,
    completed,
    jump_controls,
    jump_crispr,
    jump_plates,
    read_annotation,
    treatment_rows,
)
from ...io.records import Refusal, TreatmentRecord
from ...io.tables import TextTable, open_table
from ...io.uris import writable
from ...jobs.workspace import Workspace
from ...models import Perturbation, Plate, TreatmentPart, Well
from .account import Account
from .write_treatments import TreatmentWriter, records_of


def write_plates(
    session: Session, rows: Sequence[PlateRow], seen: dict[str, str | None], account: Account
) -> list[int]:
    """Make plates, or set the batch of those that are there; return their ids.

    ``seen`` holds the batch of each plate of the rows before, and is added to: a plate of two
    batches is refused the second time. A changed batch is noted as suspicious.
    """
    known = _plates_batches(session, [row.barcode for row in rows])
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
    return _plates_ids(session, [row.barcode for row in rows])


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


def _plates_batches(session: Session, barcodes: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for some in in_lists(barcodes):
        query = select(Plate.barcode, Plate.batch).where(Plate.barcode.in_(some))
        found.update((row[0], row[1]) for row in session.execute(query))
    return found


def _plates_ids(session: Session, barcodes: Sequence[str]) -> list[int]:
    found: list[int] = []
    for some in in_lists(barcodes):
        found += session.scalars(select(Plate.id).where(Plate.barcode.in_(some)))
    return found


@dataclass(frozen=True)
class Spelling:
    """Names that look like one treatment; ``detail`` says which, and how to make them one."""

    reason: str
    detail: str


def suspicious_spellings(session: Session, treatment_ids: Collection[int]) -> list[Spelling]:
    """Return what looks like two names of one treatment, if ``treatment_ids`` have one of them.

    Compared with all treatments that a well has: names that differ in nothing but case, spaces,
    hyphens or underscores, and two names of one structure. Each group of names comes once.
    """
    spelled = _groups(session, treatment_ids, _by_name)
    built = _groups(session, treatment_ids, _by_structure)
    other = [names for names in built if len({normalised_name(name) for name in names}) > 1]
    return [
        *(Spelling("one name in two spellings", _how_to_merge(names)) for names in spelled),
        *(Spelling("one structure under two names", _how_to_merge(names)) for names in other),
    ]


_WriterKey = tuple[PerturbationKind, str]
_Named = Row[PerturbationKind, str, str | None, str | None]


def _groups(
    session: Session, treatment_ids: Collection[int], key_of: Callable[[_Named], _WriterKey | None]
) -> list[list[str]]:
    """Return the names, sorted, of each key that ``treatment_ids`` have and that has several."""
    names: dict[_WriterKey, set[str]] = defaultdict(set)
    for row in _named(session, treatment_ids):
        if key := key_of(row):
            names[key].add(row.name)
    for row in session.execute(
        _NAMED.where(exists().where(Well.treatment_id == TreatmentPart.treatment_id))
    ):
        key = key_of(row)
        if key in names:
            names[key].add(row.name)
    return sorted(sorted(same) for same in names.values() if len(same) > 1)


_NAMED = (
    select(Perturbation.kind, Perturbation.name, Perturbation.inchikey, Perturbation.smiles)
    .join(TreatmentPart, TreatmentPart.perturbation_id == Perturbation.id)
    .distinct()
)


def _named(session: Session, treatment_ids: Collection[int]) -> Iterator[_Named]:
    for some in in_lists(treatment_ids):
        yield from session.execute(_NAMED.where(TreatmentPart.treatment_id.in_(some)))


def _by_name(row: _Named) -> _WriterKey | None:
    name = normalised_name(row.name)
    return (row.kind, name) if name else None


def _by_structure(row: _Named) -> _WriterKey | None:
    structure = row.inchikey or row.smiles
    return (row.kind, structure) if structure else None


def _how_to_merge(names: list[str]) -> str:
    kept, *others = names
    rows = " and ".join(f"{other},{kept}" for other in others)
    return (
        f"{' and '.join(map(repr, names))} look like one. If they are, ingest again with --alias "
        f"FILE, a table with the header alias,name and the row {rows}."
    )


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
        self._add_controls(known, [record for _, record in said])
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
        complete = record
        if present:
            # A name that is given back finds the perturbation that it had before.
            named = [key for key in present if present[key].pert_iname == record.pert_iname]
            complete = completed(record, present[max(named or present)])
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
            self._add(found, Perturbation.identifier.in_(some))
        names = [item.pert_iname for item in records if item.identifier is None]
        for some in in_lists(names):
            self._add(found, Perturbation.name.in_(some) & Perturbation.identifier.is_(None))
        return found

    def _add_controls(self, known: _Known, said: Sequence[TreatmentRecord]) -> None:
        """Say of each treatment what its wells are; without wells it is what the table says."""
        ids = [key for record in said for key in known[_key(record)]]
        controls: dict[int, set[Control | None]] = defaultdict(set)
        for some in in_lists(ids):
            query = select(Well.treatment_id, Well.control).where(Well.treatment_id.in_(some))
            for treatment, control in self._session.execute(query.distinct()):
                if treatment is not None:
                    controls[treatment].add(control)
        for record in said:
            for key, old in known[_key(record)].items():
                present = controls.get(key, {record.control})
                control = present.pop() if len(present) == 1 else None
                known[_key(record)][key] = replace(old, control=control)

    def _add(self, found: _Known, condition: ColumnElement[bool]) -> None:
        for treatment, record in records_of(self._session, condition).items():
            found[_key(record)][treatment] = record

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


PLATES_AT_ONCE = 100
"""Plates of one map whose wells are held at a time: 38,400 of 384-well plates."""

_WELL = ("id", "plate_id", "well_row", "well_column", "name")
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
        query = select(Well.plate_id, Well.well_row, Well.well_column, Well.id, Well.treatment_id)
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


BATCH = 2_000
"""Rows that are written at a time."""

T = TypeVar("T")

_READERS: Mapping[Layout, Callable[[TextTable], Iterator[TreatmentRow | Refusal]]] = {
    Layout.TREATMENT_TABLE: treatment_rows,
    Layout.JUMP_CRISPR: jump_crispr,
    Layout.JUMP_CONTROLS: jump_controls,
}


def ingest_treatments(
    workspace: Workspace,
    session: Session,
    run_id: int,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
) -> tuple[int, ...]:
    """Bring an annotation into the caller's transaction; return the plates (ids) it speaks of.

    * Plate maps point the wells of plates that the store has to their treatments, and make wells
      that were not there. An empty well, and a map that no plate uses, are unchanged rows.
    * A treatment table makes the treatments that are new, and points wells to those that it
      corrects: the same ``broad_sample`` (or JCP2022), and other or more values. A value that
      the table leaves open stays as it is.
    * JUMP's table of plates makes plates, and sets the batch of those that are there.

    Raises:
        BadTableError: a table lacks columns, or tables do not fit each other.
        UserInputError: it is not said which plates a map is for, or none of them is in the store.
    """
    with _progress(workspace):
        if layout is Layout.PLATEMAP:
            mapped = MappedWells(session, run_id, params, account)
            plates = mapped.ingest(source)
            _note_spellings(session, mapped.treatments, account)
            return plates
        table = open_table(source)
        account.notes += table.notes
        if layout is Layout.JUMP_PLATES:
            return _plates(workspace, session, table, account)
        _treatments(workspace, session, run_id, table, layout, params, account)
    return ()


@contextmanager
def _progress(workspace: Workspace) -> Iterator[None]:
    workspace.progress.start("ingest", 0)
    try:
        yield
    finally:
        workspace.progress.finish()


def _plates(
    workspace: Workspace, session: Session, table: TextTable, account: Account
) -> tuple[int, ...]:
    found: list[int] = []
    seen: dict[str, str | None] = {}
    for batch in _batches(jump_plates(table)):
        rows = list(_usable(batch, account))
        found += write_plates(session, rows, seen, account)
        _advance(workspace, session, account, len(batch))
    return tuple(found)


def _treatments(
    workspace: Workspace,
    session: Session,
    run_id: int,
    table: TextTable,
    layout: Layout,
    params: IngestParams,
    account: Account,
) -> None:
    if layout not in _READERS:
        raise UserInputError(f"{layout.value} is no layout of treatments. Choose another --layout.")
    aliases = Aliases.read(params.aliases) if params.aliases else None
    corrections = Corrections(session, run_id, account, aliases)
    for batch in _batches(_READERS[layout](table)):
        corrections.write(list(_usable(batch, account)))
        _advance(workspace, session, account, len(batch))
    _note_spellings(session, corrections.treatments, account)


def _usable(batch: Sequence[T | Refusal], account: Account) -> Iterator[T]:
    """Yield the rows that can be used; count all of them, and refuse the others."""
    account.rows += len(batch)
    for row in batch:
        if isinstance(row, Refusal):
            account.refuse(row.line, row.reason, row.detail)
        else:
            yield row


def _advance(workspace: Workspace, session: Session, account: Account, rows: int) -> None:
    # Under --strict the whole file is undone, and its issues are written anew.
    account.flush(session)
    workspace.progress.advance(rows)


def _note_spellings(session: Session, treatments: set[int], account: Account) -> None:
    for spelling in suspicious_spellings(session, treatments):
        account.suspicious(None, spelling.reason, spelling.detail)
    account.flush(session)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
