"""How good predictions are. NumPy only, so that reports need no machine-learning extra.

``truth`` and ``predicted`` are (N,) arrays of class values (numbers or text) of the same kind.
All functions raise ``UserInputError`` where there is nothing to score or lengths differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Share of predictions that are right."""
    truth, predicted = _pair(truth, predicted)
    return float(np.mean(truth == predicted))


def confusion_matrix(
    truth: ArrayLike, predicted: ArrayLike, labels: Sequence[Any]
) -> NDArray[np.int64]:
    """(K, K) counts: row is the true class, column the predicted one, in the order of ``labels``.

    Raises ``UserInputError`` if a value is not among ``labels``.
    """
    truth, predicted = _pair(truth, predicted)
    index = {label: position for position, label in enumerate(labels)}
    missing = (set(truth.tolist()) | set(predicted.tolist())) - index.keys()
    if missing:
        raise UserInputError(f"Not among the classes to be counted: {sorted(map(str, missing))}.")
    rows = np.array([index[value] for value in truth.tolist()])
    columns = np.array([index[value] for value in predicted.tolist()])
    size = len(index)
    return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)


def balanced_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean recall over the classes that occur in ``truth`` (Brodersen et al. 2010)."""
    counts = _counts(truth, predicted)
    true_count = counts.sum(axis=1)
    present = true_count > 0
    return float(np.mean(np.diag(counts)[present] / true_count[present]))


def macro_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean F1 over the classes of ``truth`` and ``predicted``.

    F1 is 2 TP / (2 TP + FP + FN), as in scikit-learn's ``f1_score(average="macro")``.
    """
    counts = _counts(truth, predicted)
    both = counts.sum(axis=1) + counts.sum(axis=0)
    return float(np.mean(2 * np.diag(counts) / both))


def top_k_accuracy(truth: ArrayLike, probabilities: ArrayLike, k: int = 5) -> float:
    """Share of rows whose true class is among the ``k`` most probable.

    ``truth`` is (N,) class indices, ``probabilities`` (N, K). Of equal probabilities the lower
    index comes first.
    """
    table = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(truth)
    if table.ndim != 2 or k < 1:
        raise UserInputError("Top-k needs a (rows, classes) table and k of 1 or more.")
    _pair(truth, table[:, 0])
    if not np.isin(truth, np.arange(table.shape[1])).all():
        raise UserInputError(f"A true class is not among the {table.shape[1]} of the table.")
    first = np.argsort(-table, axis=1, kind="stable")[:, :k]
    return float(np.mean((first == truth[:, None]).any(axis=1)))


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over bins of equal width.

    ``confidence`` is (N,) in 0..1, ``correct`` (N,) booleans. Bins are (lower, upper], the
    first includes 0; 15 bins as in Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017, equation 3.
    """
    confidence, correct = _pair(confidence, correct)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise UserInputError("A confidence is not between 0 and 1.")
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / confidence.size)


def bootstrap_interval(
    correct: ArrayLike,
    wells: ArrayLike,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of an accuracy, drawing whole wells with replacement.

    Images of a well are not independent, so wells are what is drawn (Field and Welsh 2007).
    ``correct`` is (N,) booleans, one per image, and ``wells`` (N,) the well of each. The same
    seed gives the same interval whatever the order of the images. Where all images are right, or
    none is, all draws are alike and say nothing; then the interval is that of Clopper and Pearson
    (1934) for as many wells. ``None`` for a single well: there is nothing to draw from.
    """
    correct, wells = _pair(correct, wells)
    names, well_of = np.unique(wells, return_inverse=True)
    if names.size < 2:
        return None
    right = np.bincount(well_of, weights=correct).astype(np.float64)
    images = np.bincount(well_of).astype(np.float64)
    tail = (1 - level) / 2
    if not right.any() or (right == images).all():
        reach = 1 - tail ** (1 / names.size)
        return (1 - reach, 1.0) if right.any() else (0.0, reach)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = [_resample(generator, right, images) for _ in range(resamples)]
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def majority_baseline(train_truth: ArrayLike, test_truth: ArrayLike) -> tuple[Any, float]:
    """The most frequent class of the training side, and its accuracy on the test side.

    Of equally frequent classes the first in sorted order counts.
    """
    values, counts = np.unique(_filled(train_truth), return_counts=True)
    majority = values[np.argmax(counts)]
    return majority.item(), float(np.mean(_filled(test_truth) == majority))


def _resample(
    generator: np.random.Generator, right: NDArray[np.float64], images: NDArray[np.float64]
) -> float:
    drawn = generator.integers(0, right.size, right.size)
    return float(right[drawn].sum() / images[drawn].sum())


def _counts(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.int64]:
    truth, predicted = _pair(truth, predicted)
    labels = sorted(set(truth.tolist()) | set(predicted.tolist()))
    return confusion_matrix(truth, predicted, labels)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = _filled(first), _filled(second)
    if one.shape != two.shape:
        raise UserInputError(
            f"There are {one.shape} values on one side and {two.shape} on the other."
        )
    return one, two


def _filled(values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise UserInputError("There is nothing to score; predict some images first.")
    return array
