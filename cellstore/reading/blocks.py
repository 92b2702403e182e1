"""Blocks of cells for a network: the cells of an image, cut from its pixels. Needs torch.

A network that looks at features only has its cells read without opening an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from sqlalchemy.orm import Session
from torch import Tensor

from ..config import ImageInput
from ..errors import ImageError, StorageError, UserInputError
from ..ops.branches import BRANCHES, FLOW, TABULAR
from ..ops.crops import UNKNOWN_LABEL, CellBlock, cell_crops
from ..ops.scaling import FeatureScaler
from ..runs.workspace import Workspace
from .cells import (
    CellRows,
    CellSource,
    current_segmentation,
    plate_of,
    read_cells,
    read_flows,
    read_masks,
)
from .featuresets import ReadableSet, SetReader
from .planes import read_image

BUFFER_BYTES = 2 << 30
"""Crops that are mixed while shuffling; twice this and one image is what training holds."""

KEPT_BYTES = 1 << 30
"""Decoded images that a reader keeps for the next epoch; the rest is read again."""

Plane = NDArray[Any]

_CHANNELS = 4
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class _Pictures:
    """Masks (H, W), flows (H, W, 4), if a branch looks at them, and plane (H, W) of an image."""

    masks: Plane
    flows: Plane | None
    plane: Plane

    @property
    def nbytes(self) -> int:
        flows = 0 if self.flows is None else self.flows.nbytes
        return self.masks.nbytes + flows + self.plane.nbytes


@dataclass(frozen=True)
class _Decoded:
    """The cells of an image and its pictures, if a branch looks at any."""

    rows: CellRows
    pictures: _Pictures | None
    plate: str

    @property
    def nbytes(self) -> int:
        pictures = 0 if self.pictures is None else self.pictures.nbytes
        return self.rows.features.nbytes + pictures


class BlockReader:
    """Call it with an image id to get the cells of that image, ready for a network.

    Features are the columns of ``scaler``, scaled by it; ``classes`` gives the class index of a
    label id; ``branches`` are those of the network. Each image is decoded once and kept, while
    all that is kept fits ``kept_bytes``.

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
        kept_bytes: int = KEPT_BYTES,
        branches: Sequence[str] = BRANCHES,
    ) -> None:
        self.workspace, self.source, self.plane = workspace, source, plane
        self.scaler, self.crop_size, self.classes = scaler, crop_size, classes or {}
        self.branches = tuple(branches)
        _check_columns(scaler.names, source.features)
        self._values = SetReader(source.features.files or ())
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
            rows = read_cells(session, self.source, image_id, self.scaler.names, self._values)
            if len(rows) == 0:
                return None
            pictures = None if self.branches == (TABULAR,) else self._pictures(session, image_id)
            plate = plate_of(session, image_id)
        found = _Decoded(rows, pictures, plate)
        if found.nbytes <= self._room:
            self._kept[image_id], self._room = found, self._room - found.nbytes
        return found

    def _pictures(self, session: Session, image_id: int) -> _Pictures:
        artifacts = self.workspace.artifacts
        found = current_segmentation(session, self.source.segment_id, image_id)
        try:
            masks = read_masks(session, artifacts, found)
            flows = read_flows(session, artifacts, found) if FLOW in self.branches else None
        except StorageError as error:
            # A file of one image that is damaged is no reason to give up the others.
            raise ImageError(str(error)) from error
        return _Pictures(masks, flows, read_image(self.workspace.database, image_id, self.plane))

    def _crops(self, found: _Decoded) -> dict[str, Tensor]:
        """Crops of the image branches that the network has."""
        rows, pictures = found.rows, found.pictures
        if pictures is None:
            return {}
        if rows.boxes is None:
            raise ImageError(
                "The boxes of these cells are unknown, so they cannot be cut out of the image. "
                "If you have their masks, run: cellstore ingest masks DIR"
            )
        planes = pictures.masks, pictures.flows, pictures.plane
        crops = cell_crops(*planes, rows.boxes, rows.labels, self.crop_size)
        return {name: made for name, made in crops.items() if name in self.branches}

    def _block(self, found: _Decoded) -> CellBlock:
        rows = found.rows
        crops = self._crops(found)
        features = self.scaler.transform(rows.features, found.plate)
        label = UNKNOWN_LABEL
        if rows.label_id is not None:
            label = self.classes.get(rows.label_id, UNKNOWN_LABEL)
        labels = torch.full((len(rows),), label, dtype=torch.int64)
        return CellBlock(crops, torch.from_numpy(features), labels, torch.from_numpy(rows.cell_ids))

    def _empty(self) -> CellBlock:
        shape = (0, _CHANNELS, self.crop_size, self.crop_size)
        crops = {name: torch.empty(shape) for name in self.branches if name != TABULAR}
        none = torch.empty(0, dtype=torch.int64)
        return CellBlock(crops, torch.empty((0, len(self.scaler.names))), none, none)


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


def buffer_cells(
    crop_size: int,
    batch_size: int,
    branches: Sequence[str] = BRANCHES,
    n_features: int = 0,
    budget: int = BUFFER_BYTES,
) -> int:
    """Return how many cells to shuffle at once: what ``budget`` bytes hold, a batch at least."""
    pictures = sum(name != TABULAR for name in branches)
    pixels = pictures * _CHANNELS * crop_size * crop_size
    return max(batch_size + 2, min(budget // (_FLOAT_BYTES * max(1, pixels, n_features)), 8192))


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
