"""What a quality-control run found, counted by plate and listed by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.orm import Session

from ...db.models import (
    Cell,
    CellFlag,
    Image,
    ImageFlag,
    ImageQuality,
    Plate,
    Segmentation,
    Well,
)
from ...runs.selection import is_current
from .facts import FlaggedImage, PlateSummary
from .flags import Flagging, looked_at

Counts = Mapping[str, int]


def summaries(
    session: Session, flagging: Flagging, barcodes: Sequence[str]
) -> tuple[PlateSummary, ...]:
    """Return what a run found on each of some plates."""
    on_plates = Plate.barcode.in_(barcodes)
    images = _counted(session, _of_plates(Image.content_sha256.is_not(None), on_plates))
    seen = _counted(
        session, _of_plates(on_plates).join(ImageQuality, looked_at(flagging.quality_id))
    )
    flags = _of_plates(on_plates).join(ImageFlag, _flag_of(flagging.run_id))
    flagged, by_reason = _counted(session, flags), _by_reason(session, flags, ImageFlag.reason)
    cells = _cells(session, flagging, on_plates)
    return tuple(
        PlateSummary(
            plate=name,
            images=images.get(name, 0),
            seen=seen.get(name, 0),
            flagged=flagged.get(name, 0),
            by_reason=by_reason.get(name, {}),
            cells=cells.counting.get(name, 0),
            excluded=cells.excluded.get(name, 0),
            cells_flagged=cells.flagged.get(name, 0),
            cells_by_reason=cells.by_reason.get(name, {}),
        )
        for name in barcodes
    )


@dataclass(frozen=True)
class _Cells:
    """Cells by plate."""

    counting: Counts
    excluded: Counts
    flagged: Counts
    by_reason: Mapping[str, Counts]


def _cells(session: Session, flagging: Flagging, on_plates: ColumnElement[bool]) -> _Cells:
    if flagging.segment_id is None:
        return _Cells({}, {}, {}, {})
    found = (
        _of_plates(on_plates)
        .join(Segmentation, is_current())
        .where(Segmentation.recipe_id == flagging.segment_id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
    )
    mine = and_(CellFlag.cell_id == Cell.id, CellFlag.run_id == flagging.run_id)
    flags = found.join(CellFlag, mine)
    return _Cells(
        _counted(session, found.where(Cell.excluded.is_(None)), Cell.id),
        _counted(session, found.where(Cell.excluded.is_not(None)), Cell.id),
        _counted(session, flags, Cell.id),
        _by_reason(session, flags, CellFlag.reason, Cell.id),
    )


def flagged_images(
    session: Session, run_id: int, barcodes: Sequence[str]
) -> Iterator[FlaggedImage]:
    """Yield the flags of a run on some plates, in the order of plate, well and site."""
    query = (
        select(
            *(Image.id, Plate.barcode, Well.name, Image.site, Image.core_name),
            *(ImageFlag.reason, ImageFlag.channel, ImageFlag.value, ImageFlag.low, ImageFlag.high),
        )
        .join(ImageFlag, _flag_of(run_id))
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Plate.barcode.in_(barcodes))
        .order_by(Plate.barcode, Well.row, Well.column, Image.site, Image.plane, Image.time_point)
        .order_by(Image.id, ImageFlag.reason, ImageFlag.channel)
    )
    for row in session.execute(query.execution_options(yield_per=1_000)):
        place, limits = (row.name, row.site, row.core_name), (row.value, row.low, row.high)
        yield FlaggedImage(row.id, row.barcode, *place, row.reason.value, row.channel, *limits)


def _flag_of(run_id: int) -> ColumnElement[bool]:
    return and_(ImageFlag.image_id == Image.id, ImageFlag.run_id == run_id)


def _of_plates(*where: ColumnElement[bool]) -> Select[Any]:
    query = select(Plate.barcode).select_from(Image).join(Well, Well.id == Image.well_id)
    return query.join(Plate, Plate.id == Well.plate_id).where(*where)


def _counted(session: Session, query: Select[Any], what: Any = Image.id) -> dict[str, int]:
    counted = query.with_only_columns(Plate.barcode, func.count(what.distinct()))
    return dict(session.execute(counted.group_by(Plate.barcode)).all())


def _by_reason(
    session: Session, query: Select[Any], reason: Any, what: Any = Image.id
) -> dict[str, dict[str, int]]:
    counted = query.with_only_columns(Plate.barcode, reason, func.count(what.distinct()))
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for barcode, why, number in session.execute(counted.group_by(Plate.barcode, reason)):
        found[barcode][why.value] = number
    return dict(found)
