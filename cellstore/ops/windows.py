"""Cells cut out of an image as they are: the native pixels of each bounding box, not resized.

A cell of 70 x 70 pixels takes 44 KB here and 1.6 MB as two resized crops of 224 pixels. So this is
what is kept, shuffled and sent to the accelerator; :mod:`cellstore.ops.resizing` makes crops of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstore.errors import ImageError
from cellstore.ops.branches import FLOW, IMAGE, MASK

INTENSITY_PERCENTILE = 99.9
"""The intensity of an image that becomes 1; what is brighter, a few hot pixels, becomes 1 too."""

_SAMPLED = 61
"""Of so many pixels one is looked at to see where the brightest begin."""

_SAFE_PERCENTILE = 99
"""Of those, this percentile is nearly always below the one that is wanted; if not, it is seen."""

LIGHT = "light"
"""Layer of intensities inside the cell. The codes of branch ``mask`` are layer ``mask``."""

EDGE_BIT, OWN_BIT = 1, 2
"""Bits of a code: a pixel of the outline of a cell, of the cell of this window; bit 0: of any."""

Flat = NDArray[Any]


@dataclass(frozen=True)
class Windows:
    """The windows of N cells, end to end: P pixels in all, row by row.

    ``sizes`` (N, 2) int64 are rows and columns of each; ``layers`` (K, P) by name, those that the
    branches need: ``mask`` uint8 codes, ``light`` float32 from 0 to 1, ``flow`` uint8 (K = 4),
    ``image`` float32 from 0 to 1 (K channels).
    """

    sizes: NDArray[np.int64]
    layers: Mapping[str, Flat]

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(N,) the pixel after the last one of each cell."""
        ends: NDArray[np.int64] = np.cumsum(self.sizes.prod(axis=1))
        return ends

    @property
    def starts(self) -> NDArray[np.int64]:
        """(N,) the first pixel of each cell."""
        starts: NDArray[np.int64] = self.ends - self.sizes.prod(axis=1)
        return starts

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(layer.nbytes for layer in self.layers.values())

    @classmethod
    def gather(cls, parts: Sequence[tuple[Windows, NDArray[np.int64]]]) -> Windows:
        """The cells at some positions, (M,), of each of one or more windows, as a copy."""
        spans = [
            (
                windows,
                zip(windows.starts[index].tolist(), windows.ends[index].tolist(), strict=True),
            )
            for windows, index in parts
        ]
        chosen = [(windows, a, b) for windows, some in spans for a, b in some]
        layers = {
            name: np.concatenate([empty[:, :0], *(w.layers[name][:, a:b] for w, a, b in chosen)], 1)
            for name, empty in parts[0][0].layers.items()
        }
        return cls(np.concatenate([windows.sizes[index] for windows, index in parts]), layers)


@dataclass(frozen=True)
class CutCells:
    """N cells whose windows are not resized yet, as numpy arrays.

    ``features`` (N, F) float32, ``labels`` (N,) int64 class indices, ``cell_ids`` (N,) int64.
    """

    windows: Windows
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    cell_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        few = self.features.nbytes + self.labels.nbytes + self.cell_ids.nbytes
        return self.windows.nbytes + few

    def take(self, index: NDArray[np.int64]) -> CutCells:
        """The cells at the positions ``index``, (M,), as a copy."""
        return CutCells.gather([(self, index)])

    @classmethod
    def gather(cls, parts: Sequence[tuple[CutCells, NDArray[np.int64]]]) -> CutCells:
        """The cells at some positions, (M,), of each of one or more blocks, as a copy."""
        return cls(
            Windows.gather([(block.windows, index) for block, index in parts]),
            np.concatenate([block.features[index] for block, index in parts]),
            np.concatenate([block.labels[index] for block, index in parts]),
            np.concatenate([block.cell_ids[index] for block, index in parts]),
        )


@dataclass(frozen=True)
class Pictures:
    """What the cells of an image are cut from; ``None``: no branch looks at it.

    ``masks`` (H, W) integers, 0 is background; ``flows`` (H, W, 4) uint8, the three channels of
    Cellpose's flow rendering and the cell probability; ``plane`` (H, W) intensities; ``channels``
    (H, W) intensities each. ``whites`` are the intensities that become 1, of the plane and of each
    channel; without them it is the 99.9th percentile of each.
    """

    masks: NDArray[Any]
    flows: NDArray[Any] | None = None
    plane: NDArray[Any] | None = None
    channels: tuple[NDArray[Any], ...] = ()
    whites: tuple[float, ...] | None = None


def cut_windows(pictures: Pictures, boxes: NDArray[Any], labels: NDArray[Any]) -> Windows:
    """Cut the cells of one image out by their bounding boxes.

    Parameters
    ----------
    pictures
        The image. Without ``plane`` there is no branch ``mask``.
    boxes
        (N, 4) integers: ``min_row``, ``min_col``, ``max_row``, ``max_col``, half open.
    labels
        (N,) the value of each cell in ``masks``.

    Raises
    ------
    ImageError
        The arrays do not fit each other, a box is empty or reaches out of the image, or does not
        hold its cell.

    """
    boxes = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
    _check_pictures(pictures)
    _check_boxes(boxes, labels, pictures.masks.shape)
    sizes = boxes[:, 2:] - boxes[:, :2]
    cut = Windows(sizes, _empty_layers(pictures, int(sizes.prod(axis=1).sum())))
    codes, whites = _cells_and_edges(pictures.masks), _white_levels(pictures)
    spans = zip(boxes.tolist(), cut.starts.tolist(), cut.ends.tolist(), labels, strict=True)
    for (top, left, bottom, right), start, end, label in spans:
        window = np.s_[top:bottom, left:right]
        own = pictures.masks[window] == label
        if not own.any():
            raise ImageError(f"Cell {label} is not in its box; segment this image again.")
        shape = (-1, *own.shape)
        places = {name: layer[:, start:end].reshape(shape) for name, layer in cut.layers.items()}
        _fill(places, pictures, window, whites, own, codes)
    return cut


def _empty_layers(pictures: Pictures, pixels: int) -> dict[str, Flat]:
    """Layers in one piece of memory, the widest numbers first."""
    kinds: list[tuple[str, int, Any]] = []
    if pictures.channels:
        kinds.append((IMAGE, len(pictures.channels), np.float32))
    if pictures.plane is not None:
        kinds.append((LIGHT, 1, np.float32))
    if pictures.flows is not None:
        kinds.append((FLOW, 4, np.uint8))
    if pictures.plane is not None:
        kinds.append((MASK, 1, np.uint8))
    sizes = [channels * pixels * np.dtype(kind).itemsize for _, channels, kind in kinds]
    pieces = np.split(np.empty(sum(sizes), np.uint8), np.cumsum(sizes)[:-1])
    return {
        name: piece.view(kind).reshape(channels, pixels)
        for piece, (name, channels, kind) in zip(pieces, kinds, strict=False)
    }


def _fill(
    places: Mapping[str, NDArray[Any]],
    pictures: Pictures,
    window: Any,
    whites: Sequence[float],
    own: NDArray[np.bool_],
    codes: NDArray[np.uint8],
) -> None:
    """Write the layers (K, h, w) of one cell, cut by ``window``, to their places."""
    if pictures.plane is not None:
        np.left_shift(own, OWN_BIT, out=places[MASK][0], dtype=np.uint8, casting="unsafe")
        places[MASK][0] |= codes[window]
        _scale(pictures.plane[window], whites[0], places[LIGHT][0])
        places[LIGHT][0] *= own
    if pictures.flows is not None:
        places[FLOW][...] = pictures.flows[window].transpose(2, 0, 1)
    for number, channel in enumerate(pictures.channels):
        _scale(channel[window], whites[1 + number], places[IMAGE][number])


def _scale(light: NDArray[Any], white: float, out: NDArray[np.float32]) -> None:
    if white <= 0:
        out[...] = 0
        return
    np.divide(light, white, out=out, casting="unsafe")
    np.minimum(out, 1, out=out)
    np.maximum(out, 0, out=out)


def _white_levels(pictures: Pictures) -> Sequence[float]:
    planes = (pictures.plane, *pictures.channels)
    for plane in planes:
        if plane is not None and not np.isfinite(plane).all():
            raise ImageError("The image holds values that are not finite numbers.")
    if pictures.whites is not None:
        return pictures.whites
    return [0.0 if plane is None else white_level(plane) for plane in planes]


def no_windows(branches: Iterable[str], n_channels: int = 0) -> Windows:
    """Windows of no cell, with the layers of ``branches``."""
    kinds: dict[str, dict[str, Flat]] = {
        MASK: {MASK: np.empty((1, 0), np.uint8), LIGHT: np.empty((1, 0), np.float32)},
        FLOW: {FLOW: np.empty((4, 0), np.uint8)},
        IMAGE: {IMAGE: np.empty((n_channels, 0), np.float32)},
    }
    layers = {key: layer for name in branches for key, layer in kinds.get(name, {}).items()}
    return Windows(np.empty((0, 2), np.int64), layers)


def without_pixels(count: int) -> Windows:
    """Windows of ``count`` cells of which nothing is seen, for networks that look at none."""
    return Windows(np.zeros((count, 2), np.int64), {})


def white_level(intensities: NDArray[Any]) -> float:
    """The intensity that becomes 1: the 99.9th percentile, or the maximum if that is 0.

    As ``numpy.percentile`` (linear interpolation), but only the brightest pixels are sorted.
    """
    flat = np.ravel(intensities)
    place = INTENSITY_PERCENTILE / 100 * (flat.size - 1)
    needed = flat.size - int(place)
    brightest = flat[flat >= np.percentile(flat[::_SAMPLED], _SAFE_PERCENTILE)]
    if len(brightest) < needed:
        brightest = flat
    brightest = np.sort(brightest)
    low, high = float(brightest[-needed]), float(brightest[min(1 - needed, -1)])
    return low + (high - low) * (place - int(place)) or float(brightest[-1])


def _cells_and_edges(masks: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W): bit 0 in cells, ``EDGE_BIT`` where a 4-neighbour has another value.

    Edges equal ``skimage.segmentation.find_boundaries(masks, connectivity=1, mode="inner")``; the
    rim of the image is no boundary.
    """
    edge: NDArray[np.bool_] = np.zeros(masks.shape, dtype=bool)
    other = np.empty(masks.shape, dtype=bool)  # the only one besides: fresh memory takes time
    rows = np.not_equal(masks[1:], masks[:-1], out=other[1:])
    edge[1:] |= rows
    edge[:-1] |= rows
    columns = np.not_equal(masks[:, 1:], masks[:, :-1], out=other[:, 1:])
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    cells = np.not_equal(masks, 0, out=other)
    edge &= cells
    codes: NDArray[np.uint8] = edge.view(np.uint8)
    codes <<= np.uint8(EDGE_BIT)
    codes |= cells.view(np.uint8)
    return codes


def _check_pictures(pictures: Pictures) -> None:
    masks, flows, whites = pictures.masks, pictures.flows, pictures.whites
    if whites is not None and len(whites) != 1 + len(pictures.channels):
        raise ImageError(
            f"There are {len(whites)} white levels for a plane and {len(pictures.channels)} "
            "channels. Train again."
        )
    planes = [plane for plane in (pictures.plane, *pictures.channels) if plane is not None]
    for plane in planes:
        if masks.ndim != 2 or np.shape(plane) != masks.shape:
            raise ImageError(
                f"Masks {masks.shape} and image {np.shape(plane)} do not fit each other; segment "
                "this image again, or ingest masks that belong to it."
            )
    if flows is None:
        return
    if flows.shape != (*masks.shape, 4):
        raise ImageError(
            f"Masks {masks.shape} and flows {flows.shape} do not fit each other; segment this "
            "image again."
        )
    if flows.dtype != np.uint8:
        raise ImageError(f"Flows must be uint8, these are {flows.dtype}; segment this image again.")


def _check_boxes(boxes: NDArray[np.int64], labels: NDArray[Any], shape: tuple[int, ...]) -> None:
    if len(boxes) != len(labels):
        raise ImageError(f"There are {len(boxes)} boxes for {len(labels)} cells.")
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= shape).all()
    if not inside or (boxes[:, :2] >= boxes[:, 2:]).any():
        raise ImageError(
            f"A box is empty or reaches out of the image of {shape[0]} x {shape[1]} pixels; "
            "segment this image again."
        )
