"""How good predictions are. NumPy only, so that reports need no machine-learning extra.

``truth`` and ``predicted`` are (N,) arrays of class values (numbers or text) of the same kind.
All functions raise ``UserInputError`` where there is nothing to score or lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserInputError

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
    *,
    minus: ArrayLike | None = None,
) -> Interval | None:
    """Percentile bootstrap interval of an accuracy, drawing whole wells with replacement.

    ``correct`` is (N,) booleans, one per image, and ``wells`` (N,) the well of each. ``minus``
    (N,): whether another run is right; the interval is then that of the difference of their
    accuracies. Both keep their images together in each draw, so what makes a well easy for both
    does not widen it. Where all images are right, or none is, or the two runs never differ, all
    draws are alike and say nothing; then the bounds are those of Clopper and Pearson (1934) for as
    many wells. ``None`` for a single well: there is nothing to draw from.
    """
    numbers, names = np.asarray(correct, dtype=np.float64), np.asarray(wells)
    if minus is not None:
        numbers = numbers - np.asarray(minus, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or numbers.shape != names.shape:
        raise UserInputError(f"There are {numbers.shape} scores and {names.shape} wells.")
    _, well_of = np.unique(names, return_inverse=True)
    sums, images = np.bincount(well_of, weights=numbers), np.bincount(well_of).astype(np.float64)
    if images.size < 2:
        return None
    tail = (1 - level) / 2
    reach = 1 - tail ** (1 / images.size)
    if not numbers.any():
        return (0.0 if minus is None else -reach, reach)
    if minus is None and numbers.all():
        return (1 - reach, 1.0)
    generator = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, AT_ONCE // images.size)
    drawn = np.empty(resamples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        chosen = generator.integers(0, images.size, (rows, images.size))
        drawn[start : start + rows] = sums[chosen].sum(axis=1) / images[chosen].sum(axis=1)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


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


@dataclass(frozen=True)
class ClassCounts:
    """How often each of K classes is true, answered, and both: (K,) counts, and their ratios.

    ``recall`` is ``correct / support``, NaN for a class that is never true; ``precision`` is
    ``correct / predicted``, NaN for one that is never answered; ``f1`` is ``2 correct / (support +
    predicted)``, NaN for one that is neither. ``balanced_accuracy`` is the mean recall over the
    classes that are true somewhere (Brodersen et al. 2010), ``macro_f1`` the mean F1 over those
    that are true or answered somewhere, as in scikit-learn's ``f1_score(average="macro")``.
    """

    support: NDArray[np.int64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.int64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    f1: NDArray[np.float64]
    balanced_accuracy: float
    macro_f1: float


def class_counts(truth: ArrayLike, predicted: ArrayLike, classes: int) -> ClassCounts:
    """Count per class. ``truth`` and ``predicted`` are (N,) class numbers from 0 to K - 1.

    It needs memory for K counts, not for K x K as a confusion matrix does.
    """
    truth, predicted = _checked(truth, predicted)
    right = truth[truth == predicted]
    true, answered, correct = (
        np.bincount(codes, minlength=classes) for codes in (truth, predicted, right)
    )
    recall, f1 = _ratio(correct, true), _ratio(2 * correct, true + answered)
    return ClassCounts(
        support=true,
        predicted=answered,
        correct=correct,
        recall=recall,
        precision=_ratio(correct, answered),
        f1=f1,
        balanced_accuracy=float(np.nanmean(recall)),
        macro_f1=float(np.nanmean(f1)),
    )


def log_loss(probability: ArrayLike) -> float:
    """Mean of -log(p) in nats, p the probability that was given to the true class.

    ``probability`` is (N,) in 0..1. A probability below the smallest step of a double at 1
    (2.2e-16) counts as that, as in scikit-learn's ``log_loss``.
    """
    (given,) = _checked(np.asarray(probability, dtype=np.float64), shares=True)
    smallest = np.finfo(np.float64).eps
    return float(-np.log(np.clip(given, smallest, 1 - smallest)).mean())


@dataclass(frozen=True)
class Calibration:
    """Answers by their confidence, in B bins of equal width: (B,) arrays.

    ``edges`` is (B + 1,): bin i is (edges[i], edges[i + 1]], the first includes 0. ``n`` counts the
    answers, ``confidence`` is their mean confidence and ``accuracy`` the share that is right, both
    NaN where ``n`` is 0. ``error`` is the expected calibration error: the gap between confidence
    and accuracy, averaged over answers (Guo et al. 2017, equation 3).
    """

    edges: NDArray[np.float64]
    n: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: float


def calibration(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Calibration:
    """Return answers by confidence. ``confidence`` is (N,) in 0..1, ``correct`` (N,) booleans.

    15 bins as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    given = np.asarray(confidence, dtype=np.float64)
    given, right = _checked(given, correct, shares=True)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, given, side="left") - 1, 0, bins - 1)
    number = np.bincount(bin_of, minlength=bins)
    mean = _ratio(np.bincount(bin_of, weights=given, minlength=bins), number)
    counted = np.bincount(bin_of, weights=right.astype(np.float64), minlength=bins)
    accuracy = _ratio(counted, number)
    gap = np.abs(mean - accuracy) * number
    return Calibration(edges, number, mean, accuracy, float(np.nansum(gap) / number.sum()))


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
