"""From the masks of an image to rows: one segmentation and its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import insert
from sqlalchemy.orm import Session

from ..db.models import Cell, Segmentation
from ..terms import EXCLUDED_NO_PERIMETER


def cell_rows(masks: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Return one row of table ``cells`` for each label of ``masks`` (H, W)."""
    from ..ops.features import cell_boxes

    boxes = cell_boxes(masks)
    perimeters = boxes.pop("perimeter")
    names = list(boxes)
    rows = zip(*(boxes[name].tolist() for name in names), perimeters.tolist(), strict=True)
    return [
        {**dict(zip(names, values, strict=False)), "excluded": _excluded(values[-1])}
        for values in rows
    ]


def insert_cells(
    session: Session, segmentation: Segmentation, cells: Sequence[dict[str, Any]]
) -> None:
    """Insert a new segmentation and its ``cells``, as :func:`cell_rows` returns them."""
    session.add(segmentation)
    session.flush()
    if cells:
        rows = [{"segmentation_id": segmentation.id, **cell} for cell in cells]
        session.execute(insert(Cell), rows)


def _excluded(perimeter: float) -> str | None:
    return EXCLUDED_NO_PERIMETER if perimeter == 0 else None
