"""Measurements: analytic answers on drawn cells, and equality with scikit-image."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from realdata import real_data
from skimage.measure import regionprops

from cellstore.analysis.features import FEATURE_NAMES, GROUPS, measure_cells
from cellstore.analysis.regions import find_regions, perimeters
from cellstore.analysis.rendering import PlateDesign, render_field
from cellstore.errors import ImageError

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
    "area": "area",
    "convex_area": "area_convex",
    "perimeter": "perimeter",
    "mean_intensity": "intensity_mean",
    "min_intensity": "intensity_min",
    "max_intensity": "intensity_max",
    "solidity": "solidity",
    "extent": "extent",
}
WHOLE = {"area", "convex_area", "min_intensity", "max_intensity", "solidity", "extent"}
BOX = ("min_row", "min_col", "max_row", "max_col")


def label_images(side: int, highest: int) -> st.SearchStrategy[np.ndarray]:
    """Noise of a few labels: cells that touch, in pieces, with holes, on the rim, of one pixel."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=side)
    kinds = st.sampled_from([np.uint8, np.uint16, np.uint32, np.int32, np.int64])
    return kinds.flatmap(
        lambda kind: hnp.arrays(kind, shapes, elements=st.integers(0, highest), fill=st.just(0))
    )


def blobs(seed: int, size: int = 60, number: int = 12) -> np.ndarray:
    """Ellipses at random, one over the other, some cut by the rim."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((size, size + 7), dtype=np.uint16)
    y, x = np.mgrid[:size, : size + 7]
    for label in rng.permutation(number) + 1:
        turn, axes = rng.uniform(0, np.pi), rng.uniform(0.4, size / 4, 2)
        dy, dx = y - rng.uniform(0, size), x - rng.uniform(0, size)
        along, across = dy * np.cos(turn) + dx * np.sin(turn), dx * np.cos(turn) - dy * np.sin(turn)
        masks[(along / axes[0]) ** 2 + (across / axes[1]) ** 2 <= 1] = label * 3
    return masks


def intensities(shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    noise = np.random.default_rng(0).normal(1000, 300, size=shape)
    return (noise > 1000) if dtype is bool else noise.astype(dtype)


def check_like_skimage(masks: np.ndarray, intensity: np.ndarray) -> None:
    """All that we measure is what ``regionprops`` measures in 64 bits."""
    cells, found = measure_cells(masks, intensity), find_regions(masks)
    exact = intensity if intensity.dtype == bool else intensity.astype(np.float64)
    regions = regionprops(masks, intensity_image=exact)
    assert (
        cells["object_number"].tolist()
        == found.object_numbers.tolist()
        == [r.label for r in regions]
    )
    for position, region in enumerate(regions):
        row = {name: column[position] for name, column in cells.items()}
        for name, attribute in SKIMAGE.items():
            expected = getattr(region, attribute)
            tolerance = 0 if name in WHOLE else 1e-12
            assert row[name] == pytest.approx(expected, rel=tolerance, abs=0), name
        assert (row["centroid_y"], row["centroid_x"]) == region.centroid
        assert tuple(getattr(found, name)[position] for name in BOX) == region.bbox
        check_ellipse(row, region)


def check_ellipse(row: dict[str, float], region: Any) -> None:
    """Axes are equal but for the rounding of the larger eigenvalue, of which they are roots.

    The direction of a cell as wide as it is long is what rounding makes of it.
    """
    rounding = 1e-12 * max(1, region.axis_major_length**2)
    for name, attribute in (("major", "axis_major_length"), ("minor", "axis_minor_length")):
        ours = row[f"{name}_axis_length"]
        assert ours**2 == pytest.approx(getattr(region, attribute) ** 2, rel=1e-12, abs=rounding)
    assert row["eccentricity"] ** 2 == pytest.approx(region.eccentricity**2, rel=1e-12, abs=1e-12)
    apart = np.sin(row["orientation"] - region.orientation) * region.eccentricity**2
    assert apart == pytest.approx(0, abs=1e-9)
    assert -np.pi / 2 <= row["orientation"] <= np.pi / 2


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


def test_every_feature_says_what_it_is() -> None:
    assert list(GROUPS) == ["basic", "intensity", "texture"]
    for name, group in GROUPS.items():
        assert group.name == name
        columns = [feature.name for feature in group.columns(["DNA", "RNA"])]
        assert len(set(columns)) == len(columns) >= len(group.features)
        for feature in group.features:
            said = asdict(feature)
            assert all(said.values()), feature.name
            assert said["dtype"] == "float64"


def test_a_rectangle_has_its_analytic_values() -> None:
    masks, intensity = two_cells()
    cells = measure_cells(masks, intensity)
    row = {name: cells[name][1] for name in cells}
    assert cells["object_number"].tolist() == [3, 7]
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
    found = find_regions(two_cells()[0])
    assert found.object_numbers.tolist() == [3, 7]
    assert [getattr(found, name).tolist() for name in BOX] == [[8, 2], [8, 1], [10, 6], [10, 7]]
    assert found.centroid_row.tolist() == pytest.approx([26 / 3, 3.5])
    assert found.min_row.dtype == np.int64


@settings(deadline=None, max_examples=80)
@given(label_images(9, 4), st.sampled_from([bool, np.uint16, np.float32, np.float64]))
@example(np.eye(9, dtype=np.uint16), np.uint16)
@example(np.eye(9, dtype=np.uint16)[::-1] * 60_000, np.float64)
@example(np.ones((1, 1), np.uint8), bool)
@example(np.ones((2, 2), np.uint8), np.float32)
@example(np.ones((1, 9), np.int64), np.float64)
@example(np.ones((9, 1), np.int64), np.float64)
def test_values_are_those_of_scikit_image(masks: np.ndarray, dtype: Any) -> None:
    check_like_skimage(masks, intensities(masks.shape, dtype))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_round_cells_that_overlap_have_the_values_of_scikit_image(seed: int) -> None:
    masks = blobs(seed)
    check_like_skimage(masks, intensities(masks.shape, np.uint16))


def test_a_rendered_field_has_the_values_of_scikit_image() -> None:
    design = PlateDesign(size=208)
    field = render_field(design, next(design.fields()))
    assert field.masks.max() > 15
    check_like_skimage(field.masks, field.channels[0])


@pytest.mark.real
def test_real_nuclei_have_the_values_of_scikit_image() -> None:
    for path in sorted(real_data("dsb2018/labels").glob("*.tif")):
        masks = tifffile.imread(path)
        check_like_skimage(masks, intensities(masks.shape, np.uint16))


def test_a_deep_cell_keeps_its_digits() -> None:
    """A bar of 2 x 3 far from the origin: moments about the origin would lose its width."""
    masks = np.zeros((4, 60_000), dtype=np.uint8)
    masks[1:3, -4:-1] = 1
    cells = measure_cells(masks, masks)
    assert cells["major_axis_length"][0] == pytest.approx(4 * np.sqrt(8 / 12), rel=1e-14)
    assert cells["minor_axis_length"][0] == pytest.approx(4 * np.sqrt(3 / 12), rel=1e-14)


def test_a_mean_of_32_bit_light_is_taken_in_64_bits() -> None:
    masks = np.ones((300, 300), dtype=np.uint8)
    light = np.full(masks.shape, 16_777_217 / 16, dtype=np.float32)
    light[0, 0] = 0
    expected = light.astype(np.float64).mean()
    assert measure_cells(masks, light)["mean_intensity"][0] == pytest.approx(expected, rel=1e-15)


def test_regions_that_were_found_once_serve_every_plane() -> None:
    masks, intensity = two_cells()
    regions = find_regions(masks)
    for plane in (intensity, intensity * 2):
        ours, theirs = measure_cells(regions, plane), measure_cells(masks, plane)
        assert {name: column.tolist() for name, column in ours.items()} == {
            name: column.tolist() for name, column in theirs.items()
        }


def test_masks_may_be_a_view_of_a_larger_array() -> None:
    masks, intensity = two_cells()
    assert measure_cells(masks.T, intensity.T)["area"].tolist() == [3, 24]
    check_like_skimage(masks.T[::-1], intensity.T[::-1])


def test_no_cell_gives_empty_columns_of_the_same_types() -> None:
    masks, intensity = two_cells()
    full, empty = measure_cells(masks, intensity), measure_cells(masks * 0, intensity)
    assert {k: (v.dtype, 0) for k, v in full.items()} == {
        k: (v.dtype, len(v)) for k, v in empty.items()
    }


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_has_no_cells(shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, dtype=np.uint16)
    assert len(measure_cells(nothing, nothing)["area"]) == 0
    assert len(perimeters(find_regions(nothing))) == 0


def test_a_single_pixel_has_no_perimeter() -> None:
    masks = np.zeros((5, 5), dtype=np.uint8)
    masks[2, 2] = 1
    assert perimeters(find_regions(masks)).tolist() == [0.0]


def test_a_huge_label_costs_no_memory() -> None:
    masks = np.zeros((4, 4), dtype=np.uint32)
    masks[1:3, 1:3] = 2**32 - 1
    masks[0, 0] = 9
    assert measure_cells(masks, masks)["object_number"].tolist() == [9, 2**32 - 1]
    assert measure_cells(masks, masks)["perimeter"].tolist() == [0, 4]


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
