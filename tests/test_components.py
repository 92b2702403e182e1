"""Principal components of rows, against the singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from cellstore.analysis.components import components_of


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_components_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(3).normal(size=shape) * np.linspace(5, 1, shape[1])
    values -= values.mean(axis=0)
    found = values @ components_of(values, 3)
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    expected = left[:, :3] * sizes[:3]
    expected *= np.where(np.abs(expected).max(0) == expected.max(0), 1, -1)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_rows_that_are_all_alike_lie_on_one_point() -> None:
    assert not components_of(np.zeros((3, 5))).any()
    assert not (np.zeros((5, 3)) @ components_of(np.zeros((5, 3)))).any()
