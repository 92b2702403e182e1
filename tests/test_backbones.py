"""Backbones of torchvision by name, and the channel branch that looks through one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cellstore.errors import MissingExtraError, UnknownNameError, UserInputError
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


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "resnet10t"])
def test_a_backbone_of_timm_is_its_network_without_the_head(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    shape = NetShape(2, 0, backbone=f"timm:{name}", branches=("mask", "image"), plane_channels=3)
    net = build_net(shape, path, crop_size=64).eval()
    # Of the size that it was trained with, which is the only one that all of them take.
    crops = torch.rand((2, 3, 160, 160))
    with torch.no_grad():
        seen = net.image_branch(crops)
        expected = whole.forward_head(whole.forward_features(crops), pre_logits=True)
        torch.testing.assert_close(seen, expected)
        small = {"mask": torch.rand((2, 4, 64, 64)), "image": torch.rand((2, 3, 64, 64))}
        assert net(small, torch.empty((2, 0))).shape == (2, 2)
    stem = net.mask_branch[0].get_submodule(net.mask_branch.stem)
    first = whole.get_submodule(net.mask_branch.stem).weight
    torch.testing.assert_close(stem.weight[:, 3], first.mean(dim=1))


def test_a_network_that_timm_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match=r"network of timm 'resnet19t'.*resnet"):
        NetShape(2, 2, backbone="timm:resnet19t")
    with pytest.raises(UnknownNameError, match=r"weights of timm's resnet10t 'c9'.*c3_in1k"):
        NetShape(2, 2, backbone="timm:resnet10t.c9")
    with pytest.raises(UserInputError, match=r"takes no crops of 70 pixels.*timm:convnext_atto"):
        build_net(NetShape(2, 2, backbone="timm:test_vit"), crop_size=70)
    # The hub cannot be reached.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserInputError, match=r"timm/test_vit.r160_in1k could not be.*--weights"):
        build_net(NetShape(2, 2, backbone="timm:test_vit"), "imagenet")
    monkeypatch.setattr("cellstore.settings.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cellstore\[embed\]'"):
        NetShape(2, 2, backbone="timm:test_vit")


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
