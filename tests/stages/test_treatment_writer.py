from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from factories import Factory
from sqlalchemy import event, func, select

from cellstore.db.events import event_digest
from cellstore.enums import Control, PerturbationKind, Severity, Stage
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.workspace import Workspace
from cellstore.models import Event, Treatment, Well
from cellstore.stages.ingest.account import Account
from cellstore.stages.ingest.write_treatments import (
    TreatmentWriter,
    records_of,
    treatment_values,
)

pytestmark = pytest.mark.one_database

AMG = TreatmentRecord(
    PerturbationKind.COMPOUND,
    "AMG900",
    target="AURKA",
    control=Control.POSITIVE,
    identifier="BRD-1",
    inchikey="KEY",
    smiles="CC",
    pubchem_cid="11",
)
NAME_ONLY = TreatmentRecord(PerturbationKind.COMPOUND, "AMG900")
TAXOL = TreatmentRecord(PerturbationKind.COMPOUND, "taxol", target="TUBB")


class Screen:
    """A plate with two wells and an ingest run."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.make = Factory(workspace)
        plate = self.make.plate()
        self.wells = [self.make.well(plate, 1, column).id for column in (1, 2)]
        self.run = self.make.run(Stage.INGEST)

    def say(
        self, record: TreatmentRecord, line: int | None = 7, *, new: bool = False, well: int = 0
    ) -> set[int]:
        chosen = self.wells[well]
        with self.workspace.database.begin() as session:
            writer = TreatmentWriter(session, Account(self.run.id, "map.txt"))
            return writer.assign({chosen: (record, line)}, {chosen} if new else set())

    def treatment(self, well: int = 0) -> TreatmentRecord | None:
        with self.workspace.database.read() as session:
            found = session.get_one(Well, self.wells[well])
            if found.treatment is None:
                return None
            (record,) = records_of(session, Treatment.id == found.treatment_id).values()
            return replace(record, control=found.control)

    def changes(self) -> list[tuple[str, dict[str, Any], dict[str, Any], str | None, int | None]]:
        """Table, old values, new values, file and line of each event, row numbers aside."""
        with self.workspace.database.read() as session:
            return [
                (row.table_name, _named(row.old), _named(row.new), row.file, row.line)
                for row in session.scalars(select(Event).order_by(Event.id))
            ]


def _named(values: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (values or {}).items() if name != "treatment_id"}


@pytest.fixture
def screen(workspace: Workspace) -> Screen:
    return Screen(workspace)


@pytest.mark.each_database
def test_a_treatment_is_one_row_whoever_asks(screen: Screen) -> None:
    with screen.workspace.database.begin() as session:
        first = TreatmentWriter(session, Account(screen.run.id, "a")).ids([AMG, TAXOL, AMG])
        again = TreatmentWriter(session, Account(screen.run.id, "b")).ids([TAXOL, replace(AMG)])
        assert first == again
        assert len(set(first.values())) == 2
        assert records_of(session, Treatment.id == first[AMG]) == {
            first[AMG]: replace(AMG, control=None)
        }


def identity(part: TreatmentRecord) -> str:
    return str(treatment_values([part])["identity"])


def test_kind_name_identifier_and_dose_make_a_treatment() -> None:
    one = TreatmentRecord(PerturbationKind.COMPOUND, "AMG900", identifier="BRD-1")
    other = [
        replace(one, kind=PerturbationKind.ORF),
        replace(one, pert_iname="taxol"),
        replace(one, identifier=None),
        replace(one, dose=5, unit="uM"),
        replace(one, dose=5, unit="%"),
        replace(one, dose=10, unit="uM"),
    ]
    assert len({identity(part) for part in (one, *other)}) == 7


def test_neither_order_nor_unit_makes_another_treatment() -> None:
    amg = TreatmentRecord(PerturbationKind.COMPOUND, "AMG900", identifier="BRD-1")
    taxol = TreatmentRecord(PerturbationKind.COMPOUND, "taxol")
    dosed = replace(taxol, dose=0.5, unit="%")
    one = treatment_values([replace(amg, dose=5000, unit="nM"), dosed])
    assert one == treatment_values([dosed, replace(amg, dose=5, unit="\u00b5M")])
    assert (one["name"], one["name_with_dose"]) == ("AMG900 + taxol", "AMG900 5 uM + taxol 0.5 %")
    assert one["perturbations_key"] == treatment_values([taxol, amg])["perturbations_key"]
    assert one["perturbations_key"] != treatment_values([taxol])["perturbations_key"]


def test_a_bar_in_a_name_makes_no_two_treatments_one() -> None:
    left = TreatmentRecord(PerturbationKind.COMPOUND, "a|b", identifier="c")
    right = TreatmentRecord(PerturbationKind.COMPOUND, "a", identifier="b|c")
    assert identity(left) != identity(right)


def test_a_well_without_treatment_gets_one(screen: Screen) -> None:
    assert screen.say(AMG, new=True) == {screen.wells[0]}
    assert screen.treatment() == AMG
    assert screen.treatment(1) is None
    assert screen.changes() == []


def test_an_old_well_that_gets_its_first_treatment_is_on_record(screen: Screen) -> None:
    screen.say(AMG, line=3)
    old = {"treatment": None, "control": None}
    new = {"treatment": "AMG900", "control": "positive"}
    assert screen.changes() == [("wells", old, new, "map.txt", 3)]


def test_a_row_that_says_no_more_changes_nothing(screen: Screen) -> None:
    screen.say(AMG, new=True)
    open_values = ({}, {"target": None, "inchikey": None}, {"control": None, "identifier": None})
    for less in (NAME_ONLY, *(replace(AMG, **values) for values in open_values)):
        assert screen.say(less) == set()
        assert screen.treatment() == AMG
    assert screen.changes() == []
    with screen.workspace.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Treatment)) == 1


def test_a_row_that_names_the_sample_replaces(screen: Screen) -> None:
    screen.say(NAME_ONLY, new=True)
    assert screen.say(AMG, line=9) == {screen.wells[0]}
    assert screen.treatment() == AMG
    ((table, old, new, *where),) = screen.changes()
    assert table == "wells"
    assert old == {"treatment": "AMG900", "control": None, "identifier": "none"}
    assert new == {"treatment": "AMG900", "control": "positive", "identifier": "BRD-1"}
    assert where == ["map.txt", 9]


def test_a_row_that_says_more_describes_the_perturbation(screen: Screen) -> None:
    more = replace(NAME_ONLY, target="AURKA")
    screen.say(NAME_ONLY, new=True)
    screen.say(NAME_ONLY, new=True, well=1)
    assert screen.say(more, line=9) == {screen.wells[0]}
    assert screen.treatment() == screen.treatment(1) == more
    assert screen.changes() == [
        ("perturbations", {"target": None}, {"target": "AURKA"}, "map.txt", 9)
    ]
    with screen.workspace.database.read() as session:
        assert session.scalars(select(Treatment.target)).all() == ["AURKA"]


@pytest.mark.each_database
def test_the_first_that_a_file_says_counts(screen: Screen) -> None:
    with screen.workspace.database.begin() as session:
        account = Account(screen.run.id, "f")
        writer = TreatmentWriter(session, account)
        for well, target in zip(screen.wells, ("AURKA", "AURKB"), strict=True):
            writer.assign({well: (replace(NAME_ONLY, target=target), well)}, {well})
        writer.report()
    ((severity, file, line, reason, detail),) = account.pending
    assert (severity, file, line) == (Severity.SUSPICIOUS, "f", screen.wells[1])
    assert reason == "described in two ways"
    assert "AMG900 has the target AURKA on an earlier line, but AURKB here;" in detail
    assert screen.treatment(1) == replace(NAME_ONLY, target="AURKA")


@pytest.mark.each_database
def test_events_are_a_chain(screen: Screen) -> None:
    screen.say(AMG)
    screen.say(TAXOL)
    with screen.workspace.database.read() as session:
        first, second = session.scalars(select(Event).order_by(Event.id))
    assert (first.previous_sha256, second.previous_sha256) == (None, first.sha256)
    for row in (first, second):
        values = {item.name: getattr(row, item.name) for item in Event.__table__.columns}
        assert event_digest(values, row.previous_sha256) == row.sha256
    assert (second.user_name, second.command) == (screen.run.user_name, screen.run.command)


def test_a_corrected_value_keeps_what_the_row_leaves_open(screen: Screen) -> None:
    screen.say(AMG, new=True)
    assert screen.say(TreatmentRecord(PerturbationKind.COMPOUND, "AMG900", target="AURKB"))
    assert screen.treatment() == replace(AMG, target="AURKB")


def test_another_compound_takes_nothing_from_the_one_before(screen: Screen) -> None:
    screen.say(AMG, new=True)
    screen.say(TAXOL)
    assert screen.treatment() == TAXOL
    old = {"treatment": "AMG900", "control": "positive"}
    new = {"treatment": "taxol", "control": None}
    assert screen.changes() == [("wells", old, new, "map.txt", 7)]


def test_another_sample_of_a_name_takes_nothing_either(screen: Screen) -> None:
    screen.say(AMG, new=True)
    other = TreatmentRecord(PerturbationKind.COMPOUND, "AMG900", identifier="BRD-2")
    screen.say(other)
    assert screen.treatment() == other


def test_the_sample_stays_where_its_name_is_corrected(screen: Screen) -> None:
    screen.say(AMG, new=True)
    screen.say(TreatmentRecord(PerturbationKind.COMPOUND, "AMG-900", identifier="BRD-1"))
    assert screen.treatment() == replace(AMG, pert_iname="AMG-900")


def test_what_is_new_in_this_run_is_no_change(screen: Screen) -> None:
    screen.say(NAME_ONLY, new=True)
    screen.say(AMG, new=True)
    assert screen.treatment() == AMG
    assert screen.changes() == []


def test_one_writer_remembers_what_it_did(screen: Screen) -> None:
    well = screen.wells[0]
    with screen.workspace.database.begin() as session:
        writer = TreatmentWriter(session, Account(screen.run.id, "f"))
        assert writer.assign({well: (AMG, 1)}, {well}) == {well}
        assert writer.assign({well: (NAME_ONLY, 2)}, {well}) == set()
        assert writer.assign({well: (TAXOL, 3)}, ()) == {well}
        assert writer.used == set(writer.ids([AMG, TAXOL]).values())
    ((table, _, new, *where),) = screen.changes()
    assert (table, new["treatment"], where) == ("wells", "taxol", ["f", 3])


@pytest.mark.each_database
def test_a_batch_costs_a_few_statements(screen: Screen) -> None:
    plate = screen.make.plate()
    wells = [screen.make.well(plate, 1, column).id for column in range(1, 25)]
    wanted: dict[int, tuple[TreatmentRecord, int | None]] = {
        well: (replace(TAXOL, identifier=str(well)), 1) for well in wells
    }
    statements: list[str] = []
    engine = screen.workspace.database.engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with screen.workspace.database.begin() as session:
        TreatmentWriter(session, Account(screen.run.id, "f")).assign(wanted, set(wells))
        once = len(statements)
        TreatmentWriter(session, Account(screen.run.id, "f")).assign(wanted, set(wells))
    assert 0 < once <= 12
    assert len(statements) - once <= 4


def spelled(workspace: Workspace, *names: str, **more: str) -> list[str]:
    """The details of what is suspicious about the first of ``names``, all of them in a well."""
    make = Factory(workspace)
    plate = make.plate()
    made = [make.treatment(name, **more) for name in names]
    for column, treatment in enumerate(made, start=1):
        make.well(plate, 1, column, treatment)
    with workspace.database.read() as session:
        account = Account(1, "f")
        writer = TreatmentWriter(session, account)
        writer.used = {made[0].id}
        writer.report()
    return [issue.detail for issue in account.pending]


@pytest.mark.each_database
def test_two_spellings_are_reported_once_with_what_to_do(workspace: Workspace) -> None:
    (found,) = spelled(workspace, "ME0328", "ME-0328", "taxol")
    assert "'ME-0328' and 'ME0328'" in found
    assert "--alias" in found
    assert "ME0328,ME-0328" in found


def test_names_that_only_look_alike(workspace: Workspace) -> None:
    assert spelled(workspace, "BX-912", "BX-795", "NAD", "NAD+") == []


def test_what_no_well_has_any_more_is_not_suspicious(workspace: Workspace) -> None:
    make = Factory(workspace)
    make.treatment("ME-0328")
    assert spelled(workspace, "ME0328") == []
