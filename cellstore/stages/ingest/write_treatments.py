"""Treatments of wells: made where they are new, given to wells, with an event per change."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.orm import Session

from ...db.bulk import in_lists, insert_new, rows_in
from ...db.events import Change, record_events
from ...db.fields import wells_changed
from ...enums import Control, PerturbationKind
from ...io.map_shapes import normalised_dose
from ...io.treatments import TreatmentRecord, completed, normalised_name, target_of
from ...models import Event, Perturbation, Plate, Treatment, TreatmentPart, Well
from .account import Account

READABLE = 500
"""Characters of an identity that people can read; all that it says is in the digest after them."""

PerturbationKey = tuple[PerturbationKind, str, str | None]
"""What names a perturbation: its kind, name and identifier."""

DESCRIBED = ("target", "inchikey", "smiles", "pubchem_cid")
"""What tables say of a perturbation beyond what names it; a later table may say it otherwise."""

_NAMED_WELLS = 5
"""Wells that a message names."""

_SHOWN = {"treatment": "", "control": "", "identifier": "identifier ", "kind": "kind "}
"""What such a message says of a correction, and the word before each value."""


def key_of(part: TreatmentRecord) -> PerturbationKey:
    """Return what names the perturbation of a part of a treatment."""
    return part.kind, part.pert_iname, part.identifier


def treatment_values(parts: Iterable[TreatmentRecord]) -> dict[str, Any]:
    """Return the row of table ``treatments`` for ``parts``, without its target.

    Neither the order of the parts nor the unit of a dose matters: ``5 uM`` and ``5000 nM`` of the
    same perturbation are one treatment.
    """
    ordered = []
    for part in parts:
        dose, plain = (0.0, None) if part.dose is None else normalised_dose(part.dose, part.unit)
        text = "" if part.dose is None else f"{dose:.12g} {plain or ''}".strip()
        ordered.append(([value or "" for value in key_of(part)], plain or "", dose, text))
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

_Disagreement = tuple[PerturbationKey, str, str, str]
"""A perturbation that a file describes in two ways: the first value of a column, another."""


class TreatmentWriter:
    """Finds or makes treatments and gives them to wells, in the caller's transaction.

    Made for one ``file`` (else that of ``account``). It remembers what it has seen of treatments
    and wells.
    """

    def __init__(self, session: Session, account: Account, file: str | None = None) -> None:
        self._session, self._account = session, account
        self._file = file or account.file
        self._perturbations: dict[PerturbationKey, Perturbation] = {}
        self._treatments: dict[str, int] = {}
        """By identity."""
        self._records: dict[int, TreatmentRecord] = {}
        self._wells: dict[int, tuple[int | None, Control | None]] = {}
        self._described: dict[tuple[PerturbationKey, str], str] = {}
        self._corrected: set[PerturbationKey] = set()
        self._disagreements: dict[_Disagreement, int | None] = {}
        """The first line with the other value."""
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

    def ids(self, records: Iterable[TreatmentRecord]) -> dict[TreatmentRecord, int]:
        """Return the row of each treatment, made where it is new and corrected where it is not."""
        found = list(records)
        ids = self._find_or_make([(record, record, None) for record in found])
        self.used.update(ids)
        return dict(zip(found, ids, strict=True))

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
        unknown = [well for well in wanted if well not in self._wells]
        query = select(Well.id, Well.treatment_id, Well.control)
        for well, treatment, control in rows_in(session, query, Well.id, unknown):
            self._wells[well] = treatment, control
        assigned = {found for well in wanted if (found := self._wells[well][0]) is not None}
        for some in in_lists(assigned - self._records.keys()):
            self._records |= records_of(session, Treatment.id.in_(some))

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
        ids = self._find_or_make(list(cases.values()))
        results: dict[_Case, tuple[int, Control | None]] = {}
        corrected: set[_Case] = set()
        for number, (case, (_, full, _)) in zip(ids, cases.items(), strict=True):
            results[case] = number, full.control
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
        used = {row[0] for well in old_wells for row in (self._wells[well], targets[well])}
        for some in in_lists({number for number in used if number} - self._records.keys()):
            self._records |= records_of(session, Treatment.id.in_(some))
        named: dict[int | None, dict[str, Any]] = {}
        for treatment in used:
            known = self._records.get(treatment or 0)
            parts = known.parts if known else ()
            named[treatment] = {
                "treatment_id": treatment,
                "treatment": treatment_values(parts)["name_with_dose"] if known else None,
                "control": None,
                "identifier": " + ".join(part.identifier or "none" for part in parts),
                "kind": " + ".join(part.kind for part in parts),
            }
        changes = []
        for well in old_wells:
            before, after = (
                named[treatment] | {"control": role and role.value}
                for treatment, role in (self._wells[well], targets[well])
            )
            differing = {name for name in before if before[name] != after[name]}
            if "treatment" in differing:
                differing -= {"identifier", "kind"}
            elif "treatment_id" in differing:
                # Two samples of one name, or a compound and a gene of one name.
                differing.add("treatment")
            old, new = (
                {name: row[name] for name in row if name in differing} for row in (before, after)
            )
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
    ) -> list[int]:
        """Make new treatments, and correct what the file describes otherwise; return their ids.

        ``entries`` are (record of the file, the same completed, line).
        """
        session = self._session
        absent: dict[PerturbationKey, TreatmentRecord] = {}
        for _, record, _ in entries:
            for part in record.parts:
                if key_of(part) not in self._perturbations:
                    absent.setdefault(key_of(part), part)
        for _ in ("look for them", "and again when they are made"):
            names = {name for _, name, _ in absent}
            for (row,) in rows_in(session, select(Perturbation), Perturbation.name, names):
                key = row.kind, row.name, row.identifier
                if absent.pop(key, None):
                    self._perturbations[key] = row
            rows = [
                dict(zip(("kind", "name", "identifier"), key, strict=True))
                | {name: getattr(record, name) for name in DESCRIBED}
                for key, record in absent.items()
            ]
            insert_new(session, Perturbation, rows)

        # The first value that a file gives counts.
        changes = []
        described = (
            (part, key_of(whole), line)
            for given, record, line in entries
            for part, whole in zip(given.parts, record.parts, strict=True)
        )
        for part, key, line in described:
            perturbation = self._perturbations[key]
            new: dict[str, Any] = {}
            for name in DESCRIBED:
                value = getattr(part, name)
                if value is None:
                    continue
                first = self._described.setdefault((key, name), value)
                if first != value:
                    self._disagreements.setdefault((key, name, first, value), line)
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

        values = [treatment_values(record.parts) for _, record, _ in entries]
        new_ones = {
            row["identity"]: (row, record)
            for row, (_, record, _) in zip(values, entries, strict=True)
            if row["identity"] not in self._treatments
        }
        made: dict[str, tuple[dict[str, Any], TreatmentRecord]] = {}
        while new_ones:
            known = select(Treatment.identity, Treatment.id)
            for identity, number in rows_in(session, known, Treatment.identity, new_ones):
                self._treatments[identity] = number
                del new_ones[identity]
            if made:
                break
            made = dict(new_ones)
            rows = []
            for described_as, record in made.values():
                targets = [self._perturbations[key_of(part)].target or "" for part in record.parts]
                rows.append(described_as | {"target": target_of("|".join(targets))})
            insert_new(session, Treatment, rows)
        rows = []
        for identity, (_, record) in made.items():
            ordered = sorted(
                record.parts,
                key=lambda p: (*key_of(p)[:2], p.identifier or "", p.unit or "", p.dose or 0),
            )
            for position, part in enumerate(ordered, start=1):
                rows.append(
                    {
                        "treatment_id": self._treatments[identity],
                        "position": position,
                        "perturbation_id": self._perturbations[key_of(part)].id,
                        "dose": part.dose,
                        "dose_unit": part.unit,
                        "dose_original": part.dose_original,
                    }
                )
        insert_new(session, TreatmentPart, rows)
        return [self._treatments[row["identity"]] for row in values]

    def report(self) -> None:
        """Note in the account what the file corrects or describes in two ways, and name twins.

        Names of treatments of wells that differ in nothing but case, spaces, hyphens or
        underscores are noted once, if one of them is in ``used``, with how to make them one.
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
        for (key, column, first, other), line in self._disagreements.items():
            detail = (
                f"{key[1]} has the {column} {first} on an earlier line, but {other} here; {first} "
                "is kept. Correct the table and ingest it again"
            )
            self._account.suspicious(line, "described in two ways", detail, file=self._file)
        self._disagreements.clear()

        query = select(Perturbation.kind, Perturbation.name).join(TreatmentPart).distinct()
        rows = rows_in(session, query, TreatmentPart.treatment_id, self.used)
        mine = {(kind, name) for kind, name in rows}
        names: dict[tuple[PerturbationKind, str], set[str]] = defaultdict(set)
        in_wells = exists().where(Well.treatment_id == TreatmentPart.treatment_id)
        for kind, name in (*mine, *session.execute(query.where(in_wells))):
            names[kind, normalised_name(name)].add(name)
        twins = ((kind, sorted(same)) for (kind, _), same in names.items() if len(same) > 1)
        for kind, same in sorted(twins):
            if not any((kind, name) in mine for name in same):
                continue
            kept, *others = same
            pairs = " and ".join(f"{other},{kept}" for other in others)
            detail = (
                f"{' and '.join(map(repr, same))} look like one. If they are, ingest again with "
                f"--alias FILE, a table with the header alias,name and the row {pairs}."
            )
            reason = "one name in two spellings"
            self._account.suspicious(None, reason, detail, file=self._file)


def _named_wells(session: Session, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Ids and names (``P1/A01``) of wells, by id."""
    query = select(Well.id, Plate.barcode, Well.name).join(Plate, Plate.id == Well.plate_id)
    rows = session.execute(query.where(Well.id.in_(ids)).order_by(Well.id))
    return [(row.id, f"{row.barcode}/{row.name}") for row in rows]


def _more(number: int) -> str:
    return f" and {number:,} more" if number > 0 else ""
