"""Batches of cells from blocks (images) that are read one at a time, and how well they are mixed.

Needs no torch. All is decided by counts of cells, seed and epoch: not by time, nor by the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellstore.errors import ImageError, UserInputError
from cellstore.ops.sampling import CELLS, Block, Drawn

BUFFER_CELLS = 32_768
"""Cells that are mixed: those of some 200 images. 1.4 GB of windows of 70 x 70 pixels."""

BUFFER_BYTES = 2 << 30
"""More than this is not mixed, however few cells it is."""

_FIRST_BATCHES = 4
"""The buffer starts with as many batches, not to keep an epoch waiting, and grows to its size."""


class Cells(Protocol):
    """Cells that can be taken from blocks: :class:`~cellstore.ops.windows.CutCells`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def take(self, index: NDArray[np.int64]) -> Self:
        """The cells at these positions, as a copy."""
        ...

    @classmethod
    def gather(cls, parts: Sequence[tuple[Self, NDArray[np.int64]]]) -> Self:
        """The cells at some positions of each of one or more blocks, as a copy."""
        ...


C = TypeVar("C", bound=Cells)


@dataclass(frozen=True)
class _Epoch:
    """What one process reads in an epoch: the ids of its blocks, and the sizes of its batches."""

    drawn: Drawn
    order: list[int]
    sizes: list[int]


class BlockShuffle(Generic[C]):
    """Call it with an epoch to get batches of cells.

    While shuffling, the order of blocks is drawn from (seed, epoch), and batches are drawn at
    random from a buffer of ``buffer_cells`` cells (fewer if they take ``buffer_bytes``), filled up
    from the blocks that follow; it starts small and grows with each batch. Memory is bounded
    by twice the buffer, a block and a batch, however many blocks there are. Without shuffling,
    cells come in the order of ``blocks`` and epochs are alike.

    ``sampler`` says how often a cell is read in an epoch, see :mod:`cellstore.ops.sampling`.

    Every batch has ``batch_size`` cells but the last, which has 2 to ``batch_size + 1``, since
    batch normalisation cannot train on one. A single cell comes alone only if there is no other.

    ``share=(rank, world)``: what the process ``rank`` of ``world`` reads. All have the same
    number of batches, of equal sizes within one cell, and no block in common; all together read
    what one would.

    Batches hold cells in the order of their blocks; ``read_all`` yields the cells of blocks in the
    order of the ids it is given.

    Raises, when called:
        UserInputError: ``share``: a process would have too few cells to fill its batches.
        ImageError: a block has not as many cells as was said.

    """

    def __init__(
        self,
        blocks: Sequence[Block],
        read_all: Callable[[Iterable[int]], Iterator[C]],
        batch_size: int = 512,
        seed: int = 0,
        *,
        shuffle: bool = True,
        sampler: str = CELLS,
        share: tuple[int, int] = (0, 1),
        buffer_cells: int = BUFFER_CELLS,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        if batch_size < 2:
            raise UserInputError(f"A batch needs 2 cells or more, not {batch_size}.")
        self.blocks, self.read_all = tuple(blocks), read_all
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.sampler, self.share = sampler, share
        self.buffer_cells, self.buffer_bytes = buffer_cells, buffer_bytes

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return len(self._plan(epoch).sizes)

    def __call__(self, epoch: int = 0) -> Generator[C, None, None]:
        """The batches of an epoch; same seed, epoch and blocks, same batches."""
        plan = self._plan(epoch)
        pool: _Pool[C] = _Pool(_generator(self.seed, epoch, 1) if self.shuffle else None)
        blocks = self._read(plan)
        for number, size in enumerate(plan.sizes):
            mixed = min(self.buffer_cells, self.batch_size * (_FIRST_BATCHES + number))
            while pool.cells < size or (
                self.shuffle and pool.cells < mixed and pool.nbytes < self.buffer_bytes
            ):
                block = next(blocks, None)
                if block is None:
                    break
                pool.add(block)
            yield pool.draw(size)

    def _plan(self, epoch: int) -> _Epoch:
        drawn = Drawn(self.blocks, self.sampler, self.seed, epoch)
        ids = [block.block_id for block in self.blocks if drawn.counts.get(block.block_id)]
        if self.shuffle:
            ids = [ids[i] for i in _generator(self.seed, epoch, 0).permutation(len(ids))]
        rank, world = self.share
        shares = _dealt([(i, drawn.counts[i]) for i in ids], world)
        totals = [sum(drawn.counts[i] for i in share) for share in shares]
        sizes = _full_sizes(totals[0], self.batch_size) if world == 1 else self._equal(totals)
        return _Epoch(drawn, shares[rank], sizes)

    def _equal(self, totals: Sequence[int]) -> list[int]:
        """The sizes of the batches of this process: as many batches as all others have."""
        number = -(-max(totals) // self.batch_size)
        if min(totals) < number * (2 if self.shuffle else 1):
            raise UserInputError(
                f"There are too few images to share out to {len(totals)} processes: one would get "
                f"{min(totals)} cells, another {max(totals)}. Train with fewer devices, or with "
                "smaller batches."
            )
        size, rest = divmod(totals[self.share[0]], number)
        return [size + (i < rest) for i in range(number)]

    def _read(self, plan: _Epoch) -> Iterator[C]:
        expected = {block.block_id: block.n_cells for block in self.blocks}
        for block_id, cells in zip(plan.order, self.read_all(plan.order), strict=True):
            if len(cells) != expected[block_id]:
                raise ImageError(
                    "The cells of an image changed while the network was training. Train again."
                )
            index = plan.drawn.of(block_id)
            yield cells if index is None else cells.take(index)


class _Pool(Generic[C]):
    """Blocks of which cells are drawn; what is left of a block is copied when half is gone."""

    def __init__(self, generator: np.random.Generator | None) -> None:
        self.generator = generator
        self.blocks: list[C] = []
        self.left: list[NDArray[np.int64]] = []
        self.cells = 0
        self.nbytes = 0

    def add(self, block: C) -> None:
        self.blocks.append(block)
        self.left.append(np.arange(len(block)))
        self.cells += len(block)
        self.nbytes += block.nbytes

    def draw(self, size: int) -> C:
        """Return so many cells, at random or the first ones."""
        ends = np.cumsum([len(index) for index in self.left])
        if self.generator is None:
            chosen = np.arange(size)
        else:
            chosen = np.sort(self.generator.choice(self.cells, size, replace=False, shuffle=False))
        bounds = np.searchsorted(chosen, [0, *ends])
        parts = []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            start = ends[number] - len(self.left[number])
            parts.append(self._take(number, chosen[bounds[number] : bounds[number + 1]] - start))
        drawn = type(self.blocks[0]).gather(parts)
        self._forget()
        return drawn

    def _take(self, number: int, places: NDArray[np.int64]) -> tuple[C, NDArray[np.int64]]:
        index = self.left[number]
        there = np.zeros(len(index), dtype=bool)
        there[places] = True
        self.left[number] = index[~there]
        self.cells -= len(places)
        return self.blocks[number], index[there]

    def _forget(self) -> None:
        for number, (block, index) in enumerate(zip(self.blocks, self.left, strict=True)):
            if 0 < 2 * len(index) <= len(block):
                self.blocks[number] = block.take(index)
                self.left[number] = np.arange(len(index))
        kept = [i for i, index in enumerate(self.left) if len(index)]
        self.blocks = [self.blocks[i] for i in kept]
        self.left = [self.left[i] for i in kept]
        self.nbytes = sum(block.nbytes for block in self.blocks)


def _dealt(blocks: Sequence[tuple[int, int]], world: int) -> list[list[int]]:
    """The ids of ``blocks`` (id, cells) in their order, each to whoever has the fewest cells."""
    shares: list[list[int]] = [[] for _ in range(world)]
    totals = [0] * world
    for block_id, cells in blocks:
        least = totals.index(min(totals))
        shares[least].append(block_id)
        totals[least] += cells
    return shares


def _full_sizes(total: int, batch_size: int) -> list[int]:
    if total == 0:
        return []
    full = max(0, (total - 2) // batch_size)
    return [batch_size] * full + [total - full * batch_size]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


def mixing(batches: Sequence[NDArray[Any]], seed: int = 0) -> float:
    """Return how well ``batches`` mix groups: 1 is as well as a perfect shuffle does.

    ``batches`` are the groups (images, classes, plates) of the cells of each batch, (B,). In a
    batch there are effectively 1 / sum(p^2) groups, p the share of each (the inverse Simpson
    index; Hill 1973, order 2). What is returned is the mean over all batches, divided by the mean
    over batches of the same sizes into which the same cells were dealt at random.
    """
    everything = np.concatenate(batches)
    shuffled = everything[_generator(seed).permutation(len(everything))]
    dealt = np.split(shuffled, np.cumsum([len(batch) for batch in batches])[:-1])
    return float(np.mean([*map(_effective, batches)]) / np.mean([*map(_effective, dealt)]))


def _effective(groups: NDArray[Any]) -> float:
    shares = np.unique(groups, return_counts=True)[1] / len(groups)
    return float(1 / (shares**2).sum())
