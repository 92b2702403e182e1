"""Dose curves: known parameters, published numbers, and what is said where there is no EC50."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import least_squares

from cellstore.analysis.dose_curves import (
    DoseCurve,
    along_change,
    dose_trend,
    effect_curve,
    fit_curve,
    lowest_active,
)
from cellstore.report.drawing import draw_curve

# Data set "ryegrass" of the R package drc: root length in cm by ferulic acid in mM (Inderjit,
# Streibig and Olofsdotter, Physiologia Plantarum 114, 2002). The numbers of the tests are those of
# drm(rootl ~ conc, data = ryegrass, fct = LL.4()), coef() and vcov(), in the documentation of
# drc; drc calls the response without treatment d, the one at high doses c.
DOSES = np.repeat([0.94, 1.88, 3.75, 7.5, 15, 30], 3)
ROOTS = np.array(
    [8.3555556, 6.9142857, 7.75, 6.8714286, 6.45, 5.9222222, 1.925, 2.8857143, 4.2333333, 1.1875,
     0.8571429, 1.0571429, 0.6875, 0.525, 0.825, 0.25, 0.22, 0.44]
)  # fmt: skip
UNTREATED = np.array([7.58, 8.0, 8.3285714, 7.25, 7.375, 7.9625])
TESTED = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])


def noisy(curve: DoseCurve, spread: float, doses: np.ndarray = TESTED, seed: int = 4):
    rng = np.random.default_rng(seed)
    at = np.repeat(doses, 3)
    return (
        at,
        curve.at(at) + rng.normal(0, spread, at.size),
        curve.at(np.zeros(16)) + rng.normal(0, spread, 16),
    )


@pytest.mark.parametrize(
    "parameters", [(1.0, 5.0, 1.5, 2.0), (0.0, -3.0, 0.7, 0.8), (7.0, 1.0, 6.0, 5.0)]
)
def test_data_without_noise_give_their_parameters(parameters: tuple[float, ...]) -> None:
    true = DoseCurve(*parameters)
    found = fit_curve(TESTED, true.at(TESTED), true.at(np.zeros(5)))
    assert (found.bottom, found.top, found.slope, found.ec50) == pytest.approx(parameters, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((true.halfway, true.halfway), rel=1e-6)
    assert found.note is None
    assert found.p_flat < 1e-30
    low, high = found.band(TESTED)
    assert low == pytest.approx(true.at(TESTED))
    assert high == pytest.approx(true.at(TESTED))
    # The formula: half way between bottom and top at the EC50, bottom at dose 0.
    assert found.at([0, found.ec50]) == pytest.approx(
        [parameters[0], (parameters[0] + parameters[1]) / 2]
    )


def test_published_numbers_of_ryegrass() -> None:
    found = fit_curve(DOSES, ROOTS, UNTREATED)
    assert found.slope == pytest.approx(2.98221907, rel=1e-5)
    assert found.top == pytest.approx(0.48141319, rel=1e-4)
    assert found.bottom == pytest.approx(7.79295829, rel=1e-5)
    assert found.ec50 == pytest.approx(3.05795497, rel=1e-5)
    # vcov(corr = TRUE) of c and d, d and e, b and c; drc takes second derivatives for it.
    error = np.sqrt(np.diag(found.covariance))
    related = found.covariance / np.outer(error, error)
    assert [related[1, 0], related[0, 2], related[3, 1]] == pytest.approx(
        [-0.1177611, -0.36743943, 0.4662936], abs=0.03
    )
    assert found.trend < -0.9
    assert found.trend_p == 1e-4
    assert lowest_active(DOSES, ROOTS, UNTREATED)[0] == 1.88


def test_interval_ends_where_the_best_other_curve_is_just_too_bad() -> None:
    found = fit_curve(DOSES, ROOTS, UNTREATED)
    doses = np.concatenate((np.zeros(6), DOSES))
    roots = np.concatenate((UNTREATED, ROOTS))

    def squares(ec50: float) -> float:
        """Of the best curve with that EC50, by another way: all other parameters are free."""

        def left(point: np.ndarray) -> np.ndarray:
            return DoseCurve(point[0], point[1], np.exp(point[2]), ec50).at(doses) - roots

        return 2 * least_squares(left, [7.5, 0.5, 1.0], xtol=1e-12, ftol=1e-12).cost

    # The treated wells vary more than the controls, so the variance is theirs: 18 wells, 3 numbers.
    about = (ROOTS - found.at(DOSES)) ** 2
    assert about.sum() / 15 > UNTREATED.var(ddof=1)
    for end in (found.low, found.high):
        ratio = (squares(end) - squares(found.ec50)) / (about.sum() / 15)
        assert ratio == pytest.approx(stats.f.ppf(0.95, 1, 15), rel=1e-4)
    low, high = found.band([0.0])
    assert found.covariance[0, 0] == pytest.approx(
        ((high[0] - low[0]) / 2 / stats.t.ppf(0.975, 15)) ** 2
    )


def test_the_variance_is_that_of_all_wells_where_controls_vary_as_much() -> None:
    curve = DoseCurve(0.0, 8.0, 1.2, 2.0)
    controls = np.tile([-2.0, 2.0], 10)
    responses = curve.at(TESTED) + 0.1 * np.array([1, -1, 1, 1, -1, 1])
    found = fit_curve(TESTED, responses, controls)
    squares = ((responses - found.at(TESTED)) ** 2).sum() + ((controls - found.bottom) ** 2).sum()
    assert found.reach == stats.t.ppf(0.975, 22)
    few = fit_curve(TESTED, responses, controls[:2])
    assert few.reach == stats.t.ppf(0.975, 4)
    jacobian = np.linalg.inv(found.covariance / (squares / 22))
    assert jacobian[0, 0] == pytest.approx(
        20 + ((1 - (found.at(TESTED) - found.bottom) / (found.top - found.bottom)) ** 2).sum()
    )


def test_a_change_of_unit_or_scale_changes_nothing_else() -> None:
    curve = DoseCurve(0.0, 8.0, 1.2, 2.0)
    doses, responses, controls = noisy(curve, 1.0)
    one = fit_curve(doses, responses, controls)
    other = fit_curve(1000 * doses, -2 * responses, -2 * controls)
    assert one.low < 2.0 < one.high
    for name in ("ec50", "low", "high"):
        assert getattr(other, name) == pytest.approx(1000 * getattr(one, name), rel=1e-4)
    assert other.p_flat == pytest.approx(one.p_flat, rel=1e-3)
    assert (other.trend, other.trend_p) == (pytest.approx(-one.trend), one.trend_p)


@pytest.mark.parametrize(
    ("curve", "spread", "reason", "known"),
    [
        (DoseCurve(0.0, 0.0, 1.0, 1.0), 1.0, "no response: a curve fits no better than a", (0, 0)),
        (DoseCurve(0.0, 40.0, 1.5, 60.0), 0.05, "the EC50 lies above the tested doses", (1, 0)),
        (DoseCurve(0.0, 40.0, 2.0, 0.02), 0.3, "the EC50 lies below the tested doses", (0, 1)),
        (DoseCurve(0.0, 10.0, 1.0, 15.0), 0.3, "the EC50 may lie above the tested doses", (1, 0)),
        (DoseCurve(0.0, 8.0, 0.7, 0.11), 0.3, "the EC50 may lie below the tested doses", (0, 1)),
        (DoseCurve(0.0, 8.0, 0.3, 2.0), 1.0, "the EC50 may lie below or above the", (0, 0)),
    ],
)
def test_an_ec50_that_is_not_determined_says_why(
    curve: DoseCurve, spread: float, reason: str, known: tuple[int, int]
) -> None:
    found = fit_curve(*noisy(curve, spread))
    assert found.ec50 is None
    assert found.note.startswith(reason)
    assert (found.low is not None, found.high is not None) == tuple(map(bool, known))
    if found.low is not None:
        assert 0.1 < found.low <= 30.0
        assert found.low < curve.halfway
    assert np.isfinite(found.at(TESTED)).all()


def test_too_little_for_a_curve() -> None:
    rise = np.arange(3.0)
    found = fit_curve([1, 2, 4], rise, np.zeros(8))
    assert found.note == "a curve needs 4 doses, there are 3"
    assert found.trend > 0
    assert np.isnan(found.at([1.0])).all()
    assert np.isnan(found.band([1.0])).all()
    assert fit_curve([1], [1.0]).note == "a curve needs 4 doses, there is 1"
    assert "5 wells" in fit_curve([1, 2, 4, 8], np.arange(4.0)).note
    assert fit_curve(TESTED, np.full(6, 2.0), np.full(4, 2.0)).note.startswith("no response")
    # A missing response is left out, with its dose.
    assert fit_curve([1, 2, 4, 8], [0.0, 1.0, 2.0, np.nan], np.zeros(8)).note.endswith("are 3")
    # A well with the dose 0 is neither a control nor on a scale of logarithms.
    assert fit_curve([0, 1, 2, 4], np.arange(4.0), np.zeros(8)).note.endswith("there are 3")
    assert lowest_active([0, 1], [9.0, 0.1], np.tile([-1.0, 1.0], 8))[0] is None


def test_the_trend_of_few_wells_is_exact() -> None:
    assert dose_trend([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == (pytest.approx(1), 2 / 120)
    assert dose_trend([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]) == (pytest.approx(-1), 2 / 120)
    # The wells of dose 2 are the highest: so are they in 4 of 24 orders, and the lowest in 4.
    assert dose_trend([1, 1, 2, 2], [0.1, 0.5, 3, 4]) == (pytest.approx(0.8944272), 8 / 24)
    assert dose_trend([3, 3], [1, 2]) is None
    assert dose_trend([1, 2], [7, 7]) is None
    doses = np.repeat(TESTED, 3)
    far = dose_trend(doses, np.arange(18.0))
    assert far[0] > 0.9
    assert far[1] == 1e-4  # 1 of 10,000: the smallest there is
    responses = np.random.default_rng(1).normal(size=18)
    some = dose_trend(doses, responses)
    assert some == dose_trend(doses, responses)
    # Drawn orders come near to what Student's t says of so many wells.
    assert some[1] == pytest.approx(stats.spearmanr(doses, responses).pvalue, abs=0.02)
    # Controls that differ from all treated wells alike are no trend.
    assert fit_curve(doses, responses, np.full(30, -9.0)).trend_p == some[1]


def test_the_lowest_active_dose_and_all_above_it_differ_from_the_controls() -> None:
    controls = np.tile([-1.0, 1.0], 8)  # standard deviation 1.03
    doses = np.repeat([1.0, 2.0, 4.0], 2)
    # Wells of a dose vary less than controls: all have one variance, about the means of the doses.
    values = [0.1, 0.2, 3.0, 3.4, 9.0, 9.5]
    variance = (16 + 0.01 / 2 + 0.16 / 2 + 0.25 / 2) / (15 + 3)
    by_hand = 2 * stats.t.sf(3.2 / np.sqrt(variance * (1 / 2 + 1 / 16)), 18)
    assert lowest_active(doses, values, controls) == (2.0, pytest.approx(by_hand), None)
    # They vary more: the test of Welch.
    apart = [8.0, 16.0]
    welch = stats.ttest_ind(apart, controls, equal_var=False).pvalue
    assert lowest_active([1.0, 1.0], apart, controls)[:2] == (None, pytest.approx(welch))
    # Two wells of a plate count as one where there are several plates.
    plates = [1, 1, 2, 2]
    one = lowest_active([1.0] * 4, [4.0, 6.0, 5.5, 6.5], controls, plates)
    assert one == lowest_active([1.0] * 2, [5.0, 6.0], controls)
    assert lowest_active([1.0] * 2, apart, controls, [7, 7])[1] == pytest.approx(welch)
    # One well at a dose: a t test with the spread of the controls.
    alone = lowest_active([1.0], [5.0], controls)
    expected = 2 * stats.t.sf(5 / np.sqrt(16 / 15 * (1 + 1 / 16)), 15)
    assert alone == (1.0, pytest.approx(expected), None)
    # A dose that differs does not count below one that does not, nor one on the other side.
    hidden = lowest_active(doses, [9.0, 9.0, 0.0, 0.1, 9.0, 9.5], controls)
    turned = lowest_active(doses, [0.0, 0.1, -9.0, -9.1, 9.0, 9.5], controls)
    assert (hidden[0], turned[0]) == (4.0, 4.0)
    none = lowest_active(doses, [9.0, 9.0, 9.0, 9.0, 0.1, 0.2], controls)
    assert none[0] is None
    assert none[1] > 0.05
    assert "highest dose" in none[2]
    assert "needs 4 control wells" in lowest_active(doses, np.zeros(6), [1.0, 2.0])[2]


def test_the_picture_of_a_curve_says_what_is_seen() -> None:
    found = fit_curve(DOSES, ROOTS, UNTREATED)
    given = (DOSES.tolist(), [*ROOTS[:-1].tolist(), np.nan], UNTREATED.tolist())
    picture = draw_curve("c", found, *given, unit="mM", label='<script>"root" & length')
    alt = re.search(r'aria-label="([^"]*)"', picture)[1]
    assert "by dose, 17 wells and 6 control wells. EC50 3.06 mM (95 %: 2.66 to 3.51)." in alt
    assert "<script" not in picture
    flat = fit_curve(*noisy(DoseCurve(0.0, 0.0, 1.0, 1.0), 1.0))
    plain = draw_curve("f", flat, *noisy(DoseCurve(0.0, 0.0, 1.0, 1.0), 1.0))
    assert "EC50 not determined: no response: a curve fits no better than" in plain
    assert (picture.count("PolyCollection"), plain.count("PolyCollection")) == (1, 0)  # the band
    assert draw_curve("e", DoseCurve(), [1.0], [np.nan]) == ""


def test_the_effect_of_a_dose_is_how_far_wells_move_in_its_direction() -> None:
    controls = [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]
    treated = [[0.0, 2.0], [0.0, 4.0], [0.0, 8.0], [np.nan, np.nan]]
    moved = along_change(controls + treated, [np.nan] * 4 + [1.0, 3.0, 9.0, 9.0])
    # The direction is the second axis, on which controls have the standard deviation 2 / sqrt(3).
    unit = 2 / np.sqrt(3)
    assert moved[:4] == pytest.approx(np.array([1, -1, -1, 1]) / unit)
    assert moved[4:7] == pytest.approx(np.array([2, 4, 8]) / unit)
    assert np.isnan(moved[7])
    # Of a well of the two highest doses the direction is that of the others.
    alone = along_change([[1.0, 0], [-1.0, 0], [3.0, 0], [0, 5.0]], [np.nan, np.nan, 1.0, 3.0])
    assert alone[2:] == pytest.approx([0, 0])


def test_an_effect_without_one_direction_says_so() -> None:
    random = np.random.default_rng(1)
    doses = np.r_[np.full(12, np.nan), np.tile(3.0 ** np.arange(6), 4)]
    strength = np.nan_to_num(1 / (1 + 9 / doses))
    values = random.normal(size=(36, 40))
    change = 8 * random.normal(size=40)
    together = values + strength[:, None] * change
    curve, moved = effect_curve(3 * strength + random.normal(size=36) / 9, together, doses)
    assert curve.ec50 == pytest.approx(9, rel=0.3)
    assert np.corrcoef(moved, strength)[0, 1] > 0.9
    # As far from the controls, each well in a direction of its own.
    apart = values + strength[:, None] * 8 * random.normal(size=(36, 40))
    curve, _ = effect_curve(3 * strength + random.normal(size=36) / 9, apart, doses)
    assert curve.ec50 is None
    assert curve.p_flat < 0.001
    assert curve.note.startswith("no common direction: wells move away")
    # Nothing was done: the effects decide.
    effects = random.normal(size=36)
    curve, given = effect_curve(effects, values, doses)
    assert np.array_equal(given, effects)
    assert curve.ec50 is None
