"""The files that rebuild a trained network: its tensors, and a record of all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..errors import StorageError, UserInputError, first_line
from .networks import FusionNet, NetShape, State
from .normalising import FeatureScaler, WhiteLevels, read_scaler


@dataclass(frozen=True)
class CheckpointMeta:
    """What has to stand beside the tensors of a network to use it again.

    ``labels`` are the classes in the order of the network's outputs, values of ``field``.
    Crops are resized to ``crop_size`` and normalised as ``(x - crop_mean) / crop_std``.
    ``fingerprints`` name the recipes and the split the network comes from. ``feature_set`` is the
    one whose columns the network reads, those that the scaler names. ``channels`` are those of the
    branch ``image``. ``whites``: white levels of plates; ``None``: of each image by itself.
    """

    shape: NetShape
    labels: tuple[str, ...]
    field: str
    scaler: FeatureScaler
    crop_size: int
    fingerprints: Mapping[str, str]
    crop_mean: float = 0.5
    crop_std: float = 0.5
    feature_set: str | None = None
    channels: tuple[str, ...] = ()
    whites: WhiteLevels | None = None

    def __post_init__(self) -> None:
        if len(self.labels) != self.shape.n_classes or len(set(self.labels)) < len(self.labels):
            raise UserInputError(
                f"A network of {self.shape.n_classes} classes needs as many different labels, "
                f"there are {len(set(self.labels))}."
            )
        if len(self.scaler.names) != self.shape.n_features:
            raise UserInputError(
                f"A network of {self.shape.n_features} features cannot use a scaler of "
                f"{len(self.scaler.names)}."
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """What the network looks at."""
        return self.shape.branches

    def to_json(self) -> dict[str, Any]:
        """A record that ``json.dumps`` takes as it is."""
        return {
            "shape": self.shape.to_json(),
            "labels": list(self.labels),
            "field": self.field,
            "scaler": self.scaler.to_json(),
            "crop": {"size": self.crop_size, "mean": self.crop_mean, "std": self.crop_std},
            "fingerprints": dict(self.fingerprints),
            "feature_set": self.feature_set,
            "channels": list(self.channels),
            "whites": None if self.whites is None else self.whites.to_json(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CheckpointMeta:
        """The record that :meth:`to_json` made; raises ``UserInputError`` if it is not one."""
        try:
            crop, whites = record["crop"], record.get("whites")
            return cls(
                shape=NetShape.from_json(record["shape"]),
                labels=tuple(str(label) for label in record["labels"]),
                field=str(record["field"]),
                scaler=read_scaler(record["scaler"]),
                crop_size=int(crop["size"]),
                fingerprints={str(k): str(v) for k, v in record["fingerprints"].items()},
                crop_mean=float(crop["mean"]),
                crop_std=float(crop["std"]),
                feature_set=record.get("feature_set"),
                channels=tuple(str(name) for name in record.get("channels", ())),
                whites=None if whites is None else WhiteLevels.from_json(whites),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"This does not describe a checkpoint: {error!r}.") from error


def save_net(state: State) -> bytes:
    """The tensors of a state dict as a safetensors file."""
    return save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_checkpoint(tensors: bytes, record: Mapping[str, Any]) -> tuple[FusionNet, CheckpointMeta]:
    """The network of ``save_net``'s bytes and of ``CheckpointMeta.to_json``'s record.

    It is ready to predict: in evaluation mode, on the CPU. Raises ``UserInputError`` if the record
    is not one, ``StorageError`` if the bytes are damaged or do not fit the record.
    """
    meta = CheckpointMeta.from_json(record)
    net = FusionNet(meta.shape)
    try:
        net.load_state_dict(load_tensors(tensors))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise StorageError(
            f"The checkpoint is damaged or of another network ({first_line(error)}). "
            "Check the store with 'cellstore verify', or train again."
        ) from error
    return net.eval(), meta
