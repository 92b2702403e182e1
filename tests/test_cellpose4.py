"""Cellpose 4 behind the same interface, where it is the one that is installed."""

import numpy as np
import pytest

from cellstore.analysis.segmentation import (
    ModelFiles,
    find_model,
    installed_generation,
    load_segmenter,
)
from cellstore.errors import UserInputError

if installed_generation() != 4:
    pytest.skip("needs Cellpose 4 (the extra segment-sam)", allow_module_level=True)

torch = pytest.importorskip("torch")
vit = pytest.importorskip("cellpose.vit")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A Cellpose-SAM network of full size with random weights, in half precision on disk."""
    torch.manual_seed(0)
    state = vit.CPSAM().state_dict()
    path = tmp_path_factory.mktemp("network") / "random"
    torch.save({name: value.half() for name, value in state.items()}, path)
    return path


def files_of(network):
    return ModelFiles("mine", network, None, "0" * 64)


@pytest.mark.heavy
def test_a_random_network_is_loaded_and_run(network):
    state = torch.load(network, weights_only=True)
    segmenter = load_segmenter(files_of(network), diameter=30.0, device="cpu")
    loaded = segmenter.model.net.state_dict()["encoder.blocks.3.attn.qkv.weight"]
    assert torch.equal(loaded.half(), state["encoder.blocks.3.attn.qkv.weight"])
    rng = np.random.default_rng(1)
    image = rng.random((64, 72)).astype(np.float32)
    alone, both = (segmenter.segment(x) for x in (image, np.stack([image, image[::-1]])))
    for result in (alone, both):
        assert result.masks.shape == (64, 72)
        assert result.masks.dtype == np.uint16
        assert (result.flows.shape, result.flows.dtype) == ((64, 72, 4), np.uint8)
        assert result.diameter == 30.0
    assert (alone.flows != both.flows).any()


def test_a_network_of_cellpose_3_is_refused(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"output.2.weight": torch.zeros(3)}, path)
    with pytest.raises(UserInputError, match=r"not a Cellpose 4 network.*cellstore\[segment\]"):
        load_segmenter(files_of(path))


def test_a_damaged_network_is_refused(tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(b"not a network")
    with pytest.raises(UserInputError, match="cannot be read as a network"):
        load_segmenter(files_of(path))


def test_the_shipped_network_says_what_it_needs():
    with pytest.raises(UserInputError, match="cellstore-nuclei needs Cellpose 3"):
        find_model()
