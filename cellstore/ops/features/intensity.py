"""How light is distributed in cells: one plane is read once for all cells."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .outline import edge_pixels
from .regions import Floats, Integers, Regions
from .shape import Shape

Columns = dict[str, NDArray[Any]]


def brief(regions: Regions, flat: NDArray[Any]) -> Columns:
    """Return mean, minimum and maximum of the pixels ``flat`` (H * W,) of each cell."""
    return {
        "mean_intensity": integrated(regions, flat) / regions.areas,
        "min_intensity": _reduced(np.minimum, regions, flat).astype(np.float64),
        "max_intensity": _reduced(np.maximum, regions, flat).astype(np.float64),
    }


def integrated(regions: Regions, flat: NDArray[Any]) -> Floats:
    """Return the sum of each cell's pixels: of whole numbers exact, else in 64 bits."""
    whole = np.issubdtype(flat.dtype, np.integer) and flat.dtype.itemsize <= 4
    dtype = np.int64 if whole else np.float64
    sums: Floats = _reduced(np.add, regions, flat, dtype).astype(np.float64)
    return sums


def _reduced(
    function: np.ufunc, regions: Regions, flat: NDArray[Any], dtype: Any = None
) -> NDArray[Any]:
    if len(regions) == 0:
        return np.empty(0)
    runs = function.reduceat(flat, regions.segments, dtype=dtype)[regions.picked]
    reduced: NDArray[Any] = function.reduceat(runs, regions.first)
    return reduced


def intensities(regions: Regions, flat: NDArray[Any]) -> Columns:
    """Return the columns of group ``intensity`` (without a channel's name) of a plane (H * W,).

    A value that does not exist is NaN.
    """
    pixels = flat[regions.places]
    values = pixels.astype(np.float64)
    total = integrated(regions, flat)
    mean = total / regions.areas
    return {
        **brief(regions, flat),
        "std_intensity": _spread(values, mean, regions.offsets),
        **_quantiles(pixels, regions.offsets),
        "integrated_intensity": total,
        "mass_displacement": _displacement(regions, values, total),
        **_edge(regions, flat),
    }


def _spread(values: Floats, mean: Floats, offsets: Integers) -> Floats:
    deviations = values - np.repeat(mean, np.diff(offsets))
    squares: Floats = np.add.reduceat(deviations**2, offsets[:-1]) if len(mean) else mean
    spread: Floats = np.sqrt(squares / np.diff(offsets))
    return spread


def _quantiles(pixels: NDArray[Any], offsets: Integers) -> Columns:
    """Quartiles and median absolute deviation; ``pixels`` by cell, cell i from ``offsets[i]``."""
    found = np.empty((4, len(offsets) - 1))
    # The stable sort counts narrow whole numbers, and merges what falls and then rises.
    kind: Literal["stable"] | None = "stable" if pixels.dtype.itemsize <= 2 else None
    for cell, (start, stop) in enumerate(pairwise(offsets.tolist())):
        ordered = np.sort(pixels[start:stop], kind=kind).astype(np.float64)
        found[:3, cell] = [_quantile(ordered, quarter) for quarter in (1, 2, 3)]
        found[3, cell] = _quantile(np.sort(np.abs(ordered - found[1, cell]), kind="stable"), 2)
    names = ("lower_quartile_intensity", "median_intensity", "upper_quartile_intensity")
    return dict(zip((*names, "mad_intensity"), found, strict=True))


def _quantile(ordered: Floats, quarter: int) -> float:
    """``numpy.quantile(ordered, quarter / 4)`` without its overhead for small arrays."""
    place, part = divmod((len(ordered) - 1) * quarter, 4)
    low = float(ordered[place])
    return low + (float(ordered[place + 1]) - low) * part / 4 if part else low


def _displacement(regions: Regions, values: Floats, total: Floats) -> Floats:
    if len(regions) == 0:
        return total
    rows, cols = np.divmod(regions.places, regions.masks.shape[1])
    n = np.diff(regions.offsets)
    squares = np.zeros(len(regions))
    for place, middle in zip((rows, cols), Shape(regions).centroid, strict=True):
        # About the centroid, so that nothing cancels.
        moment = values * (place - np.repeat(middle, n))
        squares += np.add.reduceat(moment, regions.offsets[:-1]) ** 2
    return _divided(np.sqrt(squares), np.abs(total))


def _edge(regions: Regions, flat: NDArray[Any]) -> Columns:
    cells, at = edge_pixels(regions)
    number = np.bincount(cells, minlength=len(regions))
    there = np.flatnonzero(number)
    offsets = np.concatenate(([0], np.cumsum(number[there])))
    values = flat[at].astype(np.float64)
    columns = {f"edge_{name}_intensity": np.full(len(regions), np.nan) for name in _EDGE}
    if len(there):
        total = np.add.reduceat(values, offsets[:-1])
        mean = total / number[there]
        low = np.minimum.reduceat(values, offsets[:-1])
        high = np.maximum.reduceat(values, offsets[:-1])
        found = (mean, _spread(values, mean, offsets), low, high, total)
        for column, of_cells in zip(columns.values(), found, strict=True):
            column[there] = of_cells
    return columns


_EDGE = ("mean", "std", "min", "max", "integrated")


def _divided(above: Floats, below: Floats) -> Floats:
    """The ratio; NaN where ``below`` is 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)
