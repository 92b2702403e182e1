"""How often the measures of `cellstore hits` err: on simulated screens, without and with effects.

python benchmarks/hits_errors.py [--only null edge power interval replicates] [--screens 200]

Profiles of wells have offsets and units of their own on each plate and are normalised as those of a
store (per plate against its controls, mad). null: no treatment does anything; the share of screens
with any hit at q < 0.05, and p values, which should be uniform. edge: the outermost wells differ,
and no treatment does anything. power: actives that are found, by cellstore and by copairs called by
hand. interval: how often 95 % intervals hold what they should. replicates: what is found with as
many as were said to be needed. About an hour on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from cellstore.analysis.activity import (
    Score,
    Wells,
    activity,
    cell_counts,
    consistency,
    edge_check,
    effects,
    replicate_correlation,
    replicates_needed,
    smallest_p,
    strongest_changes,
)
from cellstore.analysis.well_profiles import WellProfiles, normalise
from cellstore.config import HitsParams
from cellstore.enums import Verdict
from cellstore.stages.hits import judge

Numbers = NDArray[np.float64]
LEVEL = 0.05
SECTIONS = ("null", "edge", "power", "interval", "replicates")


@dataclass(frozen=True)
class Layout:
    """Of a screen: ``wells`` of each of ``treatments`` and ``controls`` on each of ``plates``."""

    name: str
    plates: int = 4
    wells: int = 1
    controls: int = 16
    treatments: int = 40
    features: int = 50
    factors: int = 0  # what features have in common
    tails: float = np.inf  # degrees of freedom of t
    method: str = "mad"


LAYOUTS = (
    Layout("4 plates x 1 well"),
    Layout("1 plate x 4 wells", plates=1, wells=4),
    Layout("2 plates x 2 wells", plates=2, wells=2),
    Layout("3 plates x 1 well", plates=3),
    Layout("2 plates x 1 well", plates=2),
    Layout("1 plate x 2 wells, 32 controls", plates=1, wells=2, controls=32),
    Layout("4 x 1, correlated features", factors=5),
    Layout("4 x 1, 4 controls a plate", controls=4),
    Layout("4 x 1, heavy tails", tails=3),
    Layout("4 x 1, sphered", factors=5, features=20, controls=32, method="sphere"),
)


@dataclass(frozen=True)
class Screen:
    """N wells of a screen: normalised profiles (N, F), cells, and who is who."""

    values: Numbers
    counts: Numbers
    groups: NDArray[np.int64]
    plates: NDArray[np.int64]
    edge: NDArray[np.bool_]

    @property
    def controls(self) -> NDArray[np.bool_]:
        """The negative controls (N,)."""
        found: NDArray[np.bool_] = self.groups < 0
        return found


def screen(
    layout: Layout,
    random: np.random.Generator,
    *,
    shifts: Numbers | None = None,
    cells: Numbers | None = None,
    edge: float = 0.0,
    spread: bool = True,
) -> Screen:
    """Draw a screen: ``shifts`` (T, F) in standard deviations of wells, ``cells`` (T,) ratios.

    ``edge``: how far wells at the edge are off, in the same direction on all plates. They are every
    fourth well; controls are among them in proportion, or all of them are where ``spread`` is off.
    """
    treated = np.repeat(np.arange(layout.treatments), layout.wells)
    one = np.r_[treated, np.full(layout.controls, -1)]
    groups = np.tile(one, layout.plates)
    plates = np.repeat(np.arange(layout.plates), len(one))
    at_edge = np.arange(len(one)) % 4 == 0
    if not spread:
        at_edge |= one < 0
    size = (len(groups), layout.features)
    noise = random.normal(size=size)
    if layout.factors:
        loads = random.normal(size=(layout.factors, layout.features))
        noise += random.normal(size=(len(groups), layout.factors)) @ loads
    if np.isfinite(layout.tails):
        noise /= np.sqrt(random.chisquare(layout.tails, size=(len(groups), 1)) / layout.tails)
    if shifts is not None:
        noise[groups >= 0] += shifts[groups[groups >= 0]] * noise.std()
    on_edge = np.tile(at_edge, layout.plates)
    if edge:
        noise[on_edge] += edge * random.normal(size=layout.features)
    units = random.uniform(0.5, 2, size=(layout.plates, layout.features))
    raw = 10 * random.normal(size=units.shape)[plates] + units[plates] * noise
    ratio = np.ones(len(groups))
    if cells is not None:
        ratio[groups >= 0] = cells[groups[groups >= 0]]
    plate_cells = random.uniform(60, 150, size=layout.plates)[plates]
    counts = random.poisson(plate_cells * ratio * random.gamma(40, 1 / 40, size=len(groups)))
    control = np.where(groups < 0, "negative", None)
    table = pd.DataFrame({"plate": plates.astype(str), "control": control})
    names = tuple(f"f{i}" for i in range(layout.features))
    profiles = normalise(WellProfiles(table, raw, names), layout.method)
    return Screen(profiles.values, counts.astype(np.float64), groups, plates, on_edge)


def by_copairs(some: Screen, seed: int) -> dict[int, Score]:
    """Activity by copairs called by hand, as in its documentation: controls of the same plate."""
    from copairs.map import average_precision, mean_average_precision

    alone = np.where(some.controls, np.arange(len(some.groups)), -1)
    meta = pd.DataFrame({"treatment": some.groups, "alone": alone, "plate": some.plates})
    pair = ["treatment", "alone"]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
        warnings.simplefilter("ignore")
        found = average_precision(meta, some.values, pair, [], ["plate"], pair, progress_bar=False)
        found = mean_average_precision(
            found[found["treatment"] >= 0],
            ["treatment"],
            10_000,
            LEVEL,
            seed,
            progress_bar=False,
            cache_dir=cache,
        )
    columns = ["treatment", "mean_average_precision", "p_value", "corrected_p_value"]
    rows = found[columns].itertuples(index=False)
    return {int(t): Score(value=v, p=p, q=q) for t, v, p, q in rows}


def hits_of(some: Screen, seed: int, *, strata: NDArray[np.int64] | None = None) -> set[int]:
    """The treatments that the whole rule calls hits."""
    who = (some.groups, some.controls)
    layers = some.plates if strata is None else strata
    scores = activity(Wells(some.values, *who, layers), seed=seed)
    far = effects(Wells(some.values, *who, some.plates))[0]
    cells, change = cell_counts(some.counts, *who, some.plates, permutations=2_000, seed=seed)
    strongest = strongest_changes(Wells(some.values, *who, some.plates))
    params, floors = HitsParams(), smallest_p(Wells(some.values, *who, layers), 10_000)
    verdicts = {
        group: judge(
            params,
            score,
            far[group],
            cells[group],
            fewer=-float(change[some.groups == group].mean()),
            strongest=float(strongest[group]),
            floor=floors[group],
        )[0]
        for group, score in scores.items()
    }
    return {group for group, verdict in verdicts.items() if verdict is Verdict.HIT}


def null_line(name: str, found: Sequence[float], first: Sequence[float]) -> str:
    """Of p values: the shares at most 0.01, 0.05; quantiles; KS of one p of each screen."""
    ps = np.array(found)
    shares = [f"{(ps <= level).mean():6.3f}" for level in (0.01, 0.05)]
    middle = [f"{q:5.2f}" for q in np.quantile(ps, [0.05, 0.25, 0.5, 0.75, 0.95])]
    uniform = float(stats.kstest(first, "uniform").pvalue)
    return f"  {name:<24}{' '.join(shares)}  {' '.join(middle)}  {uniform:5.2f}"


def null(screens: int, layouts: Sequence[Layout]) -> None:
    """Print, for each layout, screens with a hit and p values where nothing happens."""
    print("No treatment does anything")
    print(f"  {'p values of':<24}<=0.01 <=0.05  quantiles 5 to 95 %             KS p")
    for layout in layouts:
        ps: dict[str, list[float]] = defaultdict(list)
        first: dict[str, list[float]] = defaultdict(list)
        called: dict[str, int] = defaultdict(int)
        for seed in range(screens):
            random = np.random.default_rng([seed, 1])
            some = screen(layout, random)
            who = (some.groups, some.controls)
            middle = [
                np.median(some.values[some.groups == group], axis=0)
                for group in range(layout.treatments)
            ]
            targets = [frozenset({str(group % 8)}) for group in range(layout.treatments)]
            scores = {
                "activity": activity(Wells(some.values, *who, some.plates), seed=seed),
                "activity by copairs": by_copairs(some, seed),
                "cell count": cell_counts(some.counts, *who, some.plates, seed=seed)[0],
                "replicate correlation": replicate_correlation(
                    Wells(some.values, *who, some.plates), seed=seed
                ),
                "consistency": consistency(np.array(middle), targets, seed=seed),
            }
            for name, by_name in scores.items():
                found = [score.p for score in by_name.values() if score.p is not None]
                ps[name] += found
                first[name].append(found[0])
                called[name] += any((s.q or 0) < LEVEL for s in by_name.values() if s.q is not None)
            called["the rule"] += bool(hits_of(some, seed))
        share = {name: f"{count / screens:.1%}" for name, count in called.items()}
        print(f"{layout.name}: screens with a hit by the rule {share['the rule']}")
        for name, found in ps.items():
            print(null_line(name, found, first[name]), f" any q < 0.05: {share[name]}", flush=True)


def edges(screens: int) -> None:
    """Print how often an edge effect alone makes hits, and how often it is warned of."""
    print("\nAn edge effect alone: screens with a hit by the rule; edge controls compared; warned")
    for layout in (replace(LAYOUTS[0], controls=32), replace(LAYOUTS[2], controls=32)):
        for strength, spread in ((0.5, True), (1.0, True), (2.0, True), (2.0, False)):
            any_hit, matched, warned = 0, 0, 0
            for seed in range(screens):
                random = np.random.default_rng([seed, 2])
                some = screen(layout, random, edge=strength, spread=spread)
                names = [str(plate) for plate in range(some.plates.max() + 1)]
                same_zone, warning = edge_check(
                    some.values, some.controls, some.plates, some.edge, names, seed=seed
                )
                strata = some.plates * 2 + some.edge if same_zone else some.plates
                any_hit += bool(hits_of(some, seed, strata=strata))
                matched, warned = matched + same_zone, warned + bool(warning)
            counts = [f"{n / screens:6.1%}" for n in (any_hit, matched, warned)]
            where = "spread" if spread else "all at the edge"
            print(f"  {layout.name:<20} {strength} SD, controls {where:<16}", *counts, flush=True)


def power(screens: int, layouts: Sequence[Layout]) -> None:
    """Print how many of 10 actives of 40 treatments are found, by strength."""
    print("\nActives found (10 of 40 treatments)")
    strengths = np.array([0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 0.75, 1.0, 1.5])
    for layout, sparse in [(layout, sparse) for layout in layouts for sparse in (False, True)]:
        found: dict[str, list[int]] = defaultdict(list)
        false = dict.fromkeys(("q < 0.05", "rule", "copairs"), 0)
        for seed in range(screens):
            random = np.random.default_rng([seed, 3])
            shifts = np.zeros((layout.treatments, layout.features))
            for active, strength in enumerate(strengths):
                direction = random.normal(size=layout.features)
                if sparse:  # a tenth of the features, as strong in all
                    some_features = random.permutation(layout.features)[layout.features // 10 :]
                    direction[some_features] = 0
                    direction *= 10**0.5
                shifts[active] = strength * direction
            some = screen(layout, random, shifts=shifts)
            scores = activity(
                Wells(some.values, some.groups, some.controls, some.plates), seed=seed
            )
            called = {
                "q < 0.05": {g for g, s in scores.items() if (s.q or 0) < LEVEL},
                "rule": hits_of(some, seed),
                "copairs": {g for g, s in by_copairs(some, seed).items() if (s.q or 0) < LEVEL},
            }
            for name, which in called.items():
                found[name].append(sum(group < 10 for group in which))
                false[name] += sum(group >= 10 for group in which)
        line = [
            f"{name} {n / screens / 10:5.1%} ({false[name] / max(1, n + false[name]):.1%})"
            for name, n in ((name, sum(each)) for name, each in found.items())
        ]
        what = "sparse" if sparse else "dense"
        print(f"  {layout.name:<32}{what:<8}", "  ".join(line), flush=True)


def interval(screens: int, layouts: Sequence[Layout]) -> None:
    """Print how often intervals hold the mean of what they estimate (over all screens)."""
    print("\n95 % intervals: hold the mean")
    strengths = np.repeat([0.0, 0.5, 1.0, 2.0, 4.0], 8)
    ratios = np.tile([1.0, 0.7, 0.4, 0.1, 0.02, 1.3, 1.0, 0.0], 5)
    for layout in layouts:
        direction = np.random.default_rng(9).normal(size=(40, layout.features))
        bounds: dict[str, list[list[tuple[float, float, float]]]] = {"effect": [], "cells": []}
        for seed in range(screens):
            random = np.random.default_rng([seed, 4])
            shifts = strengths[:, None] * direction
            some = screen(layout, random, shifts=shifts, cells=ratios)
            who = (some.groups, some.controls, some.plates)
            for name, scores in (
                ("effect", effects(Wells(some.values, *who))[0]),
                ("cells", cell_counts(some.counts, *who, permutations=1)[0]),
            ):
                rows = [(s.value, s.low, s.high) for _, s in sorted(scores.items())]
                bounds[name].append(rows)  # type: ignore[arg-type]
        for name, kinds in (("effect", strengths), ("cells", ratios)):
            value, low, high = np.moveaxis(np.array(bounds[name], dtype=np.float64), 2, 0)
            truth = value.mean(axis=0) if name == "effect" else ratios
            held = (low <= truth) & (truth <= high)
            by_kind = {float(k): held[:, kinds == k].mean() for k in np.unique(kinds)}
            line = "  ".join(f"{kind:g}: {share:.1%}" for kind, share in by_kind.items())
            width = float(np.median(high - low))
            zero = f"  at 0: {value[:, kinds == 0].mean():.2f}" if name == "effect" else ""
            print(f"  {layout.name:<32}{name:<7} {line}  width {width:.2f}{zero}", flush=True)


def replicates(screens: int) -> None:
    """Print how many plates are said to be needed, from 4 of them, and what is found with them."""
    print("\nPlates needed for 80 % (10 equally strong actives of 40) and found with them")
    for strength, factors in ((0.3, 0), (0.5, 0), (0.75, 0), (0.5, 5), (0.75, 5), (1.0, 5)):
        layout = Layout("", factors=factors)
        shifts = np.zeros((40, layout.features))
        shifts[:10] = strength * np.random.default_rng(5).normal(size=(10, layout.features))
        said: list[float] = []
        for seed in range(screens):
            some = screen(layout, np.random.default_rng([seed, 6]), shifts=shifts)
            for group in range(10):
                wells = some.values[some.groups == group]
                needed = replicates_needed(
                    wells, some.values[some.controls], beside=layout.controls, level=LEVEL / 4
                )
                said.append(np.inf if needed is None else needed)
        low, plates, high = np.quantile(said, [0.1, 0.5, 0.9], method="nearest")
        shares = []
        for number in sorted({max(2, int(plates) - 1), int(min(plates, 30)), int(plates) + 1}):
            found = 0
            for seed in range(screens):
                random = np.random.default_rng([seed, 7])
                some = screen(replace(layout, plates=number), random, shifts=shifts)
                scores = activity(
                    Wells(some.values, some.groups, some.controls, some.plates), seed=seed
                )
                found += sum((scores[group].q or 0) < LEVEL for group in range(10))
            shares.append(f"{number}: {found / screens / 10:.0%}")
        print(
            f"  strength {strength}, {factors} factors: said {plates:g} ({low:g} to {high:g});"
            f" found with {', '.join(shares)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--screens", type=int, default=200)
    parser.add_argument("--layouts", type=int, nargs="+", default=list(range(len(LAYOUTS))))
    given = parser.parse_args()
    layouts = [LAYOUTS[number] for number in given.layouts]
    if "null" in given.only:
        null(given.screens, layouts)
    if "edge" in given.only:
        edges(max(1, given.screens // 2))
    if "power" in given.only:
        power(max(1, given.screens // 4), layouts)
    if "interval" in given.only:
        interval(given.screens, layouts)
    if "replicates" in given.only:
        replicates(max(1, given.screens // 10))


if __name__ == "__main__":
    main()
