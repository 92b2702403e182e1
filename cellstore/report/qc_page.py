"""Quality control as one HTML file that needs nothing else: maps of each plate, and odd fields."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..analysis.overlay import Limits, grey_limits, outline_overlay, to_grey
from ..artifacts import write_atomically
from ..config import ImageInput
from ..db.models import Image, Plate, Recipe, Run, Segmentation, Well
from ..db.quality_models import ImageFlag
from ..enums import CellFlagReason, ImageFlagReason
from ..errors import CellstoreError, UserInputError
from ..extras import need
from ..jobs.planes import read_image
from ..jobs.selection import is_current
from ..jobs.workspace import Workspace
from ..query.cells import plane_of, read_masks
from ..settings import check_not_of_a_store
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
from .drawing import STYLE, WIDEST, jpeg, layout_of, middle, render, short, smaller, svg, well_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RING, HALO = "#d1350f", "#ffffff"
"""A ring is seen on every colour of the map, because a white one lies below it."""
WIDTH = 3.5
POINTS = 200.0
"""Width of a map in points, without its bar."""
BESIDE = 3
"""Maps beside each other on a picture."""


def map_svg(plate: str, found: WellMap) -> str:
    """Return one map as an element of a page."""
    rows, columns = _layout([found])
    size = (WIDTH, WIDTH * 0.8 * rows / columns + 0.3)
    name = f"{plate} {found.title} {found.channel}"

    def draw(figure: Figure) -> None:
        _draw(figure, figure.subplots(), found)
        # The letters of a page may be wider than those that were measured.
        figure.set_layout_engine("constrained", w_pad=0.08)

    return svg(name, size, draw)


def maps_png(plate: str, maps: Sequence[WellMap]) -> bytes:
    """Return a picture of all maps of a plate as PNG, on white."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, columns = _layout(maps)
    lines = -(-len(maps) // BESIDE)
    height = WIDTH * 0.8 * rows / columns + 0.5
    with rc_context({**STYLE, "axes.titlesize": 9}):
        figure = Figure(figsize=(BESIDE * WIDTH, lines * height + 0.4), layout="constrained")
        figure.suptitle(short(plate, 60), x=0.01, ha="left", size=11)
        for place, found in enumerate(maps, start=1):
            axes = figure.add_subplot(lines, BESIDE, place)
            _draw(figure, axes, found)
            axes.set_title(_figures_title(found))
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, metadata={"Software": None})
    return target.getvalue()


def _figures_title(found: WellMap) -> str:
    return f"{found.title} {short(found.channel)}, {found.unit}".replace(" ,", ",")


def _draw(figure: Figure, axes: Axes, found: WellMap) -> None:
    rows, columns = _layout([found])
    values = np.full((rows, columns), np.nan)
    for (row, column), value in found.values.items():
        values[row - 1, column - 1] = value
    low, high = _span(values)
    # A picture of one pixel for each well: a page has many maps, and a path for each well is long.
    picture = axes.imshow(
        values,
        cmap="viridis",
        vmin=low,
        vmax=high,
        interpolation="none",
        origin="lower",
        extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
    )
    well_names(axes, rows, columns, small=True)
    _rings(axes, found, POINTS / columns)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    """From where to where colours go: odd wells must not take them all."""
    low, high = np.nanpercentile(values, [2, 98])
    if high == low:
        low, high = np.nanmin(values), np.nanmax(values)
    return float(low), float(high if high > low else low + 1)


def _rings(axes: Axes, found: WellMap, well: float) -> None:
    """Put a ring around each marked well, that is ``well`` points wide."""
    places = sorted(found.marked)
    x, y = [column for _, column in places], [row for row, _ in places]
    for colour, width in ((HALO, 2.4), (RING, 1.3)):
        axes.scatter(
            x, y, s=(1.3 * well) ** 2, facecolors="none", edgecolors=colour, linewidths=width
        )


def _layout(maps: Sequence[WellMap]) -> tuple[int, int]:
    places: list[Any] = [(*place, None) for found in maps for place in found.values]
    return layout_of(places)


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
        usual_id = _examples_usual(session, flagging, plate.id, flag)
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


def _examples_usual(
    session: Session, flagging: Flagging, plate_id: int, flag: FlaggedImage
) -> int | None:
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
    return render("qc.html.j2", content, {"short": _short, "usual": _usual})


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


def write_page(workspace: Workspace, result: QcResult, path: Path) -> QcResult:
    """Write maps of the plates and their oddest fields as one HTML file.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UserInputError: nothing was looked at.
    """
    flagging = _flagging(workspace, result)
    check_not_of_a_store(path)
    write_atomically(path, page(workspace, flagging, result).encode())
    return replace(result, html=str(path))


def write_picture(workspace: Workspace, result: QcResult, path: Path) -> QcResult:
    """Write the maps of one plate as a PNG; raises as :func:`write_page` does.

    Raises:
        UserInputError: nothing was looked at, or several plates were.
    """
    flagging = _flagging(workspace, result)
    if len(result.plates) != 1:
        raise UserInputError(
            f"A picture is of one plate, and {len(result.plates)} are selected. Name one with "
            "--plate, or ask for a page with --html."
        )
    check_not_of_a_store(path)
    write_atomically(path, picture(workspace, flagging, result.plates[0].plate))
    return replace(result, picture=str(path))


def _flagging(workspace: Workspace, result: QcResult) -> Flagging:
    if result.run_id is None:
        raise UserInputError(
            "No image has been looked at, so there is nothing to draw. Ingest images first."
        )
    with workspace.database.read() as session:
        return flagging_of(session, result.run_id)
