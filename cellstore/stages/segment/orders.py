"""What a worker needs to segment an image: where its planes are, and how large its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...config import SegmentParams
from ...db.bulk import in_lists
from ...db.models import Image, Plate, Recipe, Segmentation, Well
from ...errors import CellstoreError, ImageError, UserInputError
from ...reading.planes import PlaneOrder, open_plane, plane_orders
from ...runs.selection import is_current

_SHOWN_PLATES = 3


@dataclass(frozen=True)
class SegmentOrder:
    """One plane, or that of the cells and that of the nuclei; the diameter if it is settled."""

    planes: tuple[PlaneOrder, ...]
    diameter: float | None = None


@dataclass
class PlateDiameters:
    """The median of the diameters that the recipe ``source`` used on each plate.

    A plate's is settled with the first image that ``recipe_id`` did there: that more images are
    segmented by ``source`` later on changes nothing.
    """

    source: Recipe
    recipe_id: int | None = None
    _known: dict[int, float | None] = field(default_factory=dict)

    def of_plate(self, session: Session, plate_id: int) -> float | None:
        """Return the diameter in pixels; ``None``: ``source`` has found no cells there."""
        if plate_id not in self._known:
            self._known[plate_id] = self._settled(session, plate_id) or self._median(
                session, plate_id
            )
        return self._known[plate_id]

    def check(self, session: Session, images: Select[int]) -> None:
        """Refuse a selection with plates whose diameter is not known.

        Raises:
            UserInputError: with the plates, and what to do first.
        """
        chosen = images.subquery()
        on_plates = select(Well.plate_id).join(Image, Image.well_id == Well.id)
        on_plates = on_plates.join(chosen, chosen.c.id == Image.id)
        plates = select(Plate.id, Plate.barcode).where(Plate.id.in_(on_plates))
        rows = session.execute(plates.order_by(Plate.id)).all()
        unknown = [row.barcode for row in rows if self.of_plate(session, row.id) is None]
        if unknown:
            more = ", ..." if len(unknown) > _SHOWN_PLATES else ""
            shown = ", ".join(unknown[:_SHOWN_PLATES]) + more
            raise UserInputError(
                f"Recipe {self.source.id} has found no cells on {len(unknown)} of the plates "
                f"({shown}), so their diameter is not known. Segment some images of each with that "
                "recipe first."
            )

    def _settled(self, session: Session, plate_id: int) -> float | None:
        if self.recipe_id is None:
            return None
        return session.scalar(_diameters(self.recipe_id, plate_id).order_by(Image.id).limit(1))

    def _median(self, session: Session, plate_id: int) -> float | None:
        query = _diameters(self.source.id, plate_id).where(Segmentation.n_cells > 0)
        found = [value for value in session.scalars(query) if value is not None]
        return float(np.median(found)) if found else None


def _diameters(recipe_id: int, plate_id: int) -> Select[float | None]:
    query = select(Segmentation.diameter).join(Image, is_current())
    query = query.join(Well, Well.id == Image.well_id)
    return query.where(Segmentation.recipe_id == recipe_id, Well.plate_id == plate_id)


def segment_orders(
    session: Session,
    image_ids: Sequence[int],
    params: SegmentParams,
    diameters: PlateDiameters | None,
) -> dict[int, SegmentOrder | CellstoreError]:
    """Return by image id what a worker needs, or the error: the image lacks a channel."""
    wanted = [params.image] if params.nuclei is None else [params.image, params.nuclei]
    planes = [plane_orders(session, image_ids, plane) for plane in wanted]
    sizes = {} if diameters is None else _sizes(session, image_ids, diameters)
    return {
        image_id: _order([found[image_id] for found in planes], sizes.get(image_id))
        for image_id in image_ids
    }


def _order(
    planes: Sequence[PlaneOrder | CellstoreError], diameter: float | None
) -> SegmentOrder | CellstoreError:
    good = [plane for plane in planes if isinstance(plane, PlaneOrder)]
    if len(good) == len(planes):
        return SegmentOrder(tuple(good), diameter)
    return next(plane for plane in planes if isinstance(plane, CellstoreError))


def _sizes(
    session: Session, image_ids: Sequence[int], diameters: PlateDiameters
) -> dict[int, float | None]:
    sizes = {}
    for some in in_lists(image_ids):
        plates = select(Image.id, Well.plate_id).join(Well, Well.id == Image.well_id)
        for row in session.execute(plates.where(Image.id.in_(some))):
            sizes[row.id] = diameters.of_plate(session, row.plate_id)
    return sizes


def open_planes(order: SegmentOrder) -> NDArray[np.float32]:
    """Return the plane (H, W), or cells and nuclei (2, H, W); raises as ``open_plane`` does."""
    planes = [open_plane(plane) for plane in order.planes]
    if len(planes) == 1:
        return planes[0]
    if planes[0].shape != planes[1].shape:
        raise ImageError(
            f"The planes of cells and nuclei differ in size: {planes[0].shape} and "
            f"{planes[1].shape} pixels."
        )
    return np.stack(planes)
