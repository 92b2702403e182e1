"""The texture of cells: how often grey levels are neighbours (Haralick), for all cells at once."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .regions import Floats, Regions
from .registry import TEXTURE_DISTANCES

Columns = dict[str, NDArray[Any]]

LEVELS = 32
"""Grey levels of a cell; fewer than 8 lose texture, many more leave few pairs for each."""

_CELLS_AT_ONCE = 512
_ANGLES = (0.0, pi / 4, pi / 2, 3 * pi / 4)
_PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")


def textures(regions: Regions, flat: NDArray[Any]) -> Columns:
    """Return the columns of group ``texture`` (without a channel's name) of a plane (H * W,).

    NaN where a cell has no two pixels of that distance.
    """
    found = {
        f"{name}_d{distance}": np.full(len(regions), np.nan)
        for name in _PROPERTIES
        for distance in TEXTURE_DISTANCES
    }
    if len(regions) == 0:
        return found
    pairs = _Pairs(regions, flat)
    for cells in _chunks(len(regions)):
        for distance in TEXTURE_DISTANCES:
            values = _mean_over_angles(pairs, cells, distance)
            for name, of_cells in zip(_PROPERTIES, values, strict=True):
                found[f"{name}_d{distance}"][cells] = of_cells
    return found


def grey_levels(regions: Regions, flat: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the grey level (P,) of each pixel of :attr:`Regions.places`.

    Each cell's intensities from its lowest to its highest are cut into 32 equal parts.
    """
    values = flat[regions.places].astype(np.float64)
    if len(values) == 0:
        return values.astype(np.uint8)
    n = np.diff(regions.offsets)
    low = np.minimum.reduceat(values, regions.offsets[:-1])
    width = np.maximum.reduceat(values, regions.offsets[:-1]) - low
    scale = np.divide(LEVELS, width, out=np.zeros_like(width), where=width > 0)
    levels = (values - np.repeat(low, n)) * np.repeat(scale, n)
    capped: NDArray[np.uint8] = np.minimum(levels, LEVELS - 1).astype(np.uint8)
    return capped


class _Pairs:
    """Pixels and their neighbours; a rim of no cell around the image spares the question of it."""

    def __init__(self, regions: Regions, flat: NDArray[Any]) -> None:
        rim = max(TEXTURE_DISTANCES)
        height, width = regions.masks.shape
        self.width = width + 2 * rim
        self.offsets = regions.offsets
        rows, cols = np.divmod(regions.places, width)
        self.places = (rows + rim) * self.width + cols + rim
        self.cells = np.full((height + 2 * rim) * self.width, -1, dtype=np.int32)
        self.cells[self.places] = np.repeat(np.arange(len(regions)), np.diff(regions.offsets))
        self.levels = np.zeros(len(self.cells), dtype=np.int32)
        self.levels[self.places] = grey_levels(regions, flat)

    def counts(self, cells: slice, distance: int, angle: float) -> NDArray[np.int64]:
        """How often grey levels are neighbours in some cells: (n, LEVELS, LEVELS), symmetric."""
        step = self._step(distance, angle)
        here = self.places[self.offsets[cells.start] : self.offsets[cells.stop]]
        own, there = self.cells[here], self.cells[here + step]
        key = (
            (own - cells.start) * LEVELS**2 + self.levels[here] * LEVELS + self.levels[here + step]
        )
        key = key[own == there]
        number = cells.stop - cells.start
        counts = np.bincount(key, minlength=number * LEVELS**2).reshape(number, LEVELS, LEVELS)
        return counts + counts.transpose(0, 2, 1)

    def _step(self, distance: int, angle: float) -> int:
        # The neighbour that skimage.feature.graycomatrix looks at.
        down, right = round(sin(angle) * distance), round(cos(angle) * distance)
        return down * self.width + right


def _mean_over_angles(pairs: _Pairs, cells: slice, distance: int) -> Floats:
    """(6, n) the properties, mean over the directions in which a cell has pairs, NaN if none."""
    number = cells.stop - cells.start
    total, times = np.zeros((len(_PROPERTIES), number)), np.zeros(number)
    for angle in _ANGLES:
        counts = pairs.counts(cells, distance, angle)
        there = counts.any(axis=(1, 2))
        total[:, there] += _properties(counts[there])
        times += there
    return np.divide(total, times, out=np.full_like(total, np.nan), where=times > 0)


def _properties(counts: NDArray[np.int64]) -> Floats:
    """(6, n) of the matrices (n, LEVELS, LEVELS), as ``skimage.feature.graycoprops`` has them."""
    flat = counts.reshape(len(counts), LEVELS**2)
    p = flat / flat.sum(axis=1, keepdims=True)
    levels = np.arange(LEVELS)
    apart = (levels[:, None] - levels[None, :]).ravel()
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.stack(
        [
            p @ apart**2,
            p @ np.abs(apart),
            p @ (1 / (1 + apart**2)),
            np.sqrt((p**2).sum(axis=1)),
            _correlation(counts, p),
            -(p * logs).sum(axis=1),
        ]
    )


def _correlation(counts: NDArray[np.int64], p: Floats) -> Floats:
    """Of the two grey levels of a pair; 1 where there is one grey level only."""
    levels = np.arange(LEVELS)
    sides = counts.sum(axis=2)
    number = sides.sum(axis=1)
    mean = sides @ levels / number
    away = levels - mean[:, None]
    variance = (sides * away**2).sum(axis=1) / number
    mixed = np.einsum("nij,ni,nj->n", p.reshape(counts.shape), away, away)
    several = np.count_nonzero(sides, axis=1) > 1
    found: Floats = np.divide(mixed, variance, out=np.ones_like(mixed), where=several)
    return found


def _chunks(number: int) -> Iterator[slice]:
    for start in range(0, number, _CELLS_AT_ONCE):
        yield slice(start, min(number, start + _CELLS_AT_ONCE))
