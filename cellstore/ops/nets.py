"""The published network.

Two EfficientNet-B0 branches look at the mask crop and the flow crop of a cell, a third at its
tabular features; the three are concatenated, weighted element by element by an attention
network, projected and classified. Widths of the attention and projection layers and the dropout
rate are not given by the study; the defaults of :class:`NetShape` are cellstore's. A network may
also have some of the three branches only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from cellstore.errors import UnknownNameError, UserInputError, first_line
from cellstore.ops.branches import BRANCHES, FLOW, MASK, TABULAR, check_branches

IMAGENET = "imagenet"
BACKBONES = ("efficientnet_b0",)
_EMBEDDING = 1280
"""Channels of the last EfficientNet-B0 stage (Tan and Le 2019, table 1)."""

State = Mapping[str, Tensor]


_KINDS: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "tuple[str, ...]": (list, tuple),
}
"""What JSON makes of the types of a shape's fields."""


@dataclass(frozen=True)
class NetShape:
    """What decides the tensors of a network. ``branches`` are all or some of ``BRANCHES``."""

    n_classes: int
    n_features: int
    image_channels: int = 4
    tabular_width: int = 32
    attention_width: int = 256
    projection_width: int = 256
    dropout: float = 0.5
    backbone: str = "efficientnet_b0"
    branches: tuple[str, ...] = BRANCHES

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise UnknownNameError.of("backbone", self.backbone, BACKBONES)
        if self.branches != check_branches(self.branches):
            raise UserInputError(f"The branches of a network come in the order {BRANCHES}.")
        sizes = (
            self.n_classes,
            self.n_features if TABULAR in self.branches else 1,
            self.image_channels,
            self.tabular_width,
            self.attention_width,
            self.projection_width,
        )
        if min(sizes) < 1 or not 0 <= self.dropout < 1:
            raise UserInputError("Sizes of a network must be 1 or more, its dropout below 1.")

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
    """The published network, or one of fewer branches; see the module's description.

    The branches are the modules ``mask_branch``, ``flow_branch`` and ``tabular_branch``.
    """

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        self.shape = shape
        widths = {MASK: _EMBEDDING, FLOW: _EMBEDDING, TABULAR: shape.tabular_width}
        fused = sum(widths[name] for name in shape.branches)
        for name in shape.branches:
            made = tabular_branch(shape) if name == TABULAR else image_branch(shape.image_channels)
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

        ``crops`` of each image branch are (N, image_channels, S, S), ``features`` (N, n_features);
        all float32, normalised. What no branch of the network looks at may be absent, or of any
        shape. While training, N must be 2 or more (batch normalisation).
        """
        given = {**crops, TABULAR: features}
        seen = [self.get_submodule(_module(name))(given[name]) for name in self.shape.branches]
        fused = torch.cat(seen, dim=1)
        scores: Tensor = self.classifier(self.projection(fused * self.attention(fused)))
        return scores


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


def image_branch(channels: int) -> nn.Sequential:
    """EfficientNet-B0 without its classifier: (N, channels, S, S) to (N, 1280)."""
    whole = efficientnet_b0(weights=None)
    stem = whole.features[0][0]
    whole.features[0][0] = nn.Conv2d(
        channels,
        stem.out_channels,
        kernel_size=stem.kernel_size,
        stride=stem.stride,
        padding=stem.padding,
        bias=False,
    )
    nn.init.kaiming_normal_(whole.features[0][0].weight, mode="fan_out")
    return nn.Sequential(whole.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_net(shape: NetShape, weights: str | Path | None = None, seed: int = 0) -> FusionNet:
    """A new network on the CPU, in training mode; the same seed gives the same numbers.

    ``weights`` start the image branches: ``None`` (random), ``"imagenet"`` (fetched through
    torchvision and kept in its cache) or the path of a state dict of torchvision's
    ``efficientnet_b0`` (``.pth`` or ``.safetensors``). The first convolution is made to fit: the
    filters of red, green and blue come first, each further channel gets their mean.

    Raises ``UserInputError`` if the weights cannot be fetched, read, are of another network, or
    the network has no image branch to start from them.
    """
    if weights is not None and set(shape.branches) <= {TABULAR}:
        raise UserInputError(
            "A network that looks at no images has nothing to start from weights; leave them at "
            "'none'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FusionNet(shape)
    if weights is not None:
        _start_from(net, _imagenet_state() if weights == IMAGENET else _read_state(Path(weights)))
    return net


def _imagenet_state() -> State:
    source = EfficientNet_B0_Weights.IMAGENET1K_V1
    try:
        state: State = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserInputError(
            f"The ImageNet weights could not be fetched ({error}). Download {source.url} where "
            "there is a network and give the path of that file as the weights, or train from "
            "random weights with 'none'."
        ) from error
    return state


def _read_state(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file of weights {path}; check the path.") from error
    except Exception as error:  # torch raises errors of many kinds for a file that is no state
        raise UserInputError(
            f"{path} cannot be read as weights ({first_line(error)}). Give a state dict of "
            "torchvision's efficientnet_b0, as .pth or .safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserInputError(f"{path} holds no state dict; save net.state_dict() and give that.")
    return state


def _start_from(net: FusionNet, state: State) -> None:
    body = {
        name.removeprefix("features."): value
        for name, value in state.items()
        if name.startswith("features.")
    }
    try:
        stem = body["0.0.weight"]
        body["0.0.weight"] = _fit_channels(stem, net.shape.image_channels)
        for name in net.shape.branches:
            if name != TABULAR:
                net.get_submodule(f"{_module(name)}.0").load_state_dict(body)
    except (KeyError, RuntimeError, IndexError) as error:
        raise UserInputError(
            "These are not the weights of torchvision's efficientnet_b0 "
            f"({first_line(error)}). Give a state dict of that network."
        ) from error


def _fit_channels(stem: Tensor, channels: int) -> Tensor:
    mean = stem.mean(dim=1, keepdim=True)
    return torch.cat([stem, *[mean] * channels], dim=1)[:, :channels]
