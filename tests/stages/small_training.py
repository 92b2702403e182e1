"""A small store with made-up masks, and trainings on it, for the tests of train and predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import treatment
from numpy.typing import NDArray
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import SegmentParams, SplitParams, TrainParams
from cellstore.enums import ArtifactKind, Stage, Subset
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.planes import cell_rows
from cellstore.jobs.runs import RecipeSpec, keep_files, register, running
from cellstore.jobs.workspace import Workspace, create_workspace, open_workspace
from cellstore.models import (
    Artifact,
    Cell,
    Folder,
    Image,
    ImageFile,
    Label,
    Plate,
    Prediction,
    Run,
    RunArtifact,
    Segmentation,
    Well,
)
from cellstore.settings import Progress, StoreSettings
from cellstore.stages.measure import measure
from cellstore.stages.split import create_split
from cellstore.stages.train import TrainResult, train

SIZE = 32
BOXES = ((2, 2, 8, 8), (2, 14, 9, 22), (16, 3, 23, 12), (18, 18, 28, 27))
TINY = TrainParams.of(
    "published",
    branches=None,
    backbone="shufflenet_v2_x0_5",  # the smallest: its checkpoint is copied by every test
    crop_size=32,
    batch_size=8,
    epochs=2,
    learning_rate=1e-3,
)
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
        rows = [treatment(session, name) for name in ("DMSO", "drug")]
        ids = [
            add_image(session, images, plate.id, rows[index % 2].id, index)
            for index in range(2 * WELLS)
        ]
        recipe = register(
            session, RecipeSpec(Stage.SEGMENT, 1, asdict(SegmentParams.of("published")))
        )
    with running(workspace.database, recipe) as run, workspace.database.begin() as session:
        for image_id in ids:
            add_masks(session, workspace, image_id, recipe.id, run.id)
    measure(workspace)


def add_image(session: Session, folder: Path, plate_id: int, treatment_id: int, index: int) -> int:
    column = index + 1
    well = Well(
        plate_id=plate_id,
        well_row=1,
        well_column=column,
        name=f"A{column:02d}",
        treatment_id=treatment_id,
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
    place = session.scalars(select(Folder).where(Folder.uri == str(folder))).one_or_none()
    file = ImageFile(image_id=image.id, channel="DNA", position=1, name=path.name, sha256="0" * 64)
    file.folder = place or Folder(uri=str(folder))
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
        mask_artifact_id=keep_files(session, [mask_file])[0],
        flow_artifact_id=keep_files(session, [flow_file])[0],
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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    (root / "images").mkdir()
    workspace, _ = create_workspace(root / "store")
    build(workspace, root / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    workspace.database.close()
    return root / "store"


@pytest.fixture(scope="session")
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


class StopsAfter(Progress):
    """A listener at which training ends, by default as by Ctrl-C; it keeps what it was told."""

    def __init__(self, epochs: int, stop: BaseException | None = None) -> None:
        self.left, self.stop = epochs, stop or KeyboardInterrupt()
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)
        self.left -= text.startswith("epoch ")
        if self.left == 0:
            self.left = -1
            raise self.stop


def cells_of(workspace: Workspace, split: str, side: Subset) -> dict[int, list[float]]:
    """Measurements by cell id of a side, asked for without the code under test."""
    stored = [f"f.{name}" for name in FEATURE_NAMES[:-2]]
    names = ", ".join((*stored, "c.centroid_row", "c.centroid_col"))
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
    assert len(files) == 2
    data = {
        suffix: workspace.artifacts.read(item.path, item.sha256) for suffix, item in files.items()
    }
    record = json.loads(data.pop("json"))
    return data.popitem()[1], record


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
    from cellstore.learn import trained_models as models

    real, calls = models.predict_batch, iter(range(1, 1000))

    def predict_batch(*arguments: object) -> object:
        if next(calls) == call:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "predict_batch", predict_batch)
