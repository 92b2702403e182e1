"""Which branches of the network can be fed by what is known of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from ..enums import PROJECTION_CHANNEL
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import IS_CURRENT, find_channels, in_recipes
from ..models import Image, ImageFile, Segmentation, SplitMember
from ..query.cells import CellSource

MASK, FLOW, TABULAR = BRANCHES = ("mask", "flow", "tabular")
"""A cell's mask crop, its flow crop and its features: what the published network looks at."""

IMAGE = "image"
"""A crop of named channels of the image."""

ALL_BRANCHES = (MASK, FLOW, IMAGE, TABULAR)
"""What a network may look at, in the order in which it puts together what it saw."""


def choose_branches(
    session: Session, source: CellSource, wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the branches of a network on ``source``, and a sentence where some are excluded.

    Default: all three, or those that the segmentations of its split can feed.
    """
    has_masks = and_(Segmentation.mask_artifact_id.is_not(None), Image.content_sha256.is_not(None))
    has_flows = and_(has_masks, Segmentation.flow_artifact_id.is_not(None))
    query = _images_with_cells(source).with_only_columns(
        func.count(), func.count().filter(has_masks), func.count().filter(has_flows)
    )
    images, masks, flows = session.execute(query).one()
    # What every image has. Flow crops and channels are cut by the masks.
    known = tuple(
        name
        for name, number in ((MASK, masks), (FLOW, flows), (IMAGE, masks), (TABULAR, images))
        if number == images
    )
    usual = tuple(name for name in known if name in BRANCHES)
    lack = f"Of {images - flows} of the {images} images there are no flows."
    if masks < images:
        lack = f"Of {images - masks} of the {images} images the masks or the pixels are unknown."
    if wanted is not None and not set(wanted) <= set(known):
        raise UserInputError(f"{lack} Use --branches {','.join(usual)}, or ingest what is missing.")
    if wanted is not None or usual == BRANCHES:
        return tuple(wanted or usual), None
    return usual, f"{lack} So the network looks at: {', '.join(usual)}."


def choose_channels(session: Session, source: CellSource, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the channels of branch ``image`` as recipes call them; default: all of them."""
    images = _images_with_cells(source)
    number = session.scalar(images.with_only_columns(func.count())) or 0
    counts = count_channels(session, images)
    by_name = {name.lower(): name for name in counts}
    wanted = find_channels(session, wanted)
    for name in wanted:
        if name.lower() not in by_name:
            raise UnknownNameError.of("channel", name, counts)
    chosen = tuple(by_name[name.lower()] for name in wanted) or tuple(counts)
    if len(set(chosen)) < len(chosen) or not chosen:
        raise UserInputError("Name each channel of the branch image once, with --channels A,B.")
    for name in chosen:
        if counts[name] < number:
            raise UserInputError(
                f"{number - counts[name]} of the {number} images of the split have no channel "
                f"{name!r}. Name others with --channels, or ingest what is missing."
            )
    return in_recipes(session, chosen)


def count_channels(session: Session, images: Select[Any]) -> dict[str, int]:
    """Return how many of the ``images`` have each channel, in the order of the channels."""
    query = (
        images.with_only_columns(ImageFile.channel, func.count())
        .join(ImageFile, ImageFile.image_id == Image.id)
        .where(ImageFile.channel != PROJECTION_CHANNEL)
        .group_by(ImageFile.channel)
        .order_by(func.min(ImageFile.position), ImageFile.channel)
    )
    return dict(session.execute(query).all())


def _images_with_cells(source: CellSource) -> Select[Any]:
    """Ask for the images (of the split) in which the segmentation has found cells."""
    query = select(Image).join(Segmentation, IS_CURRENT)
    query = query.where(Segmentation.recipe_id == source.segment_id, Segmentation.n_cells > 0)
    if source.split_id is None:
        return query
    member = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
    return query.join(SplitMember, member)
