"""Batches of cells as training takes them: read ahead, shuffled, on the device of the network."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..ops.ahead import Ahead, read_ahead
from ..ops.crops import CellBlock, crop_cells
from ..ops.sampling import CELLS, Block
from ..ops.shuffling import BUFFER_CELLS, BlockShuffle
from ..ops.windows import CutCells
from .blocks import BlockReader
from .cells import ImageBlock

MOST_READERS = 8


class Batches:
    """Call it with the number of an epoch, from 0, to get the batches of that epoch.

    A thread makes the next batch while this one is used. ``waited`` are the seconds that whoever
    took the batches of the latest epoch has waited for them.
    """

    def __init__(self, shuffle: BlockShuffle[CutCells], crop_size: int, device: str) -> None:
        self._shuffle, self._crop_size, self._device = shuffle, crop_size, device
        self.waited = 0.0

    def count(self, epoch: int = 0) -> int:
        """The number of batches of an epoch."""
        return self._shuffle.count(epoch)

    def __call__(self, epoch: int) -> Generator[CellBlock, None, None]:
        """Yield the batches of an epoch; the same ones when asked again."""
        self.waited = 0.0
        batches = iter(Ahead(self._made(epoch)))
        try:
            while (batch := self._next(batches)) is not None:
                yield batch
                del batch
        finally:
            batches.close()

    def _next(self, batches: Iterator[CellBlock]) -> CellBlock | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - start
        return batch

    def _made(self, epoch: int) -> Iterator[CellBlock]:
        with _current(self._device):
            for cells in self._shuffle(epoch):
                yield crop_cells(cells, self._crop_size, self._device)


def _current(device: str) -> AbstractContextManager[Any]:
    """Make ``device`` that of this thread, which otherwise also takes memory on the first one."""
    on_cuda = torch.device(device).type == "cuda"
    return torch.cuda.device(device) if on_cuda else nullcontext()


def training_batches(
    reader: BlockReader,
    blocks: Sequence[ImageBlock],
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    sampler: str = CELLS,
    share: tuple[int, int] = (0, 1),
    device: str = "cpu",
    buffer_cells: int = BUFFER_CELLS,
) -> Batches:
    """Return the batches of the cells of ``blocks``, which ``reader`` reads.

    ``shuffle``: the training side, else cells come in the order of ``blocks``. ``sampler``,
    ``share`` and ``buffer_cells`` are those of :class:`~cellstore.ops.shuffling.BlockShuffle`.
    Batches are the same on any machine, with any number of threads and any memory.

    Memory: what ``reader`` keeps, twice the buffer of windows that are shuffled, three batches,
    and an image for each reading thread and one more.

    Raises, when batches are taken:
        ImageError: pixels or masks of an image cannot be read, or its cells are not those that
            ``blocks`` counted.
        UserInputError: there are too few images for a ``share``.

    """
    counted = [
        Block(block.image_id, reader.classes.get(block.label_id, -1), block.n_cells)
        for block in blocks
    ]
    threads = reading_threads()

    def read_all(image_ids: Iterable[int]) -> Iterator[CutCells]:
        return read_ahead(image_ids, reader.cut, threads)

    shuffled = BlockShuffle(
        counted,
        read_all,
        batch_size,
        seed,
        shuffle=shuffle,
        sampler=sampler,
        share=share,
        buffer_cells=buffer_cells,
    )
    return Batches(shuffled, reader.crop_size, device)


def reading_threads() -> int:
    """Threads that read images: half the cores that this process may use, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_READERS, (cores or 1) // 2))
