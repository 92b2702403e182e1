"""Crops against a slow and plain one, on the way of a CPU and on that of an accelerator."""

import numpy as np
import pytest
import torch
from skimage.segmentation import find_boundaries
from torchvision.transforms.v2.functional import resize

from cellstore.errors import ImageError
from cellstore.learn import crops as crops_module
from cellstore.learn.crops import CellCrops, Pictures, cut_crops, image_scale, resized


def image() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of three cells, two of them touching; random flows and intensities."""
    rng = np.random.default_rng(0)
    masks = np.zeros((30, 40), dtype=np.uint16)
    masks[2:12, 3:10] = 4
    masks[5:14, 10:25] = 9
    masks[20:30, 30:40] = 2
    flows = rng.integers(0, 256, (30, 40, 4), dtype=np.uint8)
    return masks, flows, rng.integers(0, 5000, (30, 40), dtype=np.uint16)


LABELS = np.array([4, 9, 2])
BOXES = np.array([[2, 3, 12, 10], [4, 9, 15, 26], [20, 30, 30, 40]])


def cell_crops(masks, flows, projection, boxes, labels, size) -> dict[str, torch.Tensor]:
    return resized(cut(Pictures(masks, flows, projection), boxes, labels), size)


def cut(pictures: Pictures, boxes: np.ndarray, labels: np.ndarray) -> CellCrops:
    sizes, layers = cut_crops(pictures, boxes, labels)
    ids = np.arange(len(sizes))
    return CellCrops(sizes, layers, np.empty((len(ids), 0), np.float32), ids, ids)


def naive(masks, flows, projection, box, label, size) -> torch.Tensor:
    """The eight channels of one cell, in whole-image arrays and torchvision's Resize."""
    own = masks == label
    outline = find_boundaries(masks, connectivity=1, mode="inner") & own
    scaled = np.minimum(projection / np.percentile(projection, 99.9), 1)
    layers = [own, outline, (masks > 0) & (masks != label), scaled * own]
    whole = np.stack([*layers, *np.moveaxis(flows / 255, 2, 0)]).astype(np.float32)
    crop = torch.from_numpy(whole[:, box[0] : box[2], box[1] : box[3]])
    return (resize(crop, [size, size], antialias=True) - 0.5) / 0.5


@pytest.mark.parametrize("size", [4, 10, 32])
def test_crops_are_those_of_a_plain_crop_and_resize(size: int) -> None:
    crops = cell_crops(*image(), BOXES, LABELS, size)
    mask_crops, flow_crops = crops["mask"], crops["flow"]
    assert mask_crops.shape == flow_crops.shape == (3, 4, size, size)
    assert mask_crops.dtype == torch.float32
    for position, (box, label) in enumerate(zip(BOXES, LABELS, strict=True)):
        expected = naive(*image(), box, label, size)
        ours = torch.cat([mask_crops[position], flow_crops[position]])
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def packed(**more) -> CellCrops:
    masks, flows, projection = image()
    return cut(Pictures(masks, flows, projection, **more), BOXES, LABELS)


@pytest.mark.parametrize("size", [4, 10, 32, 120])
def test_an_accelerator_makes_the_same_crops(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops_module, "PADDED_AT_ONCE", 8 * 2 * 10 * 17)  # two cells at once
    in_turn = resized(packed(), size)
    at_once = crops_module.resized_at_once(packed(), size, "cpu")
    assert in_turn.keys() == at_once.keys() == {"mask", "flow"}
    for name, crops in in_turn.items():
        torch.testing.assert_close(at_once[name], crops, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(1, 5), (7, 224), (76, 64), (300, 64), (90, 224)])
def test_weights_are_those_of_torch(old: int, new: int) -> None:
    pixels = torch.eye(old)[None, None]
    expected = torch.nn.functional.interpolate(
        pixels, size=(new, old), mode="bilinear", antialias=True
    )
    weights = crops_module.resize_weights(torch.tensor([old]), old, new)[0]
    torch.testing.assert_close(weights, expected[0, 0], atol=1e-6, rtol=0)


def test_many_crops_are_resized_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resized(packed(), 10)
    monkeypatch.setattr(crops_module, "PIXELS_AT_ONCE", 200)
    for name, crops in resized(packed(), 10).items():
        assert torch.equal(crops, expected[name])


def test_crops_can_be_gathered() -> None:
    all_of_them = packed()
    index = np.array([2, 0, 2])
    parts = [index[:1], index[:0], index[1:]]
    again = CellCrops.gather([(all_of_them, part) for part in parts])
    for name, crops in resized(again, 10).items():
        assert torch.equal(crops, resized(all_of_them, 10)[name][index])
    assert again.nbytes == (100 + 70 + 100) * (1 + 4 + 4) + 3 * (8 + 8)


def test_channels_of_the_image_are_not_masked() -> None:
    light = np.full((30, 40), 100), np.full((30, 40), 30)
    crops = resized(packed(channels=light, intensity_scale=(1.0, 400.0, 10.0)), 8)
    expected = torch.tensor([2 * 100 / 400 - 1, 1.0])  # brighter than white is white
    torch.testing.assert_close(
        crops["image"], expected[None, :, None, None].expand(3, 2, 8, 8), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ["noise", "flat", "two hot pixels", "few pixels"])
def test_the_intensity_scale_is_the_percentile_of_numpy(kind: str) -> None:
    rng = np.random.default_rng(1)
    light = {
        "noise": rng.normal(300, 50, (200, 300)).astype(np.float32),
        "flat": np.full((200, 300), 7, np.uint16),
        "two hot pixels": (np.arange(60_000) == 61).reshape(200, 300) * 9.0,
        "few pixels": rng.random((2, 3)),
    }[kind]
    expected = np.percentile(light, 99.9) or light.max()
    assert image_scale(light) == pytest.approx(expected, rel=1e-6)


def test_without_flows_there_are_mask_crops_only() -> None:
    masks, flows, projection = image()
    alone = cell_crops(masks, None, projection, BOXES, LABELS, 10)
    both = cell_crops(masks, flows, projection, BOXES, LABELS, 10)
    torch.testing.assert_close(alone["mask"], both["mask"])
    assert alone.keys() == {"mask"}
    with pytest.raises(ImageError, match="do not fit"):
        cell_crops(masks, None, projection[:-1], BOXES, LABELS, 10)


def test_channels_of_a_drawn_cell() -> None:
    masks = np.array([[0, 0, 0, 0], [0, 5, 5, 5], [0, 5, 5, 5], [0, 5, 5, 5]])
    masks[0, 3] = 6
    projection = np.full((4, 4), 200)
    flows = np.full((4, 4, 4), 255, dtype=np.uint8)
    crops = cell_crops(masks, flows, projection, [[0, 0, 4, 4]], [5], size=4)
    own, outline, others, intensity = ((crops["mask"][0] + 1) / 2).round().int().tolist()
    assert own == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    # The rim of the image is no outline; the touching cell in the corner makes one.
    assert outline == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert others == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert intensity == own
    assert (crops["flow"] == 1).all()


def test_intensity_is_relative_to_the_image_and_cut() -> None:
    masks, flows, projection = image()
    projection[25, 35] = 6000
    first = cell_crops(masks, flows, projection, BOXES, LABELS, 8)["mask"]
    second = cell_crops(masks, flows, projection * 7.5, BOXES, LABELS, 8)["mask"]
    torch.testing.assert_close(first, second)
    whole = cell_crops(masks, flows, projection, BOXES[2:], LABELS[2:], 10)["mask"]
    # Brighter than the 99.9th percentile, the only pixel of the image that is.
    assert whole[0, 3].max() == whole[0, 3, 5, 5] == 1


def test_a_black_image_has_no_intensity() -> None:
    masks, flows, projection = image()
    crops = cell_crops(masks, flows, projection * 0, BOXES, LABELS, 8)
    torch.testing.assert_close(crops["mask"][:, 3], torch.full((3, 8, 8), -1.0), atol=1e-6, rtol=0)


def test_no_cell_gives_no_crop() -> None:
    empty = np.empty((0, 4), dtype=np.int64), np.empty(0, dtype=np.int64)
    crops = cell_crops(*image(), *empty, 16)
    assert crops["mask"].shape == crops["flow"].shape == (0, 4, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES + 15}, "out of the image"),
        ({"boxes": BOXES[:, [2, 3, 0, 1]]}, "empty"),
        ({"labels": np.array([4, 9, 3])}, "Cell 3 is not in its box"),
        ({"flows": np.zeros((30, 40, 3), np.uint8)}, "do not fit"),
        ({"flows": np.zeros((30, 40, 4))}, "uint8"),
        ({"projection": np.zeros((30, 41))}, "do not fit"),
        ({"projection": np.full((30, 40), np.inf)}, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    masks, flows, projection = image()
    usual = {"masks": masks, "flows": flows, "projection": projection}
    with pytest.raises(ImageError, match=message):
        cell_crops(**{**usual, "boxes": BOXES, "labels": LABELS, **change}, size=8)
