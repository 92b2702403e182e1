"""How far scores may be off by chance, where whole wells are what is drawn.

Images of a well are not independent, so wells are drawn with replacement, not images (Field and
Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69, 2007). The same seed gives the same
interval, whatever the order of the images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError

Numbers = NDArray[np.float64]
Interval = tuple[float, float]
LEVEL = 0.95
RESAMPLES = 2000
AT_ONCE = 1 << 21
"""So many numbers are drawn at once: 16 MB."""


def bootstrap_interval(
    correct: ArrayLike,
    wells: ArrayLike,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile bootstrap interval of an accuracy, drawing whole wells with replacement.

    ``correct`` is (N,) booleans, one per image, and ``wells`` (N,) the well of each. Where all
    images are right, or none is, all draws are alike and say nothing; then the interval is that of
    Clopper and Pearson (1934) for as many wells. ``None`` for a single well: there is nothing to
    draw from.
    """
    right, images = _by_well(correct, wells)
    if images.size < 2:
        return None
    tail = (1 - level) / 2
    if not right.any() or (right == images).all():
        reach = 1 - tail ** (1 / images.size)
        return (1 - reach, 1.0) if right.any() else (0.0, reach)
    return _percentiles(right, images, seed, tail, resamples)


def difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    wells: ArrayLike,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Interval of the accuracy of one run minus that of another, on the same images.

    ``first`` and ``second`` are (N,) booleans: whether each run is right. Both keep their images
    together in each draw, so what makes a well easy for both does not widen the interval. Where
    the two never differ, the bounds are how often they could differ in a well and not be seen to
    in so many wells (Clopper and Pearson 1934). ``None`` for a single well.
    """
    gain = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    gained, images = _by_well(gain, wells)
    if images.size < 2:
        return None
    tail = (1 - level) / 2
    if not gain.any():
        reach = 1 - tail ** (1 / images.size)
        return -reach, reach
    return _percentiles(gained, images, seed, tail, resamples)


def _by_well(values: ArrayLike, wells: ArrayLike) -> tuple[Numbers, Numbers]:
    """The sum of the values of each well, and the number of its images."""
    numbers, names = np.asarray(values, dtype=np.float64), np.asarray(wells)
    if numbers.ndim != 1 or numbers.size == 0 or numbers.shape != names.shape:
        raise UserInputError(f"There are {numbers.shape} scores and {names.shape} wells.")
    _, well_of = np.unique(names, return_inverse=True)
    sums: Numbers = np.bincount(well_of, weights=numbers).astype(np.float64)
    return sums, np.bincount(well_of).astype(np.float64)


def _percentiles(
    sums: Numbers, images: Numbers, seed: int, tail: float, resamples: int
) -> Interval:
    generator = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, AT_ONCE // images.size)
    drawn = np.empty(resamples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        chosen = generator.integers(0, images.size, (rows, images.size))
        drawn[start : start + rows] = sums[chosen].sum(axis=1) / images[chosen].sum(axis=1)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
