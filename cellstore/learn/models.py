"""The model of a training run, opened from its two files, with what it reads of an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor

from ..config import ImageInput
from ..enums import ArtifactKind, Stage, Status
from ..errors import StorageError, UserInputError
from ..jobs.planes import check_channels
from ..jobs.workspace import Workspace
from ..models import Artifact, Recipe, Run, RunArtifact
from ..query.cells import CellSource, input_of, plane_of
from ..query.feature_files import find_feature_set, open_set
from .baselines import BASELINES, load_baseline
from .checkpoints import load_checkpoint
from .crops import CellBlock
from .networks import FusionNet
from .normalising import FeatureScaler, PlateScaler, WhiteLevels, add_plates, add_whites
from .training import predict_batch

NETWORK = "network"
"""What a record's key ``model`` says of a network; also what is meant where there is no key."""

CELLS_PER_STEP = 128
"""Cells that go through a network at once.

A constant, since what a network says of a cell differs in the sixth digit with how many others
are in the batch: the same image always makes the same batches, so its rows are the same.
"""

Numbers = NDArray[np.float64]


class ModelMeta(Protocol):
    """What stands in a record, whatever the kind of the model; see ``CheckpointMeta``."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the model's outputs, values of ``field``."""

    @property
    def field(self) -> str:
        """The field of the labels."""

    @property
    def scaler(self) -> FeatureScaler:
        """What features are scaled by; its names are the columns that the model reads."""

    @property
    def branches(self) -> tuple[str, ...]:
        """What the model looks at."""

    @property
    def crop_size(self) -> int:
        """Side of the crops in pixels; of no interest where there is no image branch."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels of the branch ``image``, in their order."""

    @property
    def whites(self) -> WhiteLevels | None:
        """White levels of plates; none: those of each image by itself."""

    @property
    def feature_set(self) -> str | None:
        """The feature set whose columns the model reads."""

    def to_json(self) -> dict[str, Any]:
        """A record that ``json.dumps`` takes as it is."""


class Model(Protocol):
    """Says how probable each class is for each cell of an image."""

    def predict(self, cells: CellBlock) -> Numbers:
        """Return probabilities, (N, K) float64, rows adding to 1, of the N cells of an image.

        Always all cells of an image: a model may look at how many there are.
        """


class NetworkModel:
    """A network on its device. ``width``: numbers in an embedding."""

    def __init__(self, net: FusionNet, device: str = "cpu") -> None:
        self.net = net.eval().to(device)
        self.width = net.classifier.in_features

    def predict(self, cells: CellBlock) -> Numbers:
        """Return probabilities, (N, K) float64; see :class:`Model`."""
        return self.predict_and_embed(cells)[0]

    def embed(self, cells: CellBlock) -> NDArray[np.float32]:
        """Return the embedding of each cell, (N, width) float32.

        It is what the last layer, the linear classifier, reads: the output of the projection, made
        of all branches. Its numbers are 0 or more (ReLU) and have no unit.
        """
        return self.predict_and_embed(cells)[1]

    def predict_and_embed(self, cells: CellBlock) -> tuple[Numbers, NDArray[np.float32]]:
        """Return both of one pass through the network."""
        chances = [np.empty((0, self.net.shape.n_classes))]
        vectors = [np.empty((0, self.width), dtype=np.float32)]

        def keep(_layer: object, given: tuple[Tensor, ...]) -> None:
            vectors.append(given[0].float().cpu().numpy())

        hook = self.net.classifier.register_forward_pre_hook(keep)
        try:
            for start in range(0, len(cells), CELLS_PER_STEP):
                end = min(start + CELLS_PER_STEP, len(cells))
                chances.append(predict_batch(self.net, cells.take(torch.arange(start, end))))
        finally:
            hook.remove()
        return np.concatenate(chances), np.concatenate(vectors)


class Loader(Protocol):
    """Makes a model of the bytes of its tensors and of its record, on a device."""

    def __call__(
        self, tensors: bytes, record: Mapping[str, Any], device: str
    ) -> tuple[Model, ModelMeta]:
        """Return the model; raises as ``load_checkpoint`` does."""


def load_network(
    tensors: bytes, record: Mapping[str, Any], device: str
) -> tuple[NetworkModel, ModelMeta]:
    """Return a network that is ready to label cells; raises as ``load_checkpoint`` does."""
    net, meta = load_checkpoint(tensors, record)
    return NetworkModel(net, device), meta


LOADERS: dict[str, Loader] = {NETWORK: load_network, **dict.fromkeys(BASELINES, load_baseline)}
"""The kinds of models by what their records call them."""


def load_model(
    tensors: bytes, record: Mapping[str, Any], device: str = "cpu"
) -> tuple[Model, ModelMeta]:
    """Return the model of a checkpoint's two files.

    Raises ``UserInputError`` if the record is not one, or is of a kind that this cellstore does not
    know, ``StorageError`` if the bytes are damaged or do not fit the record.
    """
    kind = str(record.get("model", NETWORK))
    if kind not in LOADERS:
        raise UserInputError(
            f"This checkpoint is a model of kind {kind!r}, which this cellstore does not know; "
            f"it knows {', '.join(LOADERS)}. Use the cellstore that trained it, or train again."
        )
    return LOADERS[kind](tensors, record, device)


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
    usual = replace(found.source, unflagged_by=recipe.parameters.get("exclude_flagged"))
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
    from .baselines import ON_FEATURES, BaselineMeta
    from .batches import BlockReader
    from .crops import crop_cells
    from .inputs import PlaceReader

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
