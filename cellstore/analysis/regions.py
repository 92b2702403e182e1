"""Where cells are and what shape they have: from runs, exact but for the last division."""

from __future__ import annotations

from dataclasses import dataclass
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
    """The N cells of an image (H, W), by ascending object number, and their R runs.

    A run is pixels of one cell that lie side by side in one row; runs are sorted by cell, row and
    column. Cells are counted from 0 in the order of their object numbers.

    ``object_numbers`` (N,): the values of the cells in the masks. ``numbered`` (H, W): the masks,
    with 1 to N in place of these values; uint16, or uint32 above 65,535 cells. ``areas`` (N,):
    pixels. ``min_row``, ``min_col``, ``max_row``, ``max_col`` (N,): the bounding boxes, half open.
    ``centroid_row``, ``centroid_col`` (N,). ``boundary`` (H, W): whether a pixel has another value
    than the pixel above it, below it, left or right of it; the rim of the image is no boundary.

    ``rows``, ``cols`` (of the first pixel), ``lengths`` and ``cells`` (R,) of the runs; ``first``
    (N,): the first run of each cell. ``segments`` (S,): where a stretch of equal values begins in
    the flat image, of the background too; ``run_segments`` (R,): which of them the runs are.
    """

    object_numbers: Integers
    numbered: NDArray[Any]
    areas: Integers
    min_row: Integers
    min_col: Integers
    max_row: Integers
    max_col: Integers
    centroid_row: Floats
    centroid_col: Floats
    boundary: NDArray[np.bool_]
    rows: Integers
    cols: Integers
    lengths: Integers
    cells: Integers
    first: Integers
    segments: Integers
    run_segments: Integers


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
    run_segments = np.flatnonzero(values)
    run_segments = run_segments[np.argsort(values[run_segments], kind="stable")]
    values = values[run_segments]
    first = np.flatnonzero(np.diff(values, prepend=0)) if values.size else run_segments
    rows, cols = np.divmod(segments[run_segments], max(1, masks.shape[1]))
    spans = np.diff(segments, append=masks.size)
    lengths = spans[run_segments]
    object_numbers = values[first].astype(np.int64)
    cells = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    if len(first) and object_numbers[-1] != len(first):
        numbers = np.zeros(len(segments), np.uint32)
        numbers[run_segments] = cells + 1
        masks = np.repeat(numbers, spans).reshape(masks.shape)
    masks = masks.astype(np.uint16 if len(first) <= _NARROW else np.uint32, copy=False)
    boundary = np.zeros(masks.shape, dtype=bool)
    boundary[:, 1:] = begins[:, 1:]
    boundary[:, :-1] |= begins[:, 1:]
    below = masks[1:] != masks[:-1]
    boundary[1:] |= below
    boundary[:-1] |= below
    areas = np.add.reduceat(lengths, first)
    return Regions(
        object_numbers=object_numbers,
        numbered=masks,
        areas=areas,
        min_row=rows[first],
        min_col=np.minimum.reduceat(cols, first),
        max_row=np.maximum.reduceat(rows, first) + 1,
        max_col=np.maximum.reduceat(cols + lengths, first),
        centroid_row=np.add.reduceat(lengths * rows, first) / areas,
        centroid_col=np.add.reduceat(lengths * cols + lengths * (lengths - 1) // 2, first) / areas,
        boundary=boundary,
        rows=rows,
        cols=cols,
        lengths=lengths,
        cells=cells,
        first=first,
        segments=segments,
        run_segments=run_segments,
    )


_DIRECT, _DIAGONAL = 2, 10
# K. Benkrid, D. Crookes: Design and FPGA implementation of a perimeter estimator, as in
# skimage.measure.perimeter. A pixel of the outline adds 1 for itself, 2 for each direct and 10 for
# each diagonal neighbour on the outline; which sums count as what length:
_STRAIGHT = (5, 7, 15, 17, 25, 27)
_SLANTED = (21, 33)
_MIXED = (13, 23)


def perimeters(regions: Regions) -> Floats:
    """Return the length (N,) of the outline of each cell, in pixels; holes count."""
    outline = regions.boundary.copy()
    outline[:1] = outline[-1:] = outline[:, :1] = outline[:, -1:] = True
    # The numbered masks with a rim of one pixel, in which only the outlines of the cells are left.
    height, width = outline.shape
    marks = np.zeros((height + 2, width + 2), dtype=regions.numbered.dtype)
    np.multiply(regions.numbered, outline, out=marks[1:-1, 1:-1])
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
    cells = values.astype(np.int64) - 1
    counts = np.bincount(4 * cells + kinds[codes], minlength=4 * len(regions.areas))
    lengths: Floats = counts.reshape(-1, 4)[:, 1:] @ np.array([1, sqrt(2), (1 + sqrt(2)) / 2])
    return lengths


def convex_areas(regions: Regions) -> Integers:
    """Return the number of pixels (N,) of the convex hull of each cell.

    A pixel is a diamond, whose tips are half a pixel from its centre.
    """
    # First and last column of each cell in each of its rows.
    begins = np.ones(len(regions.rows), dtype=bool)
    begins[1:] = regions.cells[1:] != regions.cells[:-1]
    begins[1:] |= regions.rows[1:] != regions.rows[:-1]
    ends = np.ones(len(regions.rows), dtype=bool)
    ends[:-1] = begins[1:]
    cells, rows = regions.cells[begins], regions.rows[begins]
    left = regions.cols[begins]
    right = regions.cols[ends] + regions.lengths[ends] - 1
    # The first column inside the hull in each row, from top to bottom, on the left side; then on
    # the right side, mirrored. Both have the same rows of the same cells.
    bounds = []
    for columns in (left, -right):
        # Leftmost points of the diamonds, in half pixels: cell, y, x by cell and y, each y once.
        cell = np.repeat(cells, 3)
        y = (2 * rows[:, None] + np.array([-1, 0, 1])).ravel()
        x = (2 * columns[:, None] + np.array([0, -1, 0])).ravel()
        # The lower tip of a row's diamond and the upper tip of the next row's are at one height.
        twin = np.flatnonzero((y[1:] == y[:-1]) & (cell[1:] == cell[:-1]))
        once = np.ones(len(y), dtype=bool)
        x[twin] = np.minimum(x[twin], x[twin + 1])
        once[twin + 1] = False
        cell, y, x = cell[once], y[once], x[once]
        # Keep the corners of the left side of each hull. A point on or right of the line between
        # two other points is no corner, whether or not these two are: all such can go at once.
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
        # Pixel rows are the even heights; each side has those from its upper corner, excluded at
        # odd heights anyway, to before its lower corner.
        start = top + (top & 1)
        number = np.maximum(0, (y[side + 1] - start + 1) // 2)
        of = np.repeat(np.arange(len(side)), number)
        step = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
        height = start[of] + 2 * step - top[of]
        numerator = x[side][of] * dy[of] + height * dx[of]
        bounds.append(-(-numerator // (2 * dy[of])))
    low, high = bounds
    areas = np.bincount(cell[side][of], 1 - high - low, minlength=len(regions.areas))
    return areas.astype(np.int64)


def ellipses(regions: Regions) -> dict[str, Floats]:
    """Return what describes the ellipses that have the second moments of the cells, (N,) each.

    ``major_axis_length`` and ``minor_axis_length`` in pixels; ``eccentricity``, 0 for a disc and
    for a single pixel, towards 1 for a line; ``orientation``, the angle of the long axis from the
    row axis, -pi/2..pi/2.
    """
    # Moments are taken about the pixel next to the centroid, where they are small whole numbers,
    # and moved to the centroid after: nothing cancels.
    n, cells = regions.lengths, regions.cells
    rows = regions.rows - np.rint(regions.centroid_row).astype(np.int64)[cells]
    cols = regions.cols - np.rint(regions.centroid_col).astype(np.int64)[cells]
    along = n * cols + n * (n - 1) // 2
    squares = n * cols**2 + cols * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6
    mean_row, mean_col, mean_squares, mixed, row_squares = (
        np.add.reduceat(of_runs, regions.first) / regions.areas
        for of_runs in (n * rows, along, squares, rows * along, n * rows**2)
    )
    # The inertia tensor [[a, b], [b, c]] per pixel, as scikit-image has it, and its eigenvalues.
    a = mean_squares - mean_col**2
    b = -(mixed - mean_row * mean_col)
    c = row_squares - mean_row**2
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


def connected_parts(masks: NDArray[Any]) -> NDArray[np.uint32]:
    """Return each connected part (8 neighbours) of equal values (H, W), numbered row by row from 1.

    0 is background.
    """
    from skimage.measure import label  # slow to import

    found: NDArray[Any] = label(masks, background=0, connectivity=2)  # type: ignore[no-untyped-call]
    return found.astype(np.uint32)


def cells_in_pieces(masks: NDArray[Any]) -> list[int]:
    """Return the values of ``masks`` (H, W) that lie in several connected parts, ascending."""
    parts = connected_parts(masks)
    of_part = np.zeros(int(parts.max(initial=0)) + 1, np.int64)
    of_part[parts.ravel()] = masks.ravel()  # a part has one value
    values, counts = np.unique(of_part[1:], return_counts=True)
    return [int(value) for value in values[counts > 1]]
