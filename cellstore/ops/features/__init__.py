"""What is measured on a cell: the registry of features, and the functions that fill it.

Coordinates are pixels, axis order is (row, column), the origin is the centre of the upper left
pixel. Values are those of ``skimage.measure.regionprops``, computed for all cells of an image at
once; the definitions are in its documentation, and the names of group ``basic`` are those of the
published study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hull import convex_areas
from .intensity import brief, intensities
from .outline import perimeters
from .regions import Regions, check_plane, find_regions
from .registry import (
    BASIC_GROUP,
    FEATURE_NAMES,
    FEATURES,
    GROUPS,
    INTENSITY,
    TEXTURE,
    Feature,
    FeatureGroup,
)
from .shape import Shape
from .texture import textures

__all__ = [
    "BASIC_GROUP",
    "FEATURES",
    "FEATURE_NAMES",
    "GROUPS",
    "INTENSITY",
    "TEXTURE",
    "Feature",
    "FeatureGroup",
    "Regions",
    "cell_boxes",
    "find_regions",
    "measure_cells",
    "measure_channels",
]

Columns = dict[str, NDArray[Any]]

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
    ``label`` (int64) and one float64 column for each of ``FEATURES``, a row per cell, by
    ascending label. No cell: columns of length 0.

    Raises
    ------
    ImageError
        The arrays are not planes of one shape, masks are not whole numbers from 0, or an
        intensity is not finite.

    """
    regions = _regions(masks)
    return {"label": regions.labels, **_basic(regions, intensity)}


def measure_channels(
    group: str, masks: NDArray[Any] | Regions, channels: Mapping[str, NDArray[Any]]
) -> Columns:
    """Measure every cell on each of some ``channels``: planes (H, W) by name.

    ``group``: ``intensity`` or ``texture``. Returns ``label`` and float64 columns
    ``<feature>_<channel>``, channel by channel, otherwise as :func:`measure_cells`; what a cell
    does not have is NaN. Raises as :func:`measure_cells`.
    """
    regions = _regions(masks)
    return {"label": regions.labels, **_by_channel(group, regions, channels)}


def cell_boxes(masks: NDArray[Any]) -> Columns:
    """Where the cells of an image are; needs no intensities.

    ``masks`` as in :func:`measure_cells`. Returns ``label``, ``min_row``, ``min_col``,
    ``max_row``, ``max_col`` (int64, the box is half open) and ``centroid_row``,
    ``centroid_col``, ``perimeter`` (float64), a row per cell, by ascending label. A cell whose
    ``perimeter`` is 0 is too small to count.

    Raises ``ImageError`` for masks that cannot be used.
    """
    regions = find_regions(masks)
    shape = Shape(regions)
    box = dict(zip(("min_row", "min_col", "max_row", "max_col"), shape.box, strict=True))
    rows, cols = shape.centroid
    return {
        "label": regions.labels,
        **box,
        "centroid_row": rows,
        "centroid_col": cols,
        "perimeter": perimeters(regions),
    }


def _regions(masks: NDArray[Any] | Regions) -> Regions:
    return masks if isinstance(masks, Regions) else find_regions(masks)


def _basic(regions: Regions, plane: NDArray[Any]) -> Columns:
    flat = check_plane(plane, regions.masks.shape)
    shape, convex = Shape(regions), convex_areas(regions)
    top, left, bottom, right = shape.box
    found: Columns = {
        "area": regions.areas.astype(np.float64),
        "convex_area": convex.astype(np.float64),
        "perimeter": perimeters(regions),
        "eccentricity": shape.eccentricity,
        **brief(regions, flat),
        "major_axis_length": 4 * np.sqrt(shape.eigenvalues[0]),
        "minor_axis_length": 4 * np.sqrt(shape.eigenvalues[1]),
        "orientation": shape.orientation,
        "solidity": regions.areas / convex,
        "extent": regions.areas / ((bottom - top) * (right - left)),
        "centroid_y": shape.centroid[0],
        "centroid_x": shape.centroid[1],
    }
    return {name: found[name] for name in FEATURE_NAMES}


def _by_channel(group: str, regions: Regions, channels: Mapping[str, NDArray[Any]]) -> Columns:
    measure, names = _PER_CHANNEL[group], [item.name for item in GROUPS[group].features]
    found: Columns = {}
    for channel, plane in channels.items():
        columns = measure(regions, check_plane(plane, regions.masks.shape))
        found |= {f"{name}_{channel}": columns[name] for name in names}
    return found
