"""Models that are ready to label cells. A network is one kind; baselines are others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellstore.errors import UserInputError
from cellstore.ops.baselines import BASELINES, load_baseline
from cellstore.ops.checkpoints import load_checkpoint
from cellstore.ops.crops import CellBlock
from cellstore.ops.nets import FusionNet
from cellstore.ops.normalising import WhiteLevels
from cellstore.ops.scaling import FeatureScaler
from cellstore.ops.training import predict_batch

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
