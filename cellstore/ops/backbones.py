"""The part of a network that looks at pictures: any classifier of torchvision, without its head.

A backbone is named as torchvision names it. Its first convolution is replaced by one of as many
channels as the crops have, and its last linear layer is left out; what is then said about a crop
is its embedding. Transformers of one fixed picture size take crops of that size only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models

from cellstore.errors import UnknownNameError, UserInputError, first_line

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
        whole = models.get_model(backbone, weights=None, **_options(backbone))
        stem, head = _stem(whole, backbone), _head(whole, backbone)
        self.width = int(whole.get_submodule(head).in_features)
        whole.set_submodule(stem, _of_channels(whole.get_submodule(stem), channels))
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
            given[stem] = _fit_channels(given[stem], channels)
            counts = {f"{prefix}{name}": inner[name] for name in inner if name.endswith(_COUNT)}
            body = {**counts, **given}
            self[0].load_state_dict({name: body[f"{prefix}{name}"] for name in inner})
        except (KeyError, RuntimeError, IndexError) as error:
            raise UserInputError(
                f"These are not the weights of torchvision's {self.backbone} "
                f"({first_line(error)}). Give a state dict of that network."
            ) from error


def _options(backbone: str) -> dict[str, Any]:
    # Said, so that torchvision does not warn that its default will change.
    return {"init_weights": True} if backbone in ("googlenet", "inception_v3") else {}


def _stem(whole: nn.Module, backbone: str) -> str:
    found = [name for name, layer in whole.named_modules() if isinstance(layer, nn.Conv2d)]
    if not found:
        raise _unfit(backbone, "it has no convolution")
    return str(found[0])


def _head(whole: nn.Module, backbone: str) -> str:
    linear = [name for name, layer in whole.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise _unfit(backbone, "its head is no linear layer")
    return str(linear[-1])


def _of_channels(stem: nn.Module, channels: int) -> nn.Conv2d:
    assert isinstance(stem, nn.Conv2d)
    made = nn.Conv2d(
        channels,
        stem.out_channels,
        kernel_size=stem.kernel_size,  # type: ignore[arg-type]
        stride=stem.stride,  # type: ignore[arg-type]
        padding=stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    nn.init.kaiming_normal_(made.weight, mode="fan_out")
    return made


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


def _fit_channels(stem: Tensor, channels: int) -> Tensor:
    mean = stem.mean(dim=1, keepdim=True)
    return torch.cat([stem, *[mean] * channels], dim=1)[:, :channels]


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
