"""Blocks of cells for a network: the cells of an image, cut from its pixels. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from ..config import ImageInput
from ..errors import ImageError, StorageError, UserInputError
from ..ops.crops import UNKNOWN_LABEL, CellBlock, cell_crops
from ..ops.scaling import Scaler
from ..runs.workspace import Workspace
from .cells import FEATURE_COLUMNS, CellRows, CellSource, mask_and_flow, read_cells
from .planes import read_artifact_image, read_image

BUFFER_BYTES = 2 << 30
"""Crops that are mixed while shuffling; twice this and one image is what training holds."""

KEPT_BYTES = 1 << 30
"""Decoded images that a reader keeps for the next epoch; the rest is read again."""

Plane = NDArray[Any]

_CHANNELS = 8
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class _Decoded:
    """The cells of an image and its masks (H, W), flows (H, W, 4) and plane (H, W)."""

    rows: CellRows
    masks: Plane
    flows: Plane
    plane: Plane

    @property
    def nbytes(self) -> int:
        return self.masks.nbytes + self.flows.nbytes + self.plane.nbytes


class BlockReader:
    """Call it with an image id to get the cells of that image, ready for a network.

    Features are the columns of ``scaler``, scaled by it; ``classes`` gives the class index of a
    label id. Each image is decoded once and kept, while all that is kept fits ``kept_bytes``.

    Raises:
        UserInputError: ``scaler`` names a measurement that is not made any more.

    """

    def __init__(
        self,
        workspace: Workspace,
        source: CellSource,
        plane: ImageInput,
        scaler: Scaler,
        crop_size: int,
        classes: Mapping[int, int] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.workspace, self.source, self.plane = workspace, source, plane
        self.scaler, self.crop_size, self.classes = scaler, crop_size, classes or {}
        self._columns = _positions(scaler.names)
        self._kept: dict[int, _Decoded] = {}
        self._room = kept_bytes

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id.

        Raises:
            ImageError: its pixels or masks cannot be read or do not fit each other.

        """
        found = self._kept.get(image_id) or self._decode(image_id)
        return self._empty() if found is None else self._block(found)

    def _decode(self, image_id: int) -> _Decoded | None:
        with self.workspace.database.read() as session:
            rows = read_cells(session, self.source, image_id)
            if len(rows) == 0:
                return None
            masks, flows = self._masks_and_flows(session, image_id)
        plane = read_image(self.workspace.database, image_id, self.plane)
        found = _Decoded(rows, masks, flows, plane)
        if found.nbytes <= self._room:
            self._kept[image_id], self._room = found, self._room - found.nbytes
        return found

    def _masks_and_flows(self, session: Session, image_id: int) -> tuple[Plane, Plane]:
        artifacts = self.workspace.artifacts
        mask_id, flow_id = mask_and_flow(session, self.source.segment_id, image_id)
        try:
            masks = read_artifact_image(session, artifacts, mask_id)
            return masks, read_artifact_image(session, artifacts, flow_id)
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error

    def _block(self, found: _Decoded) -> CellBlock:
        rows = found.rows
        crops = cell_crops(
            found.masks, found.flows, found.plane, rows.boxes, rows.labels, self.crop_size
        )
        features = self.scaler.transform(rows.features[:, self._columns])
        label = UNKNOWN_LABEL
        if rows.label_id is not None:
            label = self.classes.get(rows.label_id, UNKNOWN_LABEL)
        labels = torch.full((len(rows),), label, dtype=torch.int64)
        return CellBlock(
            *crops, torch.from_numpy(features), labels, torch.from_numpy(rows.cell_ids)
        )

    def _empty(self) -> CellBlock:
        crops = torch.empty((0, _CHANNELS // 2, self.crop_size, self.crop_size))
        none = torch.empty(0, dtype=torch.int64)
        return CellBlock(crops, crops, torch.empty((0, len(self._columns))), none, none)


def _positions(names: Sequence[str]) -> list[int]:
    gone = [name for name in names if name not in FEATURE_COLUMNS]
    if gone:
        raise UserInputError(
            f"The network reads measurements that this cellstore does not make: {', '.join(gone)}. "
            "Train again."
        )
    return [FEATURE_COLUMNS.index(name) for name in names]


def buffer_cells(crop_size: int, batch_size: int, budget: int = BUFFER_BYTES) -> int:
    """Return how many cells to shuffle at once: what ``budget`` bytes hold, a batch at least."""
    per_cell = _CHANNELS * crop_size * crop_size * _FLOAT_BYTES
    return max(batch_size + 2, min(budget // per_cell, 8192))


def choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserInputError: another name, or there is no CUDA device.

    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"Unknown device {name!r}; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserInputError("No CUDA device can be used here; choose the device cpu or auto.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
