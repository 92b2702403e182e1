"""The cells of an image for a baseline that looks at no cell: how many there are, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..db.models import Image, Well
from ..ops.baselines import CELLCOUNT, POSITION, BaselineMeta, count_rows
from ..ops.crops import UNKNOWN_LABEL, CellBlock
from ..runs.workspace import Workspace
from .cells import CellSource, read_cells
from .featuresets import SetReader


class PlaceReader:
    """Call it with an image id to get its cells, all with what the baseline knows of the image."""

    def __init__(self, workspace: Workspace, source: CellSource, meta: BaselineMeta) -> None:
        self._workspace, self._source, self._meta = workspace, source, meta
        self._values = SetReader(source.features.files or ())

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id."""
        with self._workspace.database.read() as session:
            ids = read_cells(session, self._source, image_id, (), self._values).cell_ids
            row = self._row(session, image_id, len(ids))
        scaled = torch.from_numpy(self._meta.scaler.transform(row))
        unknown = torch.full((len(ids),), UNKNOWN_LABEL, dtype=torch.int64)
        return CellBlock({}, scaled.expand(len(ids), -1), unknown, torch.from_numpy(ids))

    def _row(self, session: Session, image_id: int, n_cells: int) -> NDArray[np.float64]:
        """(1, F): what is known of the image."""
        if self._meta.model == CELLCOUNT:
            return count_rows([n_cells])
        if self._meta.model == POSITION:
            query = select(Well.row, Well.column).join(Image, Image.well_id == Well.id)
            place: Any = session.execute(query.where(Image.id == image_id)).one()
            return np.array([tuple(place)], dtype=np.float64)
        return np.empty((1, 0))
