"""Scores: hand-computed answers, and equality with scikit-learn."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from cellstore.analysis import statistics
from cellstore.analysis.statistics import (
    bootstrap_interval,
    exchange_test,
    mcnemar_over_wells,
)
from cellstore.errors import UserInputError

TRUTH = [0, 0, 0, 0, 1, 1]
PREDICTED = [0, 0, 0, 1, 1, 2]


def test_hand_computed_scores() -> None:
    counts = statistics.class_counts(TRUTH, PREDICTED, 3)
    assert counts.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    # F1 of 0: 6 / (6 + 0 + 1); of 1: 2 / (2 + 1 + 1); of 2, never true: 0.
    assert counts.macro_f1 == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Class numbers that are true and answered; not every class need occur on either side."""
    classes = draw(st.integers(2, 6))
    codes = st.lists(st.integers(0, classes - 1), min_size=1, max_size=30)
    truth = np.array(draw(codes))
    said = st.lists(st.integers(0, classes - 1), min_size=truth.size, max_size=truth.size)
    return truth, np.array(draw(said)), classes


# scikit-learn says that some predicted classes are never true, or that there is one class only:
# that is what is compared.
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@settings(max_examples=60, deadline=None)
@given(answers())
def test_scores_are_those_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray, int]) -> None:
    truth, predicted, classes = drawn
    labels = range(classes)
    counts = statistics.class_counts(truth, predicted, classes)
    assert counts.balanced_accuracy == pytest.approx(
        metrics.balanced_accuracy_score(truth, predicted)
    )
    assert counts.macro_f1 == pytest.approx(
        metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    )
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=np.nan
    )
    assert counts.support.tolist() == support.tolist()
    assert counts.recall == pytest.approx(recall, nan_ok=True)
    assert counts.precision == pytest.approx(precision, nan_ok=True)
    assert counts.f1 == pytest.approx(f1, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(3, 7))
def test_log_loss_is_that_of_scikit_learn(seed: int, size: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    truth, table = rng.integers(0, classes, size), rng.random((size, classes)) ** 4 + 1e-9
    table /= table.sum(axis=1, keepdims=True)
    table[0] = np.eye(classes)[(truth[0] + 1) % classes]  # sure, and wrong: not endless
    ours = statistics.log_loss(table[np.arange(size), truth])
    assert ours == pytest.approx(metrics.log_loss(truth, table, labels=range(classes)))


def test_calibration_error_by_hand() -> None:
    # Ten bins: (0.8, 0.9] holds 0.9, 0.9, 0.85 of which 2 are right; (0.1, 0.2] holds 0.2, wrong.
    confidence, correct = [0.9, 0.9, 0.85, 0.2], [True, True, False, False]
    expected = 3 / 4 * abs(2 / 3 - 2.65 / 3) + 1 / 4 * 0.2
    assert statistics.calibration(confidence, correct, 10).error == pytest.approx(expected)


def test_a_calibrated_prediction_has_no_error_and_edges_are_counted() -> None:
    assert statistics.calibration([1.0, 1.0, 0.0], [True, True, False]).error == 0
    assert statistics.calibration([1.0, 0.0], [False, True]).error == 1


def test_calibration_counts_every_answer_once() -> None:
    found = statistics.calibration(
        [0.9, 0.9, 0.85, 0.2, 0.0], [True, True, False, False, False], 10
    )
    assert found.n.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 3, 0]  # 0.2 belongs to (0.1, 0.2]
    assert found.confidence[8] == pytest.approx(2.65 / 3)
    assert found.accuracy[8] == pytest.approx(2 / 3)
    assert np.isnan(found.accuracy[2])


def test_log_loss_by_hand() -> None:
    # -(ln 1/2 + ln 1/4 + ln 1) / 3 = (ln 2 + 2 ln 2) / 3 = ln 2
    assert statistics.log_loss([0.5, 0.25, 1.0]) == pytest.approx(np.log(2))


def test_interval_does_not_depend_on_order_and_covers_the_accuracy() -> None:
    rng = np.random.default_rng(5)
    wells = np.repeat([f"w{i:02}" for i in range(20)], 9)
    correct = rng.random(180) < np.repeat(rng.random(20), 9)
    low, high = bootstrap_interval(correct, wells, seed=1) or (1, 0)
    mixed = rng.permutation(180)
    assert bootstrap_interval(correct[mixed], wells[mixed], seed=1) == (low, high)
    assert bootstrap_interval(correct, wells, seed=2) != (low, high)
    assert 0 <= low < correct.mean() < high <= 1


def test_interval_over_wells_is_wider_than_over_images() -> None:
    wells = np.repeat(np.arange(10), 20)
    correct = wells % 2 == 0
    by_well = bootstrap_interval(correct, wells) or (0, 0)
    by_image = bootstrap_interval(correct, np.arange(200)) or (0, 0)
    # Standard errors: sqrt(.25 / 10) over wells, sqrt(.25 / 200) over images.
    assert np.ptp(by_well) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 10), rel=0.1)
    assert np.ptp(by_image) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.15)


def test_no_error_in_a_few_wells_does_not_mean_that_there_are_none() -> None:
    wells = np.repeat(np.arange(12), 9)
    # The chance of no success in 12 wells is 2.5 % where a success has the chance 0.2646.
    none = bootstrap_interval(np.zeros(108, dtype=bool), wells)
    assert none == pytest.approx((0, 0.26465), abs=1e-5)
    assert bootstrap_interval(np.ones(108, dtype=bool), wells) == pytest.approx(
        (0.73535, 1), abs=1e-5
    )


def test_one_well_has_no_interval() -> None:
    assert bootstrap_interval([True, False], ["A01", "A01"]) is None


def test_nothing_to_score_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserInputError, match="nothing to score"):
        statistics.class_counts([], [], 2)
    with pytest.raises(UserInputError, match="in one column"):
        statistics.class_counts([0], [0, 1], 2)
    with pytest.raises(UserInputError, match="between 0 and 1"):
        statistics.calibration([1.2], [True])


def test_the_difference_of_two_runs_keeps_the_images_of_a_well_together() -> None:
    wells = np.repeat(np.arange(40), 9)
    easy = np.repeat(np.arange(40) % 2 == 0, 9)  # both are right in every second well
    first, second = easy.copy(), easy.copy()
    second[::90] = False  # and the second errs once in 4 of the easy wells
    low, high = bootstrap_interval(first, wells, minus=second) or (0, 0)
    # A well of 40 gives 1/9 with the chance 1/10: 1/90 on average, (1/9) sqrt(.09 / 40) apart.
    assert first.mean() - second.mean() == pytest.approx(1 / 90)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.09 / 40) / 9, rel=0.15)
    assert 0 <= low < 1 / 90 < high
    alone = bootstrap_interval(first, wells) or (0, 0)
    assert np.ptp(alone) > 10 * (high - low)  # what both find easy does not blur the difference
    assert bootstrap_interval(second, wells, seed=0, minus=first) == pytest.approx((-high, -low))


def test_two_runs_that_never_differ_may_still_do_so_in_other_wells() -> None:
    wells = np.repeat(np.arange(12), 9)
    same = wells % 2 == 0
    assert bootstrap_interval(same, wells, minus=same) == pytest.approx(
        (-0.26465, 0.26465), abs=1e-5
    )
    assert bootstrap_interval(same[:9], wells[:9], minus=same[:9]) is None


def test_mcnemar_by_hand() -> None:
    # Five images, a well each: the first run alone is right in 4, the second alone in 1.
    # Two-sided: 2 * (1 + 5) / 2**5 = 12/32.
    first, second = [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]
    found = mcnemar_over_wells(first, second, list("abcde"))
    assert (found.first, found.second, found.p_value) == (4, 1, 12 / 32)
    # Two wells of the same images gain 3 and 0: by chance 3 or -3, each as far from 0.
    found = mcnemar_over_wells(first, second, list("aaabb"))
    assert (found.first, found.second, found.p_value) == (1, 0, 1.0)
    # Gains of 4, 1, 1 and -1 add up to 5. Of 16 choices of signs 4 + 1 + 1 + 1 gives 7 and the
    # three with one minus among the ones give 5; as many are below: 8/16.
    assert exchange_test([4, 1, 1, -1]) == 8 / 16
    assert exchange_test([2, -1, -1]) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_with_an_image_per_well_it_is_mcnemars_exact_test(more: int, less: int) -> None:
    expected = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert exchange_test([1] * more + [-1] * less) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_every_choice_of_signs_counts_once(gains: list[int]) -> None:
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True)))
        for signs in product((1, -1), repeat=len(gains))
    ]
    expected = sum(value >= abs(sum(gains)) for value in sums) / len(sums)
    assert exchange_test(gains) == pytest.approx(expected)


def test_many_wells_are_no_trouble() -> None:
    gains = np.repeat([1, -1], [2_600, 2_400])
    assert exchange_test(gains) == pytest.approx(stats.binomtest(2_600, 5_000).pvalue)
    assert exchange_test(np.ones(3_000)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_resampling_all_at_once_is_resampling_one_by_one(seed: int, wells: int) -> None:
    rng = np.random.default_rng(seed)
    well_of = rng.integers(0, wells, 90)
    correct = rng.random(90) < 0.5
    ids, places = np.unique(well_of, return_inverse=True)
    right, images = np.bincount(places, weights=correct), np.bincount(places)
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = [draw.integers(0, ids.size, ids.size) for _ in range(200)]
    drawn = [right[rows].sum() / images[rows].sum() for rows in chosen]
    expected = tuple(np.quantile(drawn, [0.025, 0.975]))
    found = bootstrap_interval(correct, well_of, seed=seed, resamples=200)
    assert found == pytest.approx(expected)
