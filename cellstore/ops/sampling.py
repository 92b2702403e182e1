"""Which cells of a training side are read in an epoch, and how often.

Decided from the counts of cells alone, before any is read, and the same for the same seed, epoch
and blocks. No list of all cells is made: numbers are dealt out to blocks, then within a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellstore.errors import UnknownNameError

CELLS, CLASSES, CAPPED = SAMPLERS = ("cells", "classes", "capped")
"""Each cell once; every class as often; the largest class no more often than the second."""

_DRAWING = 1
"""Keeps these numbers apart from those that shuffle blocks, which come of the same seed."""


@dataclass(frozen=True)
class Block:
    """Cells that are read together, those of an image, all of one class."""

    block_id: int
    label: int
    n_cells: int


def quotas(sampler: str, counts: Mapping[int, int]) -> dict[int, int]:
    """Return how many cells of each class an epoch has, of ``counts`` that there are.

    ``cells``: all. ``classes``: as many of each, together as many as there are, but for the
    remainder of the division; cells of small classes come several times. ``capped``: all, but of
    the class that is larger than all others only as many as the second largest has.

    Raises ``UnknownNameError`` for another sampler.
    """
    if sampler not in SAMPLERS:
        raise UnknownNameError.of("sampler", sampler, SAMPLERS)
    there = {label: count for label, count in counts.items() if count}
    if sampler == CLASSES and there:
        return dict.fromkeys(there, sum(there.values()) // len(there))
    if sampler == CAPPED and len(there) > 1:
        cap = sorted(there.values())[-2]
        return {label: min(count, cap) for label, count in there.items()}
    return there


class Drawn:
    """The cells of an epoch: ``counts`` by block id, and :meth:`of` for the cells themselves."""

    def __init__(self, blocks: Sequence[Block], sampler: str, seed: int, epoch: int) -> None:
        self._key = (seed, epoch, _DRAWING)
        self._sizes = {block.block_id: block.n_cells for block in blocks}
        self._times: dict[int, tuple[int, int]] = {}
        by_label: dict[int, list[Block]] = {}
        for block in sorted(blocks, key=lambda block: block.block_id):
            by_label.setdefault(block.label, []).append(block)
        totals = {label: sum(b.n_cells for b in some) for label, some in by_label.items()}
        for label, quota in sorted(quotas(sampler, totals).items()):
            self._deal(by_label[label], *divmod(quota, totals[label]))
        self.counts = {
            block_id: whole * self._sizes[block_id] + rest
            for block_id, (whole, rest) in self._times.items()
        }

    def _deal(self, blocks: Sequence[Block], whole: int, rest: int) -> None:
        """Each cell ``whole`` times, and ``rest`` of all cells of the class once more."""
        generator = _generator(*self._key, blocks[0].label + 1)
        sizes = [block.n_cells for block in blocks]
        shares = generator.multivariate_hypergeometric(sizes, rest, method="marginals")
        for block, share in zip(blocks, shares.tolist(), strict=True):
            self._times[block.block_id] = (whole, share)

    def of(self, block_id: int) -> NDArray[np.int64] | None:
        """The positions of the drawn cells in their block, (M,); ``None``: each cell once."""
        whole, rest = self._times.get(block_id, (0, 0))
        size = self._sizes[block_id]
        if (whole, rest) in ((1, 0), (0, size)):
            return None
        generator = _generator(*self._key, 0, block_id)
        more = np.sort(generator.choice(size, rest, replace=False, shuffle=False))
        index: NDArray[np.int64] = np.concatenate([np.tile(np.arange(size), whole), more])
        return index


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))
