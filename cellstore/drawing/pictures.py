"""Pixels as they go into a page: smaller, and as a data URI that needs no file."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

WIDEST = 460
"""Pixels of a picture on a page."""


def smaller(plane: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Return the means of squares of ``step`` pixels, in the shape of ``plane[::step, ::step]``."""
    missing = [(0, -length % step) for length in plane.shape]
    padded = np.pad(plane, missing, mode="edge")
    rows, columns = padded.shape[0] // step, padded.shape[1] // step
    means: NDArray[np.float32] = padded.reshape(rows, step, columns, step).mean(axis=(1, 3))
    return means


def middle(length: int, wanted: int = WIDEST) -> slice:
    """Return the middle ``wanted`` pixels of a side of ``length`` pixels."""
    start = max(0, (length - wanted) // 2)
    return slice(start, start + wanted)


def jpeg(picture: NDArray[np.uint8]) -> str:
    """Return a picture, (H, W) or (H, W, 3), as the data URI of a JPEG."""
    from imagecodecs import jpeg8_encode

    data = jpeg8_encode(np.ascontiguousarray(picture), level=85)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
