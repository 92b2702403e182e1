"""Audits: every step of the lineage, by index."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from typing import Any

import pytest
from factories import MOMENT, Factory, sha
from screens import SmallScreen, small_screen
from sqlalchemy import event, text
from unguarded import unguarded

from cellstore.enums import TARGET, GroupLevel, ImageFlagReason, Stage, Status, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Cell, IngestFile, Segmentation, SplitMember, Well
from cellstore.query.engine import open_questions
from cellstore.report.audit import Audit, audit
from cellstore_cli.audit_commands import show_audit

pytestmark = pytest.mark.one_database

audit_image = partial(audit, kind="image")
audit_well = partial(audit, kind="well")
audit_cell = partial(audit, kind="cell")
audit_run = partial(audit, kind="run")


class Values:
    """A record with its values as attributes, and those of its parts."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def __getattr__(self, name: str) -> Any:
        return _values(self.record[name])


def _values(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_values(item) for item in value)
    return Values(value) if isinstance(value, dict) else value


@pytest.mark.each_database
def test_an_image_with_everything(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    found = Values(audit_image(workspace, "BR1/B02/1").record)
    assert (found.plate, found.well, found.site, found.core_name) == ("BR1", "B02", 1, "r02c02f01")
    assert (found.treatment, found.target, found.control) == ("taxol", "TUBB", None)
    assert [(file.channel, len(file.sha256 or "")) for file in found.files] == [("DNA", 64)]
    assert found.missing_files == 0
    assert found.corrections == ()
    assert [(item.label, item.now, item.differs) for item in found.frozen_labels] == [
        ("taxol", "taxol", False)
    ]
    (masks,) = found.segmentations
    assert (masks.has_masks, masks.imported) == (True, None)
    assert masks.weights_sha256 == sha("cellpose weights")
    assert (masks.n_cells, masks.current, masks.run_id) == (2, True, screen.segment_run.id)
    (one,) = found.labellings
    assert (one.run_id, one.train_run_id) == (screen.predict_run.id, screen.train_run.id)
    assert (one.user, one.host, one.code_version) == ("ada", "bench", "0.1.0+gabc")
    assert one.started_at == screen.predict_run.started_at.isoformat()
    assert set(one.checkpoints) == {sha("model"), sha("model json")}
    assert (one.split, one.subset, one.well_subsets) == ("main", "test", ("test",))
    assert one.well_in_training is False
    assert one.segment_weights == (sha("cellpose weights"),)
    # one cell each: a draw that the sum of the probabilities decides
    assert list(one.votes.record.items()) == [("taxol", 1), ("DMSO", 1)]
    assert one.probabilities.record == pytest.approx({"taxol": 1.1, "DMSO": 0.8})
    assert (one.winner, one.soft_winner, one.tie) == ("taxol", "taxol", True)
    assert (one.truth, one.correct, one.n_cells) == ("taxol", True, 2)
    json.dumps(found.record, allow_nan=False)


@pytest.mark.each_database
def test_every_run_that_labelled_the_image_is_listed(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    image = screen.images["B01"]
    newer = make.segmentation(image, make.run(Stage.SEGMENT), 1, content_sha256=sha("old bytes"))
    again = make.run(Stage.PREDICT, parent_id=screen.train_run.id, split_id=screen.split.id)
    make.predict(again, make.cells_of(newer), [[(screen.labels["taxol"], 0.9)]])
    found = Values(audit_image(workspace, str(image.id)).record)
    assert [item.run_id for item in found.labellings] == [screen.predict_run.id, again.id]
    assert [item.winner for item in found.labellings] == ["DMSO", "taxol"]
    assert [item.segmentation_ids for item in found.labellings] == [
        (screen.segmentations["B01"].id,),
        (newer.id,),
    ]
    assert [item.current for item in found.segmentations] == [True, False]


def test_a_well_on_both_sides_is_named(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    with workspace.database.read() as session:
        well = session.get_one(Well, screen.images["B01"].well_id)
    other = screen.factory.image(well, 2)
    with unguarded(workspace) as session:
        session.add(
            SplitMember(
                split_id=screen.split.id,
                image_id=other.id,
                subset=Subset.TRAIN,
                label_id=screen.labels["DMSO"].id,
            )
        )
    (one,) = Values(audit_image(workspace, "BR1/r02c01f01").record).labellings
    assert (one.well_subsets, one.well_in_training) == (("train", "test"), True)


def test_an_image_outside_the_split_and_one_without_files(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    (one,) = Values(audit_image(workspace, "r02c04f01").record).labellings
    assert (one.subset, one.truth, one.correct) == ("outside", "taxol", True)
    screen.factory.image(screen.factory.well(screen.plate, 8, 1), missing=True)
    bare = Values(audit_image(workspace, "r08c01f01").record)
    assert (bare.treatment, bare.content_sha256, bare.missing_files) == (None, None, 1)
    assert (bare.labellings, bare.segmentations) == ((), ())


def corrected(workspace: Workspace) -> int:
    """Give well B01, of which split main has frozen DMSO, taxol and then barasertib."""
    screen = small_screen(workspace)
    make = screen.factory
    with workspace.database.read() as session:
        well = session.get_one(Well, screen.images["B01"].well_id)
    make.well_change(well, make.treatment("taxol", "TUBB"), file="first.csv", line=None)
    with workspace.database.read() as session:
        well = session.get_one(Well, well.id)
    run = make.run(Stage.INGEST)
    make.well_change(well, make.treatment("barasertib", "AURKB"), run, file="map.csv", line=7)
    return run.id


def test_a_corrected_treatment_beside_the_frozen_label(workspace: Workspace) -> None:
    run_id = corrected(workspace)
    found = Values(audit_image(workspace, "BR1/B01/1").record)
    assert (found.treatment, found.target) == ("barasertib", "AURKB")
    assert [
        (item.old.treatment, item.new.treatment, item.file, item.line) for item in found.corrections
    ] == [("DMSO", "taxol", "first.csv", None), ("taxol", "barasertib", "map.csv", 7)]
    (label,) = found.frozen_labels
    assert (label.split, label.subset, label.field) == ("main", "test", "perturbation")
    assert (label.label, label.now, label.differs) == ("DMSO", "barasertib", True)
    assert label.since is not None
    assert (label.since.run_id, label.since.line) == (run_id, 7)
    # What the network was asked is what the split froze.
    assert [item.truth for item in found.labellings] == ["DMSO"]
    json.dumps(found.record, allow_nan=False)


def test_a_well_in_two_subsets_is_told_once(workspace: Workspace) -> None:
    make = Factory(workspace)
    well, taxol = make.well(make.plate("P1"), 1, 1, make.treatment("DMSO")), make.label("taxol")
    sides = enumerate((Subset.TEST, Subset.TRAIN), start=1)
    members = [(make.image(well, site), side, taxol) for site, side in sides]
    make.split(members, group_level=GroupLevel.IMAGE)
    assert words(audit_well(workspace, "P1/A01")).count("the well now has: DMSO") == 1


def words(audit: Audit) -> str:
    """The text of an audit, in one line; no line of it is wider than a terminal."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(screen):
        show_audit(audit)
    screen.seek(0)
    text = screen.read()
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_a_corrected_treatment_is_told(workspace: Workspace) -> None:
    run_id = corrected(workspace)
    wanted = (
        "label in split main: DMSO; the well now has: barasertib, "
        f"since run {run_id} (map.csv, line 7)"
    )
    assert wanted in words(audit_image(workspace, "BR1/B01/1"))
    text = words(audit_well(workspace, "BR1/B1"))
    assert wanted in text
    assert "new treatment taxol, target TUBB" in text
    assert "the well now has" not in words(audit_image(workspace, "BR1/B02/1"))


def test_an_ingest_names_its_files_and_the_wells_it_changed(workspace: Workspace) -> None:
    run_id = corrected(workspace)
    counts = {"n_rows": 9, "n_created": 1, "n_updated": 2, "n_unchanged": 4, "n_refused": 2}
    Factory(workspace).add(
        IngestFile(
            run_id=run_id,
            name="map.csv",
            sha256=sha("map"),
            size_bytes=10,
            layout="platemap",
            **counts,
        )
    )
    audit = audit_run(workspace, str(run_id))
    found = Values(audit.record)
    (file,) = found.ingested
    assert (file.name, file.sha256, file.layout) == ("map.csv", sha("map"), "platemap")
    assert (file.rows, file.created, file.updated, file.unchanged, file.refused) == (9, 1, 2, 4, 2)
    text = words(audit)
    assert "map.csv platemap" in text
    assert "wells with another treatment 1" in text
    json.dumps(found.record, allow_nan=False)


@pytest.mark.each_database
def test_a_change_of_another_field_leaves_a_label_right(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    with workspace.database.read() as session:
        well = session.get_one(Well, screen.images["B02"].well_id)
    change = make.well_change(well, make.treatment("taxol", "TUBB1"))
    by_target = make.label("TUBB", TARGET)
    members = [(screen.images["B02"], Subset.TRAIN, by_target)]
    make.split(members, name="targets", field=TARGET)
    found = Values(audit_well(workspace, "BR1/B02").record)
    assert [(item.split, item.now, item.differs) for item in found.frozen_labels] == [
        ("main", "taxol", False),
        ("targets", "TUBB1", True),
    ]
    assert found.frozen_labels[0].since is None
    assert found.frozen_labels[1].since is not None
    assert found.frozen_labels[1].since.run_id == change.run_id


def test_a_well(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    found = Values(audit_well(workspace, "BR1/b2").record)
    assert (found.plate, found.well, found.corrections) == ("BR1", "B02", ())
    assert found.images == (screen.images["B02"].id,)
    assert found.treatment is not None
    assert (found.treatment.name, found.treatment.target) == ("taxol", "TUBB")
    with pytest.raises(UnknownNameError, match="plate 'BR9'"):
        audit_well(workspace, "BR9/B02")
    with pytest.raises(UnknownNameError, match="well 'H12'"):
        audit_well(workspace, "BR1/H12")
    for text_ in ("BR1/", "BR1/well", "17", ""):
        with pytest.raises(UserInputError):
            audit_well(workspace, text_)


@pytest.mark.each_database
def test_what_another_tool_found(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    recipe = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler", "name": "cp"})
    found = make.add(
        Segmentation(
            image_id=screen.images["A01"].id,
            recipe_id=recipe.id,
            run_id=make.run(Stage.INGEST).id,
            n_cells=1,
            created_at=MOMENT,
        )
    )
    cell = make.add(Cell(segmentation_id=found.id, object_number=1))
    found_cell = audit_cell(workspace, str(cell.id))
    audit = Values(found_cell.record)
    assert (audit.box, audit.centroid, audit.excluded) == (None, None, None)
    one = audit.segmentation
    assert (one.diameter, one.has_masks, one.current, one.imported) == (
        None,
        False,
        True,
        "CellProfiler",
    )
    text = words(found_cell)
    assert "imported CellProfiler" in text
    assert "box - " in text
    assert "has masks no" in text
    assert "imported CellProfiler" in words(audit_image(workspace, "BR1/A01/1"))


def test_flags_are_those_of_finished_runs(workspace: Workspace) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate("P1"), 1, 1))
    [cell] = make.cells_of(make.segmentation(image, make.run(Stage.SEGMENT), 1))
    first, second, third = (make.run(Stage.QC) for _ in range(3))
    unfinished = make.run(Stage.QC, status=Status.FAILED)
    make.flag_image(first, image, ImageFlagReason.NO_CELLS)
    make.flag_image(second, image, ImageFlagReason.OUT_OF_FOCUS, "DNA", -4.25)
    make.flag_image(unfinished, image, ImageFlagReason.SATURATED, "DNA")
    make.flag_cell(third, cell)
    audit = audit_image(workspace, str(image.id))
    found = Values(audit.record)
    assert [(flag.run_id, flag.reason, flag.channel) for flag in found.flags] == [
        (first.id, "no cells", None),
        (second.id, "out of focus", "DNA"),
    ]
    assert f"{second.id} out of focus DNA -4.25 2 -" in words(audit)
    assert f"{third.id} touches the border" in words(audit_cell(workspace, str(cell.id)))


@pytest.mark.each_database
def test_audits_and_views_agree(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    with open_questions(workspace) as questions:
        rows = questions.ask("SELECT * FROM votes WHERE level = 'image'").records()
    for image in screen.images.values():
        for one in Values(audit_image(workspace, str(image.id)).record).labellings:
            votes = {row["vote"]: row for row in rows if row["image_id"] == image.id}
            assert one.winner == votes["hard"]["winner"]
            assert one.soft_winner == votes["soft"]["winner"]
            assert (one.tie, one.correct) == (votes["hard"]["tie"], votes["hard"]["correct"])
            assert one.n_cells == votes["hard"]["n_cells"]


def test_names_that_fit_nothing_or_several(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    make.image(make.well(make.plate("BR2"), 2, 1), 1)
    with pytest.raises(UserInputError, match="BR1/r02c01f01, BR2/r02c01f01"):
        audit_image(workspace, "r02c01f01")
    for text_ in ("r09c09f09", "'; DROP TABLE images; --", "", "9" * 30):
        with pytest.raises(UnknownNameError):
            audit_image(workspace, text_)


def test_a_cell(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    cell = screen.factory.cells_of(screen.segmentations["B01"])[2]
    found = Values(audit_cell(workspace, str(cell.id)).record)
    assert (found.image, found.object_number, found.excluded) == ("BR1/r02c01f01", 3, None)
    assert found.box == (0, 30, 8, 38)
    assert found.segmentation.id == screen.segmentations["B01"].id
    assert found.record["features"][f"recipe {screen.measure_run.recipe_id}"]["area"] == 64.0
    assert [(item.rank, item.label, item.probability) for item in found.choices] == [
        (1, "taxol", 0.9),
        (2, "DMSO", 0.1),
    ]
    with pytest.raises(UnknownNameError, match="no cell 10001"):
        audit_cell(workspace, "10001")


@pytest.mark.each_database
def test_a_run_walks_both_ways(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    screen.factory.job(screen.predict_run, screen.images["B01"])
    screen.factory.job(screen.predict_run, screen.images["B02"], Status.FAILED, error="no pixels")
    found = Values(audit_run(workspace, "latest").record)
    assert (found.run_id, found.stage) == (screen.predict_run.id, "predict")
    assert [run.run_id for run in found.parents] == [screen.train_run.id]
    assert [recipe.stage for recipe in found.inputs] == ["segment", "measure", "train"]
    assert found.jobs.record == {"done": 1, "failed": 1}
    assert found.split_counts.record == {"train": 2, "validation": 0, "test": 3}
    above = Values(audit_run(workspace, str(screen.train_run.id)).record)
    assert [run.run_id for run in above.children] == [screen.predict_run.id]
    assert {item.sha256 for item in above.artifacts} == {sha("model"), sha("model json")}
    assert above.query == "SELECT cells.id FROM cells"
    json.dumps([found.record, above.record], allow_nan=False)
    with pytest.raises(UnknownNameError):
        audit_run(workspace, "77")


@pytest.mark.each_database
def test_votes_are_found_by_index(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        asked.append((statement, values))

    event.listen(workspace.database.engine, "before_cursor_execute", note)
    audit_image(workspace, "BR1/r02c01f01")
    event.remove(workspace.database.engine, "before_cursor_execute", note)
    counts = [(query, values) for query, values in asked if "sum(CAST(round" in query]
    sqlite = workspace.database.is_sqlite
    with workspace.database.read() as session:
        connection = session.connection()
        if not sqlite:
            # On a tiny table a scan is right; the question is whether an index can serve.
            session.execute(text("SET LOCAL enable_seqscan = off"))
        explain = "EXPLAIN QUERY PLAN" if sqlite else "EXPLAIN"
        ((query, values),) = counts
        rows = connection.exec_driver_sql(f"{explain} {query}", values).all()
    plan = "\n".join(str(tuple(row)) for row in rows)
    assert "SCAN" not in plan.replace("SCAN flags", "").replace("SCAN CONSTANT ROW", "")
    assert "Seq Scan" not in plan
    assert "ix_predictions_cell_id" in plan


def test_an_audit_does_not_slow_down_with_other_images(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    make = Factory(sqlite_workspace)
    run = make.run(Stage.SEGMENT)
    for site in range(2, 12):
        make.segmentation(make.image(make.well(screen.plate, 9, site)), run, 200)
    steps = [_steps(sqlite_workspace, screen.images["B01"].id)]
    for site in range(12, 24):
        make.segmentation(make.image(make.well(screen.plate, 9, site)), run, 400)
    steps.append(_steps(sqlite_workspace, screen.images["B01"].id))
    assert steps[1] <= steps[0] * 1.2


def _steps(workspace: Workspace, image_id: int) -> int:
    """How many steps of SQLite's machine the audit of an image takes."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    def watch(connection: Any, *_: Any) -> None:
        connection.connection.driver_connection.set_progress_handler(tick, 1)

    event.listen(workspace.database.engine, "before_cursor_execute", watch)
    audit_image(workspace, str(image_id))
    event.remove(workspace.database.engine, "before_cursor_execute", watch)
    return count


def test_a_well_and_site_on_several_plates_are_listed(workspace: Workspace) -> None:
    make = Factory(workspace)
    for barcode in ("P1", "P2"):
        make.image(make.well(make.plate(barcode), 5, 5), 2)
    with pytest.raises(UserInputError, match="names several images: P1/r05c05f02, P2/r05c05f02"):
        audit_image(workspace, "E05/2")
    assert audit_image(workspace, "P2/E05/2").record["plate"] == "P2"


def test_a_plate_or_a_well_that_is_misspelt_is_named(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    for name, meant in (("BR2", "'BR2'. Known: BR1. Did you"), ("BR1/B99", "of plate BR1 'B99'")):
        with pytest.raises(UnknownNameError, match=meant):
            audit(workspace, name)
