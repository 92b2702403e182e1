"""Measurements: analytic answers on drawn cells, and equality with scikit-image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops

from cellstore.errors import ImageError
from cellstore.ops.features import FEATURE_NAMES, FEATURES, cell_boxes, measure_cells

PUBLISHED = {
    "area",
    "convex_area",
    "perimeter",
    "eccentricity",
    "mean_intensity",
    "min_intensity",
    "max_intensity",
    "major_axis_length",
    "minor_axis_length",
    "orientation",
    "solidity",
    "extent",
    "centroid_y",
    "centroid_x",
}

# Attribute of a scikit-image region for each of our names.
SKIMAGE = {
    "convex_area": "area_convex",
    "mean_intensity": "intensity_mean",
    "min_intensity": "intensity_min",
    "max_intensity": "intensity_max",
    "major_axis_length": "axis_major_length",
    "minor_axis_length": "axis_minor_length",
}


def two_cells() -> tuple[np.ndarray, np.ndarray]:
    """A 4 x 6 rectangle with label 7 and an L of 3 pixels with label 3."""
    masks = np.zeros((12, 12), dtype=np.uint16)
    masks[2:6, 1:7] = 7
    masks[8:10, 8] = 3
    masks[9, 9] = 3
    intensity = np.arange(144, dtype=np.uint16).reshape(12, 12)
    return masks, intensity


def test_the_registry_lists_every_published_measurement_once() -> None:
    assert set(FEATURE_NAMES) == PUBLISHED
    assert len(FEATURE_NAMES) == len(PUBLISHED)
    assert all(f.unit and f.source and f.description for f in FEATURES)


def test_a_rectangle_has_its_analytic_values() -> None:
    masks, intensity = two_cells()
    cells = measure_cells(masks, intensity)
    row = {name: cells[name][1] for name in cells}
    assert cells["label"].tolist() == [3, 7]
    assert row["area"] == row["convex_area"] == 24
    assert (row["centroid_y"], row["centroid_x"]) == (3.5, 3.5)
    assert (row["min_intensity"], row["max_intensity"]) == (2 * 12 + 1, 5 * 12 + 6)
    assert row["mean_intensity"] == pytest.approx(3.5 * 12 + 3.5)
    assert row["solidity"] == row["extent"] == 1
    # Rim pixels: 4 corners and 12 edge pixels, whose centres are 2 * (3 + 5) apart.
    assert row["perimeter"] == 16
    # The long axis lies along columns: pi / 2 from the row axis.
    assert abs(row["orientation"]) == pytest.approx(np.pi / 2)
    # An axis is four standard deviations; the variance of w pixels in a row is (w^2 - 1) / 12.
    assert row["major_axis_length"] == pytest.approx(4 * np.sqrt((6**2 - 1) / 12))
    assert row["minor_axis_length"] == pytest.approx(4 * np.sqrt((4**2 - 1) / 12))
    assert row["eccentricity"] == pytest.approx(np.sqrt(1 - 15 / 35))


def test_boxes_are_half_open_and_in_label_order() -> None:
    boxes = cell_boxes(two_cells()[0])
    names = ("label", "min_row", "min_col", "max_row", "max_col")
    assert [boxes[name].tolist() for name in names] == [[3, 7], [8, 2], [8, 1], [10, 6], [10, 7]]
    assert boxes["centroid_row"].tolist() == pytest.approx([26 / 3, 3.5])
    assert boxes["min_row"].dtype == np.int64


@settings(deadline=None)
@given(
    hnp.arrays(
        np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 4)
    )
)
def test_values_are_those_of_scikit_image(masks: np.ndarray) -> None:
    intensity = np.random.default_rng(0).normal(size=masks.shape)
    cells, boxes = measure_cells(masks, intensity), cell_boxes(masks)
    regions = regionprops(masks, intensity_image=intensity)
    assert cells["label"].tolist() == boxes["label"].tolist() == [r.label for r in regions]
    for position, region in enumerate(regions):
        for name in PUBLISHED - {"centroid_y", "centroid_x"}:
            expected = getattr(region, SKIMAGE.get(name, name))
            assert cells[name][position] == pytest.approx(expected, rel=1e-12, abs=1e-12), name
        assert (cells["centroid_y"][position], cells["centroid_x"][position]) == region.centroid
        assert boxes["perimeter"][position] == region.perimeter
        assert tuple(boxes[n][position] for n in ("min_row", "min_col", "max_row", "max_col")) == (
            region.bbox
        )


def test_no_cell_gives_empty_columns_of_the_same_types() -> None:
    masks, intensity = two_cells()
    for function, extra in ((measure_cells, (intensity,)), (cell_boxes, ())):
        full, empty = function(masks, *extra), function(masks * 0, *extra)
        assert {k: (v.dtype, 0) for k, v in full.items()} == {
            k: (v.dtype, len(v)) for k, v in empty.items()
        }


def test_a_single_pixel_has_no_perimeter() -> None:
    masks = np.zeros((5, 5), dtype=np.uint8)
    masks[2, 2] = 1
    assert cell_boxes(masks)["perimeter"].tolist() == [0.0]


def test_a_huge_label_costs_no_memory() -> None:
    masks = np.zeros((4, 4), dtype=np.uint32)
    masks[1:3, 1:3] = 2**32 - 1
    assert measure_cells(masks, masks)["label"].tolist() == [2**32 - 1]


def test_an_image_that_is_all_one_cell_is_measured() -> None:
    masks = np.full((3, 4), 9)
    assert measure_cells(masks, masks)["area"].tolist() == [12.0]


@pytest.mark.parametrize(
    ("masks", "intensity", "message"),
    [
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 2)), "one plane"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "whole numbers"),
        (np.full((2, 2), -1), np.zeros((2, 2)), "whole numbers"),
        (np.zeros((2, 2), int), np.zeros((2, 3)), "segment this image again"),
        (np.zeros((2, 2), int), np.full((2, 2), np.nan), "not finite"),
    ],
)
def test_unusable_arrays_are_refused(
    masks: np.ndarray, intensity: np.ndarray, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        measure_cells(masks, intensity)
