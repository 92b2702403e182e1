"""The published network, and its relatives of other branches and backbones.

Two EfficientNet-B0 branches look at the mask crop and the flow crop of a cell, a third at its
tabular features; the three are concatenated, weighted element by element by an attention
network, projected and classified. Widths of the attention and projection layers and the dropout
rate are not given by the study; the defaults of :class:`NetShape` are cellstore's. A network may
also have some of the three branches only, a branch that looks at channels of the image, and
another backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models

from ..errors import UnknownNameError, UserInputError, first_line
from ..io.uris import plain_file
from .branches import ALL_BRANCHES, BRANCHES, IMAGE, TABULAR

EFFICIENTNET_B0 = "efficientnet_b0"
"""What the published network has."""

WORKING = (
    "efficientnet_b0 to _b7, efficientnet_v2_s, resnet18 to 152, resnext, wide_resnet, "
    "mobilenet_v2 and _v3, convnext, densenet, shufflenet_v2, regnet, swin, vgg"
)
"""The families that take crops of 64 pixels, tried with torchvision 0.29."""

State = Mapping[str, Tensor]

_CROPS_TRIED = 2

_COUNT = "num_batches_tracked"
"""Absent from the older weight files of torchvision, and of no use to us."""

_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Names in the weight files of DenseNets, from before names could not have dots."""


@cache
def backbones() -> tuple[str, ...]:
    """The names of torchvision's classifiers."""
    return tuple(models.list_models(module=models))


def check_backbone(name: str) -> None:
    """Raise ``UnknownNameError`` if torchvision has no classifier of this name."""
    if name not in backbones():
        raise UnknownNameError.of("backbone", name, backbones())


class ImageBranch(nn.Sequential):
    """Crops (N, channels, S, S) to embeddings (N, ``width``) float32.

    EfficientNets are their features, pooled, as published: without the dropout before their head.
    All others are the whole of torchvision's network but its last linear layer.

    Raises ``UnknownNameError`` for a name that torchvision does not have, ``UserInputError`` for
    one whose first convolution and head cannot be replaced.
    """

    def __init__(self, channels: int, backbone: str = EFFICIENTNET_B0) -> None:
        check_backbone(backbone)
        if backbone.startswith("mnasnet"):
            raise _unfit(backbone, "its weights need a mark that safetensors files do not keep")
        # Said, so that torchvision does not warn that its default will change.
        old = {"init_weights": True} if backbone in ("googlenet", "inception_v3") else {}
        whole = models.get_model(backbone, weights=None, **old)
        layers = list(whole.named_modules())
        stems = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]
        if not stems:
            raise _unfit(backbone, "it has no convolution")
        heads = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear)]
        if not heads:
            raise _unfit(backbone, "its head is no linear layer")
        (stem, first), (head, last) = stems[0], heads[-1]
        self.width = last.in_features
        made = nn.Conv2d(
            channels,
            first.out_channels,
            kernel_size=first.kernel_size,  # type: ignore[arg-type]
            stride=first.stride,  # type: ignore[arg-type]
            padding=first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        )
        nn.init.kaiming_normal_(made.weight, mode="fan_out")
        whole.set_submodule(stem, made)
        whole.set_submodule(head, nn.Identity())
        if backbone.startswith("efficientnet"):
            super().__init__(whole.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            super().__init__(whole)
        self.backbone, self._stem_name = backbone, stem

    def start_from(self, state: State) -> None:
        """Take over the weights of a torchvision network; ``state`` is its state dict.

        The first convolution is made to fit: the filters of red, green and blue come first, each
        further channel gets their mean. Raises ``UserInputError`` if they are of another network.
        """
        prefix = "features." if self.backbone.startswith("efficientnet") else ""
        stem = f"{self._stem_name}.weight"
        inner = self[0].state_dict()
        given = {_DENSENET.sub(r"\1\2", name): value for name, value in state.items()}
        channels = int(inner[stem.removeprefix(prefix)].shape[1])
        try:
            mean = given[stem].mean(dim=1, keepdim=True)
            given[stem] = torch.cat([given[stem], *[mean] * channels], dim=1)[:, :channels]
            counts = {f"{prefix}{name}": inner[name] for name in inner if name.endswith(_COUNT)}
            body = {**counts, **given}
            self[0].load_state_dict({name: body[f"{prefix}{name}"] for name in inner})
        except (KeyError, RuntimeError, IndexError) as error:
            raise UserInputError(
                f"These are not the weights of torchvision's {self.backbone} "
                f"({first_line(error)}). Give a state dict of that network."
            ) from error


def check_crop_size(branch: ImageBranch, channels: int, size: int) -> None:
    """Raise ``UserInputError`` if ``branch`` cannot take crops of ``size`` pixels.

    Nothing is computed: shapes alone go through the network.
    """
    tensors = {name: value.to("meta") for name, value in branch.state_dict().items()}
    crops = torch.empty((_CROPS_TRIED, channels, size, size), device="meta")
    try:
        made = functional_call(branch, tensors, (crops,))
    except (RuntimeError, AssertionError, ValueError) as error:
        why = f"it takes no crops of {size} pixels: {first_line(error).rstrip('.')}"
        raise _unfit(branch.backbone, why) from error
    if not isinstance(made, Tensor) or made.shape != (_CROPS_TRIED, branch.width):
        raise _unfit(branch.backbone, "it gives more than one embedding while training")


def _unfit(backbone: str, why: str) -> UserInputError:
    return UserInputError(
        f"Backbone {backbone!r} cannot be used here: {why}. These can: {WORKING}."
    )


def imagenet_state(backbone: str) -> State:
    """The best ImageNet weights that torchvision knows of a backbone, fetched and kept by it.

    Raises ``UserInputError`` if they cannot be fetched.
    """
    source = models.get_model_weights(backbone).DEFAULT
    try:
        state: State = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserInputError(
            f"The ImageNet weights could not be fetched ({error}). Download {source.url} where "
            "there is a network and give the path of that file as the weights, or train from "
            "random weights with 'none'."
        ) from error
    return state


def read_state(path: Path, backbone: str) -> State:
    """The state dict in a file, ``.pth`` or ``.safetensors``; no code in it is run.

    Raises ``UserInputError`` if there is none.
    """
    try:
        plain_file(path)
        if path.suffix == ".safetensors":
            return load_tensors(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file of weights {path}; check the path.") from error
    except Exception as error:  # torch raises errors of many kinds for a file that is no state
        raise UserInputError(
            f"{path} cannot be read as weights ({first_line(error)}). Give a state dict of "
            f"torchvision's {backbone}, as .pth or .safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserInputError(f"{path} holds no state dict; save net.state_dict() and give that.")
    return state


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
        in_order = tuple(name for name in ALL_BRANCHES if name in self.branches)
        if not in_order or self.branches != in_order:
            raise UserInputError(f"A network needs branches, in the order {ALL_BRANCHES}.")
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
        if weights == IMAGENET:
            state = imagenet_state(shape.backbone)
        else:
            state = read_state(Path(weights), shape.backbone)
        for branch in branches.values():
            branch.start_from(state)
    return net
