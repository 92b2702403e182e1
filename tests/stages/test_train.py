"""Training from rows: what is read, what is kept, what happens when it breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_training import (
    TINY,
    WELLS,
    Opener,
    StopsAfter,
    Trained,
    cells_of,
    checkpoint,
    masks,
    pixels,
    run_of,
    said,
)
from sqlalchemy import select, text

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import SplitParams
from cellstore.enums import Stage, Status, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.io.image_files import decode_tiff
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    Image,
    Recipe,
    Run,
    RunMetric,
    Segmentation,
    SplitMember,
)
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split, show_split
from cellstore.stages.train import train


def test_a_training_is_a_run_with_its_query_and_metrics(trained: Trained, opened: Opener) -> None:
    workspace, result = opened(trained.root), trained.result
    assert (result.classes, result.epochs, result.validation_subset) == (2, 2, "validation")
    assert (result.already_done, result.notes) == (False, ())
    assert result.images == {"train": 2, "validation": 2}
    run = run_of(workspace, result.run_id)
    assert (run.stage, run.status, run.seed) == (Stage.TRAIN, Status.DONE, 0)
    query = select(RunMetric.epoch, RunMetric.name).where(RunMetric.run_id == run.id)
    with workspace.database.read() as session:
        names = {tuple(row) for row in session.execute(query)}
        stages = select(Recipe.stage).where(Recipe.id == run.recipe_id)
        assert session.scalars(stages).one() is Stage.TRAIN
    metrics = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
    metrics |= {"learning_rate", "seconds", "waited"}
    assert names == {(epoch, name) for epoch in (1, 2) for name in metrics}
    assert [record["epoch"] for record in result.metrics] == [1, 2]


def test_excluded_cells_never_reach_training(trained: Trained, opened: Opener) -> None:
    workspace, result = opened(trained.root), trained.result
    run = run_of(workspace, result.run_id)
    with workspace.database.read() as session:
        read = {row.cell_id for row in session.execute(text(run.query or ""))}
        excluded = set(session.scalars(select(Cell.id).where(Cell.excluded.is_not(None))))
    assert len(excluded) == 2 * WELLS
    sides = [cells_of(workspace, "by-well", side) for side in Subset]
    assert read == {cell for side in sides for cell in side}
    assert not read & excluded
    assert result.cells == {"train": 8, "validation": 8}


def test_the_scaler_knows_the_training_side_only(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    _, record = checkpoint(workspace, trained.result.run_id)
    by_side = {side: list(cells_of(workspace, "by-well", side).values()) for side in Subset}
    training = np.array(by_side[Subset.TRAIN])
    np.testing.assert_allclose(record["scaler"]["mean"], training.mean(axis=0))
    everything = np.array([row for rows in by_side.values() for row in rows])
    brightness = FEATURE_NAMES.index("mean_intensity")
    assert abs(record["scaler"]["mean"][brightness] - everything.mean(axis=0)[brightness]) > 10


@pytest.mark.heavy
def test_the_checkpoint_alone_rebuilds_what_was_said(trained: Trained, opened: Opener) -> None:
    from cellstore.learn.crops import CellCrops, Pictures, crop_cells, cut_crops
    from cellstore.learn.trained_models import load_model, predict_batch

    workspace = opened(trained.root)
    result = predict(workspace, device="cpu")
    tensors, record = checkpoint(workspace, trained.result.run_id)
    model, meta = load_model(tensors, record)
    expected = {}
    # Image by image, as the stage does: a network of two epochs is so steep that the rounding of
    # another batch size shows in its answers.
    with workspace.database.read() as session:
        for found in session.scalars(select(Segmentation)).all():
            cells = session.scalars(
                select(Cell)
                .where(Cell.segmentation_id == found.id, Cell.excluded.is_(None))
                .order_by(Cell.id)
            ).all()
            flow = session.get_one(Artifact, found.flow_artifact_id)
            sizes, layers = cut_crops(
                Pictures(
                    masks(),
                    decode_tiff(workspace.artifacts.read(flow.path, flow.sha256)),
                    pixels(found.image_id - 1).astype(np.float32),
                ),
                np.array([[c.min_row, c.min_col, c.max_row, c.max_col] for c in cells]),
                np.array([cell.object_number for cell in cells]),
            )
            ids = np.array([cell.id for cell in cells])
            values = [
                session.scalars(select(CellFeatures).where(CellFeatures.cell_id == cell.id)).one()
                for cell in cells
            ]
            table = [[getattr(row, name) for name in meta.scaler.names] for row in values]
            whole = CellCrops(sizes, layers, meta.scaler.transform(table), ids, ids)
            chances = predict_batch(model, crop_cells(whole, meta.crop_size))
            expected |= {cell.id: row for cell, row in zip(cells, chances, strict=True)}
    rows = said(workspace, result.run_id)
    assert len(rows) == 2 * 8
    for cell_id, rank, label, probability in rows:
        chances = expected[cell_id]
        assert probability == pytest.approx(np.sort(chances)[::-1][rank - 1], abs=1e-5)
        assert chances[meta.labels.index(label)] == pytest.approx(probability, abs=1e-5)


def test_the_same_training_is_not_done_twice_unless_forced(
    trained: Trained, opened: Opener
) -> None:
    workspace = opened(trained.root)
    again = train(workspace, TINY, device="cpu")
    assert again == replace(trained.result, already_done=True)
    forced = train(workspace, TINY, device="cpu", force=True)
    assert forced.run_id > trained.result.run_id
    assert forced.recipe_id == trained.result.recipe_id
    assert forced.checkpoint_sha256 == trained.result.checkpoint_sha256


def test_more_measured_cells_are_another_training(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    with workspace.database.begin() as session:
        side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TRAIN)
        image = session.get_one(Image, session.scalars(side).first())
        image.content_sha256 = "e" * 64
    again = train(workspace, TINY, device="cpu")
    assert not again.already_done
    assert again.images_without_cells == {"train": 1, "validation": 0}
    assert again.classes_without_cells in (("DMSO",), ("drug",))
    assert len(again.notes) == 2


def test_training_freezes_its_split(built: Path, trained: Trained, opened: Opener) -> None:
    assert not show_split(opened(built)).frozen
    assert show_split(opened(trained.root)).frozen


def test_the_published_protocol_validates_on_its_test_side_and_says_so(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    create_split(workspace, "published", SplitParams(protocol="published", test_size=0.34))
    result = train(workspace, replace(TINY, epochs=1), split="published", device="cpu")
    assert result.validation_subset == "test"
    assert result.images == {"train": 3, "validation": 3}
    assert "already seen" in result.notes[0]


def test_an_interrupted_training_is_a_cancelled_run_with_its_metrics(
    built: Path, opened: Opener
) -> None:
    workspace = replace(opened(built), progress=StopsAfter(1))
    with pytest.raises(KeyboardInterrupt):
        train(workspace, TINY, device="cpu")
    with workspace.database.read() as session:
        run = session.scalars(select(Run).where(Run.stage == Stage.TRAIN)).one()
        epochs = set(session.scalars(select(RunMetric.epoch).where(RunMetric.run_id == run.id)))
    assert (run.status, epochs) == (Status.CANCELLED, {1})
    with pytest.raises(UserInputError, match="is cancelled and has no checkpoint"):
        predict(workspace, run=str(run.id), device="cpu")
    with pytest.raises(UnknownNameError, match="No train run has come to its end"):
        predict(workspace, device="cpu")
