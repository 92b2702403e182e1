"""What is measured on a cell: the registry of features, and the functions that fill it.

Coordinates are pixels, axis order is (row, column), the origin is the centre of the upper left
pixel. Values are those of ``skimage.measure.regionprops``, computed for all cells of an image at
once; the definitions are in its documentation, and the names of group ``basic`` are those of the
published study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import cos, pi, sin
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .regions import (
    Floats,
    Integers,
    Regions,
    boxes,
    centroids,
    check_plane,
    convex_areas,
    edge_pixels,
    ellipses,
    find_regions,
    perimeters,
)

Columns = dict[str, NDArray[Any]]
"""A value for each cell, by name of the column."""


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
    for place, middle in zip((rows, cols), centroids(regions), strict=True):
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


_REGIONPROPS = "skimage.measure.regionprops"
_CELLPROFILER = "CellProfiler MeasureObjectIntensity"
_GLCM = "skimage.feature.graycomatrix, graycoprops"

_PAIRS = (
    "p: share of the grey levels i, j among pairs of pixels of the cell {} apart, in either order, "
    "mean over 0, 45, 90 and 135 degrees. 32 grey levels from its lowest to its highest intensity."
)

TEXTURE_DISTANCES = (1, 3)
"""Pixels between the two pixels of a pair: neighbours, and the default scale of CellProfiler."""


@dataclass(frozen=True)
class Feature:
    """A measured column. ``source``: whose definition it follows; values are equal to it."""

    name: str
    dtype: str
    unit: str
    source: str
    formula: str
    description: str


@dataclass(frozen=True)
class FeatureGroup:
    """Features that are measured together, by one recipe.

    ``per_channel``: on each channel, in columns ``<feature>_<channel>``; else on one plane.
    """

    name: str
    features: tuple[Feature, ...]
    per_channel: bool
    description: str

    def columns(self, channels: Sequence[str] = ()) -> tuple[Feature, ...]:
        """The columns of the group, channel by channel."""
        if not self.per_channel:
            return self.features
        return tuple(
            replace(item, name=f"{item.name}_{channel}")
            for channel in channels
            for item in self.features
        )


def _registry_basic(name: str, unit: str, source: str, formula: str, description: str) -> Feature:
    return Feature(name, "float64", unit, f"{_REGIONPROPS}: {source}", formula, description)


def _intensity(name: str, source: str, formula: str, description: str) -> Feature:
    return Feature(name, "float64", "intensity", source, formula, description)


def _texture(prop: str, formula: str, description: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(
            f"{prop}_d{distance}",
            "float64",
            "1",
            f"{_GLCM}: {prop}",
            formula,
            f"{description} {_PAIRS.format(distance)}",
        )
        for distance in TEXTURE_DISTANCES
    )


FEATURES: tuple[Feature, ...] = (
    _registry_basic("area", "pixel^2", "area", "n", "Number of pixels of the cell."),
    _registry_basic(
        "convex_area",
        "pixel^2",
        "area_convex",
        "pixels on or in the hull of all (r +- 1/2, c), (r, c +- 1/2)",
        "Number of pixels of its convex hull.",
    ),
    _registry_basic(
        "perimeter",
        "pixel",
        "perimeter",
        "n1 + sqrt(2) n2 + (1 + sqrt(2))/2 n3 of outline pixels by neighbours (Benkrid, Crookes)",
        "Length of its outline, 4-connected (Benkrid).",
    ),
    _registry_basic(
        "eccentricity",
        "1",
        "eccentricity",
        "sqrt(1 - l2/l1), l1 >= l2 eigenvalues of the inertia tensor",
        "Eccentricity of the ellipse of equal moments; 0: disc.",
    ),
    _registry_basic(
        "mean_intensity",
        "intensity",
        "intensity_mean",
        "sum(I)/n, in 64 bits",
        "Mean intensity inside the cell.",
    ),
    _registry_basic(
        "min_intensity",
        "intensity",
        "intensity_min",
        "min(I)",
        "Lowest intensity inside the cell.",
    ),
    _registry_basic(
        "max_intensity",
        "intensity",
        "intensity_max",
        "max(I)",
        "Highest intensity inside the cell.",
    ),
    _registry_basic(
        "major_axis_length",
        "pixel",
        "axis_major_length",
        "4 sqrt(l1)",
        "Long axis of the ellipse of equal moments.",
    ),
    _registry_basic(
        "minor_axis_length",
        "pixel",
        "axis_minor_length",
        "4 sqrt(l2)",
        "Short axis of the ellipse of equal moments.",
    ),
    _registry_basic(
        "orientation",
        "radian",
        "orientation",
        "atan2(2 mu11, mu20 - mu02)/2",
        "Angle from the row axis to the long axis, -pi/2..pi/2.",
    ),
    _registry_basic(
        "solidity",
        "1",
        "solidity",
        "area/convex_area",
        "Area divided by the area of the convex hull.",
    ),
    _registry_basic(
        "extent",
        "1",
        "extent",
        "area/(height width)",
        "Area divided by the area of the bounding box.",
    ),
    _registry_basic("centroid_y", "pixel", "centroid-0", "sum(r)/n", "Row of the centroid."),
    _registry_basic("centroid_x", "pixel", "centroid-1", "sum(c)/n", "Column of the centroid."),
)
"""The built-in measurements, in the order in which a network reads them."""

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)

INTENSITY: tuple[Feature, ...] = (
    _intensity(
        "mean_intensity",
        f"{_REGIONPROPS}: intensity_mean",
        "sum(I)/n",
        "Mean intensity inside the cell.",
    ),
    _intensity(
        "std_intensity",
        f"{_REGIONPROPS}: intensity_std",
        "sqrt(sum((I - mean)^2)/n)",
        "Standard deviation of the intensities inside the cell.",
    ),
    _intensity(
        "min_intensity",
        f"{_REGIONPROPS}: intensity_min",
        "min(I)",
        "Lowest intensity inside the cell.",
    ),
    _intensity(
        "max_intensity",
        f"{_REGIONPROPS}: intensity_max",
        "max(I)",
        "Highest intensity inside the cell.",
    ),
    _intensity(
        "lower_quartile_intensity",
        f"numpy.quantile, linear; {_CELLPROFILER}: LowerQuartileIntensity",
        "quantile(I, 1/4)",
        "A quarter of the pixels is darker.",
    ),
    _intensity(
        "median_intensity",
        f"{_REGIONPROPS}: intensity_median",
        "median(I)",
        "Half of the pixels are darker.",
    ),
    _intensity(
        "upper_quartile_intensity",
        f"numpy.quantile, linear; {_CELLPROFILER}: UpperQuartileIntensity",
        "quantile(I, 3/4)",
        "A quarter of the pixels is brighter.",
    ),
    _intensity(
        "mad_intensity",
        f"{_CELLPROFILER}: MADIntensity",
        "median(|I - median(I)|)",
        "Median absolute deviation from the median, not scaled.",
    ),
    _intensity(
        "integrated_intensity",
        f"{_CELLPROFILER}: IntegratedIntensity",
        "sum(I)",
        "All intensity inside the cell.",
    ),
    Feature(
        "mass_displacement",
        "float64",
        "pixel",
        f"{_CELLPROFILER}: MassDisplacement",
        "|sum(I (r, c))/sum(I) - sum((r, c))/n|",
        "Distance of the centre of the light from the centroid; none where sum(I) is 0.",
    ),
    *(
        _intensity(
            f"edge_{name}_intensity",
            f"{_CELLPROFILER}: {source}IntensityEdge",
            f"{formula} at the edge",
            f"{description} (skimage.segmentation.find_boundaries, inner); none without one.",
        )
        for name, source, formula, description in (
            ("mean", "Mean", "sum(I)/n", "Mean intensity of the pixels at the cell's edge"),
            ("std", "Std", "sqrt(sum((I - mean)^2)/n)", "Standard deviation at the cell's edge"),
            ("min", "Min", "min(I)", "Lowest intensity at the cell's edge"),
            ("max", "Max", "max(I)", "Highest intensity at the cell's edge"),
            ("integrated", "Integrated", "sum(I)", "All intensity at the cell's edge"),
        )
    ),
)
"""What is measured on each channel by group ``intensity``."""

TEXTURE: tuple[Feature, ...] = (
    *_texture("contrast", "sum(p (i - j)^2)", "Differences of grey level, squared."),
    *_texture("dissimilarity", "sum(p |i - j|)", "Differences of grey level."),
    *_texture("homogeneity", "sum(p/(1 + (i - j)^2))", "Near 1 where pixels are alike."),
    *_texture("energy", "sqrt(sum(p^2))", "1 where all pairs are the same."),
    *_texture(
        "correlation",
        "sum(p (i - m)(j - m))/s^2",
        "Of the grey levels of a pair; 1 for a cell of one grey level.",
    ),
    *_texture("entropy", "-sum(p ln p)", "High where all pairs are equally frequent."),
)
"""What is measured on each channel by group ``texture``: the mean over the directions that have
pairs of pixels; a cell without any has none."""

BASIC_GROUP = FeatureGroup(
    "basic", FEATURES, False, "Shape, and intensity of one plane; what networks read by default."
)
GROUPS: dict[str, FeatureGroup] = {
    group.name: group
    for group in (
        BASIC_GROUP,
        FeatureGroup(
            "intensity", INTENSITY, True, "Distribution of the intensity of each channel."
        ),
        FeatureGroup(
            "texture", TEXTURE, True, "Grey levels of neighbouring pixels of each channel."
        ),
    )
}
"""The registry: every group by name."""


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
    for start in range(0, len(regions), _CELLS_AT_ONCE):
        cells = slice(start, min(len(regions), start + _CELLS_AT_ONCE))
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
        # The neighbour that skimage.feature.graycomatrix looks at.
        down, right = round(sin(angle) * distance), round(cos(angle) * distance)
        step = down * self.width + right
        here = self.places[self.offsets[cells.start] : self.offsets[cells.stop]]
        own, there = self.cells[here], self.cells[here + step]
        key = (
            (own - cells.start) * LEVELS**2 + self.levels[here] * LEVELS + self.levels[here + step]
        )
        key = key[own == there]
        number = cells.stop - cells.start
        counts = np.bincount(key, minlength=number * LEVELS**2).reshape(number, LEVELS, LEVELS)
        return counts + counts.transpose(0, 2, 1)


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


_PER_CHANNEL: Mapping[str, Callable[[Regions, NDArray[Any]], Columns]] = {
    "intensity": intensities,
    "texture": textures,
}


def measure_cells(masks: NDArray[Any] | Regions, intensity: NDArray[Any]) -> Columns:
    """Measure every cell of an image: the features of group ``basic``.

    Parameters
    ----------
    masks
        (H, W) integers: 0 is background, each other value one cell. Values need not be
        consecutive. Or what :func:`find_regions` made of them.
    intensity
        (H, W) numbers, the plane on which intensities are measured.

    Returns
    -------
    ``object_number`` (int64) and one float64 column for each of ``FEATURES``, a row per cell, by
    ascending object number. No cell: columns of length 0.

    Raises
    ------
    ImageError
        The arrays are not planes of one shape, masks are not whole numbers from 0, or an
        intensity is not finite.

    """
    regions = masks if isinstance(masks, Regions) else find_regions(masks)
    flat = check_plane(intensity, regions.masks.shape)
    convex = convex_areas(regions)
    top, left, bottom, right = boxes(regions)
    rows, cols = centroids(regions)
    found: Columns = {
        "area": regions.areas.astype(np.float64),
        "convex_area": convex.astype(np.float64),
        "perimeter": perimeters(regions),
        **ellipses(regions),
        **brief(regions, flat),
        "solidity": regions.areas / convex,
        "extent": regions.areas / ((bottom - top) * (right - left)),
        "centroid_y": rows,
        "centroid_x": cols,
    }
    return {"object_number": regions.labels, **{name: found[name] for name in FEATURE_NAMES}}


def measure_channels(
    group: str, masks: NDArray[Any] | Regions, channels: Mapping[str, NDArray[Any]]
) -> Columns:
    """Measure every cell on each of some ``channels``: planes (H, W) by name.

    ``group``: ``intensity`` or ``texture``. Returns ``object_number`` and float64 columns
    ``<feature>_<channel>``, channel by channel, otherwise as :func:`measure_cells`; what a cell
    does not have is NaN. Raises as :func:`measure_cells`.
    """
    regions = masks if isinstance(masks, Regions) else find_regions(masks)
    measure, names = _PER_CHANNEL[group], [item.name for item in GROUPS[group].features]
    found: Columns = {"object_number": regions.labels}
    for channel, plane in channels.items():
        columns = measure(regions, check_plane(plane, regions.masks.shape))
        found |= {f"{name}_{channel}": columns[name] for name in names}
    return found


def cell_boxes(masks: NDArray[Any]) -> Columns:
    """Where the cells of an image are; needs no intensities.

    ``masks`` as in :func:`measure_cells`. Returns ``object_number``, ``min_row``, ``min_col``,
    ``max_row``, ``max_col`` (int64, the box is half open) and ``centroid_row``,
    ``centroid_col``, ``perimeter`` (float64), a row per cell, by ascending object number. A cell
    whose ``perimeter`` is 0 is too small to count.

    Raises ``ImageError`` for masks that cannot be used.
    """
    regions = find_regions(masks)
    names = ("min_row", "min_col", "max_row", "max_col")
    rows, cols = centroids(regions)
    return {
        "object_number": regions.labels,
        **dict(zip(names, boxes(regions), strict=True)),
        "centroid_row": rows,
        "centroid_col": cols,
        "perimeter": perimeters(regions),
    }
