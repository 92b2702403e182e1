"""Backbones of torchvision by name, and the channel branch that looks through one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from cellstore.errors import UnknownNameError, UserInputError
from cellstore.learn.exported_classifier import ImageBranch
from cellstore.learn.networks import NetShape, build_net, start_from

FAMILIES = (
    ("resnet18", 512),
    ("mobilenet_v3_small", 1024),
    ("shufflenet_v2_x0_5", 1024),
    ("regnet_y_400mf", 440),
    ("convnext_tiny", 768),
    ("densenet121", 1024),
)
"""One of each kind, and the inputs of its head as torchvision documents them."""


@pytest.mark.parametrize(("name", "width"), FAMILIES)
def test_a_backbone_is_torchvisions_network_without_its_head(name: str, width: int) -> None:
    torch.manual_seed(0)
    branch = ImageBranch(3, name).eval()
    whole = models.get_model(name, weights=None).eval()
    start_from(branch, whole.state_dict())
    head = [layer for layer in whole.modules() if isinstance(layer, nn.Linear)][-1]
    crops = torch.rand((2, 3, 32, 32))
    with torch.no_grad():
        seen = branch(crops)
        torch.testing.assert_close(head(seen), whole(crops))
    assert seen.shape == (2, width) == (2, branch.width)


def test_further_channels_start_from_the_mean_of_the_three() -> None:
    whole = models.resnet18(weights=None)
    branch = ImageBranch(5, "resnet18")
    start_from(branch, whole.state_dict())
    stem = whole.conv1.weight
    assert torch.equal(branch[0].conv1.weight[:, :3], stem)
    torch.testing.assert_close(branch[0].conv1.weight[:, 4], stem.mean(dim=1))


def test_older_weight_files_of_torchvision_are_read() -> None:
    """They lack a counter, and those of DenseNets have dots in the names of layers."""
    whole = models.densenet121(weights=None)
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for name, value in whole.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    branch = ImageBranch(3, "densenet121")
    start_from(branch, old)
    layer = branch[0].features.denseblock1.denselayer1
    assert torch.equal(layer.conv2.weight, whole.features.denseblock1.denselayer1.conv2.weight)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mnasnet0_5", "safetensors"),
        ("squeezenet1_0", "its head is no linear layer"),
        ("vit_b_32", "takes no crops of 64 pixels: Wrong image height"),
        ("googlenet", "more than one embedding"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused_with_those_that_can(name: str, why: str) -> None:
    with pytest.raises(UserInputError, match=f"{why}.*These can: efficientnet_b0"):
        build_net(NetShape(2, 2, backbone=name), crop_size=64)


def test_unknown_backbones_and_weights_of_another_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown backbone 'resnet19'.*resnet18"):
        NetShape(2, 2, backbone="resnet19")
    path = tmp_path / "weights.pth"
    torch.save(models.shufflenet_v2_x0_5(weights=None).state_dict(), path)
    with pytest.raises(UserInputError, match="not the weights of torchvision's resnet18"):
        build_net(NetShape(2, 2, backbone="resnet18"), path)


def test_a_network_may_look_at_channels_of_the_image() -> None:
    shape = NetShape(
        3, 2, backbone="resnet18", branches=("mask", "image", "tabular"), plane_channels=2
    )
    net = build_net(shape, crop_size=32)
    assert net.projection[0].in_features == 512 + 512 + 32
    assert net.image_branch[0].conv1.weight.shape == (64, 2, 7, 7)
    crops = {"mask": torch.rand((2, 4, 32, 32)), "image": torch.rand((2, 2, 32, 32))}
    assert net(crops, torch.rand((2, 2))).shape == (2, 3)
    with pytest.raises(UserInputError, match="1 or more"):
        NetShape(3, 2, branches=("image",))
