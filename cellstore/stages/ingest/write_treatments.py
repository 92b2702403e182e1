"""Treatments of wells: made where they are new, given to wells, with an event per change."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.orm import Session

from ...db.bulk import in_lists, insert_new
from ...db.events import Change, record_events
from ...db.fields import wells_changed
from ...enums import Control, PerturbationKind
from ...io.map_shapes import normalised_dose
from ...io.treatments import TreatmentRecord, completed, normalised_name, target_of
from ...models import Event, Perturbation, Plate, Treatment, TreatmentPart, Well
from .account import Account

CACHED = 200_000
"""Wells (and treatments) that a writer remembers: some 500 plates."""

READABLE = 500
"""Characters of an identity that people can read; all that it says is in the digest after them."""

DESCRIBED = ("target", "inchikey", "smiles", "pubchem_cid")
"""What tables say of a perturbation beyond what names it; a later table may say it otherwise."""

_NAMED_WELLS = 5
"""Wells that a message names."""

_SHOWN = {"treatment": "", "control": "", "identifier": "identifier ", "kind": "kind "}
"""What such a message says of a correction, and the word before each value."""

# ---- The identity of a treatment ----


class PerturbationKey(NamedTuple):
    """What names a perturbation."""

    kind: PerturbationKind
    name: str
    identifier: str | None


class Part(NamedTuple):
    """A perturbation with its dose as it is written."""

    perturbation: PerturbationKey
    dose: float | None = None
    unit: str | None = None


def treatment_values(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the row of table ``treatments`` for ``parts``, without its target.

    Neither the order of the parts nor the unit of a dose matters: ``5 uM`` and ``5000 nM`` of the
    same perturbation are one treatment.
    """
    ordered = []
    for perturbation, written, unit in parts:
        dose, plain = (0.0, None) if written is None else normalised_dose(written, unit)
        text = "" if written is None else f"{dose:.12g} {plain or ''}".strip()
        ordered.append(([value or "" for value in perturbation], plain or "", dose, text))
    ordered.sort()
    keys = [key for key, _, _, _ in ordered]
    dosed = [(key, text) for key, _, _, text in ordered]
    readable = " + ".join("|".join([*key, text]).rstrip("|") for key, text in dosed)
    digest = hashlib.sha256(json.dumps(dosed).encode()).hexdigest()[:32]
    compounds = hashlib.sha256(json.dumps(keys).encode()).digest()
    return {
        "identity": f"{readable[:READABLE]}#{digest}",
        "name": " + ".join(name for _, name, _ in keys),
        "name_with_dose": " + ".join(f"{key[1]} {text}".rstrip() for key, text in dosed),
        # 63 bits of a digest: a whole number that every database takes.
        "perturbations_key": int.from_bytes(compounds[:8], "big") >> 1,
    }


def key_of(record: TreatmentRecord) -> PerturbationKey:
    """Return what names the perturbation of a part."""
    return PerturbationKey(record.kind, record.pert_iname, record.identifier)


def parts_of(record: TreatmentRecord) -> tuple[Part, ...]:
    """Return the parts of a treatment in the one order that they are stored in."""
    parts = [Part(key_of(part), part.dose, part.unit) for part in record.parts]
    parts.sort(
        key=lambda part: ([text or "" for text in (*part.perturbation, part.unit)], part.dose or 0)
    )
    return tuple(parts)


def records_of(session: Session, condition: ColumnElement[bool]) -> dict[int, TreatmentRecord]:
    """Return by id the treatments of which a part meets ``condition``.

    The condition is about ``treatments``, ``treatment_parts`` and ``perturbations``.
    """
    columns = (Perturbation.kind, Perturbation.name, Perturbation.identifier)
    described = (getattr(Perturbation, name) for name in DESCRIBED)
    doses = (TreatmentPart.dose, TreatmentPart.dose_unit, TreatmentPart.dose_original)
    which = (
        select(TreatmentPart.treatment_id)
        .join(Treatment, Treatment.id == TreatmentPart.treatment_id)
        .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
        .where(condition)
    )
    query = (
        select(TreatmentPart.treatment_id, *columns, *doses, *described)
        .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
        .where(TreatmentPart.treatment_id.in_(which))
        .order_by(TreatmentPart.treatment_id, TreatmentPart.position)
    )
    found: dict[int, list[TreatmentRecord]] = defaultdict(list)
    for row in session.execute(query):
        treatment, kind, name, identifier, dose, unit, original, target, *chemistry = row
        record = TreatmentRecord(kind, name, target, None, identifier, *chemistry)
        record = replace(record, dose=dose, unit=unit, dose_original=original)
        found[treatment].append(record)
    return {
        treatment: replace(first, others=tuple(others))
        for treatment, (first, *others) in found.items()
    }


def retarget(session: Session, perturbation_id: int) -> None:
    """Say anew what the targets of all treatments with a perturbation are."""
    having = Treatment.parts.any(TreatmentPart.perturbation_id == perturbation_id)
    for treatment in session.scalars(select(Treatment).where(having)):
        targets = [part.perturbation.target or "" for part in treatment.parts]
        treatment.target = target_of("|".join(targets))


# ---- Writing ----

_Case = tuple[int | None, Control | None, int]
"""Treatment and control that a well has, and the ``id()`` of the record that a file gives it."""


class _Disagreement(NamedTuple):
    """A perturbation that a file describes in two ways: the first value of a column, another."""

    key: PerturbationKey
    column: str
    first: str
    other: str


class TreatmentWriter:
    """Finds or makes treatments and gives them to wells, in the caller's transaction.

    Made for one ``file`` (else that of ``account``). It remembers what it has seen of treatments
    and wells: ``forget`` that after a rollback.
    """

    def __init__(self, session: Session, account: Account, file: str | None = None) -> None:
        self._session, self._account = session, account
        self._file = file or account.file
        self._perturbations: dict[PerturbationKey, Perturbation] = {}
        self._treatments: dict[tuple[Part, ...], int] = {}
        self._records: dict[int, TreatmentRecord] = {}
        self._wells: dict[int, tuple[int | None, Control | None]] = {}
        self._described: dict[tuple[PerturbationKey, str], str] = {}
        self._corrected: set[PerturbationKey] = set()
        self._disagreements: dict[_Disagreement, tuple[int | None, dict[int, None]]] = {}
        """The first line with the other value, and the wells of all such lines."""
        self.used: set[int] = set()
        """The treatments of the wells that the file names."""
        self._kept: set[int] = set()
        self._changes: list[Change] = []
        self._n_changes = 0
        self._newer: dict[str, set[int]] = {"wells": set(), "perturbations": set()}
        """Rows that were corrected since the file was read first; they stay as they are."""
        if account.since is not None:
            after = (Event.id > account.since, Event.run_id.is_distinct_from(account.run_id))
            self._newer["wells"] = set(session.scalars(wells_changed(*after)))
            of = select(Event.row_id).where(Event.table_name == "perturbations", *after)
            self._newer["perturbations"] = {key for key in session.scalars(of) if key is not None}

    def forget(self) -> None:
        """Read all from the database again, after what was written last was undone."""
        for cache in (self._wells, self._records, self._treatments, self._perturbations):
            cache.clear()  # together, as they are looked up together

    def ids(self, records: Iterable[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        """Return the row of each treatment, made where it is new and corrected where it is not."""
        if len(self._records) > CACHED:
            self.forget()
        found = list(records)
        self._find_or_make([(record, record, None) for record in found])
        ids = {record: self._treatments[parts_of(record)] for record in found}
        self.used.update(ids.values())
        return ids

    def assign(
        self,
        wanted: Mapping[int, tuple[TreatmentRecord, int | None]],
        new_wells: Container[int],
    ) -> set[int]:
        """Give wells the treatments that a file names; return the wells that changed.

        ``wanted`` is {well id: (treatment, line of the file)}. A value that the file leaves open
        stays as it is. Another value of the same perturbation corrects the perturbation; another
        perturbation, or another control, is given to the well. Both are events, but for
        ``new_wells``, made in this run.
        """
        session = self._session
        self._kept |= self._newer["wells"] & wanted.keys()
        wanted = {well: item for well, item in wanted.items() if well not in self._kept}
        if max(len(self._wells), len(self._records)) > CACHED:
            self.forget()
        unknown = [well for well in wanted if well not in self._wells]
        for some in in_lists(unknown):
            query = select(Well.id, Well.treatment_id, Well.control).where(Well.id.in_(some))
            for well, treatment, control in session.execute(query):
                self._wells[well] = treatment, control
        assigned = {found for well in unknown if (found := self._wells[well][0]) is not None}
        for ids in in_lists(assigned - self._records.keys()):
            self._records |= records_of(session, Treatment.id.in_(ids))

        # By object: readers hand the same treatment out again and again, and hashing costs.
        cases: dict[_Case, tuple[TreatmentRecord, TreatmentRecord, int | None]] = {}
        case_of: dict[int, _Case] = {}
        for well, (given, line) in wanted.items():
            present, control = self._wells[well]
            case_of[well] = case = present, control, id(given)
            if case not in cases:
                known = self._records.get(present or 0)
                full = completed(given, replace(known, control=control)) if known else given
                cases[case] = given, full, line
        disagreeing = self._find_or_make(list(cases.values()))
        results: dict[_Case, tuple[int, Control | None]] = {}
        corrected: set[_Case] = set()
        for case, (_, full, _) in cases.items():
            results[case] = self._treatments[parts_of(full)], full.control
            if any(key_of(part) in self._corrected for part in full.parts):
                corrected.add(case)

        targets: dict[int, tuple[int, Control | None]] = {}
        changed: set[int] = set()
        for well, case in case_of.items():
            if results[case] != case[:2]:
                targets[well] = results[case]
                changed.add(well)
            elif case in corrected and well not in new_wells:
                changed.add(well)
            for disagreement in disagreeing.get(case[2], ()):
                self._disagreements[disagreement][1][well] = None
        if targets:
            connection = session.connection()
            mark = "?" if connection.dialect.name == "sqlite" else "%s"
            statement = (
                f"UPDATE wells SET treatment_id = {mark}, control = {mark} WHERE id = {mark}"  # noqa: S608
            )
            # Straight to the driver: of a million images it is a hundred thousand wells.
            rows = [(found, role and role.value, well) for well, (found, role) in targets.items()]
            connection.exec_driver_sql(statement, rows)
        old_wells = [well for well in targets if well not in new_wells]
        used = {self._wells[well][0] for well in old_wells} | {targets[w][0] for w in old_wells}
        names: dict[int | None, str] = {}
        for some in in_lists([treatment for treatment in used if treatment is not None]):
            named = select(Treatment.id, Treatment.name_with_dose).where(Treatment.id.in_(some))
            names.update((row.id, row.name_with_dose) for row in session.execute(named))
        changes = []
        for well in old_wells:
            values = []
            for treatment, role in (self._wells[well], targets[well]):
                values.append(
                    {
                        "treatment_id": treatment,
                        "treatment": names.get(treatment),
                        "control": role and role.value,
                    }
                )
            before, after = values
            differing = [name for name in before if before[name] != after[name]]
            if "treatment_id" in differing and "treatment" not in differing:
                # Two samples of one name, or a compound and a gene of one name.
                differing.insert(1, "treatment")
                both = (self._wells[well], targets[well])
                for row, (treatment, _) in zip(values, both, strict=True):
                    known = self._records.get(treatment or 0)
                    for name in ("identifier", "kind"):
                        texts = [getattr(part, name) for part in known.parts] if known else []
                        row[name] = " + ".join(text or "none" for text in texts)
                differing += [
                    name for name in ("identifier", "kind") if before[name] != after[name]
                ]
            old, new = ({name: row[name] for name in differing} for row in (before, after))
            changes.append(Change("wells", well, old, new, wanted[well][1]))
        had = [item for item in changes if (item.old or {}).get("treatment_id", 0) is not None]
        self._n_changes += len(had)  # a first label corrects nothing
        self._changes += had[: _NAMED_WELLS - len(self._changes)]
        record_events(session, changes, run_id=self._account.run_id, file=self._file)
        self._wells.update(targets)
        self.used.update(found for well in wanted if (found := self._wells[well][0]) is not None)
        return changed

    def _find_or_make(
        self, entries: Sequence[tuple[TreatmentRecord, TreatmentRecord, int | None]]
    ) -> dict[int, list[_Disagreement]]:
        """Make new treatments, and correct what the file describes otherwise.

        ``entries`` are (record of the file, the same completed, line). Returns by ``id()`` of the
        record of the file how it disagrees with an earlier line of the file.
        """
        session = self._session
        full: dict[PerturbationKey, TreatmentRecord] = {}
        for _, record, _ in entries:
            for part in record.parts:
                full.setdefault(key_of(part), part)
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

        # The first value that a file gives counts.
        disagreeing: dict[int, list[_Disagreement]] = defaultdict(list)
        changes = []
        described = (
            (id(given), part, key_of(whole), line)
            for given, record, line in entries
            for part, whole in zip(given.parts, record.parts, strict=True)
        )
        for whole, part, key, line in described:
            perturbation = self._perturbations[key]
            new: dict[str, Any] = {}
            for name in DESCRIBED:
                value = getattr(part, name)
                if value is None:
                    continue
                first = self._described.setdefault((key, name), value)
                if first != value:
                    disagreement = _Disagreement(key, name, first, value)
                    disagreeing[whole].append(disagreement)
                    self._disagreements.setdefault(disagreement, (line, {}))
                elif (
                    value != getattr(perturbation, name)
                    and perturbation.id not in self._newer["perturbations"]
                ):
                    new[name] = value
            if not new:
                continue
            old = {name: getattr(perturbation, name) for name in new}
            for name, value in new.items():
                setattr(perturbation, name, value)
            session.flush()
            self._corrected.add(key)
            changes.append(Change("perturbations", perturbation.id, old, new, line))
            treatments = Treatment.parts.any(TreatmentPart.perturbation_id == perturbation.id)
            self._records |= records_of(session, treatments)
            if "target" in new:
                retarget(session, perturbation.id)
        record_events(session, changes, run_id=self._account.run_id, file=self._file)

        self._make_treatments([record for _, record, _ in entries])
        return disagreeing

    def _make_treatments(self, records: Sequence[TreatmentRecord]) -> None:
        """Find or make the treatments of perturbations that are there."""
        session = self._session
        wanted = {parts_of(record): record for record in records}
        values = {
            parts: treatment_values(parts) for parts in wanted if parts not in self._treatments
        }
        by_identity = {row["identity"]: parts for parts, row in values.items()}
        made: list[tuple[Part, ...]] = []
        while by_identity:
            for some in in_lists(by_identity):
                ids = select(Treatment.identity, Treatment.id).where(Treatment.identity.in_(some))
                for identity, number in session.execute(ids):
                    self._treatments[by_identity.pop(identity)] = number
            if made:
                break
            made = list(by_identity.values())
            new_rows = []
            for parts in made:
                targets = [self._perturbations[key].target or "" for key, _, _ in parts]
                new_rows.append(values[parts] | {"target": target_of("|".join(targets))})
            insert_new(session, Treatment, new_rows)
        rows = []
        for parts in made:
            written = {
                (key_of(part), part.dose, part.unit): part.dose_original
                for part in wanted[parts].parts
            }
            for position, (key, dose, unit) in enumerate(parts, start=1):
                rows.append(
                    {
                        "treatment_id": self._treatments[parts],
                        "position": position,
                        "perturbation_id": self._perturbations[key].id,
                        "dose": dose,
                        "dose_unit": unit,
                        "dose_original": written[key, dose, unit],
                    }
                )
        insert_new(session, TreatmentPart, rows)
        for parts in values:
            made_of = []
            for key, dose, unit in parts:
                target, *chemistry = (getattr(self._perturbations[key], name) for name in DESCRIBED)
                made_of.append(
                    TreatmentRecord(
                        *(key.kind, key.name, target, None, key.identifier, *chemistry, dose, unit)
                    )
                )
            record = replace(made_of[0], others=tuple(made_of[1:]))
            self._records.setdefault(self._treatments[parts], record)

    def report(self) -> None:
        """Note in the account what the file describes in two ways, and names that look like one.

        The names of the treatments in ``used`` are compared with those of all treatments that a
        well has: names that differ in nothing but case, spaces, hyphens or underscores, and two
        names of one structure. Each group of names is noted once, with how to make them one.
        """
        session = self._session
        if self._changes:
            named = {change.row_id or 0: change for change in self._changes}
            shown = []
            for well, name in _named_wells(session, list(named)):
                old, new = (
                    [
                        _SHOWN[key] + value
                        for key, value in (item or {}).items()
                        if value and key in _SHOWN
                    ]
                    for item in (named[well].old, named[well].new)
                )
                shown.append(f"{name} {', '.join(old) or 'none'} -> {', '.join(new) or 'none'}")
            more = _more(self._n_changes - len(named))
            self._account.notes.append(f"corrected: {'; '.join(shown)}{more}")
        if self._kept:
            named_wells = _named_wells(session, sorted(self._kept)[:_NAMED_WELLS])
            shown = [name for _, name in named_wells]
            self._account.notes.append(
                f"{self._file} was read before, and these wells were corrected since; kept: "
                f"{', '.join(shown)}{_more(len(self._kept) - len(shown))}. To use the labels of "
                "this table, add --reread."
            )
        for (key, column, first, other), (line, wells) in self._disagreements.items():
            shown = [name for _, name in _named_wells(session, list(wells)[:_NAMED_WELLS])]
            more = _more(len(wells) - len(shown))
            detail = (
                f"{key.name} has the {column} {first} on an earlier line, but {other} in "
                f"{', '.join(shown)}{more}; {first} is kept. Correct the table and ingest it again"
            )
            self._account.suspicious(line, "described in two ways", detail, file=self._file)
        self._disagreements.clear()

        spelled, built = "one name in two spellings", "one structure under two names"
        names: dict[tuple[str, PerturbationKind, str], set[str]] = {}
        columns = (Perturbation.kind, Perturbation.name, Perturbation.inchikey, Perturbation.smiles)
        query = select(*columns).join(TreatmentPart).distinct()
        mine = [
            row
            for some in in_lists(self.used)
            for row in session.execute(query.where(TreatmentPart.treatment_id.in_(some)))
        ]
        used = exists().where(Well.treatment_id == TreatmentPart.treatment_id)
        for found, is_mine in ((mine, True), (session.execute(query.where(used)), False)):
            for row in found:
                texts = ((spelled, normalised_name(row.name)), (built, row.inchikey or row.smiles))
                for reason, text in texts:
                    if text and (is_mine or (reason, row.kind, text) in names):
                        names.setdefault((reason, row.kind, text), set()).add(row.name)
        for reason in (spelled, built):
            for same in sorted(sorted(some) for key, some in names.items() if key[0] == reason):
                distinct = same if reason is spelled else {normalised_name(name) for name in same}
                if len(same) < 2 or len(distinct) < 2:
                    continue
                kept, *others = same
                pairs = " and ".join(f"{other},{kept}" for other in others)
                detail = (
                    f"{' and '.join(map(repr, same))} look like one. If they are, ingest again "
                    f"with --alias FILE, a table with the header alias,name and the row {pairs}."
                )
                self._account.suspicious(None, reason, detail, file=self._file)


def _named_wells(session: Session, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Ids and names (``P1/A01``) of wells, by id."""
    query = select(Well.id, Plate.barcode, Well.name).join(Plate, Plate.id == Well.plate_id)
    rows = session.execute(query.where(Well.id.in_(ids)).order_by(Well.id))
    return [(row.id, f"{row.barcode}/{row.name}") for row in rows]


def _more(number: int) -> str:
    return f" and {number:,} more" if number > 0 else ""
