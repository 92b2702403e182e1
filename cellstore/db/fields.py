"""The label fields of wells, and the parts of their treatments."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Row, Select, String, cast, func, or_, select, text
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


_CHANGED_SINCE = """
    WITH since AS (SELECT started_at AS moment FROM runs WHERE id = :run),
    said AS (
        SELECT level, row_id FROM annotations CROSS JOIN since
        WHERE kind = 'exclusion' AND created_at > moment
    ),
    changed AS (
        SELECT row_id AS id FROM events CROSS JOIN since
        WHERE table_name = 'wells' AND old IS NOT NULL AND created_at > moment
        UNION SELECT row_id FROM said WHERE level = 'well'
        UNION SELECT wells.id FROM said JOIN wells ON plate_id = row_id WHERE level = 'plate'
        UNION SELECT well_id FROM said JOIN images ON images.id = row_id WHERE level = 'image'
        UNION SELECT well_id FROM said JOIN cells ON cells.id = row_id
        JOIN segmentations ON segmentations.id = segmentation_id
        JOIN images ON images.id = image_id WHERE level = 'cell'
    )
    SELECT barcode, count(*) AS n FROM changed
    JOIN wells ON wells.id = changed.id JOIN plates ON plates.id = plate_id
    GROUP BY barcode
"""


def changed_since(session: Session, run_id: int) -> list[str]:
    """Return a sentence if wells of a profile or hits run were changed after it began.

    That is: relabelled, or excluded or included, themselves, their plate, or cells or images of it.
    """
    runs = METADATA.tables["runs"].c
    of = or_(runs.id == run_id, runs.id.in_(select(runs.parent_id).where(runs.id == run_id)))
    results = session.scalars(select(runs.result).where(of))
    read = {name for result in results for name in (result or {}).get("barcodes", ())}
    rows = session.execute(text(_CHANGED_SINCE), {"run": run_id})
    number = sum(int(n) for barcode, n in rows if barcode in read)
    if not number:
        return []
    wells = "1 well was" if number == 1 else f"{number:,} wells were"
    since = f"relabelled, excluded or included since run {run_id} began"
    return [f"{wells} {since}. To be up to date: cellstore profile, then cellstore hits"]


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
