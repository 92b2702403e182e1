"""Scores: hand-computed answers, and equality with scikit-learn."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn import metrics

from cellstore.analysis import statistics
from cellstore.analysis.statistics import (
    exchange_test,
    mcnemar_over_wells,
    well_interval,
)
from cellstore.errors import UserInputError

TRUTH = [0, 0, 0, 0, 1, 1]
PREDICTED = [0, 0, 0, 1, 1, 2]


def test_hand_computed_scores() -> None:
    _, balanced, macro_f1 = statistics.class_f1(TRUTH, PREDICTED, 3)
    assert balanced == pytest.approx((3 / 4 + 1 / 2) / 2)
    # F1 of 0: 6 / (6 + 0 + 1); of 1: 2 / (2 + 1 + 1); of 2, never true: 0.
    assert macro_f1 == pytest.approx((6 / 7 + 1 / 2 + 0) / 3)


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
    ours, balanced, macro_f1 = statistics.class_f1(truth, predicted, classes)
    assert balanced == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    assert macro_f1 == pytest.approx(
        metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    )
    _, _, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=np.nan
    )
    assert ours == pytest.approx(f1, nan_ok=True)


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
    assert statistics.calibration(confidence, correct, 10)[1] == pytest.approx(expected)


def test_a_calibrated_prediction_has_no_error_and_edges_are_counted() -> None:
    assert statistics.calibration([1.0, 1.0, 0.0], [True, True, False])[1] == 0
    assert statistics.calibration([1.0, 0.0], [False, True])[1] == 1


def test_calibration_counts_every_answer_once() -> None:
    given, right = [0.9, 0.9, 0.85, 0.2, 0.0], [True, True, False, False, False]
    first, second, last = statistics.calibration(given, right, 10)[0]
    assert first == (0.0, 0.1, 1, 0.0, 0.0)
    assert second[2] == 1  # 0.2 belongs to (0.1, 0.2]
    assert last[2:] == pytest.approx((3, 2.65 / 3, 2 / 3))


def test_log_loss_by_hand() -> None:
    # -(ln 1/2 + ln 1/4 + ln 1) / 3 = (ln 2 + 2 ln 2) / 3 = ln 2
    assert statistics.log_loss([0.5, 0.25, 1.0]) == pytest.approx(np.log(2))


# scipy 1.x, binomtest(x, n).proportion_ci(method="exact"): the interval of Clopper and Pearson. By
# hand: none of n ends at 1 - 0.025 ** (1 / n).
CLOPPER_PEARSON = [
    (7, 20, 0.1539092, 0.5921885),
    (1, 12, 0.0021076, 0.3847962),
    (0, 12, 0.0, 0.2646485),
    (12, 12, 0.7353515, 1.0),
    (6, 6, 0.5407419, 1.0),
]


@pytest.mark.parametrize(("right", "wells", "low", "high"), CLOPPER_PEARSON)
@pytest.mark.parametrize("images", [1, 9])
def test_where_the_images_of_a_well_are_alike_a_well_counts_as_one(
    right: int, wells: int, low: float, high: float, images: int
) -> None:
    well_of = np.repeat(np.arange(wells), images)
    found = well_interval(well_of < right, well_of)
    assert found == pytest.approx((low, high), abs=1e-6)


def test_images_that_are_not_alike_count_more_than_their_well() -> None:
    # 20 wells of 9 images, 3 right in each: wells do not differ, so that r = 0, but one well
    # that is all alike is weighed against these 20: r = 1 / 21. Then 180 images are worth
    # 180 / (1 + 8 / 21) = 130.3.
    wells = np.repeat(np.arange(20), 9)
    worth = 180 / (1 + 8 / 21)
    low, high = well_interval(np.tile([1, 1, 1, 0, 0, 0, 0, 0, 0], 20), wells) or (0, 0)
    assert low == pytest.approx(stats.beta.ppf(0.025, worth / 3, 2 * worth / 3 + 1), abs=1e-9)
    assert high == pytest.approx(stats.beta.ppf(0.975, worth / 3 + 1, 2 * worth / 3), abs=1e-9)
    # 8 wells of 2 images:
    right = np.array([2, 2, 2, 1, 0, 0, 1, 2], dtype=float)
    # The share is 10/16. Deviations from 1.25: four of .75, two of -.25, two of -1.25;
    # their squares add up to 5.5. Design effect: 8/7 * 5.5 / (16 * 0.625 * 0.375) = 1.67619, so
    # r = 0.67619. Wrong images, 0 0 0 1 2 2 1 0, are worth 36 / 10 = 3.6 wells, right ones, 2 2 2
    # 1 0 0 1 2, 100 / 18 = 5.6: (3.6 r + 1) / 4.6 = 0.74658.
    worth = 16 / (1 + 0.74658)
    found = statistics.share_interval(right, np.full(8, 2.0))
    expected = stats.beta.ppf(0.025, 0.625 * worth, 0.375 * worth + 1)
    assert found[0] == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=6, max_size=40))
def test_an_interval_contains_its_share_and_mirrors(counts: list[tuple[int, int]]) -> None:
    images = np.array([right + wrong + 1 for right, wrong in counts], dtype=float)
    right = np.array([right for right, _ in counts], dtype=float)
    low, high = statistics.share_interval(right, images)
    share = right.sum() / images.sum()
    assert 0 <= low <= share <= high <= 1
    assert (low == 0) == (share == 0)
    mirrored = statistics.share_interval(images - right, images)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    # One more right image where images are single never lowers a bound.
    single, ones = (right > 0).astype(float), np.ones(right.size)
    if (single == 0).any():
        more = single.copy()
        more[int(np.argmin(single))] = 1
        before, after = (statistics.share_interval(some, ones) for some in (single, more))
        assert after[0] >= before[0] and after[1] >= before[1]  # noqa: PT018


@settings(max_examples=60, deadline=None)
@given(st.floats(-4, 8), st.floats(-4, 8), st.floats(0.001, 0.999))
def test_shares_of_a_beta_distribution_are_those_of_scipy(a: float, b: float, x: float) -> None:
    first, second = float(np.exp(a)), float(np.exp(b))
    share = statistics.beta_share(x, first, second)
    assert share == pytest.approx(special.betainc(first, second, x), abs=1e-9)
    found = statistics.beta_quantile(x, first, second)
    assert found == pytest.approx(special.betaincinv(first, second, x), abs=1e-9)


def test_interval_over_wells_is_wider_than_over_images() -> None:
    wells = np.repeat(np.arange(10), 20)
    correct = wells % 2 == 0
    by_well = well_interval(correct, wells) or (0, 0)
    by_image = well_interval(correct, np.arange(200)) or (0, 0)
    assert by_well == pytest.approx((0.1870860, 0.8129140), abs=1e-6)  # of 5 of 10
    assert by_image == pytest.approx((0.4286584, 0.5713416), abs=1e-6)  # of 100 of 200
    mixed = np.random.default_rng(5).permutation(200)
    assert well_interval(correct[mixed], wells[mixed]) == by_well


def test_fewer_than_six_wells_have_no_interval() -> None:
    assert well_interval([True, False], ["A01", "A01"]) is None
    assert well_interval([True] * 5, range(5)) is None
    assert well_interval([True] * 6, range(6)) is not None


def test_nothing_to_score_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(UserInputError, match="nothing to score"):
        statistics.class_f1([], [], 2)
    with pytest.raises(UserInputError, match="in one column"):
        statistics.class_f1([0], [0, 1], 2)
    with pytest.raises(UserInputError, match="between 0 and 1"):
        statistics.calibration([1.2], [True])


def test_the_difference_of_two_runs_keeps_the_images_of_a_well_together() -> None:
    wells = np.repeat(np.arange(40), 9)
    easy = np.repeat(np.arange(40) % 2 == 0, 9)  # both are right in every second well
    first, second = easy.copy(), easy.copy()
    second[::90] = False  # and the second errs once in 4 of the easy wells
    low, high = well_interval(first, wells, minus=second) or (0, 0)
    # Where the second is never right alone, its share has the interval 0 to u, and the difference
    # is bounded by (d - l, d + hypot(h - d, 0)) on one side and hypot(d - l, u) on the other.
    alone = well_interval(first & ~second, wells) or (0, 0)
    never = well_interval(np.zeros(360, dtype=bool), wells) or (0, 0)
    d = 4 / 360
    assert high == pytest.approx(alone[1])
    assert low == pytest.approx(d - np.hypot(d - alone[0], never[1]))
    whole = well_interval(first, wells) or (0, 0)
    assert np.ptp(whole) > 2 * (high - low)  # what both find easy does not blur the difference
    assert well_interval(second, wells, minus=first) == pytest.approx((-high, -low))


def test_two_runs_that_never_differ_may_still_do_so_in_other_wells() -> None:
    wells = np.repeat(np.arange(12), 9)
    same = wells % 2 == 0
    assert well_interval(same, wells, minus=same) == pytest.approx((-0.26465, 0.26465), abs=1e-5)
    assert well_interval(same[:9], wells[:9], minus=same[:9]) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 20))
def test_the_interval_of_a_difference_contains_it(seed: int, wells: int) -> None:
    rng = np.random.default_rng(seed)
    well_of = rng.integers(0, wells, 120)
    first, second = rng.random((2, 120)) < rng.random((2, 1))
    low, high = well_interval(first, well_of, minus=second) or (-1, 1)
    assert -1 <= low <= first.mean() - second.mean() <= high <= 1


def test_mcnemar_by_hand() -> None:
    # Five images, a well each: the first run alone is right in 4, the second alone in 1.
    # Two-sided: 2 * (1 + 5) / 2**5 = 12/32.
    first, second = [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]
    found = mcnemar_over_wells(first, second, list("abcde"))
    assert (found.wells_first, found.wells_second, found.p_value) == (4, 1, 12 / 32)
    # Two wells of the same images gain 3 and 0: by chance 3 or -3, each as far from 0.
    found = mcnemar_over_wells(first, second, list("aaabb"))
    assert (found.wells_first, found.wells_second, found.p_value) == (1, 0, 1.0)
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
