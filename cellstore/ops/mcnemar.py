"""Whether one of two runs is right more often than the other, on the same images.

McNemar's test (Psychometrika 12, 1947) asks: if in each image in which one of the two is right a
coin decided which, how often would they differ by as much as they do? It takes images to be
independent. Images of a well are not: counted singly, nine alike images make nine witnesses of one,
and the test finds differences that are none (``benchmarks/compare_errors.py`` shows how often). So
a coin is thrown for each well here, and the two runs change places in all its images at once: the
randomisation test of Fisher (The Design of Experiments, 1935, section 21) over wells. Its
distribution is had exactly, by adding one well after the other (Pagano and Tritchler, J. Am. Stat.
Assoc. 78, 1983), so that nothing is drawn and few wells do no harm. With one image per well it is
McNemar's exact test. The chi-square test of Durkalski et al. (Stat. Med. 22, 2003) is what it comes
to where wells are many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError


@dataclass(frozen=True)
class WellTest:
    """``first`` and ``second``: wells of which that run has more right; two-sided p."""

    first: int
    second: int
    p_value: float


def mcnemar_over_wells(first: ArrayLike, second: ArrayLike, wells: ArrayLike) -> WellTest:
    """Return McNemar's exact test in which a well counts as a whole.

    ``first`` and ``second`` are (N,) booleans, whether each run is right, and ``wells`` (N,) the
    well of each image. Time grows with wells that differ times images that differ: a millisecond
    for a plate, some seconds for 30,000 such wells.
    """
    gain = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    names = np.asarray(wells)
    if gain.ndim != 1 or gain.size == 0 or gain.shape != names.shape:
        raise UserInputError(f"There are {gain.shape} images and {names.shape} wells.")
    _, well_of = np.unique(names, return_inverse=True)
    # Whole numbers far below 2 ** 53, so that the sums are exact.
    gains = np.bincount(well_of, weights=gain).astype(np.int64)
    more, less = int((gains > 0).sum()), int((gains < 0).sum())
    return WellTest(more, less, exchange_test(gains))


def exchange_test(gains: ArrayLike) -> float:
    """Return the two-sided p of a sum of whole numbers, each of which might have the other sign.

    ``gains`` is (W,); p is the share of the 2 ** W choices of signs with a sum as far from 0 as
    theirs, or farther.
    """
    values = np.asarray(gains, dtype=np.int64)
    sizes = np.sort(np.abs(values[values != 0]))
    total, reached = int(sizes.sum()), abs(int(values.sum()))
    if reached == 0:
        return 1.0
    # Of the sizes, those with a plus add up to (total + sum) / 2.
    ways = _sums_of_some(sizes)
    return min(1.0, 2 * float(ways[(total + reached) // 2 :].sum()))


def _sums_of_some(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of each sum, from 0 up, where each size is in it with probability 1/2."""
    chance = np.zeros(int(sizes.sum()) + 1)
    chance[0] = 1.0
    reach = 0
    for size in sizes.tolist():
        half = chance[: reach + 1] / 2
        chance[: reach + 1] = half
        chance[size : reach + size + 1] += half
        reach += size
    return chance
