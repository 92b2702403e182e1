"""The label fields of images and wells, and the parts of their treatments."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    String,
    and_,
    case,
    cast,
    exists,
    func,
    null,
    or_,
    select,
    text,
)
from sqlalchemy.orm import Session

from ..enums import PERTURBATION, TARGET, TREATMENT, AnnotationKind, Level
from ..errors import UnknownNameError, UserInputError
from ..models import METADATA, Perturbation, Treatment, TreatmentPart

plates, wells, images, treatments, treatment_parts, events, notes = (
    METADATA.tables[name]
    for name in (
        *("plates", "wells", "images", "treatments", "treatment_parts"),
        *("events", "annotations"),
    )
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
    """Return what a query of images with their well, plate and treatment selects as their label.

    ``field`` is ``perturbation``, ``treatment`` (with dose), ``target``, a text column of
    ``plates``, or else what people say, or a key of the metadata of wells or plates; the image
    goes before its well, the well before its plate. Where people disagree there is no label.
    """
    column: ColumnElement[str | None] | None = _COLUMNS.get(field)
    if column is not None:
        return column
    levels = ((Level.IMAGE, images), (Level.WELL, wells), (Level.PLATE, plates))
    agreed_labels = (_agreed(field, level, table.c.id) for level, table in levels)
    values = (table.c.metadata[field].as_string() for table in (wells, plates))
    return func.nullif(func.coalesce(*agreed_labels, *values), "")


def stands(row: Any) -> ColumnElement[bool]:
    """The condition on a row of ``annotations`` that it is not taken back, and takes none back."""
    later = notes.alias()
    return and_(row.undoes_id.is_(None), ~exists().where(later.c.undoes_id == row.id))


def is_label_now(row: Any) -> ColumnElement[bool]:
    """The condition on a row of ``annotations`` that it is the label of a person now.

    It is the last that this person gave to the same in this field, but for those taken back.
    """
    later = notes.alias()
    same = [later.c[name] == getattr(row, name) for name in ("level", "row_id", "kind", "field")]
    same += [later.c.user_name == row.user_name, later.c.id > row.id, stands(later.c)]
    return and_(row.kind == AnnotationKind.LABEL, stands(row), ~exists().where(*same))


def _agreed(field: str, level: Level, row_id: ColumnElement[int]) -> ColumnElement[str | None]:
    """The label that people gave a row; empty: they disagree, null: they gave none."""
    row = notes.alias()
    first, last = func.min(row.c.value), func.max(row.c.value)
    agreed = case((first.is_(None), null()), (first == last, first), else_="")
    mine = (row.c.level == level, row.c.row_id == row_id, row.c.field == field)
    query = select(agreed).where(*mine, is_label_now(row.c))
    return query.correlate(images, wells, plates).scalar_subquery()


def table_field(session: Session, field: str) -> bool:
    """Whether tables fill a label field: a column, or a key of the metadata of wells or plates."""
    filled = (
        select(table.c.id).where(table.c.metadata[field].as_string().is_not(None)).limit(1)
        for table in (wells, plates)
    )
    return field in _COLUMNS or any(session.scalar(query) is not None for query in filled)


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
    labels = select(notes.c.field).distinct()
    labels = labels.where(notes.c.kind == AnnotationKind.LABEL)
    known.update(session.scalars(labels.where(notes.c.level != Level.CELL)))
    field = field if field in known else field.removeprefix("Metadata_")
    if field not in known:
        if session.scalar(labels.where(notes.c.field == field)) is not None:
            raise UserInputError(
                f"Only cells have labels of the field {field}, and a split gives whole images a "
                "label. Label images or wells: cellstore annotate image NAME --label TEXT. Labels "
                "of cells choose which cells a training reads: cellstore train --sql "
                f"\"FROM annotation_table WHERE field = '{field}'\""
            )
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


def wells_relabelled(session: Session, split_id: int) -> list[Row[Any]]:
    """Return the wells of a split whose label is not the frozen one any more.

    Rows: id of the well, its name (``P1/A01``), the frozen label, the label that it has now.
    """
    members, labels, splits = (
        METADATA.tables[name] for name in ("split_members", "labels", "splits")
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
    return list(session.execute(query.order_by(wells.c.id)))
