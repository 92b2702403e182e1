"""Features in words: what is known, what keeps its name, what is said once."""

from __future__ import annotations

import numpy as np
import pytest

from cellstore.report.feature_words import changes, in_words


@pytest.mark.parametrize(
    ("column", "more", "less"),
    [
        ("area", "cells larger", "cells smaller"),
        ("mean_intensity", "cells brighter", "cells darker"),
        ("mean_intensity_DNA", "DNA brighter", "DNA darker"),
        ("contrast_d3_Mito", "texture of Mito rougher", "texture of Mito smoother"),
        ("edge_mean_intensity_ER", "ER brighter at the edge of cells", None),
        ("Nuclei_AreaShape_Area", "nuclei larger", "nuclei smaller"),
        ("Cells_Intensity_MADIntensity_AGP", "AGP more uneven in cells", None),
        ("Cells_Granularity_3_Mito", "Mito more grainy in cells", None),
    ],
)
def test_known_features_are_words(column: str, more: str, less: str | None) -> None:
    assert in_words(column, True) == more
    if less is not None:
        assert in_words(column, False) == less


@pytest.mark.parametrize(
    "column", ["e17", "orientation", "Cells_AreaShape_Zernike_0_0", "Cells_Correlation_X_DNA_ER"]
)
def test_unknown_features_keep_their_names(column: str) -> None:
    assert in_words(column, True) is None
    assert changes([column], np.array([3.0]), 1, 5) == [(f"{column} higher", 3.0)]


def test_the_largest_change_is_said_first_and_once() -> None:
    columns = ["area", "convex_area", "mean_intensity_DNA", "min_intensity_DNA", "e1", "solidity"]
    shifts = np.array([-2.0, -3.0, 4.0, -3.5, 0.5, np.nan])
    said = changes(columns, shifts, 1, 5)
    assert said == [("DNA brighter", 4.0), ("cells smaller", -3.0)]
    assert changes(columns, shifts, 1, 1) == [("DNA brighter", 4.0)]
