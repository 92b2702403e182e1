"""Quality control as one HTML file that needs nothing else: maps of each plate, and odd fields."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..enums import CellFlagReason, ImageFlagReason
from ..errors import CellstoreError, UserInputError
from ..jobs.lookup import IS_CURRENT, channels_now
from ..jobs.workspace import Workspace
from ..models import Image, ImageFlag, Plate, Recipe, Run, Segmentation, Well
from ..settings import need
from ..stages.qc import (
    FlaggedImage,
    Flagging,
    QcResult,
    areas_by_image,
    channels_of,
    counts_by_image,
    flagged_images,
    flagging_of,
)
from .drawing import (
    Limits,
    PlateMap,
    WellPosition,
    brief,
    colour_limits,
    field_picture,
    grey_limits,
    plate_map_svg,
    write_html,
)
from .gallery import read_planes

SHOWN_PLATES = 8
SHOWN_FLAGS = 60
SHOWN_EXAMPLES = 8
EXAMPLES_PER_REASON = 2
HEADINGS = {"Cell area": "Cells"}
"""Maps that stand below a heading other than their title."""


def write_page(workspace: Workspace, result: QcResult, path: Path) -> QcResult:
    """Write maps of the plates and their oddest fields as one HTML file."""
    need("report")
    if result.run_id is None:
        raise UserInputError(
            "No image has been looked at, so there is nothing to draw. Ingest images first."
        )
    with workspace.database.read() as session:
        flagging = flagging_of(session, result.run_id)
        run = session.get_one(Run, flagging.run_id)
        fingerprint = session.get_one(Recipe, run.recipe_id).fingerprint
    shown = result.plates[:SHOWN_PLATES]
    content = {
        "result": result,
        "run": run,
        "fingerprint": fingerprint,
        "params": flagging.params,
        "reasons": [reason.value for reason in ImageFlagReason],
        "cell_reasons": [reason.value for reason in CellFlagReason],
        "seen": sum(plate.seen for plate in result.plates),
        "flagged": sum(plate.flagged for plate in result.plates),
        "cells": sum(plate.cells for plate in result.plates),
        "flagged_cells": sum(plate.cells_flagged for plate in result.plates),
        "plates": [_plate(workspace, flagging, plate.plate) for plate in shown],
        "more_plates": len(result.plates) > len(shown),
    }
    write_html(path, "qc.html.j2", content, {"usual": _usual})
    return replace(result, html=str(path))


def _plate(workspace: Workspace, flagging: Flagging, barcode: str) -> dict[str, Any]:
    """What the page shows of a plate."""
    with workspace.database.read() as session:
        maps = _plate_maps(session, flagging, barcode)
        plate_id = session.scalars(select(Plate.id).where(Plate.barcode == barcode)).one()
        flags = list(flagged_images(session, flagging.run_id, [barcode]))
        factor, unit = _area_unit(session, plate_id)

    def scaled(flag: FlaggedImage) -> FlaggedImage:
        if flag.reason != ImageFlagReason.CELL_AREA.value:
            return flag
        low, high = (None if limit is None else limit * factor for limit in (flag.low, flag.high))
        return replace(flag, value=flag.value * factor, low=low, high=high)

    groups = groupby(maps, key=lambda item: HEADINGS.get(item.title, item.title))
    return {
        "name": barcode,
        "maps": [(heading, [(m, plate_map_svg(m)) for m in some]) for heading, some in groups],
        "flags": [scaled(flag) for flag in flags[:SHOWN_FLAGS]],
        "area_unit": unit,
        "more_flags": max(0, len(flags) - SHOWN_FLAGS),
        "examples": [
            _example(workspace, flagging, plate_id, scaled(flag)) for flag in _oddest_fields(flags)
        ],
    }


def _plate_maps(session: Session, flagging: Flagging, barcode: str) -> list[PlateMap]:
    """The maps of a plate; a number that no well has, or that is 0 everywhere, has none."""
    plate_id = session.scalars(select(Plate.id).where(Plate.barcode == barcode)).one()
    query = select(Image.id, Well.well_row, Well.well_column).join(Well, Well.id == Image.well_id)
    rows = session.execute(query.where(Well.plate_id == plate_id))
    positions = {image_id: (row, column) for image_id, row, column in rows}
    now = channels_now(session, barcode)
    flags = select(ImageFlag.reason, ImageFlag.channel, ImageFlag.image_id)
    flags = flags.join(Image, Image.id == ImageFlag.image_id).join(Well, Well.id == Image.well_id)
    flags = flags.where(ImageFlag.run_id == flagging.run_id, Well.plate_id == plate_id)
    flagged: dict[tuple[ImageFlagReason, str], set[WellPosition]] = defaultdict(set)
    for reason, channel, image_id in session.execute(flags):
        flagged[reason, channel].add(positions[image_id])
    maps = []
    for title, channel, unit, reasons, ids, values in _measures(session, flagging, plate_id):
        by_well: dict[WellPosition, list[float]] = defaultdict(list)
        for image_id, value in zip(ids.tolist(), values.tolist(), strict=True):
            if np.isfinite(value):
                by_well[positions[image_id]].append(value)
        middles = {well: float(np.median(some)) for well, some in sorted(by_well.items())}
        if any(middles.values()):
            keys = [(reason, name) for reason in reasons for name in {channel, ""}]
            maps.append(
                PlateMap(
                    barcode,
                    title,
                    unit,
                    middles,
                    limits=colour_limits(middles.values()),
                    wells=set(positions.values()),
                    marked=set().union(*(flagged.get(key, ()) for key in keys)),
                    channel=now.get(channel, channel),
                )
            )
    return maps


Measured = tuple[str, str, str, tuple[ImageFlagReason, ...], Any, Any]
"""Title, channel, unit, the flags that are about it; ids of N images, and their (N,) values."""


def _measures(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Measured]:
    """What is drawn of a plate, in the order of the page."""
    reason = ImageFlagReason
    if flagging.segment_id is not None:
        few = (reason.CELL_COUNT, reason.NO_CELLS)
        yield "Cells", "", "cells in a field", few, *counts_by_image(session, flagging, plate_id)
        if flagging.measure_id is not None:
            factor, unit = _area_unit(session, plate_id)
            unit, odd = f"area in {unit}, median of the cells", (reason.CELL_AREA,)
            ids, areas = areas_by_image(session, flagging, plate_id)
            yield "Cell area", "", unit, odd, ids, areas * factor
    channels = channels_of(session, flagging, plate_id)
    for title, column, unit, flags, factor in (
        ("Focus", "slope", "slope, higher is sharper", (reason.OUT_OF_FOCUS, reason.NO_SIGNAL), 1),
        ("Background", "background", "grey levels", (reason.BACKGROUND,), 1),
        ("Saturated", "saturated", "% of the pixels", (reason.SATURATED,), 100),
    ):
        for channel, rows in channels.items():
            yield title, channel, unit, flags, rows["image_id"], factor * rows[column]


def _area_unit(session: Session, plate_id: int) -> tuple[float, str]:
    """By what an area in pixels is multiplied on a page, and the unit that it then has.

    Square micrometres where all images of the plate have one pixel size.
    """
    sizes = select(Image.pixel_size).join(Well).where(Well.plate_id == plate_id).distinct()
    found = session.scalars(sizes).all()
    if len(found) == 1 and found[0] is not None:
        return found[0] ** 2, "\u00b5m\u00b2"
    return 1.0, "pixels"


def _oddest_fields(flags: Iterable[FlaggedImage]) -> list[FlaggedImage]:
    """The oddest image for each reason, then the second oddest; none twice."""
    ordered = sorted(flags, key=_excess, reverse=True)
    chosen: dict[int, FlaggedImage] = {}
    for _ in range(EXAMPLES_PER_REASON):
        for reason in ImageFlagReason:
            left = (f for f in ordered if f.reason == reason.value and f.image_id not in chosen)
            if (flag := next(left, None)) is not None:
                chosen[flag.image_id] = flag
    return list(chosen.values())[:SHOWN_EXAMPLES]


def _excess(flag: FlaggedImage) -> float:
    """How far a value is past its limit, by the size of the limit: the same in every channel."""
    limits = [limit for limit in (flag.low, flag.high) if limit is not None]
    return min((abs(flag.value - limit) / max(abs(limit), 1e-9) for limit in limits), default=0.0)


def _example(
    workspace: Workspace, flagging: Flagging, plate_id: int, flag: FlaggedImage
) -> dict[str, Any]:
    """An odd field, and a usual one of its plate in the same grey levels.

    Focus is seen in the middle at full size, everything else in the whole field with outlines.
    ``picture`` of a field is a data URI, or None with the ``problem``.
    """
    detail = flag.reason == ImageFlagReason.OUT_OF_FOCUS.value
    with workspace.database.read() as session:
        usual_id = _usual_image(session, flagging, plate_id, flag)
        ids = [image_id for image_id in (usual_id, flag.image_id) if image_id is not None]
        named = select(Image.id, Plate.barcode, Well.name, Image.site)
        named = named.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
        titles = {
            image_id: f"{barcode} {well}, site {site}"
            for image_id, barcode, well, site in session.execute(named.where(Image.id.in_(ids)))
        }
        masked = select(Image.id, Segmentation.id).join(Segmentation, IS_CURRENT)
        masked = masked.where(Segmentation.recipe_id == flagging.segment_id, Image.id.in_(ids))
        masked = masked.where(Segmentation.mask_artifact_id.is_not(None))
        segmented = dict(session.execute(masked).all())
    channels = [flag.channel] if flag.channel else []
    limits: Limits | None = None
    fields: list[dict[str, Any]] = []
    for image_id in ids:  # the grey levels of the usual one count for both
        fields.append({"title": titles[image_id], "picture": None})
        try:
            (plane,), masks = read_planes(
                workspace, image_id, segmented.get(image_id), channels, masked=not detail
            )
        except CellstoreError as error:
            fields[-1]["problem"] = str(error)
            continue
        limits = limits or grey_limits(plane)
        if masks is not None and masks.shape != plane.shape:
            masks = None
        fields[-1]["picture"] = field_picture(plane, masks, limits, detail=detail)
    return {
        "flag": flag,
        "odd": fields[-1],
        "usual": fields[0] if len(fields) > 1 else None,
        "detail": detail,
    }


def _usual_image(
    session: Session, flagging: Flagging, plate_id: int, flag: FlaggedImage
) -> int | None:
    """The unflagged image in the middle of the plate: of this channel's focus, or of cells."""
    if flag.channel:
        now, channels = channels_now(session, flag.plate), channels_of(session, flagging, plate_id)
        rows = next(rows for name, rows in channels.items() if now.get(name, name) == flag.channel)
        ids, values = rows["image_id"], rows["slope"]
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


def _usual(flag: FlaggedImage) -> str:
    low, high = (None if x is None else brief(x) for x in (flag.low, flag.high))
    if low is None or high is None:
        return f"{low} or more" if high is None else f"{high} or less"
    return f"{low} to {high}"
