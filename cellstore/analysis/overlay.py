"""Pictures of a segmentation for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


OUTLINE_COLOUR = (255, 196, 0)
"""Amber: seen on black and on grey, also by the colour-blind."""

CAPTION_HEIGHT = 26
"""Pixels of the line of text above a picture."""
GAP = 6
"""Pixels between the pictures of a sheet."""


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


def shrunk_overlay(
    image: NDArray[np.generic], masks: NDArray[np.integer[Any]], longest: int
) -> NDArray[np.uint8]:
    """As :func:`outline_overlay`, ``longest`` pixels at most: outlines stay one pixel wide."""
    from PIL import Image

    factor = min(1.0, longest / max(masks.shape))
    height, width = (max(1, round(side * factor)) for side in masks.shape)
    grey = Image.fromarray(to_grey(image)).resize((width, height), Image.Resampling.BOX)
    # Cells keep their labels: the value of the nearest pixel, never one in between.
    rows = (np.arange(height) * masks.shape[0]) // height
    columns = (np.arange(width) * masks.shape[1]) // width
    picture = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    picture[outlines(masks[np.ix_(rows, columns)])] = OUTLINE_COLOUR
    return picture


def captioned(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """``picture`` (H, W, 3) with a line of ``text`` above it, in letters that fit."""
    from PIL import Image, ImageDraw, ImageFont

    band = Image.new("RGB", (picture.shape[1], CAPTION_HEIGHT))
    font = ImageFont.load_default(size=CAPTION_HEIGHT * 0.55)
    fits = (picture.shape[1] - 8) / max(1.0, font.getlength(text))
    if fits < 1:  # smaller letters in a narrow picture
        font = ImageFont.load_default(size=max(4.0, CAPTION_HEIGHT * 0.55 * fits))
    ImageDraw.Draw(band).text((4, CAPTION_HEIGHT // 2), text, "white", font, anchor="lm")
    return np.concatenate([np.asarray(band), picture])


def contact_sheet(pictures: Sequence[NDArray[np.uint8]], columns: int = 3) -> NDArray[np.uint8]:
    """``pictures`` (H, W, 3), of any sizes, row by row on one dark sheet (H, W, 3)."""
    height = max(picture.shape[0] for picture in pictures) + GAP
    width = max(picture.shape[1] for picture in pictures) + GAP
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height + GAP, columns * width + GAP, 3), 32, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = GAP + (index // columns) * height, GAP + (index % columns) * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def png(picture: NDArray[np.uint8]) -> bytes:
    """``picture`` as the bytes of a PNG file."""
    return bytes(imagecodecs.png_encode(picture))
