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
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from torchvision import models

from ..errors import UnknownNameError, UserInputError, first_line
from .branches import ALL_BRANCHES, BRANCHES, IMAGE, TABULAR
from .exported_classifier import TIMM, ImageBranch, Network
from .pretrained import State, check_timm_name, imagenet_state, owner_of, read_state

EFFICIENTNET_B0 = "efficientnet_b0"
"""What the published network has."""

WORKING = (
    "efficientnet_b0 to _b7, efficientnet_v2_s, resnet18 to 152, resnext, wide_resnet, "
    "mobilenet_v2 and _v3, convnext, densenet, shufflenet_v2, regnet, swin, vgg; and most of timm, "
    "for example timm:resnet18, timm:convnext_atto, timm:vit_small_patch16_224"
)
"""The families that take crops of 64 pixels, tried with torchvision 0.29 and timm 1.0.31."""

_MANY = "it gives more than one embedding while training"
_UNFIT = {
    "mnasnet": "its weights need a mark that safetensors files do not keep",
    "googlenet": _MANY,
    "inception": _MANY,
}
"""The families that cannot be used, by how their names begin."""


@cache
def backbones() -> tuple[str, ...]:
    """The names of torchvision's classifiers."""
    return tuple(models.list_models(module=models))


def check_backbone(name: str) -> None:
    """Refuse a name that torchvision or timm does not have, and a network that does not work."""
    if name.startswith(TIMM):
        check_timm_name(name.removeprefix(TIMM))
        return
    if name not in backbones():
        raise UnknownNameError.of("backbone", name, backbones())
    for family, why in _UNFIT.items():
        if name.startswith(family):
            raise _unfit(name, why)


def start_from(branch: ImageBranch, state: State) -> None:
    """Take over the weights of a torchvision or timm network; ``state`` is its state dict.

    The first convolution is made to fit: the filters of red, green and blue come first, each
    further channel gets their mean. Raises ``UserInputError`` if they are of another network.
    """
    prefix = "features." if branch.backbone.startswith("efficientnet") else ""
    stem = f"{branch.stem}.weight"
    inner = branch[0].state_dict()
    # Weight files of DenseNets are from before names could not have dots.
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
    given = {dotted.sub(r"\1\2", name): value for name, value in state.items()}
    channels = int(inner[stem.removeprefix(prefix)].shape[1])
    try:
        mean = given[stem].mean(dim=1, keepdim=True)
        given[stem] = torch.cat([given[stem], *[mean] * channels], dim=1)[:, :channels]
        # Older weight files lack these; they are of no use to us.
        counts = {f"{prefix}{n}": inner[n] for n in inner if n.endswith("num_batches_tracked")}
        body = {**counts, **given}
        branch[0].load_state_dict({name: body[f"{prefix}{name}"] for name in inner})
    except (KeyError, RuntimeError, IndexError) as error:
        raise UserInputError(
            f"These are not the weights of {owner_of(branch.backbone)} "
            f"({first_line(error)}). Give a state dict of that network."
        ) from error


def check_crop_size(branch: ImageBranch, channels: int, size: int) -> None:
    """Raise ``UserInputError`` if ``branch`` cannot take crops of ``size`` pixels.

    Nothing is computed: shapes alone go through the network.
    """
    tensors = dict(branch.named_buffers()) | branch.state_dict()
    tensors = {name: value.to("meta") for name, value in tensors.items()}
    crops = torch.empty((2, channels, size, size), device="meta")
    try:
        seen = functional_call(branch, tensors, (crops,))
        if seen.shape != (2, branch.width):
            raise ValueError(f"it gives {tuple(seen.shape[1:])} numbers, not one row")
    except (RuntimeError, AssertionError, ValueError) as error:
        why = f"it takes no crops of {size} pixels: {first_line(error).rstrip('.')}"
        raise _unfit(branch.backbone, why) from error


def _unfit(backbone: str, why: str) -> UserInputError:
    return UserInputError(
        f"Backbone {backbone!r} cannot be used here: {why}. These can: {WORKING}."
    )


IMAGENET = "imagenet"


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


class FusionNet(Network):
    """The published network, or one of other branches; see the module's description."""

    def __init__(self, shape: NetShape) -> None:
        try:
            super().__init__(asdict(shape))
        except (StopIteration, IndexError) as error:
            why = "it has no convolution, or its head is no linear layer"
            raise _unfit(shape.backbone, why) from error
        self.shape = shape


def build_net(
    shape: NetShape, weights: str | Path | None = None, seed: int = 0, crop_size: int | None = None
) -> FusionNet:
    """A new network on the CPU, in training mode; the same seed gives the same numbers.

    ``weights`` start the branches that look at crops: ``None`` (random), ``"imagenet"`` (fetched
    through torchvision or timm and kept in a cache) or the path of a state dict of the network
    of that backbone (``.pth`` or ``.safetensors``). With ``crop_size``, in pixels, it is tried
    whether the backbone takes such crops.
    """
    if weights is not None and not shape.pictures:
        raise UserInputError(
            "A network that looks at no images has nothing to start from weights; leave them at "
            "'none'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FusionNet(shape)
    branches: dict[str, Any] = {
        name: net.get_submodule(f"{name}_branch") for name in shape.pictures
    }
    for name, branch in branches.items():
        if crop_size is not None:
            check_crop_size(branch, shape.pictures[name], crop_size)
    if weights is not None:
        if weights == IMAGENET:
            state = imagenet_state(shape.backbone)
        else:
            state = read_state(Path(weights), owner_of(shape.backbone))
        for branch in branches.values():
            start_from(branch, state)
    return net
