"""Cells of another tool, without masks, in every image of a store, and features of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from factories import Factory
from sqlalchemy import select

from cellstore.enums import Stage
from cellstore.jobs.workspace import open_workspace
from cellstore.models import Cell, Image
from cellstore.settings import StoreSettings

Columns = Callable[[Sequence[Cell]], dict[str, list[float]]]


def add_foreign_cells(store: Path, each: int, columns: Columns) -> None:
    """So many cells in each image, of feature set ``cp`` with these columns."""
    workspace = open_workspace(StoreSettings(store.resolve()))
    make = Factory(workspace)
    recipe = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler"})
    run = make.run(Stage.INGEST)
    unknown = dict.fromkeys(("content_sha256", "mask_artifact_id", "flow_artifact_id"))
    with workspace.database.read() as session:
        images = session.scalars(select(Image).order_by(Image.id)).all()
    found = [make.segmentation(i, run, each, recipe_id=recipe.id, **unknown) for i in images]
    cells = [cell for item in found for cell in make.cells_of(item)]
    make.feature_files("cp", cells, columns(cells), recipe)
    workspace.database.close()


def by_id(cells: Sequence[Cell]) -> dict[str, list[float]]:
    """One column, ``x``: the id of each cell."""
    return {"x": [float(cell.id) for cell in cells]}
