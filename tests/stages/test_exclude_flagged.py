"""Leaving flagged images and cells out: only when asked, kept by name, counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from small_training import TINY, Opener, Trained
from sqlalchemy import select

from cellstore import Store
from cellstore.config import SplitParams, TrainParams, VoteOptions
from cellstore.enums import CellFlagReason, ImageFlagReason, Stage, Status
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Cell, Image, Job, Recipe, RecipeInput, Run, Segmentation, Split
from cellstore.query.engine import open_questions
from cellstore.report.scoring import report
from cellstore.stages.split import create_split
from cellstore.stages.train import train


def qc_run(make: Factory, plates: list[str], segment: Recipe | None = None, **more: Any) -> Run:
    """A quality-control run that has looked at ``plates``, and at the cells of a recipe."""
    quality = make.recipe(Stage.QC)
    recipe = make.recipe(Stage.QC, inputs=[quality, segment] if segment else [quality])
    return make.run(Stage.QC, recipe, result={"plates": plates, "state": ""}, **more)


def look_at(make: Factory, run: Run, images: Sequence[Image]) -> None:
    """Say that a quality-control run has measured the pixels of ``images``."""
    with make.workspace.database.read() as session:
        query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
        query = query.where(RecipeInput.recipe_id == run.recipe_id, Recipe.stage == Stage.QC)
        quality = session.scalars(query).one()
    for image in images:
        make.add(
            Job(
                recipe_id=quality.id,
                image_id=image.id,
                content_sha256=image.content_sha256,
                run_id=run.id,
                status=Status.DONE,
            )
        )


def recipe_of(workspace: Workspace, run: Run) -> Recipe:
    with workspace.database.read() as session:
        return session.get_one(Recipe, run.recipe_id)


class Plate:
    """Six wells of two treatments, an image each, to draw a split from."""

    def __init__(self, workspace: Workspace) -> None:
        self.make = Factory(workspace)
        plate = self.make.plate("P1")
        treatments = [self.make.treatment("DMSO"), self.make.treatment("drug")]
        wells = [self.make.well(plate, 1, column, treatments[column % 2]) for column in range(1, 9)]
        self.images = [self.make.image(well) for well in wells]


@pytest.mark.one_database
def test_a_split_leaves_flagged_images_out_and_says_which_run(workspace: Workspace) -> None:
    plate = Plate(workspace)
    run = qc_run(plate.make, ["P1"])
    flagged = plate.images[:2]
    for image in flagged:
        plate.make.flag_image(run, image, ImageFlagReason.NO_CELLS)
        plate.make.flag_image(run, image, ImageFlagReason.SATURATED, "DNA")
    result = create_split(workspace, "clean", SplitParams(exclude_flagged="latest"))
    assert result.images == 6
    assert (result.excluded["flagged"], result.excluded["qc_run"]) == (2, run.id)
    with workspace.database.read() as session:
        split = session.scalars(select(Split)).one()
        recipe = session.get_one(Recipe, split.recipe_id)
        inputs = session.scalars(
            select(RecipeInput.input_id).where(RecipeInput.recipe_id == recipe.id)
        ).all()
    assert recipe.parameters["exclude_flagged"] == run.id
    assert inputs == [run.recipe_id]
    assert f"run_id = {run.id}" in split.query


@pytest.mark.one_database
def test_unasked_a_split_is_as_it_always_was(workspace: Workspace) -> None:
    plate = Plate(workspace)
    before = create_split(workspace, "a")
    run = qc_run(plate.make, ["P1"])
    plate.make.flag_image(run, plate.images[0], ImageFlagReason.NO_CELLS)
    after = create_split(workspace, "b")
    assert (after.images, after.fingerprint) == (8, before.fingerprint)
    assert "flagged" not in after.excluded
    with workspace.database.read() as session:
        recipes = session.scalars(select(Recipe).where(Recipe.stage == Stage.SPLIT)).all()
    assert len(recipes) == 1
    assert recipes[0].parameters["exclude_flagged"] is None


def test_the_named_run_counts_else_the_newest_finished_one(sqlite_workspace: Workspace) -> None:
    plate = Plate(sqlite_workspace)
    old, new = (qc_run(plate.make, ["P1"]) for _ in range(2))
    unfinished = qc_run(plate.make, ["P1"], status=Status.RUNNING)
    plate.make.flag_image(old, plate.images[0], ImageFlagReason.NO_CELLS)
    newest = create_split(sqlite_workspace, "a", SplitParams(exclude_flagged="latest"))
    assert (newest.excluded["qc_run"], newest.excluded["flagged"]) == (new.id, 0)
    named = create_split(sqlite_workspace, "b", SplitParams(exclude_flagged=str(old.id)))
    assert (named.excluded["qc_run"], named.excluded["flagged"]) == (old.id, 1)
    with pytest.raises(UserInputError, match=r"is running, so its flags are incomplete"):
        create_split(sqlite_workspace, "c", SplitParams(exclude_flagged=str(unfinished.id)))


@pytest.mark.one_database
def test_images_that_a_run_knew_nothing_of_are_kept_and_counted(workspace: Workspace) -> None:
    plate = Plate(workspace)
    run = qc_run(plate.make, ["P1"])
    look_at(plate.make, run, plate.images[:5])
    result = create_split(workspace, "a", SplitParams(exclude_flagged="latest"))
    assert (result.images, result.excluded["unseen_by_qc"]) == (8, 3)


def test_without_a_run_the_sentence_says_what_to_do(sqlite_workspace: Workspace) -> None:
    Plate(sqlite_workspace)
    with pytest.raises(UnknownNameError, match=r"There is no qc run yet.*cellstore qc"):
        create_split(sqlite_workspace, "a", SplitParams(exclude_flagged="latest"))


def test_a_plate_that_was_not_looked_at_is_refused(sqlite_workspace: Workspace) -> None:
    plate = Plate(sqlite_workspace)
    qc_run(plate.make, ["another"])
    with pytest.raises(UserInputError, match=r"has not looked at plate P1.*cellstore qc"):
        create_split(sqlite_workspace, "a", SplitParams(exclude_flagged="latest"))


def test_where_everything_is_flagged_nothing_is_left_to_split(sqlite_workspace: Workspace) -> None:
    plate = Plate(sqlite_workspace)
    run = qc_run(plate.make, ["P1"])
    for image in plate.images:
        plate.make.flag_image(run, image, ImageFlagReason.NO_CELLS)
    with pytest.raises(UserInputError, match=r"8 are flagged.*--exclude-flagged"):
        create_split(sqlite_workspace, "a", SplitParams(exclude_flagged="latest"))


def flagged_screen(workspace: Workspace) -> tuple[SmallScreen, Run]:
    """The small screen; image B03 is flagged, and of B01 the two cells that say DMSO."""
    screen = small_screen(workspace)
    run = qc_run(screen.factory, ["BR1"], recipe_of(workspace, screen.segment_run))
    screen.factory.flag_image(run, screen.images["B03"], ImageFlagReason.OUT_OF_FOCUS, "DNA")
    for cell in screen.factory.cells_of(screen.segmentations["B01"])[:2]:
        screen.factory.flag_cell(run, cell, CellFlagReason.AREA)
    return screen, run


def test_a_flagged_image_has_no_vote_of_a_model_of_images(
    sqlite_workspace: Workspace,
) -> None:
    screen, _ = flagged_screen(sqlite_workspace)
    wells = {"plate": "BR1", "well": ["B01", "B02", "B03"], "site": 1, "label": "DMSO"}
    own = str(Store(sqlite_workspace).add_predictions(pd.DataFrame(wells), "fields").run_id)
    found = report(sqlite_workspace, own, vote_options=VoteOptions(exclude_flagged="latest"))
    assert (found.images, found.images_flagged, found.cells_flagged) == (2, 1, 0)
    elsewhere = VoteOptions(exclude_flagged=str(qc_run(screen.factory, ["BR9"]).id))
    with pytest.raises(UserInputError, match="has not looked at plate BR1"):
        report(sqlite_workspace, own, vote_options=elsewhere)


@pytest.mark.one_database
def test_flagged_cells_and_images_have_no_vote(workspace: Workspace) -> None:
    screen, run = flagged_screen(workspace)
    look_at(screen.factory, run, [screen.images[name] for name in ("B01", "B02", "B03")])
    everything = report(workspace)
    assert (everything.qc_run_id, everything.images, everything.cells) == (None, 3, 7)
    found = report(workspace, vote_options=VoteOptions(exclude_flagged="latest"))
    # B01 is left with the cell that says taxol, and is wrong; B02 is right by its first cell.
    assert (found.images, found.cells, found.wells) == (2, 3, 2)
    assert (found.score("image", "hard").correct, found.score("image", "hard").n) == (1, 2)
    assert (found.score("cell", "hard").correct, found.score("cell", "hard").n) == (1, 3)
    assert (found.qc_run_id, found.images_flagged, found.cells_flagged) == (run.id, 1, 4)
    assert (
        f"Excluded, because quality-control run {run.id} flagged them: 1 images and 4 cells, those "
        "of the images included."
    ) in found.notes
    # B04 is labelled, too, if not on the side that is scored.
    looked = f"Quality-control run {run.id} has not looked at 1 of the"
    assert any(note.startswith(looked) for note in found.notes)


def test_the_page_says_what_was_left_out(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    _, run = flagged_screen(sqlite_workspace)
    target = tmp_path / "report.html"
    Store(sqlite_workspace).report(
        html=target, vote_options=VoteOptions(exclude_flagged=str(run.id))
    )
    text = " ".join(target.read_text(encoding="utf-8").split())
    assert f"quality-control run {run.id} flagged them: 1 images and 4 cells" in text
    assert "2 images with 3 cells in 2 wells" in text


def test_a_report_refuses_flags_of_other_cells(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    no_cells = qc_run(screen.factory, ["BR1"])
    with pytest.raises(UserInputError, match=r"looked at no cells.*--segmentation"):
        report(sqlite_workspace, vote_options=VoteOptions(exclude_flagged=str(no_cells.id)))
    other = qc_run(screen.factory, ["BR1"], screen.factory.recipe(Stage.SEGMENT))
    with pytest.raises(UserInputError, match=r"looked at the cells of segment recipe"):
        report(sqlite_workspace, vote_options=VoteOptions(exclude_flagged=str(other.id)))


def test_a_report_on_flagged_images_alone_says_so(sqlite_workspace: Workspace) -> None:
    screen, run = flagged_screen(sqlite_workspace)
    for name in ("B01", "B02", "B04"):
        screen.factory.flag_image(run, screen.images[name], ImageFlagReason.NO_CELLS)
    with pytest.raises(UserInputError, match=r"no image that counts.*without --exclude-flagged"):
        report(sqlite_workspace, vote_options=VoteOptions(exclude_flagged="latest"))


def test_the_views_of_questions_take_the_flags_of_one_run(workspace: Workspace) -> None:
    _, run = flagged_screen(workspace)
    question = "SELECT count(*) AS n FROM eligible_cells"
    with open_questions(workspace) as questions:
        assert questions.ask(question).table()["n"].to_pylist() == [10]
    with open_questions(
        workspace, vote_options=VoteOptions(exclude_flagged=str(run.id))
    ) as questions:
        assert questions.ask(question).table()["n"].to_pylist() == [6]
    with open_questions(
        workspace, vote_options=VoteOptions(exclude_flagged=str(run.id + 99))
    ) as questions:
        assert questions.ask(question).table()["n"].to_pylist() == [10]


LEFT_OUT = TrainParams(**{**TINY.__dict__, "exclude_flagged": "latest"})


def trainable(workspace: Workspace) -> tuple[Factory, Run, list[int]]:
    """Flags on the built store: a cell of every image, and one training image whole."""
    make = Factory(workspace)
    with workspace.database.read() as session:
        segment = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT)).one()
        first = select(Cell).where(Cell.object_number == 1).order_by(Cell.id)
        cells = session.scalars(first).all()
        images = session.scalars(select(Image).order_by(Image.id)).all()
    run = qc_run(make, ["P1"], segment)
    for cell in cells:
        make.flag_cell(run, cell)
    return make, run, [image.id for image in images]


@pytest.mark.heavy
def test_a_network_does_not_see_what_is_flagged(trained: Trained, opened: Opener) -> None:
    workspace, usual = opened(trained.root), trained.result
    _, run, _ = trainable(workspace)
    found = train(workspace, LEFT_OUT, device="cpu")
    assert usual.cells == {"train": 8, "validation": 8}
    assert found.cells == {"train": 6, "validation": 6}
    assert (found.qc_run_id, found.images_flagged, found.cells_flagged) == (run.id, 0, 4)
    assert any(f"quality-control run {run.id} flagged them" in note for note in found.notes)
    assert any("has not looked at 6 of the images" in note for note in found.notes)
    with workspace.database.read() as session:
        trained = session.get_one(Run, found.run_id)
        recipe = session.get_one(Recipe, trained.recipe_id)
        before = session.get_one(Recipe, session.get_one(Run, usual.run_id).recipe_id)
    assert recipe.parameters["exclude_flagged"] == run.id
    assert before.parameters["exclude_flagged"] is None
    assert trained.query is not None
    assert f"run_id = {run.id}" in trained.query
    again = train(workspace, LEFT_OUT, device="cpu")
    assert (again.run_id, again.already_done, again.cells_flagged) == (found.run_id, True, 4)


def test_a_training_whose_cells_are_all_flagged_says_so(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    make, run, images = trainable(workspace)
    with workspace.database.read() as session:
        flagged = [session.get_one(Image, image_id) for image_id in images]
    for image in flagged:
        make.flag_image(run, image, ImageFlagReason.OUT_OF_FOCUS, "DNA")
    with pytest.raises(UserInputError, match=r"that quality-control run \d+ has not flagged"):
        train(workspace, LEFT_OUT, device="cpu")


def test_a_training_refuses_flags_of_other_cells(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    make = Factory(workspace)
    qc_run(make, ["P1"], make.recipe(Stage.SEGMENT))
    with workspace.database.read() as session:
        mine = session.scalars(select(Segmentation.recipe_id).distinct()).one()
    with pytest.raises(UserInputError, match=rf"cellstore qc --segmentation {mine}"):
        train(workspace, LEFT_OUT, device="cpu")
