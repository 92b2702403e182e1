"""The oddest fields of a plate, each beside a usual one, in the same grey levels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ...config import ImageInput
from ...db.models import Image, ImageFlag, Plate, Recipe, Segmentation, Well
from ...drawing.pictures import WIDEST, jpeg, middle, smaller
from ...errors import CellstoreError
from ...ops.overlay import Limits, grey_limits, outline_overlay, to_grey
from ...reading.cells import plane_of, read_masks
from ...reading.planes import read_image
from ...runs import Workspace
from ...runs.selection import is_current
from ...terms import ImageFlagReason
from .facts import FlaggedImage
from .flags import Flagging, channels_of, counts_by_image

MOST = 8
PER_REASON = 2


@dataclass(frozen=True)
class Shown:
    """A field: ``picture`` is a data URI, or None with the reason why not."""

    title: str
    picture: str | None
    problem: str | None


@dataclass(frozen=True)
class Example:
    """An odd field beside a usual one; ``detail``: the middle at full size, else the whole."""

    flag: FlaggedImage
    odd: Shown
    usual: Shown | None
    detail: bool


def examples(
    workspace: Workspace, flagging: Flagging, plate: Plate, flags: Iterable[FlaggedImage]
) -> list[Example]:
    """Return the most extreme flags of each reason and channel, ``MOST`` at most."""
    return [_example(workspace, flagging, plate, flag) for flag in _extremes(flags)]


def _extremes(flags: Iterable[FlaggedImage]) -> list[FlaggedImage]:
    """The oddest image for each reason, then the second oddest; none twice."""
    best: dict[str, dict[int, FlaggedImage]] = {reason.value: {} for reason in ImageFlagReason}
    for flag in flags:
        kept = best[flag.reason]
        if flag.image_id not in kept or _excess(flag) > _excess(kept[flag.image_id]):
            kept[flag.image_id] = flag
        best[flag.reason] = {item.image_id: item for item in _oddest(kept)[:MOST]}
    chosen: dict[int, FlaggedImage] = {}
    for place in range(PER_REASON):
        for kept in best.values():
            left = [item for item in _oddest(kept) if item.image_id not in chosen]
            if left and place < len(kept):
                chosen[left[0].image_id] = left[0]
    return list(chosen.values())[:MOST]


def _oddest(kept: dict[int, FlaggedImage]) -> list[FlaggedImage]:
    return sorted(kept.values(), key=_excess, reverse=True)


def _excess(flag: FlaggedImage) -> float:
    """How far a value is past its limit, by the size of the limit: the same in every channel."""
    limits = [limit for limit in (flag.low, flag.high) if limit is not None]
    return min((abs(flag.value - limit) / max(abs(limit), 1e-9) for limit in limits), default=0.0)


def _example(workspace: Workspace, flagging: Flagging, plate: Plate, flag: FlaggedImage) -> Example:
    detail = flag.reason == ImageFlagReason.OUT_OF_FOCUS.value
    with workspace.database.read() as session:
        usual_id = _usual(session, flagging, plate.id, flag)
        wanted = _plane(session, flagging, flag)
        title = None if usual_id is None else _title(session, usual_id)
    limits, usual = None, None
    if usual_id is not None and title is not None:
        usual, limits = _shown(workspace, flagging, usual_id, title, wanted, None, detail=detail)
    name = f"{flag.plate} {flag.well}, site {flag.site}"
    odd, _ = _shown(workspace, flagging, flag.image_id, name, wanted, limits, detail=detail)
    return Example(flag, odd, usual, detail)


def _plane(session: Session, flagging: Flagging, flag: FlaggedImage) -> ImageInput:
    if flag.channel:
        return ImageInput((flag.channel,))
    if flagging.segment_id is None:
        return ImageInput()
    return plane_of(session.get_one(Recipe, flagging.segment_id))


def _usual(session: Session, flagging: Flagging, plate_id: int, flag: FlaggedImage) -> int | None:
    """The unflagged image in the middle of the plate: of this channel's focus, or of cells."""
    if flag.channel:
        channels = channels_of(session, flagging, plate_id)
        found = next(item for item in channels if item.channel == flag.channel)
        ids, values = found.image_ids, found.slopes
    elif flagging.segment_id is None:
        return None
    else:
        ids, values = counts_by_image(session, flagging, plate_id)
    flagged = session.scalars(select(ImageFlag.image_id).where(ImageFlag.run_id == flagging.run_id))
    known = np.isfinite(values) & ~np.isin(ids, np.array([*flagged], dtype=np.int64))
    if not known.any():
        return None
    distances = np.abs(values[known] - np.median(values[known]))
    return int(ids[known][np.argmin(distances)])


def _shown(
    workspace: Workspace,
    flagging: Flagging,
    image_id: int,
    title: str,
    wanted: ImageInput,
    limits: Limits | None,
    *,
    detail: bool,
) -> tuple[Shown, Limits | None]:
    try:
        plane = read_image(workspace.database, image_id, wanted)
        masks = None if detail else _masks(workspace, flagging, image_id)
    except CellstoreError as error:
        return Shown(title, None, str(error)), limits
    limits = limits or grey_limits(plane)
    if masks is not None and masks.shape != plane.shape:
        masks = None
    return Shown(title, jpeg(_picture(plane, masks, limits, detail=detail)), None), limits


def _picture(
    plane: NDArray[np.float32], masks: NDArray[Any] | None, limits: Limits, *, detail: bool
) -> NDArray[np.uint8]:
    if detail:
        rows, columns = (middle(length) for length in plane.shape)
        return to_grey(plane[rows, columns], limits)
    step = -(-max(plane.shape) // WIDEST)
    small = smaller(plane, step)
    if masks is None:
        return to_grey(small, limits)
    return outline_overlay(small, masks[::step, ::step].astype(np.int64), limits=limits)


def _masks(workspace: Workspace, flagging: Flagging, image_id: int) -> NDArray[Any] | None:
    """The masks of the cells that were counted, if they are known."""
    with workspace.database.read() as session:
        query = select(Segmentation).join(Image, is_current()).where(Image.id == image_id)
        query = query.where(Segmentation.recipe_id == flagging.segment_id)
        found = session.scalars(query).one_or_none()
        if found is None or found.mask_artifact_id is None:
            return None
        return read_masks(session, workspace.artifacts, found)


def _title(session: Session, image_id: int) -> str:
    query = select(Plate.barcode, Well.name, Image.site).join(Well, Well.plate_id == Plate.id)
    row = session.execute(
        query.join(Image, Image.well_id == Well.id).where(Image.id == image_id)
    ).one()
    return f"{row.barcode} {row.name}, site {row.site}"
