"""The label fields of wells, and the parts of their treatments."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Row, Select, String, cast, func, select
from sqlalchemy.orm import Session

from ..enums import PERTURBATION, TARGET, TREATMENT
from ..errors import UnknownNameError
from ..models import METADATA, Perturbation, Treatment, TreatmentPart

plates, wells, treatments, treatment_parts, events = (
    METADATA.tables[name] for name in ("plates", "wells", "treatments", "treatment_parts", "events")
)

_COLUMNS: dict[str, Any] = {
    PERTURBATION: treatments.c.name,
    TREATMENT: treatments.c.name_with_dose,
    TARGET: treatments.c.target,
    "batch": plates.c.batch,
    "cell_line": plates.c.cell_line,
    "time_point": plates.c.time_point,
}


def field_column(field: str) -> ColumnElement[str | None]:
    """Return what a query of wells with their plate and treatment selects as their label.

    ``field`` is ``perturbation``, ``treatment`` (with dose), ``target``, a text column of
    ``plates``, or else a key of the metadata of wells or plates; the well goes before its plate.
    """
    column: ColumnElement[str | None] | None = _COLUMNS.get(field)
    if column is not None:
        return column
    values = (table.c.metadata[field].as_string() for table in (wells, plates))
    return func.coalesce(*values)


def check_field(session: Session, field: str) -> str:
    """Return a field as the store calls it: ``moa`` of ``Metadata_moa``, as tables have it.

    Raises:
        UnknownNameError: with the fields that there are.
    """
    if field in _COLUMNS:
        return field
    known = set(_COLUMNS)
    for table in (wells, plates):
        for metadata in session.scalars(
            select(table.c.metadata).where(table.c.metadata.is_not(None))
        ):
            known.update(metadata)
    field = field if field in known else field.removeprefix("Metadata_")
    if field not in known:
        raise UnknownNameError.of("label field", field, sorted(known))
    return field


def of_parts(column: Any) -> ColumnElement[str | None]:
    """Return the values of a column of ``perturbations`` for a treatment, with ``|`` between them.

    For queries that have table ``treatments``; null where no part has a value.
    """
    values = (
        select(func.aggregate_strings(cast(column, String), "|"))
        .select_from(TreatmentPart)
        .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
        .where(TreatmentPart.treatment_id == Treatment.id)
        .correlate(Treatment)
    )
    return values.scalar_subquery()


def wells_changed(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Return the query of the ids of wells that got another treatment by events.

    ``conditions`` are on table ``events``. A perturbation that is described otherwise changes all
    wells that have it.
    """
    moved = select(events.c.row_id).where(
        events.c.table_name == "wells",
        events.c.new["treatment_id"].as_integer().is_not(None),
        *conditions,
    )
    corrected = (
        select(wells.c.id)
        .join(treatment_parts, treatment_parts.c.treatment_id == wells.c.treatment_id)
        .join(events, events.c.row_id == treatment_parts.c.perturbation_id)
        .where(events.c.table_name == "perturbations", *conditions)
    )
    return select(moved.union(corrected).subquery().c.row_id.label("well_id"))


def wells_relabelled(session: Session, split_id: int, well_id: int | None = None) -> list[Row[Any]]:
    """Return the wells of a split (or one) whose label is not the frozen one any more.

    Rows: id of the well, its name (``P1/A01``), the frozen label, the label that it has now.
    """
    members, labels, images, splits = (
        METADATA.tables[name] for name in ("split_members", "labels", "images", "splits")
    )
    field = session.scalars(select(splits.c.field).where(splits.c.id == split_id)).one()
    now = field_column(field)
    name = (plates.c.barcode + "/" + wells.c.name).label("name")
    query = select(wells.c.id, name, labels.c.value.label("frozen"), now.label("now"))
    query = query.select_from(
        members.join(labels, labels.c.id == members.c.label_id)
        .join(images, images.c.id == members.c.image_id)
        .join(wells, wells.c.id == images.c.well_id)
        .join(plates, plates.c.id == wells.c.plate_id)
        .outerjoin(treatments, treatments.c.id == wells.c.treatment_id)
    )
    differs = now.is_distinct_from(labels.c.value)
    query = query.where(members.c.split_id == split_id, differs).distinct()
    if well_id is not None:
        query = query.where(wells.c.id == well_id)
    return list(session.execute(query.order_by(wells.c.id)))
