"""How often the interval of an EC50 holds the planted one, and how often there is none.

Wells of a perturbation at several doses, three-fold apart, and control wells are drawn anew in each
trial: a log-logistic curve from 0 to a rise of 4 to 16 control standard deviations, with normal
noise. Planted EC50s lie inside the tested doses, evenly on the log scale, a third of a step or more
away from the lowest and the highest dose. One line for each number of doses, wells at a dose, and
kind of noise, over all slopes and rises: trials with a determined EC50; the share of these in whose
interval the planted one lies, in the worst slope and rise, too; the same of all trials with a
response, open ends included; what was said where it was not determined. Then
the same without any effect: how often an EC50 is determined, a curve is better than a flat line, a
dose is called active; and quantiles of the p of the trend, 0.05, 0.5 and 0.95 if it is right.

The third table does the same with simulated profiles, as `cellstore hits` fits them: plates with
one well of each of 8 doses and their controls; strength 0 is no effect. "together": 60 features
that go together, a third of which change; "apart": 60 independent features, all of which change.

python benchmarks/dose_coverage.py [--trials 200] [--flat 1000]

Noise "even": the same in all wells. "growing": its variance is higher at the top than at the bottom
of the curve: 1.5, 2 and 3 times for the three rises. Takes about 15 minutes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product

import numpy as np

from cellstore.analysis import dose_curves
from cellstore.analysis.activity import effects
from cellstore.analysis.dose_curves import DoseCurve, along_change, fit_curve, lowest_active

LEAST = 0.93
SLOPES = (0.8, 1.5, 3.0)
RISES = (4.0, 8.0, 16.0)
LAYOUTS = ((6, 1, 16), (6, 2, 32), (8, 1, 16), (8, 2, 16), (8, 4, 32), (10, 1, 64), (10, 4, 64))
"""Doses, wells at each, control wells."""


def draw(
    rng: np.random.Generator, curve: DoseCurve | None, layout: tuple[int, int, int], growing: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Doses and responses of treated wells, and responses of controls."""
    number, wells, controls = layout
    doses = np.repeat(3.0 ** np.arange(number), wells)
    mean = np.zeros(doses.size) if curve is None else curve.at(doses)
    spread = np.sqrt(1 + mean / 8) if growing else 1.0
    return doses, mean + spread * rng.normal(size=doses.size), rng.normal(size=controls)


def planted(layout: tuple[int, int, int], growing: bool, trials: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    notes: Counter[str] = Counter()
    shares, held, found, responding, within = [], 0, 0, 0, 0
    for slope, rise in product(SLOPES, RISES):
        inside = determined = 0
        for _ in range(trials):
            middle = rng.uniform(1 / 3, layout[0] - 1 - 1 / 3)
            curve = DoseCurve(0.0, rise, slope, 3.0**middle)
            fitted = fit_curve(*draw(rng, curve, layout, growing), seed=seed)
            if (fitted.p_flat or 1) < dose_curves.ALPHA:
                responding += 1
                within += (fitted.low or 0) <= curve.halfway <= (fitted.high or np.inf)
            if fitted.ec50 is None:
                notes[(fitted.note or "").partition(":")[0]] += 1
                continue
            determined += 1
            inside += fitted.low <= curve.halfway <= fitted.high
        held, found = held + inside, found + determined
        if determined >= trials / 4:
            shares.append((inside / determined, f"slope {slope}, rise {rise:g}"))
    total = trials * len(SLOPES) * len(RISES)
    worst, setting = min(shares, default=(np.nan, ""))
    others = ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in notes.most_common())
    return (
        f"{100 * found / total:5.0f} %   {100 * held / found:5.1f} %   {100 * worst:5.1f} % "
        f"({setting:19})  {100 * within / responding:5.1f} %  {others}"
    )


def flat(layout: tuple[int, int, int], trials: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    determined = better = active = 0
    p = []
    for _ in range(trials):
        wells = draw(rng, None, layout, growing=False)
        fitted = fit_curve(*wells, seed=int(rng.integers(2**31)))
        determined += fitted.ec50 is not None
        better += (fitted.p_flat or 1) < dose_curves.ALPHA
        active += lowest_active(*wells)[0] is not None
        p.append(fitted.trend_p or np.nan)
    quantiles = "  ".join(f"{value:.3f}" for value in np.quantile(p, (0.05, 0.5, 0.95)))
    counts = "   ".join(f"{100 * n / trials:5.1f} %" for n in (determined, better, active))
    return f"{counts}   {quantiles}"


def profiles(
    layout: tuple[int, int], strength: float, trials: int, seed: int, *, apart: bool
) -> str:
    """One line of the third table: plates, control wells on each."""
    plates, controls = layout
    rng = np.random.default_rng(seed)
    plate = np.repeat(np.arange(plates), controls + 8)
    control = np.tile(np.arange(controls + 8) < controls, plates)
    doses = np.tile(3.0 ** np.arange(8), plates)
    dose = np.full(plate.size, np.nan)
    dose[~control] = doses
    determined = held = better = active = trend = 0
    for _ in range(trials):
        together = (0.0 if apart else 0.6) * rng.normal(size=(60, 4))
        change = strength * rng.normal(size=60) * (apart or (rng.random(60) < 1 / 3))
        curve = DoseCurve(0.0, 1.0, 1.5, 3.0 ** rng.uniform(1 / 3, 7 - 1 / 3))
        values = rng.normal(size=(plate.size, 4)) @ together.T + 0.7 * rng.normal(
            size=(plate.size, 60)
        )
        values[~control] += curve.at(doses)[:, None] * change
        effect = effects(values, np.where(control, -1, 0), control, plate)[1]
        given = doses, effect[~control], effect[control]
        fitted = fit_curve(*given, seed=int(rng.integers(2**31)))
        lowest = lowest_active(*given, plate[~control])
        better += (fitted.p_flat or 1) < dose_curves.ALPHA
        trend += (fitted.trend_p or 1) < dose_curves.ALPHA
        active += lowest[0] is not None
        if (fitted.p_flat or 1) >= dose_curves.ALPHA:
            continue
        for one in range(plates):
            values[plate == one] -= values[(plate == one) & control].mean(axis=0)
        moved = along_change(values, dose)
        fitted = fit_curve(doses, moved[~control], moved[control])
        if fitted.ec50 is not None:
            determined += 1
            held += fitted.low <= curve.halfway <= fitted.high
    inside = f"{100 * held / determined:5.1f} %" if determined else "      -"
    counts = "  ".join(f"{100 * n / trials:5.1f} %" for n in (better, trend, active))
    return f"{strength:8g}  {100 * determined / trials:8.1f} %  {inside}  {counts}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200, help="for each slope and rise")
    parser.add_argument("--flat", type=int, default=1000)
    options = parser.parse_args()
    dose_curves.DRAWS = 999  # as many as there are trials are enough here
    print(
        "doses wells controls noise    determined    held      worst                      "
        "       all     else"
    )
    for layout, growing in product(LAYOUTS, (False, True)):
        kind = "growing" if growing else "even"
        line = planted(layout, growing, options.trials, seed=1)
        print(f"{layout[0]:5} {layout[1]:5} {layout[2]:8} {kind:8} {line}", flush=True)
    print("\nno effect\ndoses wells controls determined  better  active    trend p")
    for layout in LAYOUTS:
        print(
            f"{layout[0]:5} {layout[1]:5} {layout[2]:8}  {flat(layout, options.flat, 2)}",
            flush=True,
        )

    print("\nprofiles\nfeatures plates controls strength  determined  held  better  trend  active")
    for apart, layout in product((False, True), ((1, 16), (3, 12), (4, 8))):
        for strength in (0.0, 0.5, 1.0, 2.0, 4.0) if apart else (0.0, 2.0, 4.0, 8.0, 16.0):
            line = profiles(layout, strength, options.flat // 2, 3, apart=apart)
            kind = "apart" if apart else "together"
            print(f"{kind:8} {layout[0]:6} {layout[1]:8} {line}", flush=True)


if __name__ == "__main__":
    main()
