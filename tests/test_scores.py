"""Scores: hand-computed answers, and equality with scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from cellstore.errors import UserInputError
from cellstore.ops import scores

TRUTH = ["a", "a", "a", "a", "b", "b"]
PREDICTED = ["a", "a", "a", "b", "b", "c"]


def random_labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 5, 200), rng.integers(0, 6, 200)


def test_hand_computed_scores() -> None:
    assert scores.accuracy(TRUTH, PREDICTED) == pytest.approx(4 / 6)
    assert scores.balanced_accuracy(TRUTH, PREDICTED) == pytest.approx((3 / 4 + 1 / 2) / 2)
    # F1 of a: 6 / (6 + 0 + 1); of b: 2 / (2 + 1 + 1); of c, never true: 0.
    assert scores.macro_f1(TRUTH, PREDICTED) == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)
    assert scores.confusion_matrix(TRUTH, PREDICTED, ["c", "b", "a"]).tolist() == [
        [0, 0, 0],
        [1, 1, 0],
        [0, 1, 3],
    ]


# scikit-learn says that some predicted classes are never true: that is what is compared.
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_scores_are_those_of_scikit_learn() -> None:
    truth, predicted = random_labels()
    assert scores.accuracy(truth, predicted) == metrics.accuracy_score(truth, predicted)
    assert scores.balanced_accuracy(truth, predicted) == pytest.approx(
        metrics.balanced_accuracy_score(truth, predicted)
    )
    assert scores.macro_f1(truth, predicted) == pytest.approx(
        metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    )
    ours = scores.confusion_matrix(truth, predicted, range(6))
    assert (ours == metrics.confusion_matrix(truth, predicted, labels=range(6))).all()


def test_top_k_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    truth, table = np.arange(60) % 6, rng.random((60, 6))
    for k in (1, 2, 5):
        expected = metrics.top_k_accuracy_score(truth, table, k=k, labels=range(6))
        assert scores.top_k_accuracy(truth, table, k) == pytest.approx(expected)


def test_top_k_takes_the_lower_index_of_equals() -> None:
    table = [[0.5, 0.5, 0.0]]
    assert scores.top_k_accuracy([0], table, 1) == 1
    assert scores.top_k_accuracy([1], table, 1) == 0
    many = np.full((1, 300), 1 / 300)
    assert [scores.top_k_accuracy([i], many, 5) for i in (0, 4, 5, 299)] == [1, 1, 0, 0]


def test_calibration_error_by_hand() -> None:
    # Ten bins: (0.8, 0.9] holds 0.9, 0.9, 0.85 of which 2 are right; (0.1, 0.2] holds 0.2, wrong.
    confidence, correct = [0.9, 0.9, 0.85, 0.2], [True, True, False, False]
    expected = 3 / 4 * abs(2 / 3 - 2.65 / 3) + 1 / 4 * 0.2
    assert scores.expected_calibration_error(confidence, correct, 10) == pytest.approx(expected)


def test_a_calibrated_prediction_has_no_error_and_edges_are_counted() -> None:
    assert scores.expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0
    assert scores.expected_calibration_error([1.0, 0.0], [False, True]) == 1


def test_interval_does_not_depend_on_order_and_covers_the_accuracy() -> None:
    rng = np.random.default_rng(5)
    wells = np.repeat([f"w{i:02}" for i in range(20)], 9)
    correct = rng.random(180) < np.repeat(rng.random(20), 9)
    low, high = scores.bootstrap_interval(correct, wells, seed=1) or (1, 0)
    mixed = rng.permutation(180)
    assert scores.bootstrap_interval(correct[mixed], wells[mixed], seed=1) == (low, high)
    assert scores.bootstrap_interval(correct, wells, seed=2) != (low, high)
    assert 0 <= low < correct.mean() < high <= 1


def test_interval_over_wells_is_wider_than_over_images() -> None:
    wells = np.repeat(np.arange(10), 20)
    correct = wells % 2 == 0
    by_well = scores.bootstrap_interval(correct, wells) or (0, 0)
    by_image = scores.bootstrap_interval(correct, np.arange(200)) or (0, 0)
    # Standard errors: sqrt(.25 / 10) over wells, sqrt(.25 / 200) over images.
    assert np.ptp(by_well) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 10), rel=0.1)
    assert np.ptp(by_image) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.15)


def test_no_error_in_a_few_wells_does_not_mean_that_there_are_none() -> None:
    wells = np.repeat(np.arange(12), 9)
    # The chance of no success in 12 wells is 2.5 % where a success has the chance 0.2646.
    none = scores.bootstrap_interval(np.zeros(108, dtype=bool), wells)
    assert none == pytest.approx((0, 0.26465), abs=1e-5)
    assert scores.bootstrap_interval(np.ones(108, dtype=bool), wells) == pytest.approx(
        (0.73535, 1), abs=1e-5
    )


def test_one_well_has_no_interval() -> None:
    assert scores.bootstrap_interval([True, False], ["A01", "A01"]) is None


def test_majority_is_that_of_the_training_side() -> None:
    assert scores.majority_baseline(["b", "b", "a"], ["a", "a", "b", "a"]) == ("b", 0.25)
    assert scores.majority_baseline([2, 1], [1])[0] == 1


def test_nothing_to_score_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserInputError, match="nothing to score"):
        scores.accuracy([], [])
    with pytest.raises(UserInputError, match="on one side"):
        scores.macro_f1(["a"], ["a", "b"])
    with pytest.raises(UserInputError, match="between 0 and 1"):
        scores.expected_calibration_error([1.2], [True])
    with pytest.raises(UserInputError, match="not among"):
        scores.top_k_accuracy([3], [[0.5, 0.5]])
    with pytest.raises(UserInputError, match=r"Not among the classes.*'z'"):
        scores.confusion_matrix(["z"], ["a"], ["a"])
