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
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.func import functional_call
from torchvision import models

from ..errors import UnknownNameError, UserInputError, first_line
from ..io.uris import plain_file
from .branches import ALL_BRANCHES, BRANCHES, IMAGE, TABULAR
from .exported_classifier import ImageBranch, Network

EFFICIENTNET_B0 = "efficientnet_b0"
"""What the published network has."""

WORKING = (
    "efficientnet_b0 to _b7, efficientnet_v2_s, resnet18 to 152, resnext, wide_resnet, "
    "mobilenet_v2 and _v3, convnext, densenet, shufflenet_v2, regnet, swin, vgg"
)
"""The families that take crops of 64 pixels, tried with torchvision 0.29."""

State = Mapping[str, Tensor]

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
    """Refuse a name that torchvision does not have, or a network that cannot be used here.

    Raises:
        UnknownNameError, UserInputError
    """
    if name not in backbones():
        raise UnknownNameError.of("backbone", name, backbones())
    for family, why in _UNFIT.items():
        if name.startswith(family):
            raise _unfit(name, why)


def start_from(branch: ImageBranch, state: State) -> None:
    """Take over the weights of a torchvision network; ``state`` is its state dict.

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
            f"These are not the weights of torchvision's {branch.backbone} "
            f"({first_line(error)}). Give a state dict of that network."
        ) from error


def check_crop_size(branch: ImageBranch, channels: int, size: int) -> None:
    """Raise ``UserInputError`` if ``branch`` cannot take crops of ``size`` pixels.

    Nothing is computed: shapes alone go through the network.
    """
    tensors = {name: value.to("meta") for name, value in branch.state_dict().items()}
    crops = torch.empty((2, channels, size, size), device="meta")
    try:
        functional_call(branch, tensors, (crops,))
    except (RuntimeError, AssertionError, ValueError) as error:
        why = f"it takes no crops of {size} pixels: {first_line(error).rstrip('.')}"
        raise _unfit(branch.backbone, why) from error


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
    """The published network, or one of other branches; see the module's description.

    Raises ``UserInputError`` for a backbone whose first convolution or head cannot be replaced.
    """

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
            state = read_state(Path(weights), shape.backbone)
        for branch in branches.values():
            start_from(branch, state)
    return net
