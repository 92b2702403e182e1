"""Cells as a network sees them: crops of the mask image and of the flow image.

The mask image has four channels: the cell itself, its outline, the other cells, and the
projected intensity inside the cell. It is derived here and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from cellstore.errors import ImageError, UserInputError
from cellstore.ops.branches import FLOW, MASK

CROP_MEAN = 0.5
CROP_STD = 0.5
"""Normalisation of every channel in the published study: 0..1 becomes -1..1."""

INTENSITY_PERCENTILE = 99.9
"""The intensity of an image that becomes 1; what is brighter, a few hot pixels, becomes 1 too."""

UNKNOWN_LABEL = -1
"""Class index of a cell whose class is not known, or not among those of the network."""


@dataclass(frozen=True)
class CellBlock:
    """N cells: those of one image, or one batch.

    ``crops`` are (N, C, S, S) float32 by image branch, only those that the network looks at;
    ``features`` (N, F) float32, ``labels`` (N,) int64 class indices and ``cell_ids`` (N,) int64.
    """

    crops: Mapping[str, Tensor]
    features: Tensor
    labels: Tensor
    cell_ids: Tensor

    def __len__(self) -> int:
        return int(self.cell_ids.shape[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> CellBlock:
        """The cells with ``change`` made to each of their tensors."""
        return CellBlock(
            {name: change(crops) for name, crops in self.crops.items()},
            change(self.features),
            change(self.labels),
            change(self.cell_ids),
        )

    def to(self, device: torch.device | str) -> CellBlock:
        """The same cells on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def take(self, index: Tensor) -> CellBlock:
        """The cells at the positions ``index``, (M,) int64."""
        return self.map(lambda tensor: tensor[index])

    @classmethod
    def join(cls, blocks: Sequence[CellBlock]) -> CellBlock:
        """All cells of ``blocks``, of which there must be one or more, of the same branches."""
        if len(blocks) == 1:
            return blocks[0]
        return cls(
            {name: torch.cat([b.crops[name] for b in blocks]) for name in blocks[0].crops},
            torch.cat([block.features for block in blocks]),
            torch.cat([block.labels for block in blocks]),
            torch.cat([block.cell_ids for block in blocks]),
        )


def cell_crops(
    masks: NDArray[Any],
    flows: NDArray[Any] | None,
    projection: NDArray[Any],
    boxes: NDArray[Any],
    labels: NDArray[Any],
    size: int = 224,
) -> dict[str, Tensor]:
    """Crop the cells of one image by their bounding boxes.

    Parameters
    ----------
    masks
        (H, W) integers, 0 is background.
    flows
        (H, W, 4) uint8: the three channels of Cellpose's flow rendering, the cell probability.
        ``None``: they are unknown or of no interest.
    projection
        (H, W) intensities of any numeric type. They are divided by the 99.9th percentile of the
        image and cut at 0 and 1.
    boxes
        (N, 4) integers: ``min_row``, ``min_col``, ``max_row``, ``max_col``, half open.
    labels
        (N,) the value of each cell in ``masks``.
    size
        Side of a crop in pixels. The aspect ratio is not kept: resizing is that of torchvision's
        ``Resize`` (bilinear, with antialiasing where it shrinks).

    Returns
    -------
    Crops by branch, ``mask`` and, if there are flows, ``flow``: each (N, 4, size, size) float32
    from -1 to 1.

    Raises
    ------
    ImageError
        The arrays do not fit each other, a box is empty or reaches out of the image, or does not
        hold its cell.

    """
    _check_planes(masks, flows, projection)
    _check_boxes(boxes, labels, masks.shape)
    if size < 1:
        raise UserInputError(f"The size of a crop must be 1 pixel or more, not {size}.")
    scaled = _scaled(np.asarray(projection))
    outlines = _inner_outlines(masks)
    channels = 4 if flows is None else 8
    crops = torch.empty((len(labels), channels, size, size), dtype=torch.float32)
    for crop, box, label in zip(crops, np.asarray(boxes).tolist(), labels, strict=True):
        window = slice(box[0], box[2]), slice(box[1], box[3])
        layers = _layers(masks[window], outlines[window], scaled[window], int(label))
        if flows is not None:
            layers = np.concatenate([layers, _unit_flows(flows[window])])
        crop[:] = _resized(torch.from_numpy(layers), size)
    crops.sub_(CROP_MEAN).div_(CROP_STD)
    made = {MASK: crops[:, :4]}
    return made if flows is None else made | {FLOW: crops[:, 4:]}


def _layers(
    masks: NDArray[Any], outlines: NDArray[np.bool_], scaled: NDArray[np.float32], label: int
) -> NDArray[np.float32]:
    own = masks == label
    if not own.any():
        raise ImageError(f"Cell {label} is not in its box; segment this image again.")
    others = (masks != 0) & ~own
    layers: NDArray[np.float32] = np.stack([own, own & outlines, others, own * scaled], axis=0)
    return layers.astype(np.float32)


def _unit_flows(flows: NDArray[Any]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = flows.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return unit


def _resized(stack: Tensor, size: int) -> Tensor:
    grown = interpolate(
        stack[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return grown[0].clamp_(0, 1)


def _inner_outlines(masks: NDArray[Any]) -> NDArray[np.bool_]:
    """(H, W): the pixels of cells with a 4-neighbour of another value.

    Equal to ``skimage.segmentation.find_boundaries(masks, connectivity=1, mode="inner")``; the
    rim of the image is no boundary.
    """
    edge: NDArray[np.bool_] = np.zeros(masks.shape, dtype=bool)
    rows = masks[1:] != masks[:-1]
    columns = masks[:, 1:] != masks[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    edge &= masks != 0
    return edge


def _scaled(projection: NDArray[Any]) -> NDArray[np.float32]:
    if not np.isfinite(projection).all():
        raise ImageError("The image holds values that are not finite numbers.")
    white = float(np.percentile(projection, INTENSITY_PERCENTILE)) or float(projection.max())
    if white <= 0:
        return np.zeros(projection.shape, dtype=np.float32)
    scaled: NDArray[np.float32] = np.clip(projection / white, 0, 1).astype(np.float32)
    return scaled


def _check_planes(
    masks: NDArray[Any], flows: NDArray[Any] | None, projection: NDArray[Any]
) -> None:
    if masks.ndim != 2 or projection.shape != masks.shape:
        raise ImageError(
            f"Masks {masks.shape} and image {projection.shape} do not fit each other; segment this "
            "image again, or ingest masks that belong to it."
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


def _check_boxes(boxes: NDArray[Any], labels: NDArray[Any], shape: tuple[int, ...]) -> None:
    boxes = np.asarray(boxes).reshape(-1, 4)
    if len(boxes) != len(labels):
        raise ImageError(f"There are {len(boxes)} boxes for {len(labels)} cells.")
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= shape).all()
    if not inside or (boxes[:, :2] >= boxes[:, 2:]).any():
        raise ImageError(
            f"A box is empty or reaches out of the image of {shape[0]} x {shape[1]} pixels; "
            "segment this image again."
        )


class BlockShuffle:
    """Batches of cells from blocks that are read one at a time.

    ``read(block_id)`` gives the cells of a block, usually of an image. While shuffling, the
    order of blocks is drawn from (seed, epoch), and cells are mixed within a buffer of whole
    blocks of at least ``buffer_cells`` cells in all; memory is bounded by twice the buffer,
    a block and a batch, however many blocks there are. Without shuffling, cells come in the order
    of ``block_ids`` and epochs are alike.

    Every batch has ``batch_size`` cells but the last, which has 2 to ``batch_size + 1``, since
    batch normalisation cannot train on one. A single cell comes alone only if there is no other.
    """

    def __init__(
        self,
        block_ids: Sequence[int],
        read: Callable[[int], CellBlock],
        batch_size: int = 512,
        seed: int = 0,
        buffer_cells: int = 2048,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 2:
            raise UserInputError(f"A batch needs 2 cells or more, not {batch_size}.")
        self.block_ids = tuple(block_ids)
        self.read = read
        self.batch_size = batch_size
        self.seed = seed
        self.buffer_cells = buffer_cells if shuffle else 0
        self.shuffle = shuffle

    def __call__(self, epoch: int = 0) -> Iterator[CellBlock]:
        """The batches of an epoch; same seed, epoch and blocks, same batches."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        pool: list[CellBlock] = []
        for block_id in self._order(generator):
            pool.append(self.read(block_id))
            if sum(map(len, pool)) >= max(self.buffer_cells, self.batch_size + 2):
                rest = yield from self._drain(pool, generator)
                pool = [rest]
        if sum(map(len, pool)):
            rest = yield from self._drain(pool, generator)
            yield rest

    def _order(self, generator: np.random.Generator) -> list[int]:
        ids = list(self.block_ids)
        return [ids[i] for i in generator.permutation(len(ids))] if self.shuffle else ids

    def _drain(
        self, pool: Sequence[CellBlock], generator: np.random.Generator
    ) -> Generator[CellBlock, None, CellBlock]:
        """Yield full batches, return what is left: fewer cells than a batch and two."""
        cells = CellBlock.join([block for block in pool if len(block)])
        count = len(cells)
        order = torch.from_numpy(generator.permutation(count) if self.shuffle else np.arange(count))
        start = 0
        while count - start > self.batch_size + 1:
            yield cells.take(order[start : start + self.batch_size])
            start += self.batch_size
        return cells.take(order[start:])
