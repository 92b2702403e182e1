"""Normalisation by plate: numbers worked out by hand, and what no plate-wide change moves."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellstore.errors import UserInputError
from cellstore.learn.crops import image_scale
from cellstore.learn.normalising import Scale, Scaler, fit_scale

NAMES = ("a", "b")


def fitted(plates: dict[str, tuple[list, list]], names=NAMES, *, gaps=False) -> Scaler:
    """A scaler of plates, each with its control rows and all its rows."""
    controls = {
        barcode: fit_scale(names, [rows], gaps=gaps) for barcode, (rows, _) in plates.items()
    }
    blocks = ((barcode, rows) for barcode, (_, rows) in plates.items())
    return Scaler.fit_plates(names, controls, blocks, gaps=gaps)


def test_features_are_standardised_by_the_controls_of_their_plate_then_as_a_whole() -> None:
    # Controls of P1: a has mean 2 and deviation 1, b mean 10 and deviation 5; of P2: a 20, 10.
    one = [[1, 5], [3, 15]], [[1, 5], [3, 15], [6, 10]]
    two = [[10, 0], [30, 2]], [[10, 0], [30, 2], [20, 3]]
    scaler = fitted({"P1": one, "P2": two})
    assert scaler.plates["P1"] == Scale((2.0, 10.0), (1.0, 5.0), 2)
    assert scaler.plates["P2"] == Scale((20.0, 1.0), (10.0, 1.0), 2)
    # Against the controls, a: -1 1 4, -1 1 0 (mean 4/6), b: -1 1 0, -1 1 2 (mean 2/6).
    normalised = np.array([[-1, -1], [1, 1], [4, 0], [-1, -1], [1, 1], [0, 2]], float)
    assert scaler.mean == pytest.approx([4 / 6, 2 / 6])
    assert scaler.scale == pytest.approx(normalised.std(axis=0))
    expected = (normalised - normalised.mean(axis=0)) / normalised.std(axis=0)
    found = np.concatenate([scaler.transform(one[1], "P1"), scaler.transform(two[1], "P2")])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(
    factor=st.floats(0.01, 100),
    shift=st.floats(-1000, 1000),
    seed=st.integers(0, 1000),
)
def test_what_changes_a_whole_plate_changes_no_normalised_value(
    factor: float, shift: float, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    rows = dice.normal(dice.normal(), 1 + dice.random(), (12, 2))
    other = dice.normal(3, 2, (8, 2))
    changed = rows * factor + shift

    def of(first: np.ndarray) -> np.ndarray:
        scaler = fitted({"P1": (first[:6], first), "P2": (other[:4], other)})
        return np.concatenate([scaler.transform(first, "P1"), scaler.transform(other, "P2")])

    np.testing.assert_allclose(of(changed), of(rows), rtol=1e-4, atol=1e-4)


def test_blocks_of_controls_are_as_one() -> None:
    rows = np.random.default_rng(1).normal(5, 3, (50, 2))
    whole = fit_scale(NAMES, [rows])
    pieces = fit_scale(NAMES, [rows[:1], rows[1:1], rows[1:20], rows[20:]])
    for found, expected, of_pieces in zip(
        (whole.mean, whole.scale),
        (rows.mean(axis=0), rows.std(axis=0)),
        (pieces.mean, pieces.scale),
        strict=True,
    ):
        assert found == pytest.approx(expected)
        assert of_pieces == pytest.approx(found)
    assert whole.cells == pieces.cells == 50


def test_a_feature_in_which_the_controls_do_not_vary_is_only_shifted() -> None:
    scaler = fitted({"P1": ([[0.1, 1], [0.1, 2]], [[0.1, 1], [2.1, 2], [4.1, 3]])})
    assert scaler.plates["P1"].scale == (1.0, 0.5)
    assert scaler.mean[0] == pytest.approx(2.0)


def test_gaps_are_left_out_and_become_the_mean() -> None:
    nan = math.nan
    controls = [[1, nan, nan], [3, nan, 4], [nan, nan, 6]]
    one = controls, [[1, nan, 5], [5, nan, nan]]
    two = [[0, nan, nan], [2, nan, nan]], [[0, nan, 7], [2, nan, 8]]
    scaler = fitted({"P1": one, "P2": two}, ("a", "never", "b"), gaps=True)
    assert scaler.names == ("a", "b")
    assert scaler.plates["P1"] == Scale((2.0, 5.0), (1.0, 1.0), 3)
    # No control of P2 has b: its values there say nothing, and count as the mean.
    assert scaler.transform([[2, 7], [nan, nan]], "P2")[:, 1].tolist() == [0, 0]
    again = Scaler.from_json(json.loads(json.dumps(scaler.to_json(), allow_nan=False)))
    np.testing.assert_array_equal(again.transform([[2, 7]], "P2"), scaler.transform([[2, 7]], "P2"))


def test_a_plate_without_statistics_is_named() -> None:
    scaler = fitted({"P1": ([[1, 2], [3, 4]], [[1, 2], [3, 4]])})
    for plate in ("P9", None):
        with pytest.raises(UserInputError, match=f"no control cells of plate {plate!r}"):
            scaler.transform([[1, 2]], plate)
    more = replace(scaler, plates={**scaler.plates, "P9": Scale((2.0, 3.0), (1.0, 1.0), 2)})
    np.testing.assert_array_equal(more.transform([[1, 2]], "P9"), scaler.transform([[1, 2]], "P1"))


def test_a_scaler_is_its_record_and_nothing_else() -> None:
    plain = Scaler(("a",), (1.0,), (2.0,))
    assert Scaler.from_json(json.loads(json.dumps(plain.to_json()))) == plain
    scaler = fitted({"P1": ([[1, 2], [3, 4]], [[1, 2], [3, 4]])})
    scaler = replace(scaler, intensities={"P1": (1.5, 2.0), "P2": (3.0, 4.0)}, own=("P2",))
    record = json.loads(json.dumps(scaler.to_json()))
    assert Scaler.from_json(record) == scaler
    short = {"mean": [1.0], "scale": [1.0], "cells": 2}
    for key, value in (
        ("names", ["a"]),
        ("mean", [1.0, math.inf]),
        ("plates", 7),
        ("plates", {"P1": {}}),
        ("plates", {"P1": short}),
        ("plates", {"P1": {"mean": [1, 1], "scale": [0, 1], "cells": 2}}),
        ("own", 7),
        ("intensities", 7),
        ("intensities", {"P1": [math.inf]}),
    ):
        with pytest.raises(UserInputError):
            Scaler.from_json({**record, key: value})
    with pytest.raises(UserInputError):
        Scaler.from_json(7)  # type: ignore[arg-type]


def test_the_intensity_that_becomes_one_is_a_high_percentile() -> None:
    plane = np.arange(1001).reshape(7, 143)
    assert image_scale(plane) == pytest.approx(999.0)
    almost_black = np.zeros((100, 100))
    almost_black[0, 0] = 7
    assert image_scale(almost_black) == 7
