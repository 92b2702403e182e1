"""A cell: where it comes from, what was measured, what was said about it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...db.models import (
    Cell,
    CellFeatures,
    Image,
    Label,
    Plate,
    Prediction,
    Recipe,
    Segmentation,
    Well,
)
from ...errors import UnknownNameError
from ...runs import Workspace
from .facts import CellAudit, Choice
from .flags import cell_flags
from .segmentations import segmentation_fact


def audit_cell(workspace: Workspace, cell_id: int) -> CellAudit:
    """Return a cell, its masks, its measurements and what every run said about it.

    Raises:
        UnknownNameError: there is no such cell.
    """
    with workspace.database.read() as session:
        cell = session.get(Cell, cell_id)
        if cell is None:
            raise UnknownNameError(
                f"There is no cell {cell_id}. See which there are with: "
                "cellstore sql 'FROM cells LIMIT 5'"
            )
        found = session.get_one(Segmentation, cell.segmentation_id)
        image = session.get_one(Image, found.image_id)
        well = session.get_one(Well, image.well_id)
        recipe = session.get_one(Recipe, found.recipe_id)
        return CellAudit(
            cell_id=cell.id,
            image=f"{session.get_one(Plate, well.plate_id).barcode}/{image.core_name}",
            image_id=image.id,
            label=cell.label,
            box=_box(cell),
            centroid=_centroid(cell),
            excluded=cell.excluded,
            segmentation=segmentation_fact(found, recipe, image),
            features=_features(session, cell.id),
            choices=_choices(session, cell.id),
            flags=cell_flags(session, cell.id),
        )


def _box(cell: Cell) -> tuple[int, int, int, int] | None:
    first, last = (cell.min_row, cell.min_col), (cell.max_row, cell.max_col)
    if first[0] is None or first[1] is None or last[0] is None or last[1] is None:
        return None
    return first[0], first[1], last[0], last[1]


def _centroid(cell: Cell) -> tuple[float, float] | None:
    if cell.centroid_row is None or cell.centroid_col is None:
        return None
    return cell.centroid_row, cell.centroid_col


def _features(session: Session, cell_id: int) -> dict[str, dict[str, float | None]]:
    keys = ("cell_id", "recipe_id", "run_id")
    names = [column.name for column in CellFeatures.__table__.columns if column.name not in keys]
    query = select(CellFeatures).where(CellFeatures.cell_id == cell_id)
    return {
        f"recipe {row.recipe_id}": {name: getattr(row, name) for name in names}
        for row in session.scalars(query.order_by(CellFeatures.recipe_id))
    }


def _choices(session: Session, cell_id: int) -> tuple[Choice, ...]:
    query = (
        select(Prediction.run_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.cell_id == cell_id)
        .order_by(Prediction.run_id, Prediction.rank)
    )
    return tuple(Choice(*row) for row in session.execute(query))
