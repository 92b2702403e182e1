"""What is measured on a cell: the registry of features, and the functions that fill it.

Coordinates are pixels, axis order is (row, column), the origin is the centre of the upper left
pixel. Values are those of ``skimage.measure.regionprops``, computed for all cells of an image at
once; the definitions are in its documentation, and the names of group ``basic`` are those of the
published study.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from math import cos, pi, sin
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from .regions import Floats, Integers, Regions, convex_areas, ellipses, find_regions, perimeters

Columns = dict[str, NDArray[Any]]
"""A value for each cell, by name of the column."""


def check_plane(regions: Regions, plane: NDArray[Any]) -> NDArray[Any]:
    """Return the pixels (H * W,) of a plane of numbers, one after the other."""
    shape = regions.numbered.shape
    if np.shape(plane) != shape:
        raise ImageError(
            f"The image has the shape {np.shape(plane)} and its masks {shape}; "
            "segment this image again."
        )
    flat = np.ascontiguousarray(plane).ravel()
    if flat.dtype == bool:
        return flat.view(np.uint8)
    if np.issubdtype(flat.dtype, np.floating) and not np.isfinite(flat).all():
        raise ImageError("The image holds values that are not finite numbers.")
    return flat


def reduced(function: np.ufunc, regions: Regions, flat: NDArray[Any]) -> Floats:
    """Return the minimum, maximum or sum (N,) of the pixels ``flat`` (H * W,) of each cell.

    Sums of whole numbers are exact, others are taken in 64 bits.
    """
    dtype: Any = None
    if function is np.add:
        whole = np.issubdtype(flat.dtype, np.integer) and flat.dtype.itemsize <= 4
        dtype = np.int64 if whole else np.float64
    runs = function.reduceat(flat, regions.segments, dtype=dtype)[regions.run_segments]
    values: Floats = function.reduceat(runs, regions.first).astype(np.float64)
    return values


def intensities(regions: Regions, flat: NDArray[Any]) -> Columns:
    """Return the columns of group ``intensity`` (without a channel's name) of a plane (H * W,).

    A value that does not exist is NaN.
    """
    areas, cells = regions.areas, np.arange(len(regions.areas))
    at, starts = pixels_of(regions), np.cumsum(areas) - areas
    pixels = flat[at]
    values = pixels.astype(np.float64)
    total = reduced(np.add, regions, flat)
    mean = total / areas
    # Quartiles and median absolute deviation. The stable sort counts narrow whole numbers, and
    # merges what falls and then rises.
    kind: Literal["stable"] | None = "stable" if pixels.dtype.itemsize <= 2 else None
    quartiles = np.empty((4, len(areas)))
    for cell, start, area in zip(cells.tolist(), starts.tolist(), areas.tolist(), strict=True):
        ordered = np.sort(pixels[start : start + area], kind=kind).astype(np.float64)
        quartiles[:3, cell] = [_quantile(ordered, quarter) for quarter in (1, 2, 3)]
        away = np.sort(np.abs(ordered - quartiles[1, cell]), kind="stable")
        quartiles[3, cell] = _quantile(away, 2)
    # The centre of the light, about the centroid, so that nothing cancels.
    squares = np.zeros(len(areas))
    centroid = regions.centroid_row, regions.centroid_col
    for index, middle in zip(np.divmod(at, regions.numbered.shape[1]), centroid, strict=True):
        moment = values * (index - np.repeat(middle, areas))
        squares += np.add.reduceat(moment, starts) ** 2
    above, below = np.sqrt(squares), np.abs(total)
    # The edge: the pixels of skimage.segmentation.find_boundaries(masks, mode="inner").
    edge = np.flatnonzero(regions.boundary.ravel() & (regions.numbered.ravel() != 0))
    numbers = regions.numbered.ravel()[edge]
    edge = edge[np.argsort(numbers, kind="stable")]
    count = np.bincount(numbers, minlength=len(areas) + 1)[1:]
    there = np.flatnonzero(count)
    starts_there = (np.cumsum(count) - count)[there]
    edge_values = flat[edge].astype(np.float64)
    edge_total = np.add.reduceat(edge_values, starts_there)
    edge_mean = edge_total / count[there]
    of_edges = {
        "mean": edge_mean,
        "std": _spread(edge_values, edge_mean, count[there], starts_there),
        "min": np.minimum.reduceat(edge_values, starts_there),
        "max": np.maximum.reduceat(edge_values, starts_there),
        "integrated": edge_total,
    }
    edges = np.full((len(of_edges), len(areas)), np.nan)
    edges[:, there] = list(of_edges.values())
    return {
        "mean_intensity": mean,
        "min_intensity": reduced(np.minimum, regions, flat),
        "max_intensity": reduced(np.maximum, regions, flat),
        "std_intensity": _spread(values, mean, areas, starts),
        "lower_quartile_intensity": quartiles[0],
        "median_intensity": quartiles[1],
        "upper_quartile_intensity": quartiles[2],
        "mad_intensity": quartiles[3],
        "integrated_intensity": total,
        "mass_displacement": np.divide(
            above, below, out=np.full(len(areas), np.nan), where=below != 0
        ),
        **{f"edge_{name}_intensity": column for name, column in zip(of_edges, edges, strict=True)},
    }


def pixels_of(regions: Regions) -> Integers:
    """Return the flat index (P,) of each pixel of a cell, by cell, row and column."""
    before = np.cumsum(regions.lengths) - regions.lengths
    starts = regions.rows * regions.numbered.shape[1] + regions.cols - before
    return np.repeat(starts, regions.lengths) + np.arange(regions.lengths.sum())


def _spread(values: Floats, mean: Floats, count: Integers, starts: Integers) -> Floats:
    """Return the standard deviation of the values of each cell, which begin at ``starts``."""
    deviations = values - np.repeat(mean, count)
    spread: Floats = np.sqrt(np.add.reduceat(deviations**2, starts) / count)
    return spread


def _quantile(ordered: Floats, quarter: int) -> float:
    """``numpy.quantile(ordered, quarter / 4)`` without its overhead for small arrays."""
    index, part = divmod((len(ordered) - 1) * quarter, 4)
    low = float(ordered[index])
    return low + (float(ordered[index + 1]) - low) * part / 4 if part else low


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


def _registry() -> dict[str, FeatureGroup]:
    """Every group by name, with its features as ``features.csv`` describes them.

    Those of group ``texture`` are measured for each of ``TEXTURE_DISTANCES``.
    """
    groups = {
        "basic": "Shape, and intensity of one plane; what networks read by default.",
        "intensity": "Distribution of the intensity of each channel.",
        "texture": "Grey levels of neighbouring pixels of each channel.",
    }
    found: dict[str, list[Feature]] = {name: [] for name in groups}
    with files(__package__).joinpath("features.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            of_group = row.pop("group")
            feature = Feature(dtype="float64", **row)
            distances = TEXTURE_DISTANCES if of_group == "texture" else ()
            found[of_group] += [
                replace(
                    feature,
                    name=f"{feature.name}_d{distance}",
                    description=f"{feature.description} {_PAIRS.format(distance)}",
                )
                for distance in distances
            ] or [feature]
    return {
        name: FeatureGroup(name, tuple(found[name]), name != "basic", description)
        for name, description in groups.items()
    }


GROUPS = _registry()
"""The registry: every group by name.

The order of group ``basic`` is that in which a network reads it. A feature of ``texture`` is the
mean over the directions that have pairs of pixels; a cell without any has none.
"""

BASIC_GROUP = GROUPS["basic"]
FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in BASIC_GROUP.features)


LEVELS = 32
"""Grey levels of a cell; fewer than 8 lose texture, many more leave few pairs for each."""

_CELLS_AT_ONCE = 512
_ANGLES = (0.0, pi / 4, pi / 2, 3 * pi / 4)
_PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")


def textures(regions: Regions, flat: NDArray[Any]) -> Columns:
    """Return the columns of group ``texture`` (without a channel's name) of a plane (H * W,).

    NaN where a cell has no two pixels of that distance.
    """
    number, pixels = len(regions.areas), pixels_of(regions)
    stops = np.cumsum(regions.areas)
    starts = stops - regions.areas
    # Grey levels: each cell's intensities from its lowest to its highest, in 32 equal parts.
    values = flat[pixels].astype(np.float64)
    low = np.minimum.reduceat(values, starts)
    width = np.maximum.reduceat(values, starts) - low
    scale = np.divide(LEVELS, width, out=np.zeros_like(width), where=width > 0)
    parts = (values - np.repeat(low, regions.areas)) * np.repeat(scale, regions.areas)
    # A rim of no cell around the image spares the question whether a neighbour is inside.
    rim = max(TEXTURE_DISTANCES)
    height, columns = regions.numbered.shape
    columns += 2 * rim
    rows, cols = np.divmod(pixels, regions.numbered.shape[1])
    indices = (rows + rim) * columns + cols + rim
    cells = np.full((height + 2 * rim) * columns, -1, dtype=np.int32)
    cells[indices] = np.repeat(np.arange(number), regions.areas)
    levels = np.zeros(len(cells), dtype=np.int32)
    levels[indices] = np.minimum(parts, LEVELS - 1)
    found = {
        f"{name}_d{distance}": np.full(number, np.nan)
        for name in _PROPERTIES
        for distance in TEXTURE_DISTANCES
    }
    for begin in range(0, number, _CELLS_AT_ONCE):
        end = min(number, begin + _CELLS_AT_ONCE)
        here = indices[starts[begin] : stops[end - 1]]
        own, level = cells[here], levels[here]
        for distance in TEXTURE_DISTANCES:
            # The mean over the directions in which a cell has pairs of pixels.
            total, times = np.zeros((len(_PROPERTIES), end - begin)), np.zeros(end - begin)
            for angle in _ANGLES:
                # The neighbour that skimage.feature.graycomatrix looks at.
                down, right = round(sin(angle) * distance), round(cos(angle) * distance)
                there = here + down * columns + right
                key = (own - begin) * LEVELS**2 + level * LEVELS + levels[there]
                key = key[own == cells[there]]
                counts = np.bincount(key, minlength=(end - begin) * LEVELS**2)
                counts = counts.reshape(-1, LEVELS, LEVELS)
                counts = counts + counts.transpose(0, 2, 1)  # pairs in either order
                having = counts.any(axis=(1, 2))
                total[:, having] += _properties(counts[having])
                times += having
            mean = np.divide(total, times, out=np.full_like(total, np.nan), where=times > 0)
            for name, of_cells in zip(_PROPERTIES, mean, strict=True):
                found[f"{name}_d{distance}"][begin:end] = of_cells
    return found


def _properties(counts: NDArray[np.int64]) -> Floats:
    """(6, n) of the matrices (n, LEVELS, LEVELS), as ``skimage.feature.graycoprops`` has them."""
    flat = counts.reshape(len(counts), LEVELS**2)
    p = flat / flat.sum(axis=1, keepdims=True)
    levels = np.arange(LEVELS)
    apart = (levels[:, None] - levels[None, :]).ravel()
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    # The correlation of the two grey levels of a pair: 1 where there is one grey level only.
    sides = counts.sum(axis=2)
    number = sides.sum(axis=1)
    away = levels - (sides @ levels / number)[:, None]
    variance = (sides * away**2).sum(axis=1) / number
    mixed = np.einsum("nij,ni,nj->n", p.reshape(counts.shape), away, away)
    several = np.count_nonzero(sides, axis=1) > 1
    return np.stack(
        [
            p @ apart**2,
            p @ np.abs(apart),
            p @ (1 / (1 + apart**2)),
            np.sqrt((p**2).sum(axis=1)),
            np.divide(mixed, variance, out=np.ones_like(mixed), where=several),
            -(p * logs).sum(axis=1),
        ]
    )


def measure_cells(masks: NDArray[Any] | Regions, intensity: NDArray[Any]) -> Columns:
    """Measure every cell of an image: the features of group ``basic``.

    ``masks`` (H, W) are integers: 0 is background, each other value one cell; or what
    :func:`find_regions` made of them. ``intensity`` (H, W) is the plane on which intensities are
    measured. Returns ``object_number`` (int64) and one float64 column for each of
    ``FEATURE_NAMES``, a row per cell, by ascending object number.

    Raises:
        ImageError: the arrays are not planes of one shape, masks are not whole numbers from 0, or
            an intensity is not finite.
    """
    regions = masks if isinstance(masks, Regions) else find_regions(masks)
    flat = check_plane(regions, intensity)
    convex = convex_areas(regions)
    height, width = regions.max_row - regions.min_row, regions.max_col - regions.min_col
    found: Columns = {
        "area": regions.areas.astype(np.float64),
        "convex_area": convex.astype(np.float64),
        "perimeter": perimeters(regions),
        **ellipses(regions),
        "mean_intensity": reduced(np.add, regions, flat) / regions.areas,
        "min_intensity": reduced(np.minimum, regions, flat),
        "max_intensity": reduced(np.maximum, regions, flat),
        "solidity": regions.areas / convex,
        "extent": regions.areas / (height * width),
        "centroid_y": regions.centroid_row,
        "centroid_x": regions.centroid_col,
    }
    return {"object_number": regions.object_numbers} | {name: found[name] for name in FEATURE_NAMES}


def measure_channels(
    group: str, masks: NDArray[Any] | Regions, channels: Mapping[str, NDArray[Any]]
) -> Columns:
    """Measure every cell on each of some ``channels``: planes (H, W) by name.

    ``group``: ``intensity`` or ``texture``. Returns ``object_number`` and float64 columns
    ``<feature>_<channel>``, channel by channel, otherwise as :func:`measure_cells`; what a cell
    does not have is NaN. Raises as :func:`measure_cells`.
    """
    regions = masks if isinstance(masks, Regions) else find_regions(masks)
    measure = {"intensity": intensities, "texture": textures}[group]
    names = [item.name for item in GROUPS[group].features]
    found: Columns = {"object_number": regions.object_numbers}
    for channel, plane in channels.items():
        columns = measure(regions, check_plane(regions, plane))
        found |= {f"{name}_{channel}": columns[name] for name in names}
    return found
