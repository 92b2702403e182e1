"""Prediction: appended, resumable, and whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from small_training import (
    TINY,
    Opener,
    Trained,
    build,
    cells_of,
    fail_at,
    run_of,
    said,
)
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import DBAPIError

from cellstore.config import PredictParams, SegmentParams, SplitParams
from cellstore.enums import Stage, Status, Subset
from cellstore.errors import (
    ImageError,
    MissingExtraError,
    StorageError,
    UnknownNameError,
    UserInputError,
)
from cellstore.jobs.queue import new_owner
from cellstore.jobs.runs import RecipeSpec, register
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    ImageFile,
    Job,
    Prediction,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
)
from cellstore.query.cells import CellSource, as_text, cells_query
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train import train


def test_predictions_rank_the_classes_of_the_chosen_side(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    result = predict(workspace, device="cpu")
    assert (result.selected, result.done, result.waiting, result.cells) == (2, 2, 0, 8)
    rows = said(workspace, result.run_id)
    assert {row[0] for row in rows} == set(cells_of(workspace, "by-well", Subset.TEST))
    for cell in {row[0] for row in rows}:
        mine = [row for row in rows if row[0] == cell]
        assert [row[1] for row in mine] == [1, 2]
        assert {row[2] for row in mine} == {"DMSO", "drug"}
        assert mine[0][3] >= mine[1][3]
        assert sum(row[3] for row in mine) == pytest.approx(1)
    run = run_of(workspace, result.run_id)
    assert (run.parent_id, run.status) == (trained.result.run_id, Status.DONE)
    assert run.result == {"images": 2, "failed": 0, "cells": 8, "notes": []}


def test_predictions_cannot_be_changed(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    run_id = predict(workspace, device="cpu").run_id
    before = said(workspace, run_id)
    for statement in (update(Prediction).values(probability=0.5), delete(Prediction)):
        with (
            pytest.raises(DBAPIError, match="append-only"),
            workspace.database.begin() as session,
        ):
            session.execute(statement)
    assert said(workspace, run_id) == before != []


@pytest.mark.heavy
def test_a_run_is_whole_also_when_more_images_were_measured_since(
    trained: Trained, opened: Opener
) -> None:
    workspace = opened(trained.root)
    everything = PredictParams(subset=None)
    with workspace.database.begin() as session:
        recipe = session.scalars(select(Recipe.id).where(Recipe.stage == Stage.MEASURE)).one()
        late = session.scalars(select(Job).where(Job.recipe_id == recipe).limit(1)).one()
        late.status = Status.PENDING
    first = predict(workspace, everything, device="cpu")
    with workspace.database.begin() as session:
        session.get_one(Job, late.id).status = Status.DONE
    second = predict(workspace, everything, device="cpu")
    assert second.run_id != first.run_id
    assert (first.done, first.waiting) == (first.selected - 1, 1)
    assert (second.done, second.earlier) == (second.selected, 0)
    assert set(said(workspace, first.run_id)) < set(said(workspace, second.run_id))


@pytest.mark.heavy
def test_nothing_is_predicted_twice(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    first = predict(workspace, device="cpu")
    again = predict(workspace, device="cpu")
    assert (again.run_id, again.done, again.earlier) == (first.run_id, 0, 2)
    everything = PredictParams(subset=None, top_k=1)
    other = predict(workspace, everything, device="cpu")
    assert (other.done, other.cells) == (6, 24)
    top = {row[0]: row[2:] for row in said(workspace, first.run_id) if row[1] == 1}
    wide = {row[0]: row[2:] for row in said(workspace, other.run_id)}
    assert {cell: wide[cell] for cell in top} == top


@pytest.mark.heavy
def test_a_killed_prediction_goes_on_and_ends_as_an_undisturbed_one(
    trained: Trained, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = PredictParams(subset=None)
    calm, killed = opened(trained.root), opened(trained.root)
    expected = said(calm, predict(calm, everything, device="cpu").run_id)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            predict(killed, everything, device="cpu")
    with killed.database.read() as session:
        run = session.scalars(select(Run).where(Run.stage == Stage.PREDICT)).one()
        done = session.scalar(
            select(func.count()).where(Job.run_id == run.id, Job.status == Status.DONE)
        )
    assert (run.status, 0 < done < 4) == (Status.CANCELLED, True)
    dead = new_owner().split("|")
    dead[3] = "0"
    with killed.database.begin() as session:  # one that was killed has its images in hand
        left = update(Job).where(Job.run_id == run.id, Job.status != Status.DONE)
        session.execute(left.values(status=Status.RUNNING, worker="|".join(dead)))
    rest = predict(killed, everything, device="cpu")
    assert (rest.run_id, rest.done, rest.earlier) == (run.id, 6 - done, done)
    assert said(killed, run.id) == expected
    finished = run_of(killed, run.id)
    counts = {"images": 6, "failed": 0, "cells": 24, "notes": list(rest.notes)}
    assert (finished.status, finished.result) == (Status.DONE, counts)


def test_one_bad_image_fails_alone_and_is_tried_again(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    with workspace.database.read() as session:
        side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TEST)
        file = session.scalars(select(ImageFile).where(ImageFile.image_id.in_(side))).first()
    assert file is not None
    path, moment = Path(file.uri or ""), file.modified_ns or 0
    os.utime(path, ns=(moment, moment + 1))
    try:
        first = predict(workspace, device="cpu")
    finally:
        os.utime(path, ns=(moment, moment))
    assert (first.done, len(first.failures)) == (1, 1)
    assert "has changed since it was ingested" in first.failures[0][1]
    assert run_of(workspace, first.run_id).status is Status.FAILED
    second = predict(workspace, device="cpu")
    assert (second.run_id, second.done, second.failures) == (first.run_id, 1, ())
    assert len({row[0] for row in said(workspace, first.run_id)}) == 8


def test_a_lost_mask_fails_its_image_alone(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    flows = select(Artifact.path).join(Segmentation, Segmentation.flow_artifact_id == Artifact.id)
    side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TEST)
    with workspace.database.read() as session:
        path = session.scalars(flows.where(Segmentation.image_id.in_(side))).first()
    workspace.artifacts.locate(path or "").unlink()
    result = predict(workspace, device="cpu")
    assert (result.done, len(result.failures)) == (1, 1)
    assert "cellstore verify" in result.failures[0][1]


def test_cells_that_change_under_a_training_end_it(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellstore.learn import batches

    workspace, real = opened(built), batches.CellReader.cut

    def shrunk(reader: batches.CellReader, image_id: int) -> object:
        return real(reader, image_id).take(np.array([0, 1]))

    monkeypatch.setattr(batches.CellReader, "cut", shrunk)
    with pytest.raises(ImageError, match="changed while the network was training"):
        train(workspace, TINY, device="cpu")


def test_an_image_without_cells_is_done_with_no_rows(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    with workspace.database.begin() as session:
        side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TEST)
        image_id = session.scalars(side).first()
        found = select(Segmentation.id).where(Segmentation.image_id == image_id)
        session.execute(
            update(Cell)
            .where(Cell.segmentation_id == found.scalar_subquery())
            .values(excluded="too small")
        )
    result = predict(workspace, device="cpu")
    assert (result.done, result.cells) == (2, 4)


def test_a_damaged_checkpoint_is_not_used(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    (tensors,) = (workspace.artifacts.root / "checkpoint").rglob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="is not what was written"):
        predict(workspace, device="cpu")
    with workspace.database.read() as session:
        assert session.scalars(select(Run).where(Run.stage == Stage.PREDICT)).all() == []


MISTAKES: list[tuple[Callable[[Workspace], object], type[Exception], str]] = [
    (lambda w: train(w, split="nope"), UnknownNameError, "Unknown split 'nope'. Known: by-we"),
    (lambda w: train(w, segmentation="99"), UnknownNameError, "Unknown segment recipe '99'"),
    (lambda w: train(w, measurement="99"), UnknownNameError, "Unknown measure recipe '99'"),
    (lambda w: train(w, replace(TINY, weights="/no/file")), UserInputError, "no file of weig"),
    (
        lambda w: train(w, replace(TINY, epochs=0)),
        UserInputError,
        "--epochs must be at least 1",
    ),
    (
        lambda w: train(w, replace(TINY, crop_size=0)),
        UserInputError,
        "--crop-size must be at least 1",
    ),
    (lambda w: train(w, TINY, device="tpu"), UserInputError, "Unknown device 'tpu'"),
    (lambda w: predict(w, run="99"), UnknownNameError, "Unknown train run '99'"),
    (lambda w: predict(w, run="x"), UserInputError, "named by its number, 'latest'"),
    (lambda w: predict(w, PredictParams(plates=("P9",))), UnknownNameError, "plate 'P9'"),
    (
        lambda w: predict(w, PredictParams(top_k=0)),
        UserInputError,
        "--top-k must be at least 1",
    ),
    (lambda w: predict(w, device="tpu"), UserInputError, "Unknown device 'tpu'"),
]


def test_mistakes_are_one_sentence_and_leave_no_run(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    for call, error, message in MISTAKES:
        with pytest.raises(error, match=message):
            call(workspace)
    with workspace.database.read() as session:
        last = session.scalar(select(func.max(Run.id)))
    assert last == trained.result.run_id


def test_a_split_without_cells_names_the_commands(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    with workspace.database.begin() as session:
        session.execute(delete(CellFeatures))
    with pytest.raises(UserInputError, match="Run: cellstore segment, then: cellstore measure"):
        train(workspace, TINY, device="cpu")
    with workspace.database.read() as session:
        assert session.scalars(select(Split.frozen_at)).one() is None


def test_a_split_without_a_validation_side_trains_all_epochs(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    create_split(workspace, "two", SplitParams(validation_size=0.0))
    result = train(workspace, TINY, split="two", device="cpu")
    assert (result.validation_subset, result.epochs, result.best_epoch) == (None, 2, 2)
    assert any("nothing stopped the training" in note for note in result.notes)


def test_cells_that_are_not_measured_name_the_command(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    other = asdict(SegmentParams.of("published", channels=("DNA",)))
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.SEGMENT, 1, other))
    with pytest.raises(UserInputError, match=r"not measured yet\. Run: cellstore measure"):
        train(workspace, TINY, segmentation=str(recipe.id), device="cpu")
    with workspace.database.read() as session:
        measured = session.scalars(select(Recipe).where(Recipe.stage == Stage.MEASURE)).one()
    with pytest.raises(UserInputError, match="belongs to segment recipe"):
        train(workspace, TINY, segmentation=str(recipe.id), measurement=str(measured.id))


def test_a_missing_extra_is_named(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellstore import settings

    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "torch" else object())
    workspace = opened(built)
    for call in (train, predict):
        with pytest.raises(MissingExtraError, match=r"cellstore\[train\]"):
            call(workspace)


def test_the_query_text_keeps_hostile_names_as_text(built: Path, opened: Opener) -> None:
    hostile = "P1'; DELETE FROM cells; --"
    kept = as_text(cells_query(CellSource(1, 2, plates=("P1", hostile))))
    workspace = opened(built)
    with workspace.database.read() as session:
        assert len(session.execute(text(kept.replace(":", "\\:"))).all()) == 24


@pytest.mark.heavy
def test_train_and_predict_on_every_database(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    build(workspace, tmp_path / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    result = train(workspace, replace(TINY, epochs=1), device="cpu")
    run = run_of(workspace, result.run_id)
    with workspace.database.read() as session:
        assert len(session.execute(text(run.query or "")).all()) == 24
    predicted = predict(workspace, device="cpu")
    assert (predicted.done, predicted.cells) == (2, 8)
    again = predict(workspace, device="cpu")
    assert (again.run_id, again.done) == (predicted.run_id, 0)
    assert len(said(workspace, predicted.run_id)) == 16
