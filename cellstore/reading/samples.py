"""Drawn cells and their measurements: the ids of all are looked at, the values of a few are read.

No function holds more than the drawn cells and the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..db.models import Cell, CellFeatures, Image, Plate, Segmentation, Well
from .cells import CellSource
from .featuresets import SetReader

Ids = NDArray[np.int64]

_ROWS_AT_ONCE = 10_000
_IDS_AT_ONCE = 2_000


def stream_groups(
    session: Session, query: Select[Any], source: CellSource, group: Any
) -> Iterator[tuple[Ids, Ids]]:
    """Yield, in blocks, the ``group`` and the id of all cells of ``query``, by id: (N,) each.

    ``query`` is one of ``cells_query(source)``, with conditions of its own. A cell that the
    feature set of ``source`` lacks is left out.
    """
    chosen = query.with_only_columns(group, Cell.id).order_by(Cell.id)
    rows = session.execute(chosen.execution_options(yield_per=_ROWS_AT_ONCE))
    files = source.features.files
    reader = None if files is None else SetReader(files)
    for block in rows.partitions():
        groups, ids = np.array([tuple(row) for row in block], dtype=np.int64).T
        if reader is not None:
            there, _ = reader(ids, ())
            groups, ids = groups[there], ids[there]
        yield groups, ids


def read_values(
    session: Session, source: CellSource, cell_ids: Ids, columns: tuple[str, ...]
) -> NDArray[np.float64]:
    """Return the measurements (N, F) of cells, whose (N,) ids ascend."""
    if source.features.files is not None:
        return SetReader(source.features.files)(cell_ids, columns)[1]
    values = np.empty((len(cell_ids), len(columns)))
    chosen = select(*(getattr(CellFeatures, name) for name in columns))
    chosen = chosen.where(CellFeatures.recipe_id == source.measure_id)
    for start, ids in _in_parts(cell_ids):
        query = chosen.where(CellFeatures.cell_id.in_(ids)).order_by(CellFeatures.cell_id)
        found = [tuple(row) for row in session.execute(query)]
        values[start : start + len(ids)] = np.array(found, dtype=np.float64)
    return values


@dataclass(frozen=True)
class Places:
    """Where N cells are: ``wells`` (N,) ids of wells, ``plates`` (N,) barcodes."""

    wells: Ids
    plates: NDArray[np.str_]


def places_of(session: Session, cell_ids: Ids) -> Places:
    """Return the wells and plates of cells, whose (N,) ids ascend."""
    query = (
        select(Well.id, Plate.barcode)
        .select_from(Cell)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .order_by(Cell.id)
    )
    wells: list[int] = []
    plates: list[str] = []
    for _, ids in _in_parts(cell_ids):
        for well, plate in session.execute(query.where(Cell.id.in_(ids))):
            wells.append(well)
            plates.append(plate)
    return Places(np.array(wells, dtype=np.int64), np.array(plates, dtype=np.str_))


def _in_parts(cell_ids: Ids) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(cell_ids), _IDS_AT_ONCE):
        yield start, cell_ids[start : start + _IDS_AT_ONCE].tolist()
