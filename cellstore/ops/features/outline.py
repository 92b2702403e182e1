"""The outline of cells: its pixels, and its length."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .regions import Floats, Integers, Regions

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
    marks = _marked(regions)
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
    return _lengths(regions, values, codes)


def _lengths(regions: Regions, values: NDArray[Any], codes: NDArray[np.uint8]) -> Floats:
    kinds = np.zeros(64, dtype=np.int64)
    for kind, sums in enumerate((_STRAIGHT, _SLANTED, _MIXED), start=1):
        kinds[list(sums)] = kind
    cells = regions.cells_of(values)
    counts = np.bincount(4 * cells + kinds[codes], minlength=4 * len(regions))
    counts = counts.reshape(-1, 4)
    lengths: Floats = counts[:, 1:] @ np.array([1, sqrt(2), (1 + sqrt(2)) / 2])
    return lengths


def _marked(regions: Regions) -> NDArray[Any]:
    """Masks (H + 2, W + 2) in which only the outlines of the cells are left."""
    masks = regions.masks
    marks = np.zeros((masks.shape[0] + 2, masks.shape[1] + 2), dtype=masks.dtype)
    np.multiply(masks, _touches(regions, rim=True), out=marks[1:-1, 1:-1])
    return marks


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
