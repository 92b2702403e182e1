"""Cells as a network sees them: crops of the mask image and of the flow image.

The mask image has four channels: the cell itself, its outline, the other cells, and the
projected intensity inside the cell. It is derived here and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cellstore.ops.resizing import resized
from cellstore.ops.windows import CutCells, Pictures, cut_windows

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
    windows = cut_windows(Pictures(masks, flows, projection), boxes, labels)
    return resized(windows, size)


def crop_cells(cells: CutCells, size: int, device: torch.device | str = "cpu") -> CellBlock:
    """Resize the windows of ``cells`` to ``size`` pixels, on ``device``."""
    few = (torch.from_numpy(part) for part in (cells.features, cells.labels, cells.cell_ids))
    crops = resized(cells.windows, size, device)
    return CellBlock(crops, *(part.to(device, non_blocking=True) for part in few))
