"""What is odd on a plate: images and cells against the others of the same plate, as rows of a run.

No more than the numbers of one plate are held: a row per image and channel, three numbers per
cell. Cells at the border never leave the database.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Float, Select, and_, func, literal, or_, select
from sqlalchemy.orm import Session

from ...config import QcParams
from ...db.bulk import bulk_insert
from ...db.models import (
    Cell,
    CellFeatures,
    CellFlag,
    Image,
    ImageFile,
    ImageFlag,
    ImageQuality,
    Segmentation,
    Well,
)
from ...db.statements import insert_from
from ...ops.quality import WHITE_NOISE_SLOPE, Limits, robust_limits
from ...runs.selection import is_current
from ...terms import CellFlagReason, ImageFlagReason

MIN_CELLS = 50
"""A plate with fewer cells says nothing about which area is usual."""

_AT_ONCE = 20_000
_IMAGE_COLUMNS = ("run_id", "image_id", "reason", "channel", "value", "low", "high")
_CELL_COLUMNS = ("run_id", "cell_id", "reason", "value")

Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Flagging:
    """By which limits a run flags, and by whose rows: recipes of quality, cells and areas."""

    run_id: int
    params: QcParams
    quality_id: int
    segment_id: int | None
    measure_id: int | None


@dataclass(frozen=True)
class _Found:
    """Values of images, ``image_ids`` (N,) and ``values`` (N,), and what they are of."""

    image_ids: Ids
    values: Numbers
    reason: ImageFlagReason
    channel: str = ""

    def rows(self, run_id: int, low: float | None, high: float | None) -> Iterator[Row]:
        """Yield a flag for each image that is below ``low`` or above ``high``."""
        limits = Limits(-np.inf if low is None else low, np.inf if high is None else high)
        outside = limits.outside(self.values)
        pairs = zip(self.image_ids[outside].tolist(), self.values[outside].tolist(), strict=True)
        for image_id, value in pairs:
            yield run_id, image_id, self.reason.value, self.channel, value, low, high


def flag_plate(session: Session, flagging: Flagging, plate_id: int) -> None:
    """Write the flags of a plate's images and cells, as they are now."""
    rows = list(_by_pixels(session, flagging, plate_id))
    if flagging.segment_id is not None:
        rows += _by_counts(session, flagging, plate_id)
        rows += _by_areas(session, flagging, plate_id)
        if flagging.params.border:
            _flag_border(session, flagging, plate_id)
    bulk_insert(session, ImageFlag, _IMAGE_COLUMNS, rows)


@dataclass(frozen=True)
class ChannelValues:
    """What was measured of one channel of N images of a plate: (N,) each."""

    channel: str
    image_ids: Ids
    slopes: Numbers
    backgrounds: Numbers
    saturated: Numbers
    stds: Numbers


def _by_pixels(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Row]:
    channels = channels_of(session, flagging, plate_id)
    for found in channels:
        yield from _by_channel(found, flagging)
    yield from _without_signal(channels, flagging)


def _by_channel(channel: ChannelValues, flagging: Flagging) -> Iterator[Row]:
    run_id, params = flagging.run_id, flagging.params
    keys = (channel.image_ids, channel.channel)
    blurred = _Found(keys[0], channel.slopes, ImageFlagReason.OUT_OF_FOCUS, keys[1])
    limits = _limits(blurred, params)
    if limits is not None:
        yield from blurred.rows(run_id, limits.low, None)
    bright = _Found(keys[0], channel.backgrounds, ImageFlagReason.BACKGROUND, keys[1])
    limits = _limits(bright, params)
    if limits is not None:
        yield from bright.rows(run_id, limits.low, limits.high)
    white = _Found(keys[0], channel.saturated, ImageFlagReason.SATURATED, keys[1])
    yield from white.rows(run_id, None, params.saturated)


def _without_signal(channels: Sequence[ChannelValues], flagging: Flagging) -> Iterator[Row]:
    """Flag the images whose channels are all noise; their value is the least noisy channel's.

    Noise is what has the power spectrum of noise, or none, and varies less than is usual: a
    spectrum alone would not tell it from small spots everywhere.
    """
    noisy: dict[int, list[float]] = {}
    for channel in channels:
        stds = _Found(channel.image_ids, channel.stds, ImageFlagReason.NO_SIGNAL)
        limits = _limits(stds, flagging.params, log=True)
        slopes = np.where(channel.stds == 0, WHITE_NOISE_SLOPE, channel.slopes)
        dull = channel.stds < (limits.low if limits else 0)
        noise = np.where(dull & np.isfinite(slopes), slopes, -np.inf)
        for image_id, slope in zip(channel.image_ids.tolist(), noise.tolist(), strict=True):
            noisy.setdefault(image_id, []).append(slope)
    ids = np.array([*noisy], np.int64)
    lowest = np.array([min(slopes) for slopes in noisy.values()], np.float64)
    found = _Found(ids, lowest, ImageFlagReason.NO_SIGNAL)
    yield from found.rows(flagging.run_id, None, flagging.params.noise)


def channels_of(session: Session, flagging: Flagging, plate_id: int) -> list[ChannelValues]:
    """Return what was measured of each channel of a plate, by name."""
    columns = (
        *(ImageQuality.power_log_log_slope, ImageQuality.background),
        *(ImageQuality.saturated, ImageQuality.std),
    )
    query = (
        select(ImageQuality.channel, ImageQuality.image_id, *columns)
        .join(Image, looked_at(flagging.quality_id))
        .join(Well, Well.id == Image.well_id)
        .where(Well.plate_id == plate_id)
        .order_by(ImageQuality.image_id)
    )
    by_channel: dict[str, list[Row]] = {}
    for channel, *values in session.execute(query.execution_options(yield_per=_AT_ONCE)):
        by_channel.setdefault(channel, []).append(tuple(values))
    found = []
    for channel, rows in sorted(by_channel.items()):
        table = np.array(rows, dtype=np.float64).T
        found.append(ChannelValues(channel, table[0].astype(np.int64), *table[1:]))
    return found


def looked_at(quality_id: int) -> Any:
    """Return the condition that joins an image to its quality, as its bytes are now."""
    return and_(
        ImageQuality.image_id == Image.id,
        ImageQuality.recipe_id == quality_id,
        ImageQuality.content_sha256 == Image.content_sha256,
    )


def _by_counts(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Row]:
    ids, counts = counts_by_image(session, flagging, plate_id)
    empty = counts == 0
    none = _Found(ids[empty], counts[empty], ImageFlagReason.NO_CELLS)
    yield from none.rows(flagging.run_id, 1.0, None)
    some = _Found(ids[~empty], counts[~empty], ImageFlagReason.CELL_COUNT)
    yield from _odd(some, flagging)


def counts_by_image(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Numbers]:
    """Return the segmented images of a plate, and how many cells count in each."""
    counted = func.count(Cell.id).filter(Cell.excluded.is_(None))
    query = _segmentations(flagging, plate_id)
    query = query.outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
    rows = session.execute(query.with_only_columns(Image.id, counted).group_by(Image.id)).all()
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    return ids, np.array([row[1] for row in rows], dtype=np.float64)


def _by_areas(session: Session, flagging: Flagging, plate_id: int) -> Iterator[Row]:
    """Flag cells by their area, and yield the flags of images by the median area of their cells."""
    if flagging.measure_id is None:
        return
    image_ids, cell_ids, areas = _areas(session, flagging, plate_id)
    if len(areas) >= MIN_CELLS:
        _flag_areas(session, flagging, cell_ids, areas)
    found = _Found(*_medians(image_ids, areas), ImageFlagReason.CELL_AREA)
    yield from _odd(found, flagging)


def areas_by_image(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Numbers]:
    """Return the images of a plate that have measured cells, and the median area in each."""
    image_ids, _, areas = _areas(session, flagging, plate_id)
    return _medians(image_ids, areas)


def _medians(image_ids: Ids, areas: Numbers) -> tuple[Ids, Numbers]:
    """Medians of runs of the same image."""
    images, starts = np.unique(image_ids, return_index=True)
    parts = np.split(areas, starts[1:]) if len(images) else []
    return images, np.array([np.median(some) for some in parts], dtype=np.float64)


def _areas(session: Session, flagging: Flagging, plate_id: int) -> tuple[Ids, Ids, Numbers]:
    """Image, cell and area of every cell that counts and is measured, by image."""
    measured = and_(CellFeatures.cell_id == Cell.id, CellFeatures.recipe_id == flagging.measure_id)
    query = (
        _segmentations(flagging, plate_id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(CellFeatures, measured)
        .where(Cell.excluded.is_(None), CellFeatures.area > 0)
        .with_only_columns(Image.id, Cell.id, CellFeatures.area)
        .order_by(Image.id)
    )
    images, cells, areas = [], [], []
    rows = session.execute(query.execution_options(yield_per=_AT_ONCE))
    for block in rows.partitions():
        image, cell, area = zip(*block, strict=True)
        images.append(np.array(image, dtype=np.int64))
        cells.append(np.array(cell, dtype=np.int64))
        areas.append(np.array(area, dtype=np.float64))
    none = np.empty(0, dtype=np.int64)
    return (
        np.concatenate([none, *images]),
        np.concatenate([none, *cells]),
        np.concatenate([none.astype(np.float64), *areas]),
    )


def _flag_areas(session: Session, flagging: Flagging, cell_ids: Ids, areas: Numbers) -> None:
    limits = robust_limits(areas, flagging.params.cell_outlier, log=True)
    if limits is None:
        return
    outside = limits.outside(areas)
    pairs = zip(cell_ids[outside].tolist(), areas[outside].tolist(), strict=True)
    rows = [(flagging.run_id, cell, CellFlagReason.AREA.value, area) for cell, area in pairs]
    bulk_insert(session, CellFlag, _CELL_COLUMNS, rows)


def _flag_border(session: Session, flagging: Flagging, plate_id: int) -> None:
    """Flag the cells whose box reaches the edge of the image; a box that is unknown does not."""
    size = select(
        ImageFile.image_id,
        func.max(ImageFile.height).label("height"),
        func.max(ImageFile.width).label("width"),
    )
    size = size.join(Image, Image.id == ImageFile.image_id).join(Well, Well.id == Image.well_id)
    sizes = size.where(Well.plate_id == plate_id).group_by(ImageFile.image_id).subquery()
    at_edge = or_(
        *(Cell.min_row == 0, Cell.min_col == 0),
        *(Cell.max_row >= sizes.c.height, Cell.max_col >= sizes.c.width),
    )
    columns: tuple[Any, ...] = (
        literal(flagging.run_id),
        Cell.id,
        literal(CellFlagReason.BORDER.value),
        literal(None, Float(53)),
    )
    rows = (
        _segmentations(flagging, plate_id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(sizes, sizes.c.image_id == Image.id)
        .where(Cell.excluded.is_(None), at_edge)
        .with_only_columns(*columns)
    )
    insert_from(session, CellFlag, _CELL_COLUMNS, rows)


def _segmentations(flagging: Flagging, plate_id: int) -> Select[Any]:
    return (
        select(Image.id)
        .join(Segmentation, is_current())
        .join(Well, Well.id == Image.well_id)
        .where(Well.plate_id == plate_id, Segmentation.recipe_id == flagging.segment_id)
    )


def _odd(found: _Found, flagging: Flagging) -> Iterator[Row]:
    limits = _limits(found, flagging.params, log=True)
    if limits is not None:
        yield from found.rows(flagging.run_id, limits.low, limits.high)


def _limits(found: _Found, params: QcParams, *, log: bool = False) -> Limits | None:
    if np.isfinite(found.values).sum() < params.min_images:
        return None
    return robust_limits(found.values, params.outlier, log=log)
