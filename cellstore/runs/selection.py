"""Which images a command is about."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from ..db.models import Image, Plate, Segmentation, Well
from ..errors import UnknownNameError


def images_of(
    session: Session, plates: Sequence[str] = (), limit: int | None = None
) -> Select[int]:
    """Return the query of the image ids on ``plates`` (none: all), the first ``limit``.

    Raises:
        UnknownNameError: there is no such plate.
    """
    query = select(Image.id)
    if plates:
        ids = [_plate(session, barcode) for barcode in plates]
        query = query.join(Well, Well.id == Image.well_id).where(Well.plate_id.in_(ids))
    if limit is not None:
        # A subquery of its own: what is added later must not change which images are the first.
        query = select(query.order_by(Image.id).limit(limit).subquery().c.id)
    return query


def is_current() -> ColumnElement[bool]:
    """Return the condition that joins an image to its segmentations that still hold.

    Those of the bytes that it has now, and those of unknown bytes: nothing contradicts them.
    """
    same = Segmentation.content_sha256 == Image.content_sha256
    return and_(Segmentation.image_id == Image.id, or_(Segmentation.content_sha256.is_(None), same))


def segmented(images: Select[int], recipe_id: int) -> Select[int]:
    """Return those of ``images`` that a segment recipe has done, as their bytes are now."""
    query = select(Image.id).join(Segmentation, is_current())
    return query.where(Segmentation.recipe_id == recipe_id, Image.id.in_(images))


def selection_counts(session: Session, images: Select[int]) -> tuple[int, int]:
    """Return how many images a selection names, and how many of them miss files."""
    named = Image.id.in_(images)
    total = session.scalar(select(func.count()).select_from(Image).where(named)) or 0
    missing = select(func.count()).select_from(Image).where(named, Image.content_sha256.is_(None))
    return total, session.scalar(missing) or 0


def _plate(session: Session, barcode: str) -> int:
    found = session.scalar(select(Plate.id).where(Plate.barcode == barcode))
    if found is None:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
        raise UnknownNameError.of("plate", barcode, known)
    return found
