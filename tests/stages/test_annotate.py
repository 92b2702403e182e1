"""What people say: each has a label of their own, the last one counts, and it is taken back."""

from __future__ import annotations

from typing import Any

import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from sqlalchemy import func, select, text
from unguarded import as_owner

from cellstore.config import SplitParams
from cellstore.db.events import broken_events
from cellstore.enums import Level, Stage
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Annotation, Cell, Event, Run
from cellstore.stages.annotate import undo_annotations
from cellstore.store import Store

ROUND, FLAT = "round", "flat"


@pytest.fixture
def screen(workspace: Workspace) -> SmallScreen:
    return small_screen(workspace)


@pytest.fixture
def store(workspace: Workspace) -> Store:
    return Store(workspace)


def cell_ids(store: Store) -> list[int]:
    with store.session() as session:
        return list(session.scalars(select(Cell.id).order_by(Cell.id)))


def said(store: Store, **of: str) -> dict[tuple[str, Any], str]:
    """The labels that people gave, by person and cell or site."""
    rows = store.sql("FROM annotation_table").to_pylist()
    return {
        (row["user_name"], row["cell_id"] or row["site"] or row["well"] or row["plate"]): row[
            "label"
        ]
        for row in rows
        if all(row[name] == value for name, value in of.items())
    }


def test_each_person_has_a_label_and_the_last_that_stands_counts(
    store: Store, screen: SmallScreen
) -> None:
    one, two, three = cell_ids(store)[:3]
    done = store.annotate("cell", [one, two], ROUND, user="ada", reason="look")
    assert (done.changes[0]["name"], done.changes[0]["new"]) == ("2 cells", {"annotation": ROUND})
    store.annotate("cell", str(one), FLAT, user="bob")
    store.annotate("cell", [two, str(three)], FLAT, user="ada")
    now = {("ada", one): ROUND, ("ada", two): FLAT, ("ada", three): FLAT, ("bob", one): FLAT}
    assert said(store) == now
    again = store.annotate("cell", [two, three], FLAT, user="ada")
    assert (again.changes, again.notes) == ((), ("2 of 2 had this label already.",))
    other = store.annotate("cell", [one], "blurred", field="focus", user="ada", dry_run=True)
    assert other.dry_run
    assert said(store) == now

    store.annotate("cell", [two], None, user="ada")  # what she said before counts again
    assert said(store)["ada", two] == ROUND
    store.annotate("cell", [two], None, user="ada")
    assert ("ada", two) not in said(store)
    with pytest.raises(UserInputError, match="ada gave no label of the field annotation"):
        store.annotate("cell", [two], None, user="ada")

    undo_annotations(
        store.workspace, user="ada"
    )  # the last that stands: three, and two of that is gone
    assert said(store) == {("ada", one): ROUND, ("bob", one): FLAT}
    (row,) = [r for r in store.audit(str(one), "cell").record["annotations"] if r["by"] == "ada"]
    assert (row["field"], row["label"], row["reason"]) == ("annotation", ROUND, "look")
    listed = store.ask("annotations", user="bob").to_pylist()
    assert [(row["plate"], row["cell_id"], row["label"]) for row in listed] == [("BR1", one, FLAT)]
    assert odd_annotations(store) == []


def odd_annotations(store: Store) -> list[str]:
    """What verify says of them; the files of the small screen are not there anyway."""
    return [item.reason for item in store.verify().problems if "annotations" in item.path]


def test_labels_of_images_wells_and_plates_have_their_names(
    store: Store, screen: SmallScreen
) -> None:
    for kind, name in (("plate", "BR1"), ("well", "BR1/B01"), ("image", "BR1/B01/1")):
        store.annotate(kind, name, f"good {kind}", user="ada")
    columns = "level, plate, well, site, cell_id, label, image_id, well_id, plate_id"
    found = store.sql(f"SELECT {columns} FROM annotation_table ORDER BY annotation_id").to_pylist()
    image = screen.images["B01"]
    ids = (image.id, image.well_id, screen.plate.id)
    assert [tuple(row.values()) for row in found] == [
        ("plate", "BR1", None, None, None, "good plate", None, None, ids[2]),
        ("well", "BR1", "B01", None, None, "good well", None, *ids[1:]),
        ("image", "BR1", "B01", 1, None, "good image", *ids),
    ]
    record = store.audit("BR1/B01/1", "image").record
    assert [row["of"] for row in record["annotations"]] == ["plate", "well", "image"]


KAPPAS: list[tuple[dict[tuple[str, str], int], float | None]] = [
    # Cohen's kappa by hand: 4 + 3 of 10 agree; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    ({(ROUND, ROUND): 4, (ROUND, FLAT): 1, (FLAT, ROUND): 2, (FLAT, FLAT): 3}, 0.4),
    ({(ROUND, ROUND): 5, (FLAT, FLAT): 5}, 1.0),
    ({(ROUND, FLAT): 5, (FLAT, ROUND): 5}, -1.0),
    ({(ROUND, ROUND): 10}, None),
    ({(ROUND, ROUND): 3, (FLAT, "small"): 3, ("small", FLAT): 4}, (0.3 - 0.33) / 0.67),
]


@pytest.mark.one_database
def test_agreement_is_cohens_kappa(store: Store, screen: SmallScreen) -> None:
    for number, (counts, _) in enumerate(KAPPAS):
        cells = iter(cell_ids(store))
        for pair, n in counts.items():
            some = [next(cells) for _ in range(n)]
            for user, label in zip(("ada", "bob"), pair, strict=True):
                store.annotate("cell", some, label, user=user, field=f"field {number}")
    store.annotate("cell", [1], ROUND, user="eve", field="hers")  # nobody else has it
    rows = store.ask("agreement").to_pylist()
    for row, (counts, kappa) in zip(rows, KAPPAS, strict=True):
        agreed = sum(number for (a, b), number in counts.items() if a == b) / 10
        assert (row["first"], row["second"], row["both"]) == ("ada", "bob", 10)
        assert row["agreement"] == pytest.approx(agreed)
        assert row["kappa"] == (None if kappa is None else pytest.approx(kappa))
    assert store.ask("agreement", field="field 1").num_rows == 1


@pytest.mark.one_database
def test_what_is_no_name_is_refused_and_nothing_is_written(
    store: Store, screen: SmallScreen
) -> None:
    cells: Any
    for level, cells, label, more, words in (
        ("cell", [10**6], ROUND, {}, "no cell 1000000"),
        ("cell", [1, 10**30], ROUND, {}, "no cell"),
        ("cell", [1, -1], ROUND, {}, "no cell"),
        ("image", [10**6], ROUND, {}, "no image with the id"),
        ("well", "BR1/Z99", ROUND, {}, "Z99"),
        ("cel", [1], ROUND, {}, "Did you mean cell"),
        ("cell", [], ROUND, {}, "Name 1 to"),
        ("cell", [1], "", {}, "A label needs"),
        ("cell", [1], "x" * 256, {}, "A label needs"),
        ("cell", [1], "a\u202eb", {}, "A label needs"),
        ("cell", [1], ROUND, {"user": " "}, "A user needs"),
        ("cell", [1], ROUND, {"field": "a\nb"}, "A field needs"),
        ("cell", [1], ROUND, {"field": "target"}, "filled by tables"),
        ("cell", [1], ROUND, {"reason": " "}, "Say why"),
    ):
        with pytest.raises((UserInputError, UnknownNameError), match=words):
            store.annotate(level, cells, label, **more)
    with store.session() as session:
        assert session.scalar(select(func.count(Annotation.id))) == 0
    with pytest.raises(UserInputError, match="ada has given no label"):
        undo_annotations(store.workspace, user="ada")


@pytest.mark.one_database
def test_many_are_one_event_and_exclusions_are_taken_back_as_well(
    store: Store, screen: SmallScreen
) -> None:
    make, cells = screen.factory, cell_ids(store)
    for column in range(1, 11):
        image = make.image(make.well(screen.plate, 7, column))
        more = make.segmentation(image, screen.segment_run, 100)
        cells += [cell.id for cell in make.cells_of(more)]
    before = count(store, Event)
    done = store.annotate("cell", cells, ROUND, user="ada")
    assert done.changes[0]["name"] == "1,010 cells"
    assert (count(store, Annotation), count(store, Event)) == (1010, before + 2)
    entry = store.log(limit=1).entries[0]["changes"][-1]
    assert entry == "added: 1,010 annotations (level cell, field annotation, label round)"

    store.exclude("cell", cells[:3], reason="debris")
    assert store.exclude("cell", cells[:4], reason="dirt").notes == ("3 of 4 stay as they are.",)
    assert [row["reason"] for row in excluded(store)] == ["debris"] * 3 + ["dirt"]
    undo_annotations(store.workspace)
    assert len(excluded(store)) == 3
    undo_annotations(store.workspace)
    assert excluded(store) == []
    assert len(said(store)) == 1010  # another person's
    store.exclude("cell", cells[:3], reason="debris")
    store.include("cell", cells[:2])
    assert [row["id"] for row in excluded(store)] == [cells[2]]
    with store.session() as session:
        assert list(broken_events(session)) == []


def count(store: Store, table: Any) -> int:
    with store.session() as session:
        return session.scalar(select(func.count(table.id))) or 0


def excluded(store: Store) -> list[dict[str, Any]]:
    return store.sql("FROM exclusions WHERE source = 'annotation' ORDER BY id").to_pylist()


def test_what_was_changed_without_cellstore_is_found_after_more_was_said(
    store: Store, screen: SmallScreen, workspace: Workspace
) -> None:
    store.annotate("cell", [1, 2], ROUND)
    store.annotate("cell", [2], FLAT)
    assert odd_annotations(store) == []
    with as_owner(workspace) as owner:
        owner.execute(text(f"UPDATE annotations SET value = '{FLAT}' WHERE row_id = 1"))
    store.annotate("cell", [1], "small")
    assert odd_annotations(store) == ["its rows are not what the last ingest or correction left"]


def test_labels_of_images_and_wells_make_a_split(workspace: Workspace, store: Store) -> None:
    make = Factory(workspace)
    plate = make.plate("P1")
    wells = [make.well(plate, 1, column) for column in range(1, 9)]
    images = [make.image(well, site) for well in wells for site in (1, 2)]
    field = SplitParams(field="annotation")
    with pytest.raises(UnknownNameError, match="Unknown label field"):
        store.create_split("none", field)
    cell = make.cells_of(make.segmentation(images[0], make.run(Stage.SEGMENT), 1))[0]
    store.annotate("cell", [cell.id], ROUND)
    with pytest.raises(UserInputError, match="Only cells have labels of the field annotation"):
        store.create_split("none", field)
    for column in range(1, 9):
        store.annotate("well", f"P1/A0{column}", ROUND if column < 5 else FLAT, user="ada")
    first = [image.id for image in images[:2]]
    store.annotate("image", first, FLAT, user="ada")  # goes before their well
    store.annotate("image", [images[2].id], FLAT, user="ada")
    store.annotate("image", [images[2].id], ROUND, user="bob")  # they disagree: no label
    made = store.create_split("shapes", field)
    assert (made.classes, made.excluded["without_label"]) == (2, 1)
    rows = store.sql("FROM image_labels ORDER BY image_id").to_pylist()
    labels = {row["image_id"]: row["label"] for row in rows}
    assert list(labels.values()) == [FLAT, FLAT, None, *[ROUND] * 5, *[FLAT] * 8]
    query = "SELECT image_id, value FROM split_members JOIN labels ON labels.id = label_id"
    members = {row["image_id"]: row["value"] for row in store.sql(query).to_pylist()}
    assert len(members) == made.images > 8
    assert members.items() <= labels.items()

    assert store.check_split("shapes").relabelled == ()
    well = next(f"P1/A0{c}" for c in range(5, 9) if images[2 * c - 2].id in members)
    store.annotate("well", well, ROUND, user="ada")
    assert store.check_split("shapes").relabelled == (f"{well} (flat -> round)",)
    (frozen,) = store.audit(well, "well").record["frozen_labels"]
    assert (frozen["label"], frozen["now"], frozen["differs"]) == (FLAT, ROUND, True)
    (frozen,) = store.audit(f"{well}/1", "image").record["frozen_labels"]
    assert (frozen["label"], frozen["now"]) == (FLAT, ROUND)


@pytest.mark.one_database
def test_labels_choose_cells_and_go_with_their_plate(store: Store, screen: SmallScreen) -> None:
    one, *_, last = cell_ids(store)
    store.annotate("cell", [one, last], ROUND, user="ada")
    with store.session() as session:
        screen.factory.feature_set(session.get_one(Run, screen.measure_run.id).recipe)
    where = "cell_id IN (SELECT cell_id FROM annotation_table WHERE label = 'round')"
    chosen = {row["cell_id"] for row in store.cells(where=where).to_arrow().to_pylist()}
    assert chosen < {one, last}  # those of the split
    sql = "FROM annotation_table WHERE label = 'round'"
    assert {row["cell_id"] for row in store.cells(sql=sql).to_arrow().to_pylist()} == chosen
    other = screen.factory.plate("BR2")
    image = screen.factory.image(screen.factory.well(other, 1, 1))
    store.annotate("image", [image.id], ROUND)
    store.annotate("plate", "BR2", ROUND)
    store.delete_plate("BR2")
    assert said(store, plate="BR2") == {}
    assert len(said(store)) == 2
    with store.session() as session:
        rows = session.scalars(select(Annotation.reason).where(Annotation.undoes_id.is_not(None)))
        assert rows.all() == ["deleted", "deleted"]
    assert Level.PLATE.value in {row["level"] for row in store.sql("FROM annotations").to_pylist()}
