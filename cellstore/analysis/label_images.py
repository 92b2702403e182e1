"""Label images (H, W): 0 is background, each other value one object."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label


def parts(labels: NDArray[Any]) -> NDArray[np.uint32]:
    """Return each connected part (8 neighbours) of equal labels, numbered from 1 row by row."""
    found: NDArray[Any] = label(labels, background=0, connectivity=2)  # type: ignore[no-untyped-call]
    return found.astype(np.uint32)


def labels_in_pieces(labels: NDArray[Any]) -> list[int]:
    """Return the labels that lie in several connected parts, ascending."""
    numbered = parts(labels)
    of_part = np.zeros(int(numbered.max(initial=0)) + 1, np.int64)
    of_part[numbered.ravel()] = labels.ravel()  # a part has one label
    values, counts = np.unique(of_part[1:], return_counts=True)
    return [int(value) for value in values[counts > 1]]


def median_diameter(labels: NDArray[Any]) -> float | None:
    """Return the median over the objects of the diameter, in pixels, of a disc of their area."""
    _, areas = np.unique(labels[labels > 0], return_counts=True)
    return float(np.median(2 * np.sqrt(areas / np.pi))) if areas.size else None
