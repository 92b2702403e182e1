"""Which images a command is about."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from ..config import EVERYTHING, Selection
from ..errors import UnknownNameError
from ..models import Image, Plate, Segmentation, Treatment, Well
from .lookup import find_plate, well_name


def images_of(session: Session, selection: Selection = EVERYTHING) -> Select[int]:
    """Return the query of the ids of the images of a selection.

    Its conditions are on single rows, so that more can be added and one image looked up at once.

    Raises:
        UnknownNameError: there is no such plate, well or column.
        UserInputError: the condition cannot be read.
    """
    query = select(Image.id)
    if selection.plates or selection.wells or selection.where is not None:
        query = query.join(Well, Well.id == Image.well_id)
    if selection.plates:
        ids = [find_plate(session, barcode) for barcode in selection.plates]
        query = query.where(Well.plate_id.in_(ids))
    if selection.wells:
        query = query.where(Well.name.in_([_well(session, name) for name in selection.wells]))
    if selection.where is not None:
        from .conditions import condition  # its parser loads slowly

        query = query.join(Plate, Plate.id == Well.plate_id)
        query = query.outerjoin(Treatment, Treatment.id == Well.treatment_id)
        query = query.where(condition(selection.where))
    return query if selection.limit is None else first_of(session, query, selection.limit)


def first_of(session: Session, query: Select[int], limit: int) -> Select[int]:
    """Return the query of the first ``limit`` images of ``query``, which asks for their ids."""
    # By the id of the last of them, so that what is added later does not change which they are.
    ids = query.order_by(Image.id).limit(limit).subquery()
    last = session.scalar(select(func.max(ids.c.id)))
    return query.where(Image.id <= (last or 0))


def is_current() -> ColumnElement[bool]:
    """Return the condition that joins an image to its segmentations that still hold.

    Those of the bytes that it has now, and those of unknown bytes: nothing contradicts them.
    """
    same = Segmentation.content_sha256 == Image.content_sha256
    return and_(Segmentation.image_id == Image.id, or_(Segmentation.content_sha256.is_(None), same))


def segmented(images: Select[int], recipe_id: int) -> Select[int]:
    """Return those of ``images`` that a segment recipe has done, as their bytes are now."""
    return images.join(Segmentation, is_current()).where(Segmentation.recipe_id == recipe_id)


def _well(session: Session, name: str) -> str:
    wanted = well_name(name)
    if session.scalar(select(Well.id).where(Well.name == wanted).limit(1)) is None:
        known = session.scalars(select(Well.name).distinct().limit(1536))
        raise UnknownNameError.of("well", name, known)
    return wanted
