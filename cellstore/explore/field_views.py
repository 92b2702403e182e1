"""A field: its channels at full bit depth, its cells, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..analysis.features import BASIC_GROUP
from ..enums import Status
from ..errors import UnknownNameError
from ..jobs.lookup import IS_CURRENT, image_name
from ..jobs.planes import ChannelFile, channel_files, open_file
from ..learn.baselines import NULLS
from ..models import (
    Cell,
    Image,
    Label,
    Prediction,
    Segmentation,
)
from ..query.exclusions import cell_counts, why_excluded
from ..report.audit import runs_about, why_not_counted
from ..report.drawing import light_of
from .known_features import unit_in_words
from .pixels import (
    LARGEST_SIDE,
    contrasts,
    field_thumbnail,
    mask_of,
    read_mask,
    usual_channels,
    usual_segmentation,
)
from .requests import explorer_of, page, row_of, text, whole

RAW_KINDS = {"u1": "u1", "u2": "u2", "u4": "u4", "b1": "u1"}
"""Kinds of numbers that are sent as they are; others become 32-bit floats."""


def sent_once(request: Request, mark: str | None, make: Callable[[], Response]) -> Response:
    """Return an answer, or only that the browser has already the one of this ``mark``."""
    headers = {"ETag": f'"{mark}"', "Cache-Control": "private, no-cache"}
    if mark is not None and request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    answer = make()
    answer.headers.update(headers)
    return answer


def thumbnail(request: Request) -> Response:
    """A field as a picture; ``?width=&channels=&outlines=1&segmentation=``."""
    mark, draw = field_thumbnail(
        explorer_of(request),
        request.path_params["image_id"],
        width=whole(request, "width", 360) or 0,
        channels=[name for name in request.query_params.getlist("channels")[:50] if name],
        outlines=text(request, "outlines") is not None,
        segmentation_id=whole(request, "segmentation"),
    )
    return sent_once(request, mark, lambda: Response(draw(), media_type="image/jpeg"))


def field(request: Request) -> Response:
    """A field: the viewer, and what is known of it."""
    number = request.path_params["image_id"]
    asked = {name: whole(request, name) for name in ("cell", "segmentation", "before")}
    explorer = explorer_of(request)
    with explorer.workspace.database.read() as session:
        image = row_of(session, Image, number)
        well, treatment = image.well, image.well.treatment
        files = channel_files(session, [number])[number]
        cell = _cell_of(session, number, asked["cell"])
        segmentations = _segmentations(session, number)
        shown = asked["segmentation"]
        if shown is None and cell is not None:
            shown = cell.segmentation_id
        elif shown is None and (usual := usual_segmentation(session, number)) is not None:
            shown = usual.id
        for wanted in (shown, asked["before"]):
            if wanted is not None and wanted not in segmentations:
                raise UnknownNameError(f"Image {number} has no segmentation {wanted}.")
        masks = {"now": segmentations.get(shown or 0),
                 "before": segmentations.get(asked["before"] or 0)}  # fmt: skip
        others = sorted(
            image.well.images, key=lambda item: (item.site, item.plane, item.time_point)
        )
        done = [flag for flag in image.flags if flag.run.status == Status.DONE]
        flags = sorted(done, key=lambda flag: (flag.run_id, flag.reason.value, flag.channel or ""))
        values: dict[str, Any] = {
            "image": image,
            "well": well,
            "plate": well.plate,
            "treatment": treatment,
            "name": image_name(
                well.plate.barcode, f"{well.name}/{image.site}", image.plane, image.time_point
            ),
            "excluded": why_not_counted(
                session, image=number, well=image.well_id, plate=image.well.plate_id
            ),
            "flags": flags,
            "not_counted": session.scalar(
                select(func.count(Cell.id)).where(Cell.segmentation_id == shown, ~cell_counts())
            ),
            "segmentations": list(segmentations.values()),
            "masks": masks,
            "sites": _steps(others, image),
            "others": others,
            "viewer": _viewer(session, image, files, cell, masks, explorer.kept),
        }
        return page(request, "field.html.j2", **values)


def _cell_of(session: Session, number: int, cell_id: int | None) -> Cell | None:
    """The cell that an address names; it has to be of this image."""
    if cell_id is None:
        return None
    cell = session.get(Cell, cell_id)
    if cell is None or cell.segmentation.image_id != number:
        raise UnknownNameError(f"Image {number} has no cell {cell_id}.")
    return cell


def _segmentations(session: Session, number: int) -> dict[int, dict[str, Any]]:
    """The segmentations of an image by number, the newest first."""
    query = select(Segmentation, IS_CURRENT.label("current"))
    query = query.join(Image, Image.id == Segmentation.image_id).where(Image.id == number)
    return {
        found.id: {
            "id": found.id,
            "cells": found.n_cells,
            "run": found.run_id,
            "current": current,
            "has_masks": found.mask_artifact_id is not None,
            "from": found.recipe.parameters.get("imported") or found.recipe.parameters.get("model"),
        }
        for found, current in session.execute(query.order_by(Segmentation.id.desc()))
    }


def _steps(others: Sequence[Any], image: Image) -> dict[str, Any]:
    """The images before and after this one in its well, and those of its planes and times."""
    same = [row for row in others if (row.plane, row.time_point) == (image.plane, image.time_point)]
    at = next(at for at, row in enumerate(same) if row.id == image.id)
    here = [row for row in others if row.site == image.site]
    return {
        "number": at + 1,
        "count": len(same),
        "before": same[at - 1].id if at > 0 else None,
        "after": same[at + 1].id if at + 1 < len(same) else None,
        "planes": [row for row in here if row.time_point == image.time_point],
        "times": [row for row in here if row.plane == image.plane],
    }


def _viewer(
    session: Session,
    image: Image,
    files: Sequence[ChannelFile],
    cell: Cell | None,
    masks: dict[str, dict[str, Any] | None],
    kept: dict[str, Any],
) -> dict[str, Any]:
    """What the script of the page has to know."""
    names = [file.channel for file in files]
    on, barcode = usual_channels(names), image.well.plate.barcode
    first = sorted(names, key=lambda name: name not in on)
    light = dict(zip(first, light_of(first), strict=True))
    known, treatment = kept.get("contrast", {}), image.well.treatment
    name = f"{barcode} {image.well.name} field {image.site}"
    done = [treatment.name_with_dose] if treatment else []
    done += [f"{image.well.control.value} control"] if image.well.control else []
    return {
        "image": image.id,
        "name": name,
        "caption": ", ".join([name, *done]),
        "pixel_size": image.pixel_size,
        "channels": [
            {
                "name": file.channel,
                "address": f"/field/{image.id}/channel/{at}.raw?v={(file.sha256 or '')[:16]}",
                "colour": (1.0, 1.0, 1.0) if len(files) == 1 else light[file.channel],
                "on": file.channel in on,
                "limits": known.get((barcode, file.channel)),
            }
            for at, file in enumerate(files)
        ],
        "contrast": f"/field/{image.id}/contrast.json",
        "masks": {
            name: {"id": of["id"], "address": f"/field/{image.id}/mask.raw?segmentation={of['id']}"}
            for name, of in masks.items()
            if of is not None and of["has_masks"]
        },
        "cell": cell and _where(cell),
    }


def _where(cell: Cell) -> dict[str, Any]:
    def middle(at: float | None, low: int | None, high: int | None) -> float | None:
        return (low + high) / 2 if at is None and low is not None and high is not None else at

    return {
        "id": cell.id,
        "number": cell.object_number,
        "segmentation": cell.segmentation_id,
        "row": middle(cell.centroid_row, cell.min_row, cell.max_row),
        "column": middle(cell.centroid_col, cell.min_col, cell.max_col),
    }


def contrast(request: Request) -> Response:
    """The grey levels of black and white of each channel, for all pictures of the plate."""
    number, explorer = request.path_params["image_id"], explorer_of(request)
    with explorer.workspace.database.read() as session:
        plate = row_of(session, Image, number).well.plate.barcode
        names = [file.channel for file in channel_files(session, [number])[number]]
    return JSONResponse(contrasts(explorer, plate, names))


def channel(request: Request) -> Response:
    """The pixels of a channel, row by row, little endian; header ``X-Pixels`` says which kind.

    Unsigned integers as they are in the file, all others as 32-bit floats.
    """
    number, at = request.path_params["image_id"], request.path_params["n"]
    with explorer_of(request).workspace.database.read() as session:
        row_of(session, Image, number)
        files = channel_files(session, [number])[number]
    if at >= len(files):
        raise UnknownNameError(f"Image {number} has no channel {at}.")
    return sent_once(request, files[at].sha256, lambda: _raw(open_file(files[at])))


def mask(request: Request) -> Response:
    """The masks of a segmentation as numbers of objects; as :func:`channel`."""
    number, explorer = request.path_params["image_id"], explorer_of(request)
    with explorer.workspace.database.read() as session:
        row_of(session, Image, number)
        found = mask_of(session, number, whole(request, "segmentation"))
    if found is None:
        raise UnknownNameError(f"Image {number} has no such masks.")
    artifacts = explorer.workspace.artifacts
    return sent_once(request, found[1], lambda: _raw(read_mask(artifacts, found)))


def _raw(pixels: NDArray[Any]) -> Response:
    kind = RAW_KINDS.get(pixels.dtype.str[1:], "f4")
    data = np.ascontiguousarray(pixels, np.dtype(f"<{kind}"))
    of = f"{kind} {pixels.shape[0]} {pixels.shape[1]} {pixels.dtype.name}"
    kind_of_answer = "application/octet-stream"
    return Response(data.tobytes(), media_type=kind_of_answer, headers={"X-Pixels": of})


def cell_panel(request: Request) -> Response:
    """What is known of a cell, as a part of the page; ``?cell=``, or ``?segmentation=&object=``."""
    number, explorer = request.path_params["image_id"], explorer_of(request)
    cell_id, segmentation = (whole(request, name) for name in ("cell", "segmentation"))
    label = whole(request, "object", high=2**31 - 1)
    with explorer.workspace.database.read() as session:
        image = row_of(session, Image, number)
        if cell_id is None:
            query = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
            query = query.where(Segmentation.image_id == number, Cell.object_number == label)
            cell_id = session.scalar(query.where(Segmentation.id == segmentation))
            if cell_id is None:
                raise UnknownNameError(f"Segmentation {segmentation} has no cell {label} here.")
        cell = _cell_of(session, number, cell_id)
        assert cell is not None
        rows, columns = (cell.min_row, cell.max_row), (cell.min_col, cell.max_col)
        sides = [
            high - low for low, high in (rows, columns) if low is not None and high is not None
        ]
        values: dict[str, Any] = {
            "cell": cell,
            "side": min(LARGEST_SIDE, int(1.4 * max(48, *sides))),
            "image": image,
            "well": image.well,
            "treatment": image.well.treatment,
            "excluded": why_excluded(session, cell.id),
            "flags": sorted(
                (flag for flag in cell.flags if flag.run.status == Status.DONE),
                key=lambda flag: (flag.run_id, flag.reason.value),
            ),
            "features": _features(cell, image.pixel_size),
            "runs": _predictions(session, cell.id, image, whole(request, "run")),
        }
        return page(request, "cell_panel.html.j2", **values)


def _features(cell: Cell, pixel_size: float | None) -> list[tuple[str, float, str]]:
    """The measurements that were made last of a cell: name, value and unit."""
    found = max(cell.features, key=lambda made: made.run_id, default=None)
    if found is None:
        return []
    rows = []
    for feature in BASIC_GROUP.features:
        value = getattr(found, feature.name)
        if value is not None:
            rows.append((feature.name, value, unit_in_words(feature.unit)))
        if feature.name == "area" and value is not None and pixel_size is not None:
            rows.append(("area", value * pixel_size**2, "µm²"))
    return rows


def _predictions(
    session: Session, cell_id: int, image: Image, first: int | None
) -> list[dict[str, Any]]:
    """What every run predicted for a cell: the run ``first``, networks, baselines, null baselines.

    Of each kind the newest run first.
    """
    query = (
        select(Prediction.run_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.cell_id == cell_id)
        .order_by(Prediction.run_id, Prediction.rank)
    )
    choices: dict[int, list[Any]] = {}
    for row in session.execute(query):
        choices.setdefault(row.run_id, []).append(row)
    runs = runs_about(session, image.id, image.well_id, choices.keys())

    def order(run: dict[str, Any]) -> tuple[bool, bool, bool, int]:
        kind = run["baseline"]
        return run["run_id"] != first, kind in NULLS, kind is not None, -run["run_id"]

    return [run | {"choices": choices[run["run_id"]]} for run in sorted(runs, key=order)]


ROUTES = [
    Route("/field/{image_id:int}", field),
    Route("/field/{image_id:int}/thumbnail", thumbnail),
    Route("/field/{image_id:int}/contrast.json", contrast),
    Route("/field/{image_id:int}/channel/{n:int}.raw", channel),
    Route("/field/{image_id:int}/mask.raw", mask),
    Route("/field/{image_id:int}/cell", cell_panel),
]
