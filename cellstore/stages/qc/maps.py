"""What quality control saw of a plate, well by well: the middle value of the fields of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import Image, ImageFlag, Well
from ...terms import ImageFlagReason
from .flags import Flagging, areas_by_image, channels_of, counts_by_image

Place = tuple[int, int]


@dataclass(frozen=True)
class WellMap:
    """A plate by one number: ``values`` by row and column (from 1), ``marked`` wells are flagged.

    ``channel`` is empty where the number is of no channel.
    """

    title: str
    channel: str
    unit: str
    values: Mapping[Place, float]
    marked: frozenset[Place] = field(default=frozenset())


def well_maps(session: Session, flagging: Flagging, plate_id: int) -> list[WellMap]:
    """Return the maps of a plate; a number that no well has, or that is 0 everywhere, has none."""
    places = _places(session, plate_id)
    marked = _marked(session, flagging.run_id, plate_id)
    found = [*_of_cells(session, flagging, plate_id), *_of_channels(session, flagging, plate_id)]
    maps = []
    for title, channel, unit, reasons, pairs in found:
        values = _by_well(places, pairs)
        if any(values.values()):
            keys = [(why, name) for why in reasons for name in {channel, ""}]
            wells = frozenset().union(*(marked.get(key, ()) for key in keys))
            maps.append(WellMap(title, channel, unit, values, wells))
    return maps


Found = tuple[str, str, str, tuple[ImageFlagReason, ...], Iterable[tuple[int, float]]]


def _of_cells(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Found]:
    if flagging.segment_id is None:
        return
    ids, counts = counts_by_image(session, flagging, plate_id)
    reasons = (ImageFlagReason.CELL_COUNT, ImageFlagReason.NO_CELLS)
    yield "Cells", "", "cells in a field", reasons, _pairs(ids, counts)
    if flagging.measure_id is not None:
        ids, areas = areas_by_image(session, flagging, plate_id)
        yield (
            "Cell area",
            "",
            "pixels, median of the cells",
            (ImageFlagReason.CELL_AREA,),
            _pairs(ids, areas),
        )


def _of_channels(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Found]:
    blurred = (ImageFlagReason.OUT_OF_FOCUS, ImageFlagReason.NO_SIGNAL)
    bright, white = (ImageFlagReason.BACKGROUND,), (ImageFlagReason.SATURATED,)
    for found in channels_of(session, flagging, plate_id):
        name, ids = found.channel, found.image_ids
        yield "Focus", name, "slope, higher is sharper", blurred, _pairs(ids, found.slopes)
        yield "Background", name, "grey levels", bright, _pairs(ids, found.backgrounds)
        yield "Saturated", name, "% of the pixels", white, _pairs(ids, 100 * found.saturated)


def _pairs(ids: Any, values: Any) -> list[tuple[int, float]]:
    known = np.isfinite(values)
    return list(zip(ids[known].tolist(), values[known].tolist(), strict=True))


def _by_well(places: Mapping[int, Place], pairs: Iterable[tuple[int, float]]) -> dict[Place, float]:
    wells: dict[Place, list[float]] = defaultdict(list)
    for image_id, value in pairs:
        wells[places[image_id]].append(value)
    return {place: float(np.median(values)) for place, values in sorted(wells.items())}


def _places(session: Session, plate_id: int) -> dict[int, Place]:
    query = select(Image.id, Well.row, Well.column).join(Well, Well.id == Image.well_id)
    rows = session.execute(query.where(Well.plate_id == plate_id))
    return {image_id: (row, column) for image_id, row, column in rows}


def _marked(
    session: Session, run_id: int, plate_id: int
) -> dict[tuple[ImageFlagReason, str], set[Place]]:
    query = (
        select(ImageFlag.reason, ImageFlag.channel, Well.row, Well.column)
        .join(Image, Image.id == ImageFlag.image_id)
        .join(Well, Well.id == Image.well_id)
        .where(ImageFlag.run_id == run_id, Well.plate_id == plate_id)
    )
    found: dict[tuple[ImageFlagReason, str], set[Place]] = defaultdict(set)
    for reason, channel, row, column in session.execute(query.distinct()):
        found[reason, channel].add((row, column))
    return dict(found)
