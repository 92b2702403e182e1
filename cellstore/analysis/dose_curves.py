"""How a response depends on the dose: curves, EC50, trend, and the lowest dose that is active.

Doses are positive numbers of one unit. Control wells have no dose: they count as dose 0. Responses
are numbers of wells, such as an effect in control standard deviations. scipy does the optimising
and knows the distributions; it comes with the extra ``hits``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

FEWEST_DOSES = 4
"""A curve has four parameters."""
FEWEST_CONTROLS = 4
"""From fewer the spread of controls is hardly known."""
SLOPES = (0.2, 20.0)
"""Of the curves that are tried. At 0.2 a response needs 19 powers of ten to go from a tenth to nine
tenths, at 20 it needs a factor of 1.25: no series of doses tells steeper or flatter ones apart."""
BEYOND = 1.0
"""Powers of ten below and above the tested doses in which an EC50 is looked for, only to say that
it lies there."""
_STEEPNESS = np.linspace(math.log(SLOPES[0]), math.log(SLOPES[1]), 60)
STARTS = 3
ALPHA = 0.05
DRAWS = 9_999
"""Random orders of a trend test; fewer, where there are more than 200 wells."""


@dataclass(frozen=True)
class DoseCurve:
    """A curve of four parameters, and what it says of the EC50.

    The response is bottom + (top - bottom) / (1 + (halfway / dose) ** slope), with slope > 0:
    ``bottom`` without treatment, ``top`` far above ``halfway``, the dose in the middle of both.
    ``top`` is lower than ``bottom`` where the response falls. They are ``None`` where no curve was
    fitted.

    ``ec50`` is ``halfway`` where it is determined, with the interval ``low`` to ``high``. Else it
    is ``None`` and ``note`` says why; a bound that is known is kept: ``low`` alone says that the
    EC50 lies above it. ``p_flat`` is the p of the curve against a flat line. ``trend``, in
    -1..1, is Spearman's rank correlation of dose and response, ``trend_p`` its p; see
    :func:`dose_trend`.
    """

    bottom: float | None = None
    top: float | None = None
    slope: float | None = None
    halfway: float | None = None
    ec50: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    p_flat: float | None = None
    trend: float | None = None
    trend_p: float | None = None
    covariance: Floats | None = field(default=None, repr=False, compare=False)
    """(4, 4) of bottom, top, log10 of halfway, natural log of slope."""
    reach: float = field(default=math.nan, repr=False, compare=False)
    """How many standard errors the band reaches up and down."""

    def at(self, doses: ArrayLike) -> Floats:
        """Return the response (N,) of the curve at ``doses`` (N,), 0 for controls.

        NaN where no curve was fitted.
        """
        return self._at(np.asarray(doses, np.float64))[0]

    def band(self, doses: ArrayLike) -> tuple[Floats, Floats]:
        """Return the lower and the upper end (N,) of the band of the mean response at ``doses``.

        The band of one dose at a time by the delta method and Student's t, as in predict() of R's
        package drc (Ritz and others, PLoS ONE 10(12): e0146021, 2015).
        """
        value, jacobian = self._at(np.asarray(doses, np.float64))
        if self.covariance is None:
            return np.full_like(value, np.nan), np.full_like(value, np.nan)
        error = np.sqrt(np.einsum("ni,ij,nj->n", jacobian, self.covariance, jacobian).clip(0))
        return value - self.reach * error, value + self.reach * error

    def _at(self, doses: Floats) -> tuple[Floats, Floats]:
        if self.bottom is None or self.top is None or not self.halfway or not self.slope:
            return np.full(doses.shape, np.nan), np.full((doses.size, 4), np.nan)
        share = _shares(_log10(doses), np.log10(self.halfway), np.log(self.slope))
        rise = self.top - self.bottom
        away = np.where(doses > 0, _log10(doses) - np.log10(self.halfway), 0.0)
        change = rise * share * (1 - share) * self.slope * np.log(10)
        columns = (1 - share, share, -change, change * away)
        return self.bottom + rise * share, np.stack(columns, axis=-1)


def along_change(values: ArrayLike, doses: ArrayLike) -> Floats:
    """Return how far each well has moved in the direction of the change at the two highest doses.

    ``values`` (N, F): profiles, measured from the controls; ``doses`` (N,): NaN for a control.
    The direction is the sum of the wells of the two highest doses, without the well itself, which
    would else seem to have moved by chance. The answer, (N,), is in standard deviations of the
    controls; 0 is their mean; NaN: the well has no profile. It grows with the change itself, so
    that half of it is at the EC50; the size of a profile does not, as noise hides small changes.
    """
    rows, dose = np.nan_to_num(np.asarray(values, np.float64)), np.asarray(doses, np.float64)
    known = np.isfinite(np.asarray(values, np.float64)).any(axis=1)
    treated, controls = known & np.isfinite(dose), known & np.isnan(dose)
    found = np.full(len(rows), np.nan)
    top = treated & np.isin(dose, np.unique(dose[treated])[-2:])
    total = rows[top].sum(axis=0)
    ways = total - np.where(top[:, None], rows, 0.0)
    lengths = np.linalg.norm(ways, axis=1)
    possible = known & (lengths > 0)
    moved = np.einsum("nf,nf->n", rows[possible], ways[possible]) / lengths[possible]
    found[possible] = moved
    if controls.sum() > 1 and (spread := float(found[controls].std(ddof=1))) > 0:
        found = (found - found[controls].mean()) / spread
    return found


def fit_curve(
    doses: ArrayLike, responses: ArrayLike, controls: ArrayLike = (), *, seed: int = 0
) -> DoseCurve:
    """Fit a four-parameter log-logistic curve by least squares.

    ``doses`` (N,) > 0 and ``responses`` (N,) of the treated wells, ``controls`` (M,) responses of
    the control wells. Missing responses are left out, and so are treated wells with a dose of 0.

    The EC50 is determined where the curve fits better than a flat line (F test at 5 %, Seber and
    Wild, Nonlinear Regression, 1989) and the whole interval of the EC50 lies within the tested
    doses. The interval is by profile likelihood: all EC50s at which the best curve is not worse
    than the best of all by the F test of one parameter (Bates and Watts, Nonlinear Regression
    Analysis, 1988, chapter 6). The variance for it is that of all wells about the curve; where
    treated wells vary more than controls, that of the treated wells alone, with fewer degrees of
    freedom. Doses are compared by their logarithms.
    """
    doses, responses, controls = _checked(doses, responses, controls)
    correlation, trend_p = dose_trend(doses, responses, seed=seed) or (None, None)
    tested = np.unique(doses)
    curve = DoseCurve(trend=correlation, trend_p=trend_p)
    if tested.size < FEWEST_DOSES:
        there = f"there {'is' if tested.size == 1 else 'are'} {tested.size}"
        return replace(curve, note=f"a curve needs {FEWEST_DOSES} doses, {there}")
    if (freedom := doses.size + controls.size - 4) < 1:
        return replace(curve, note="a curve needs 5 wells, controls among them; there are 4")
    data = _Doses(doses, responses, controls)
    if data.total <= 1e-20 * float(np.abs(data.mean).max()) ** 2:
        return replace(curve, note="no response: it is the same in all wells")
    return _fitted(curve, data, freedom)


def _fitted(curve: DoseCurve, data: _Doses, freedom: int) -> DoseCurve:
    from scipy import stats

    lowest, highest = data.tested[0], data.tested[-1]
    middle, steepness = data.best((lowest - BEYOND, highest + BEYOND))
    squares, bottom, rise = (float(found[0]) for found in data.fit([middle], [steepness]))
    noise = max(squares, 1e-20 * data.total) / freedom
    p_flat = float(stats.f.sf((data.total - squares) / 3 / noise, 3, freedom))
    noise, freedom = data.noise(middle, steepness) or (noise, freedom)
    curve = replace(
        curve,
        bottom=bottom,
        top=bottom + rise,
        halfway=10**middle,
        slope=math.exp(steepness),
        p_flat=p_flat,
        reach=float(stats.t.ppf(1 - ALPHA / 2, freedom)),
    )
    _, jacobian = curve._at(10**data.log_dose)
    information = jacobian.T @ (data.number[:, None] * jacobian)
    curve = replace(curve, covariance=noise * np.linalg.pinv(information, hermitian=True))
    if p_flat >= ALPHA:
        flat = f"a curve fits no better than a flat line, p = {p_flat:.2g}"
        return replace(curve, note=f"no response: {flat}")
    low, high = data.interval(middle, squares + noise * float(stats.f.ppf(1 - ALPHA, 1, freedom)))
    curve = replace(
        curve, low=None if low is None else 10**low, high=None if high is None else 10**high
    )
    outside = [side for side, end in (("below", low), ("above", high)) if end is None]
    if outside:
        whole = low == highest or high == lowest
        where = f"{' or '.join(outside)} the tested doses"
        return replace(curve, note=f"the EC50 {'lies' if whole else 'may lie'} {where}")
    return replace(curve, ec50=curve.halfway)


class _Doses:
    """Wells by their dose, K of them: controls, if there are any, first with -inf.

    ``log_dose`` (K,) is log10 of the dose, ``number`` (K,) counts wells, ``mean`` (K,) is their
    mean response. ``within`` (K,): squares about these means; ``total``: about that of all.
    """

    def __init__(self, doses: Floats, responses: Floats, controls: Floats) -> None:
        values = np.concatenate((controls, responses))
        all_doses = np.concatenate((np.zeros(controls.size), doses))
        levels, which = np.unique(all_doses, return_inverse=True)
        self.log_dose = _log10(levels)
        self.number = np.bincount(which).astype(np.float64)
        self.mean: Floats = np.bincount(which, weights=values) / self.number
        squares = (values - self.mean[which]) ** 2
        self.within = np.bincount(which, weights=squares).astype(np.float64)
        self.total = float(((values - values.mean()) ** 2).sum())

    @property
    def tested(self) -> Floats:
        known: Floats = self.log_dose[np.isfinite(self.log_dose)]
        return known

    def fit(self, middles: ArrayLike, steepness: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return sum of squares, bottom and rise (G,) of the best curves with these two given.

        With EC50 and slope given a curve is a straight line in the share of its rise: least squares
        has one solution (variable projection, Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973).
        """
        share = _shares(self.log_dose, np.asarray(middles)[:, None], np.asarray(steepness)[:, None])
        weight = self.number / self.number.sum()
        mean = (self.mean * weight).sum()
        centre = (share * weight).sum(axis=1, keepdims=True)
        apart = share - centre
        spread = (apart**2 * weight).sum(axis=1)
        rise = (apart * weight) @ (self.mean - mean) / np.maximum(spread, 1e-300)
        bottom = mean - rise * centre[:, 0]
        left = self.mean - bottom[:, None] - rise[:, None] * share
        return self.within.sum() + left**2 @ self.number, bottom, rise

    def noise(self, middle: float, steepness: float) -> tuple[float, int] | None:
        """Return the variance of the treated wells about this curve, and its degrees of freedom.

        ``None`` where the controls vary as much or more, or there are too few to know: then all
        wells have one variance. The bottom of the curve is known from the controls.
        """
        if np.isfinite(self.log_dose[0]) or self.number[0] < FEWEST_CONTROLS:
            return None
        _, bottom, rise = self.fit([middle], [steepness])
        left = self.mean - bottom - rise * _shares(self.log_dose, middle, steepness)
        squares = self.within + self.number * left**2
        freedom = int(self.number[1:].sum()) - 3
        treated = float(squares[1:].sum()) / freedom
        return (treated, freedom) if treated > self.within[0] / (self.number[0] - 1) else None

    def best(self, between: tuple[float, float]) -> tuple[float, float]:
        """Return log10 of the EC50 and log of the slope with the smallest sum of squares."""
        from scipy.optimize import least_squares

        lower, upper = (
            np.array([between[0], np.log(SLOPES[0])]),
            np.array([between[1], np.log(SLOPES[1])]),
        )
        grid = np.meshgrid(np.linspace(lower[0], upper[0], 61), np.linspace(lower[1], upper[1], 24))
        middles, steepness = (axis.ravel() for axis in grid)
        squares = self.fit(middles, steepness)[0].reshape(grid[0].shape)
        padded = np.pad(squares, 1, constant_values=np.inf)
        around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).min(axis=(2, 3))
        lowest = np.flatnonzero(squares == around)  # valleys of the grid
        starts = lowest[np.argsort(squares.ravel()[lowest])][:STARTS]

        def left(point: Floats) -> Floats:
            _, bottom, rise = self.fit(point[:1], point[1:])
            share = _shares(self.log_dose, point[0], point[1])
            return np.sqrt(self.number) * (self.mean - bottom - rise * share)

        found = [
            least_squares(
                left,
                np.clip([middles[start], steepness[start]], lower + 1e-9, upper - 1e-9),
                bounds=(lower, upper),
                xtol=1e-10,
                ftol=1e-10,
                gtol=1e-10,
            )
            for start in starts
        ]
        middle, steep = min(found, key=lambda item: float(item.cost)).x
        return float(middle), float(steep)

    def profile(self, middle: float) -> float:
        """Return the smallest sum of squares of all curves with this log10 of the EC50."""
        from scipy.optimize import minimize_scalar

        squares = self.fit(np.full(_STEEPNESS.size, middle), _STEEPNESS)[0]
        best = int(squares.argmin())
        around = _STEEPNESS[max(best - 1, 0)], _STEEPNESS[min(best + 1, squares.size - 1)]
        found = minimize_scalar(
            lambda steepness: float(self.fit([middle], [steepness])[0][0]),
            bounds=around,
            method="bounded",
            options={"xatol": 1e-6},
        )
        return min(float(found.fun), float(squares[best]))

    def interval(self, middle: float, limit: float) -> tuple[float | None, float | None]:
        """Return the ends of where the profile is not above ``limit``, in log10.

        ``None`` for an end that is outside of the tested doses.
        """
        from scipy.optimize import brentq

        first, last = float(self.tested[0]), float(self.tested[-1])
        points = np.append(np.linspace(first, last, 60), min(max(middle, first), last))
        points = np.unique(points)
        grid = np.meshgrid(points, _STEEPNESS, indexing="ij")
        squares = self.fit(*(axis.ravel() for axis in grid))[0].reshape(grid[0].shape).min(axis=1)
        within = np.flatnonzero((squares <= limit) | (points == middle))
        if not within.size:  # it lies outside as a whole
            return (last, None) if middle > last else (None, first)

        def end(inner: int, outer: int) -> float | None:
            if not 0 <= outer < points.size:
                return None
            near, far = (self.profile(points[at]) - limit for at in (inner, outer))
            if far <= 0:  # the slopes of the grid missed it narrowly
                return end(outer, 2 * outer - inner)
            if near >= 0:  # data without noise
                return float(points[inner])
            return float(brentq(lambda at: self.profile(at) - limit, points[inner], points[outer]))

        return end(within[0], within[0] - 1), end(within[-1], within[-1] + 1)


def dose_trend(
    doses: ArrayLike, responses: ArrayLike, *, seed: int = 0
) -> tuple[float, float] | None:
    """Return Spearman's rank correlation of dose and response, and its two-sided p.

    ``doses`` (N,) > 0 and ``responses`` (N,) of treated wells. Above 0 the response grows with the
    dose. p is the share of orders of the responses with a correlation as far from 0 or farther: of
    all orders of 7 wells or fewer, else of ``DRAWS`` random ones and that of the data (Phipson and
    Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010). Controls do not count: their responses are
    relative to themselves, so treated wells without an effect may differ from them a little, which
    is no trend. ``None`` where there are fewer than two doses or all responses are equal.
    """
    from scipy.stats import rankdata

    doses, responses, _ = _checked(doses, responses, ())
    if np.unique(doses).size < 2:
        return None
    by_dose, by_response = rankdata(doses), rankdata(responses)
    by_dose, by_response = by_dose - by_dose.mean(), by_response - by_response.mean()
    size, scale = by_dose.size, math.sqrt(float((by_dose**2).sum() * (by_response**2).sum()))
    if scale == 0:
        return None
    observed = float(by_dose @ by_response)
    if exact := size <= 7:
        orders = np.array(list(permutations(by_dose.tolist())))
    else:
        draws = min(DRAWS, max(999, 2_000_000 // size))
        generator = np.random.default_rng(seed)
        orders = generator.permuted(np.tile(by_dose, (draws, 1)), axis=1)
    as_far = int((np.abs(orders @ by_response) >= abs(observed) - 1e-9 * scale).sum())
    more = 0 if exact else 1
    return observed / scale, (as_far + more) / (len(orders) + more)


def effect_curve(
    effects: ArrayLike, values: ArrayLike, doses: ArrayLike, *, seed: int = 0
) -> tuple[DoseCurve, Floats]:
    """Return the curve of an effect, and the responses (N,) that it is fitted to.

    ``effects`` (N,) and ``values`` (N, F) are of N wells, ``doses`` (N,) NaN for controls. Whether
    there is a response, and its trend, is asked of the effects: wells that nothing was done to move
    together by chance. Where there is one, its half is where wells have moved half of the way
    (:func:`along_change`).
    """
    away, dose = np.asarray(effects, np.float64), np.asarray(doses, np.float64)
    control = np.isnan(dose)
    curve = fit_curve(dose[~control], away[~control], away[control], seed=seed)
    if curve.p_flat is None or curve.p_flat >= ALPHA:
        return curve, away
    moved = along_change(values, dose)
    way = fit_curve(dose[~control], moved[~control], moved[control], seed=seed)
    note = way.note
    if way.p_flat is not None and way.p_flat >= ALPHA:
        note = "no common direction: wells move away from the controls, each its own way"
    trend, trend_p = curve.trend, curve.trend_p
    return replace(way, note=note, p_flat=curve.p_flat, trend=trend, trend_p=trend_p), moved


def lowest_active(
    doses: ArrayLike, responses: ArrayLike, controls: ArrayLike, plates: ArrayLike | None = None
) -> tuple[float | None, float | None, str | None]:
    """Return the lowest dose from which on this and all higher doses differ from the controls.

    ``doses`` (N,) > 0, ``responses`` (N,), ``controls`` (M,). ``plates`` (N,): where there are
    several, wells of a dose on one plate count as one, since responses that are measured from few
    controls of a plate err together.

    From the highest dose down the wells of each are compared with the controls by a t test (one
    well is enough), until one does not differ at 5 %, or differs to the other side. In this order
    the probability that any dose is called active by chance stays 5 % without a further correction
    (fixed sequence: Tamhane, Hochberg and Dunnett, Biometrics 52, 1996). The second value is the p
    of that dose in the sequence: the largest one down to it; without such a dose that of the
    highest dose. The third says why there is none.
    """
    if plates is not None and np.unique(plates).size > 1:
        doses, responses = _plate_means(doses, responses, plates)
    doses, responses, controls = _checked(doses, responses, controls)
    if controls.size < FEWEST_CONTROLS:
        return None, None, f"needs {FEWEST_CONTROLS} control wells, there are {controls.size}"
    if not doses.size:
        return None, None, "no treated well has a value"
    levels, which, number = np.unique(doses, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=responses) / number
    within = float(((responses - means[which]) ** 2).sum()), int(doses.size - levels.size)
    found, largest, highest = None, 0.0, (0.0, 1.0)
    for index in range(levels.size)[::-1]:
        gain, p = _t_test(float(means[index]), int(number[index]), within, controls)
        if index == levels.size - 1:
            highest = gain, p
        if p >= ALPHA or gain * highest[0] < 0:
            break
        found, largest = float(levels[index]), max(largest, p)
    if found is None:
        return None, highest[1], "the highest dose does not differ from the controls"
    return found, largest, None


def _plate_means(
    doses: ArrayLike, responses: ArrayLike, plates: ArrayLike
) -> tuple[Floats, Floats]:
    """Return dose and mean response of each dose on each plate, without missing responses."""
    values = np.asarray(responses, np.float64)
    keys = np.stack((np.asarray(doses, np.float64), np.asarray(plates, np.float64)))
    keys, which = np.unique(keys[:, np.isfinite(values)], axis=1, return_inverse=True)
    which = which.ravel()
    return keys[0], np.bincount(which, weights=values[np.isfinite(values)]) / np.bincount(which)


def _t_test(
    mean: float, wells: int, within: tuple[float, int], controls: Floats
) -> tuple[float, float]:
    """Return how far the mean of some wells is from that of controls, and its two-sided p.

    ``within``: sum of squares of treated wells about the mean of their dose, and its degrees of
    freedom. Where these vary more than controls, each has its variance (Welch), else all have one.
    """
    from scipy import stats

    gain, freedom = mean - float(controls.mean()), float(controls.size - 1)
    squares = float(((controls - controls.mean()) ** 2).sum())
    if within[1] and within[0] / within[1] > squares / freedom:
        parts = within[0] / within[1] / wells, squares / freedom / controls.size
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / within[1] + parts[1] ** 2 / freedom)
        error = math.sqrt(sum(parts))
    else:
        freedom += within[1]
        error = math.sqrt((squares + within[0]) / freedom * (1 / wells + 1 / controls.size))
    if error == 0:
        return gain, float(gain == 0)
    return gain, float(2 * stats.t.sf(abs(gain) / error, freedom))


def _checked(doses: ArrayLike, responses: ArrayLike, controls: ArrayLike) -> list[Floats]:
    """Return the three as arrays, without wells whose response is missing or whose dose is 0."""
    dose, response, control = (
        np.asarray(some, np.float64) for some in (doses, responses, controls)
    )
    known = np.isfinite(response) & (dose > 0)
    return [dose[known], response[known], control[np.isfinite(control)]]


def _log10(doses: Floats) -> Floats:
    return np.log10(doses, out=np.full(doses.shape, -np.inf), where=doses > 0)


def _shares(log_doses: Floats, middle: Floats | float, steepness: Floats | float) -> Floats:
    """Return how much of its rise a curve has done: log10 of doses, of EC50s, log of slopes."""
    rate = np.exp(steepness) * np.log(10)
    shares: Floats = 1 / (1 + np.exp(np.clip(rate * (middle - log_doses), -700, 700)))
    return shares
