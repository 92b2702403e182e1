"""Segmenters: memory that runs out, two planes, generations of Cellpose."""

import numpy as np
import pytest

from cellstore.analysis import segmentation
from cellstore.analysis.segmentation import (
    TILES,
    ModelFiles,
    find_model,
    load_segmenter,
)
from cellstore.errors import ImageError, UserInputError

torch = pytest.importorskip("torch")
pytest.importorskip("cellpose.resnet_torch", reason="needs Cellpose 3")

from tiny_network import new_network, save_network  # noqa: E402
from training_fields import render_nuclei  # noqa: E402


@pytest.fixture(scope="module")
def fields():
    rng = np.random.default_rng(5)
    sizes = [((96, 112), 14.0), ((96, 112), 24.0)]
    return [render_nuclei(rng, shape, diameter).image for shape, diameter in sizes]


# --- a card with little memory -----------------------------------------------------------------


def card(monkeypatch, room):
    """A segmenter on a card that holds so many tiles at once."""
    segmenter = load_segmenter(find_model(), diameter=17.0, device="cpu")
    evaluate = segmenter.model.eval

    def small(stack, batch_size, **options):
        if batch_size > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate(stack, batch_size=batch_size, **options)

    monkeypatch.setattr(segmenter.model, "eval", small)
    return segmenter


@pytest.mark.heavy
def test_a_card_that_is_too_small_gives_the_same_cells(fields, monkeypatch):
    one = card(monkeypatch, 1000).segment(fields[0])
    segmenter = card(monkeypatch, 4)
    other = segmenter.segment(fields[0])
    np.testing.assert_array_equal(one.masks, other.masks)
    # A convolution over several tiles may round another way: a step of 255 at most.
    assert np.abs(one.flows.astype(int) - other.flows.astype(int)).max() <= 1
    assert (one.diameter, segmenter.tiles) == (other.diameter, 4)


@pytest.mark.heavy
def test_an_image_that_does_not_fit_alone_fails_and_shrinks_nothing(fields, monkeypatch):
    segmenter = card(monkeypatch, 0)
    with pytest.raises(ImageError, match=r"even alone.*--device cpu"):
        segmenter.segment(fields[0])
    assert segmenter.tiles == TILES


# --- two planes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "mine.pt"
    save_network(new_network(0), path)
    return load_segmenter(ModelFiles("mine", path, None, "0" * 64), diameter=17.0, device="cpu")


def test_the_second_plane_reaches_the_network(untrained, fields):
    cells, nuclei = fields[0], fields[1]
    alone = untrained.segment(cells)
    empty = untrained.segment(np.stack([cells, np.zeros_like(cells)]))
    both = untrained.segment(np.stack([cells, nuclei]))
    np.testing.assert_array_equal(alone.flows, empty.flows)
    assert (both.flows != alone.flows).any()
    assert both.masks.shape == cells.shape


def test_the_first_plane_is_that_of_the_cells(untrained, fields):
    from cellpose.transforms import convert_image

    cells, nuclei = fields[0], fields[1]
    seen, evaluate = [], untrained.model.eval

    def watched(stack, **options):
        seen.append(convert_image(stack, None, channel_axis=3))
        return evaluate(stack, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrained.model, "eval", watched)
        untrained.segment(np.stack([cells, nuclei]))
    # As Cellpose makes of channels=[1, 2], "first: cytoplasm, second: nucleus".
    expected = convert_image(np.stack([cells, nuclei]), [1, 2], channel_axis=0)
    np.testing.assert_array_equal(np.squeeze(seen[0]), expected)


# --- generations of Cellpose -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "model", "words"),
    [
        (3, "cpsam", r"needs Cellpose 4.*--model cellstore-nuclei.*cellstore\[segment-sam\]"),
        (4, "cellstore-nuclei", r"needs Cellpose 3.*--model cpsam.*cellstore\[segment\]"),
        (4, "cyto3", r"needs Cellpose 3.*--model cpsam"),
    ],
)
def test_a_name_of_the_other_generation_is_refused_before_it_is_fetched(
    monkeypatch, tmp_path, installed, model, words
):
    monkeypatch.setattr(segmentation, "version", lambda _: f"{installed}.9.9")
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(UserInputError, match=words):
        find_model(model)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_size_model_is_found_by_its_one_file(monkeypatch, tmp_path):
    monkeypatch.setattr(segmentation, "version", lambda _: "4.2.1")
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    (tmp_path / "cpsam").write_bytes(b"weights")
    files = find_model("cpsam")
    assert (files.network, files.size_model) == (tmp_path / "cpsam", None)


def test_without_cellpose_every_name_may_be_looked_for(monkeypatch, tmp_path):
    def absent(_):
        raise segmentation.PackageNotFoundError("cellpose")

    monkeypatch.setattr(segmentation, "version", absent)
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    (tmp_path / "cpsam").write_bytes(b"weights")
    assert find_model("cpsam").name == "cpsam"


def test_a_file_of_cellpose_4_says_where_it_can_be_used(tmp_path):
    path = tmp_path / "sam.pt"
    torch.save({"W2": torch.zeros(1)}, path)
    with pytest.raises(UserInputError, match=r"Cellpose 4 network.*cellstore\[segment-sam\]"):
        load_segmenter(ModelFiles("sam", path, None, "0" * 64), diameter=20)
