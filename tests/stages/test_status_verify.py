"""status and verify on both databases; the command line's tests look at the details."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

import pytest
from factories import Factory
from screens import small_screen
from sqlalchemy import func, select, update

from cellstore.enums import ArtifactKind, ImageFlagReason, Stage, Status
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    Image,
    ImageFile,
    Job,
    Prediction,
    Recipe,
    Run,
    Well,
)
from cellstore.stages.manage_jobs import retry
from cellstore.stages.status import status
from cellstore.stages.verify import verify

pytestmark = pytest.mark.one_database

SET = ("name", "storage", "columns", "cells")


@pytest.fixture(autouse=True)
def _without_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the factory stand in no ledger; ``test_verify_ledger`` is about that."""
    monkeypatch.setattr("cellstore.stages.verify.check_ledger", lambda *_: [])


@pytest.mark.each_database
def test_the_counts_are_those_of_the_tables(workspace: Workspace):
    small_screen(workspace)
    found = status(workspace)
    with workspace.database.read() as session:
        counts = [
            session.scalar(select(func.count()).select_from(table))
            for table in (Well, Image, Cell, Prediction)
        ]
    assert [found.wells, found.images, found.cells, found.predictions] == counts
    assert found.cells > 0


@pytest.mark.each_database
def test_a_recipe_counts_its_images_by_how_they_stand(workspace: Workspace):
    make = Factory(workspace)
    plate = make.plate()
    images = [make.image(make.well(plate, 1, column)) for column in range(1, 6)]
    run = make.run(Stage.SEGMENT)
    make.job(run, images[0])
    with workspace.database.begin() as session:
        for image, state, content in (
            (images[1], Status.DONE, "0" * 64),
            (images[2], Status.FAILED, images[2].content_sha256),
            (images[3], Status.PENDING, images[3].content_sha256),
            (images[4], Status.RUNNING, images[4].content_sha256),
        ):
            session.add(
                Job(
                    recipe_id=run.recipe_id,
                    image_id=image.id,
                    content_sha256=content,
                    run_id=run.id,
                    status=state,
                    attempts=1,
                )
            )
    (recipe,) = status(workspace).recipes
    assert tuple(recipe[name] for name in ("done", "stale", "failed", "open")) == (1, 1, 1, 2)
    assert status(workspace).segmented == 1


def test_flagged_images_are_those_of_the_newest_finished_run(workspace: Workspace):
    make = Factory(workspace)
    plate = make.plate()
    images = [make.image(make.well(plate, 1, column)) for column in range(1, 4)]
    assert (status(workspace).qc_run_id, status(workspace).flagged_images) == (None, 0)
    old, new, stopped = (
        make.run(Stage.QC, status=state) for state in (Status.DONE, Status.DONE, Status.FAILED)
    )
    for run, number in ((old, 3), (new, 2), (stopped, 1)):
        for image in images[:number]:
            make.flag_image(run, image, ImageFlagReason.NO_CELLS)
            make.flag_image(run, image, ImageFlagReason.SATURATED, "DNA")
    make.job(new, images[0])
    found = status(workspace)
    assert (found.qc_run_id, found.flagged_images) == (new.id, 2)
    [recipe] = [item for item in found.recipes if item["stage"] == "qc"]
    assert (recipe["done"], recipe["todo"]) == (1, 2)


def test_files_that_no_one_wrote_are_told(workspace: Workspace):
    small_screen(workspace)  # rows only: every file is missing
    found = verify(workspace)
    with workspace.database.read() as session:
        files = session.scalar(select(func.count()).select_from(Artifact))
    assert (found.ok, found.files) == (False, files)
    assert {problem.reason for problem in found.problems} == {"the file is gone"}


def other_tools(workspace: Workspace) -> tuple[Factory, list[Cell]]:
    """A feature set ``cp`` of four cells in an image that has not been seen."""
    make = Factory(workspace)
    segment = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler"})
    found = make.segmentation(
        make.image(make.well(make.plate("P9"), 1, 1), missing=True),
        make.run(Stage.INGEST),
        4,
        recipe_id=segment.id,
        content_sha256=None,
        diameter=None,
        mask_artifact_id=None,
        flow_artifact_id=None,
    )
    cells = make.cells_of(found)
    make.feature_files("cp", cells, {"a": [1.0, 2.0, 3.0, 4.0]}, segment, rows_of_file=3)
    return make, cells


def test_what_other_tools_found_is_counted(workspace: Workspace):
    other_tools(workspace)
    found = status(workspace)
    assert (found.segmented, found.measured, found.cells) == (1, 1, 4)
    (recipe,) = found.recipes
    assert (recipe["stage"], recipe["done"], recipe["stale"]) == ("segment", 1, 0)
    (features,) = found.feature_sets
    assert [features[name] for name in SET] == ["cp", "files", 1, 4]


def test_the_built_in_sets_are_counted_by_recipe(workspace: Workspace):
    screen = small_screen(workspace)
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, screen.measure_run.recipe_id)
        measured = session.scalar(select(func.count()).select_from(CellFeatures))
    screen.factory.feature_set(recipe, "basic_1")
    (features,) = status(workspace).feature_sets
    assert [features[name] for name in SET[1:]] == ["table", 14, measured]


def test_whole_features_of_cells_without_masks_are_fine(workspace: Workspace):
    other_tools(workspace)
    found = verify(workspace)
    assert (found.ok, found.problems) == (True, ())
    assert (found.files, found.feature_files, found.segmentations) == (2, 2, 0)


@pytest.mark.each_database
def test_features_that_are_not_what_was_written_are_told(workspace: Workspace):
    other_tools(workspace)
    with workspace.database.begin() as session:
        first, second = session.scalars(select(Artifact).order_by(Artifact.id))
    workspace.artifacts.locate(first.path).write_bytes(b"damaged")
    workspace.artifacts.locate(second.path).unlink()
    found = verify(workspace)
    reasons = {problem.path: problem.reason for problem in found.problems}
    assert "sha256 differs" in reasons[first.path]
    assert reasons[second.path] == "the file is gone"
    with workspace.database.read() as session:  # the ingest that brought them does it again
        ingests = session.scalars(select(Run.command).where(Run.stage == Stage.INGEST)).all()
    assert (found.commands, retry(workspace).lost_files) == ((ingests[0],), 1)


@pytest.mark.each_database
def test_features_and_their_rows_must_agree(workspace: Workspace):
    _, cells = other_tools(workspace)
    with workspace.database.begin() as session:
        first, _ = session.scalars(select(FeatureFile).order_by(FeatureFile.first_cell_id))
        first.n_rows = 5
        session.delete(session.get_one(Cell, cells[3].id))
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert reasons == [
        (
            f"feature set cp: the file has 3 rows of cells {cells[0].id} to {cells[2].id}, "
            f"the database 5 rows of cells {cells[0].id} to {cells[2].id}"
        ),
        "feature set cp: 1 of its cells are not in the database",
    ]


def test_a_cell_that_comes_twice_is_told(workspace: Workspace):
    make, cells = other_tools(workspace)
    with workspace.database.read() as session:
        segment = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT)).one()
    make.feature_files("twice", [cells[0], cells[0]], {"a": [1.0, 2.0]}, segment)
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert reasons == ["feature set twice: its cell ids do not ascend"]


def test_a_cell_that_is_in_two_files_is_told_of_the_store(workspace: Workspace):
    make, cells = other_tools(workspace)
    with workspace.database.read() as session:
        segment = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT)).one()
    make.feature_files("cp", cells[1:3], {"a": [8.0, 9.0]}, segment)
    reasons = [problem.reason for problem in verify(workspace).problems]
    assert reasons == ["feature set cp: 2 of its cells are in another file of the set, too"]


def test_files_of_a_run_that_is_still_running_are_no_orphans(workspace: Workspace):
    stored = workspace.artifacts.write(ArtifactKind.FEATURES, b"about to be named", ".parquet")
    place = workspace.artifacts.locate(stored.path)
    old = time.time() - 3600
    os.utime(place, (old, old))
    started = datetime.now(UTC) - timedelta(hours=2)
    run = Factory(workspace).run(Stage.INGEST, status=Status.RUNNING, started_at=started)
    assert verify(workspace, fix=True).removed == 0
    assert place.exists()
    with workspace.database.begin() as session:
        session.execute(update(Run).where(Run.id == run.id).values(status=Status.FAILED))
    assert verify(workspace, fix=True).removed == 1
    assert not place.exists()


def test_the_next_step_is_what_the_store_lacks(workspace: Workspace):
    def first() -> str:
        return " ".join(status(workspace).next[0].split()[1:3])

    assert first() == "ingest FOLDER"
    make = Factory(workspace)
    plate = make.plate()
    image = make.image(make.well(plate, 1, 1), missing=True)
    assert (first(), status(workspace).untreated_wells) == ("ingest TABLE", 1)
    with workspace.database.begin() as session:
        session.execute(update(Image).values(content_sha256="0" * 64))
    assert status(workspace).next[0] == "cellstore segment"
    assert status(workspace).next[1].startswith("cellstore ingest PLATEMAP")
    treated = make.image(make.well(plate, 1, 2, make.treatment("taxol")))
    with workspace.database.begin() as session:  # the factory's folder is on no machine
        session.execute(update(ImageFile).values(folder_id=None))
    assert status(workspace).next == ("cellstore segment",)
    assert status(workspace).untreated_wells == 1
    with workspace.database.begin() as session:  # numbers in place of names of stains
        one = select(func.min(ImageFile.id)).scalar_subquery()
        session.execute(update(ImageFile).values(channel="ch1"))
        session.execute(update(ImageFile).where(ImageFile.id == one).values(channel="ch2"))
    assert status(workspace).next == (
        "cellstore segment --preview 6 --channels ch1  (or another one that shows the nuclei: ch2)",
    )
    segment = make.run(Stage.SEGMENT)
    found = make.segmentation(image, segment, 2)
    make.segmentation(treated, segment, 2)
    assert first() == "measure"
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, segment.recipe_id)
    make.feature_files("cp", make.cells_of(found), {"a": [1.0, 2.0]}, recipe)
    assert status(workspace).next == ("cellstore profile", "cellstore split create by-well")
    make.run(Stage.PROFILE)
    assert status(workspace).next == ("cellstore hits", "cellstore split create by-well")
    hits = make.run(Stage.HITS, status=Status.FAILED)
    split = make.split([], "first")
    assert first() == "train"
    train = make.run(Stage.TRAIN, split_id=split.id)
    assert first() == "predict"
    make.run(Stage.PREDICT, parent_id=train.id)
    found, report, baselines, _, votes, export = status(workspace).next
    assert (report, found, votes) == ("cellstore report", "cellstore hits", "cellstore votes")
    assert baselines.startswith("cellstore train --baseline null")
    make.run(Stage.QC)
    null = make.recipe(Stage.TRAIN, parameters={"baseline": "majority"})
    make.run(Stage.TRAIN, null, split_id=split.id)
    assert status(workspace).next == (found, report, votes, export)
    with workspace.database.begin() as session:
        session.execute(update(Run).where(Run.id == hits.id).values(status=Status.DONE))
    assert status(workspace).next == (report, votes, export)
    make.split([], "second")
    assert first() == "train"


@pytest.mark.one_database
def test_the_next_step_with_a_table_of_cells_needs_no_image(workspace: Workspace):
    make = Factory(workspace)
    segment = make.run(Stage.SEGMENT)
    image = make.image(make.well(make.plate(), 1, 1), missing=True)
    cells = make.cells_of(make.segmentation(image, segment, 2, content_sha256=None))
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, segment.recipe_id)
    make.feature_files("cp", cells, {"a": [1.0, 2.0]}, recipe)
    assert status(workspace).next[0].startswith("cellstore ingest PLATEMAP")
    taxol = make.treatment("taxol")
    with workspace.database.begin() as session:
        session.execute(update(Well).values(treatment_id=taxol.id))
    said = [status(workspace).next]
    for stage in (Stage.PROFILE, Stage.HITS):
        make.run(stage)
        said.append(status(workspace).next)
    # With both there, what is next is to make them anew after a correction.
    assert said == [("cellstore profile",), ("cellstore hits",), ("cellstore profile",)]
