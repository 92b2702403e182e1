"""The cells that were found in an image, and by what."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Image, Recipe, Segmentation
from .facts import SegmentationFact


def segmentations_of(session: Session, image: Image) -> tuple[SegmentationFact, ...]:
    """Return the segmentations of an image, the oldest first."""
    query = (
        select(Segmentation, Recipe)
        .join(Recipe, Recipe.id == Segmentation.recipe_id)
        .where(Segmentation.image_id == image.id)
        .order_by(Segmentation.id)
    )
    return tuple(
        segmentation_fact(found, recipe, image) for found, recipe in session.execute(query)
    )


def segmentation_fact(found: Segmentation, recipe: Recipe, image: Image) -> SegmentationFact:
    """Return a segmentation in a few words."""
    return SegmentationFact(
        id=found.id,
        run_id=found.run_id,
        recipe_id=recipe.id,
        fingerprint=recipe.fingerprint,
        weights_sha256=recipe.weights_sha256,
        parameters=recipe.parameters,
        made_at=found.created_at.isoformat(),
        n_cells=found.n_cells,
        diameter=found.diameter,
        # Unknown bytes count as current: nothing can contradict them.
        current=found.content_sha256 in (None, image.content_sha256),
        has_masks=found.mask_artifact_id is not None,
        imported=recipe.parameters.get("imported"),
    )
