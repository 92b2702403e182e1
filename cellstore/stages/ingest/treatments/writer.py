"""Treatments as rows: found by identity, never changed, and the wells that point to them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, exists, insert, select
from sqlalchemy.orm import Session

from ....db.bulk import in_lists
from ....db.models import Treatment, Well, WellChange
from ....db.statements import insert_new
from ....db.types import Base
from ....formats.records import TreatmentRecord
from ....formats.treatments.tables import completed
from ....ops.compounds import normalised_name
from ....terms import Perturbation

CACHED = 200_000
"""Wells (and treatments) that a writer remembers: some 500 plates."""

READABLE = 255
"""Characters of each part of an identity; a list of targets may be longer than an index takes."""

_FIELDS = tuple(field.name for field in fields(TreatmentRecord))


def identity(record: TreatmentRecord) -> str:
    """Return the natural identity of a treatment: readable, then a digest of all that it says.

    Two treatments that differ in anything (a corrected SMILES, a control type) are two rows.
    """
    parts = (record.kind.value, record.pert_iname, record.identifier, record.target)
    said = json.dumps(astuple(record), ensure_ascii=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:32]
    return "|".join([*((part or "")[:READABLE] for part in parts), digest])


def record_of(row: Treatment) -> TreatmentRecord:
    """Return what a row of table ``treatments`` says."""
    return TreatmentRecord(**{name: getattr(row, name) for name in _FIELDS})


class TreatmentWriter:
    """Finds or makes treatments and points wells to them, in the caller's transaction.

    Made for one ``file`` of one run. It remembers what it has seen of treatments and wells, so it
    must not outlive a transaction that was rolled back.
    """

    def __init__(self, session: Session, run_id: int, file: str) -> None:
        self._session = session
        self._run_id = run_id
        self._file = file
        self._ids: dict[TreatmentRecord, int] = {}
        self._records: dict[int, TreatmentRecord] = {}
        self._wells: dict[int, int | None] = {}
        # What is known and what is said, by object: the treatment that results, None: no news.
        self._compared: dict[tuple[int, int], tuple[TreatmentRecord, TreatmentRecord | None]] = {}
        self.used: set[int] = set()
        """The treatments that the wells have which the file speaks of."""

    def ids(self, records: Iterable[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        """Return the row of each treatment, made where it is new."""
        self._make_room()
        return self._ids_of(set(records))

    def _ids_of(self, wanted: set[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        # Nothing may be forgotten here: what a caller has just looked up is still needed.
        unknown = [record for record in wanted if record not in self._ids]
        self._find_or_make({identity(record): record for record in unknown})
        return {record: self._ids[record] for record in wanted}

    def assign(
        self,
        wanted: Mapping[int, tuple[TreatmentRecord, int | None]],
        new_wells: Container[int],
    ) -> set[int]:
        """Point wells to the treatments that a file gives them; return those that changed.

        ``wanted`` is {well id: (treatment, line of the file)}. A treatment that says less than
        what the well has, or the same, changes nothing; one that says more or other replaces it,
        which table ``well_changes`` records but for ``new_wells``, made in this run.
        """
        self._make_room()
        self._look_up(wanted)
        news = {well: new for well, said in wanted.items() if (new := self._new(well, said[0]))}
        # By object: readers hand the same treatment out again and again, and hashing costs.
        distinct = {id(record): record for record in news.values()}
        ids = self._ids_of(set(distinct.values()))
        rows = {key: ids[record] for key, record in distinct.items()}
        targets = {well: rows[id(record)] for well, record in news.items()}
        self._record_changes(targets, {well: wanted[well][1] for well in targets}, new_wells)
        self._point(targets)
        self.used.update(found for well in wanted if (found := self._wells[well]) is not None)
        return set(targets)

    def _new(self, well_id: int, said: TreatmentRecord) -> TreatmentRecord | None:
        """Return the treatment that a well is to get, or None where it stays."""
        present = self._wells[well_id]
        if present is None:
            return said
        earlier, new = self._compared.get((present, id(said)), (None, None))
        if earlier is not said:
            known = self._records[present]
            complete = completed(said, known)
            new = None if complete == known else complete
            self._compared[present, id(said)] = said, new
        return new

    def _make_room(self) -> None:
        if len(self._wells) > CACHED:
            self._wells.clear()
        if len(self._ids) > CACHED:
            self._ids.clear()
        if len(self._compared) > CACHED:
            self._compared.clear()
        if len(self._records) > CACHED:
            self._records.clear()
            self._wells.clear()

    def _look_up(self, wells: Iterable[int]) -> None:
        unknown = [well for well in wells if well not in self._wells]
        for some in in_lists(unknown):
            query = select(Well.id, Well.treatment_id).where(Well.id.in_(some))
            self._wells.update((row[0], row[1]) for row in self._session.execute(query))
        pointed = {found for well in unknown if (found := self._wells[well]) is not None}
        for ids in in_lists(pointed - self._records.keys()):
            rows = self._session.scalars(select(Treatment).where(Treatment.id.in_(ids)))
            for row in rows:
                self._records[row.id] = record_of(row)

    def _find_or_make(self, records: Mapping[str, TreatmentRecord]) -> None:
        self._find(records)
        new = [_row(key, item) for key, item in records.items() if item not in self._ids]
        if new:
            insert_new(self._session, Treatment, new)
            self._find({row["identity"]: records[row["identity"]] for row in new})

    def _find(self, records: Mapping[str, TreatmentRecord]) -> None:
        for identities in in_lists(list(records)):
            query = select(Treatment.identity, Treatment.id)
            for key, row_id in self._session.execute(
                query.where(Treatment.identity.in_(identities))
            ):
                self._ids[records[key]] = row_id
                self._records[row_id] = records[key]

    def _point(self, targets: Mapping[int, int]) -> None:
        self._wells.update(targets)
        if targets:
            connection = self._session.connection()
            mark = "?" if connection.dialect.name == "sqlite" else "%s"
            statement = f"UPDATE wells SET treatment_id = {mark} WHERE id = {mark}"  # noqa: S608
            # Straight to the driver: of a million images it is a hundred thousand wells.
            rows = [(found, well) for well, found in targets.items()]
            connection.exec_driver_sql(statement, rows)

    def _record_changes(
        self,
        targets: Mapping[int, int],
        lines: Mapping[int, int | None],
        new_wells: Container[int],
    ) -> None:
        rows = [
            {
                "run_id": self._run_id,
                "well_id": well,
                "old_treatment_id": self._wells[well],
                "new_treatment_id": found,
                "file": self._file,
                "line": lines[well],
                "changed_at": datetime.now(UTC),
            }
            for well, found in targets.items()
            if well not in new_wells
        ]
        if rows:
            self._session.connection().execute(insert(_table(WellChange)), rows)


def _row(key: str, record: TreatmentRecord) -> dict[str, Any]:
    return {"identity": key, **asdict(record)}


def _table(model: type[Base]) -> Any:
    return model.__table__


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


_Key = tuple[Perturbation, str]
_Named = Row[Perturbation, str, str | None, str | None]


def _groups(
    session: Session, treatment_ids: Collection[int], key_of: Callable[[_Named], _Key | None]
) -> list[list[str]]:
    """Return the names, sorted, of each key that ``treatment_ids`` have and that has several."""
    names: dict[_Key, set[str]] = defaultdict(set)
    for row in _named(session, treatment_ids):
        if key := key_of(row):
            names[key].add(row.pert_iname)
    for row in session.execute(_NAMED.where(exists().where(Well.treatment_id == Treatment.id))):
        key = key_of(row)
        if key in names:
            names[key].add(row.pert_iname)
    return sorted(sorted(same) for same in names.values() if len(same) > 1)


_NAMED = select(Treatment.kind, Treatment.pert_iname, Treatment.inchikey, Treatment.smiles)


def _named(session: Session, treatment_ids: Collection[int]) -> Iterator[_Named]:
    for some in in_lists(treatment_ids):
        yield from session.execute(_NAMED.where(Treatment.id.in_(some)))


def _by_name(row: _Named) -> _Key | None:
    name = normalised_name(row.pert_iname)
    return (row.kind, name) if name else None


def _by_structure(row: _Named) -> _Key | None:
    structure = row.inchikey or row.smiles
    return (row.kind, structure) if structure else None


def _how_to_merge(names: list[str]) -> str:
    kept, *others = names
    rows = " and ".join(f"{other},{kept}" for other in others)
    return (
        f"{' and '.join(map(repr, names))} look like one. If they are, ingest again with --alias "
        f"FILE, a table with the header alias,name and the row {rows}."
    )
