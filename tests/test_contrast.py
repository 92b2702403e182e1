"""Treated cells against control cells: what is there is found, and what is not is not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cellstore.analysis.contrasts import (
    Contrast,
    Difference,
    auc_interval,
    contrast,
    judge,
    win_counts,
)
from cellstore.errors import UserInputError

pytest.importorskip("sklearn")

Screen = tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]


def screen(
    *, effect: float = 0.0, of_well: float = 0.0, wells: int = 6, cells: int = 30, seed: int = 0
) -> Screen:
    """Features (N, 4) of as many treated as control wells; wells differ by ``of_well``."""
    random = np.random.default_rng(seed)
    well = np.repeat(np.arange(2 * wells), cells)
    treated = well < wells
    shift = random.normal(size=(2 * wells, 4)) * of_well
    rows = random.normal(size=(len(well), 4)) + shift[well]
    rows[:, 0] += effect * treated
    return rows, treated, well


def test_what_is_apart_is_told_apart() -> None:
    found = contrast(*screen(effect=20.0))
    assert (found.accuracy, found.balanced_accuracy, found.auc) == (1, 1, 1)
    # twelve wells without an error: 1 is not certain
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 12)), 1)
    assert (found.treated_wells, found.control_wells, found.treated_cells) == (6, 6, 180)


def test_a_shift_gives_the_area_that_theory_says() -> None:
    # Two normals a standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.760.
    found = contrast(*screen(effect=1.0, wells=10, cells=200))
    assert found.auc == pytest.approx(0.760, abs=0.02)
    assert found.low < 0.760 < found.high


def test_without_an_effect_there_is_nothing() -> None:
    areas = [contrast(*screen(seed=seed)).auc for seed in range(20)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03)


def test_a_well_that_is_held_out_does_not_give_itself_away() -> None:
    """Wells that differ much for no reason: learned by heart they would give 1."""
    areas = [contrast(*screen(of_well=3.0, seed=seed)).auc for seed in range(20)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)
    assert np.mean([contrast(*each_cell_its_own_well(s)).auc for s in range(3)]) > 0.8


def each_cell_its_own_well(seed: int) -> Screen:
    """What cross-validation by cell would see."""
    rows, treated, wells = screen(of_well=3.0, seed=seed)
    return rows, treated, np.arange(len(wells))


def test_plates_may_differ_by_more_than_treatments() -> None:
    rows, treated, wells = screen(effect=3.0)
    plates = wells % 2
    rows += 100.0 * plates[:, None]
    assert contrast(rows, treated, wells).auc < 0.9
    assert contrast(rows, treated, wells, plates).auc > 0.97
    areas = []
    for seed in range(20):
        rows, treated, wells = screen(of_well=1.0, seed=seed)
        rows += 100.0 * (wells % 2)[:, None]
        areas.append(contrast(rows, treated, wells, wells % 2).auc)
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)


def test_the_area_is_that_of_scikit_learn_and_its_interval_that_of_wells() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    wells = np.sort(random.integers(0, 7, 300))
    treated = wells < 3
    scores = np.round(random.normal(size=300) + treated, 1)  # with draws
    wins, sizes = win_counts(scores, treated, wells)
    area = wins.sum() / (sizes[0].sum() * sizes[1].sum())
    assert area == pytest.approx(metrics.roc_auc_score(treated, scores), abs=1e-12)
    # two wells a side, of which one treated well always wins and the other never does: 0, half
    # or all, with probability 1/4, 1/2, 1/4
    wins = np.array([[4.0, 4.0], [0.0, 0.0]])
    two = np.array([2, 2])
    assert auc_interval(wins, (two, two), 0) == (0.0, 1.0)
    assert auc_interval(0 * wins, (two, two), 0) == (0, pytest.approx(1 - 0.025 ** (1 / 4)))
    same = np.full((2, 2), 2.0)
    assert auc_interval(same, (two, two), 0) == (0.5, 0.5)


def test_a_value_that_is_missing_counts_as_the_mean() -> None:
    rows, treated, wells = screen(effect=20.0)
    rows[::7, 1:] = np.nan
    rows[:, 3] = np.nan
    assert contrast(rows, treated, wells).auc == 1


def test_one_well_cannot_be_held_out() -> None:
    rows, treated, wells = screen()
    alone = (wells == 0) | ~treated
    with pytest.raises(UserInputError, match="two wells or more"):
        contrast(rows[alone], treated[alone], wells[alone])


def found(auc: float, low: float) -> Contrast:
    return Contrast(3, 3, 30, 30, 0.6, 0.6, auc, low, 0.9)


def test_a_treatment_must_be_above_chance_and_above_controls_among_themselves() -> None:
    nulls = [0.4, 0.5, 0.6] * 7
    assert judge(found(0.7, 0.55), nulls) is Difference.YES
    assert judge(found(0.7, 0.49), nulls) is Difference.NO
    assert judge(found(0.58, 0.55), nulls) is Difference.NO
    assert judge(found(0.58, 0.55), []) is Difference.YES
    # Two control wells may be less alike than any: that is no reason to believe anything.
    assert judge(found(0.45, 0.51), [0.3]) is Difference.NO
