"""Whether treated cells differ from control cells at all, on wells never seen.

The published sanity check: a logistic regression of treated against control cells on their
features. Here no well is in both parts of a fold, since cells of one well are alike whatever was
done to it, and cells are balanced, so that 0.5 is chance. What chance looks like with so many wells
is measured, too: by control wells against other control wells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserInputError

Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

FEWEST_WELLS = 2
"""Wells that treated and control must have each: with one, no other is left to learn from."""

FEWEST_NULLS = 19
"""Comparisons among controls: chance exceeds the largest of fewer more often than once in 20."""


class Difference(StrEnum):
    """Whether a treatment looks different from control."""

    YES = "yes"
    NO = "no"
    TOO_FEW = "too few wells"


@dataclass(frozen=True)
class Contrast:
    """How well cells of T treated wells are told from cells of C control wells.

    ``accuracy``, ``balanced_accuracy`` and ``auc`` (area under the ROC curve: how often a treated
    cell looks more treated than a control cell) are of cells in folds that did not train.
    """

    treated_wells: int
    control_wells: int
    treated_cells: int
    control_cells: int
    accuracy: float
    balanced_accuracy: float
    auc: float


def contrast(
    rows: Numbers,
    treated: Flags,
    wells: Ids,
    plates: NDArray[Any] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Contrast:
    """Cross-validate a logistic regression of ``treated`` (N,) on ``rows`` (N, F) by well.

    ``wells`` (N,) name the well of each cell, ``plates`` (N,) its plate. Rows are standardised
    plate by plate, over treated and control cells, of which there should be as many on each plate:
    plates may differ by more than any treatment does, and this takes no label. In each fold they
    are standardised as its training cells are. A value that is NaN becomes 0, the mean. There are
    at most as many folds as there are treated wells, or control wells.

    Raises ``UserInputError`` where one well only is treated, or is control.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    ours, theirs = (np.unique(wells[treated == which]) for which in (True, False))
    smallest = min(len(ours), len(theirs))
    if smallest < FEWEST_WELLS:
        raise UserInputError("Treated and control need two wells or more each to hold one out.")
    if plates is not None:
        scaled = np.empty_like(rows)
        for plate in np.unique(plates):
            there = plates == plate
            scaled[there] = _standardised(rows[there], rows[there])[0]
        rows = scaled
    # Log odds that a cell is treated, by a model that has not seen its well.
    scores = np.zeros(len(rows))
    splitter = StratifiedGroupKFold(min(folds, smallest), shuffle=True, random_state=seed)
    for train, test in splitter.split(rows, treated, wells):
        seen, held = _standardised(rows[train], rows[test])
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        scores[test] = model.fit(seen, treated[train]).decision_function(held)
    control = np.sort(scores[~treated])  # a draw counts half (Mann and Whitney 1947)
    below, upto = (np.searchsorted(control, scores[treated], side=s) for s in ("left", "right"))
    predicted = scores > 0
    recall = [float(np.mean(predicted[treated == which] == which)) for which in (True, False)]
    return Contrast(
        treated_wells=len(ours),
        control_wells=len(theirs),
        treated_cells=int(treated.sum()),
        control_cells=int((~treated).sum()),
        accuracy=float(np.mean(predicted == treated)),
        balanced_accuracy=sum(recall) / 2,
        auc=float(np.mean(below + upto) / 2 / control.size),
    )


def usual_auc(nulls: Sequence[float]) -> float | None:
    """Return what 19 of 20 AUCs of control wells against control wells (``nulls``) do not exceed.

    Of 20 or fewer it is the largest, and 0.5 at least. ``None`` where there are fewer than
    ``FEWEST_NULLS``.
    """
    if len(nulls) < FEWEST_NULLS:
        return None
    return max(0.5, float(np.quantile(nulls, 0.95, method="higher")))


def judge(auc: float, nulls: Sequence[float]) -> Difference:
    """Return whether a treatment looks different from control: more than controls among themselves.

    There is no interval of the AUC: with the two to four wells that a treatment usually has, one by
    drawing wells would hold the true area in 66 to 90 % of cases.
    """
    usual = usual_auc(nulls)
    if usual is None:
        return Difference.TOO_FEW
    return Difference.YES if auc > usual else Difference.NO


def _standardised(train: Numbers, test: Numbers) -> tuple[Numbers, Numbers]:
    there = np.isfinite(train)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, train, 0.0).sum(axis=0) / count
    deviation = np.sqrt((np.where(there, train - mean, 0.0) ** 2).sum(axis=0) / count)
    varies = deviation > 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1e-300)
    scale = np.where(varies, deviation, 1.0)
    scaled = [
        np.nan_to_num((some - mean) / scale, nan=0.0, posinf=0.0, neginf=0.0)
        for some in (train, test)
    ]
    return scaled[0], scaled[1]
