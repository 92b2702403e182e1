"""The cells of a label image as runs: the pixels of one cell that follow each other in a row.

A field of a million pixels has some ten thousand runs. What depends on shape alone is computed from
runs, exactly, in integers; what depends on intensities reads each plane once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstore.errors import ImageError

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_NARROW = np.iinfo(np.uint16).max


@dataclass(frozen=True, eq=False)
class Regions:
    """The N cells of ``masks`` (H, W) by ascending label, and their R runs.

    ``labels`` (N,). ``segments`` (S,): where in the flat image a run of equal values begins, of
    the background too. ``picked`` (R,): the segments that are runs of cells, by cell and place;
    ``rows``, ``cols`` (their first pixel) and ``lengths`` (R,). ``first`` (N,): the first run of
    each cell, ``cells`` (R,): the cell of each run, from 0.
    """

    masks: NDArray[Any]
    labels: Integers
    segments: Integers
    picked: Integers
    rows: Integers
    cols: Integers
    lengths: Integers
    first: Integers

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def cells(self) -> Integers:
        """The cell of each run, from 0."""
        return np.repeat(np.arange(len(self)), self.n_runs)

    @cached_property
    def n_runs(self) -> Integers:
        """How many runs each cell has."""
        number: Integers = np.diff(self.first, append=len(self.rows))
        return number

    @cached_property
    def areas(self) -> Integers:
        """How many pixels each cell has."""
        areas: Integers = self.total(self.lengths)
        return areas

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

    @cached_property
    def begins(self) -> NDArray[np.bool_]:
        """(H, W) whether a pixel has another value than the one to its left, if there is one."""
        begins = np.zeros(self.masks.size, dtype=bool)
        begins[self.segments] = True
        return begins.reshape(self.masks.shape)

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
    if not np.issubdtype(masks.dtype, np.integer):
        raise _not_masks()
    begins = np.ones(masks.shape, dtype=bool)
    np.not_equal(masks[:, 1:], masks[:, :-1], out=begins[:, 1:])
    segments = np.flatnonzero(begins)
    return _by_cell(masks, segments, masks.ravel()[segments])


def _by_cell(masks: NDArray[Any], segments: Integers, values: NDArray[Any]) -> Regions:
    if values.size and values.min() < 0:
        raise _not_masks()
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
    return Regions(masks, labels, segments, picked, rows, cols, lengths, first)


def _not_masks() -> ImageError:
    return ImageError("Masks must be whole numbers from 0; segment this image again.")


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
