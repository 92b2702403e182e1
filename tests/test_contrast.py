"""Treated cells against control cells: what is there is found, and what is not is not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cellstore.analysis.contrasts import (
    Difference,
    contrast,
    judge,
    usual_auc,
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
    assert (found.treated_wells, found.control_wells, found.treated_cells) == (6, 6, 180)


def test_a_shift_gives_the_area_that_theory_says() -> None:
    # Two normals a standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.760.
    found = contrast(*screen(effect=1.0, wells=10, cells=200))
    assert found.auc == pytest.approx(0.760, abs=0.02)


def test_without_an_effect_there_is_nothing() -> None:
    rows, treated, wells = screen()
    assert contrast(0 * rows, treated, wells).auc == 0.5  # a draw counts half
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


def test_a_treatment_must_be_above_controls_among_themselves() -> None:
    nulls = [0.4, 0.5, 0.6, 0.7, *[0.5] * 16]
    assert usual_auc(nulls) == 0.7
    assert usual_auc(nulls * 2 + [0.9]) == 0.7  # one of 41 is above
    assert judge(0.71, nulls) is Difference.YES
    assert judge(0.7, nulls) is Difference.NO
    # Two control wells may be less alike than any: that is no reason to believe anything.
    assert judge(0.45, [0.3] * 20) is Difference.NO
    assert judge(0.9, []) is Difference.TOO_FEW  # chance was not measured
    assert judge(0.9, [0.5] * 18) is Difference.TOO_FEW
