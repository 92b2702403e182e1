"""What is measured on a cell: one registry, and the functions that fill it.

Coordinates are pixels, axis order is (row, column), the origin is the centre of the upper left
pixel. Values are those of ``skimage.measure.regionprops``; the definitions are in its
documentation, and the names here are the ones of the published study.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import regionprops_table

from cellstore.errors import ImageError

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Feature:
    """A measured column. ``source`` is the scikit-image property it is read from."""

    name: str
    dtype: str
    unit: str
    source: str
    description: str

    def to_json(self) -> dict[str, str]:
        """The fields by name, as a feature set lists them."""
        return asdict(self)


def _feature(name: str, unit: str, source: str, description: str) -> Feature:
    return Feature(name, "float64", unit, f"skimage.measure.regionprops: {source}", description)


FEATURES: tuple[Feature, ...] = (
    _feature("area", "pixel^2", "area", "Number of pixels of the cell."),
    _feature("convex_area", "pixel^2", "area_convex", "Number of pixels of its convex hull."),
    _feature("perimeter", "pixel", "perimeter", "Length of its outline, 4-connected (Benkrid)."),
    _feature(
        "eccentricity",
        "1",
        "eccentricity",
        "Eccentricity of the ellipse of equal moments; 0: disc.",
    ),
    _feature("mean_intensity", "intensity", "intensity_mean", "Mean intensity inside the cell."),
    _feature("min_intensity", "intensity", "intensity_min", "Lowest intensity inside the cell."),
    _feature("max_intensity", "intensity", "intensity_max", "Highest intensity inside the cell."),
    _feature(
        "major_axis_length",
        "pixel",
        "axis_major_length",
        "Long axis of the ellipse of equal moments.",
    ),
    _feature(
        "minor_axis_length",
        "pixel",
        "axis_minor_length",
        "Short axis of the ellipse of equal moments.",
    ),
    _feature(
        "orientation",
        "radian",
        "orientation",
        "Angle from the row axis to the long axis, -pi/2..pi/2.",
    ),
    _feature("solidity", "1", "solidity", "Area divided by the area of the convex hull."),
    _feature("extent", "1", "extent", "Area divided by the area of the bounding box."),
    _feature("centroid_y", "pixel", "centroid-0", "Row of the centroid."),
    _feature("centroid_x", "pixel", "centroid-1", "Column of the centroid."),
)
"""The built-in measurements, in the order in which a network reads them."""

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)

_BOX_COLUMNS = {
    "bbox-0": "min_row",
    "bbox-1": "min_col",
    "bbox-2": "max_row",
    "bbox-3": "max_col",
    "centroid-0": "centroid_row",
    "centroid-1": "centroid_col",
    "perimeter": "perimeter",
}
_BOX_INTEGERS = ("min_row", "min_col", "max_row", "max_col")


def measure_cells(masks: NDArray[Any], intensity: NDArray[Any]) -> Columns:
    """Measure every cell of an image.

    Parameters
    ----------
    masks
        (H, W) integers: 0 is background, each other value one cell. Values need not be
        consecutive.
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
    dense, labels = _dense(masks)
    _check_intensity(intensity, dense.shape)
    sources = {feature.name: feature.source.rsplit(" ", 1)[1] for feature in FEATURES}
    measured = _table(dense, tuple(sources.values()), np.asarray(intensity))
    columns = {name: measured[source].astype(np.float64) for name, source in sources.items()}
    return {"label": labels, **columns}


def cell_boxes(masks: NDArray[Any]) -> Columns:
    """Where the cells of an image are; needs no intensities.

    ``masks`` as in :func:`measure_cells`. Returns ``label``, ``min_row``, ``min_col``,
    ``max_row``, ``max_col`` (int64, the box is half open) and ``centroid_row``,
    ``centroid_col``, ``perimeter`` (float64), a row per cell, by ascending label. A cell whose
    ``perimeter`` is 0 is too small to count.

    Raises ``ImageError`` for masks that cannot be used.
    """
    dense, labels = _dense(masks)
    measured = _table(dense, tuple(_BOX_COLUMNS), None)
    columns = {
        name: measured[source].astype(np.int64 if name in _BOX_INTEGERS else np.float64)
        for source, name in _BOX_COLUMNS.items()
    }
    return {"label": labels, **columns}


def _table(
    dense: NDArray[Any], sources: tuple[str, ...], intensity: NDArray[Any] | None
) -> Columns:
    if not dense.any():
        return {source: np.empty(0) for source in sources}
    properties = tuple(dict.fromkeys(source.split("-")[0] for source in sources))
    table = regionprops_table(dense, intensity_image=intensity, properties=properties)  # type: ignore[no-untyped-call]
    return {source: np.asarray(table[source]) for source in sources}


def _dense(masks: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks renumbered 1..N (a huge label must not cost memory), and the labels they had."""
    masks = np.asarray(masks)
    if masks.ndim != 2:
        raise ImageError(f"Masks must be one plane, these have the shape {masks.shape}.")
    if not np.issubdtype(masks.dtype, np.integer) or (masks.size and masks.min() < 0):
        raise ImageError("Masks must be whole numbers from 0; segment this image again.")
    labels, inverse = np.unique(masks, return_inverse=True)
    has_background = bool(labels.size) and labels[0] == 0
    dense = inverse.reshape(masks.shape).astype(np.int64) + (0 if has_background else 1)
    return dense, labels[1 if has_background else 0 :].astype(np.int64)


def _check_intensity(intensity: NDArray[Any], shape: tuple[int, ...]) -> None:
    if np.shape(intensity) != shape:
        raise ImageError(
            f"The image has the shape {np.shape(intensity)} and its masks {shape}; "
            "segment this image again."
        )
    if not np.isfinite(intensity).all():
        raise ImageError("The image holds values that are not finite numbers.")
