"""Whether one of two runs is right more often than the other, on the same images.

McNemar's test (Psychometrika 12, 1947) looks at the cases in which one of the two is right and asks
whether they divide as unevenly as a fair coin seldom does. It takes cases to be independent.
Images of a well are not: counted singly, nine alike images make nine witnesses of one, and the
test finds differences that are none (``benchmarks/compare_errors.py`` shows how often). So each
well has one voice here: the run that is right in more of its images. Among wells with a voice that
is McNemar's exact test, which is the sign test (Dixon and Mood, J. Am. Stat. Assoc. 41, 1946), and
it errs in at most 5 % of cases at p = 0.05 however few wells there are and however alike their
images. The adjusted chi-square tests for clusters (Obuchowski, Stat. Med. 17, 1998; Durkalski et
al., Stat. Med. 22, 2003) see smaller differences where wells have unequal numbers of images, but
hold for many wells only, and err more often than they say for few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cellstore.errors import UserInputError


@dataclass(frozen=True)
class WellTest:
    """``first`` and ``second``: wells in which that run is right more often; two-sided p."""

    first: int
    second: int
    p_value: float


def mcnemar_over_wells(first: ArrayLike, second: ArrayLike, wells: ArrayLike) -> WellTest:
    """Return McNemar's exact test with one voice per well.

    ``first`` and ``second`` are (N,) booleans, whether each run is right, and ``wells`` (N,) the
    well of each image. With one image per well it is McNemar's exact test as it is known.
    """
    gain = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    names = np.asarray(wells)
    if gain.ndim != 1 or gain.size == 0 or gain.shape != names.shape:
        raise UserInputError(f"There are {gain.shape} images and {names.shape} wells.")
    _, well_of = np.unique(names, return_inverse=True)
    # Whole numbers far below 2 ** 53, so that the sums are exact.
    voices = np.sign(np.bincount(well_of, weights=gain))
    more, less = int((voices > 0).sum()), int((voices < 0).sum())
    return WellTest(more, less, sign_test(more, less))


def sign_test(more: int, less: int) -> float:
    """Return the two-sided p of ``more`` heads and ``less`` tails of a fair coin.

    It is ``scipy.stats.binomtest(more, more + less).pvalue``; 1 where there was no throw.
    """
    throws, fewer = more + less, min(more, less)
    ways = total = 1
    for i in range(fewer):
        ways = ways * (throws - i) // (i + 1)
        total += ways
    share: float = 2 * total / 2**throws
    return min(1.0, share)
