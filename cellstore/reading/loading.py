"""Batches of cells as training takes them: read, shuffled, on the device of the network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..errors import ImageError
from ..ops.crops import BlockShuffle, CellBlock
from .blocks import BlockReader, buffer_cells
from .cells import ImageBlock


class Batches:
    """Call it with the number of an epoch, from 0, to get the batches of that epoch.

    ``waited`` are the seconds that whoever took the batches of the latest epoch has waited for
    them.
    """

    def __init__(self, shuffle: BlockShuffle, device: str) -> None:
        self._shuffle, self._device = shuffle, device
        self.waited = 0.0

    def __call__(self, epoch: int) -> Iterator[CellBlock]:
        """Yield the batches of an epoch; the same ones when asked again."""
        self.waited = 0.0
        batches = self._shuffle(epoch)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch.to(self._device)


def training_batches(
    reader: BlockReader,
    blocks: Sequence[ImageBlock],
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    device: str = "cpu",
) -> Batches:
    """Return the batches of the cells of ``blocks``, which ``reader`` reads.

    ``shuffle``: the training side, else cells come in the order of ``blocks``.

    Raises, when batches are taken:
        ImageError: pixels or masks of an image cannot be read, or its cells are not those that
            ``blocks`` counted.

    """
    expected = {block.image_id: block.n_cells for block in blocks}
    shuffled = BlockShuffle(
        list(expected),
        lambda image_id: _as_planned(reader(image_id), expected[image_id]),
        batch_size=batch_size,
        seed=seed,
        buffer_cells=buffer_cells(
            reader.crop_size, batch_size, reader.branches, len(reader.scaler.names)
        ),
        shuffle=shuffle,
    )
    return Batches(shuffled, device)


def _as_planned(cells: CellBlock, expected: int) -> CellBlock:
    if len(cells) != expected:
        raise ImageError(
            "The cells of an image changed while the network was training. Train again."
        )
    return cells
