"""Redoing a run beside the store: what is copied, what is compared, and that nothing is written.

The work itself is done by hand here; tests/stages/test_repro.py has it done by the stages.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from factories import MOMENT, sha
from screens import VOTES, SmallScreen, small_screen
from sqlalchemy import func, insert, select

from cellstore.config import PredictParams
from cellstore.enums import ArtifactKind, Level, Stage, Status
from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA, Label, Prediction, Run
from cellstore.report.redo import (
    DIFFERENT,
    EQUAL,
    IDENTICAL,
    IMPOSSIBLE,
    Check,
    check,
    scratch_store,
)
from cellstore.report.repro import RunOptions, repro

LABELLED = ("B01", "B02", "B03", "B04")


def everything(workspace: Workspace) -> dict[str, int]:
    with workspace.database.read() as session:
        return {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in METADATA.tables.items()
        }


def labelled_screen(workspace: Workspace) -> SmallScreen:
    """The small screen, its predict run with the jobs that it had."""
    screen = small_screen(workspace)
    for name in LABELLED:
        screen.factory.job(screen.predict_run, screen.images[name])
        screen.factory.job(screen.measure_run, screen.images[name])
    return screen


def by_hand(screen: SmallScreen, change: Callable[[float], float] = lambda p: p) -> Any:
    """What labels cells as ``VOTES`` has them, with other probabilities if need be."""

    def carry_out(redone: Workspace, options: RunOptions, where: str | None) -> Any:
        assert isinstance(options.params, PredictParams)
        assert options.inputs["run"] == str(screen.train_run.id)
        with redone.database.begin() as session:
            old = session.get_one(Run, screen.predict_run.id)
            new = Run(
                **{
                    column.name: getattr(old, column.name)
                    for column in Run.__table__.columns
                    if column.name != "id"
                }
            )
            session.add(new)
            session.flush()
            labels = dict(session.execute(select(Label.value, Label.id)).all())
            rows = [
                (cell.id, rank, labels[label], change(probability))
                for name in LABELLED
                for cell, choices in zip(
                    screen.factory.cells_of(screen.segmentations[name]), VOTES[name][2], strict=True
                )
                for rank, (label, probability) in enumerate(choices, start=1)
            ]
            names = ("cell_id", "rank", "label_id", "probability")
            table: Any = Prediction.__table__
            session.execute(
                insert(table),
                [{"run_id": new.id, **dict(zip(names, row, strict=True))} for row in rows],
            )
        return new.id, ()

    return carry_out


def outcome(workspace: Workspace, screen: SmallScreen, change: Any) -> Check:
    return check(workspace, str(screen.predict_run.id), by_hand(screen, change))


def test_the_same_numbers_are_identical_and_nothing_is_written(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)
    before = everything(workspace)
    found = outcome(workspace, screen, lambda p: p)
    assert (found.outcome, found.compared, found.differ) == (IDENTICAL, 16, 0)
    assert (found.largest, found.differences) == (0.0, [])
    assert everything(workspace) == before


def test_numbers_within_and_outside_the_tolerance(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)
    near = outcome(workspace, screen, lambda p: p - 5e-5)
    assert (near.outcome, near.differ) == (EQUAL, 0)
    assert near.largest == pytest.approx(5e-5)
    far = outcome(workspace, screen, lambda p: p - 2e-3 if p == 0.9 else p)
    assert (far.outcome, far.differ, far.compared) == (DIFFERENT, 1, 16)
    assert far.largest == pytest.approx(2e-3)
    assert far.differences[0].endswith("taxol: 0.9 before, 0.898 now")


def test_why_a_run_cannot_be_redone(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)

    def gone(*_: Any) -> Any:
        raise ImageError("a.tiff cannot be opened. Put it back.")

    def failed(*_: Any) -> Any:
        return None, (("BR1/r02c01f01", "no pixels"),)

    found = check(workspace, str(screen.predict_run.id), gone)
    assert (found.outcome, found.reasons[0]) == (
        IMPOSSIBLE,
        "a.tiff cannot be opened. Put it back.",
    )
    found = check(workspace, str(screen.predict_run.id), failed)
    assert found.outcome == IMPOSSIBLE
    assert found.reasons[0] == "1 of 4 images failed"
    assert "BR1/r02c01f01: no pixels" in found.reasons


def test_other_versions_are_named_where_it_matters(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)
    found = outcome(workspace, screen, lambda p: p - 2e-3)
    assert any("made by cellstore 0.1.0+gabc" in reason for reason in found.reasons)
    assert any(reason.startswith("python was 3.11, is 3.") for reason in found.reasons)


def test_what_is_not_redone(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)
    make = screen.factory
    running = make.run(Stage.PREDICT, status=Status.RUNNING)
    ingest = make.run(Stage.INGEST)
    for run, said in ((running, "only a finished run"), (ingest, f"cellstore repro {ingest.id}")):
        with pytest.raises(UserInputError, match=said):
            check(workspace, str(run.id), by_hand(screen))
    with pytest.raises(UnknownNameError):
        check(workspace, "999", by_hand(screen))


def test_a_scratch_store_holds_what_is_wanted_and_no_more(workspace: Workspace) -> None:
    screen = labelled_screen(workspace)
    image = screen.images["B01"].id
    for moment in (MOMENT, MOMENT + timedelta(days=1)):
        screen.factory.exclude(Level.IMAGE, image, created_at=moment)
    before = everything(workspace)
    with scratch_store(workspace, screen.predict_run.id, [image]) as made:
        assert made.database.is_sqlite
        found = everything(made)
        root = made.settings.root
        stored = made.artifacts.write(ArtifactKind.MASK, b"new", ".tif")
        assert made.artifacts.read(stored.path, stored.sha256) == b"new"
        assert not (workspace.artifacts.root / stored.path).exists()
    assert not root.exists()
    assert (found["images"], found["segmentations"], found["cells"]) == (1, 1, 3)
    assert (found["features"], found["predictions"], found["split_members"]) == (3, 0, 1)
    assert found["artifacts"] == 4  # masks and flows of the image, two files of the checkpoint
    assert (found["jobs"], found["annotations"]) == (1, 1)
    for name in ("runs", "recipes", "wells", "labels", "splits"):
        assert found[name] == before[name], name
    assert everything(workspace) == before


def test_the_environment_does_not_lead_a_redo_to_the_real_database(
    postgres_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = labelled_screen(postgres_workspace)
    url = postgres_workspace.database.engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("CELLSTORE_DATABASE_URL", url)
    with scratch_store(postgres_workspace, screen.predict_run.id, []) as made:
        assert made.database.is_sqlite


def test_two_series_are_compared_by_key() -> None:
    old = [(1, "a", None), (3, "b", None), (4, "c", None)]
    new = [(2, "x", None), (3, "y", None), (4, "c", None)]
    found = Check(1, "predict")
    found.count_all("thing {}", old, new)
    assert (found.compared, found.differ) == (4, 3)
    assert found.differences == [
        "thing 1: a before, nothing now",
        "thing 2: nothing before, x now",
        "thing 3: b before, y now",
    ]


def test_numbers_that_are_none() -> None:
    nan = float("nan")
    found = Check(1, "predict", tolerance=1e-4)
    for then, now in ((nan, nan), (1.0, nan), (None, 1.0), (1.0, float("inf"))):
        found.count("x", (1, "", then), (1, "", now))
    assert (found.compared, found.differ) == (4, 3)


def test_all_steps_in_order_as_a_script(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    hostile = "maps\nrm -rf ~ `x`.csv"
    table = make.run(
        Stage.INGEST,
        command="cellstore ingest 'a b.csv'",
        started_at=MOMENT,
        result={"refused": 3},
    )
    from cellstore.models import IngestFile

    counts = dict.fromkeys(("n_rows", "n_created", "n_updated", "n_unchanged", "n_refused"), 0)
    make.add(
        IngestFile(
            run_id=table.id, name=hostile, sha256=sha("t"), size_bytes=1, layout="x", **counts
        )
    )
    found = repro(workspace, str(screen.predict_run.id))
    assert [step.run_id for step in found.steps] == sorted(step.run_id for step in found.steps)
    assert [step.stage for step in found.steps] == ["segment", "measure", "train", "predict"]
    later = make.run(Stage.TRAIN, make.recipe(Stage.TRAIN), split_id=screen.split.id)
    other = make.run(Stage.INGEST, command="cellstore demo")
    script = repro(workspace, str(later.id)).script
    assert other.id > later.id
    assert "cellstore demo" not in repro(workspace, str(make.run(Stage.QC).id)).script.replace(
        "# Note: it was begun by: cellstore demo", ""
    )
    # Rows were refused then, and are again: the script goes on.
    assert "\ncellstore ingest 'a b.csv' || [ $? -eq 1 ]\n" in script
    assert "# reads maps rm -rf ~ `x`.csv, sha256" in script
    assert not any(line.startswith("rm ") for line in script.splitlines())
