"""The model of a training run, opened from its two files, with what it reads of an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.models import Artifact, Recipe, Run, RunArtifact
from ..errors import StorageError, UserInputError
from ..ops.normalising import PlateScaler
from ..runs.workspace import Workspace
from ..terms import ArtifactKind, Stage, Status
from .cells import CellSource, input_of, plane_of
from .featuresets import find_feature_set, open_set
from .normalising import add_plates, add_whites
from .planes import check_channels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ops.crops import CellBlock
    from ..ops.models import Model, ModelMeta


@dataclass(frozen=True)
class Checkpoint:
    """The two files of a training run: where the tensors are, and the record."""

    run: Run
    tensors: Artifact
    record: Mapping[str, Any]


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to label the cells of a store.

    ``segment`` and ``measure`` are the recipes whose cells and measurements it reads, ``source``
    names them. ``reader`` returns the cells of the image with an id.
    """

    checkpoint: Checkpoint
    segment: Recipe
    measure: Recipe
    source: CellSource
    model: Model
    meta: ModelMeta
    reader: Callable[[int], CellBlock]
    device: str = "cpu"

    @property
    def run(self) -> Run:
        """The training run."""
        return self.checkpoint.run

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the columns of :meth:`predict`."""
        return self.meta.labels

    def predict(self, cells: CellBlock) -> NDArray[np.float64]:
        """Return probabilities, (N, K) float64, of the N cells of an image."""
        return self.model.predict(cells)

    def predict_and_embed(
        self, cells: CellBlock
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return these, and the embedding of each cell, (N, width); of networks only."""
        from ..ops.models import NetworkModel

        assert isinstance(self.model, NetworkModel)
        return self.model.predict_and_embed(cells)


def open_model(session: Session, workspace: Workspace, run: Run, device: str = "cpu") -> OpenModel:
    """Return the model of a training run on a device (``cpu`` or ``cuda``).

    Raises:
        UserInputError: the run has no checkpoint or one of an unknown kind, or the feature set is
            not the one that it was trained on.
        UnknownNameError: the feature set is gone, or no image has a channel that it looks at.
        StorageError: the checkpoint is damaged.

    """
    from ..ops.models import NetworkModel, load_model

    checkpoint = find_checkpoint(session, workspace, run)
    file = checkpoint.tensors
    tensors = workspace.artifacts.read(file.path, file.sha256)
    model, meta = load_model(tensors, checkpoint.record, device)
    recipe = session.get_one(Recipe, run.recipe_id)
    segment = input_of(session, recipe, Stage.SEGMENT)
    measure = input_of(session, recipe, Stage.MEASURE)
    _check_set(session, run, meta, measure)
    check_channels(session, ImageInput(meta.channels))
    features = open_set(session, workspace.artifacts, measure.id)
    source = CellSource(segment.id, measure.id, features=features)
    device = device if isinstance(model, NetworkModel) else "cpu"
    reader = make_reader(workspace, source, segment, meta, device)
    return OpenModel(checkpoint, segment, measure, source, model, meta, reader, device)


def know_plates(
    session: Session, workspace: Workspace, found: OpenModel, plates: Sequence[str]
) -> tuple[OpenModel, dict[str, Any]]:
    """Return the model with what it needs of plates that its training has not seen, and that.

    Where it normalises features or intensities plate by plate, plates that its record does not
    know are fitted to their own control cells and images, see :mod:`.normalising`. The record of
    that is empty where there is nothing to add.

    Raises:
        UserInputError: a plate has no control cells.
        ImageError: no image of a plate can be read.

    """
    meta: Any = found.meta
    added: dict[str, Any] = {}
    # What the training left out as flagged does not say how a plate is spread either.
    recipe = session.get_one(Recipe, found.run.recipe_id)
    usual = replace(found.source, unflagged_by=recipe.parameters.get("leave_out_flagged"))
    if isinstance(meta.scaler, PlateScaler):
        new = [plate for plate in plates if plate not in meta.scaler.plates]
        scaler = add_plates(session, usual, meta.scaler, new)
        added |= _added("controls", {p: scaler.plates[p].to_json() for p in new if p in scaler.own})
        meta = replace(meta, scaler=scaler)
    if meta.whites is not None:
        new = [plate for plate in plates if plate not in meta.whites.plates]
        planes = planes_of(found.segment, meta.channels)
        whites = add_whites(session, workspace.database, usual, planes, meta.whites, new)
        added |= _added("whites", {plate: list(whites.plates[plate]) for plate in new})
        meta = replace(meta, whites=whites)
    if not added:
        return found, added
    reader = make_reader(workspace, found.source, found.segment, meta, found.device)
    return replace(found, meta=meta, reader=reader), added


def _added(name: str, plates: dict[str, Any]) -> dict[str, Any]:
    return {name: plates} if plates else {}


def planes_of(segment: Recipe, channels: Sequence[str]) -> list[ImageInput]:
    """Return the plane that was segmented, then each channel: the order of white levels."""
    return [plane_of(segment), *(ImageInput((name,)) for name in channels)]


def make_reader(
    workspace: Workspace,
    source: CellSource,
    segment: Recipe,
    meta: ModelMeta,
    device: str = "cpu",
) -> Callable[[int], CellBlock]:
    """Return what reads the cells of an image as a model wants them, crops on its device.

    No image is kept.

    Raises:
        UserInputError: a measurement that the model reads is not there any more.

    """
    from ..ops.baselines import ON_FEATURES, BaselineMeta
    from ..ops.crops import crop_cells
    from .blocks import BlockReader
    from .places import PlaceReader

    if isinstance(meta, BaselineMeta) and meta.model not in ON_FEATURES:
        return PlaceReader(workspace, source, meta)
    reader = BlockReader(
        workspace,
        source,
        plane_of(segment),
        meta.scaler,
        meta.crop_size,
        kept_bytes=0,
        branches=meta.branches,
        channels=meta.channels,
        whites=None if meta.whites is None else meta.whites.plates,
    )
    return lambda image_id: crop_cells(reader.cut(image_id), meta.crop_size, device)


def find_checkpoint(session: Session, workspace: Workspace, run: Run) -> Checkpoint:
    """Return the files of a training run.

    Raises:
        UserInputError: it has none, or is not at its end.
        StorageError: the record is damaged, or is of other tensors.

    """
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run.id, Artifact.kind == ArtifactKind.CHECKPOINT)
    )
    files = {item.path.rpartition(".")[2]: item for item in session.scalars(query)}
    if run.status is not Status.DONE or not {"safetensors", "json"} <= files.keys():
        raise UserInputError(
            f"Training run {run.id} is {run.status.value} and has no checkpoint. "
            "Train again, or name another run with --run."
        )
    tensors, text = files["safetensors"], files["json"]
    record = _record(run, workspace.artifacts.read(text.path, text.sha256))
    if record.get("tensors_sha256") != tensors.sha256:
        raise StorageError(
            f"The two files of the checkpoint of run {run.id} do not belong together. Train again."
        )
    return Checkpoint(run, tensors, record)


def _record(run: Run, text: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StorageError(
            f"The record of the checkpoint of run {run.id} is not JSON. Train again."
        )
    return record


def _check_set(session: Session, run: Run, meta: ModelMeta, measure: Recipe) -> None:
    if meta.feature_set is None:
        return
    if find_feature_set(session, meta.feature_set).recipe_id != measure.id:
        raise UserInputError(
            f"Feature set {meta.feature_set!r} is another one since training run {run.id} read it. "
            "Train again."
        )
