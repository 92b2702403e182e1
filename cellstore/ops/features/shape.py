"""Where cells are and what shape they have: from runs, exact but for the last division."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .regions import Floats, Integers, Regions


@dataclass(frozen=True)
class Shape:
    """Boxes, centroids and second moments of the cells of ``regions``, (N,) each."""

    regions: Regions

    @cached_property
    def box(self) -> tuple[Integers, Integers, Integers, Integers]:
        """``min_row, min_col, max_row, max_col``, half open."""
        runs = self.regions
        if len(runs) == 0:
            return runs.labels, runs.labels, runs.labels, runs.labels
        last = runs.first + runs.n_runs - 1
        min_col = np.minimum.reduceat(runs.cols, runs.first)
        max_col = np.maximum.reduceat(runs.cols + runs.lengths, runs.first)
        return runs.rows[runs.first], min_col, runs.rows[last] + 1, max_col

    @cached_property
    def centroid(self) -> tuple[Floats, Floats]:
        """Row and column of the centroid."""
        runs = self.regions
        rows = runs.total(runs.lengths * runs.rows)
        cols = runs.total(_along(runs.cols, runs.lengths))
        return rows / runs.areas, cols / runs.areas

    @cached_property
    def inertia(self) -> tuple[Floats, Floats, Floats]:
        """``a, b, c`` of the inertia tensor [[a, b], [b, c]] per pixel, as scikit-image has it.

        Moments are taken about the pixel next to the centroid, where they are small whole numbers,
        and moved to the centroid after: nothing cancels.
        """
        runs, n = self.regions, self.regions.lengths
        middle = [np.rint(value).astype(np.int64)[runs.cells] for value in self.centroid]
        rows, cols = runs.rows - middle[0], runs.cols - middle[1]
        along, areas = _along(cols, n), runs.areas
        mean_row, mean_col = runs.total(n * rows) / areas, runs.total(along) / areas
        squares = n * cols**2 + cols * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6
        of_rows = runs.total(n * rows**2) / areas - mean_row**2
        of_cols = runs.total(squares) / areas - mean_col**2
        mixed = runs.total(rows * along) / areas - mean_row * mean_col
        return of_cols, -mixed, of_rows

    @cached_property
    def eigenvalues(self) -> tuple[Floats, Floats]:
        """The larger and the smaller eigenvalue of the inertia tensor."""
        a, b, c = self.inertia
        middle, half = (a + c) / 2, np.hypot((a - c) / 2, b)
        return middle + half, np.maximum(middle - half, 0)

    @cached_property
    def eccentricity(self) -> Floats:
        """0 for a disc, towards 1 for a line; 0 for a single pixel."""
        large, small = self.eigenvalues
        ratio = np.divide(small, large, out=np.ones_like(large), where=large > 0)
        found: Floats = np.sqrt(1 - ratio)
        return found

    @cached_property
    def orientation(self) -> Floats:
        """Angle of the long axis from the row axis, -pi/2..pi/2."""
        a, b, c = self.inertia
        round_ones = np.where(b < 0, np.pi / 4, -np.pi / 4)
        return np.where(a == c, round_ones, 0.5 * np.arctan2(-2 * b, c - a))


def _along(cols: Integers, lengths: Integers) -> Integers:
    """Sum of the columns of runs of ``lengths`` pixels that begin at ``cols``."""
    return lengths * cols + lengths * (lengths - 1) // 2
