"""Crops against a slow and plain one, and batches from blocks."""

from itertools import chain

import numpy as np
import pytest
import torch
from skimage.segmentation import find_boundaries
from torchvision.transforms.v2.functional import resize

from cellstore.errors import ImageError, UserInputError
from cellstore.ops.crops import BlockShuffle, CellBlock, cell_crops


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
    assert (crops["mask"][:, 3] == -1).all()


def test_no_cell_gives_no_crop() -> None:
    empty = np.empty((0, 4), dtype=np.int64), np.empty(0, dtype=np.int64)
    crops = cell_crops(*image(), *empty, 16)
    assert crops["mask"].shape == crops["flow"].shape == (0, 4, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES + 15}, "out of the image"),
        ({"boxes": BOXES[:, [2, 3, 0, 1]]}, "empty"),
        ({"boxes": BOXES[:2]}, "2 boxes for 3 cells"),
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


def block(ids: range) -> CellBlock:
    index = torch.tensor(list(ids), dtype=torch.int64)
    crops = index.float().reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    return CellBlock({"mask": crops, "flow": -crops}, index.float()[:, None], index % 3, index)


def blocks(sizes: list[int]) -> dict[int, CellBlock]:
    ends = np.cumsum(sizes).tolist()
    return {
        i: block(range(end - n, end)) for i, (n, end) in enumerate(zip(sizes, ends, strict=True))
    }


def ids_of(batches) -> list[list[int]]:
    return [batch.cell_ids.tolist() for batch in batches]


@pytest.mark.parametrize("sizes", [[5, 0, 7, 1, 20], [3], [9], [8, 1], [0, 2], [30, 30, 30]])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_cell_comes_once_and_batches_are_full(sizes: list[int], shuffle: bool) -> None:
    source = blocks(sizes)
    batches = BlockShuffle(list(source), source.__getitem__, 4, buffer_cells=10, shuffle=shuffle)
    ids = ids_of(batches(0))
    assert sorted([*chain(*ids)]) == list(range(sum(sizes)))
    assert all(len(batch) == 4 for batch in ids[:-1])
    assert 2 <= len(ids[-1]) <= 5
    if not shuffle:
        assert [*chain(*ids)] == list(range(sum(sizes)))


def test_fields_of_a_cell_stay_together() -> None:
    source = blocks([6, 6, 6])
    for batch in BlockShuffle([0, 1, 2], source.__getitem__, 5)(3):
        assert (batch.crops["mask"][:, 0, 0, 0] == batch.cell_ids).all()
        assert (batch.crops["flow"][:, 3, 1, 1] == -batch.cell_ids).all()
        assert (batch.features[:, 0] == batch.cell_ids).all()
        assert (batch.labels == batch.cell_ids % 3).all()


def test_order_is_drawn_from_seed_and_epoch() -> None:
    source = blocks([6] * 5)

    def drawn(seed: int, epoch: int) -> list[list[int]]:
        return ids_of(BlockShuffle(range(5), source.__getitem__, 4, seed)(epoch))

    assert drawn(0, 0) == drawn(0, 0)
    assert len({str(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_blocks_are_mixed_in_a_batch() -> None:
    source = blocks([10] * 10)
    first = next(BlockShuffle(range(10), source.__getitem__, 10, buffer_cells=50)(0))
    assert len({i // 10 for i in first.cell_ids.tolist()}) > 2


def test_no_more_blocks_are_read_ahead_than_the_buffer_holds() -> None:
    source, read = blocks([10] * 100), []

    def tracked(block_id: int) -> CellBlock:
        read.append(block_id)
        return source[block_id]

    given = 0
    for batch in BlockShuffle(range(100), tracked, 8, buffer_cells=40)(0):
        given += len(batch)
        assert 10 * len(read) - given <= 40 + 10
    assert len(read) == 100


def test_one_cell_in_all_comes_alone_and_none_gives_no_batch() -> None:
    assert ids_of(BlockShuffle([0], blocks([1]).__getitem__, 4)(0)) == [[0]]
    assert ids_of(BlockShuffle([0], blocks([0]).__getitem__, 4)(0)) == []
    with pytest.raises(UserInputError, match="2 cells or more"):
        BlockShuffle([0], blocks([1]).__getitem__, 1)
