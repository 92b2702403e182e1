"""Treatments of wells: made where they are new, given to wells, with an event per change."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.orm import Session

from ...analysis.leaks import normalised_name
from ...db.bulk import in_lists, insert_new
from ...db.events import Change, record_events
from ...enums import Control, PerturbationKind
from ...io.platemaps import TreatmentRecord, completed, target_of
from ...models import Perturbation, Plate, Treatment, TreatmentPart, Well
from .account import Account

CACHED = 200_000
"""Wells (and treatments) that a writer remembers: some 500 plates."""

READABLE = 500
"""Characters of an identity that people can read; all that it says is in the digest after them."""

DESCRIBED = ("target", "inchikey", "smiles", "pubchem_cid")
"""What tables say of a perturbation beyond what names it; a later table may say it otherwise."""

_NAMED_WELLS = 5
"""Wells that a message names."""

# ---- Doses and the identity of a treatment ----

MICROMOLAR = "uM"
_MOLAR = {"M": 1e6, "mM": 1e3, "uM": 1.0, "nM": 1e-3, "pM": 1e-6, "fM": 1e-9}
_SPELLINGS = {"mol/l": "M", "mmol/l": "mM", "umol/l": "uM", "nmol/l": "nM", "pmol/l": "pM"}


def normalised_dose(dose: float, unit: str | None) -> tuple[float, str | None]:
    """Return a dose and its unit: molar ones in ``uM``, all others as they are.

    ``5000 nM``, ``5 µM`` and ``0.005 mmol/L`` are all ``(5.0, "uM")``. Twelve digits are kept, so
    that one dose in two units is one number.

    Raises:
        ValueError: the dose is negative, infinite or no number.
    """
    if not math.isfinite(dose) or dose < 0:
        raise ValueError(f"{dose} is no dose")
    # The micro sign and the Greek letter look alike.
    plain = (unit or "").strip().replace("\u00b5", "u").replace("\u03bc", "u")
    plain = _SPELLINGS.get(plain.lower(), plain)
    factor = _MOLAR.get(plain)
    if factor is None:
        return float(dose), plain or None
    return float(f"{dose * factor:.12g}"), MICROMOLAR


def dose_text(dose: float | None, unit: str | None) -> str:
    """Return a dose as it is shown: ``5 uM``; an empty text where none is known."""
    return "" if dose is None else f"{dose:.12g} {unit or ''}".strip()


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
        (([text or "" for text in part.perturbation], part) for part in parts),
        key=lambda item: (item[0], item[1].unit or "", item[1].dose or 0.0),
    )
    keys = [key for key, _ in ordered]
    doses = [dose_text(part.dose, part.unit) for _, part in ordered]
    dosed = list(zip(keys, doses, strict=True))
    names = [name for _, name, _ in keys]
    readable = " + ".join("|".join([*key, dose]).rstrip("|") for key, dose in dosed)
    digest = hashlib.sha256(json.dumps(dosed).encode()).hexdigest()[:32]
    compounds = hashlib.sha256(json.dumps(keys).encode()).digest()
    return {
        "identity": f"{readable[:READABLE]}#{digest}",
        "name": " + ".join(names),
        "name_with_dose": " + ".join(
            f"{name} {dose}".rstrip() for name, dose in zip(names, doses, strict=True)
        ),
        # 63 bits of a digest: a whole number that every database takes.
        "perturbations_key": int.from_bytes(compounds[:8], "big") >> 1,
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
    found: dict[int, list[Perturbation]] = defaultdict(list)
    for treatment, row in session.execute(query):
        found[treatment].append(row)
    return {treatment: _record(rows[0]) for treatment, rows in found.items() if len(rows) == 1}


def _record(row: Perturbation) -> TreatmentRecord:
    described = {name: getattr(row, name) for name in DESCRIBED}
    return TreatmentRecord(row.kind, row.name, identifier=row.identifier, **described)


def _key(record: TreatmentRecord) -> PerturbationKey:
    return PerturbationKey(record.kind, record.pert_iname, record.identifier)


# ---- Writing ----


class _Disagreement(NamedTuple):
    """A perturbation that a file describes in two ways: what it says first, and then."""

    key: PerturbationKey
    column: str
    first: str
    other: str


class TreatmentWriter:
    """Finds or makes treatments and points wells to them, in the caller's transaction.

    Made for one ``file`` (else that of ``account``). It remembers what it has seen of treatments
    and wells: ``forget`` that after a rollback.
    """

    def __init__(self, session: Session, account: Account, file: str | None = None) -> None:
        self._session, self._account = session, account
        self._file = file or account.file
        self._perturbations: dict[PerturbationKey, Perturbation] = {}
        self._treatments: dict[PerturbationKey, int] = {}
        self._records: dict[int, TreatmentRecord] = {}
        self._wells: dict[int, tuple[int | None, Control | None]] = {}
        self._described: dict[tuple[PerturbationKey, str], str] = {}
        self._corrected: set[PerturbationKey] = set()
        self._disagreements: dict[_Disagreement, tuple[int | None, dict[int, None]]] = {}
        """The first line that says otherwise, and the wells that it is said of."""
        self.used: set[int] = set()
        """The treatments that the wells have which the file speaks of."""

    def forget(self) -> None:
        """Ask the database again: what was written last was undone."""
        for cache in (self._wells, self._records, self._treatments, self._perturbations):
            cache.clear()  # together, as they are looked up together

    def ids(self, records: Iterable[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        """Return the row of each treatment, made where it is new and corrected where it is not."""
        if len(self._records) > CACHED:
            self.forget()
        found = list(records)
        self._find_or_make([(record, record, None) for record in found])
        ids = {record: self._treatments[_key(record)] for record in found}
        self.used.update(ids.values())
        return ids

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
        if max(len(self._wells), len(self._records)) > CACHED:
            self.forget()
        unknown = [well for well in wanted if well not in self._wells]
        for some in in_lists(unknown):
            query = select(Well.id, Well.treatment_id, Well.control).where(Well.id.in_(some))
            for well, treatment, control in self._session.execute(query):
                self._wells[well] = treatment, control
        pointed = {found for well in unknown if (found := self._wells[well][0]) is not None}
        for ids in in_lists(pointed - self._records.keys()):
            self._records |= records_of(self._session, Treatment.id.in_(ids))
        # By object: readers hand the same treatment out again and again, and hashing costs.
        cases: dict[tuple[int | None, Control | None, int], TreatmentRecord] = {}
        entries = []
        for well, (said, line) in wanted.items():
            present, control = self._wells[well]
            if (present, control, id(said)) not in cases:
                known = None if present is None else self._records.get(present)
                full = completed(said, replace(known, control=control)) if known else said
                cases[present, control, id(said)] = full
                entries.append((said, full, line))
        disagreeing = self._find_or_make(entries)
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
            for disagreement in disagreeing.get(id(said), ()):
                self._disagreements[disagreement][1][well] = None
        self._point(targets, {w: wanted[w][1] for w in targets if w not in new_wells})
        self.used.update(found for well in wanted if (found := self._wells[well][0]) is not None)
        return changed

    def report(self) -> None:
        """Say in the account what the file describes in two ways, and names that look like one."""
        for (key, column, first, other), (line, wells) in self._disagreements.items():
            query = select(Plate.barcode, Well.name).join(Plate, Plate.id == Well.plate_id)
            first_wells = Well.id.in_(list(wells)[:_NAMED_WELLS])
            rows = self._session.execute(query.where(first_wells).order_by(Well.id))
            names = [f"{plate}/{well}" for plate, well in rows]
            more = f" and {len(wells) - len(names):,} more" if len(wells) > len(names) else ""
            detail = (
                f"{key.name} has the {column} {first} on an earlier line, but {other} in "
                f"{', '.join(names)}{more}; {first} is kept. Correct the table and ingest it again"
            )
            self._account.suspicious(line, "described in two ways", detail, file=self._file)
        self._disagreements.clear()
        for reason, detail in suspicious_spellings(self._session, self.used):
            self._account.suspicious(None, reason, detail, file=self._file)

    def _find_or_make(
        self, entries: Sequence[tuple[TreatmentRecord, TreatmentRecord, int | None]]
    ) -> dict[int, list[_Disagreement]]:
        """Make what is new of (what is said, the same completed, line); correct what is not.

        Returns by ``id()`` of what is said how it disagrees with an earlier line of the file.
        """
        session = self._session
        full: dict[PerturbationKey, TreatmentRecord] = {}
        for _, record, _ in entries:
            full.setdefault(_key(record), record)
        absent = {key: record for key, record in full.items() if key not in self._perturbations}
        for _ in ("look for them", "and again when they are made"):
            for names in in_lists({key.name for key in absent}):
                query = select(Perturbation).where(Perturbation.name.in_(names))
                for row in session.scalars(query):
                    key = PerturbationKey(row.kind, row.name, row.identifier)
                    if absent.pop(key, None):
                        self._perturbations[key] = row
            rows = [
                key._asdict() | {name: getattr(record, name) for name in DESCRIBED}
                for key, record in absent.items()
            ]
            insert_new(session, Perturbation, rows)
        disagreeing: dict[int, list[_Disagreement]] = {}
        changes = []
        for said, record, line in entries:
            change, disagreements = self._correct(_key(record), said, line)
            changes += [change] if change else []
            if disagreements:
                disagreeing[id(said)] = disagreements
        record_events(session, changes, run_id=self._account.run_id, file=self._file)

        values = {key: treatment_values([Part(key)]) for key in full if key not in self._treatments}
        by_identity = {row["identity"]: key for key, row in values.items()}
        made: list[PerturbationKey] = []
        while by_identity:
            for some in in_lists(by_identity):
                ids = select(Treatment.identity, Treatment.id).where(Treatment.identity.in_(some))
                for identity, number in session.execute(ids):
                    self._treatments[by_identity.pop(identity)] = number
            if made:
                break
            made = list(by_identity.values())
            rows = [values[key] | {"target": self._perturbations[key].target} for key in made]
            insert_new(session, Treatment, rows)
        parts = [
            {
                "treatment_id": self._treatments[key],
                "position": 1,
                "perturbation_id": self._perturbations[key].id,
            }
            for key in made
        ]
        insert_new(session, TreatmentPart, parts)
        for key in values:
            self._records.setdefault(self._treatments[key], _record(self._perturbations[key]))
        return disagreeing

    def _correct(
        self, key: PerturbationKey, said: TreatmentRecord, line: int | None
    ) -> tuple[Change | None, list[_Disagreement]]:
        """Take over what a table says of a perturbation; the first that a file says counts."""
        row = self._perturbations[key]
        new: dict[str, Any] = {}
        disagreements = []
        for name in DESCRIBED:
            value = getattr(said, name)
            if value is None:
                continue
            first = self._described.setdefault((key, name), value)
            if first != value:
                disagreements.append(_Disagreement(key, name, first, value))
                self._disagreements.setdefault(disagreements[-1], (line, {}))
            elif value != getattr(row, name):
                new[name] = value
        if not new:
            return None, disagreements
        old = {name: getattr(row, name) for name in new}
        for name, value in new.items():
            setattr(row, name, value)
        self._session.flush()
        self._corrected.add(key)
        treatments = Treatment.parts.any(TreatmentPart.perturbation_id == row.id)
        self._records |= records_of(self._session, treatments)
        if "target" in new:
            for treatment in self._session.scalars(select(Treatment).where(treatments)):
                targets = [part.perturbation.target or "" for part in treatment.parts]
                treatment.target = target_of("|".join(targets))
        return Change("perturbations", row.id, old, new, line), disagreements

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
            before, after = (self._event_values(*found[well]) for found in (self._wells, targets))
            names = [name for name in before if before[name] != after[name]]
            old, new = ({name: values[name] for name in names} for values in (before, after))
            changes.append(Change("wells", well, old, new, line))
        record_events(self._session, changes, run_id=self._account.run_id, file=self._file)
        self._wells.update(targets)

    def _event_values(self, treatment: int | None, control: Control | None) -> dict[str, Any]:
        """Return what an event says of a well: its columns, and the name of its treatment."""
        known = None if treatment is None else self._records.get(treatment)
        name = known and known.pert_iname
        if treatment is not None and known is None:  # of several perturbations
            name = self._session.get_one(Treatment, treatment).name
        return {
            "treatment_id": treatment,
            "treatment": name,
            "control": control and control.value,
        }


# ---- Names that look like one ----


def suspicious_spellings(session: Session, treatments: Collection[int]) -> list[tuple[str, str]]:
    """Return what looks like two names of one treatment, if ``treatments`` (ids) have one of them.

    Compared with all treatments that a well has: names that differ in nothing but case, spaces,
    hyphens or underscores, and two names of one structure. Each group of names comes once, as a
    reason and a detail, which says how to make them one.
    """
    spelled, built = "one name in two spellings", "one structure under two names"
    names: dict[tuple[str, PerturbationKind, str], set[str]] = {}
    columns = (Perturbation.kind, Perturbation.name, Perturbation.inchikey, Perturbation.smiles)
    query = select(*columns).join(TreatmentPart).distinct()
    mine = [
        row
        for some in in_lists(treatments)
        for row in session.execute(query.where(TreatmentPart.treatment_id.in_(some)))
    ]
    used = exists().where(Well.treatment_id == TreatmentPart.treatment_id)
    for rows, is_mine in ((mine, True), (session.execute(query.where(used)), False)):
        for row in rows:
            for reason, text in (
                (spelled, normalised_name(row.name)),
                (built, row.inchikey or row.smiles),
            ):
                if text and (is_mine or (reason, row.kind, text) in names):
                    names.setdefault((reason, row.kind, text), set()).add(row.name)
    found = []
    for reason in (spelled, built):
        for same in sorted(sorted(some) for key, some in names.items() if key[0] == reason):
            distinct = same if reason is spelled else {normalised_name(name) for name in same}
            if len(same) < 2 or len(distinct) < 2:
                continue
            kept, *others = same
            pairs = " and ".join(f"{other},{kept}" for other in others)
            detail = (
                f"{' and '.join(map(repr, same))} look like one. If they are, ingest again with "
                f"--alias FILE, a table with the header alias,name and the row {pairs}."
            )
            found.append((reason, detail))
    return found
