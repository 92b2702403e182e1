"""Blocks of cells for a network: the cells of an image, cut from its pixels. Needs torch.

A network that looks at features only has its cells read without opening an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..db.models import Image, Plate, Well
from ..errors import ImageError, StorageError, UserInputError
from ..ops.branches import BRANCHES, FLOW, IMAGE, MASK, TABULAR
from ..ops.crops import UNKNOWN_LABEL, CellBlock, crop_cells
from ..ops.scaling import FeatureScaler
from ..ops.windows import CutCells, Pictures, Windows, cut_windows, no_windows, without_pixels
from ..runs.workspace import Workspace
from .cells import (
    CellRows,
    CellSource,
    current_segmentation,
    read_cells,
    read_flows,
    read_masks,
)
from .featuresets import ReadableSet, SetReader
from .memory import default_memory
from .planes import read_image

Whites = Mapping[str, Sequence[float]]
"""By plate barcode the intensities that become 1: of the plane, then of each channel."""


class BlockReader:
    """Call it with an image id to get the cells of that image, ready for a network.

    Features are the columns of ``scaler``, scaled by it; ``classes`` gives the class index of a
    label id; ``branches`` are those of the network, ``channels`` what branch ``image`` looks at;
    ``whites`` are the white levels of some plates, images of others have their own. Each image is
    decoded once, and the windows of its cells are kept while all that is kept fits ``kept_bytes``
    (default: a quarter of the memory, :func:`default_memory`). Several threads may call it.

    Raises:
        UserInputError: ``scaler`` names a measurement that is not there any more.

    """

    def __init__(
        self,
        workspace: Workspace,
        source: CellSource,
        plane: ImageInput,
        scaler: FeatureScaler,
        crop_size: int,
        classes: Mapping[int, int] | None = None,
        kept_bytes: int | None = None,
        branches: Sequence[str] = BRANCHES,
        channels: Sequence[str] = (),
        whites: Whites | None = None,
    ) -> None:
        self.workspace, self.source, self.plane = workspace, source, plane
        self.scaler, self.crop_size, self.classes = scaler, crop_size, classes or {}
        self.branches, self.channels = tuple(branches), tuple(channels)
        self.whites = whites or {}
        _check_columns(scaler.names, source.features)
        self._values = SetReader(source.features.files or ())
        self._kept: dict[int, CutCells] = {}
        self._room = default_memory() if kept_bytes is None else kept_bytes
        self._lock = Lock()

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id; raises as :meth:`cut` does."""
        return crop_cells(self.cut(image_id), self.crop_size)

    def cut(self, image_id: int) -> CutCells:
        """Return the cells of an image, by cell id, whose windows are not resized yet.

        Raises:
            ImageError: its pixels or masks cannot be read or do not fit each other.

        """
        found = self._kept.get(image_id)
        if found is None:
            found = self._read(image_id)
            self._keep(image_id, found)
        return found

    def _keep(self, image_id: int, cells: CutCells) -> None:
        with self._lock:
            if image_id not in self._kept and cells.nbytes <= self._room:
                self._kept[image_id], self._room = cells, self._room - cells.nbytes

    def _read(self, image_id: int) -> CutCells:
        with self.workspace.database.read() as session:
            rows = self._rows(session, image_id)
            barcode = _barcode(session, image_id)
            windows = self._windows(session, image_id, rows, barcode)
        features = self.scaler.transform(rows.features, barcode)
        label = UNKNOWN_LABEL
        if rows.label_id is not None:
            label = self.classes.get(rows.label_id, UNKNOWN_LABEL)
        labels = np.full(len(rows), label, dtype=np.int64)
        return CutCells(windows, features, labels, rows.cell_ids)

    def _rows(self, session: Session, image_id: int) -> CellRows:
        columns = self.scaler.names
        if self.source.features.in_table:
            return read_cells(session, self.source, image_id, columns)
        with self._lock:  # its open files are for one at a time
            return read_cells(session, self.source, image_id, columns, self._values)

    def _windows(self, session: Session, image_id: int, rows: CellRows, barcode: str) -> Windows:
        if self.branches == (TABULAR,):
            return without_pixels(len(rows))
        if len(rows) == 0:
            return no_windows(self.branches, len(self.channels))
        if rows.boxes is None:
            raise ImageError(
                "The boxes of these cells are unknown, so they cannot be cut out of the image. "
                "If you have their masks, run: cellstore ingest masks DIR"
            )
        return cut_windows(self._pictures(session, image_id, barcode), rows.boxes, rows.labels)

    def _pictures(self, session: Session, image_id: int, barcode: str) -> Pictures:
        artifacts, database = self.workspace.artifacts, self.workspace.database
        found = current_segmentation(session, self.source.segment_id, image_id)
        try:
            masks = read_masks(session, artifacts, found)
            flows = read_flows(session, artifacts, found) if FLOW in self.branches else None
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error
        plane = read_image(database, image_id, self.plane) if MASK in self.branches else None
        names = self.channels if IMAGE in self.branches else ()
        channels = tuple(read_image(database, image_id, ImageInput((name,))) for name in names)
        whites = self.whites.get(barcode)
        return Pictures(masks, flows, plane, channels, None if whites is None else tuple(whites))


def _barcode(session: Session, image_id: int) -> str:
    query = (
        select(Plate.barcode)
        .join(Well, Well.plate_id == Plate.id)
        .join(Image, Image.well_id == Well.id)
    )
    return session.scalars(query.where(Image.id == image_id)).one()


def _check_columns(names: Sequence[str], features: ReadableSet) -> None:
    known = frozenset(features.columns)
    gone = [name for name in names if name not in known]
    if not gone:
        return
    some = ", ".join(gone[:5])
    if features.in_table:
        raise UserInputError(
            f"The network reads measurements that this cellstore does not make: {some}. "
            "Train again."
        )
    raise UserInputError(
        f"Feature set {features.name!r} no longer has {len(gone)} columns that the network reads: "
        f"{some}. Train again."
    )
