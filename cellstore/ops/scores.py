"""How good predictions are. NumPy only, so that reports need no machine-learning extra.

``truth`` and ``predicted`` are (N,) arrays of class values (numbers or text) of the same kind.
All functions raise ``UserInputError`` where there is nothing to score or lengths differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstore.errors import UserInputError


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Share of predictions that are right."""
    truth, predicted = _pair(truth, predicted)
    return float(np.mean(truth == predicted))


@dataclass(frozen=True)
class ClassCounts:
    """How often each of K classes is true, answered, and both: (K,) counts each."""

    support: NDArray[np.int64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.int64]

    @property
    def recall(self) -> NDArray[np.float64]:
        """``correct / support``; NaN for a class that is never true."""
        return _ratio(self.correct, self.support)

    @property
    def precision(self) -> NDArray[np.float64]:
        """``correct / predicted``; NaN for a class that is never answered."""
        return _ratio(self.correct, self.predicted)

    @property
    def f1(self) -> NDArray[np.float64]:
        """``2 correct / (support + predicted)``; NaN for a class that is neither."""
        return _ratio(2 * self.correct, self.support + self.predicted)


def class_counts(truth: ArrayLike, predicted: ArrayLike, classes: int) -> ClassCounts:
    """Count per class. ``truth`` and ``predicted`` are (N,) class numbers from 0 to K - 1.

    It needs memory for K counts, not for K x K as a confusion matrix does.
    """
    truth, predicted = _pair(truth, predicted)
    right = truth[truth == predicted]
    found = (np.bincount(codes, minlength=classes) for codes in (truth, predicted, right))
    return ClassCounts(*found)


def confusion_matrix(
    truth: ArrayLike, predicted: ArrayLike, labels: Sequence[Any]
) -> NDArray[np.int64]:
    """(K, K) counts: row is the true class, column the predicted one, in the order of ``labels``.

    Raises ``UserInputError`` if a value is not among ``labels``.
    """
    truth, predicted = _pair(truth, predicted)
    names = np.asarray(list(labels))
    rows, columns = _places(truth, names), _places(predicted, names)
    size = len(names)
    return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)


def balanced_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean recall over the classes that occur in ``truth`` (Brodersen et al. 2010)."""
    return balanced_of(_counts(truth, predicted))


def balanced_of(counts: ClassCounts) -> float:
    """Return the balanced accuracy of counts; see :func:`balanced_accuracy`."""
    return float(np.nanmean(counts.recall))


def macro_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean F1 over the classes of ``truth`` and ``predicted``.

    F1 is 2 TP / (2 TP + FP + FN), as in scikit-learn's ``f1_score(average="macro")``.
    """
    return macro_f1_of(_counts(truth, predicted))


def macro_f1_of(counts: ClassCounts) -> float:
    """Return the macro-F1 of counts; see :func:`macro_f1`."""
    return float(np.nanmean(counts.f1))


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


def log_loss(probability: ArrayLike) -> float:
    """Mean of -log(p) in nats, p the probability that was given to the true class.

    ``probability`` is (N,) in 0..1. A probability below the smallest step of a double at 1
    (2.2e-16) counts as that, as in scikit-learn's ``log_loss``.
    """
    given = _shares(probability)
    smallest = np.finfo(np.float64).eps
    return float(-np.log(np.clip(given, smallest, 1 - smallest)).mean())


@dataclass(frozen=True)
class Calibration:
    """Answers by their confidence, in B bins of equal width: (B,) arrays.

    ``edges`` is (B + 1,): bin i is (edges[i], edges[i + 1]], the first includes 0. ``n`` counts the
    answers, ``confidence`` is their mean confidence and ``accuracy`` the share that is right, both
    NaN where ``n`` is 0.
    """

    edges: NDArray[np.float64]
    n: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Gap between confidence and accuracy, averaged over answers."""
        gap = np.abs(self.confidence - self.accuracy) * self.n
        return float(np.nansum(gap) / self.n.sum())


def calibration(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Calibration:
    """Return answers by confidence. ``confidence`` is (N,) in 0..1, ``correct`` (N,) booleans.

    15 bins as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    confidence, correct = _pair(_shares(confidence), correct)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    number = np.bincount(bin_of, minlength=bins)
    said = np.bincount(bin_of, weights=confidence, minlength=bins)
    right = np.bincount(bin_of, weights=correct.astype(np.float64), minlength=bins)
    return Calibration(edges, number, _ratio(said, number), _ratio(right, number))


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over the bins of :func:`calibration`.

    Guo et al. 2017, equation 3.
    """
    return calibration(confidence, correct, bins).error


def majority_baseline(train_truth: ArrayLike, test_truth: ArrayLike) -> tuple[Any, float]:
    """The most frequent class of the training side, and its accuracy on the test side.

    Of equally frequent classes the first in sorted order counts.
    """
    values, counts = np.unique(_filled(train_truth), return_counts=True)
    majority = values[np.argmax(counts)]
    return majority.item(), float(np.mean(_filled(test_truth) == majority))


def _counts(truth: ArrayLike, predicted: ArrayLike) -> ClassCounts:
    truth, predicted = _pair(truth, predicted)
    names, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    return class_counts(codes[: truth.size], codes[truth.size :], names.size)


def _places(values: NDArray[Any], names: NDArray[Any]) -> NDArray[np.int64]:
    order = np.argsort(names, kind="stable")
    found = np.searchsorted(names, values, sorter=order)
    places: NDArray[np.int64] = order[np.minimum(found, names.size - 1)]
    missing = np.unique(values[names[places] != values])
    if missing.size:
        raise UserInputError(f"Not among the classes to be counted: {missing.astype(str).tolist()}")
    return places


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _shares(values: ArrayLike) -> NDArray[np.float64]:
    array = _filled(np.asarray(values, dtype=np.float64))
    if not ((array >= 0) & (array <= 1)).all():
        raise UserInputError("A probability or confidence is not between 0 and 1.")
    return array


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
