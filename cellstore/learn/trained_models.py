"""The model of a training run: the two files that keep it, and what it reads of an image.

One file holds what was learned: the tensors of a network (safetensors), or an estimator of
scikit-learn (skops). The other is a record of all else (JSON). Opening them runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor

from ..artifacts import StoredFile
from ..config import ImageInput
from ..enums import ArtifactKind, Stage, Status
from ..errors import StorageError, UserInputError, first_line
from ..jobs.planes import check_channels
from ..jobs.workspace import Workspace
from ..models import Artifact, Image, Recipe, Run, RunArtifact, Well
from ..query.cells import CellSource, input_of, plane_of, read_cells
from ..query.feature_files import SetReader, find_feature_set, open_set
from .baselines import (
    BASELINES,
    CELLCOUNT,
    ON_FEATURES,
    POSITION,
    count_rows,
    load_estimator,
    save_estimator,
)
from .batches import CellReader
from .branches import TABULAR
from .crops import CROP_MEAN, CROP_STD, UNKNOWN_LABEL, CellBlock
from .networks import FusionNet, NetShape, State
from .normalising import IntensityScale, Scaler, add_intensities, add_plates

NETWORK = "network"

CELLS_PER_STEP = 128
"""Cells that go through a network at once.

A constant, since what a network says of a cell differs in the sixth digit with how many others
are in the batch: the same image always makes the same batches, so its rows are the same.
"""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ModelRecord:
    """What stands beside the tensors of a model, and is needed to use it again.

    ``model``: ``network``, or the name of a baseline. ``labels`` are the classes in the order of
    its outputs, values of ``field``. ``scaler`` names the columns that it reads, of
    ``feature_set``. ``fingerprints`` name the recipes and the split that it comes from. Of networks
    only: their ``shape``, the side of the crops in pixels, the ``channels`` of branch ``image``,
    and the intensity scale of plates (``None``: each image has its own).
    """

    model: str
    labels: tuple[str, ...]
    field: str
    scaler: Scaler
    fingerprints: Mapping[str, str]
    feature_set: str | None = None
    shape: NetShape | None = None
    crop_size: int = 1
    channels: tuple[str, ...] = ()
    intensity_scale: IntensityScale | None = None

    def __post_init__(self) -> None:
        shape = self.shape
        if shape is None:
            return
        if len(self.labels) != shape.n_classes or len(set(self.labels)) < len(self.labels):
            raise UserInputError(
                f"A network of {shape.n_classes} classes needs as many different labels, there are "
                f"{len(set(self.labels))}."
            )
        if len(self.scaler.names) != shape.n_features:
            raise UserInputError(
                f"A network of {shape.n_features} features cannot use a scaler of "
                f"{len(self.scaler.names)}."
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """What the model looks at."""
        return (TABULAR,) if self.shape is None else self.shape.branches

    def to_json(self) -> dict[str, Any]:
        """Return a record that ``json.dumps`` takes as it is."""
        record: dict[str, Any] = {
            "model": self.model,
            "labels": list(self.labels),
            "field": self.field,
            "scaler": self.scaler.to_json(),
            "fingerprints": dict(self.fingerprints),
            "feature_set": self.feature_set,
        }
        if self.shape is not None:
            scale = self.intensity_scale
            record |= {
                "shape": self.shape.to_json(),
                "crop": {"size": self.crop_size, "mean": CROP_MEAN, "std": CROP_STD},
                "channels": list(self.channels),
                "intensity_scale": None if scale is None else scale.to_json(),
            }
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelRecord:
        """Return what :meth:`to_json` described.

        Raises ``UserInputError`` if it is no such record, or of a model that is not known here.
        """
        try:
            model = str(record["model"])
            more: dict[str, Any] = {}
            if model == NETWORK:
                scale = record["intensity_scale"]
                more = {
                    "shape": NetShape.from_json(record["shape"]),
                    "crop_size": int(record["crop"]["size"]),
                    "channels": tuple(str(name) for name in record["channels"]),
                    "intensity_scale": None if scale is None else IntensityScale.from_json(scale),
                }
            elif model not in BASELINES:
                raise UserInputError(
                    f"This checkpoint is a model of kind {model!r}, which this cellstore does not "
                    f"know; it knows {', '.join((NETWORK, *BASELINES))}. Use the cellstore that "
                    "trained it, or train again."
                )
            return cls(
                model,
                tuple(str(label) for label in record["labels"]),
                str(record["field"]),
                Scaler.from_json(record["scaler"]),
                {str(k): str(v) for k, v in record["fingerprints"].items()},
                record["feature_set"],
                **more,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"This does not describe a model: {error!r}.") from error


class NetworkModel:
    """A network on its device. ``width``: numbers in an embedding."""

    def __init__(self, net: FusionNet, device: str = "cpu") -> None:
        self.net, self.device = net.eval().to(device), device
        self.width = net.classifier.in_features

    def predict(self, cells: CellBlock) -> Numbers:
        """Return probabilities, (N, K) float64, rows adding to 1, of the N cells of an image."""
        return self.predict_and_embed(cells)[0]

    def predict_and_embed(self, cells: CellBlock) -> tuple[Numbers, NDArray[np.float32]]:
        """Return these, and the embedding of each cell, (N, width) float32.

        An embedding is what the last layer, the linear classifier, reads: the output of the
        projection, made of all branches. Its numbers are 0 or more (ReLU) and have no unit.
        """
        probabilities = [np.empty((0, self.net.shape.n_classes))]
        embeddings = [np.empty((0, self.width), dtype=np.float32)]

        def keep(_layer: object, given: tuple[Tensor, ...]) -> None:
            embeddings.append(given[0].float().cpu().numpy())

        hook = self.net.classifier.register_forward_pre_hook(keep)
        try:
            for start in range(0, len(cells), CELLS_PER_STEP):
                end = min(start + CELLS_PER_STEP, len(cells))
                some = cells.take(torch.arange(start, end))
                probabilities.append(predict_batch(self.net, some))
        finally:
            hook.remove()
        return np.concatenate(probabilities), np.concatenate(embeddings)


def predict_batch(net: FusionNet, batch: CellBlock) -> Numbers:
    """Class probabilities of the cells of ``batch``, (N, n_classes) float64, rows adding to 1.

    Runs on the device of ``net``, which is put into evaluation mode. No cell: (0, n_classes).
    """
    if len(batch) == 0:
        return np.empty((0, net.shape.n_classes))
    net.eval()
    batch = batch.to(next(net.parameters()).device)
    with torch.inference_mode():
        scores = net(batch.crops, batch.features)
    probabilities: Numbers = torch.softmax(scores.double().cpu(), dim=1).numpy()
    return probabilities


class BaselineModel:
    """An estimator of scikit-learn. It always sees all cells of an image: it may count them."""

    device = "cpu"

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def predict(self, cells: CellBlock) -> Numbers:
        """Return probabilities, (N, K) float64, rows adding to 1, of the N cells of an image."""
        if len(cells) == 0:
            return np.empty((0, len(self.estimator.classes_)))
        found: Numbers = self.estimator.predict_proba(cells.features.numpy())
        return found


Model = NetworkModel | BaselineModel


def save_net(state: State) -> bytes:
    """Return the tensors of a state dict as a safetensors file."""
    return save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_net(tensors: bytes, shape: NetShape) -> FusionNet:
    """Return the network of a safetensors file, in evaluation mode, on the CPU.

    Raises ``StorageError`` if the bytes are damaged or of another network.
    """
    net = FusionNet(shape)
    try:
        net.load_state_dict(load_tensors(tensors))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise _damaged(first_line(error)) from error
    return net.eval()


def load_model(
    data: bytes, record: Mapping[str, Any], device: str = "cpu"
) -> tuple[Model, ModelRecord]:
    """Return the model of a checkpoint's two files, ready to label cells.

    Raises ``UserInputError`` if the record is not one, or is of a kind that this cellstore does not
    know, ``StorageError`` if the bytes are damaged or do not fit the record.
    """
    meta = ModelRecord.from_json(record)
    if meta.shape is not None:
        return NetworkModel(load_net(data, meta.shape), device), meta
    try:
        estimator = load_estimator(data, meta.model)
        answer = estimator.predict_proba(np.zeros((1, len(meta.scaler.names)), dtype=np.float32))
    except Exception as error:  # damaged bytes end in errors of many kinds
        raise _damaged(first_line(error)) from error
    if answer.shape != (1, len(meta.labels)) or not np.isfinite(answer).all():
        raise _damaged("its classes are not those of the record")
    return BaselineModel(estimator), meta


def _damaged(reason: str) -> StorageError:
    return StorageError(
        f"The checkpoint is damaged or of another model ({reason}). "
        "Check the store with 'cellstore verify', or train again."
    )


def write_model(
    workspace: Workspace, learned: State | Any, record: ModelRecord, more: Mapping[str, Any]
) -> tuple[StoredFile, StoredFile]:
    """Write the two files of a model; ``more`` goes into the record, too. Return both, no rows."""
    write = workspace.artifacts.write
    if record.model == NETWORK:
        model = write(ArtifactKind.CHECKPOINT, save_net(learned), ".safetensors")
    else:
        model = write(ArtifactKind.CHECKPOINT, save_estimator(learned), ".skops")
    whole = record.to_json() | {"model_sha256": model.sha256, **more}
    text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False)
    return model, write(ArtifactKind.CHECKPOINT, text.encode(), ".json")


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to label the cells of a store.

    ``file`` and ``json`` are its two files. ``segment`` and ``measure`` are the recipes whose cells
    and measurements it reads, ``source`` names them. ``reader`` returns the cells of the image with
    an id.
    """

    run: Run
    file: Artifact
    json: Mapping[str, Any]
    segment: Recipe
    measure: Recipe
    source: CellSource
    model: Model
    record: ModelRecord
    reader: Callable[[int], CellBlock]


def open_model(session: Session, workspace: Workspace, run: Run, device: str = "cpu") -> OpenModel:
    """Return the model of a training run on a device (``cpu`` or ``cuda``).

    Raises:
        UserInputError: the run has no checkpoint or one of an unknown kind, or the feature set is
            not the one that it was trained on.
        UnknownNameError: the feature set is gone, or no image has a channel that it looks at.
        StorageError: the checkpoint is damaged.

    """
    file, json_record = find_checkpoint(session, workspace, run)
    data = workspace.artifacts.read(file.path, file.sha256)
    model, record = load_model(data, json_record, device)
    recipe = session.get_one(Recipe, run.recipe_id)
    segment = input_of(session, recipe, Stage.SEGMENT)
    measure = input_of(session, recipe, Stage.MEASURE)
    name = record.feature_set
    if name is not None and find_feature_set(session, name).recipe_id != measure.id:
        raise UserInputError(
            f"Feature set {name!r} is another one since training run {run.id} read it. Train again."
        )
    check_channels(session, ImageInput(record.channels))
    features = open_set(session, workspace.artifacts, measure.id)
    source = CellSource(segment.id, measure.id, features=features, annotated=True)
    reader = make_reader(workspace, source, segment, record, model.device)
    return OpenModel(run, file, json_record, segment, measure, source, model, record, reader)


def fit_new_plates(
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
    record, added = found.record, dict[str, Any]()
    # What is excluded, or was flagged for the training, does not say how a plate is spread either.
    recipe = session.get_one(Recipe, found.run.recipe_id)
    flagged = recipe.parameters.get("exclude_flagged")
    usual = replace(found.source, unflagged_by=flagged, annotated=False)
    if record.scaler.plates is not None:
        new = [plate for plate in plates if plate not in record.scaler.plates]
        scaler = add_plates(session, usual, record.scaler, new)
        known = scaler.to_json()["plates"]
        added["controls"] = {plate: known[plate] for plate in new if plate in known}
        record = replace(record, scaler=scaler)
    if record.intensity_scale is not None:
        new = [plate for plate in plates if plate not in record.intensity_scale.plates]
        planes = planes_of(found.segment, record.channels)
        scale = add_intensities(
            session, workspace.database, usual, planes, record.intensity_scale, new
        )
        added["intensity_scale"] = {plate: list(scale.plates[plate]) for plate in new}
        record = replace(record, intensity_scale=scale)
    added = {name: values for name, values in added.items() if values}
    if not added:
        return found, added
    reader = make_reader(workspace, found.source, found.segment, record, found.model.device)
    return replace(found, record=record, reader=reader), added


def planes_of(segment: Recipe, channels: Sequence[str]) -> list[ImageInput]:
    """Return the plane that was segmented, then each channel: the order of intensity scales."""
    return [plane_of(segment), *(ImageInput((name,)) for name in channels)]


def make_reader(
    workspace: Workspace,
    source: CellSource,
    segment: Recipe,
    record: ModelRecord,
    device: str = "cpu",
) -> Callable[[int], CellBlock]:
    """Return what reads the cells of an image as a model wants them, crops on its device.

    No image is kept.

    Raises:
        UserInputError: a measurement that the model reads is not there any more.

    """
    if record.model == NETWORK or record.model in ON_FEATURES:
        scale = record.intensity_scale
        return CellReader(
            workspace,
            source,
            plane_of(segment),
            record.scaler,
            record.crop_size,
            kept_bytes=0,
            branches=record.branches,
            channels=record.channels,
            intensity_scale=None if scale is None else scale.plates,
            device=device,
        )
    values = SetReader(source.features.files or ())

    def read(image_id: int) -> CellBlock:
        """The cells of an image for a model that looks at none: all have the same features."""
        with workspace.database.read() as session:
            ids = read_cells(session, source, image_id, (), values).cell_ids
            row: Any = np.empty((1, 0))
            if record.model == CELLCOUNT:
                row = count_rows([len(ids)])
            elif record.model == POSITION:
                query = select(Well.well_row, Well.well_column).join(
                    Image, Image.well_id == Well.id
                )
                row = [tuple(session.execute(query.where(Image.id == image_id)).one())]
        features = torch.from_numpy(record.scaler.transform(row)).expand(len(ids), -1)
        labels = torch.full((len(ids),), UNKNOWN_LABEL, dtype=torch.int64)
        return CellBlock({}, features, labels, torch.from_numpy(ids))

    return read


def find_checkpoint(
    session: Session, workspace: Workspace, run: Run
) -> tuple[Artifact, Mapping[str, Any]]:
    """Return the file of the model of a training run, and the record that stands beside it.

    Raises:
        UserInputError: it has none, or is not at its end.
        StorageError: the record is damaged, or is of another model.

    """
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run.id, Artifact.kind == ArtifactKind.CHECKPOINT)
    )
    files = {item.path.endswith(".json"): item for item in session.scalars(query)}
    if run.status is not Status.DONE or len(files) < 2:
        raise UserInputError(
            f"Training run {run.id} is {run.status.value} and has no checkpoint. "
            "Train again, or name another run with --run."
        )
    model, text = files[False], files[True]
    try:
        record = json.loads(workspace.artifacts.read(text.path, text.sha256))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StorageError(
            f"The record of the checkpoint of run {run.id} is not JSON. Train again."
        )
    if record.get("model_sha256") != model.sha256:
        raise StorageError(
            f"The two files of the checkpoint of run {run.id} do not belong together. Train again."
        )
    return model, record
