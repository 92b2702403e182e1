"""How often a 95 % interval over wells holds the accuracy, and how wide it is, by many methods.

Wells are drawn anew in each trial; the images of a well are alike by the given correlation (0:
independent, 1: all right or all wrong). A well's own accuracy is drawn from a beta distribution, or
is a normal variable that decides at a threshold; or wells are of three classes of different
accuracy. The accuracy of the images that are scored is what an interval should hold. One line for
each number of wells, images in a well and method: the lowest share of trials in which it does, of
all accuracies, correlations and shapes; how many of these settings are below 0.93; the mean of the
median widths; and the worst setting.

python benchmarks/interval_coverage.py [--trials 5000] [--wells 6 12 24 48] [--methods all]

cellstore: ``analysis.statistics.share_interval``, whose numbers are compared with those here.
Korn-Graubard, as ``svyciprop(method = "beta")`` of R's survey; Wilson with the design effect and t;
exact: Clopper-Pearson with wells as images. With ``--methods all`` also the percentile bootstrap
(wells drawn 1,000 times), its studentised and its BCa form, and the profile likelihood of a
beta-binomial model (wells of equal size only). ``--difference``: the interval of the difference of
two runs (``well_interval(minus=...)``), beside Student's t over wells. Takes about 10 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from cellstore.analysis.statistics import share_interval, well_interval

Numbers = NDArray[np.float64]
Bounds = tuple[Numbers, Numbers]
LEAST = 0.93
TAIL = 0.025
ACCURACIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.95, 0.99)
ALIKE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
IMAGES = (1, 4, 9, 0, 100)
"""Images in a well; 0: each well has 1 to 9."""
SHAPES = ("beta", "normal", "classes")
PAIRS = (
    (0.01, 0.01),
    (0.03, 0.0),
    (0.02, 0.1),
    (0.1, 0.1),
    (0.3, 0.05),
    (0.25, 0.25),
    (0.45, 0.45),
)
"""The shares of images in which the first, or the second, of two runs alone is right."""
RESAMPLES = 1000


def draw_wells(
    rng: np.random.Generator, shape: tuple[int, int], images: int, accuracy: float, alike: float,
    kind: str,
) -> tuple[Numbers, Numbers, float]:  # fmt: skip
    """Right images and images, (trials, wells), and the accuracy that is to be held."""
    size = rng.integers(1, 10, shape) if images == 0 else np.full(shape, images)
    own = np.full(shape[1], accuracy)
    if kind == "classes":
        own = special.expit(special.logit(accuracy) + np.resize([-1.5, 0, 1.5], shape[1]))
    if kind == "normal" and alike < 1:
        shift = np.sqrt(alike) * rng.standard_normal(shape)
        chance = special.ndtr((special.ndtri(accuracy) + shift) / np.sqrt(1 - alike))
    elif alike == 1:
        chance = (rng.random(shape) < own).astype(float)
    elif alike == 0:
        chance = np.broadcast_to(own, shape)
    else:
        spread = (1 - alike) / alike
        chance = rng.beta(own * spread, (1 - own) * spread, shape)
    return rng.binomial(size, chance).astype(float), size.astype(float), float(own.mean())


class Drawn:
    """What the methods need of (trials, wells) right images and images."""

    def __init__(self, right: Numbers, size: Numbers) -> None:
        self.right, self.size, self.wells = right, size, size.shape[1]
        self.total = size.sum(axis=1)
        self.share = right.sum(axis=1) / self.total
        self.mean_size = (size**2).sum(axis=1) / self.total
        apart = right - self.share[:, None] * size
        self.variance = self.wells / (self.wells - 1) * (apart**2).sum(axis=1) / self.total**2
        self.end = (self.share == 0) | (self.share == 1)
        with np.errstate(all="ignore"):
            effect = self.variance * self.total / (self.share * (1 - self.share))
        self.effect = np.where(self.end, self.mean_size, effect)
        self.t = stats.t.ppf(1 - TAIL, self.wells - 1)


def exact(share: Numbers, worth: Numbers) -> Bounds:
    """Clopper and Pearson, of ``worth`` images."""
    hits, misses = share * worth, (1 - share) * worth
    with np.errstate(all="ignore"):
        low = special.betaincinv(hits, misses + 1, TAIL)
        high = special.betaincinv(hits + 1, misses, 1 - TAIL)
    return np.where(share <= 0, 0, low), np.where(share >= 1, 1, high)


def cellstore(drawn: Drawn) -> Bounds:
    """As ``share_interval``, for many trials at once."""
    with np.errstate(all="ignore"):
        sides = [
            np.nan_to_num(some.sum(axis=1) ** 2 / (some**2).sum(axis=1))
            for some in (drawn.right, drawn.size - drawn.right)
        ]
        alike = np.clip((drawn.effect - 1) / (drawn.mean_size - 1), 0, 1)
    mixed = np.minimum(*sides)
    alike = (mixed * np.where(mixed > 0, np.nan_to_num(alike), 0) + 1) / (mixed + 1)
    found = exact(drawn.share, drawn.total / (1 + (drawn.mean_size - 1) * alike))
    for row in range(5):
        mine = share_interval(drawn.right[row], drawn.size[row])
        if not np.allclose(mine, (found[0][row], found[1][row]), atol=1e-6):
            raise SystemExit(f"share_interval says {mine}, here it is {found[0][row]} ...")
    return found


def korn_graubard(drawn: Drawn) -> Bounds:
    """Korn and Graubard 1998."""
    z = stats.norm.ppf(1 - TAIL)
    worth = drawn.total / np.maximum(drawn.effect, 1e-9) * (z / drawn.t) ** 2
    return exact(drawn.share, np.clip(worth, 1e-3, drawn.total))


def wilson(drawn: Drawn) -> Bounds:
    """Wilson 1927, with the design effect and t."""
    worth, t = drawn.total / np.maximum(drawn.effect, 1e-9), drawn.t
    middle = (drawn.share + t**2 / 2 / worth) / (1 + t**2 / worth)
    under_root = drawn.share * (1 - drawn.share) / worth + (t / 2 / worth) ** 2
    reach = t / (1 + t**2 / worth) * np.sqrt(under_root)
    return middle - reach, middle + reach


def over_wells(drawn: Drawn) -> Bounds:
    """Clopper and Pearson with wells as images."""
    return exact(drawn.share, drawn.total / drawn.mean_size)


def resampled(drawn: Drawn) -> tuple[Numbers, Numbers]:
    """Shares and their standard errors in wells that are drawn again, (resamples, trials)."""
    rng = np.random.default_rng(0)
    times = rng.multinomial(drawn.wells, np.full(drawn.wells, 1 / drawn.wells), RESAMPLES)
    times = times.astype(float)
    right, size = times @ drawn.right.T, times @ drawn.size.T
    share = right / size
    squares = (times @ (drawn.right**2).T - 2 * share * (times @ (drawn.right * drawn.size).T)
               + share**2 * (times @ (drawn.size**2).T))  # fmt: skip
    factor = drawn.wells / (drawn.wells - 1)
    return share, np.sqrt(np.maximum(factor * squares, 0)) / size


def at_ends(drawn: Drawn, low: Numbers, high: Numbers) -> Bounds:
    """Where all trials of a bootstrap are alike: Clopper and Pearson over wells."""
    below, above = over_wells(drawn)
    return np.where(drawn.end, below, low), np.where(drawn.end, above, high)


def percentile(drawn: Drawn) -> Bounds:
    """Percentile bootstrap."""
    return at_ends(drawn, *np.quantile(resampled(drawn)[0], [TAIL, 1 - TAIL], axis=0))


def studentised(drawn: Drawn) -> Bounds:
    """Bootstrap of t."""
    share, error = resampled(drawn)
    with np.errstate(all="ignore"):
        t = np.where(error > 0, (share - drawn.share) / error, 0)
    low, high = np.quantile(t, [TAIL, 1 - TAIL], axis=0)
    own = np.sqrt(drawn.variance)
    return at_ends(drawn, drawn.share - high * own, drawn.share - low * own)


def bca(drawn: Drawn) -> Bounds:
    """Bootstrap, bias-corrected and accelerated (Efron 1987)."""
    share = np.sort(resampled(drawn)[0], axis=0)
    below = (share < drawn.share).mean(axis=0) + (share == drawn.share).mean(axis=0) / 2
    bias = special.ndtri(np.clip(below, 1e-3, 1 - 1e-3))
    right, size = drawn.right.sum(axis=1), drawn.total
    without = (right[:, None] - drawn.right) / (size[:, None] - drawn.size)
    apart = without.mean(axis=1, keepdims=True) - without
    with np.errstate(all="ignore"):
        bend = np.nan_to_num((apart**3).sum(axis=1) / 6 / ((apart**2).sum(axis=1)) ** 1.5)
    bounds = []
    for z in stats.norm.ppf([TAIL, 1 - TAIL]):
        level = special.ndtr(bias + (bias + z) / (1 - bend * (bias + z)))
        row = np.clip((level * RESAMPLES).astype(int), 0, RESAMPLES - 1)
        bounds.append(share[row, np.arange(share.shape[1])])
    return at_ends(drawn, *bounds)


def beta_binomial(drawn: Drawn) -> Bounds:
    """Profile likelihood, t instead of z; NaN where wells differ in size."""
    size = int(drawn.size.max())
    if (drawn.size != size).any() or size > 20:
        return np.full_like(drawn.share, np.nan), np.full_like(drawn.share, np.nan)
    mean = np.linspace(0.0025, 0.9975, 399)
    alike = np.array([1e-6, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.999])
    spread = (1 - alike) / alike
    a, b = mean[:, None] * spread, (1 - mean[:, None]) * spread
    counts = np.arange(size + 1)[:, None, None]
    table = stats.betabinom.logpmf(counts, size, a, b)
    seen = (drawn.right[..., None] == counts.ravel()).sum(axis=1)
    likelihood = np.full((len(seen), len(mean)), -np.inf)
    for column in range(len(alike)):
        likelihood = np.maximum(likelihood, seen @ table[:, :, column])
    inside = likelihood >= likelihood.max(axis=1, keepdims=True) - drawn.t**2 / 2
    low = mean[inside.argmax(axis=1)]
    high = mean[len(mean) - 1 - inside[:, ::-1].argmax(axis=1)]
    step = mean[1] - mean[0]
    return np.where(low == mean[0], 0, low - step), np.where(high == mean[-1], 1, high + step)


METHODS: dict[str, Callable[[Drawn], Bounds]] = {
    "cellstore": cellstore,
    "Korn-Graubard": korn_graubard,
    "Wilson": wilson,
    "exact": over_wells,
    "percentile": percentile,
    "studentised": studentised,
    "BCa": bca,
    "beta-binomial": beta_binomial,
}
FAST = tuple(METHODS)[:4]


def table_line(name: str, rows: list[tuple[float, float, tuple[object, ...]]]) -> str:
    """One line of a table: coverage, width and setting of each row."""
    rows = [row for row in rows if np.isfinite(row[1])]
    if not rows:
        return f"{name:<14}      -"
    share, _, setting = min(rows, key=lambda row: row[0])
    below = sum(row[0] < LEAST for row in rows)
    width = float(np.mean([row[1] for row in rows]))
    where = ", ".join(map(str, setting))
    return f"{name:<14}{share:7.3f}{below:5d} of {len(rows):<5d}{width:7.3f}   {where}"


def accuracies(trials: int, wells: list[int], images: list[int], names: list[str]) -> None:
    """Print the table of intervals of an accuracy."""
    for number, size in product(wells, images):
        rng = np.random.default_rng([number, size])
        found: dict[str, list[tuple[float, float, tuple[object, ...]]]] = {n: [] for n in names}
        for kind, accuracy, alike in product(SHAPES, ACCURACIES, ALIKE):
            if size == 1 and (alike or kind == "normal"):
                continue
            *counts, truth = draw_wells(rng, (trials, number), size, accuracy, alike, kind)
            drawn = Drawn(*counts)
            for name in names:
                low, high = METHODS[name](drawn)
                held = float(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).mean())
                width = float(np.median(high - low))
                found[name].append((held, width, (kind, accuracy, alike)))
        title = f"{number} wells of {size or '1 to 9'} images"
        print(
            f"\n{title}\n{'method':<14} lowest  below 0.93  width   worst: shape, accuracy, alike"
        )
        for name in names:
            print(table_line(name, found[name]), flush=True)


def differences(trials: int, wells: list[int], images: list[int]) -> None:
    """Print the table of intervals of the difference of two runs."""
    trials = min(trials, 400)  # one after the other
    for number, size in product(wells, images):
        rng = np.random.default_rng([number, size, 2])
        found: dict[str, list[tuple[float, float, tuple[object, ...]]]] = {"cellstore": [], "t": []}
        for pair, alike in product(PAIRS, (0.0, 0.3, 0.7, 1.0)):
            if size == 1 and alike:
                continue
            chance = np.array([*pair, 1 - sum(pair)])
            own = np.broadcast_to(chance, (trials, number, 3))
            if alike == 1:
                own = rng.multinomial(1, chance, (trials, number)).astype(float)
            elif alike:
                spread = np.maximum(chance * (1 - alike) / alike, 1e-9)
                own = rng.gamma(spread, size=(trials, number, 3)) + 1e-300
                own = own / own.sum(axis=-1, keepdims=True)
            sizes = rng.integers(1, 10, (trials, number)) if size == 0 else size
            counts = rng.multinomial(np.broadcast_to(sizes, (trials, number)), own)
            truth, bounds = pair[0] - pair[1], []
            for trial in counts:
                well_of = np.repeat(np.tile(np.arange(number), 3), trial.T.ravel())
                kind = np.repeat(np.repeat(np.arange(3), number), trial.T.ravel())
                mine = well_interval(kind == 0, well_of, minus=kind == 1)
                gain, many = trial[:, 0] - trial[:, 1], trial.sum()
                mean = gain.sum() / many
                apart = (gain - mean * trial.sum(axis=1)) ** 2
                error = np.sqrt(number / (number - 1) * apart.sum()) / many
                reach = stats.t.ppf(1 - TAIL, number - 1) * error
                bounds.append((mine or (np.nan, np.nan), (mean - reach, mean + reach)))
            for name, some in zip(found, np.swapaxes(np.array(bounds), 0, 1), strict=True):
                low, high = some.T
                held = float(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).mean())
                found[name].append((held, float(np.median(high - low)), (*pair, alike)))
        title = f"difference, {number} wells of {size or '1 to 9'} images"
        print(f"\n{title}\n{'method':<14} lowest  below 0.93  width   worst: two shares, alike")
        for name, rows in found.items():
            print(table_line(name, rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000, help="simulations of each setting")
    parser.add_argument("--wells", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), help="0: 1 to 9")
    parser.add_argument("--methods", nargs="+", default=list(FAST), choices=[*METHODS, "all"])
    parser.add_argument("--difference", action="store_true", help="of two runs (400 trials)")
    given = parser.parse_args()
    if given.difference:
        differences(given.trials, given.wells, given.images)
        return
    names = list(METHODS) if "all" in given.methods else given.methods
    accuracies(given.trials, given.wells, given.images, names)


if __name__ == "__main__":
    main()
