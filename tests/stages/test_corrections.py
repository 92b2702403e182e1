"""Putting things right: a verb is an event, counts at once, and its counterpart undoes it."""

from __future__ import annotations

import csv
import getpass
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from factories import Factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from screens import SmallScreen, small_screen
from sqlalchemy import delete, func, select, update
from test_measure_groups import bench, cells, masks_of, plane_of, values_of
from test_segment_measure import Bench

from cellstore.analysis.features import measure_channels
from cellstore.config import IngestParams, MeasureParams, Selection, VoteOptions
from cellstore.db.events import broken_events
from cellstore.enums import Control, Level, Stage
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.lookup import in_recipes
from cellstore.jobs.workspace import Workspace
from cellstore.models import Cell, Event, Folder, Image, ImageFile, Plate, Segmentation, Well
from cellstore.query.feature_files import open_set
from cellstore.stages.ingest.ingest import IngestResult
from cellstore.stages.measure import measure
from cellstore.store import Store

pytestmark = pytest.mark.one_database

__all__ = ["bench", "cells"]

VIEWS = ("well_table", "image_table", "cell_table", "prediction_table", "votes")


def answers(store: Store, *views: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of the views, in an order of their own."""
    with store.open_questions() as questions:
        return {
            name: sorted(questions.ask(f"FROM {name}").rows(), key=repr) for name in views or VIEWS
        }


def last_events(store: Store) -> list[Event]:
    with store.session() as session:
        return list(session.scalars(select(Event).order_by(Event.id)))


def n_events(store: Store) -> int:
    with store.session() as session:
        return session.scalar(select(func.count(Event.id))) or 0


@pytest.fixture
def screen(workspace: Workspace) -> SmallScreen:
    return small_screen(workspace)


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store(workspace)


@pytest.mark.each_database
def test_a_plate_is_renamed_and_back(store: Store, screen: SmallScreen) -> None:
    before = answers(store)
    done = store.rename("plate", "BR1", "BR9", reason="typing error")
    assert (done.images, done.predictions) == (6, 8)
    assert done.changes == ({"name": "BR1", "old": {"barcode": "BR1"}, "new": {"barcode": "BR9"}},)
    assert {row[0] for row in answers(store, "well_table")["well_table"]} == {"BR9"}
    event = last_events(store)[-1]
    assert (event.old, event.new, event.reason) == (
        {"barcode": "BR1"},
        {"barcode": "BR9"},
        "typing error",
    )
    with pytest.raises(UnknownNameError, match="BR9"):
        store.audit("BR1", "plate")
    (kept,) = store.audit("BR9", "plate").record["corrections"]
    assert (kept["old"], kept["new"]) == ({"barcode": "BR1"}, {"barcode": "BR9"})
    store.rename("plate", "BR9", "BR1")
    assert answers(store) == before


def test_a_name_that_is_taken_or_is_none_is_refused(store: Store, screen: SmallScreen) -> None:
    screen.factory.plate("BR2")
    for new in ("BR2", "", "a/b", "BR1", "x" * 256):
        with pytest.raises(UserInputError):
            store.rename("plate", "BR1", new)
    with pytest.raises(UnknownNameError):
        store.rename("plate", "BR7", "BR8")
    with pytest.raises(UnknownNameError):
        store.rename("well", "A01", "A02")


def test_a_channel_is_renamed_on_one_plate_or_all(store: Store, screen: SmallScreen) -> None:
    make = screen.factory
    other = make.image(make.well(make.plate("BR2"), 1, 1))
    channels = "SELECT p.barcode, f.channel FROM image_files AS f JOIN images AS i ON i.id = "
    channels += "f.image_id JOIN wells AS w ON w.id = i.well_id JOIN plates AS p ON p.id = "
    channels += "w.plate_id GROUP BY ALL ORDER BY ALL"

    def found() -> list[tuple[Any, ...]]:
        with store.open_questions() as questions:
            return list(questions.ask(channels).rows())

    make.recipe(Stage.SEGMENT, parameters={"channels": ["ER"], "nuclei": ["DNA"]})
    done = store.rename("channel", "DNA", "Hoechst", plate="BR2")
    assert store.rename("channel", "DNA", "Hoechst", plate="BR2").changes == ()
    assert found() == [("BR1", "DNA"), ("BR2", "Hoechst")]
    done = store.rename("channel", "DNA", "Hoechst")
    assert (len(done.changes), done.images) == (1, 6)
    assert found() == [("BR1", "Hoechst"), ("BR2", "Hoechst")]
    make.image_file(other, "ER")
    with pytest.raises(UserInputError, match="BR2/A01/1 has a channel Hoechst already"):
        store.rename("channel", "ER", "Hoechst")
    with pytest.raises(UnknownNameError, match="Hoechst"):
        store.rename("channel", "DNA", "ER")
    store.rename("channel", "Hoechst", "DNA")
    assert ("BR1", "DNA") in found()
    (first, _) = store.audit("BR1", "plate").record["corrections"]
    assert first["new"] == {"channel": "Hoechst", "in_recipes": "DNA"}


@pytest.mark.each_database
def test_a_well_is_relabelled_and_back(store: Store, screen: SmallScreen) -> None:
    before = answers(store)
    with store.session() as session:
        wells = dict(session.execute(select(Well.name, Well.control)).all())
    assert wells["B01"] is Control.NEGATIVE
    done = store.relabel("BR1/B01", treatment="taxol", dose="5000 nM", reason="map was shifted")
    assert done.changes[0]["old"] == {"treatment": "DMSO", "control": "negative"}
    assert done.changes[0]["new"] == {"treatment": "taxol 5 uM", "control": None}
    with store.session() as session:
        well = session.scalars(select(Well).where(Well.name == "B01")).one()
        assert well.treatment is not None
        assert well.treatment.target == "TUBB"
        (part,) = well.treatment.parts
        assert (part.dose, part.dose_unit, part.dose_original) == (5.0, "uM", "5000 nM")
    record = store.audit("BR1/B01").record
    (kept,) = record["corrections"]
    assert (kept["old"]["treatment"], kept["reason"]) == ("DMSO", "map was shifted")
    assert record["treatment"]["name"] == "taxol 5 uM"
    (label,) = record["frozen_labels"]
    assert label["since"] == {
        "by": kept["by"],
        "changed_at": kept["changed_at"],
        "reason": "map was shifted",
    }
    (note,) = record["notes"]
    when = kept["changed_at"][:16].replace("T", " ")
    assert note.endswith(f"taxol, corrected by {kept['by']} on {when} (map was shifted)")
    store.relabel("BR1/B01", treatment="DMSO", reason="it was not")
    assert answers(store) == before
    with pytest.raises(UserInputError, match="nothing would change"):
        store.relabel("BR1/B01", treatment="DMSO", reason="again")


def test_a_well_without_treatment_gets_one_and_loses_it(store: Store, screen: SmallScreen) -> None:
    well = screen.factory.well(screen.plate, 3, 1)
    before = answers(store)
    done = store.relabel("BR1/C01", treatment="new drug", reason="forgotten on the map")
    assert any("new drug is new" in note for note in done.notes)
    store.relabel("BR1/C01", control="positive", reason="it is one")
    with store.session() as session:
        assert session.get_one(Well, well.id).control is Control.POSITIVE
    store.relabel("BR1/C01", treatment="none", control="none", reason="no")
    assert answers(store) == before


def test_names_that_are_unclear_are_refused(store: Store, screen: SmallScreen) -> None:
    for more, match in (
        ({"treatment": "Taxol"}, "Did you mean taxol"),
        ({"treatment": "taxol", "dose": "much"}, "number and a unit"),
        ({"dose": "5 uM"}, "--treatment"),
        ({}, "--treatment"),
        ({"treatment": "none", "dose": "5 uM"}, "is not a treatment"),
        ({"treatment": "N/A"}, "is not a treatment"),
        ({"treatment": "taxol + brefeldin"}, "in a plate map"),
        ({"treatment": "taxol", "reason": " "}, "--reason"),
    ):
        with pytest.raises(UserInputError, match=match):
            store.relabel("BR1/B01", **{"reason": "why", **more})  # type: ignore[arg-type]
    for well, dose in (("B02", "1 uM"), ("B03", "2 uM")):
        store.relabel(f"BR1/{well}", treatment="drug", dose=dose, reason="doses")
    with pytest.raises(UserInputError, match="drug 1 uM, drug 2 uM"):
        store.relabel("BR1/B01", treatment="drug", reason="which?")
    store.relabel("BR1/B01", treatment="drug 2 uM", reason="this one")


@pytest.mark.each_database
def test_what_is_excluded_counts_nowhere_until_it_is_included(
    store: Store, screen: SmallScreen
) -> None:
    before = answers(store)  # copies of the run are made here
    cell = screen.factory.cells_of(screen.segmentations["B01"])[0]
    for level, name, gone in (
        (Level.PLATE, "BR1", 8),
        (Level.WELL, "BR1/B01", 3),
        (Level.IMAGE, "BR1/B01/1", 3),
        (Level.CELL, str(cell.id), 1),
    ):
        done = store.exclude(level.value, name, reason="debris")
        assert done.predictions == gone
        after = answers(store)
        assert len(after["prediction_table"]) == len(before["prediction_table"]) - gone
        assert len(after["cell_table"]) == len(before["cell_table"])  # it stays visible
        record = store.audit(name, level.value).record
        assert record["excluded"] == "debris"
        assert record["corrections"][-1]["new"] == {"excluded": "debris"}
        with pytest.raises(UserInputError, match=r"excluded already: debris"):
            store.exclude(level.value, name, reason="again")
        store.include(level.value, name, reason="it was not")
        assert answers(store) == before
        with pytest.raises(UserInputError, match="nothing to include"):
            store.include(level.value, name)


def test_what_is_excluded_with_something_larger_names_it(store: Store, screen: SmallScreen) -> None:
    make = screen.factory
    cell = make.cells_of(screen.segmentations["B01"])[0]
    small = make.cells(screen.segmentations["B01"], 1, excluded="perimeter is 0")[0]
    store.exclude("well", "BR1/B01", reason="debris")
    for one, why in ((cell, "debris"), (small, "perimeter is 0")):
        with pytest.raises(UserInputError, match=f"why: cellstore audit cell {one.id}"):
            store.include("cell", str(one.id))
        assert why in str(store.audit(str(one.id), "cell").record)


def test_a_dry_run_says_the_same_and_changes_nothing(store: Store, screen: SmallScreen) -> None:
    before, events = answers(store), n_events(store)
    verbs: list[Any] = [
        lambda **more: store.rename("plate", "BR1", "BR2", **more),
        lambda **more: store.rename("channel", "DNA", "ER", **more),
        lambda **more: store.relabel("BR1/B01", treatment="x", dose="1 %", reason="r", **more),
        lambda **more: store.exclude("well", "BR1/B02", reason="r", **more),
    ]
    planned = [verb(dry_run=True) for verb in verbs]
    assert answers(store) == before
    assert n_events(store) == events
    for verb, plan in zip(reversed(verbs), reversed(planned), strict=True):
        assert verb().changes == plan.changes


def test_an_error_in_the_middle_leaves_nothing_half_changed(
    store: Store, screen: SmallScreen, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, events = answers(store), n_events(store)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("cellstore.stages.corrections.record_events", broken)
    for verb in (
        lambda: store.rename("plate", "BR1", "BR2"),
        lambda: store.relabel("BR1/B01", treatment="new", reason="r"),
        lambda: store.exclude("plate", "BR1", reason="r"),
    ):
        with pytest.raises(RuntimeError, match="power cut"):
            verb()
    assert answers(store) == before
    assert n_events(store) == events


@pytest.mark.each_database
def test_the_log_says_who_did_what_and_why(
    store: Store, screen: SmallScreen, tmp_path: Path
) -> None:
    store.relabel("BR1/B01", treatment="taxol", reason="lab book")
    store.rename("channel", "DNA", "ER")
    store.backup(tmp_path / "b.tar")
    backup, rename, relabel = store.log(limit=3).entries
    assert backup["changes"] == [f"wrote {(tmp_path / 'b.tar').resolve()}"]
    assert rename["changes"] == [
        f"{name}: channel DNA -> ER" for name in ("plates that come later", "BR1")
    ]
    assert relabel["changes"] == ["BR1/B01: treatment DMSO -> taxol, control negative -> none"]
    assert (relabel["reason"], relabel["rows"]) == ("lab book", {"wells": 1})
    assert (relabel["by"], relabel["host"]) == (getpass.getuser(), socket.gethostname())
    assert (relabel["role"] is None) == store.workspace.database.is_sqlite
    of_plate = store.log(plate="BR1").entries
    assert [entry["changes"] for entry in of_plate] == [rename["changes"][1:], relabel["changes"]]
    assert (store.log(plate="BR1", limit=1).more, store.log(plate="BR1").more) == (True, False)
    with store.session() as session:
        assert list(broken_events(session)) == []


def test_the_log_of_a_plate_has_the_ingest_that_brought_it(store: Store, tmp_path: Path) -> None:
    both = loaddata(tmp_path / "both.csv", ["A01"], "P1")
    rows = loaddata(tmp_path / "p2.csv", ["A01", "A02"], "P2").read_text().splitlines(True)[1:]
    both.write_text("".join([both.read_text(), *rows]))
    run = store.ingest(both).run_id
    other = store.ingest(loaddata(tmp_path / "p3.csv", ["A01"], "P3")).run_id
    for plate, wanted in (("P1", run), ("P2", run), ("P3", other)):
        (entry,) = store.log(plate=plate).entries
        assert (entry["run_id"], {"plates", "wells", "images"} <= entry["rows"].keys()) == (
            wanted,
            True,
        )


# ---- Undo and delete ----


def loaddata(path: Path, wells: Sequence[str], plate: str = "P1", **more: str) -> Path:
    """A LoadData table of images that are elsewhere: two sites a well."""
    names = ["FileName_OrigDNA", "Metadata_Plate", "Metadata_Well", "Metadata_Site", *more]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for well in wells:
            for site in (1, 2):
                row = [f"{plate}_{well}_{site}.tif", plate, well, site, *more.values()]
                writer.writerow(row)
    return path


def read_map(store: Store, path: Path, wells: Mapping[str, str], **more: Any) -> IngestResult:
    """Ingest a plate map of plate P1 that gives each well a compound."""
    rows = [f"{well}\t{name}" for well, name in wells.items()]
    path.write_text("\n".join(["well_position\tbroad_sample", *rows]) + "\n")
    compounds = path.with_name("compounds.tsv")
    compounds.write_text("broad_sample\tpert_iname\nDMSO\tDMSO\ntaxol\ttaxol\n")
    return store.ingest(path, IngestParams(plate="P1", compounds=(compounds,), **more))


def test_what_was_made_of_a_channel_stays_valid_when_it_is_renamed(bench: Bench) -> None:
    store, both = Store(bench.workspace), MeasureParams(features=("basic", "intensity"))
    by_name = replace(bench.params, channels=("DNA",))
    made = [store.segment(by_name), store.measure(both)]
    of_dna = store.measure(MeasureParams(channels=("DNA",), features=("texture",)))
    before = answers(store, "cell_table", "intensity")
    column = "SELECT mean_intensity_{0} AS x, max_intensity_{0} FROM intensity ORDER BY cell_id"
    dna = list(store.sql(column.format("DNA")).to_pydict().values())
    for old, new in (("DNA", "other"), ("RNA", "DNA"), ("other", "RNA")):
        store.rename("channel", old, new)
    again = [store.segment(replace(by_name, channels=("RNA",))), store.measure(both)]
    assert [item.run_id for item in (*again, *again[1].others)] == [None] * 3  # nothing to do
    assert [item.recipe_id for item in again] == [item.recipe_id for item in made]
    assert answers(store, "cell_table", "intensity") == before
    assert list(store.sql(column.format("RNA")).to_pydict().values()) == dna
    renamed = store.measure(MeasureParams(channels=("RNA",), features=("texture",)))
    assert (renamed.run_id, renamed.feature_set) == (None, of_dna.feature_set)
    assert "\ncellstore rename" not in store.repro(str(made[1].run_id)).script
    # What was called RNA is another recipe, of other pixels.
    other = store.measure(MeasureParams(channels=("DNA",), features=("texture",)))
    planes = {"RNA": plane_of(bench, 1, "DNA")}
    expected = measure_channels("texture", masks_of(bench, 1), planes)
    for name, values in values_of(bench, other, 1).items():
        assert values == pytest.approx(expected[name][: len(values)]), name
    check = store.check_run(str(other.run_id))
    assert (check.outcome, check.same_recipe, check.reasons) == ("identical", True, [])
    store.rename("channel", "DNA", "ER", plate="P1")
    named = MeasureParams(features=("intensity",), channels=("ER", "RNA"))
    assert store.measure(named).run_id is None


def test_a_recipe_means_one_channel_on_plates_that_call_it_otherwise(bench: Bench) -> None:
    store, make = Store(bench.workspace), Factory(bench.workspace)
    other = make.image(make.well(make.plate("P2"), 1, 1))
    store.rename("channel", "DNA", "nuclei", plate="P1")  # before any recipe names it
    store.rename("channel", "DNA", "nuclei", plate="P2")
    nuclei = replace(bench.params, channels=("nuclei",))
    run = store.segment(nuclei).run_id
    script = store.repro(str(run)).script
    for plate in ("P1", "P2"):
        assert f"cellstore rename channel --plate={plate} -- DNA nuclei" in script
    store.rename("channel", "nuclei", "Hoechst", plate="P2")  # a recipe names it

    def meant(name: str) -> tuple[str, ...]:
        with store.session() as session:
            return in_recipes(session, (name,))

    assert (meant("nuclei"), meant("Hoechst")) == (("nuclei",), ("nuclei",))
    assert store.segment(replace(nuclei, channels=("Hoechst",))).run_id is None
    # On P2 the two names are swapped now: no recipe can mean RNA on both.
    make.image_file(other, "RNA")
    assert store.measure(MeasureParams(channels=("RNA",))).done == 3
    for old, new in (("Hoechst", "x"), ("RNA", "nuclei"), ("x", "RNA")):
        store.rename("channel", old, new, plate="P2")
    with pytest.raises(UserInputError, match="renamed on some plates after it was used"):
        meant("RNA")


EVERYTHING = ("well_table", "image_table", "cell_table", "plates", "wells", "images", "image_files")
EVERYTHING += ("treatments", "treatment_parts", "perturbations")


@pytest.mark.each_database
def test_an_ingest_is_undone_and_done_again(store: Store, tmp_path: Path) -> None:
    empty = answers(store, *EVERYTHING)
    table = loaddata(tmp_path / "a.csv", ["A01", "A02"], Metadata_donor="d1")
    run = store.ingest(table).run_id
    full = answers(store, "well_table", "image_table")
    plan = store.undo(str(run), dry_run=True)
    assert (plan.images, answers(store, "well_table", "image_table")) == (4, full)
    done = store.undo(str(run), reason="wrong folder")
    assert done.changes == plan.changes
    assert answers(store, *EVERYTHING) == empty
    assert store.audit(f"run {run}").record["status"] == "cancelled"
    with pytest.raises(UserInputError, match="undone already"):
        store.undo(str(run))
    again = store.ingest(table)
    assert again.created == 4
    shown = [[row[:2] for row in rows] for rows in answers(store, "image_table").values()]
    assert shown == [[row[:2] for row in full["image_table"]]]
    store.undo(str(again.run_id))
    assert answers(store, *EVERYTHING) == empty


@pytest.mark.each_database
def test_what_an_ingest_changed_comes_back(store: Store, tmp_path: Path) -> None:
    store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02"], Metadata_donor="d1"))
    read_map(store, tmp_path / "m1.txt", {"A01": "DMSO", "A02": "taxol"})
    before = answers(store, *EVERYTHING)
    table = loaddata(tmp_path / "b.csv", ["A02", "A03"], Metadata_donor="d2", Metadata_Batch="b1")
    brought = store.ingest(table).run_id
    between = answers(store, *EVERYTHING)
    table = tmp_path / "m2.csv"
    rows = ("Well,Compound,Dose,Cell line,Time,Donor", "A01,taxol,5 uM,U2OS,48,d3")
    table.write_text("\n".join((*rows, "A02,new,1 uM,U2OS,48,d3\n")))
    changed = store.ingest(table, IngestParams(plate="P1")).run_id
    assert answers(store, *EVERYTHING) != between
    store.undo(str(changed))
    assert answers(store, *EVERYTHING) == between
    store.undo(str(brought))
    assert answers(store, *EVERYTHING) == before


def test_what_later_work_relies_on_is_not_undone(store: Store, tmp_path: Path) -> None:
    images = store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02"])).run_id
    maps = [read_map(store, tmp_path / f"{name}.txt", {"A01": name}) for name in ("DMSO", "taxol")]
    before = answers(store, *EVERYTHING)
    first, second = (item.run_id for item in maps)
    with pytest.raises(UserInputError, match=rf"run {second} changed P1/A01 again\.\nUndo"):
        store.undo(str(first))
    refused = f"run {second} corrected its wells, ingest run {first} corrected its wells"
    with pytest.raises(UserInputError, match=refused):
        store.undo(str(images))
    assert answers(store, *EVERYTHING) == before


def test_what_was_relabelled_since_keeps_its_correction(store: Store, tmp_path: Path) -> None:
    store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02", "A03"]))
    wells = {"A01": "taxol", "A02": "DMSO", "A03": "DMSO"}
    run = read_map(store, tmp_path / "m.txt", wells).run_id
    store.relabel("P1/A01", treatment="mitotane", reason="lab book")
    store.relabel("P1/A02", control="positive", reason="lab book")
    done = store.undo(str(run))
    assert "Corrected by hand since, and kept: P1/A01, P1/A02." in done.notes
    found = "SELECT well, treatment, control FROM well_table ORDER BY well"
    assert [tuple(row.values()) for row in store.sql(found).to_pylist()] == [
        ("A01", "mitotane", None),
        ("A02", None, "positive"),  # what nobody corrected goes
        ("A03", None, None),
    ]


def test_a_channel_that_came_later_stays_and_corrections_by_hand_are_named(
    store: Store, tmp_path: Path
) -> None:
    images = store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02"])).run_id
    table = tmp_path / "b.csv"
    table.write_text(
        (tmp_path / "a.csv").read_text().replace("OrigDNA", "OrigER").replace(".tif", "_er.tif")
    )
    channel = store.ingest(table).run_id
    with pytest.raises(
        UserInputError, match=f"ingest run {channel} brought channel ER of P1/A01/1"
    ):
        store.undo(str(images))
    store.undo(str(channel))
    store.relabel("P1/A01", treatment="taxol", reason="it was")
    store.exclude("image", "P1/A02/1", reason="blurred")
    for plan in (store.undo(str(images), dry_run=True), store.delete_plate("P1", dry_run=True)):
        assert plan.notes[0].startswith("Corrected or excluded by hand: P1/A01, P1/A02/1.")
    assert store.undo(str(images)).notes
    store.ingest(tmp_path / "a.csv")
    assert store.delete_plate("P1").notes == ()


@pytest.mark.each_database
def test_a_screen_that_was_used_is_neither_undone_nor_deleted(
    store: Store, screen: SmallScreen
) -> None:
    before = answers(store)
    with pytest.raises(UserInputError, match=r"split main\.\n.*cellstore exclude plate"):
        store.delete_plate("BR1")
    with pytest.raises(UserInputError, match="Only ingest runs"):
        store.undo(str(screen.predict_run.id))
    assert answers(store) == before


@pytest.mark.each_database
def test_a_plate_is_deleted_with_all_that_was_made_of_it(
    store: Store, workspace: Workspace, tmp_path: Path
) -> None:
    make = Factory(workspace)
    other = make.segmentation(
        make.image(make.well(make.plate("P2"), 1, 1)), make.run(Stage.SEGMENT)
    )
    make.cells(other, 2)
    empty = answers(store)
    table = loaddata(tmp_path / "a.csv", ["A01"])
    store.ingest(table)
    with store.session() as session:
        images = session.scalars(select(Image).join(Well).join(Plate).where(Plate.barcode == "P1"))
        found = list(images)
    run = make.run(Stage.SEGMENT)
    cells = make.cells_of(make.segmentation(found[0], run, 3))
    make.job(run, found[0])
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE))
    make.features(cells, measured)
    store.exclude("cell", str(cells[2].id), reason="small")
    store.exclude("well", "P1/A01", reason="debris")
    answers(store)
    done = store.delete_plate("P1", reason="test")
    assert (done.images, done.cells) == (2, 3)
    assert answers(store) == empty
    assert answers(store, "exclusions", "features") == {"exclusions": [], "features": []}
    # Nothing that was said of the deleted rows is said of others.
    store.ingest(table)
    well = store.audit("P1/A01").record
    assert (well["excluded"], well["corrections"]) == (None, [])


def test_measurements_go_with_the_last_plate_that_is_in_their_file(cells: Bench) -> None:
    """Until then ``verify`` knows which cells of the file were deleted with a plate."""
    store, make = Store(cells.workspace), Factory(cells.workspace)
    well = make.well(make.plate("P2"), 1, 1)
    with store.workspace.database.begin() as session:
        second = select(Image.id).order_by(Image.id).offset(1).limit(1).scalar_subquery()
        session.execute(update(Image).where(Image.id == second).values(well_id=well.id))
    measure(cells.workspace, MeasureParams(features=("intensity",)))
    store.delete_plate("P1")
    assert store.verify().ok
    assert len(answers(store, "feature_files")["feature_files"]) == 1
    with store.workspace.database.begin() as session:
        session.execute(delete(Cell).where(Cell.id == select(func.max(Cell.id)).scalar_subquery()))
    said = [problem.reason for problem in store.verify().problems]
    assert sum("1 of its cells are not in the database" in reason for reason in said) == 1
    store.delete_plate("P2")
    assert store.verify().ok
    assert answers(store, "feature_files", "intensity") == {"feature_files": [], "intensity": []}


def test_a_set_is_the_same_for_a_plate_when_another_one_goes(cells: Bench) -> None:
    store, make = Store(cells.workspace), Factory(cells.workspace)
    well = make.well(make.plate("P2"), 1, 1)
    with store.workspace.database.begin() as session:
        last = select(func.max(Image.id)).scalar_subquery()
        session.execute(update(Image).where(Image.id == last).values(well_id=well.id))
    for plate in ("P1", "P2"):  # a file each
        texture = measure(
            cells.workspace, MeasureParams(features=("texture",)), Selection(plates=(plate,))
        )

    def mark() -> str | None:
        with store.session() as session:
            found = open_set(session, cells.workspace.artifacts, texture.recipe_id or 0)
            of = session.scalars(select(Segmentation.recipe_id)).first()
            return found.mark(session, of or 0, select(Image.id).where(Image.well_id == well.id))

    before = mark()
    store.delete_plate("P1")
    assert len(answers(store, "feature_files")["feature_files"]) == 1
    assert mark() == before


def test_an_ingest_is_undone_after_its_plate_was_deleted(store: Store, tmp_path: Path) -> None:
    images = store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02"]))
    labels = read_map(store, tmp_path / "m.txt", {"A01": "taxol"})
    store.delete_plate("P1")
    store.ingest(loaddata(tmp_path / "b.csv", ["A01", "A02"], "P2"))
    before = answers(store, *EVERYTHING)
    assert store.undo(str(images.run_id)).changes == ()
    assert answers(store, *EVERYTHING) == before
    gone = store.undo(str(labels.run_id)).changes  # names that nothing has
    assert [change["name"] for change in gone] == ["treatments", "perturbations"]
    assert answers(store, *EVERYTHING[:-3]) == {name: before[name] for name in EVERYTHING[:-3]}


@pytest.mark.each_database
def test_an_undo_that_breaks_off_leaves_all_as_it_was(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.ingest(loaddata(tmp_path / "a.csv", ["A01", "A02"])).run_id
    before, events = answers(store, *EVERYTHING), n_events(store)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("cellstore.stages.corrections.record_events", broken)
    for verb in (lambda: store.undo(str(run)), lambda: store.delete_plate("P1")):
        with pytest.raises(RuntimeError, match="power cut"):
            verb()
    assert (answers(store, *EVERYTHING), n_events(store)) == (before, events)


# ---- Files that are read again ----


def treatments_now(store: Store) -> dict[str, str | None]:
    return {row[1]: row[2] for row in answers(store, "well_table")["well_table"]}


def test_a_map_that_is_read_again_undoes_no_correction(store: Store, tmp_path: Path) -> None:
    table = loaddata(tmp_path / "a.csv", ["A01", "A02"])
    store.ingest(table)
    old, wells = tmp_path / "old.txt", {"A01": "DMSO", "A02": "taxol"}
    assert not any("corrected" in note for note in read_map(store, old, wells).notes)
    newer = read_map(store, tmp_path / "new.txt", {"A01": "taxol"})
    assert "corrected: P1/A01 DMSO, negative -> taxol" in newer.notes
    store.relabel("P1/A02", treatment="DMSO", reason="lab book")
    now = treatments_now(store)
    assert now == {"A01": "taxol", "A02": "DMSO"}
    for _ in range(2):
        again = read_map(store, old, wells)
        assert any("kept: P1/A01, P1/A02" in note for note in again.notes)
        assert treatments_now(store) == now
    compounds = tmp_path / "compounds.tsv"
    together = IngestParams(platemap=old, compounds=(compounds,))
    store.ingest(table, together)
    assert treatments_now(store) == now
    read_map(store, old, wells, reread=True)
    assert treatments_now(store) == wells


def test_tables_find_a_renamed_plate_by_its_old_name(store: Store, tmp_path: Path) -> None:
    store.ingest(loaddata(tmp_path / "a.csv", ["A01"]))
    store.rename("plate", "P1", "BR1")
    more = store.ingest(loaddata(tmp_path / "b.csv", ["A01", "A02"]))
    assert "plate P1 was renamed: read as BR1" in more.notes
    read_map(store, tmp_path / "m.txt", {"A02": "taxol"})
    assert answers(store, "well_table")["well_table"][0][0] == "BR1"
    assert treatments_now(store) == {"A01": None, "A02": "taxol"}
    with pytest.raises(UnknownNameError, match="P1 was renamed: it is BR1 now"):
        store.audit("P1", "plate")


NAMES_OF_FILES = r"(?P<well>[A-P]\d+)_s(?P<site>\d+)_(?P<channel>ch\d)"


def two_channels(folder: Path, wells: Sequence[str]) -> Path:
    """A folder of images of two channels, in names that say so; each file has bytes of its own."""
    folder.mkdir()
    for number, well in enumerate(wells):
        for channel in (1, 2):
            pixels = np.full((8, 8), 10 * number + channel, np.uint16)
            tifffile.imwrite(folder / f"{well}_s1_ch{channel}.tif", pixels)
    return folder


def where_files_are(store: Store) -> set[tuple[str, str, str]]:
    """Channel, file name and folder of all files of images."""
    query = select(ImageFile.channel, ImageFile.name, Folder.uri)
    with store.session() as session:
        return {(*row,) for row in session.execute(query.join(Folder)).all()}


def named(folder: Path, wells: Sequence[str], first: str, second: str) -> set[tuple[str, str, str]]:
    """What :func:`where_files_are` is to say, with these names for ch1 and ch2."""
    channels = (("ch1", first), ("ch2", second))
    return {(now, f"{w}_s1_{file}.tif", str(folder)) for w in wells for file, now in channels}


@pytest.mark.parametrize("plate", [None, "P1"])
def test_folders_find_renamed_channels_by_their_old_names(
    store: Store, tmp_path: Path, plate: str | None
) -> None:
    wells = ["A01", "A02"]
    place = two_channels(tmp_path / "here", wells)
    store.ingest(place, IngestParams(plate="P1", pattern=NAMES_OF_FILES))
    assert where_files_are(store) == named(place, wells, "ch1", "ch2")

    def moved_and_read(first: str, second: str) -> IngestResult:
        """Move the folder, with a well more, and read it there, then again in place."""
        nonlocal place
        place = place.rename(tmp_path / f"place {len(wells)}")
        two_channels(tmp_path / "more", [f"B{len(wells):02d}"])
        for file in (tmp_path / "more").iterdir():
            file.rename(place / f"B{len(wells):02d}{file.name[3:]}")
        (tmp_path / "more").rmdir()
        wells.append(f"B{len(wells):02d}")
        how = IngestParams(plate="P1", pattern=NAMES_OF_FILES)
        found = store.ingest(place, how)
        again = store.ingest(place, replace(how, reread=True))
        for result in (found, again):
            assert (result.issues, result.refused, result.missing_images) == ((), 0, 0)
        assert (found.created, again.unchanged) == (1, len(wells))
        assert where_files_are(store) == named(place, wells, first, second)
        return found

    done = store.rename("channel", "ch1", "DNA", plate=plate)
    assert "that name ch1 are read as DNA from now on" in done.notes[0]
    assert "channel ch1 was renamed: read as DNA" in moved_and_read("DNA", "ch2").notes
    store.rename("channel", "DNA", "Hoechst", plate=plate)
    moved_and_read("Hoechst", "ch2")
    store.rename("channel", "Hoechst", "ch1", plate=plate)
    assert not any("was renamed" in note for note in moved_and_read("ch1", "ch2").notes)
    store.rename("channel", "ch1", "Mito", plate=plate)
    how = IngestParams(plate="P1", pattern=NAMES_OF_FILES)
    tried = store.ingest(place, how, dry_run=True)
    assert {row["channel"] for row in tried.preview} == {"Mito", "ch2"}
    assert tried.notes == ("channel ch1 was renamed: read as Mito",)
    store.rename("channel", "Mito", "ch1", plate=plate)
    # The two are swapped, with a third name; the files say what they said.
    for old, new in (("ch1", "tmp"), ("ch2", "ch1"), ("tmp", "ch2")):
        store.rename("channel", old, new, plate=plate)
    moved_and_read("ch2", "ch1")
    for old, new in (("ch1", "tmp"), ("ch2", "ch1"), ("tmp", "ch2")):
        store.rename("channel", old, new, plate=plate)
    moved_and_read("ch1", "ch2")
    # DNA was the name of the one by mistake, and is that of the other now.
    store.rename("channel", "ch2", "DNA", plate=plate)
    moved_and_read("ch1", "DNA")
    table = tmp_path / "now.csv"
    table.write_text(
        "FileName_OrigDNA,FileName_Origch1,PathName_OrigDNA,PathName_Origch1,Metadata_Plate,"
        "Metadata_Well,Metadata_Site\n"
        f"A01_s1_ch2.tif,A01_s1_ch1.tif,{place},{place},P1,A01,1\n"
    )
    assert store.ingest(table).unchanged == 1
    assert where_files_are(store) == named(place, wells, "ch1", "DNA")


def test_a_channel_renamed_on_one_plate_is_read_as_before_on_others(
    store: Store, tmp_path: Path
) -> None:
    for plate in ("P1", "P2"):
        how = IngestParams(plate=plate, pattern=NAMES_OF_FILES)
        store.ingest(two_channels(tmp_path / plate, ["A01"]), how)
    store.rename("channel", "ch1", "DNA", plate="P1")
    store.rename("plate", "P1", "BR1")
    for plate, first in (("P1", "DNA"), ("P2", "ch1")):
        place = (tmp_path / plate).rename(tmp_path / f"{plate} moved")
        found = store.ingest(place, IngestParams(plate=plate, pattern=NAMES_OF_FILES))
        assert (found.issues, found.missing_images) == ((), 0)
        assert where_files_are(store) >= named(place, ["A01"], first, "ch2")
    assert len(where_files_are(store)) == 4


def test_reports_and_splits_name_the_wells_that_were_relabelled(
    store: Store, screen: SmallScreen
) -> None:
    before = store.report()
    assert not any("Relabelled" in note for note in before.notes)
    treated = store.votes(vote_options=VoteOptions(controls=False)).table
    assert store.check_split("main").relabelled == ()
    store.relabel("BR1/B03", treatment="DMSO", reason="map was shifted")
    store.relabel("BR1/B01", treatment="taxol", reason="map was shifted")
    after = store.report()
    assert after.scores == before.scores  # a split keeps its labels
    (note,) = (note for note in after.notes if "Relabelled" in note)
    relabelled = ("BR1/B01 (DMSO -> taxol)", "BR1/B03 (taxol -> DMSO)")
    assert ", ".join(relabelled) in note
    assert "1 of the 1 wrong images" in note  # B03, see VOTES
    assert store.check_split("main").relabelled == relabelled
    # Which wells are controls is said by the labels that the split keeps, too.
    assert store.votes(vote_options=VoteOptions(controls=False)).table.equals(treated)


# ---- All of them, in any order ----

WELLS = ("A01", "B01", "B02", "B03", "B04")
NAMES = ("BR1", "BR2", "Plate 3")
verbs = st.one_of(
    st.tuples(st.just("plate"), st.sampled_from(NAMES)),
    st.tuples(st.just("channel"), st.sampled_from(("DNA", "ER", "ch1"))),
    st.tuples(
        st.just("relabel"),
        st.sampled_from(WELLS),
        st.sampled_from(("DMSO", "taxol", "new drug", "none")),
        st.sampled_from((None, "5 uM", "0.1 %")),
        st.sampled_from((None, "negative", "positive", "none")),
    ),
    st.tuples(st.just("exclude"), st.sampled_from(list(Level)), st.sampled_from(WELLS)),
    st.tuples(st.just("ingest"), st.sampled_from(("C01", "B01")), st.sampled_from(("d1", "d2"))),
)


class Person:
    """Corrects a small screen, and knows how to take each correction back."""

    def __init__(self, store: Store, screen: SmallScreen, folder: Path) -> None:
        self.store, self.screen, self.folder = store, screen, folder
        self.plate, self.channel = "BR1", "DNA"

    def do(self, verb: str, *of: Any) -> Callable[[], object]:
        """Do one thing; return what undoes it."""
        return getattr(self, verb)(*of)  # type: ignore[no-any-return]

    def rename(self, kind: str, new: str) -> Callable[[], object]:
        old = getattr(self, kind)
        self.store.rename(kind, old, new)
        setattr(self, kind, new)

        def back() -> None:
            self.store.rename(kind, new, old)
            setattr(self, kind, old)

        return back

    def relabel(self, well: str, name: str, *more: str | None) -> Callable[[], object]:
        with self.store.session() as session:
            row = session.scalars(select(Well).where(Well.name == well)).first()
            assert row is not None
            had = row.treatment.name_with_dose if row.treatment else "none"
            control = row.control.value if row.control else "none"
        dose, role = (None, more[1]) if name == "none" else more
        named, why = f"{self.plate}/{well}", "why"
        self.store.relabel(named, treatment=name, dose=dose, control=role, reason=why)
        return lambda: self.store.relabel(
            f"{self.plate}/{well}", treatment=had, control=control, reason=why
        )

    def exclude(self, level: Level, well: str) -> Callable[[], object]:
        cell = self.screen.factory.cells_of(self.screen.segmentations[well])[0]
        names = {Level.PLATE: self.plate, Level.WELL: f"{self.plate}/{well}"}
        names |= {Level.IMAGE: str(self.screen.images[well].id), Level.CELL: str(cell.id)}
        self.store.exclude(level.value, names[level], reason="debris")
        ids = {Level.PLATE: lambda: self.plate, Level.WELL: lambda: f"{self.plate}/{well}"}
        name = ids.get(level, lambda: names[level])
        return lambda: self.store.include(level.value, name())

    def ingest(self, well: str, donor: str) -> Callable[[], object]:
        table = loaddata(
            self.folder / "more.csv", [well], self.plate, Metadata_donor=donor, Metadata_Batch=donor
        )
        run = self.store.ingest(table, IngestParams(reread=True)).run_id
        return lambda: self.store.undo(str(run))


@pytest.fixture
def sqlite_screen(sqlite_workspace: Workspace) -> SmallScreen:
    return small_screen(sqlite_workspace)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(verbs, min_size=2, max_size=6))
def test_counterparts_give_back_the_former_answers_of_every_view(
    sqlite_screen: SmallScreen, tmp_path: Path, chosen: list[tuple[Any, ...]]
) -> None:
    store = Store(sqlite_screen.factory.workspace)
    person = Person(store, sqlite_screen, tmp_path)
    views = (*VIEWS, "plates", "wells", "images", "image_files", "exclusions", "eligible_cells")
    before = answers(store, *views)
    undone: list[Callable[[], object]] = []
    for verb, *of in chosen:
        try:
            if verb in ("plate", "channel"):
                undone.append(person.rename(verb, *of))
            else:
                undone.append(person.do(verb, *of))
        except UserInputError:  # it is so already
            continue
    for back in reversed(undone):
        back()
    assert answers(store, *views) == before
