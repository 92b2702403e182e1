"""What is measured on a plane, and what is odd among many: analytic answers on tiny arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from realdata import real_data

from cellstore.analysis.quality import (
    WHITE_NOISE_SLOPE,
    Limits,
    maximal_share,
    plane_quality,
    power_log_log_slope,
    robust_limits,
    saturated_share,
    sharpness,
)
from cellstore.io.image_files import read_plane


def scene(height: int, width: int) -> NDArray[np.float64]:
    """Waves, tiles and speckles: something at every scale, the same on every machine."""
    y, x = np.mgrid[:height, :width]
    tiles, speckles = (x // 7 + y // 11) % 2, (x * 7919 + y * 104729) % 13
    return np.asarray(100 + 50 * np.sin(x * y / 97.0) + 30 * tiles + speckles, np.float64)


def blurred(plane: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """The mean of 5 neighbours in a cross, again and again; the borders wrap."""
    for _ in range(times):
        rolled = [np.roll(plane, step, axis) for axis in (0, 1) for step in (-1, 1)]
        plane = (plane + sum(rolled)) / 5
    return plane


@pytest.mark.parametrize(
    ("shape", "slope"), [((96, 128), 1.351346062453885), ((128, 101), 1.35720553629525)]
)
def test_the_slope_is_that_of_cellprofiler(shape: tuple[int, int], slope: float) -> None:
    # Golden: centrosome 1.3.4, radial_power_spectrum.rps, and a straight line through the logs.
    assert power_log_log_slope(scene(*shape)) == pytest.approx(slope, rel=1e-6)


def test_power_that_falls_with_the_square_of_frequency_has_that_slope() -> None:
    # The power of a pixel is f^-4, and rings have about f pixels: a ring has about f^-3.
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    frequencies[0, 0] = 1.0
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (512, 512))
    plane = np.fft.ifft2(frequencies**-2 * np.exp(1j * phases)).real
    assert power_log_log_slope(plane) == pytest.approx(-3, abs=0.2)


def test_white_noise_has_its_slope() -> None:
    noise = np.random.default_rng(0).normal(500, 20, (512, 512))
    assert power_log_log_slope(noise) == pytest.approx(WHITE_NOISE_SLOPE, abs=0.1)


@pytest.mark.parametrize("focus", [power_log_log_slope, sharpness])
def test_the_more_blurred_the_lower_the_focus(focus: Any) -> None:
    plane = scene(256, 256)
    found = [focus(blurred(plane, times)) for times in (0, 4, 16, 64)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


@pytest.mark.parametrize("focus", [power_log_log_slope, sharpness])
@given(gain=st.floats(0.01, 100), offset=st.floats(-1000, 1000))
def test_brightness_and_contrast_do_not_change_focus(
    focus: Any, gain: float, offset: float
) -> None:
    plane = scene(64, 80)
    assert focus(gain * plane + offset) == pytest.approx(focus(plane), rel=1e-4)


def test_the_laplacian_of_one_bright_square_among_nine() -> None:
    plane = np.zeros((12, 12))
    plane[4:8, 4:8] = 9.0
    # One inner square: its Laplacian is alone, so it does not vary.
    assert sharpness(plane) == 0.0
    wide = np.zeros((12, 16))
    wide[4:8, 4:8] = 12.0
    # Two inner squares, -48 and 12: variance 900; the plane: mean 1, variance 144 / 12 - 1 = 11.
    assert sharpness(wide) == pytest.approx(900 / 11)


def test_a_plane_without_detail_or_too_small_has_no_focus() -> None:
    for plane in (np.full((64, 64), 7, np.uint16), scene(8, 8), np.zeros((3, 3)), scene(1, 500)):
        assert power_log_log_slope(plane) is None
    for plane in (np.full((64, 64), 7, np.uint16), scene(11, 64), np.ones((2, 2))):
        assert sharpness(plane) is None


@pytest.mark.parametrize(
    ("dtype", "top"),
    [
        (np.uint8, 255),
        (np.uint16, 65_535),
        (np.uint16, 4_095),  # a camera of 12 bits
        (np.uint16, 255),  # 8-bit data in a 16-bit file
        (np.int16, 32_767),
        (np.float32, 1.0),
    ],
)
def test_the_clipped_share_is_exact(dtype: Any, top: float) -> None:
    plane = np.zeros((10, 20), dtype)
    plane[0, :7] = top
    assert saturated_share(plane) == 7 / 200


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 254), (np.uint16, 235), (np.float32, 0.9)])
def test_a_maximum_below_white_is_not_saturated(dtype: Any, top: float) -> None:
    plane = np.zeros((10, 20), dtype)
    plane[:5] = top
    assert saturated_share(plane) == 0.0
    assert maximal_share(plane) == 0.5


def test_the_numbers_of_a_plane() -> None:
    plane = np.arange(1, 401, dtype=np.uint16).reshape(20, 20)
    found = plane_quality(plane)
    assert (found.mean, found.median) == (200.5, 200.5)
    assert found.background == pytest.approx(1 + 0.01 * 399)
    assert found.std == pytest.approx(np.sqrt((400**2 - 1) / 12))
    assert found.maximal == 1 / 400


def test_a_large_plane_of_large_numbers_does_not_overflow() -> None:
    found = plane_quality(np.full((300, 300), 65_000, np.uint16))
    assert (found.mean, found.std, found.background) == (65_000, 0, 65_000)
    assert found.power_log_log_slope is None


def test_pixels_that_are_no_numbers_are_not_counted() -> None:
    plane = np.ones((64, 64), np.float32)
    plane[:32] = [np.nan]
    plane[0, 0] = np.inf
    found = plane_quality(plane)
    assert (found.mean, found.maximal, found.power_log_log_slope) == (1.0, 1.0, None)
    with pytest.raises(ValueError, match="without pixels"):
        plane_quality(np.full((4, 4), np.nan))


def test_limits_are_the_median_and_the_mad() -> None:
    # Median 10, deviations 2 1 0 1 90, their median 1.
    values = np.array([8.0, 9.0, 10.0, 11.0, 100.0])
    limits = robust_limits(values, 2)
    assert limits == Limits(10 - 2 * 1.4826, 10 + 2 * 1.4826)
    assert limits.outside(np.array([7.0, 7.1, 12.9, 13.0, np.nan])).tolist() == [
        *(True, False, False, True),
        False,
    ]


def test_where_most_are_equal_the_mean_deviation_counts() -> None:
    values = np.array([5.0] * 9 + [15.0])
    # MAD 0, mean deviation 10 / 10: 5 +- 5 * 1.2533
    assert robust_limits(values, 5) == Limits(5 - 5 * 1.2533, 5 + 5 * 1.2533)


@pytest.mark.parametrize("log", [False, True])
@given(value=st.floats(1e-3, 1e6), count=st.integers(1, 20))
def test_equal_values_are_never_unusual(log: bool, value: float, count: int) -> None:
    values = np.full(count, value)
    limits = robust_limits(values, 5, log=log)
    assert limits is not None
    assert not limits.outside(values).any()


def test_logarithms_make_half_and_double_equally_far() -> None:
    values = np.array([50.0, 100.0, 100.0, 100.0, 200.0, 0.0, np.nan])
    limits = robust_limits(values, 1, log=True)
    assert limits is not None
    assert limits.low * limits.high == pytest.approx(100.0**2)


@pytest.mark.parametrize("values", [[], [np.nan], [np.inf]])
def test_nothing_known_has_no_limits(values: list[float]) -> None:
    assert robust_limits(np.array(values), 5) is None
    assert robust_limits(np.array([0.0]), 5, log=True) is None


@pytest.mark.real
def test_real_fields_are_sharp_and_their_blurred_copies_are_not() -> None:
    fields = sorted(real_data("cpjump1/images").rglob("*.tiff"))
    assert len(fields) >= 7
    for path in fields:
        plane = read_plane(path)
        copy = blurred(plane.astype(np.float64), 10)  # about 2 pixels
        sharp, soft = plane_quality(plane), plane_quality(copy)
        assert sharp.power_log_log_slope is not None
        assert soft.power_log_log_slope is not None
        # CellProfiler gives this plate's field A01-1 -2.2 to -1.8 in the five stains.
        assert -2.6 < sharp.power_log_log_slope < -1.2, path
        assert soft.power_log_log_slope < sharp.power_log_log_slope - 0.3, path
        assert (soft.sharpness or 0) < 0.7 * (sharp.sharpness or 0), path
        assert sharp.saturated < 0.001, path


@pytest.mark.real
def test_real_8_bit_data_in_a_16_bit_file() -> None:
    plane = read_plane(real_data("stardist/img2d.tif"))
    assert (plane.dtype, plane.max()) == (np.uint16, 235)
    assert saturated_share(plane) == 0.0
    clipped = np.minimum(plane.astype(np.int64) * 2, 255).astype(np.uint16)
    assert saturated_share(clipped) == (clipped == 255).mean() > 0
