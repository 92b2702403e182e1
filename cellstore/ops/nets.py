"""The published network, and its relatives of other branches and backbones.

Two EfficientNet-B0 branches look at the mask crop and the flow crop of a cell, a third at its
tabular features; the three are concatenated, weighted element by element by an attention
network, projected and classified. Widths of the attention and projection layers and the dropout
rate are not given by the study; the defaults of :class:`NetShape` are cellstore's. A network may
also have some of the three branches only, a branch that looks at channels of the image, and
another backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellstore.errors import UserInputError
from cellstore.ops.backbones import (
    EFFICIENTNET_B0,
    ImageBranch,
    State,
    check_backbone,
    check_crop_size,
    imagenet_state,
    read_state,
)
from cellstore.ops.branches import ALL_BRANCHES, BRANCHES, IMAGE, TABULAR, check_branches

IMAGENET = "imagenet"

_KINDS: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "tuple[str, ...]": (list, tuple),
}
"""What JSON makes of the types of a shape's fields."""


@dataclass(frozen=True)
class NetShape:
    """What decides the tensors of a network.

    ``branches`` are some of ``ALL_BRANCHES``. ``image_channels`` are those of the mask crop and of
    the flow crop, ``plane_channels`` those of branch ``image``.
    """

    n_classes: int
    n_features: int
    image_channels: int = 4
    tabular_width: int = 32
    attention_width: int = 256
    projection_width: int = 256
    dropout: float = 0.5
    backbone: str = EFFICIENTNET_B0
    branches: tuple[str, ...] = BRANCHES
    plane_channels: int = 0

    def __post_init__(self) -> None:
        check_backbone(self.backbone)
        if self.branches != check_branches(self.branches):
            raise UserInputError(f"The branches of a network come in the order {ALL_BRANCHES}.")
        sizes = (
            self.n_classes,
            self.n_features if TABULAR in self.branches else 1,
            self.image_channels,
            self.plane_channels if IMAGE in self.branches else 1,
            self.tabular_width,
            self.attention_width,
            self.projection_width,
        )
        if min(sizes) < 1 or not 0 <= self.dropout < 1:
            raise UserInputError("Sizes of a network must be 1 or more, its dropout below 1.")

    @property
    def pictures(self) -> dict[str, int]:
        """The channels of each branch that looks at crops."""
        return {
            name: self.plane_channels if name == IMAGE else self.image_channels
            for name in self.branches
            if name != TABULAR
        }

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self) | {"branches": list(self.branches)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> NetShape:
        """The shape that :meth:`to_json` described; raises ``UserInputError`` if it is not one."""
        known = {item.name: str(item.type) for item in fields(cls)}
        wrong = [
            name
            for name, value in record.items()
            if name not in known or not isinstance(value, _KINDS[known[name]])
        ]
        if wrong or not {"n_classes", "n_features"} <= record.keys():
            raise UserInputError(f"This does not describe a network: look at {wrong or record}.")
        branches = tuple(str(name) for name in record.get("branches", BRANCHES))
        return cls(**{**record, "branches": branches})


class FusionNet(nn.Module):
    """The published network, or one of other branches; see the module's description.

    The branches are the modules ``mask_branch``, ``flow_branch``, ``image_branch`` and
    ``tabular_branch``, those of them that ``shape.branches`` names.
    """

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        self.shape = shape
        fused = 0
        for name in shape.branches:
            channels = shape.pictures.get(name)
            made = ImageBranch(channels, shape.backbone) if channels else tabular_branch(shape)
            fused += made.width if isinstance(made, ImageBranch) else shape.tabular_width
            self.add_module(_module(name), made)
        self.attention = nn.Sequential(
            nn.Linear(fused, shape.attention_width),
            nn.ReLU(),
            nn.Linear(shape.attention_width, fused),
            nn.Sigmoid(),
        )
        self.projection = nn.Sequential(nn.Linear(fused, shape.projection_width), nn.ReLU())
        self.classifier = nn.Linear(shape.projection_width, shape.n_classes)

    def forward(self, crops: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Class scores before softmax, (N, n_classes) float32.

        ``crops`` of each branch are (N, channels, S, S), with the channels that ``shape.pictures``
        says, ``features`` (N, n_features); all float32, normalised. What no branch of the network
        looks at may be absent, or of any shape. While training, N must be 2 or more (batch
        normalisation).
        """
        given = {**crops, TABULAR: features}
        seen = [self.get_submodule(_module(name))(given[name]) for name in self.shape.branches]
        fused = torch.cat(seen, dim=1)
        scores: Tensor = self.classifier(self.projection(fused * self.attention(fused)))
        return scores

    def image_branches(self) -> dict[str, ImageBranch]:
        """The branches that look at crops, by name."""
        modules = {name: self.get_submodule(_module(name)) for name in self.shape.pictures}
        return {name: made for name, made in modules.items() if isinstance(made, ImageBranch)}


def _module(branch: str) -> str:
    return f"{branch}_branch"


def tabular_branch(shape: NetShape) -> nn.Sequential:
    """(N, n_features) to (N, tabular_width)."""
    return nn.Sequential(
        nn.Linear(shape.n_features, shape.tabular_width),
        nn.ReLU(),
        nn.BatchNorm1d(shape.tabular_width),
        nn.Dropout(shape.dropout),
    )


def build_net(
    shape: NetShape, weights: str | Path | None = None, seed: int = 0, crop_size: int | None = None
) -> FusionNet:
    """A new network on the CPU, in training mode; the same seed gives the same numbers.

    ``weights`` start the branches that look at crops: ``None`` (random), ``"imagenet"`` (fetched
    through torchvision and kept in its cache) or the path of a state dict of torchvision's network
    of that backbone (``.pth`` or ``.safetensors``). The first convolution is made to fit: the
    filters of red, green and blue come first, each further channel gets their mean. With
    ``crop_size``, in pixels, it is tried whether the backbone takes such crops.

    Raises ``UserInputError`` if the weights cannot be fetched, read, are of another network, the
    network has no such branch to start from them, or the crops do not fit the backbone.
    """
    if weights is not None and not shape.pictures:
        raise UserInputError(
            "A network that looks at no images has nothing to start from weights; leave them at "
            "'none'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FusionNet(shape)
    branches = net.image_branches()
    for name, branch in branches.items():
        if crop_size is not None:
            check_crop_size(branch, shape.pictures[name], crop_size)
    if weights is not None:
        state = _state(weights, shape.backbone)
        for branch in branches.values():
            branch.start_from(state)
    return net


def _state(weights: str | Path, backbone: str) -> State:
    if weights == IMAGENET:
        return imagenet_state(backbone)
    return read_state(Path(weights), backbone)
