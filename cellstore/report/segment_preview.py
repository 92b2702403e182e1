"""Preview: segment a few images from all over a selection, and draw what was found."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, Subquery, func, select
from sqlalchemy.orm import Session

from ..analysis.overlay import captioned, contact_sheet, outline_overlay, png, shrunk_overlay
from ..artifacts import write_atomically
from ..config import EVERYTHING, SegmentParams, Selection
from ..errors import CellstoreError, UserInputError, first_line
from ..jobs.workspace import Workspace
from ..models import Image, Plate, Well
from ..progress import track
from ..stages.segment import (
    Loaded,
    Plan,
    PlateDiameters,
    SegmentOrder,
    SegmentStep,
    make_plan,
    segment_orders,
)

if TYPE_CHECKING:
    from ..analysis.segmentation import SegmentationResult


SHEET = "contact-sheet.png"
LONGEST = 480
"""Pixels of the longer side of a picture on the contact sheet."""


@dataclass(frozen=True)
class PreviewImage:
    """An image of the sample. ``file``: its picture; ``problem``: why there is none."""

    name: str
    cells: int | None
    diameter: float | None
    seconds: float
    file: str | None
    problem: str | None


@dataclass(frozen=True)
class PreviewResult:
    """What a preview showed. ``sheet``: all pictures in one, if there are any.

    ``available`` counts the images of the selection that have their files.
    """

    folder: str
    sheet: str | None
    available: int
    images: tuple[PreviewImage, ...]


class _Sampled(NamedTuple):
    id: int
    name: str


@dataclass
class _Gallery:
    """Pictures on their way into a folder."""

    folder: Path
    small: list[NDArray[np.uint8]] = field(default_factory=list)

    def hang(self, name: str, plane: NDArray[np.float32], found: SegmentationResult) -> str:
        """Write the picture of an image; return its file."""
        text = f"{name}: {found.count} cells, diameter {found.diameter:.1f} px"
        target = self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
        write_atomically(target, png(captioned(outline_overlay(plane, found.masks), text)))
        self.small.append(captioned(shrunk_overlay(plane, found.masks, LONGEST), text))
        return str(target)

    def sheet(self) -> str | None:
        """Write all pictures as one; return its file."""
        if not self.small:
            return None
        target = self.folder / SHEET
        write_atomically(target, png(contact_sheet(self.small)))
        return str(target)


def preview(
    workspace: Workspace,
    params: SegmentParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    count: int = 6,
    folder: Path,
    weights_dir: Path | None = None,
    device: str = "auto",
) -> PreviewResult:
    """Segment ``count`` images spread over the plates and wells of a selection; draw them.

    The same selection gives the same images. No row and no artifact is written; pictures of an
    earlier preview of the same images are replaced.

    Raises:
        as ``segment``; StorageError if ``folder`` cannot be written.
    """
    if count < 1:
        raise UserInputError("A preview needs at least one image. Give --preview 1 or more.")
    plan = make_plan(workspace, params or SegmentParams(), selection, weights_dir, device)
    with workspace.database.read() as session:
        available, sample = _sample(session, plan.images, count)
        sizes = None if plan.source is None else PlateDiameters(plan.source)
        orders = segment_orders(session, [item.id for item in sample], plan.params, sizes)
    gallery = _Gallery(folder)
    images = _shown(workspace, plan, sample, orders, gallery) if sample else []
    return PreviewResult(str(folder), gallery.sheet(), available, tuple(images))


def _shown(
    workspace: Workspace,
    plan: Plan,
    sample: Sequence[_Sampled],
    orders: dict[int, SegmentOrder | CellstoreError],
    gallery: _Gallery,
) -> list[PreviewImage]:
    step = plan.steps()
    return [
        _one(step, item.name, orders[item.id], gallery)
        for item in track(workspace.progress, "preview", len(sample), sample)
    ]


def _one(
    step: SegmentStep, name: str, order: SegmentOrder | CellstoreError, gallery: _Gallery
) -> PreviewImage:
    started = time.perf_counter()
    try:
        if isinstance(order, CellstoreError):
            raise order
        loaded = step.read(order)
        [found] = step.compute([loaded])
    except CellstoreError as error:
        return PreviewImage(name, None, None, 0.0, None, first_line(error))
    seconds = time.perf_counter() - started
    file = gallery.hang(name, _first_plane(loaded), found)
    return PreviewImage(name, found.count, found.diameter, seconds, file, None)


def _first_plane(loaded: Loaded) -> NDArray[np.float32]:
    return loaded.image if loaded.image.ndim == 2 else loaded.image[0]


def _sample(session: Session, images: Select[int], count: int) -> tuple[int, list[_Sampled]]:
    """How many images have their files, and ``count`` of them, spread over plates and wells."""
    there = _with_files(images)
    counts = session.execute(
        select(Well.plate_id, func.count())
        .join(Image, Image.well_id == Well.id)
        .join(there, there.c.id == Image.id)
        .group_by(Well.plate_id)
        .order_by(Well.plate_id)
    ).all()
    sample: list[_Sampled] = []
    for plate_id, wanted, available in _shares([(row[0], row[1]) for row in counts], count):
        for place in spread(available, wanted):
            sample.append(_at(session, there, plate_id, place))
    return sum(row[1] for row in counts), sample


def _with_files(images: Select[int]) -> Subquery:
    return images.where(Image.content_sha256.is_not(None)).subquery()


def _shares(plates: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int, int]]:
    """``count`` divided among plates of (id, images): (id, share, images) of those with a share."""
    chosen = [plates[place] for place in spread(len(plates), min(count, len(plates)))]
    shares = [0] * len(chosen)
    left = min(count, sum(available for _, available in chosen))
    while left:
        for number, (_, available) in enumerate(chosen):
            if left and shares[number] < available:
                shares[number] += 1
                left -= 1
    return [(plate, share, n) for (plate, n), share in zip(chosen, shares, strict=True)]


def spread(length: int, count: int) -> list[int]:
    """``count`` places in a row of ``length``, evenly apart, none at an end if there is room."""
    count = min(count, length)
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


def _at(session: Session, there: Subquery, plate_id: int, place: int) -> _Sampled:
    """The image at ``place`` of a plate, in the order of its wells and sites."""
    query = (
        select(Image.id, Plate.barcode, Image.core_name)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(there, there.c.id == Image.id)
        .where(Well.plate_id == plate_id)
        .order_by(
            Well.well_row, Well.well_column, Image.site, Image.time_point, Image.plane, Image.id
        )
    )
    row = session.execute(query.offset(place).limit(1)).one()
    return _Sampled(row.id, f"{row.barcode}/{row.core_name}")
