"""Intensity and texture of channels: against scikit-image, numpy, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.feature import graycomatrix, graycoprops
from skimage.measure import regionprops
from skimage.segmentation import find_boundaries

from cellstore.analysis.features import GROUPS, measure_channels
from cellstore.analysis.rendering import PlateDesign, render_field
from cellstore.errors import ImageError

ANGLES = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
LEVELS = 32
SMALL = hnp.arrays(
    np.uint16,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.integers(0, 4),
)


def plane_of(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(5).normal(900, 200, shape).astype(dtype)


def rows_of(group: str, masks: np.ndarray, plane: np.ndarray) -> list[dict[str, float]]:
    """What is measured on channel ``X``, a dictionary per cell, without the channel's name."""
    columns = measure_channels(group, masks, {"X": plane})
    names = [f"{feature.name}_X" for feature in GROUPS[group].features]
    assert list(columns) == ["object_number", *names]
    return [
        {name.removesuffix("_X"): float(columns[name][i]) for name in names}
        for i in range(len(columns["object_number"]))
    ]


def check_intensity(masks: np.ndarray, plane: np.ndarray) -> None:
    exact = plane.astype(np.float64)
    edges = find_boundaries(masks, mode="inner")
    regions = regionprops(masks, intensity_image=exact)
    for row, region in zip(rows_of("intensity", masks, plane), regions, strict=True):
        light = exact[masks == region.label]
        away = np.abs(light - np.median(light))
        assert row["mean_intensity"] == pytest.approx(region.intensity_mean, rel=1e-12)
        assert row["std_intensity"] == pytest.approx(region.intensity_std, rel=1e-9, abs=1e-9)
        assert row["min_intensity"] == region.intensity_min
        assert row["max_intensity"] == region.intensity_max
        assert row["median_intensity"] == region.intensity_median
        assert row["lower_quartile_intensity"] == pytest.approx(np.quantile(light, 0.25))
        assert row["upper_quartile_intensity"] == pytest.approx(np.quantile(light, 0.75))
        assert row["mad_intensity"] == pytest.approx(np.median(away))
        assert row["integrated_intensity"] == pytest.approx(light.sum(), rel=1e-12)
        apart = np.subtract(region.centroid_weighted, region.centroid)
        assert row["mass_displacement"] == pytest.approx(np.hypot(*apart), abs=1e-9)
        check_edge(row, exact[edges & (masks == region.label)])


def check_edge(row: dict[str, float], light: np.ndarray) -> None:
    nan = np.full(1, np.nan)
    light = light if len(light) else nan
    for name in ("mean", "std", "min", "max"):
        expected = getattr(np, name)(light)
        assert row[f"edge_{name}_intensity"] == pytest.approx(expected, nan_ok=True, abs=1e-9)
    assert row["edge_integrated_intensity"] == pytest.approx(light.sum(), nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(SMALL, st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]))
def test_intensities_are_those_of_scikit_image_and_numpy(masks: np.ndarray, dtype: type) -> None:
    check_intensity(masks, plane_of(masks.shape, np.uint16).astype(dtype))


def test_a_rendered_field_has_the_intensities_of_scikit_image() -> None:
    design = PlateDesign(size=128)
    field = render_field(design, next(design.fields()))
    check_intensity(field.masks, field.channels[2])


def test_light_on_one_side_displaces_the_mass() -> None:
    masks = np.zeros((5, 6), dtype=np.uint8)
    masks[2, 1:5] = 3
    plane = np.zeros(masks.shape)
    plane[2, 4] = 8
    (row,) = rows_of("intensity", masks, plane)
    assert row["mass_displacement"] == 1.5  # from the middle of four pixels to the last
    assert row["integrated_intensity"] == 8
    assert row["median_intensity"] == row["mad_intensity"] == 0
    assert row["std_intensity"] == pytest.approx(np.sqrt(3 * 2**2 + 6**2) / 2)


def test_a_dark_cell_has_no_centre_of_light() -> None:
    masks = np.ones((3, 3), dtype=np.uint8)
    (row,) = rows_of("intensity", masks, np.zeros((3, 3)))
    assert np.isnan(row["mass_displacement"])
    assert np.isnan(row["edge_mean_intensity"])  # it fills the image: nothing is beside it
    assert row["mean_intensity"] == 0


def haralick(grey: np.ndarray, distance: int) -> dict[str, float]:
    """``graycoprops`` of a crop whose background is 0, mean over directions that have pairs."""
    matrix = graycomatrix(grey, [distance], ANGLES, levels=LEVELS + 1, symmetric=True)[1:, 1:]
    there = matrix.any(axis=(0, 1))[0]
    names = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
    return {
        name: float(graycoprops(matrix, name)[0][there].mean()) if there.any() else np.nan
        for name in names
    }


def check_texture(masks: np.ndarray, plane: np.ndarray) -> None:
    rows = rows_of("texture", masks, plane)
    for row, region in zip(rows, regionprops(masks), strict=True):
        light = plane[region.slice].astype(np.float64)
        low, high = (function(light[region.image]) for function in (np.min, np.max))
        scale = LEVELS / (high - low) if high > low else 0
        levels = np.clip((light - low) * scale, 0, LEVELS - 1).astype(np.uint8)
        grey = np.where(region.image, levels + 1, 0).astype(np.uint8)
        for distance in (1, 3):
            for name, expected in haralick(grey, distance).items():
                found = row[f"{name}_d{distance}"]
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), name


@settings(deadline=None, max_examples=40)
@given(SMALL, st.sampled_from([np.uint16, np.float64]))
def test_textures_are_those_of_scikit_image(masks: np.ndarray, dtype: type) -> None:
    check_texture(masks, plane_of(masks.shape, dtype))


def test_a_rendered_field_has_the_textures_of_scikit_image() -> None:
    design = PlateDesign(size=128)
    field = render_field(design, next(design.fields()))
    check_texture(field.masks, field.channels[0])


def test_a_cell_without_pairs_has_no_texture_and_a_flat_one_has_no_contrast() -> None:
    masks = np.zeros((9, 9), dtype=np.uint16)
    masks[0, 0] = 1
    masks[3:8, 3:8] = 2
    single, flat = rows_of("texture", masks, np.full(masks.shape, 7.0))
    assert all(np.isnan(value) for value in single.values())
    assert (flat["contrast_d1"], flat["entropy_d1"], flat["energy_d3"]) == (0, 0, 1)
    assert flat["correlation_d3"] == 1  # as scikit-image defines it


def test_a_checkerboard_alternates() -> None:
    masks = np.ones((8, 8), dtype=np.uint8)
    board = np.indices((8, 8)).sum(axis=0) % 2
    (row,) = rows_of("texture", masks, board)
    # Level 0 beside level 31 in two directions, equals on both diagonals.
    assert row["contrast_d1"] == pytest.approx(31**2 / 2)
    assert row["correlation_d1"] == pytest.approx(0, abs=0.01)


def test_many_cells_are_taken_in_several_parts() -> None:
    masks = np.arange(1, 1201, dtype=np.uint16).reshape(30, 40).repeat(3, axis=0).repeat(3, axis=1)
    plane = plane_of(masks.shape)
    whole = rows_of("texture", masks, plane)
    assert len(whole) == 1200
    for label in (1, 512, 513, 1200):
        alone = np.where(masks == label, masks, 0)
        assert rows_of("texture", alone, plane)[0] == pytest.approx(whole[label - 1], nan_ok=True)


@pytest.mark.parametrize("group", ["intensity", "texture"])
def test_no_cell_gives_empty_columns(group: str) -> None:
    masks = np.zeros((4, 4), dtype=np.uint16)
    columns = measure_channels(group, masks, {"A": masks, "B": masks})
    assert len(columns) == 1 + 2 * len(GROUPS[group].features)
    assert {len(column) for column in columns.values()} == {0}


def test_columns_go_channel_by_channel() -> None:
    masks = np.ones((4, 4), dtype=np.uint8)
    columns = measure_channels("intensity", masks, {"DNA": masks, "RNA": masks * 2})
    expected = [feature.name for feature in GROUPS["intensity"].columns(["DNA", "RNA"])]
    assert list(columns) == ["object_number", *expected]
    assert columns["mean_intensity_DNA"].tolist() == [1]
    assert columns["mean_intensity_RNA"].tolist() == [2]


def test_a_plane_that_does_not_fit_is_refused() -> None:
    masks = np.ones((4, 4), dtype=np.uint8)
    with pytest.raises(ImageError, match="segment this image again"):
        measure_channels("texture", masks, {"DNA": masks, "RNA": masks[:3]})
