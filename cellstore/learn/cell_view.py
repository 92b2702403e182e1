"""What is looked at of the cells of an image: found in the database, and cut out of its files.

The two steps may be done in two processes: what the first returns can be sent to a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..config import ImageInput
from ..enums import Projection
from ..errors import ImageError, StorageError
from ..io.image_files import decode_tiff, project
from ..jobs.planes import ChannelFile, channel_files, choose_files, open_file
from ..query.cells import (
    CellRows,
    CellSource,
    current_segmentation,
    flow_file,
    mask_file,
    plate_of,
    read_cells,
)
from ..query.feature_files import SetReader
from .branches import FLOW, IMAGE, MASK
from .crops import Layers, Pictures, cut_crops, empty_layers


@dataclass(frozen=True)
class FoundCells:
    """The cells of an image, and the files of it that are looked at.

    ``masks`` and ``flows``: path and sha256. ``plane``: the files of the plane that was segmented.
    Without masks nothing is to be cut.
    """

    plate: str
    rows: CellRows
    masks: tuple[str, str] | None = None
    flows: tuple[str, str] | None = None
    plane: tuple[ChannelFile, ...] = ()
    channels: tuple[ChannelFile, ...] = ()


@dataclass(frozen=True)
class CellView:
    """Which ``branches`` look at the cells: ``channels`` are what branch ``image`` is shown.

    ``plane``: the intensities of branch ``mask``; ``None``: there are none.
    """

    branches: tuple[str, ...]
    channels: tuple[str, ...] = ()
    plane: ImageInput | None = None

    def find(
        self,
        session: Session,
        source: CellSource,
        image_id: int,
        columns: Sequence[str],
        reader: SetReader,
    ) -> FoundCells:
        """Return the cells of an image with their measurements, and the files of the image.

        Raises ``ImageError`` if masks, flows or boxes are unknown, ``UnknownNameError`` if the
        image lacks a channel.
        """
        rows = read_cells(session, source, image_id, columns, reader)
        plate = plate_of(session, image_id)
        if not len(rows.cell_ids) or {MASK, FLOW, IMAGE}.isdisjoint(self.branches):
            return FoundCells(plate, rows)
        now = current_segmentation(session, source.segment_id, image_id)
        masks = mask_file(session, now)
        if rows.boxes is None:
            raise ImageError(
                "The boxes of these cells are unknown, so they cannot be cut out of the image. "
                "If you have their masks, run: cellstore ingest masks DIR"
            )
        flows = flow_file(session, now) if FLOW in self.branches else None
        files = channel_files(session, [image_id])[image_id]
        plane = choose_files(files, self.plane) if self.plane and MASK in self.branches else []
        channels = choose_files(files, ImageInput(self.channels)) if self.channels else []
        return FoundCells(plate, rows, masks, flows, tuple(plane), tuple(channels))

    def open(
        self, artifacts: ArtifactFolder, found: FoundCells, scales: Sequence[float] | None = None
    ) -> Pictures:
        """Read the files of an image whose masks are known."""
        assert found.masks is not None
        try:
            masks = decode_tiff(artifacts.read(*found.masks))
            flows = None if found.flows is None else decode_tiff(artifacts.read(*found.flows))
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error
        plane: Any = np.zeros(masks.shape, np.uint8) if MASK in self.branches else None
        if found.plane and self.plane is not None:
            plane = project([open_file(file) for file in found.plane], self.plane.projection)
        channels = [project([open_file(file)], Projection.MEDIAN) for file in found.channels]
        return Pictures(
            masks, flows, plane, tuple(channels), None if scales is None else tuple(scales)
        )

    def cut(
        self, artifacts: ArtifactFolder, found: FoundCells, scales: Sequence[float] | None
    ) -> tuple[NDArray[np.int64], Layers]:
        """Cut the cells out; return sizes and layers, see :func:`.crops.cut_crops`.

        ``scales``: the intensities that become 1, of the plane and of each channel; default: those
        of the image.
        """
        if found.masks is None or found.rows.boxes is None:
            sizes = np.zeros((len(found.rows.cell_ids), 2), np.int64)
            return sizes, empty_layers(sizes, self.branches, len(self.channels))
        pictures = self.open(artifacts, found, scales)
        return cut_crops(pictures, found.rows.boxes, found.rows.labels)
