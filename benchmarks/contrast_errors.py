"""How often `cellstore contrast` sees a difference where there is none.

python benchmarks/contrast_errors.py [--times 60] [--cells 30]

Made-up cells of 10 features on one plate, without any effect of a treatment; wells are alike
(spread 0) or differ by as much as cells do (spread 1). For each setting, the share of treatments
that get a yes: their area under the ROC curve is above those of control wells against control
wells. Takes some minutes.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from cellstore.analysis.contrasts import Contrast, Difference, contrast, judge

SETTINGS = [(treated, control) for treated in (2, 4) for control in (8, 32)]
NULLS, FEATURES = 20, 10
Wells = NDArray[np.float64]


def compared(generator: np.random.Generator, treated: Wells, control: Wells) -> Contrast:
    """Wells (W, cells, F), called treated, against others, as many cells of each side."""
    ours, theirs = (wells.reshape(-1, FEATURES) for wells in (treated, control))
    place = np.arange(len(ours) + len(theirs)) // treated.shape[1]
    drawn = len(ours) + generator.permutation(len(theirs))[: len(ours)]
    chosen = np.concatenate([np.arange(len(ours)), drawn])
    rows = np.concatenate([ours, theirs])
    return contrast(rows[chosen], chosen < len(ours), place[chosen])


def share(wells: int, control: int, spread: float, times: int, cells: int) -> float:
    """The share of yes."""
    found = 0
    for seed in range(times):
        generator = np.random.default_rng([seed, wells, control])
        shift = spread * generator.standard_normal((wells + control, 1, FEATURES))
        noise = generator.standard_normal((wells + control, cells, FEATURES))
        drawn = shift + noise
        auc = compared(generator, drawn[control:], drawn[:control]).auc
        nulls = []
        for _ in range(NULLS):
            order = generator.permutation(control)
            nulls.append(compared(generator, *np.split(drawn[order], [wells])).auc)
        found += judge(auc, nulls) is Difference.YES
    return found / times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=60, help="treatments for each setting")
    parser.add_argument("--settings", nargs="+", type=int, help="treated and control wells, ...")
    parser.add_argument("--cells", type=int, default=30, help="cells in a well")
    given = parser.parse_args()
    pairs = [*zip(*[iter(given.settings)] * 2, strict=True)] if given.settings else SETTINGS
    print("treated  control  spread   yes")
    for spread in (0.0, 1.0):
        for wells, control in pairs:
            found = share(wells, control, spread, given.times, given.cells)
            print(f"{wells:7}  {control:7}  {spread:6.1f}  {found:6.1%}", flush=True)


if __name__ == "__main__":
    main()
