"""The model of a training run: the two files that keep it, and what it reads of an image.

One file holds what was learned: the tensors of a network (safetensors), or an estimator of
scikit-learn (skops). The other is a record of all else (JSON). Opening them runs no code.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sqlalchemy.orm import Session
from torch import Tensor

from ..analysis.segmentation import pick_device
from ..artifacts import StoredFile
from ..config import ImageInput
from ..enums import ArtifactKind, Origin, Stage, Status
from ..errors import StorageError, UserInputError, first_line
from ..jobs.lookup import find_channels
from ..jobs.runs import files_of
from ..jobs.workspace import Workspace
from ..models import Artifact, Recipe, Run
from ..query.cells import CellSource, input_of, plane_of
from ..query.feature_files import find_feature_set, open_set
from .baselines import BASELINES
from .batches import CellReader
from .branches import TABULAR
from .crops import CROP_MEAN, CROP_STD, CellBlock
from .exported_classifier import TRUSTED, check_tree
from .networks import FusionNet, NetShape
from .normalising import Scaler, add_plates
from .pretrained import State

NETWORK = "network"

CELLS_PER_STEP = 128
"""Cells that go through a network at once.

A constant, since the answer of a network for a cell differs in the sixth digit with how many others
are in the batch: the same image always makes the same batches, so its rows are the same.
"""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ModelRecord:
    """What stands beside the tensors of a model, and is needed to use it again.

    ``model``: ``network``, or the name of a baseline. ``labels`` are the classes in the order of
    its outputs, values of ``field``. ``scaler`` names the columns that it reads, of
    ``feature_set``. ``fingerprints`` name the recipes and the split that it comes from. Of networks
    only: their ``shape``, the rows and columns of a crop in pixels, and the ``channels`` of branch
    ``image``.
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
            record |= {
                "shape": asdict(self.shape),
                "crop": {"size": self.crop_size, "mean": CROP_MEAN, "std": CROP_STD},
                "channels": list(self.channels),
            }
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelRecord:
        """Return what :meth:`to_json` described."""
        try:
            model = str(record["model"])
            if model not in (NETWORK, *BASELINES):
                raise UserInputError(
                    f"This checkpoint is a model of kind {model!r}, which this cellstore does not "
                    f"know; it knows {', '.join((NETWORK, *BASELINES))}. Use the cellstore that "
                    "trained it, or train again."
                )
            labels = tuple(str(label) for label in record["labels"])
            scaler, more = Scaler.from_json(record["scaler"]), dict[str, Any]()
            if model == NETWORK:
                branches = tuple(record["shape"]["branches"])
                more["shape"] = shape = NetShape(**{**record["shape"], "branches": branches})
                more["crop_size"] = int(record["crop"]["size"])
                more["channels"] = tuple(str(name) for name in record["channels"])
                sizes = (len(labels), len(set(labels)), len(scaler.names))
                if sizes != (shape.n_classes, shape.n_classes, shape.n_features):
                    raise UserInputError(
                        f"A network of {shape.n_classes} classes and {shape.n_features} features "
                        f"cannot have {len(set(labels))} labels and {len(scaler.names)} scales."
                    )
            fingerprints = {str(k): str(v) for k, v in record["fingerprints"].items()}
            field, feature_set = str(record["field"]), record["feature_set"]
            return cls(model, labels, field, scaler, fingerprints, feature_set, **more)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"This does not describe a model: {error!r}.") from error


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


def save_net(state: State) -> bytes:
    """Return the tensors of a state dict as a safetensors file."""
    return save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_model(
    data: bytes, record: Mapping[str, Any], device: str = "cpu"
) -> tuple[Any, ModelRecord]:
    """Return what the two files of a checkpoint hold, ready to label cells.

    That is a ``FusionNet`` on ``device``, or an estimator of scikit-learn. Raises
    ``UserInputError`` if the record is not one, or is of a kind that this cellstore does not know,
    ``StorageError`` if the bytes are damaged or do not fit the record.
    """
    meta = ModelRecord.from_json(record)
    try:
        if meta.shape is not None:
            net = FusionNet(meta.shape)
            net.load_state_dict(load_tensors(data))
        else:
            import skops.io

            estimator = skops.io.loads(data, trusted=TRUSTED)
            for item in getattr(estimator, "estimators_", ()):
                check_tree(item.tree_)
            row = np.zeros((1, len(meta.scaler.names)), dtype=np.float32)
            answer = estimator.predict_proba(row)
            if answer.shape != (1, len(meta.labels)) or not np.isfinite(answer).all():
                raise ValueError("its classes are not those of the record")
    except Exception as error:  # damaged bytes end in errors of many kinds
        raise StorageError(
            f"The checkpoint is damaged or of another model ({first_line(error)}). "
            "Check the store with 'cellstore verify', or train again."
        ) from error
    if meta.shape is None:
        return estimator, meta
    return net.eval().to(device), meta  # not above: a full GPU is no damage


def save_estimator(model: Any) -> bytes:
    """Return an estimator as a skops file; the same estimator gives the same bytes."""
    import skops.io

    # skops writes addresses in memory and the time of day. They are replaced by numbers in the
    # order in which they come, so that two equal models have one sha256.
    written = zipfile.ZipFile(io.BytesIO(skops.io.dumps(model)))
    known: dict[int, int] = {}
    names: dict[str, str] = {}

    def numbered(node: Any) -> Any:
        if isinstance(node, list):
            return [numbered(item) for item in node]
        if not isinstance(node, dict):
            return node
        made = {key: numbered(item) for key, item in node.items()}
        if isinstance(node.get("__id__"), int):
            made["__id__"] = known.setdefault(node["__id__"], len(known))
        if isinstance(node.get("file"), str):
            ending = node["file"].rpartition(".")[2]
            made["file"] = names.setdefault(node["file"], f"{len(names)}.{ending}")
        return made

    schema = json.dumps(numbered(json.loads(written.read("schema.json"))), indent=1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        # Most leaves of a forest know few of the classes: the rest are zeros.
        for old, new in names.items():
            held = (
                _without_padding(written.read(old)) if new.endswith(".npy") else written.read(old)
            )
            file.writestr(zipfile.ZipInfo(new), held, zipfile.ZIP_DEFLATED)
        file.writestr(zipfile.ZipInfo("schema.json"), schema, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _without_padding(npy: bytes) -> bytes:
    """A file of numpy; the bytes between the fields of the nodes of a tree, any before, are 0."""
    array = np.load(io.BytesIO(npy), allow_pickle=False)
    if array.dtype.names is None:
        return npy
    clean, buffer = np.zeros(array.shape, array.dtype), io.BytesIO()
    for name in array.dtype.names:
        clean[name] = array[name]
    np.save(buffer, clean, allow_pickle=False)
    return buffer.getvalue()


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
    and measurements it reads, ``source`` names them. ``learned``: what :func:`load_model` returns.
    ``reader`` keeps no image.
    """

    run: Run
    file: Artifact
    json: Mapping[str, Any]
    segment: Recipe
    measure: Recipe
    source: CellSource
    learned: Any
    record: ModelRecord
    reader: CellReader

    @property
    def width(self) -> int:
        """Numbers in an embedding; 0: there is none."""
        return self.learned.classifier.in_features if self.record.shape is not None else 0

    def predict(self, cells: CellBlock) -> tuple[Numbers, NDArray[np.float32]]:
        """Return the answers for all N cells of an image; an estimator may count them.

        Probabilities, (N, K) float64, rows adding to 1, and embeddings, (N, width) float32: what
        the last layer of a network, the linear classifier, reads, which is the output of the
        projection, made of all branches. Its numbers are 0 or more (ReLU) and have no unit.
        """
        found: list[Numbers] = [np.empty((0, len(self.record.labels)))]
        if self.record.shape is None:
            if len(cells):
                found.append(self.learned.predict_proba(cells.features.numpy()))
            return np.concatenate(found), np.empty((len(cells), 0), dtype=np.float32)
        embeddings = [np.empty((0, self.width), dtype=np.float32)]

        def keep(_layer: object, given: tuple[Tensor, ...]) -> None:
            embeddings.append(given[0].float().cpu().numpy())

        hook = self.learned.classifier.register_forward_pre_hook(keep)
        try:
            for start in range(0, len(cells), CELLS_PER_STEP):
                end = min(start + CELLS_PER_STEP, len(cells))
                found.append(predict_batch(self.learned, cells.take(torch.arange(start, end))))
        finally:
            hook.remove()
        return np.concatenate(found), np.concatenate(embeddings)


def open_model(session: Session, workspace: Workspace, run: Run, device: str = "cpu") -> OpenModel:
    """Return the model of a training run, a network on a device (``auto``, ``cpu`` or ``cuda``)."""
    found = files_of(session, run.id, ArtifactKind.CHECKPOINT)
    files = {item.path.endswith(".json"): item for item in found}
    if run.origin is Origin.DECLARED:
        raise UserInputError(
            f"Run {run.id} is a model of your own, which cellstore cannot open. Label the images "
            "with it yourself, and bring the table with: cellstore predictions add"
        )
    if run.status is not Status.DONE or len(files) < 2:
        raise UserInputError(
            f"Training run {run.id} is {run.status.value} and has no checkpoint. "
            "Train again, or name another run with --run."
        )
    file, text = files[False], files[True]
    written = json.loads(workspace.artifacts.read(text.path, text.sha256))
    if written.get("model_sha256") != file.sha256:
        raise StorageError(
            f"The two files of the checkpoint of run {run.id} do not belong together. Train again."
        )
    data = workspace.artifacts.read(file.path, file.sha256)
    device = str(pick_device(device)) if "shape" in written else "cpu"
    learned, record = load_model(data, written, device)
    recipe = session.get_one(Recipe, run.recipe_id)
    segment = input_of(recipe, Stage.SEGMENT)
    measure = input_of(recipe, Stage.MEASURE)
    name, features = record.feature_set, open_set(session, workspace.artifacts, measure.id)
    if name is not None and features.name != name:
        find_feature_set(session, name)  # it may be gone
        raise UserInputError(
            f"Feature set {name!r} is another one since training run {run.id} read it. Train again."
        )
    find_channels(session, record.channels)
    source = CellSource(segment.id, measure.id, features=features, annotated=True)
    reader = CellReader(
        workspace,
        source,
        plane_of(segment),
        record.scaler,
        record.crop_size,
        kept_bytes=0,
        branches=record.branches,
        channels=record.channels,
        device=device,
        model=record.model,
    )
    return OpenModel(run, file, written, segment, measure, source, learned, record, reader)


def fit_new_plates(
    session: Session, workspace: Workspace, found: OpenModel, plates: Sequence[str]
) -> tuple[OpenModel, dict[str, Any]]:
    """Return the model with what it needs of plates that its training has not seen, and that.

    Where it normalises features or intensities plate by plate, plates that its record does not
    know are fitted to their own control cells and images, see :mod:`.normalising`. The record of
    that is empty where there is nothing to add.
    """
    known, record = found.record.scaler, found.record
    if known.plates is None and known.intensities is None:
        return found, {}
    # What is excluded, or was flagged for the training, does not say how a plate is spread either.
    recipe = session.get_one(Recipe, found.run.recipe_id)
    flagged = recipe.parameters.get("exclude_flagged")
    usual = replace(found.source, unflagged_by=flagged, annotated=False)
    planes = planes_of(found.segment, record.channels)
    scaler = add_plates(session, workspace.database, usual, planes, known, plates)
    before, after, added = known.to_json(), scaler.to_json(), dict[str, Any]()
    for name, kind in (("controls", "plates"), ("intensity_scale", "intensities")):
        new = {plate: v for plate, v in (after[kind] or {}).items() if plate not in before[kind]}
        added |= {name: new} if new else {}
    if not added:
        return found, added
    found.reader.scaler = scaler
    return replace(found, record=replace(record, scaler=scaler)), added


def planes_of(segment: Recipe, channels: Sequence[str]) -> list[ImageInput]:
    """Return the plane that was segmented, then each channel: the order of intensity scales."""
    return [plane_of(segment), *(ImageInput((name,)) for name in channels)]
