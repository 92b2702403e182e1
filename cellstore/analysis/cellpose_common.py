"""What the generations of Cellpose have in common: images in, stacks of one size, masks out."""

from __future__ import annotations

import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from cellpose.plot import dx_to_circ

from ..errors import ImageError, UserInputError
from .segmentation import SegmentationResult

if TYPE_CHECKING:
    from numpy.typing import NDArray


IMAGES_PER_CALL = 8
"""On a GPU. On a CPU images go one by one: more would only take more memory."""

TILES = 8
"""Tiles of an image that the network sees at once: Cellpose's own ``batch_size``."""

T = TypeVar("T")
R = TypeVar("R")


class Batches:
    """Calls a network with as many images as fit into the memory of its device.

    ``images`` and ``tiles`` (per image) are what a call gets at most. A call that runs out of GPU
    memory is made again with half the images, and, at one image, with half the tiles; the sizes
    that then work are kept, so that a small card is found out once.
    """

    def __init__(self, images: int, tiles: int = TILES) -> None:
        self.images = images
        self.tiles = tiles

    def run(self, items: Sequence[T], call: Callable[[Sequence[T], int], list[R]]) -> list[R]:
        """Return what ``call(some items, tiles)`` makes of all items, in their order.

        Raises:
            ImageError: an item does not fit even alone and tile by tile. The sizes stay as
                they were: it is the image that is too large, not the batch.
        """
        made: list[R] = []
        while len(made) < len(items):
            made += self._some(items[len(made) : len(made) + self.images], call)
        return made

    def _some(self, items: Sequence[T], call: Callable[[Sequence[T], int], list[R]]) -> list[R]:
        """What ``call`` makes of the first of ``items``, as many as fit."""
        images, tiles = len(items), self.tiles
        while True:
            try:
                made = call(items[:images], tiles)
            except torch.cuda.OutOfMemoryError as error:
                if images == tiles == 1:
                    raise ImageError(
                        "The image does not fit into the memory of the GPU, even alone. "
                        "Segment it with --device cpu."
                    ) from error
            else:
                self._keep(images, tiles, tried=len(items))
                return made
            torch.cuda.empty_cache()
            images, tiles = (images // 2, tiles) if images > 1 else (1, tiles // 2)

    def _keep(self, images: int, tiles: int, tried: int) -> None:
        self.tiles = tiles
        if images < tried:
            self.images = images


# Without a handler Python prints Cellpose's warnings ("no mask pixels found") on stderr.
logging.getLogger("cellpose").addHandler(logging.NullHandler())

# The default, chosen outright: torch warns on every first use by Cellpose while it is unchosen.
torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]


class _Item(NamedTuple):
    """Planes (H, W, n) of an image, and the diameter of its cells if that was given."""

    planes: NDArray[np.float32]
    diameter: float | None


class StackSegmenter(ABC):
    """Segments images in stacks of one shape; ``model`` is the ``CellposeModel`` of either kind.

    ``planes``: how many the network takes at least; what an image lacks is added as zeros.
    """

    planes = 1

    def __init__(
        self, model: Any, flow_threshold: float, cellprob_threshold: float, device: torch.device
    ) -> None:
        self._model = model
        self._thresholds = {
            "flow_threshold": float(flow_threshold),
            "cellprob_threshold": float(cellprob_threshold),
        }
        self.batches = Batches(IMAGES_PER_CALL if device.type == "cuda" else 1)

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of ``image``, (H, W) or (2, H, W). Raises ImageError for bad pixels."""
        return self.segment_batch([image])[0]

    def segment_batch(
        self, images: Sequence[NDArray[np.float32]], diameters: Sequence[float] | None = None
    ) -> list[SegmentationResult]:
        """Find the cells of each image; see :class:`~.segmentation.Segmenter`."""
        sizes = [None] * len(images) if diameters is None else diameters
        items = [
            _Item(padded(checked_planes(image), self.planes), size)
            for image, size in zip(images, sizes, strict=True)
        ]
        return [
            result
            for _, alike in groupby(items, key=lambda item: item.planes.shape)
            for result in self.batches.run(list(alike), self._segment_alike)
        ]

    def _segment_alike(self, items: Sequence[_Item], tiles: int) -> list[SegmentationResult]:
        stack = np.stack([item.planes for item in items])
        given = [item.diameter for item in items if item.diameter is not None]
        diameters = given or self.diameters(stack, tiles)
        if len(set(diameters)) == 1:
            return list(self._found(stack, diameters[0], tiles))
        return [
            next(self._found(plane[None], diameter, tiles))
            for plane, diameter in zip(stack, diameters, strict=True)
        ]

    @abstractmethod
    def diameters(self, stack: NDArray[np.float32], tiles: int) -> list[float]:
        """The cell diameter in pixels of each image of ``stack`` (n, H, W, planes)."""

    def _found(
        self, stack: NDArray[np.float32], diameter: float, tiles: int
    ) -> Iterator[SegmentationResult]:
        count, shape = len(stack), stack.shape[1:3]
        masks, (colours, flow, logit), _ = self._model.eval(
            stack, channel_axis=3, diameter=diameter, batch_size=tiles * count, **self._thresholds
        )
        masks, logit = masks.reshape(count, *shape), logit.reshape(count, *shape)
        flow = flow.reshape(2, count, *shape)
        for index in range(count):
            # Cellpose scales the colours of a stack as one picture; alone each has its own scale.
            rgb = colours.reshape(*shape, 3) if count == 1 else dx_to_circ(flow[:, index])
            flows = rendered_flows(rgb, logit[index])
            yield SegmentationResult(consecutive(masks[index]), flows, diameter)


def checked_planes(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """``image``, (H, W) or (2, H, W), as (H, W, 1 or 2), float32, finite.

    Raises:
        ImageError: it is something else.
    """
    planes = np.asarray(image, dtype=np.float32)
    stacked = planes[None] if planes.ndim == 2 else planes
    if stacked.ndim != 3 or len(stacked) > 2 or min(stacked.shape[1:]) < 2:
        raise ImageError(f"Segmentation needs one or two grey planes, not {planes.shape} values.")
    if planes.ndim == 3 and len(planes) != 2:
        raise ImageError(f"Two planes are (2, H, W), not {planes.shape}.")
    if not np.isfinite(planes).all():
        raise ImageError("The image holds values that are not finite numbers.")
    return np.ascontiguousarray(np.moveaxis(stacked, 0, -1))


def padded(image: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
    """``image`` (H, W, n) with planes of zeros behind its own, up to ``planes`` of them."""
    return np.pad(image, [(0, 0), (0, 0), (0, max(0, planes - image.shape[-1]))])


def consecutive(masks: NDArray[Any]) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """``masks`` (H, W) with labels 1..n, uint16 if they fit."""
    # The appended 0 keeps an image that is all cells from losing its first one.
    labels: NDArray[np.int64] = np.unique(np.append(masks, 0), return_inverse=True)[1][:-1]
    labels = labels.reshape(masks.shape)
    few = labels.max() <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16) if few else labels.astype(np.uint32)


def rendered_flows(rgb: NDArray[np.uint8], logit: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cellpose's colours (H, W, 3) and the cell probability as ``round(255 * sigmoid(logit))``."""
    probability = 1.0 / (1.0 + np.exp(-np.clip(logit.astype(np.float64), -60, 60)))
    return np.concatenate(
        [rgb, np.rint(255 * probability).astype(np.uint8)[..., None]], axis=-1, dtype=np.uint8
    )


def check_diameter(diameter: float | None) -> None:
    """Raise UserInputError for a diameter that is not above 0."""
    if diameter is not None and not (np.isfinite(diameter) and diameter > 0):
        raise UserInputError(f"The diameter must be above 0 pixels, not {diameter}.")


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a network file, by name, read without running any code in it.

    Raises:
        UserInputError: the file is damaged or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserInputError(
            f"{path} cannot be read as a network: the file is damaged, or it is something else."
        ) from error
    if not isinstance(state, dict):
        raise UserInputError(f"{path} holds no network weights. Choose another file.")
    return state
