"""Drawing cells: evenly over groups, in bounded memory, the same ones every time.

A cell gets a random number from its id and the seed alone, and those with the lowest numbers are
drawn. So it does not matter in which order, or in how many blocks, the cells come.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Key = TypeVar("Key", bound=Hashable)
Ids = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_BITS = 2**64 - 1


def lots(ids: ArrayLike, seed: int) -> NDArray[np.uint64]:
    """Return a random number for each of the (N,) ids, by SplitMix64 of ``id`` and ``seed``.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    start = np.uint64(((seed + 1) * _GOLDEN) & _BITS)
    spread = np.asarray(ids).astype(np.uint64) * np.uint64(_GOLDEN)
    found: NDArray[np.uint64] = splitmix64(spread + splitmix64(start))
    return found


def splitmix64(values: Any) -> Any:
    """Return what SplitMix64 makes of its states, uint64 of any shape."""
    with np.errstate(over="ignore"):
        for shift, factor in _MIXERS:
            values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


def even_shares(counts: Mapping[Key, int], total: int) -> dict[Key, int]:
    """Return how many to draw of each group, so that together they are at most ``total``.

    Groups get the same number; what a small one cannot give goes to the larger ones. Of groups
    that are alike, the first in the order of ``counts`` gets the odd ones.
    """
    shares: dict[Key, int] = {}
    left = total
    by_size = sorted(counts, key=lambda key: counts[key])
    for position, key in enumerate(by_size):
        shares[key] = min(counts[key], -(-left // (len(by_size) - position)))
        left -= shares[key]
    return {key: shares[key] for key in counts}


class Lowest:
    """Keeps, of the ids of each group that it is shown, those with the lowest lots.

    ``most`` is how many of a group are kept: one number, or one for each group, none for those
    that it does not name. ``counts``: how many of each it was shown.
    """

    def __init__(self, most: int | Mapping[int, int], seed: int) -> None:
        self._most, self._seed = most, seed
        self._kept: dict[int, Ids] = {}
        self.counts: dict[int, int] = {}

    def add(self, groups: Ids, ids: Ids) -> None:
        """Show (N,) ids and the group of each."""
        order = np.argsort(groups, kind="stable")
        names, starts = np.unique(groups[order], return_index=True)
        for name, some in zip(names.tolist(), np.split(ids[order], starts[1:]), strict=True):
            both = np.concatenate([self._kept.get(name, some[:0]), some])
            most = self._most if isinstance(self._most, int) else self._most.get(name, 0)
            self._kept[name] = _lowest(both, most, self._seed)
            self.counts[name] = self.counts.get(name, 0) + len(some)

    def drawn(self, shares: Mapping[int, int]) -> dict[int, Ids]:
        """Return the ids that are drawn of each group, in ascending order."""
        return {
            name: np.sort(_lowest(self._kept[name], share, self._seed))
            for name, share in shares.items()
            if share > 0
        }


def _lowest(ids: Ids, most: int, seed: int) -> Ids:
    if len(ids) <= most:
        return ids
    if most == 0:
        return ids[:0]
    lowest: Ids = ids[np.argpartition(lots(ids, seed), most - 1)[:most]]
    return lowest
