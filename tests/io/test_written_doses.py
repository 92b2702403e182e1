"""One dose in several units is one number."""

from __future__ import annotations

import math

import pytest

from cellstore.io.map_shapes import normalised_dose


@pytest.mark.parametrize(
    ("dose", "unit"),
    [
        (5, "uM"),
        (5, "\u00b5M"),
        (5, "\u03bcM"),
        (5000, "nM"),
        (0.005, "mM"),
        (5e-6, "M"),
        (5e6, "pM"),
        (5, " umol/L "),
        (5, "micromolar"),
        (5000, "nm"),
    ],
)
def test_molar_doses_are_in_micromolar(dose: float, unit: str) -> None:
    assert normalised_dose(dose, unit) == (5.0, "uM")


@pytest.mark.parametrize("unit", ["%", "ng/ml", "MOI", "mg"])
def test_other_units_stay(unit: str) -> None:
    assert normalised_dose(0.1, unit) == (0.1, unit)


@pytest.mark.parametrize("unit", ["mg/mL", "ug/mL", "g/L", "\u00b5g/mL"])
def test_litres_are_written_in_one_way(unit: str) -> None:
    plain = unit.replace("L", "l").replace("\u00b5", "u")
    assert normalised_dose(1, unit) == normalised_dose(1, plain) == (1.0, plain)


def test_a_dose_may_have_no_unit() -> None:
    assert normalised_dose(2, None) == normalised_dose(2, " ") == (2.0, None)


def test_digits_that_arithmetic_makes_up_are_dropped() -> None:
    assert normalised_dose(0.3, "nM") == (0.0003, "uM")
    assert normalised_dose(1.1, "mM") == (1100.0, "uM")


@pytest.mark.parametrize("dose", [-1, math.nan, math.inf])
def test_what_is_no_dose(dose: float) -> None:
    with pytest.raises(ValueError, match="no dose"):
        normalised_dose(dose, "uM")
