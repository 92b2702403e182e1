"""The convex area, in whole numbers: how many pixels the convex hull of a cell has.

A pixel counts as the diamond of its four edge midpoints, and pixels on the hull's border belong to
it, as in ``skimage.morphology.convex_hull_image``. In half pixels all these points are whole
numbers, so the hull and the count are exact.
"""

from __future__ import annotations

import numpy as np

from .regions import Integers, Regions


def convex_areas(regions: Regions) -> Integers:
    """Return the number of pixels (N,) of the convex hull of each cell."""
    if len(regions) == 0:
        return regions.labels
    cells, rows, left, right = _row_extremes(regions)
    low = _inner_columns(*_profile(cells, rows, left))
    high = _inner_columns(*_profile(cells, rows, -right))
    # Both are bounds of the same rows of the same cells; the right one is mirrored.
    widths = -high[1] - low[1] + 1
    return np.bincount(low[0], widths, minlength=len(regions)).astype(np.int64)


def _row_extremes(regions: Regions) -> tuple[Integers, Integers, Integers, Integers]:
    """First and last column of each cell in each of its rows: cell, row, left, right."""
    cells, rows = regions.cells, regions.rows
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (cells[1:] != cells[:-1]) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(rows)) - 1
    right = regions.cols[last] + regions.lengths[last] - 1
    return cells[first], rows[first], regions.cols[first], right


def _profile(cells: Integers, rows: Integers, left: Integers) -> tuple[Integers, ...]:
    """Leftmost points of the diamonds, in half pixels: cell, y, x by cell and y, each y once."""
    cell = np.repeat(cells, 3)
    y = (2 * rows[:, None] + np.array([-1, 0, 1])).ravel()
    x = (2 * left[:, None] + np.array([0, -1, 0])).ravel()
    # The lower tip of a row's diamond and the upper tip of the next row's are at one height.
    twin = np.flatnonzero((y[1:] == y[:-1]) & (cell[1:] == cell[:-1]))
    order = np.ones(len(y), dtype=bool)
    x[twin] = np.minimum(x[twin], x[twin + 1])
    order[twin + 1] = False
    return cell[order], y[order], x[order]


def _corners(cell: Integers, y: Integers, x: Integers) -> tuple[Integers, ...]:
    """Keep the corners of the left side of each hull.

    A point on or right of the line between two other points is no corner, whether or not these
    two are; so all such points can go at once, until there are none.
    """
    while True:
        inner = (cell[:-2] == cell[1:-1]) & (cell[2:] == cell[1:-1])
        above, below = y[1:-1] - y[:-2], y[2:] - y[1:-1]
        bend = (x[1:-1] - x[:-2]) * below - (x[2:] - x[1:-1]) * above
        drop = inner & (bend >= 0)
        if not drop.any():
            return cell, y, x
        keep = np.ones(len(y), dtype=bool)
        keep[1:-1] = ~drop
        cell, y, x = cell[keep], y[keep], x[keep]


def _inner_columns(cell: Integers, y: Integers, x: Integers) -> tuple[Integers, Integers]:
    """The first column inside the hull in each row from top to bottom: cell, column."""
    cell, y, x = _corners(cell, y, x)
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
