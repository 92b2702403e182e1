"""The two files of a checkpoint: what comes back of them, and what is refused."""

import dataclasses
import json

import pytest
import torch

from cellstore.errors import StorageError, UserInputError
from cellstore.learn.networks import FusionNet, NetShape, build_net
from cellstore.learn.normalising import Scaler
from cellstore.learn.trained_models import NETWORK, ModelRecord, load_model, save_net

SHAPE = NetShape(n_classes=3, n_features=14)


@pytest.fixture(scope="module")
def net() -> FusionNet:
    return build_net(SHAPE, seed=1)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 32, 32), (2, 4, 32, 32), (2, 14)]
    masks, flows, features = (torch.rand(shape, generator=generator) for shape in shapes)
    return masks, flows, features


def meta(**changes) -> ModelRecord:
    usual = ModelRecord(
        NETWORK,
        shape=SHAPE,
        labels=("DMSO", "a", "b"),
        field="perturbation",
        scaler=Scaler(tuple(f"f{i}" for i in range(14)), (1.5,) * 14, (2.0,) * 14),
        crop_size=32,
        fingerprints={"split": "abc", "train": "def"},
    )
    return dataclasses.replace(usual, **changes)


def test_a_checkpoint_comes_back_whole(net: FusionNet) -> None:
    record = json.loads(json.dumps(meta().to_json()))
    model, read = load_model(save_net(net.state_dict()), record)
    assert read == meta()
    again = model
    assert not again.training
    with torch.no_grad():
        masks, flows, features = inputs()
        crops = {"mask": masks, "flow": flows}
        assert torch.equal(again(crops, features), net.eval()(crops, features))


def test_a_full_gpu_is_not_called_a_damaged_checkpoint(
    net: FusionNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(FusionNet, "to", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        load_model(save_net(net.state_dict()), meta().to_json(), "cuda")


def test_a_checkpoint_that_does_not_fit_is_refused(net: FusionNet) -> None:
    tensors, record = save_net(net.state_dict()), meta().to_json()
    other = meta(shape=dataclasses.replace(SHAPE, projection_width=8)).to_json()
    for damaged in (b"", tensors[:-10], b"\xff" * 100, tensors[:4] + b"\xff" * 8 + tensors[12:]):
        with pytest.raises(StorageError, match="damaged"):
            load_model(damaged, record)
    with pytest.raises(StorageError, match="of another model"):
        load_model(tensors, other)


@pytest.mark.parametrize("key", ["shape", "labels", "field", "scaler", "crop", "fingerprints"])
def test_a_damaged_record_is_refused(key: str) -> None:
    record = meta().to_json()
    whole = record.pop(key)
    with pytest.raises(UserInputError):
        ModelRecord.from_json(record)
    if not isinstance(whole, str):
        with pytest.raises(UserInputError):
            ModelRecord.from_json({**record, key: 7})


def test_labels_and_features_must_fit_the_network() -> None:
    for wrong in (
        {"labels": ("a", "b")},
        {"labels": ("a", "b", "b")},
        {"scaler": Scaler(("x",), (0.0,), (1.0,))},
    ):
        with pytest.raises(UserInputError, match="3 classes and 14 features"):
            ModelRecord.from_json(meta(**wrong).to_json())
    shape = dataclasses.asdict(SHAPE)
    for odd in ({}, {"n_classes": 3}, shape | {"n_classes": "3"}, shape | {"color": 1}):
        with pytest.raises(UserInputError, match="does not describe"):
            ModelRecord.from_json(meta().to_json() | {"shape": odd})
