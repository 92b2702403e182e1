"""How good an image is: what is measured on one plane, and what is odd among many.

A plane is (H, W), any real dtype, in the grey levels of its file. Only saturation is
judged on one image alone: whether a field is out of focus, too bright or too empty is found by
comparing it with the others of its plate (:func:`robust_limits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WHITE_LEVELS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
"""Highest values of cameras and files; 8-bit data in a 16-bit file is still full at 255."""

SQUARE = 4
"""Pixels along the squares that :func:`sharpness` averages first: noise would pass for detail."""

_ROUNDING = 1e-9
"""Relative: equal values must not leave limits that went through a logarithm and back."""

WHITE_NOISE_SLOPE = 1.0
"""Its power is the same everywhere, and a ring of radius r has about 2 pi r frequencies."""

Plane = NDArray[Any]


@dataclass(frozen=True)
class PlaneQuality:
    """The quality of one plane; intensities in grey levels, shares from 0 to 1.

    ``power_log_log_slope`` and ``sharpness`` tell focus, lower is less sharp; None where the plane
    is too small or flat. ``saturated``: see :func:`saturated_share`; ``maximal``: share of pixels
    at the plane's own maximum (CellProfiler's PercentMaximal / 100); ``background``: 1st
    percentile.
    """

    power_log_log_slope: float | None
    sharpness: float | None
    saturated: float
    maximal: float
    background: float
    median: float
    mean: float
    std: float


def plane_quality(plane: Plane) -> PlaneQuality:
    """Return the quality of ``plane``; pixels that are no finite numbers are not counted.

    Raises:
        ValueError: there is no pixel to count.
    """
    pixels = plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane.ravel()
    if pixels.size == 0:
        raise ValueError("a plane without pixels has no quality")
    whole = pixels.size == plane.size
    # A field full of cells still has so much, 1 %, between them; a few dead pixels are less.
    background, median = np.percentile(pixels, [1.0, 50])
    return PlaneQuality(
        power_log_log_slope=power_log_log_slope(plane) if whole else None,
        sharpness=sharpness(plane) if whole else None,
        saturated=saturated_share(pixels),
        maximal=maximal_share(pixels),
        background=float(background),
        median=float(median),
        mean=float(pixels.mean(dtype=np.float64)),
        std=float(pixels.std(dtype=np.float64)),
    )


def power_log_log_slope(plane: Plane) -> float | None:
    """Slope of the log power spectrum over the log spatial frequency; lower is more blurred.

    Values are those of CellProfiler's MeasureImageQuality (PowerLogLogSlope; Bray et al. 2012,
    J Biomol Screen 17:266): the power of rings of one pixel, up to an eighth of the shorter side,
    with its way to count the frequencies of the last row and column. Brightness and contrast do
    not change it. None where there are fewer than two rings with any power.
    """
    if plane.min() == plane.max():
        return None
    # Power in the rings of radius 2, 3, ... below an eighth of the shorter side.
    end = int(min(plane.shape) / 8)
    mean = plane.mean(dtype=np.float64)
    # Only low frequencies are looked at: the second transform is of their columns alone.
    half = np.fft.rfft((plane - mean).astype(np.float32), axis=1)[:, : end + 1]
    power = np.abs(np.fft.fft(half, axis=0)) ** 2
    numbers = np.arange(len(plane))
    frequencies = np.minimum(numbers, numbers[::-1])
    rows = np.flatnonzero(frequencies < end)
    # Columns of negative frequencies are those of positive ones, their rows turned round.
    low = power[rows, :end] + power[-rows, 1:]
    distances = np.sqrt(frequencies[rows, None] ** 2 + np.arange(end) ** 2).astype(np.int64) + 1
    sums = np.bincount(distances.ravel(), weights=low.ravel(), minlength=end)
    rings = np.asarray(sums[2:end], dtype=np.float64)
    radii = np.arange(2, 2 + len(rings))
    there = rings > 0
    if there.sum() < 2:
        return None
    slope, _ = np.polyfit(np.log(radii[there]), np.log(rings[there]), 1)
    return float(slope)


def sharpness(plane: Plane) -> float | None:
    """Variance of the Laplacian over the variance of the plane, both of squares of 4 pixels.

    The variance of the Laplacian is the focus measure LAP4 of Pertuz et al. 2013 (Pattern
    Recognition 46:1415); divided like this, brightness and contrast do not change it. None where
    the plane is flat or has fewer than 3 squares on a side.
    """
    if min(plane.shape) < 3 * SQUARE or plane.min() == plane.max():
        return None
    rows, columns = (length // SQUARE for length in plane.shape)
    whole = plane[: rows * SQUARE, : columns * SQUARE].astype(np.float64)
    means = whole.reshape(rows, SQUARE, columns, SQUARE).mean(axis=(1, 3))
    spread = means.var()
    if spread == 0:
        return None
    middle = means[1:-1, 1:-1]
    neighbours = means[1:-1, :-2] + means[1:-1, 2:] + means[:-2, 1:-1] + means[2:, 1:-1]
    return float((neighbours - 4 * middle).var() / spread)


def saturated_share(pixels: Plane) -> float:
    """Share of pixels at white: at the maximum, if that is the highest value of a bit depth.

    Highest values are 255, 1,023, 4,095, 16,383 and 65,535, and 1.0 in a file of floats; a plane
    whose maximum is another number is not saturated, however many pixels have it.
    """
    top = float(pixels.max())
    if pixels.dtype.kind == "f":
        return maximal_share(pixels) if top in (1.0, *WHITE_LEVELS) else 0.0
    full = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
    return maximal_share(pixels) if top in (full, *WHITE_LEVELS) else 0.0


def maximal_share(pixels: Plane) -> float:
    """Share of pixels at the maximum of the plane (CellProfiler's PercentMaximal / 100)."""
    return float(np.count_nonzero(pixels == pixels.max()) / pixels.size)


@dataclass(frozen=True)
class Limits:
    """What is still usual: from ``low`` to ``high``, both included."""

    low: float
    high: float

    def outside(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each of ``values`` is unusual; what is NaN is not."""
        unusual: NDArray[np.bool_] = (values < self.low) | (values > self.high)
        return unusual


def robust_limits(values: NDArray[np.float64], width: float, *, log: bool = False) -> Limits | None:
    """Return the median of ``values`` plus and minus ``width`` robust standard deviations.

    These are 1.4826 times the median absolute deviation; where that is 0 (more than half of the
    values are equal), 1.2533 times the mean absolute deviation (Iglewicz and Hoaglin 1993).
    ``log``: of the logarithms, for values above 0 that differ by factors; the limits are in the
    unit of ``values``. NaN is ignored; None where nothing is left.
    """
    known = values[np.isfinite(values)]
    if log:
        known = np.log(known[known > 0])
    if known.size == 0:
        return None
    middle = float(np.median(known))
    deviations = np.abs(known - middle)
    # A normal distribution's standard deviation over its median and its mean absolute deviation.
    sigma = 1.4826 * float(np.median(deviations))
    reach = width * (sigma or 1.2533 * float(deviations.mean()))
    low, high = middle - reach, middle + reach
    if log:
        return Limits(float(np.exp(low - _ROUNDING)), float(np.exp(high + _ROUNDING)))
    return Limits(low, high)
