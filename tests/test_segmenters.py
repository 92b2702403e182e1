"""Segmenters: batches of images, memory that runs out, two planes, generations of Cellpose."""

import numpy as np
import pytest

from cellstore.analysis import segmentation
from cellstore.analysis.segmentation import (
    TILES,
    Batches,
    ModelFiles,
    find_model,
    load_segmenter,
)
from cellstore.errors import ImageError, UserInputError

torch = pytest.importorskip("torch")
pytest.importorskip("cellpose.resnet_torch", reason="needs Cellpose 3")

from tiny_network import new_network, save_network  # noqa: E402
from training_fields import render_nuclei  # noqa: E402


class Card:
    """A network on a card that holds so many tiles at once; doubles every item."""

    def __init__(self, room):
        self.room = room
        self.calls = []

    def __call__(self, items, tiles):
        self.calls.append((len(items), tiles))
        if len(items) * tiles > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in items]


# --- how much goes into a call -----------------------------------------------------------------


def test_a_batch_that_fits_is_one_call():
    card = Card(room=1000)
    assert Batches(images=4).run([1, 2, 3, 4, 5], card) == [2, 4, 6, 8, 10]
    assert card.calls == [(4, TILES), (1, TILES)]


@pytest.mark.parametrize("room", [64, 40, 17, 8, 5, 2, 1])
def test_running_out_of_memory_loses_no_image(room):
    batches = Batches(images=8)
    assert batches.run(list(range(20)), Card(room)) == [2 * item for item in range(20)]
    assert batches.images * batches.tiles <= room


def test_images_are_halved_before_tiles_and_the_size_is_kept():
    batches, card = Batches(images=8), Card(room=4)
    batches.run(list(range(9)), card)
    sizes = [(8, 8), (4, 8), (2, 8), (1, 8), (1, 4)]
    assert card.calls == [*sizes, *[(1, 4)] * 8]
    again = Card(room=4)
    batches.run([1, 2], again)
    assert again.calls == [(1, 4), (1, 4)]


def test_a_last_part_that_is_smaller_does_not_shrink_the_batch():
    batches = Batches(images=4)
    batches.run(list(range(5)), Card(room=1000))
    assert batches.images == 4


def test_an_image_that_does_not_fit_alone_fails_and_shrinks_nothing():
    batches, card = Batches(images=4), Card(room=0)
    with pytest.raises(ImageError, match=r"even alone.*--device cpu"):
        batches.run([1], card)
    assert card.calls[-1] == (1, 1)
    assert (batches.images, batches.tiles) == (4, TILES)


def test_another_error_is_not_taken_for_missing_memory():
    def broken(items, tiles):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Batches(images=4).run([1, 2], broken)


# --- images together and alone -----------------------------------------------------------------


@pytest.fixture(scope="module")
def fields():
    rng = np.random.default_rng(5)
    sizes = [((96, 112), 14.0), ((96, 112), 24.0), ((80, 80), 14.0), ((96, 112), 18.0)]
    return [render_nuclei(rng, shape, diameter).image for shape, diameter in sizes]


def alike(one, other):
    np.testing.assert_array_equal(one.masks, other.masks)
    assert one.diameter == pytest.approx(other.diameter)
    # A convolution over several images may round another way: a step of 255 at most.
    assert np.abs(one.flows.astype(int) - other.flows.astype(int)).max() <= 1


@pytest.mark.heavy
@pytest.mark.parametrize("diameter", [None, 17.0])
def test_images_in_one_call_are_segmented_as_each_alone(fields, diameter):
    segmenter = load_segmenter(
        find_model(), diameter=diameter, cellprob_threshold=0.0, device="cpu"
    )
    alone = [segmenter.segment(field) for field in fields]
    segmenter.batches.images = 4
    together = segmenter.segment_batch(fields)
    assert sum(result.masks.max() for result in alone) > 10
    for one, other in zip(alone, together, strict=True):
        alike(one, other)


@pytest.mark.heavy
def test_on_a_cpu_images_go_one_by_one(fields, monkeypatch):
    segmenter = load_segmenter(find_model(), diameter=17.0, device="cpu")
    shapes, evaluate = [], segmenter.model.eval

    def watched(stack, **options):
        shapes.append(stack.shape)
        return evaluate(stack, **options)

    monkeypatch.setattr(segmenter.model, "eval", watched)
    segmenter.segment_batch(fields[:2])
    assert shapes == [(1, 96, 112, 2), (1, 96, 112, 2)]


@pytest.mark.heavy
def test_a_card_that_is_too_small_gives_the_same_cells(fields, monkeypatch):
    segmenter = load_segmenter(find_model(), diameter=17.0, device="cpu")
    expected = segmenter.segment_batch(fields[:2])
    segmenter.batches.images, evaluate = 2, segmenter.model.eval

    def small(stack, batch_size, **options):
        if batch_size > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate(stack, batch_size=batch_size, **options)

    monkeypatch.setattr(segmenter.model, "eval", small)
    for one, other in zip(expected, segmenter.segment_batch(fields[:2]), strict=True):
        alike(one, other)
    assert (segmenter.batches.images, segmenter.batches.tiles) == (1, 4)


def test_no_images_give_no_results():
    assert Batches(images=4).run([], Card(room=0)) == []


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
