"""Which branches of the network can be fed by what is known of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from ..enums import PROJECTION_CHANNEL
from ..errors import UnknownNameError, UserInputError
from ..jobs.selection import is_current
from ..models import Image, ImageFile, Segmentation, SplitMember
from ..query.cells import CellSource

MASK, FLOW, TABULAR = BRANCHES = ("mask", "flow", "tabular")
"""A cell's mask crop, its flow crop and its features: what the published network looks at."""

IMAGE = "image"
"""A crop of named channels of the image."""

ALL_BRANCHES = (MASK, FLOW, IMAGE, TABULAR)
"""What a network may look at, in the order in which it puts together what it saw."""


@dataclass(frozen=True)
class _Known:
    """Of how many images the cells are known, of how many the pixels and masks, the flows too."""

    images: int
    masks: int
    flows: int

    @property
    def possible(self) -> tuple[str, ...]:
        """What a network may look at; channels are cut by the boxes of masks."""
        more = (IMAGE,) if self.masks == self.images else ()
        return tuple(name for name in ALL_BRANCHES if name in (*self.branches, *more))

    @property
    def branches(self) -> tuple[str, ...]:
        """What every image has. Flow crops are cut by the masks."""
        masks = (MASK,) if self.masks == self.images else ()
        flows = (FLOW,) if masks and self.flows == self.images else ()
        return (*masks, *flows, TABULAR)


def choose_branches(
    session: Session, source: CellSource, wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the branches of a network on ``source``, and a sentence where some are excluded.

    Default: all three, or those that the segmentations of its split can feed.

    Raises:
        UserInputError: a branch that is wanted cannot be fed.

    """
    known = _known(session, source)
    if wanted is None:
        return known.branches, _left_out(known)
    chosen = tuple(wanted)
    if not set(chosen) <= set(known.possible):
        raise UserInputError(
            f"{_lack(known)} Use --branches {','.join(known.branches)}, or ingest what is missing."
        )
    return chosen, None


def choose_channels(session: Session, source: CellSource, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the channels of branch ``image`` as the store spells them; default: all of them.

    Raises:
        UnknownNameError: no image of the split has such a channel.
        UserInputError: some images do not have it, or it is named twice.

    """
    counts = _channels(session, source)
    images = _known(session, source).images
    by_name = {name.lower(): name for name in counts}
    for name in wanted:
        if name.lower() not in by_name:
            raise UnknownNameError.of("channel", name, counts)
    chosen = tuple(by_name[name.lower()] for name in wanted) or tuple(counts)
    if len(set(chosen)) < len(chosen) or not chosen:
        raise UserInputError("Name each channel of the branch image once, with --channels A,B.")
    for name in chosen:
        if counts[name] < images:
            raise UserInputError(
                f"{images - counts[name]} of the {images} images of the split have no channel "
                f"{name!r}. Name others with --channels, or ingest what is missing."
            )
    return chosen


def _channels(session: Session, source: CellSource) -> dict[str, int]:
    """By channel, in the order of their positions: how many images of the split have it."""
    member = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
    query = (
        select(ImageFile.channel, func.count())
        .join(Image, Image.id == ImageFile.image_id)
        .join(Segmentation, is_current())
        .join(SplitMember, member)
        .where(Segmentation.recipe_id == source.segment_id, Segmentation.n_cells > 0)
        .where(ImageFile.channel != PROJECTION_CHANNEL)
        .group_by(ImageFile.channel)
        .order_by(func.min(ImageFile.position), ImageFile.channel)
    )
    return dict(session.execute(query).all())


def _known(session: Session, source: CellSource) -> _Known:
    masks = and_(Segmentation.mask_artifact_id.is_not(None), Image.content_sha256.is_not(None))
    member = and_(SplitMember.image_id == Image.id, SplitMember.split_id == source.split_id)
    query = (
        select(
            func.count(),
            func.count().filter(masks),
            func.count().filter(and_(masks, Segmentation.flow_artifact_id.is_not(None))),
        )
        .select_from(Image)
        .join(Segmentation, is_current())
        .join(SplitMember, member)
        .where(Segmentation.recipe_id == source.segment_id, Segmentation.n_cells > 0)
    )
    return _Known(*session.execute(query).one())


def _left_out(known: _Known) -> str | None:
    if known.branches == BRANCHES:
        return None
    return f"{_lack(known)} So the network looks at: {', '.join(known.branches)}."


def _lack(known: _Known) -> str:
    if known.masks < known.images:
        return (
            f"Of {known.images - known.masks} of the {known.images} images the masks or the pixels "
            "are unknown."
        )
    return f"Of {known.images - known.flows} of the {known.images} images there are no flows."
