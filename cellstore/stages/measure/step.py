"""What a worker does with an image: open each of its files once, and measure all groups on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts import ArtifactFolder
from ...errors import ImageError
from ...formats.files.images import decode_tiff, project
from ...ops.features import BASIC_GROUP, find_regions, measure_cells, measure_channels
from ...reading.planes import FileOrder, PlaneOrder, open_file

Plane = NDArray[Any]


@dataclass(frozen=True)
class MeasureOrder:
    """What a worker needs: the name of the image, its masks, its cells by label, its files.

    ``plane`` is that of group ``basic``, ``channels`` are those of the other ``groups``.
    """

    name: str
    mask: tuple[str, str]
    cells: Mapping[int, int]
    groups: tuple[str, ...]
    plane: PlaneOrder | None
    channels: Mapping[str, FileOrder]


@dataclass(frozen=True)
class Pixels:
    """An image: ``masks``, ``plane`` and ``channels`` by name, (H, W) each."""

    order: MeasureOrder
    masks: Plane
    plane: Plane | None
    channels: Mapping[str, Plane]


@dataclass(frozen=True)
class Measured:
    """The measurements of an image's N cells.

    ``cell_ids`` (N,) ascend; ``values`` are (F, N) of each group, a row for each of its columns.
    """

    cell_ids: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class MeasureSteps:
    """Makes a :class:`MeasureStep` in a worker."""

    artifacts: ArtifactFolder

    def __call__(self) -> MeasureStep:
        """Return it."""
        return MeasureStep(self.artifacts)


@dataclass(frozen=True)
class MeasureStep:
    """Opens masks and planes of an image and measures its cells; writes no file."""

    artifacts: ArtifactFolder

    def read(self, order: MeasureOrder) -> Pixels:
        """Return the pixels of an image; a file that several groups look at is opened once."""
        masks = decode_tiff(self.artifacts.read(*order.mask))
        files = (*(order.plane.files if order.plane else ()), *order.channels.values())
        opened = {file: open_file(file) for file in dict.fromkeys(files)}
        plane = None
        if order.plane is not None:
            plane = project([opened[file] for file in order.plane.files], order.plane.projection)
        channels = {name: opened[file] for name, file in order.channels.items()}
        return Pixels(order, masks, plane, channels)

    def compute(self, loaded: Sequence[Pixels]) -> list[Measured]:
        """Return the measurements of each image."""
        return [measured(pixels) for pixels in loaded]

    def keep(self, made: Measured) -> Measured:
        """Keep no file: files of features hold many images, and are written where rows are."""
        return made


def measured(pixels: Pixels) -> Measured:
    """Measure all groups of an order.

    Raises:
        ImageError: masks, planes and cells do not fit each other.
    """
    order, regions = pixels.order, find_regions(pixels.masks)
    labels = regions.labels.tolist()
    if labels != sorted(order.cells):
        raise ImageError(
            f"The masks of {order.name} and its cells in the database differ. "
            "See what is wrong with: cellstore verify"
        )
    cell_ids = np.array([order.cells[label] for label in labels], np.int64)
    by_id = np.argsort(cell_ids)
    values = {}
    for name in order.groups:
        if name == BASIC_GROUP.name:
            assert pixels.plane is not None
            columns = measure_cells(regions, pixels.plane)
        else:
            columns = measure_channels(name, regions, pixels.channels)
        rows = [column for key, column in columns.items() if key != "label"]
        values[name] = np.stack(rows)[:, by_id]
    return Measured(cell_ids[by_id], values)
