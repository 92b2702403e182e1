"""Batches from blocks: all cells, in an order that time does not change, fairly shared."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from cellstore.errors import ImageError, UserInputError
from cellstore.learn.batches import Block, BlockShuffle, Drawn, quotas
from cellstore.learn.crops import CellCrops


def cells(ids: range) -> CellCrops:
    """Cells of one pixel that is the id, as the features and the label are."""
    index = np.array(ids, dtype=np.int64)
    sizes, layers = np.ones((len(ids), 2), np.int64), {"mask": index[None].astype(np.uint8)}
    return CellCrops(sizes, layers, index[:, None].astype(np.float32), index % 3, index)


def made(sizes: list[int]) -> dict[int, CellCrops]:
    ends = np.cumsum(sizes).tolist()
    return {
        i: cells(range(end - n, end)) for i, (n, end) in enumerate(zip(sizes, ends, strict=True))
    }


def shuffle(source: dict[int, CellCrops], batch_size: int, seed: int = 0, **more) -> BlockShuffle:
    blocks = [Block(i, i % 2, len(block)) for i, block in source.items()]
    return BlockShuffle(blocks, lambda ids: map(source.__getitem__, ids), batch_size, seed, **more)


def ids_of(batches) -> list[list[int]]:
    return [batch.cell_ids.tolist() for batch in batches]


@pytest.mark.parametrize("sizes", [[5, 0, 7, 1, 20], [3], [9], [8, 1], [0, 2], [30, 30, 30]])
@pytest.mark.parametrize("shuffled", [True, False])
def test_every_cell_comes_once_and_batches_are_full(sizes: list[int], shuffled: bool) -> None:
    batches = shuffle(made(sizes), 4, buffer_cells=10, shuffle=shuffled)
    ids = ids_of(batches(0))
    assert sorted([*chain(*ids)]) == list(range(sum(sizes)))
    assert all(len(batch) == 4 for batch in ids[:-1])
    assert 2 <= len(ids[-1]) <= 5
    assert len(ids) == batches.count(0)
    if not shuffled:
        assert [*chain(*ids)] == list(range(sum(sizes)))


def test_fields_of_a_cell_stay_together() -> None:
    for batch in shuffle(made([6, 6, 6]), 5)(3):
        assert (batch.layers["mask"][0] == batch.cell_ids).all()
        assert (batch.features[:, 0] == batch.cell_ids).all()
        assert (batch.labels == batch.cell_ids % 3).all()


def test_order_is_drawn_from_seed_and_epoch() -> None:
    source = made([6] * 5)

    def drawn(seed: int, epoch: int) -> list[list[int]]:
        return ids_of(shuffle(source, 4, seed)(epoch))

    assert drawn(0, 0) == drawn(0, 0)
    assert len({str(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_larger_buffer_mixes_more_blocks() -> None:
    source = made([10] * 30)

    def mixed(buffer_cells: int) -> float:
        batches = ids_of(shuffle(source, 10, buffer_cells=buffer_cells)(0))
        return float(np.mean([len({i // 10 for i in batch}) for batch in batches]))

    assert 1 <= mixed(10) < mixed(40) < mixed(300) < 10


def test_no_more_is_held_than_the_buffer_and_little_more() -> None:
    source, read = made([10] * 100), []

    def tracked(ids):
        for block_id in ids:
            read.append(block_id)
            yield source[block_id]

    blocks = [Block(i, 0, 10) for i in range(100)]
    given = 0
    for batch in BlockShuffle(blocks, tracked, 8, buffer_cells=40)(0):
        given += len(batch)
        assert 10 * len(read) - given <= 40 + 10
    assert len(read) == 100


def test_large_cells_fill_the_buffer_sooner() -> None:
    source, read = made([10] * 100), []
    blocks = [Block(i, 0, 10) for i in range(100)]

    def tracked(ids):
        for block_id in ids:
            read.append(block_id)
            yield source[block_id]

    batches = BlockShuffle(blocks, tracked, 8, buffer_bytes=3 * source[0].nbytes)(0)
    next(batches)
    assert len(read) == 3


def test_one_cell_in_all_comes_alone_and_none_gives_no_batch() -> None:
    assert ids_of(shuffle(made([1]), 4)(0)) == [[0]]
    assert ids_of(shuffle(made([0]), 4)(0)) == []
    with pytest.raises(UserInputError, match="2 cells or more"):
        shuffle(made([1]), 1)


def test_a_block_that_has_changed_ends_the_epoch() -> None:
    source = made([4, 4])
    batches = shuffle(source, 2)
    source[1] = source[1].take(np.array([0]))
    with pytest.raises(ImageError, match="changed while the network was training"):
        list(batches(0))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("shuffled", [True, False])
def test_shares_are_disjoint_and_have_as_many_batches(world: int, shuffled: bool) -> None:
    source = made([7, 3, 12, 5, 5, 9, 1, 8, 4, 6])
    shares = [
        ids_of(shuffle(source, 4, shuffle=shuffled, share=(rank, world))(2))
        for rank in range(world)
    ]
    assert sorted(chain(*chain(*shares))) == list(range(60))
    assert len({len(share) for share in shares}) == 1
    assert all(2 <= len(batch) <= 4 for batch in chain(*shares))


def test_too_few_images_for_all_processes_are_refused() -> None:
    with pytest.raises(UserInputError, match="Train with fewer devices"):
        list(shuffle(made([40]), 4, share=(0, 2))(0))


def test_quotas() -> None:
    counts = {0: 60, 1: 20, 2: 10, 3: 0}
    assert quotas("cells", counts) == {0: 60, 1: 20, 2: 10}
    assert quotas("classes", counts) == {0: 30, 1: 30, 2: 30}
    assert quotas("capped", counts) == {0: 20, 1: 20, 2: 10}
    assert quotas("capped", {0: 5}) == quotas("classes", {0: 5}) == {0: 5}


BLOCKS = [Block(10, 0, 40), Block(11, 0, 20), Block(12, 1, 20), Block(13, 2, 4), Block(14, 2, 6)]


def times(sampler: str, epoch: int) -> dict[int, list[int]]:
    """How often each cell of each block is drawn."""
    drawn = Drawn(BLOCKS, sampler, 0, epoch)
    found = {}
    for block in BLOCKS:
        index = drawn.of(block.block_id)
        index = np.arange(block.n_cells) if index is None else index
        found[block.block_id] = np.bincount(index, minlength=block.n_cells).tolist()
        assert drawn.counts[block.block_id] == len(index)
    return found


def test_balanced_classes_have_as_many_cells_and_no_cell_is_favoured() -> None:
    found = times("classes", 0)
    of_class = Counter({b.label: 0 for b in BLOCKS})
    for block in BLOCKS:
        of_class[block.label] += sum(found[block.block_id])
    assert of_class == {0: 30, 1: 30, 2: 30}  # 90 cells, as before
    assert {*found[10], *found[11]} == {0, 1}
    assert {*found[12]} == {1, 2}
    assert {*found[13], *found[14]} == {3}


def test_the_largest_class_is_drawn_anew_in_every_epoch() -> None:
    first, second = times("capped", 0), times("capped", 1)
    assert first == times("capped", 0)
    assert sum(first[10]) + sum(first[11]) == 20
    assert first[10] != second[10]
    assert all(set(first[other]) == {1} for other in (12, 13, 14))
    often = np.sum([times("capped", epoch)[10] for epoch in range(300)], axis=0)
    assert np.abs(often - 100).max() < 5 * math.sqrt(300 * 1 / 3 * 2 / 3)


@pytest.mark.parametrize("sampler", ["cells", "classes", "capped"])
def test_batches_hold_what_was_drawn(sampler: str) -> None:
    source = made([40, 10, 4])
    blocks = [Block(i, i, len(block)) for i, block in source.items()]
    drawn = Drawn(blocks, sampler, 5, 1)
    batches = BlockShuffle(blocks, lambda ids: map(source.__getitem__, ids), 8, 5, sampler=sampler)
    found = Counter(chain(*ids_of(batches(1))))
    expected = Counter()
    for block_id, block in source.items():
        index = drawn.of(block_id)
        expected.update((block if index is None else block.take(index)).cell_ids.tolist())
    assert found == expected
