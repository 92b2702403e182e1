"""status and verify on both databases; the command line's tests look at the details."""

from __future__ import annotations

from factories import Factory, small_screen
from sqlalchemy import func, select

from cellstore.db.models import Artifact, Cell, Image, Job, Prediction, Well
from cellstore.runs import Workspace
from cellstore.stages.status import status
from cellstore.stages.verify import verify
from cellstore.terms import Stage, Status


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
    assert (recipe.done, recipe.stale, recipe.failed, recipe.open) == (1, 1, 1, 2)
    assert status(workspace).segmented == 1
    (failed,) = status(workspace).failed
    assert failed.image.endswith("r01c03f01")
    assert failed.reason == "no reason was kept"


def test_files_that_no_one_wrote_are_told(workspace: Workspace):
    small_screen(workspace)  # rows only: every file is missing
    found = verify(workspace)
    with workspace.database.read() as session:
        files = session.scalar(select(func.count()).select_from(Artifact))
    assert (found.ok, found.files) == (False, files)
    assert {problem.reason for problem in found.problems} == {"the file is gone"}
