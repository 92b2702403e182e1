"""Where cells are and what shape they have: from runs, exact but for the last division."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_NARROW = np.iinfo(np.uint16).max


@dataclass(frozen=True, eq=False)
class Regions:
    """The N cells of ``masks`` (H, W) by ascending label, and their R runs of pixels in a row.

    ``labels`` and ``areas`` (N,): number in the masks, and pixels, of each cell. ``begins`` (H, W):
    whether a pixel has another value than the one to its left, if there is one. ``segments`` (S,):
    where in the flat image a run of equal values begins, of the background too. ``picked`` (R,):
    the segments that are runs of cells, by cell and place; ``rows``, ``cols`` (their first pixel),
    ``lengths`` and ``cells`` (R,): the cell of each run, from 0. ``first`` (N,): the first run of
    each cell.
    """

    masks: NDArray[Any]
    labels: Integers
    areas: Integers
    begins: NDArray[np.bool_]
    segments: Integers
    picked: Integers
    rows: Integers
    cols: Integers
    lengths: Integers
    cells: Integers
    first: Integers

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def offsets(self) -> Integers:
        """(N + 1,) where the pixels of each cell begin in :attr:`places`."""
        offsets: Integers = np.concatenate(([0], np.cumsum(self.areas)))
        return offsets

    @cached_property
    def places(self) -> Integers:
        """(P,) flat index of each pixel of a cell, by cell and place."""
        before: Integers = np.cumsum(self.lengths) - self.lengths
        start = self.rows * self.masks.shape[1] + self.cols - before
        return np.repeat(start, self.lengths) + np.arange(self.lengths.sum())

    def total(self, of_runs: NDArray[Any]) -> Any:
        """Return the sum over the runs of each cell."""
        return np.add.reduceat(of_runs, self.first) if len(self) else of_runs[:0]

    def cells_of(self, values: NDArray[Any]) -> Integers:
        """Return the cell, from 0, of each label in ``values``."""
        if len(self) == 0 or self.labels[-1] > _NARROW:
            return np.searchsorted(self.labels, values)
        lookup = np.zeros(self.labels[-1] + 1, dtype=np.int64)
        lookup[self.labels] = np.arange(len(self))
        cells: Integers = lookup[values]
        return cells


def find_regions(masks: NDArray[Any]) -> Regions:
    """Return the cells of ``masks``: (H, W) integers, 0 is background, any other value one cell.

    Raises:
        ImageError: it is not one plane, or holds something else than whole numbers from 0.

    """
    masks = np.ascontiguousarray(masks)
    if masks.ndim != 2:
        raise ImageError(f"Masks must be one plane, these have the shape {masks.shape}.")
    begins = np.ones(masks.shape, dtype=bool)
    np.not_equal(masks[:, 1:], masks[:, :-1], out=begins[:, 1:])
    segments = np.flatnonzero(begins)
    values = masks.ravel()[segments]
    if not np.issubdtype(masks.dtype, np.integer) or (values.size and values.min() < 0):
        raise ImageError("Masks must be whole numbers from 0; segment this image again.")
    if masks.dtype.itemsize > 2 and (values.size == 0 or values.max() <= _NARROW):
        # Comparing and sorting narrow numbers is several times faster.
        masks, values = masks.astype(np.uint16), values.astype(np.uint16)
    picked = np.flatnonzero(values)
    picked = picked[np.argsort(values[picked], kind="stable")]
    values = values[picked]
    first = np.flatnonzero(np.diff(values, prepend=0)) if picked.size else picked
    rows, cols = np.divmod(segments[picked], max(1, masks.shape[1]))
    lengths = np.diff(segments, append=masks.size)[picked]
    labels = values[first].astype(np.int64)
    areas = np.add.reduceat(lengths, first) if first.size else lengths
    cells = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    return Regions(
        masks, labels, areas, begins, segments, picked, rows, cols, lengths, cells, first
    )


def check_plane(plane: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the pixels (H * W,) of a plane of numbers, one after the other.

    Raises:
        ImageError: it has another shape than its masks, or values that are not finite.

    """
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


_DIRECT, _DIAGONAL = 2, 10
# K. Benkrid, D. Crookes: Design and FPGA implementation of a perimeter estimator, as in
# skimage.measure.perimeter. A pixel of the outline adds 1 for itself, 2 for each direct and 10 for
# each diagonal neighbour on the outline; which sums count as what length:
_STRAIGHT = (5, 7, 15, 17, 25, 27)
_SLANTED = (21, 33)
_MIXED = (13, 23)


def perimeters(regions: Regions) -> Floats:
    """Return the length (N,) of the outline of each cell, in pixels; holes count."""
    if len(regions) == 0:
        return np.empty(0)
    masks = regions.masks
    # Masks with a rim of one pixel, in which only the outlines of the cells are left.
    marks = np.zeros((masks.shape[0] + 2, masks.shape[1] + 2), dtype=masks.dtype)
    np.multiply(masks, _touches(regions, rim=True), out=marks[1:-1, 1:-1])
    flat, width = marks.ravel(), marks.shape[1]
    at = np.flatnonzero(flat)
    values = flat[at]
    codes = np.ones(len(at), dtype=np.uint8)
    for weight, steps in (
        (_DIRECT, (-width, -1, 1, width)),
        (_DIAGONAL, (-width - 1, -width + 1, width - 1, width + 1)),
    ):
        for step in steps:
            codes += np.uint8(weight) * (flat[at + step] == values)
    kinds = np.zeros(64, dtype=np.int64)
    for kind, sums in enumerate((_STRAIGHT, _SLANTED, _MIXED), start=1):
        kinds[list(sums)] = kind
    cells = regions.cells_of(values)
    counts = np.bincount(4 * cells + kinds[codes], minlength=4 * len(regions))
    counts = counts.reshape(-1, 4)
    lengths: Floats = counts[:, 1:] @ np.array([1, sqrt(2), (1 + sqrt(2)) / 2])
    return lengths


def _touches(regions: Regions, *, rim: bool) -> NDArray[np.bool_]:
    """(H, W) whether a direct neighbour has another value; ``rim``: or is outside the image."""
    masks = regions.masks
    touches = regions.begins.copy()
    touches[:, 0] = rim
    touches[:, :-1] |= regions.begins[:, 1:]
    below = masks[1:] != masks[:-1]
    touches[1:] |= below
    touches[:-1] |= below
    if rim:
        touches[:, -1] = touches[0] = touches[-1] = True
    return touches


def edge_pixels(regions: Regions) -> tuple[Integers, Integers]:
    """Return the inner boundary: the pixels of cells with a direct neighbour of another value.

    Those of ``skimage.segmentation.find_boundaries(masks, mode="inner")``; the rim of the image is
    no boundary. Two arrays (E,): the cell, from 0, ascending, and the flat index of each pixel.
    """
    if len(regions) == 0:
        return regions.labels, regions.labels
    inside = _touches(regions, rim=False).ravel() & (regions.masks.ravel() != 0)
    at = np.flatnonzero(inside)
    cells = regions.cells_of(regions.masks.ravel()[at])
    order = np.argsort(cells, kind="stable")
    return cells[order], at[order]


def convex_areas(regions: Regions) -> Integers:
    """Return the number of pixels (N,) of the convex hull of each cell."""
    if len(regions) == 0:
        return regions.labels
    # First and last column of each cell in each of its rows.
    cells, rows = regions.cells, regions.rows
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (cells[1:] != cells[:-1]) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(rows)) - 1
    left = regions.cols[first]
    right = regions.cols[last] + regions.lengths[last] - 1
    cells, rows = cells[first], rows[first]
    low = _hull_side(cells, rows, left)
    high = _hull_side(cells, rows, -right)
    # Both are bounds of the same rows of the same cells; the right one is mirrored.
    widths = -high[1] - low[1] + 1
    return np.bincount(low[0], widths, minlength=len(regions)).astype(np.int64)


def _hull_side(cells: Integers, rows: Integers, left: Integers) -> tuple[Integers, Integers]:
    """The first column inside the hull in each row from top to bottom: cell, column.

    ``left``: the first column of a cell in each of its ``rows``. A pixel is a diamond, whose tips
    are half a pixel from its centre.
    """
    # Leftmost points of the diamonds, in half pixels: cell, y, x by cell and y, each y once.
    cell = np.repeat(cells, 3)
    y = (2 * rows[:, None] + np.array([-1, 0, 1])).ravel()
    x = (2 * left[:, None] + np.array([0, -1, 0])).ravel()
    # The lower tip of a row's diamond and the upper tip of the next row's are at one height.
    twin = np.flatnonzero((y[1:] == y[:-1]) & (cell[1:] == cell[:-1]))
    once = np.ones(len(y), dtype=bool)
    x[twin] = np.minimum(x[twin], x[twin + 1])
    once[twin + 1] = False
    cell, y, x = cell[once], y[once], x[once]
    # Keep the corners of the left side of each hull. A point on or right of the line between two
    # other points is no corner, whether or not these two are: all such points can go at once.
    while True:
        inner = (cell[:-2] == cell[1:-1]) & (cell[2:] == cell[1:-1])
        above, below = y[1:-1] - y[:-2], y[2:] - y[1:-1]
        bend = (x[1:-1] - x[:-2]) * below - (x[2:] - x[1:-1]) * above
        drop = inner & (bend >= 0)
        if not drop.any():
            break
        keep = np.ones(len(y), dtype=bool)
        keep[1:-1] = ~drop
        cell, y, x = cell[keep], y[keep], x[keep]
    side = np.flatnonzero(cell[1:] == cell[:-1])
    top, dy, dx = y[side], y[side + 1] - y[side], x[side + 1] - x[side]
    # Pixel rows are the even heights; each side has those from its upper corner, excluded at odd
    # heights anyway, to before its lower corner.
    start = top + (top & 1)
    number = np.maximum(0, (y[side + 1] - start + 1) // 2)
    of = np.repeat(np.arange(len(side)), number)
    step = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
    height = start[of] + 2 * step - top[of]
    numerator = x[side][of] * dy[of] + height * dx[of]
    return cell[side][of], -(-numerator // (2 * dy[of]))


def boxes(regions: Regions) -> tuple[Integers, Integers, Integers, Integers]:
    """Return ``min_row, min_col, max_row, max_col`` (N,) of the cells, half open."""
    if len(regions) == 0:
        return regions.labels, regions.labels, regions.labels, regions.labels
    rows, cols, first = regions.rows, regions.cols, regions.first
    last = np.append(first[1:], len(rows)) - 1
    min_col = np.minimum.reduceat(cols, first)
    max_col = np.maximum.reduceat(cols + regions.lengths, first)
    return rows[first], min_col, rows[last] + 1, max_col


def centroids(regions: Regions) -> tuple[Floats, Floats]:
    """Return row and column (N,) of the centroid of the cells."""
    n = regions.lengths
    rows = regions.total(n * regions.rows)
    cols = regions.total(n * regions.cols + n * (n - 1) // 2)
    return rows / regions.areas, cols / regions.areas


def ellipses(regions: Regions) -> dict[str, Floats]:
    """Return what describes the ellipses that have the second moments of the cells, (N,) each.

    ``major_axis_length`` and ``minor_axis_length`` in pixels; ``eccentricity``, 0 for a disc and
    for a single pixel, towards 1 for a line; ``orientation``, the angle of the long axis from the
    row axis, -pi/2..pi/2.
    """
    # Moments are taken about the pixel next to the centroid, where they are small whole numbers,
    # and moved to the centroid after: nothing cancels.
    n, areas = regions.lengths, regions.areas
    middle = [np.rint(value).astype(np.int64)[regions.cells] for value in centroids(regions)]
    rows, cols = regions.rows - middle[0], regions.cols - middle[1]
    along = n * cols + n * (n - 1) // 2
    mean_row, mean_col = regions.total(n * rows) / areas, regions.total(along) / areas
    squares = n * cols**2 + cols * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6
    # The inertia tensor [[a, b], [b, c]] per pixel, as scikit-image has it, and its eigenvalues.
    a = regions.total(squares) / areas - mean_col**2
    b = -(regions.total(rows * along) / areas - mean_row * mean_col)
    c = regions.total(n * rows**2) / areas - mean_row**2
    half = np.hypot((a - c) / 2, b)
    large, small = (a + c) / 2 + half, np.maximum((a + c) / 2 - half, 0)
    ratio = np.divide(small, large, out=np.ones_like(large), where=large > 0)
    round_ones = np.where(b < 0, np.pi / 4, -np.pi / 4)
    return {
        "eccentricity": np.sqrt(1 - ratio),
        "major_axis_length": 4 * np.sqrt(large),
        "minor_axis_length": 4 * np.sqrt(small),
        "orientation": np.where(a == c, round_ones, 0.5 * np.arctan2(-2 * b, c - a)),
    }
