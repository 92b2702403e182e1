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

from cellstore.analysis.contrasts import Contrast, Difference, contrast, judge

SETTINGS = [(treated, control) for treated in (2, 4) for control in (8, 32)]
NULLS, FEATURES = 20, 10


def compared(generator: np.random.Generator, wells: int, rows: np.ndarray, cells: int) -> Contrast:
    """So many wells, called treated, against the others, as many cells of each side."""
    names = generator.permutation(len(rows) // cells)
    place = np.arange(len(rows)) // cells
    ours = np.flatnonzero(np.isin(place, names[:wells]))
    theirs = np.flatnonzero(np.isin(place, names[wells:]))
    chosen = np.concatenate([ours, generator.permutation(theirs)[: len(ours)]])
    return contrast(rows[chosen], np.isin(place[chosen], names[:wells]), place[chosen])


def share(wells: int, control: int, spread: float, times: int, cells: int) -> float:
    """The share of yes."""
    found = 0
    for seed in range(times):
        generator = np.random.default_rng([seed, wells, control])
        shift = spread * generator.standard_normal((wells + control, 1, FEATURES))
        noise = generator.standard_normal((wells + control, cells, FEATURES))
        rows = (shift + noise).reshape(-1, FEATURES)
        auc = compared(generator, wells, rows, cells).auc
        controls = rows[: control * cells]
        nulls = [compared(generator, wells, controls, cells).auc for _ in range(NULLS)]
        found += judge(auc, nulls) is Difference.YES
    return found / times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=60, help="treatments for each setting")
    parser.add_argument("--cells", type=int, default=30, help="cells in a well")
    given = parser.parse_args()
    print("treated  control  spread   yes")
    for spread in (0.0, 1.0):
        for wells, control in SETTINGS:
            found = share(wells, control, spread, given.times, given.cells)
            print(f"{wells:7}  {control:7}  {spread:6.1f}  {found:6.1%}", flush=True)


if __name__ == "__main__":
    main()
