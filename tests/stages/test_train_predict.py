"""Training and prediction from rows: what is read, what is kept, what happens when it breaks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from cellstore.config import (
    ImageInput,
    PredictParams,
    SegmentParams,
    SplitParams,
    StoreSettings,
    TrainParams,
    as_parameters,
)
from cellstore.db.models import (
    Artifact,
    Cell,
    CellFeatures,
    Image,
    ImageFile,
    Job,
    Label,
    Plate,
    Prediction,
    Recipe,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    Well,
)
from cellstore.errors import (
    ImageError,
    MissingExtraError,
    StorageError,
    UnknownNameError,
    UserInputError,
)
from cellstore.formats.images import decode_tiff, encode_tiff
from cellstore.progress import Silent
from cellstore.reading.cells import FEATURE_COLUMNS, CellSource, as_text, cells_query
from cellstore.runs import (
    RecipeSpec,
    Workspace,
    create_workspace,
    keep_file,
    open_workspace,
    register,
    running,
)
from cellstore.stages.measure import measure
from cellstore.stages.predict import PredictResult, predict
from cellstore.stages.segment import cell_rows
from cellstore.stages.split import create_split, show_split
from cellstore.stages.train import TrainResult, train
from cellstore.terms import ArtifactKind, Perturbation, Stage, Status, Subset

SIZE = 32
BOXES = ((2, 2, 8, 8), (2, 14, 9, 22), (16, 3, 23, 12), (18, 18, 28, 27))
TINY = TrainParams(crop_size=32, batch_size=8, epochs=2, learning_rate=1e-3)
WELLS = 3
"""Wells of each of two treatments, one image each: one to train, to validate and to test."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(workspace: Workspace, images: Path) -> None:
    """A plate of two treatments, segmented by hand and measured by the stage.

    Each image has four cells and one of a single pixel, which is excluded. Wells differ in
    brightness, so that a scaler fitted on other wells is another scaler.
    """
    with workspace.database.begin() as session:
        plate = Plate(barcode="P1")
        session.add(plate)
        session.flush()
        kinds = [Perturbation.COMPOUND] * 2
        rows = [
            Treatment(identity=name, kind=kind, pert_iname=name)
            for name, kind in zip(("DMSO", "drug"), kinds, strict=True)
        ]
        session.add_all(rows)
        session.flush()
        ids = [
            add_image(session, images, plate.id, rows[index % 2].id, index)
            for index in range(2 * WELLS)
        ]
        recipe = register(session, RecipeSpec(Stage.SEGMENT, 1, as_parameters(SegmentParams())))
    with running(workspace.database, recipe) as run, workspace.database.begin() as session:
        for image_id in ids:
            add_masks(session, workspace, image_id, recipe.id, run.id)
    measure(workspace)


def add_image(session: Session, folder: Path, plate_id: int, treatment_id: int, index: int) -> int:
    column = index + 1
    well = Well(
        plate_id=plate_id, row=1, column=column, name=f"A{column:02d}", treatment_id=treatment_id
    )
    session.add(well)
    session.flush()
    image = Image(
        well_id=well.id, site=1, core_name=f"r01c{column:02d}f01", content_sha256=f"{index}" * 64
    )
    session.add(image)
    session.flush()
    path = folder / f"{image.core_name}.tif"
    path.write_bytes(encode_tiff(pixels(index)))
    found = path.stat()
    file = ImageFile(
        image_id=image.id, channel="DNA", position=1, name=path.name, uri=str(path), sha256="0" * 64
    )
    file.size_bytes, file.modified_ns = found.st_size, found.st_mtime_ns
    session.add(file)
    return image.id


def pixels(index: int) -> NDArray[np.uint16]:
    noise = np.random.Generator(np.random.PCG64(index)).integers(0, 200, (SIZE, SIZE))
    return (500 * (index + 1) + noise).astype(np.uint16)


def masks() -> NDArray[np.uint16]:
    found = np.zeros((SIZE, SIZE), np.uint16)
    for label, (top, left, bottom, right) in enumerate(BOXES, start=1):
        found[top:bottom, left:right] = label
    found[30, 30] = 5
    return found


def add_masks(
    session: Session, workspace: Workspace, image_id: int, recipe_id: int, run_id: int
) -> None:
    flows = np.random.Generator(np.random.PCG64(image_id)).integers(0, 256, (SIZE, SIZE, 4))
    write = workspace.artifacts.write
    mask_file = write(ArtifactKind.MASK, encode_tiff(masks()), ".tif")
    flow_file = write(ArtifactKind.FLOW, encode_tiff(flows.astype(np.uint8)), ".tif")
    image = session.get_one(Image, image_id)
    row = Segmentation(
        image_id=image_id,
        recipe_id=recipe_id,
        content_sha256=image.content_sha256,
        run_id=run_id,
        n_cells=5,
        diameter=8.0,
        mask_artifact_id=keep_file(session, mask_file),
        flow_artifact_id=keep_file(session, flow_file),
        created_at=datetime.now(UTC),
    )
    session.add(row)
    session.flush()
    session.add_all(Cell(segmentation_id=row.id, **cell) for cell in cell_rows(masks()))


@dataclass(frozen=True)
class Trained:
    """A store that has been trained on, and its images."""

    root: Path
    result: TrainResult


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    (root / "images").mkdir()
    workspace, _ = create_workspace(root / "store")
    build(workspace, root / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    workspace.database.close()
    return root / "store"


@pytest.fixture(scope="module")
def trained(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained") / "store"
    shutil.copytree(built, root)
    workspace = open_workspace(StoreSettings(root))
    torch.set_num_threads(1)
    result = train(workspace, TINY, device="cpu")
    workspace.database.close()
    return Trained(root, result)


Opener = Callable[[Path], Workspace]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a copy of a store, so that tests cannot see each other's rows."""
    made: list[Workspace] = []

    def copy(root: Path) -> Workspace:
        target = tmp_path / f"copy-{len(made)}"
        shutil.copytree(root, target)
        made.append(open_workspace(StoreSettings(target)))
        return made[-1]

    yield copy
    for workspace in made:
        workspace.database.close()


def cells_of(workspace: Workspace, split: str, side: Subset) -> dict[int, list[float]]:
    """Measurements by cell id of a side, asked for without the code under test."""
    names = ", ".join(f"f.{name}" for name in FEATURE_COLUMNS)
    query = text(
        f"SELECT c.id, {names} FROM cells c JOIN features f ON f.cell_id = c.id "
        "JOIN segmentations g ON g.id = c.segmentation_id "
        "JOIN split_members m ON m.image_id = g.image_id JOIN splits s ON s.id = m.split_id "
        "WHERE s.name = :split AND m.subset = :side AND c.excluded IS NULL"
    )
    with workspace.database.read() as session:
        rows = session.execute(query, {"split": split, "side": side.value}).all()
    return {row[0]: list(row[1:]) for row in rows}


def checkpoint(workspace: Workspace, run_id: int) -> tuple[bytes, dict[str, Any]]:
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id)
    )
    with workspace.database.read() as session:
        files = {item.path.rpartition(".")[2]: item for item in session.scalars(query)}
    assert {item.kind for item in files.values()} == {ArtifactKind.CHECKPOINT}
    data = {
        suffix: workspace.artifacts.read(item.path, item.sha256) for suffix, item in files.items()
    }
    return data["safetensors"], json.loads(data["json"])


def said(workspace: Workspace, run_id: int) -> list[tuple[int, int, str, float]]:
    """(cell, rank, label, probability) of a run, without the numbers that a store gives."""
    query = (
        select(Prediction.cell_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.run_id == run_id)
        .order_by(Prediction.cell_id, Prediction.rank)
    )
    with workspace.database.read() as session:
        return [tuple(row) for row in session.execute(query)]  # type: ignore[misc]


def run_of(workspace: Workspace, run_id: int) -> Run:
    with workspace.database.read() as session:
        return session.get_one(Run, run_id)


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Make the ``call``-th batch of predictions end in ``error``."""
    from cellstore.ops import training

    real, calls = training.predict_batch, iter(range(1, 1000))

    def predict_batch(*arguments: object) -> object:
        if next(calls) == call:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "predict_batch", predict_batch)


def test_the_network_reads_the_measurements_of_the_registry() -> None:
    from cellstore.ops.features import FEATURE_NAMES

    assert FEATURE_COLUMNS == FEATURE_NAMES


def test_a_training_is_a_run_with_its_query_and_metrics(trained: Trained, opened: Opener) -> None:
    workspace, result = opened(trained.root), trained.result
    assert (result.classes, result.epochs, result.validation_side) == (2, 2, "validation")
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
    metrics |= {"learning_rate", "seconds"}
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
    brightness = FEATURE_COLUMNS.index("mean_intensity")
    assert abs(record["scaler"]["mean"][brightness] - everything.mean(axis=0)[brightness]) > 10


@pytest.mark.heavy
def test_the_checkpoint_alone_rebuilds_what_was_said(trained: Trained, opened: Opener) -> None:
    from cellstore.ops.crops import CellBlock, cell_crops
    from cellstore.ops.nets import load_checkpoint
    from cellstore.ops.training import predict_batch

    workspace = opened(trained.root)
    result = predict(workspace, device="cpu")
    tensors, record = checkpoint(workspace, trained.result.run_id)
    net, meta = load_checkpoint(tensors, record)
    expected = {}
    with workspace.database.read() as session:
        for cell, found in session.execute(
            select(Cell, Segmentation).join(Segmentation, Segmentation.id == Cell.segmentation_id)
        ).all():
            if cell.excluded is not None:
                continue
            values = session.scalars(select(CellFeatures).where(CellFeatures.cell_id == cell.id))
            row = values.one()
            flow = session.get_one(Artifact, found.flow_artifact_id)
            box = [[cell.min_row, cell.min_col, cell.max_row, cell.max_col]]
            crops = cell_crops(
                masks(),
                decode_tiff(workspace.artifacts.read(flow.path, flow.sha256)),
                pixels(found.image_id - 1).astype(np.float32),
                np.array(box),
                np.array([cell.label]),
                meta.crop_size,
            )
            scaled = meta.scaler.transform([[getattr(row, name) for name in meta.scaler.names]])
            one = torch.tensor([0])
            block = CellBlock(*crops, torch.from_numpy(scaled), one, one)
            expected[cell.id] = predict_batch(net, block)[0]
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
    assert result.validation_side == "test"
    assert result.images == {"train": 3, "validation": 3}
    assert "already seen" in result.notes[0]


class _StopsAfter(Silent):
    """A listener at which training ends as by Ctrl-C."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def advance(self, steps: int = 1) -> None:
        self.epochs -= steps
        if self.epochs == 0:
            raise KeyboardInterrupt


def test_an_interrupted_training_is_a_failed_run_with_its_metrics(
    built: Path, opened: Opener
) -> None:
    workspace = replace(opened(built), progress=_StopsAfter(1))
    with pytest.raises(KeyboardInterrupt):
        train(workspace, TINY, device="cpu")
    with workspace.database.read() as session:
        run = session.scalars(select(Run).where(Run.stage == Stage.TRAIN)).one()
        epochs = set(session.scalars(select(RunMetric.epoch).where(RunMetric.run_id == run.id)))
    assert (run.status, epochs) == (Status.FAILED, {1})
    with pytest.raises(UserInputError, match="is failed and has no checkpoint"):
        predict(workspace, run=str(run.id), device="cpu")
    with pytest.raises(UnknownNameError, match="Unknown train run 'latest'"):
        predict(workspace, device="cpu")


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
    assert run.result == {"images": 2, "failed": 0, "cells": 8}


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
    assert (run.status, done) == (Status.FAILED, 3)
    rest = predict(killed, everything, device="cpu")
    assert (rest.run_id, rest.done, rest.earlier) == (run.id, 3, 3)
    assert said(killed, run.id) == expected
    finished = run_of(killed, run.id)
    assert (finished.status, finished.result) == (
        Status.DONE,
        {"images": 6, "failed": 0, "cells": 24},
    )


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
    from cellstore.reading import blocks

    workspace, real = opened(built), blocks.BlockReader.__call__

    def shrunk(reader: blocks.BlockReader, image_id: int) -> object:
        return real(reader, image_id).take(torch.tensor([0, 1]))

    monkeypatch.setattr(blocks.BlockReader, "__call__", shrunk)
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: train(w, split="nope"), UnknownNameError, "Unknown split 'nope'. Known: by-we"),
        (lambda w: train(w, segmentation="99"), UnknownNameError, "Unknown segment recipe '99'"),
        (lambda w: train(w, measurement="99"), UnknownNameError, "Unknown measure recipe '99'"),
        (lambda w: train(w, replace(TINY, weights="/no/file")), UserInputError, "no file of weig"),
        (lambda w: train(w, replace(TINY, epochs=0)), UserInputError, "must be 1 or more"),
        (lambda w: train(w, replace(TINY, crop_size=0)), UserInputError, "crop size"),
        (lambda w: train(w, TINY, device="tpu"), UserInputError, "Unknown device 'tpu'"),
        (lambda w: predict(w, run="99"), UnknownNameError, "Unknown train run '99'"),
        (lambda w: predict(w, run="x"), UserInputError, "named by its number or 'latest'"),
        (lambda w: predict(w, PredictParams(plates=("P9",))), UnknownNameError, "plate 'P9'"),
        (lambda w: predict(w, PredictParams(top_k=0)), UserInputError, "Top-k"),
        (lambda w: predict(w, device="tpu"), UserInputError, "Unknown device 'tpu'"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_run(
    trained: Trained,
    opened: Opener,
    call: Callable[[Workspace], TrainResult | PredictResult],
    error: type[Exception],
    message: str,
) -> None:
    workspace = opened(trained.root)
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


def test_a_split_without_a_validation_side_says_how_to_get_one(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    create_split(workspace, "two", SplitParams(validation_size=0.0))
    with pytest.raises(UserInputError, match="no image on its validation side"):
        train(workspace, TINY, split="two", device="cpu")


def test_cells_that_are_not_measured_name_the_command(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    other = as_parameters(SegmentParams(image=ImageInput(("DNA",))))
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.SEGMENT, 1, other))
    with running(workspace.database, recipe):
        pass
    with pytest.raises(UserInputError, match=r"not measured yet\. Run: cellstore measure"):
        train(workspace, TINY, device="cpu")
    with workspace.database.read() as session:
        measured = session.scalars(select(Recipe).where(Recipe.stage == Stage.MEASURE)).one()
    with pytest.raises(UserInputError, match="did not read the cells"):
        train(workspace, TINY, segmentation=str(recipe.id), measurement=str(measured.id))


def test_a_missing_extra_is_named(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellstore import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "torch" else object())
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
