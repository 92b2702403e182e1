"""How good predictions are. NumPy only, so that reports need no machine-learning extra.

``truth`` and ``predicted`` are (N,) arrays of class values (numbers or text) of the same kind.
All functions raise ``UserInputError`` where there is nothing to score or lengths differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserInputError

Interval = tuple[float, float]
TAIL = 0.025
"""Of a 95 % interval, on each side."""
FEWEST_WELLS = 6
"""With fewer, an interval of a difference covers less than 93 % (one of an accuracy with 4 wells;
``benchmarks/interval_coverage.py``), and the exchange test cannot come below 5 %: 2 / 2**5."""


def well_interval(
    correct: ArrayLike, wells: ArrayLike, *, minus: ArrayLike | None = None
) -> Interval | None:
    """Return the 95 % interval of an accuracy: where it would be with other wells of the same kind.

    ``correct`` is (N,) booleans, one per image, and ``wells`` (N,) the well of each; see
    :func:`share_interval`. ``minus`` (N,): whether another run is right; the interval is then that
    of the difference of their accuracies, put together from those of the shares of images in which
    one of them alone is right (Zou and Donner, Statistics in Medicine 27, 2008). So what makes a
    well easy for both does not widen it. ``None`` for fewer than ``FEWEST_WELLS`` wells.
    """
    right, names = np.asarray(correct, dtype=bool), np.asarray(wells)
    wrong = np.zeros_like(right) if minus is None else np.asarray(minus, dtype=bool)
    if right.ndim != 1 or right.size == 0 or not right.shape == wrong.shape == names.shape:
        raise UserInputError(f"There are {right.shape} scores and {names.shape} wells.")
    _, well_of = np.unique(names, return_inverse=True)
    images = np.bincount(well_of).astype(np.float64)
    if images.size < FEWEST_WELLS:
        return None
    first = np.bincount(well_of, weights=right & ~wrong)
    low, high = share_interval(first, images)
    if minus is None:
        return low, high
    second = np.bincount(well_of, weights=wrong & ~right)
    below, above = share_interval(second, images)
    one, other = (float(some.sum() / images.sum()) for some in (first, second))
    apart, others = first - one * images, second - other * images
    scale = float((apart**2).sum() * (others**2).sum())
    together = float((apart * others).sum()) / math.sqrt(scale) if scale else 0.0

    def reach(own: float, of_other: float) -> float:
        return math.sqrt(max(0.0, own**2 + of_other**2 - 2 * together * own * of_other))

    gain = one - other
    return gain - reach(one - low, above - other), gain + reach(high - one, other - below)


def share_interval(right: NDArray[Any], images: NDArray[Any]) -> Interval:
    """Return the 95 % interval of a share from W >= 2 wells: (W,) right images, and (W,) images.

    It is that of Clopper and Pearson (1934) for as many independent images as these are worth
    (Korn and Graubard, Survey Methodology 24, 1998): their number over the design effect
    1 + (m - 1) r, where m is how many images the well of an image has on average (Kish 1965) and r,
    in 0..1, how alike the images of a well are. r comes from how far wells are apart. As this says
    little where right images, or wrong ones, come from few wells (how many they are worth: Kish
    1965), one well with r = 1 is weighed against these few. Without it, wells with hardly an error
    would promise too much. The simulations are in ``benchmarks/interval_coverage.py``.
    """
    total, wells = float(images.sum()), images.size
    share = float(right.sum()) / total
    size = float((images**2).sum()) / total
    alike = 1.0
    mixed = min(_worth(right), _worth(images - right))
    if mixed > 0 and size > 1:
        spread = wells / (wells - 1) * float(((right - share * images) ** 2).sum())
        effect = spread / (total * share * (1 - share))
        alike = min(max((effect - 1) / (size - 1), 0.0), 1.0)
        alike = (mixed * alike + 1) / (mixed + 1)
    worth = total / (1 + (size - 1) * alike)
    hits, misses = share * worth, (1 - share) * worth
    return (
        beta_quantile(TAIL, hits, misses + 1) if share > 0 else 0.0,
        beta_quantile(1 - TAIL, hits + 1, misses) if share < 1 else 1.0,
    )


def _worth(counts: NDArray[Any]) -> float:
    """How many wells, all with as many, would say as much as these W counts."""
    total = float(counts.sum())
    return total**2 / float((counts**2).sum()) if total else 0.0


def beta_quantile(share: float, a: float, b: float) -> float:
    """Return below which number a beta distribution has that share; a, b > 0. By Newton's steps."""
    low, high, x = 0.0, 1.0, a / (a + b)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(200):
        off = beta_share(x, a, b) - share
        low, high = (low, x) if off > 0 else (x, high)
        log_density = scale + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x)
        step = x - off * math.exp(min(-log_density, 700.0))
        step = step if low < step < high else (low + high) / 2
        if abs(step - x) <= 1e-13:
            break
        x = step
    return x


def beta_share(x: float, a: float, b: float) -> float:
    """Return which share of a beta distribution is below ``x`` in 0..1 (exclusive); a, b > 0.

    The continued fraction of DLMF 8.17.22, added up as in Lentz (Applied Optics 15, 1976).
    """
    if x > (a + 1) / (a + b + 2):  # there it takes fewer steps from the other side
        return 1 - beta_share(1 - x, b, a)
    tiny = 1e-300
    over, under, value = 1.0, 0.0, 1.0
    for step in range(100_000):
        m = step // 2
        if step == 0:
            factor = 1.0
        elif step % 2 == 0:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        under = 1 / ((1 + factor * under) or tiny)
        over = (1 + factor / over) or tiny
        value *= over * under
        if step and abs(over * under - 1) < 1e-15:
            break
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x))
    return front * (value - 1) / a


@dataclass(frozen=True)
class WellTest:
    """Of ``wells``, how many the first, or the second run has more right of; and the p of that."""

    wells: int
    wells_first: int
    wells_second: int
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
    return WellTest(gains.size, more, less, exchange_test(gains))


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
    # The probability of each sum, from 0 up, where each size is in it with probability 1/2.
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    reach = 0
    for size in sizes.tolist():
        half = ways[: reach + 1] / 2
        ways[: reach + 1] = half
        ways[size : reach + size + 1] += half
        reach += size
    # Of the sizes, those with a plus add up to (total + sum) / 2.
    return min(1.0, 2 * float(ways[(total + reached) // 2 :].sum()))


def class_f1(
    truth: ArrayLike, predicted: ArrayLike, classes: int
) -> tuple[NDArray[np.float64], float, float]:
    """Return the F1 of each class (K,), balanced accuracy, and macro F1.

    ``truth`` and ``predicted`` are (N,) class numbers from 0 to K - 1. F1 is 2 x right / (true +
    answered), NaN for a class that is neither; macro F1 is its mean, as in scikit-learn's
    ``f1_score(average="macro")``. Balanced accuracy is the mean recall over the classes that are
    true somewhere (Brodersen et al. 2010). It needs memory for K counts, not for K x K.
    """
    truth, predicted = _checked(truth, predicted)
    true, answered, right = (
        np.bincount(codes, minlength=classes)
        for codes in (truth, predicted, truth[truth == predicted])
    )
    f1 = _ratio(2 * right, true + answered)
    return f1, float(np.nanmean(_ratio(right, true))), float(np.nanmean(f1))


def log_loss(probability: ArrayLike) -> float:
    """Mean of -log(p) in nats, p the probability that was given to the true class.

    ``probability`` is (N,) in 0..1. A probability below the smallest step of a double at 1
    (2.2e-16) counts as that, as in scikit-learn's ``log_loss``.
    """
    (given,) = _checked(np.asarray(probability, dtype=np.float64), shares=True)
    smallest = np.finfo(np.float64).eps
    return float(-np.log(np.clip(given, smallest, 1 - smallest)).mean())


def calibration(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15
) -> tuple[list[tuple[float, float, int, float, float]], float]:
    """Return answers by confidence, and the expected calibration error.

    ``confidence`` is (N,) in 0..1, ``correct`` (N,) booleans. Of each bin that holds any: its ends
    (it is open below, but the first includes 0), the number of answers, their mean confidence, and
    the share that is right. The error is the gap between these two, averaged over answers (equation
    3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, who take 15 bins).
    """
    given, right = _checked(np.asarray(confidence, dtype=np.float64), correct, shares=True)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, given, side="left") - 1, 0, bins - 1)
    number = np.bincount(bin_of, minlength=bins)
    mean = _ratio(np.bincount(bin_of, weights=given, minlength=bins), number)
    counted = np.bincount(bin_of, weights=right.astype(np.float64), minlength=bins)
    accuracy = _ratio(counted, number)
    error = float(np.nansum(np.abs(mean - accuracy) * number) / number.sum())
    columns = (edges[:-1], edges[1:], number, mean, accuracy)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [row for row in rows if row[2]], error


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _checked(*values: ArrayLike, shares: bool = False) -> list[NDArray[Any]]:
    """Return arrays (N,) of one length; ``shares``: the first holds numbers from 0 to 1."""
    arrays = [np.asarray(item) for item in values]
    if any(array.ndim != 1 or array.size == 0 for array in arrays):
        raise UserInputError("There is nothing to score; predict some images first.")
    if len({array.shape for array in arrays}) > 1:
        raise UserInputError(
            f"There are {arrays[0].size} values in one column and {arrays[1].size} in the other."
        )
    if shares and not ((arrays[0] >= 0) & (arrays[0] <= 1)).all():
        raise UserInputError("A probability or confidence is not between 0 and 1.")
    return arrays
