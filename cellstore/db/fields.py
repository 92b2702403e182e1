"""What can be predicted of a well: the fields that labels have."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from ..enums import PERTURBATION, TARGET
from ..errors import UnknownNameError
from ..models import Plate, Treatment, Well

_COLUMNS: dict[str, Any] = {
    PERTURBATION: Treatment.name,
    TARGET: Treatment.target,
    "batch": Plate.batch,
    "cell_line": Plate.cell_line,
    "time_point": Plate.time_point,
}


def field_column(field: str) -> ColumnElement[str | None]:
    """Return what a query of wells with their plate and treatment selects as their label.

    ``field`` is ``perturbation``, ``target``, a text column of ``plates``, or else a key of the
    metadata of wells or plates; the well goes before its plate.
    """
    column: ColumnElement[str | None] | None = _COLUMNS.get(field)
    if column is not None:
        return column
    said = (table.metadata_[field].as_string() for table in (Well, Plate))
    return func.coalesce(*said)


def check_field(session: Session, field: str) -> None:
    """Refuse a field that no well of the store can have.

    Raises:
        UnknownNameError: with the fields that there are.
    """
    if field in _COLUMNS:
        return
    known = set(_COLUMNS)
    for table in (Well, Plate):
        rows: Select[Any] = select(table.metadata_).where(table.metadata_.is_not(None)).distinct()
        for metadata in session.scalars(rows):
            known.update(metadata)
    if field not in known:
        raise UnknownNameError.of("label field", field, sorted(known))
