"""The network against one put together from torch alone, and its weights."""

import dataclasses
import pickle
import urllib.error
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from training_loop import fit

from cellstore.config import TrainParams
from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.learn.augmentation import seed_of
from cellstore.learn.branches import BRANCHES
from cellstore.learn.crops import CellBlock
from cellstore.learn.exported_classifier import ImageBranch
from cellstore.learn.networks import FusionNet, NetShape, build_net
from cellstore.learn.pretrained import read_state
from cellstore.learn.training import TrainingState

SHAPE = NetShape(n_classes=3, n_features=14)


@pytest.fixture(scope="module")
def net() -> FusionNet:
    return build_net(SHAPE, seed=1)


@pytest.fixture(scope="module")
def imagenet_like() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return torchvision.models.efficientnet_b0(weights=None).state_dict()


def inputs(n: int = 3, size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand((n, 4, size, size), generator=generator),
        torch.rand((n, 4, size, size), generator=generator),
        torch.rand((n, SHAPE.n_features), generator=generator),
    )


def plain_branch(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-B0 as published by torchvision, but for 4 channels, up to the pooled map."""
    whole = torchvision.models.efficientnet_b0(weights=None)
    whole.features[0][0] = nn.Conv2d(4, 32, kernel_size=3, stride=2, padding=1, bias=False)
    whole.features.load_state_dict(state)
    return whole.eval().features(x).mean(dim=(2, 3))


def part(net: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    state = net.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_forward_is_the_published_chain_of_layers(net: FusionNet) -> None:
    masks, flows, features = inputs()
    net.eval()
    with torch.no_grad():
        w = net.state_dict()
        hidden = torch.relu(features @ w["tabular_branch.0.weight"].T + w["tabular_branch.0.bias"])
        tabular = nn.functional.batch_norm(
            hidden,
            w["tabular_branch.2.running_mean"],
            w["tabular_branch.2.running_var"],
            w["tabular_branch.2.weight"],
            w["tabular_branch.2.bias"],
        )
        fused = torch.cat(
            [
                plain_branch(part(net, "mask_branch.0."), masks),
                plain_branch(part(net, "flow_branch.0."), flows),
                tabular,
            ],
            dim=1,
        )
        gate = torch.relu(fused @ w["attention.0.weight"].T + w["attention.0.bias"])
        gate = torch.sigmoid(gate @ w["attention.2.weight"].T + w["attention.2.bias"])
        seen = torch.relu((fused * gate) @ w["projection.0.weight"].T + w["projection.0.bias"])
        expected = seen @ w["classifier.weight"].T + w["classifier.bias"]
        torch.testing.assert_close(
            net({"mask": masks, "flow": flows}, features), expected, rtol=1e-4, atol=1e-4
        )


class Plain(nn.Module):
    """The network of the study as the table in DESIGN describes it, from torch and torchvision."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.mask, self.flow = self.branch(), self.branch()
        self.tabular = nn.Sequential(
            nn.Linear(features, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(0.5)
        )
        width = 1280 + 1280 + 32
        self.squeeze, self.excite = nn.Linear(width, 256), nn.Linear(256, width)
        self.project, self.classify = nn.Linear(width, 256), nn.Linear(256, classes)

    @staticmethod
    def branch() -> nn.Module:
        whole = torchvision.models.efficientnet_b0(weights=None)
        whole.features[0][0] = nn.Conv2d(4, 32, kernel_size=3, stride=2, padding=1, bias=False)
        return whole.features

    def forward(self, masks: torch.Tensor, flows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen = [self.mask(masks).mean((2, 3)), self.flow(flows).mean((2, 3)), self.tabular(x)]
        fused = torch.cat(seen, dim=1)
        attention = torch.sigmoid(self.excite(torch.relu(self.squeeze(fused))))
        return self.classify(torch.relu(self.project(fused * attention)))


OURS = {
    "mask_branch.0.": "mask.",
    "flow_branch.0.": "flow.",
    "tabular_branch.": "tabular.",
    "attention.0.": "squeeze.",
    "attention.2.": "excite.",
    "projection.0.": "project.",
    "classifier.": "classify.",
}


def plainly(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a network of ours by the names of :class:`Plain`."""
    return {
        theirs + name.removeprefix(ours): value
        for name, value in state.items()
        for ours, theirs in OURS.items()
        if name.startswith(ours)
    }


@pytest.mark.heavy
def test_shapes_and_a_step_of_the_whole_are_those_of_the_published_network() -> None:
    """Adam of rate and decay 1e-4 on cross-entropy with smoothed labels, as published."""
    ours = build_net(SHAPE, seed=3)
    theirs = Plain(SHAPE.n_classes, SHAPE.n_features)
    assert {name: value.shape for name, value in plainly(ours.state_dict()).items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(plainly(ours.state_dict()))
    masks, flows, features = inputs(6)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    batch = CellBlock({"mask": masks, "flow": flows}, features, labels, labels)
    before = {name: value.clone() for name, value in theirs.named_parameters()}

    params = TrainParams.of("published")
    once = dataclasses.replace(params, epochs=1, batch_size=6)
    fit(ours, lambda _: [batch], lambda _: [batch], once)

    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4, weight_decay=1e-4)
    with torch.random.fork_rng():  # the same drop-outs
        torch.manual_seed(seed_of(params.seed, 0, 0))
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(theirs(masks, flows, features), labels)
    loss.backward()
    optimizer.step()
    after = plainly(dict(ours.named_parameters()))
    moved = 0
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-6, msg=name)
        moved += int((value - before[name]).abs().max() > 5e-5)
    assert moved > 0.9 * len(before)


def test_shapes_of_the_published_parts(net: FusionNet) -> None:
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    assert shapes["mask_branch.0.0.0.weight"] == (32, 4, 3, 3)
    assert shapes["flow_branch.0.0.0.weight"] == (32, 4, 3, 3)
    assert shapes["tabular_branch.0.weight"] == (32, 14)
    assert shapes["attention.2.bias"] == (1280 + 1280 + 32,)
    assert shapes["classifier.weight"] == (3, SHAPE.projection_width)
    kinds = [type(layer) for layer in net.tabular_branch]
    assert kinds == [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout]
    # 4,007,548 parameters of EfficientNet-B0 without its classifier (5,288,548 - 1,281,000),
    # and 32 * 9 more for the fourth channel.
    assert sum(p.numel() for p in ImageBranch(4, "efficientnet_b0").parameters()) == 4_007_548 + 288


def test_same_seed_same_network_and_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = build_net(SHAPE, seed=1), build_net(SHAPE, seed=2)
    assert torch.equal(torch.rand(2), expected)
    again = build_net(SHAPE, seed=1)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


@pytest.mark.parametrize(
    ("branches", "width"),
    [
        (("tabular",), 32),
        (("mask", "tabular"), 1280 + 32),
        (("flow",), 1280),
        (("mask", "flow"), 2 * 1280),
    ],
)
def test_a_network_of_fewer_branches_has_them_only(branches: tuple[str, ...], width: int) -> None:
    net = build_net(dataclasses.replace(SHAPE, branches=branches, dropout=0.0), seed=1)
    parts = {name.split("_branch")[0] for name in net.state_dict() if "_branch" in name}
    assert parts == set(branches)
    assert net.attention[2].out_features == net.projection[0].in_features == width
    everything = dict(zip(BRANCHES, inputs(), strict=True))
    given = {name: everything[name] for name in branches}

    def say(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return net(inputs, inputs.get("tabular", torch.empty((3, 0))))

    with torch.no_grad():
        scores = say(given)
        for name in branches:  # while training: batch normalisation shows what there is to see
            others = say({**given, name: given[name] ** 3})
            assert not torch.equal(scores, others), name
    assert scores.shape == (3, 3)


def test_branches_are_named_and_ordered() -> None:
    assert NetShape(2, 2).branches == BRANCHES == ("mask", "flow", "tabular")
    params = TrainParams(branches=("tabular", "mask", "mask"), augment=("rotations", "flips"))
    assert (params.branches, params.augment) == (("mask", "tabular"), ("flips", "rotations"))
    for wrong in ((), ("tabular", "mask"), ("mask", "mask")):
        with pytest.raises(UserInputError):
            NetShape(2, 2, branches=wrong)
    with pytest.raises(UserInputError, match="1 or more"):
        NetShape(2, 0)
    assert NetShape(2, 0, branches=("mask",)).n_features == 0


def test_a_network_without_pictures_starts_from_chance(
    tmp_path: Path, imagenet_like: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(imagenet_like, path)
    shape = dataclasses.replace(SHAPE, branches=("tabular",))
    with pytest.raises(UserInputError, match="leave them at 'none'"):
        build_net(shape, path)
    net = build_net(dataclasses.replace(SHAPE, branches=("flow", "tabular")), path)
    last = imagenet_like["features.8.0.weight"]
    assert torch.equal(net.get_submodule("flow_branch.0")[8][0].weight, last)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file_start_both_branches(
    tmp_path: Path, imagenet_like: dict[str, torch.Tensor], suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(imagenet_like, path)
    net = build_net(SHAPE, path)
    stem = imagenet_like["features.0.0.weight"]
    for branch in (net.mask_branch, net.flow_branch):
        assert torch.equal(branch[0][0][0].weight[:, :3], stem)
        torch.testing.assert_close(branch[0][0][0].weight[:, 3], stem.mean(dim=1))
        last = imagenet_like["features.8.0.weight"]
        assert torch.equal(branch[0][8][0].weight, last)


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def safetensors(header: bytes) -> bytes:
    """A file of one number with such a header."""
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,  # a header longer than any file
        safetensors(b"{"),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}'),
        safetensors(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'),
        safetensors(b'{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}}'),
        safetensors(b'{"__metadata__":7}'),
        safetensors(b"[" * 100_000),
    ],
)
def test_a_damaged_header_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserInputError, match=r"weights.safetensors cannot be read as weights"):
        read_state(path, "efficientnet_b0")
    with pytest.raises(StorageError, match="The state of a training is damaged"):
        TrainingState.from_bytes(data)


@pytest.mark.parametrize("what", ["pickle", "noise", "list", "other network", "nothing"])
def test_a_file_that_is_no_weights_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "weights.pth"
    if what == "pickle":
        path.write_bytes(pickle.dumps({"features.0.0.weight": Boom()}))
    elif what == "noise":
        path.write_bytes(b"\x00not weights" * 50)
    elif what == "list":
        torch.save([1, 2], path)
    elif what == "other network":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(UserInputError, match=r"weights|state dict"):
        build_net(SHAPE, path)


def test_imagenet_weights_out_of_reach_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserInputError, match=r"no route.*Download https://\S+\.pth .*path"):
        build_net(SHAPE, "imagenet")


def test_imagenet_weights_are_those_of_torchvision(
    monkeypatch: pytest.MonkeyPatch, imagenet_like: dict[str, torch.Tensor]
) -> None:
    asked: list[str] = []

    def fetch(url: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return imagenet_like

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    net = build_net(SHAPE, "imagenet")
    assert asked == [torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.url]
    assert torch.equal(net.flow_branch[0][0][0].weight[:, :3], imagenet_like["features.0.0.weight"])


def test_a_shape_is_of_a_known_backbone_and_has_classes() -> None:
    with pytest.raises(UnknownNameError, match="Known: efficientnet_b7"):
        NetShape(2, 2, backbone="efficientnet_b9")
    with pytest.raises(UserInputError, match="1 or more"):
        NetShape(0, 2)
