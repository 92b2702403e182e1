"""Quality control as one HTML file that needs nothing else: maps of each plate, and odd fields."""

from __future__ import annotations

from itertools import groupby, islice
from typing import Any

from sqlalchemy import select

from ...db.models import Plate, Recipe, Run
from ...drawing.page import render
from ...extras import need
from ...runs import Workspace
from ...terms import CellFlagReason, ImageFlagReason
from .examples import examples
from .facts import FlaggedImage, QcResult
from .figures import map_svg, maps_png
from .flags import Flagging
from .maps import WellMap, well_maps
from .read import flagged_images

SHOWN_PLATES = 8
SHOWN_FLAGS = 60
ORDER = ("Cells", "Cell area", "Focus", "Background", "Saturated")
HEADINGS = {"Cells": "Cells", "Cell area": "Cells"}
"""Maps that stand below a heading other than their title."""


def page(workspace: Workspace, flagging: Flagging, result: QcResult) -> str:
    """Return the page of a quality-control run.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    need("report")
    with workspace.database.read() as session:
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
    return render("cellstore.stages.qc", content, {"short": _short, "usual": _usual})


def picture(workspace: Workspace, flagging: Flagging, barcode: str) -> bytes:
    """Return all maps of a plate as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    need("report")
    return maps_png(barcode, _maps(workspace, flagging, barcode)[1])


def _maps(workspace: Workspace, flagging: Flagging, barcode: str) -> tuple[Plate, list[WellMap]]:
    with workspace.database.read() as session:
        plate = session.scalars(select(Plate).where(Plate.barcode == barcode)).one()
        found = well_maps(session, flagging, plate.id)
    return plate, sorted(found, key=lambda item: ORDER.index(item.title))


def _plate(workspace: Workspace, flagging: Flagging, barcode: str) -> dict[str, Any]:
    plate, maps = _maps(workspace, flagging, barcode)
    with workspace.database.read() as session:
        flags = flagged_images(session, flagging.run_id, [barcode])
        listed = list(islice(flags, SHOWN_FLAGS))
        more = sum(1 for _ in flags)
    with workspace.database.read() as session:
        odd = examples(
            workspace, flagging, plate, flagged_images(session, flagging.run_id, [barcode])
        )
    groups = groupby(maps, key=lambda item: HEADINGS.get(item.title, item.title))
    return {
        "name": barcode,
        "maps": [(heading, [_map(barcode, item) for item in some]) for heading, some in groups],
        "flags": listed,
        "more_flags": more,
        "examples": [
            {
                "flag": item.flag,
                "odd": item.odd,
                "usual": item.usual,
                "detail": item.detail,
                "value": _sentence(item.flag),
            }
            for item in odd
        ],
    }


def _map(barcode: str, found: WellMap) -> dict[str, str]:
    title = "area in " if found.title == "Cell area" else ""
    return {
        "channel": found.channel,
        "unit": f"{title}{found.unit}",
        "svg": map_svg(barcode, found),
    }


def _sentence(flag: FlaggedImage) -> str:
    return f"{_short(flag.value)}, usual is {_usual(flag)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def _usual(flag: FlaggedImage) -> str:
    low, high = (None if x is None else _short(x) for x in (flag.low, flag.high))
    if low is None or high is None:
        return f"{low} or more" if high is None else f"{high} or less"
    return f"{low} to {high}"
