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
from zipfile import is_zipfile

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.func import functional_call
from torchvision import models

from ..errors import UnknownNameError, UserInputError, first_line
from ..io.uris import plain_file
from ..settings import need
from .branches import ALL_BRANCHES, BRANCHES, IMAGE, TABULAR
from .exported_classifier import TIMM, ImageBranch, Network

EFFICIENTNET_B0 = "efficientnet_b0"
"""What the published network has."""

WORKING = (
    "efficientnet_b0 to _b7, efficientnet_v2_s, resnet18 to 152, resnext, wide_resnet, "
    "mobilenet_v2 and _v3, convnext, densenet, shufflenet_v2, regnet, swin, vgg; and most of timm, "
    "for example timm:resnet18, timm:convnext_atto, timm:vit_small_patch16_224"
)
"""The families that take crops of 64 pixels, tried with torchvision 0.29 and timm 1.0.31."""

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
    """Refuse a name that torchvision or timm does not have, or a network that cannot be used here.

    Raises:
        UnknownNameError, UserInputError
        MissingExtraError: timm is not installed.
    """
    if name.startswith(TIMM):
        check_timm_name(name.removeprefix(TIMM))
        return
    if name not in backbones():
        raise UnknownNameError.of("backbone", name, backbones())
    for family, why in _UNFIT.items():
        if name.startswith(family):
            raise _unfit(name, why)


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not have: that of a network, or with the tag of its weights.

    Raises:
        UnknownNameError
        MissingExtraError: timm is not installed.
    """
    need("embed")
    import timm

    network, _, tag = name.partition(".")
    if not timm.is_model(network):
        raise UnknownNameError.of("network of timm", network, timm.list_models())
    tags = [item.partition(".")[2] for item in timm.list_pretrained(f"{network}.*")]
    if tag and tag not in tags:
        raise UnknownNameError.of(f"weights of timm's {network}", tag, tags)


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


def owner_of(backbone: str) -> str:
    """Return whose network it is, for a sentence: ``torchvision's resnet18``."""
    name = backbone.removeprefix(TIMM)
    return f"timm's {name}" if backbone.startswith(TIMM) else f"torchvision's {name}"


def imagenet_state(backbone: str) -> State:
    """The best ImageNet weights that torchvision knows of a backbone, fetched and kept by it.

    Of a backbone of timm: its pretrained weights, those of the tag where the name has one, fetched
    through the Hugging Face hub and kept in its cache. Raises ``UserInputError`` if they cannot be
    fetched.
    """
    if backbone.startswith(TIMM):
        from .embedders import timm_weights

        return read_state(timm_weights(backbone.removeprefix(TIMM))[0], owner_of(backbone))
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


def read_state(path: Path, owner: str) -> State:
    """The state dict in a file, ``.pth`` or ``.safetensors``; no code in it is run.

    ``owner``: whose it should be, for a sentence. Raises ``UserInputError`` if there is none.
    """
    try:
        plain_file(path)
        # Some publish what torch has written under the name of the other format.
        if path.suffix == ".safetensors" and not is_zipfile(path):
            return load_tensors(path.read_bytes())
        with path.open("rb") as file:  # by its bytes, not by its name
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state["state_dict"] if set(state) == {"state_dict"} else state
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file of weights {path}; check the path.") from error
    except Exception as error:  # torch raises errors of many kinds for a file that is no state
        raise UserInputError(
            f"{path} cannot be read as weights ({first_line(error)}). Give a state dict of "
            f"{owner}, as .pth or .safetensors."
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
    through torchvision or timm and kept in a cache) or the path of a state dict of the network
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
            state = read_state(Path(weights), owner_of(shape.backbone))
        for branch in branches.values():
            start_from(branch, state)
    return net
