"""How often the comparison of two runs finds a difference where there is none, and where there is.

Two runs are right with the same probability in every image, or the second by some points more
often, but images of a well are alike: a well is easy or hard for both, and each run has a liking of
its own for each well. Three tests are asked at p < 0.05: McNemar's exact test over images, as is
often done; the test for clusters of Durkalski et al. (Statistics in Medicine 22, 2003), which is
that of Obuchowski (1998) for pairs; and that of ``cellstore compare``, which exchanges whole wells.

Then a run is put beside four null baselines, as `cellstore report` does it. It is as good as the
best of them, or as all, and called better by one of these rules: its accuracy is above the interval
of each baseline's (as reports once said); it is better than some baseline by the test, at 5 %
without regard to their number, or by Holm's method; it is better than each of them, which is the
rule of `cellstore report`. One row has a baseline that always says one class: right in all wells of
that class and in no other.

python benchmarks/compare_errors.py [--trials 1000]

Takes a minute.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from cellstore.analysis.statistics import mcnemar_over_wells, well_interval

LEVEL = 0.05
NULLS = 4
IMAGES = 9
WELLS = (10, 40, 160, 320)
GAINS = (0.0, 0.1)
LIKING = (0.0, 1.0, 2.0)
"""How much a run's logit for a well differs from what both find easy: standard deviation."""

Right = NDArray[np.bool_]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--trials", type=int, default=1000, help="pairs of runs per row")
    trials = arguments.parse_args().trials
    print(f"{trials} pairs of runs per row, {IMAGES} images a well, accuracy about 50 %;")
    print("share of pairs with p < 0.05: false alarms where the gain is 0, else hits\n")
    print("gain  liking  wells   over images   Durkalski   cellstore")
    for gain in GAINS:
        for liking in LIKING:
            for wells in WELLS:
                shares = rates(trials, wells, liking, gain)
                print(f"{gain:4.2f}  {liking:6.1f}  {wells:5d}   " + row(shares))
    print(f"\na run beside {NULLS} null baselines, called better than")
    print("as good as        wells   intervals   one of them      Holm   each (cellstore)")
    for equals in ("best", "all", "one class"):
        for wells in (8, *WELLS[:3]):
            rates_of = against_nulls(trials, wells, equals)
            print(f"{equals:<16}{wells:7d}   {row(rates_of)}")


def row(shares: tuple[float, ...]) -> str:
    return "  ".join(f"{100 * share:9.1f} %" for share in shares)


def rates(trials: int, wells: int, liking: float, gain: float) -> tuple[float, float, float]:
    """Return how often each of the three tests finds a difference."""
    generator = np.random.Generator(np.random.PCG64([wells, int(10 * liking), int(100 * gain)]))
    well_of = np.repeat(np.arange(wells), IMAGES)
    found = np.zeros(3)
    for _ in range(trials):
        first, second = simulated(generator, well_of, wells, liking, gain)
        found += [
            over_images(first, second) < LEVEL,
            durkalski(first, second, well_of) < LEVEL,
            mcnemar_over_wells(first, second, well_of).p_value < LEVEL,
        ]
    return tuple((found / trials).tolist())


def against_nulls(trials: int, wells: int, equals: str) -> tuple[float, ...]:
    """Return how often a run that is as good as one baseline, or all, is called better."""
    seed = [wells, ("best", "all", "one class").index(equals)]
    generator = np.random.Generator(np.random.PCG64(seed))
    well_of = np.repeat(np.arange(wells), IMAGES)
    found = np.zeros(4)
    for _ in range(trials):
        easy = generator.normal(0, 1, wells)
        # Logits of the baselines, then of the run; right in about a quarter of the images.
        middle = np.full(NULLS + 1, -1.1)
        if equals == "best":
            middle[1:NULLS] = (-1.6, -2.0, -2.5)
        logits = middle[:, None] + easy + generator.normal(0, 1, (NULLS + 1, wells))
        right = generator.random((NULLS + 1, well_of.size)) < 1 / (1 + np.exp(-logits[:, well_of]))
        if equals == "one class":  # a quarter of the wells
            right[0] = well_of % 4 == 0
            right[NULLS] = generator.random(well_of.size) < 1 / 4
            right[1:NULLS] &= generator.random((NULLS - 1, well_of.size)) < 0.5
        run, baselines = right[NULLS], right[:NULLS]
        above = [run.mean() > some.mean() for some in baselines]
        p = [mcnemar_over_wells(run, some, well_of).p_value for some in baselines]
        intervals = [well_interval(some, well_of) or (0, 1) for some in baselines]
        # Holm: the smallest p is compared with LEVEL / NULLS, and so on.
        order = np.argsort(p)
        holm = np.maximum.accumulate(np.array(p)[order] * np.arange(NULLS, 0, -1)) < LEVEL
        truly = range(1) if equals != "all" else range(NULLS)  # those it is not better than
        found += [
            all(run.mean() > high for _, high in intervals),
            any(above[i] and p[i] < LEVEL for i in truly),
            any(above[i] and holm[list(order).index(i)] for i in truly),
            all(above[i] and p[i] < LEVEL for i in range(NULLS)),
        ]
    return tuple((found / trials).tolist())


def simulated(
    generator: np.random.Generator,
    well_of: NDArray[np.int64],
    wells: int,
    liking: float,
    gain: float,
) -> tuple[Right, Right]:
    """Whether each of two runs is right in each image; the second is better by about ``gain``."""
    easy = generator.normal(0, 1.5, wells)
    own = generator.normal(0, liking, (2, wells))
    spread = math.sqrt(1.5**2 + liking**2)
    shift = 4 * gain * math.sqrt(1 + spread**2 * 0.3)
    logits = (easy + own[0], easy + own[1] + shift)
    chance = [1 / (1 + np.exp(-values[well_of])) for values in logits]
    first, second = (generator.random(well_of.size) < share for share in chance)
    return first, second


def over_images(first: Right, second: Right) -> float:
    """The two-sided p of McNemar's exact test, each image by itself."""
    more, less = int((first & ~second).sum()), int((second & ~first).sum())
    return min(1.0, 2 * float(binom.cdf(min(more, less), more + less, 0.5)))


def durkalski(first: Right, second: Right, well_of: NDArray[np.int64]) -> float:
    """The two-sided p of Durkalski's statistic, chi-square with one degree of freedom."""
    gain = np.bincount(well_of, weights=first.astype(float) - second)
    mean = gain / np.bincount(well_of)
    below = float((mean**2).sum())
    return 1.0 if below == 0 else math.erfc(math.sqrt(float(mean.sum()) ** 2 / below / 2))


if __name__ == "__main__":
    main()
