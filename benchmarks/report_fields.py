"""A few rendered fields with their true masks, for the store of report_store.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellstore.analysis.rendering import TREATMENTS, FieldSpec, PlateDesign, render_field
from cellstore.io.image_files import encode_tiff

FIELDS = 12


@dataclass(frozen=True)
class Field:
    """What was rendered: the masks (H, W) and the boxes of the cells, (N, 4)."""

    masks: NDArray[np.uint16]
    boxes: NDArray[np.int64]


def draw_fields(folder: Path, side: int) -> list[Field]:
    """Render fields of so many pixels a side into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw_field(folder, number, side) for number in range(FIELDS)]


def _draw_field(folder: Path, number: int, side: int) -> Field:
    from skimage.measure import regionprops

    plates = PlateDesign(size=side)
    spec = FieldSpec("P", 2, 2 + number, 1, TREATMENTS[number % len(TREATMENTS)])
    drawn = render_field(plates, spec)
    for channel, plane in enumerate(drawn.channels, start=1):
        (folder / file_name(number, channel)).write_bytes(encode_tiff(plane))
    boxes = [region.bbox for region in regionprops(drawn.masks.astype(np.int32))]
    return Field(drawn.masks, np.array(boxes))


def file_name(field: int, channel: int) -> str:
    """Return the name of the file of one channel."""
    return f"field{field:02d}-ch{channel}.tiff"
