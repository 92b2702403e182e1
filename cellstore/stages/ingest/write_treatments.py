"""Treatments of wells: made where they are new, given to wells, with an event per change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from ...db.bulk import in_lists, insert_new
from ...db.events import Change, record_run_events
from ...enums import Control, PerturbationKind
from ...io.doses import dose_text, normalised_dose
from ...io.platemaps import completed
from ...io.records import TreatmentRecord
from ...models import Perturbation, Treatment, TreatmentPart, Well

CACHED = 200_000
"""Wells (and treatments) that a writer remembers: some 500 plates."""

READABLE = 500
"""Characters of an identity that people can read; all that it says is in the digest after them."""

DESCRIBED = ("target", "inchikey", "smiles", "pubchem_cid")
"""What tables say of a perturbation beyond what names it; a later table may say it otherwise."""


class PerturbationKey(NamedTuple):
    """What names a perturbation."""

    kind: PerturbationKind
    name: str
    identifier: str | None


class Part(NamedTuple):
    """A perturbation with its dose: normalised, and as it was written."""

    perturbation: PerturbationKey
    dose: float | None = None
    unit: str | None = None
    original: str | None = None

    @classmethod
    def of(cls, key: PerturbationKey, dose: float | None, unit: str | None) -> Part:
        """Return a part whose dose was written as ``dose`` and ``unit``."""
        if dose is None:
            return cls(key)
        return cls(key, *normalised_dose(dose, unit), dose_text(dose, unit))


def treatment_values(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the row of table ``treatments`` for ``parts``, without its target.

    Neither the order of the parts nor the unit of a dose matters: ``5 uM`` and ``5000 nM`` of the
    same perturbation are one treatment.
    """
    ordered = sorted(
        parts,
        key=lambda part: (
            [key or "" for key in part.perturbation],
            part.unit or "",
            part.dose or 0.0,
        ),
    )
    names = [part.perturbation.name for part in ordered]
    doses = [dose_text(part.dose, part.unit) for part in ordered]
    keys = [[key or "" for key in part.perturbation] for part in ordered]
    dosed = list(zip(keys, doses, strict=True))
    readable = " + ".join("|".join([*key, dose]).rstrip("|") for key, dose in dosed)
    digest = hashlib.sha256(json.dumps(dosed).encode()).hexdigest()[:32]
    return {
        "identity": f"{readable[:READABLE]}#{digest}",
        "name": " + ".join(names),
        "name_with_dose": " + ".join(
            f"{name} {dose}" if dose else name for name, dose in zip(names, doses, strict=True)
        ),
        # 63 bits of a digest: a whole number that every database takes.
        "perturbations_key": int.from_bytes(
            hashlib.sha256(json.dumps(keys).encode()).digest()[:8], "big"
        )
        >> 1,
    }


def records_of(session: Session, condition: ColumnElement[bool]) -> dict[int, TreatmentRecord]:
    """Return by id what the treatments of one perturbation that meet ``condition`` say.

    The condition is about ``treatments``, ``treatment_parts`` and ``perturbations``.
    """
    query = (
        select(TreatmentPart.treatment_id, Perturbation)
        .join(Treatment, Treatment.id == TreatmentPart.treatment_id)
        .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
        .where(condition)
    )
    found: dict[int, TreatmentRecord] = {}
    several: set[int] = set()
    for treatment, row in session.execute(query):
        if treatment in found:
            several.add(treatment)
        found[treatment] = TreatmentRecord(
            row.kind,
            row.name,
            identifier=row.identifier,
            **{name: getattr(row, name) for name in DESCRIBED},
        )
    return {key: record for key, record in found.items() if key not in several}


class TreatmentWriter:
    """Finds or makes treatments and points wells to them, in the caller's transaction.

    Made for one ``file`` of one run. It remembers what it has seen of treatments and wells, so it
    must not outlive a transaction that was rolled back.
    """

    def __init__(self, session: Session, run_id: int, file: str) -> None:
        self._session = session
        self._run_id = run_id
        self._file = file
        self._perturbations: dict[PerturbationKey, Perturbation] = {}
        self._treatments: dict[PerturbationKey, int] = {}
        self._records: dict[int, TreatmentRecord] = {}
        self._wells: dict[int, tuple[int | None, Control | None]] = {}
        self._said: dict[tuple[PerturbationKey, str], str] = {}
        self._corrected: set[PerturbationKey] = set()
        self.used: set[int] = set()
        """The treatments that the wells have which the file speaks of."""
        self.disagreements: dict[PerturbationKey, tuple[int | None, str]] = {}
        """Perturbations of which the file says two things: where, and what. The first counts."""

    def ids(self, records: Iterable[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        """Return the row of each treatment, made where it is new and corrected where it is not."""
        self._make_room()
        found = list(records)
        self._find_or_make([(record, record, None) for record in found])
        return {record: self._treatments[_key(record)] for record in found}

    def assign(
        self,
        wanted: Mapping[int, tuple[TreatmentRecord, int | None]],
        new_wells: Container[int],
    ) -> set[int]:
        """Point wells to the treatments that a file gives them; return those that changed.

        ``wanted`` is {well id: (treatment, line of the file)}. What a table leaves open stays as
        it is. What it says otherwise of the same perturbation corrects the perturbation; another
        perturbation, or another control, is given to the well. Both are events, but for
        ``new_wells``, made in this run.
        """
        self._make_room()
        self._look_up(wanted)
        # By object: readers hand the same treatment out again and again, and hashing costs.
        cases: dict[tuple[int | None, Control | None, int], TreatmentRecord] = {}
        entries = []
        for well, (said, line) in wanted.items():
            case = (*self._wells[well], id(said))
            if case not in cases:
                cases[case] = self._completed(said, *self._wells[well])
                entries.append((said, cases[case], line))
        self._find_or_make(entries)
        targets: dict[int, tuple[int, Control | None]] = {}
        changed: set[int] = set()
        for well, (said, _) in wanted.items():
            present, control = self._wells[well]
            result = cases[present, control, id(said)]
            key = _key(result)
            known = None if present is None else self._records.get(present)
            # A dose that a well has stays where a table says the perturbation alone.
            same = present is not None and known is not None and _key(known) == key
            target = present if same and present is not None else self._treatments[key]
            if (target, result.control) != (present, control):
                targets[well] = target, result.control
                changed.add(well)
            elif key in self._corrected and well not in new_wells:
                changed.add(well)
        lines = {well: wanted[well][1] for well in targets if well not in new_wells}
        self._point(targets, lines)
        self.used.update(found for well in wanted if (found := self._wells[well][0]) is not None)
        return changed

    def _completed(
        self, said: TreatmentRecord, treatment: int | None, control: Control | None
    ) -> TreatmentRecord:
        known = None if treatment is None else self._records.get(treatment)
        return said if known is None else completed(said, replace(known, control=control))

    def _make_room(self) -> None:
        # All at once: they are looked up together.
        caches = (self._wells, self._records, self._treatments, self._perturbations)
        if any(len(cache) > CACHED for cache in caches):
            for cache in caches:
                cache.clear()

    def _look_up(self, wells: Iterable[int]) -> None:
        unknown = [well for well in wells if well not in self._wells]
        for some in in_lists(unknown):
            query = select(Well.id, Well.treatment_id, Well.control).where(Well.id.in_(some))
            for well, treatment, control in self._session.execute(query):
                self._wells[well] = treatment, control
        pointed = {found for well in unknown if (found := self._wells[well][0]) is not None}
        for ids in in_lists(pointed - self._records.keys()):
            self._records |= records_of(self._session, Treatment.id.in_(ids))

    def _find_or_make(
        self, entries: Sequence[tuple[TreatmentRecord, TreatmentRecord, int | None]]
    ) -> None:
        """Make what is new of (what is said, the same completed, line); correct what is not."""
        full: dict[PerturbationKey, TreatmentRecord] = {}
        for _, record, _ in entries:
            full.setdefault(_key(record), record)
        unknown = {key: record for key, record in full.items() if key not in self._perturbations}
        self._find(unknown)
        new = {key: item for key, item in unknown.items() if key not in self._perturbations}
        rows = [
            key._asdict() | {name: getattr(record, name) for name in DESCRIBED}
            for key, record in new.items()
        ]
        insert_new(self._session, Perturbation, rows)
        self._find(new)
        changes = [
            change
            for said, record, line in entries
            if (change := self._correct(_key(record), said, line)) is not None
        ]
        record_run_events(self._session, self._run_id, changes, file=self._file)
        self._find_treatments([key for key in full if key not in self._treatments])

    def _find(self, keys: Iterable[PerturbationKey]) -> None:
        wanted = set(keys)
        for names in in_lists({key.name for key in wanted}):
            query = select(Perturbation).where(Perturbation.name.in_(names))
            for row in self._session.scalars(query):
                key = PerturbationKey(row.kind, row.name, row.identifier)
                if key in wanted:
                    self._perturbations[key] = row

    def _correct(
        self, key: PerturbationKey, said: TreatmentRecord, line: int | None
    ) -> Change | None:
        """Take over what a table says of a perturbation; the first that a file says counts."""
        row = self._perturbations[key]
        new: dict[str, Any] = {}
        for name in DESCRIBED:
            value = getattr(said, name)
            if value is None:
                continue
            first = self._said.setdefault((key, name), value)
            if first != value:
                detail = f"{key.name}: {name} is {first}, and {value} on another line"
                self.disagreements.setdefault(key, (line, detail))
            elif value != getattr(row, name):
                new[name] = value
        if not new:
            return None
        old = {name: getattr(row, name) for name in new}
        for name, value in new.items():
            setattr(row, name, value)
        self._session.flush()
        self._corrected.add(key)
        treatments = Treatment.parts.any(TreatmentPart.perturbation_id == row.id)
        self._records |= records_of(self._session, treatments)
        if "target" in new:
            for treatment in self._session.scalars(select(Treatment).where(treatments)):
                treatment.target = targets_of([part.perturbation for part in treatment.parts])
        return Change("perturbations", row.id, old, new, line)

    def _find_treatments(self, keys: Sequence[PerturbationKey]) -> None:
        """Find or make the treatments of one perturbation without dose."""
        rows = {key: treatment_values([Part(key)]) for key in keys}
        by_identity = {row["identity"]: key for key, row in rows.items()}

        def find() -> None:
            for some in in_lists(by_identity):
                query = select(Treatment.identity, Treatment.id)
                for text, number in self._session.execute(
                    query.where(Treatment.identity.in_(some))
                ):
                    self._treatments[by_identity[text]] = number

        find()
        new = [key for key in keys if key not in self._treatments]
        if new:
            values = [rows[key] | {"target": self._perturbations[key].target} for key in new]
            insert_new(self._session, Treatment, values)
            find()
            parts = [
                {
                    "treatment_id": self._treatments[key],
                    "position": 1,
                    "perturbation_id": self._perturbations[key].id,
                }
                for key in new
            ]
            insert_new(self._session, TreatmentPart, parts)
        missing = [key for key in keys if self._treatments[key] not in self._records]
        for key in missing:
            row = self._perturbations[key]
            described = {name: getattr(row, name) for name in DESCRIBED}
            self._records[self._treatments[key]] = TreatmentRecord(
                key.kind, key.name, identifier=key.identifier, **described
            )

    def _point(
        self,
        targets: Mapping[int, tuple[int, Control | None]],
        lines: Mapping[int, int | None],
    ) -> None:
        """Write what wells have now, with events for the wells of ``lines``."""
        if not targets:
            return
        connection = self._session.connection()
        mark = "?" if connection.dialect.name == "sqlite" else "%s"
        statement = f"UPDATE wells SET treatment_id = {mark}, control = {mark} WHERE id = {mark}"  # noqa: S608
        # Straight to the driver: of a million images it is a hundred thousand wells.
        rows = [
            (found, control and control.value, well) for well, (found, control) in targets.items()
        ]
        connection.exec_driver_sql(statement, rows)
        changes = []
        for well, line in lines.items():
            before, after = self._said_of(self._wells[well]), self._said_of(targets[well])
            different = [name for name in before if before[name] != after[name]]
            changes.append(
                Change(
                    "wells",
                    well,
                    {name: before[name] for name in different},
                    {name: after[name] for name in different},
                    line,
                )
            )
        record_run_events(self._session, self._run_id, changes, file=self._file)
        self._wells.update(targets)

    def _said_of(self, well: tuple[int | None, Control | None]) -> dict[str, Any]:
        """Return what an event says of a well: its columns, and the name of its treatment."""
        treatment, control = well
        known = None if treatment is None else self._records.get(treatment)
        name = known and known.pert_iname
        if treatment is not None and known is None:  # of several perturbations
            name = self._session.get_one(Treatment, treatment).name
        return {
            "treatment_id": treatment,
            "treatment": name,
            "control": control and control.value,
        }


def _key(record: TreatmentRecord) -> PerturbationKey:
    return PerturbationKey(record.kind, record.pert_iname, record.identifier)


def targets_of(perturbations: Iterable[Perturbation]) -> str | None:
    """Return all targets of some perturbations, each once, sorted, with ``|`` between them."""
    found = {target for row in perturbations for target in (row.target or "").split("|")} - {""}
    return "|".join(sorted(found)) or None
