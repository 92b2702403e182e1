"""Putting things right: a verb is an event, counts at once, and its counterpart undoes it."""

from __future__ import annotations

from typing import Any

import pytest
from screens import SmallScreen, small_screen
from sqlalchemy import func, select

from cellstore.enums import Control, Level
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Event, Well
from cellstore.store import Store

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

    store.rename("channel", "DNA", "Hoechst", plate="BR2")
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
    assert first["new"] == {"channel": "Hoechst"}


def test_a_well_is_relabelled_and_back(store: Store, screen: SmallScreen) -> None:
    before = answers(store)
    with store.session() as session:
        wells = dict(session.execute(select(Well.name, Well.control)).all())
    assert wells["B01"] is Control.NEGATIVE
    done = store.relabel("BR1/B01", treatment="taxol", dose="5000 nM", reason="map was shifted")
    assert done.changes[0]["old"] == {"treatment": "DMSO", "control": "negative"}
    assert done.changes[0]["new"] == {"treatment": "taxol 5 uM", "control": None}
    assert any("Split main keeps the label DMSO" in note for note in done.notes)
    with store.session() as session:
        well = session.scalars(select(Well).where(Well.name == "B01")).one()
        assert well.treatment is not None
        assert well.treatment.target == "TUBB"
        (part,) = well.treatment.parts
        assert (part.dose, part.dose_unit, part.dose_original) == (5.0, "uM", "5000 nM")
    record = store.audit("BR1/B01").record
    (kept,) = record["corrections"]
    assert (kept["old"]["treatment"], kept["reason"]) == ("DMSO", "map was shifted")
    assert len(record["treatment_history"]) == 1
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
        ({"treatment": "taxol", "reason": " "}, "--reason"),
    ):
        with pytest.raises(UserInputError, match=match):
            store.relabel("BR1/B01", **{"reason": "why", **more})  # type: ignore[arg-type]
    for well, dose in (("B02", "1 uM"), ("B03", "2 uM")):
        store.relabel(f"BR1/{well}", treatment="drug", dose=dose, reason="doses")
    with pytest.raises(UserInputError, match="drug 1 uM, drug 2 uM"):
        store.relabel("BR1/B01", treatment="drug", reason="which?")
    store.relabel("BR1/B01", treatment="drug 2 uM", reason="this one")


@pytest.mark.parametrize("level", list(Level))
def test_what_is_excluded_counts_nowhere_until_it_is_included(
    store: Store, screen: SmallScreen, level: Level
) -> None:
    before = answers(store)  # copies of the run are made here
    cell = screen.factory.cells_of(screen.segmentations["B01"])[0]
    name = {
        Level.PLATE: "BR1",
        Level.WELL: "BR1/B01",
        Level.IMAGE: "BR1/B01/1",
        Level.CELL: str(cell.id),
    }[level]
    gone = {Level.PLATE: 8, Level.WELL: 3, Level.IMAGE: 3, Level.CELL: 1}[level]
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
    with pytest.raises(UserInputError, match="cellstore include well BR1/B01"):
        store.include("cell", str(cell.id))
    with pytest.raises(UserInputError, match="when it was found"):
        store.include("cell", str(small.id))


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
