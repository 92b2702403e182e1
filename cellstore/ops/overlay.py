"""Pictures of a segmentation for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OUTLINE_COLOUR = (255, 196, 0)
"""Amber: seen on black and on grey, also by the colour-blind."""


def outlines(masks: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Pixels of a cell that touch another label above, below, left or right: (H, W) bool.

    The image border counts as no label, so a cell cut by it stays open there.
    """
    edge = np.zeros(masks.shape, bool)
    rows, columns = masks[1:] != masks[:-1], masks[:, 1:] != masks[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    return edge & (masks > 0)


Limits = tuple[float, float]
"""Grey levels that are shown as black and as white."""


def grey_limits(image: NDArray[np.generic], low: float = 1.0, high: float = 99.7) -> Limits:
    """Two percentiles of ``image`` (H, W)."""
    bottom, top = np.percentile(image.astype(np.float32), [low, high])
    return float(bottom), float(top)


def to_grey(image: NDArray[np.generic], limits: Limits | None = None) -> NDArray[np.uint8]:
    """``image`` (H, W) stretched between ``limits`` (its own, unless given) to 0..255."""
    bottom, top = limits or grey_limits(image)
    scaled = (image.astype(np.float32) - bottom) / max(top - bottom, 1e-9)
    grey: NDArray[np.uint8] = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    return grey


def outline_overlay(
    image: NDArray[np.generic],
    masks: NDArray[np.integer[Any]],
    colour: tuple[int, int, int] = OUTLINE_COLOUR,
    limits: Limits | None = None,
) -> NDArray[np.uint8]:
    """``image`` (H, W) in grey with the outlines of ``masks`` (H, W) on it: (H, W, 3) uint8."""
    picture = np.repeat(to_grey(image, limits)[..., None], 3, axis=-1)
    picture[outlines(masks)] = colour
    return picture
