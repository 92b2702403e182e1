"""What a well had before, who said so, and which labels were frozen meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import (
    Image,
    IngestFile,
    Label,
    Split,
    SplitMember,
    Treatment,
    Well,
    WellChange,
)
from ...runs import Workspace, find_well
from ...terms import LabelField, Subset
from .downstream import came_of_images
from .facts import FrozenLabel, IngestFact, TreatmentChange, TreatmentFact, WellAudit


def audit_well(workspace: Workspace, text: str) -> WellAudit:
    """Return what a well (``PLATE/A01``) has, what it had, and its labels in splits.

    Raises:
        UnknownNameError: there is no such plate or well.
        UserInputError: the text does not name a well.
    """
    with workspace.database.read() as session:
        plate, well = find_well(session, text)
        history = well_history(session, well.id)
        treatment = treatment_of(session, well)
        images = session.scalars(
            select(Image.id).where(Image.well_id == well.id).order_by(Image.id)
        )
        return WellAudit(
            well_id=well.id,
            plate=plate.barcode,
            well=well.name,
            treatment=treatment,
            history=history,
            images=tuple(images),
            frozen_labels=frozen_labels(session, well.id, None, treatment, history),
            came=came_of_images(session, select(Image.id).where(Image.well_id == well.id)),
        )


def treatment_of(session: Session, well: Well) -> TreatmentFact | None:
    """Return what a well has now, or None."""
    row = session.get(Treatment, well.treatment_id) if well.treatment_id else None
    return None if row is None else _fact(row)


def well_history(session: Session, well_id: int) -> tuple[TreatmentChange, ...]:
    """Return the changes of a well's treatment, the first one first."""
    query = select(WellChange).where(WellChange.well_id == well_id).order_by(WellChange.id)
    return tuple(
        TreatmentChange(
            old=_by_id(session, change.old_treatment_id),
            new=_by_id(session, change.new_treatment_id),
            changed_at=change.changed_at.isoformat(),
            run_id=change.run_id,
            file=change.file,
            line=change.line,
        )
        for change in session.scalars(query)
    )


def frozen_labels(
    session: Session,
    well_id: int,
    image_id: int | None,
    treatment: TreatmentFact | None,
    history: Sequence[TreatmentChange],
) -> tuple[FrozenLabel, ...]:
    """Return the labels that splits keep of an image, or of all images of a well."""
    query = (
        select(Split.name, Split.field, SplitMember.subset, Label.value)
        .join(SplitMember, SplitMember.split_id == Split.id)
        .join(Label, Label.id == SplitMember.label_id)
        .join(Image, Image.id == SplitMember.image_id)
    )
    if image_id is None:
        query = query.where(Image.well_id == well_id)
    else:
        query = query.where(Image.id == image_id)
    rows = session.execute(query.distinct()).all()
    found = [_frozen(*row, treatment, history) for row in rows]
    return tuple(sorted(found, key=lambda item: (item.split, item.side, item.label)))


def ingested(session: Session, run_id: int) -> tuple[IngestFact, ...]:
    """Return the files that a run read, in the order in which it did."""
    query = select(IngestFile).where(IngestFile.run_id == run_id).order_by(IngestFile.id)
    return tuple(
        IngestFact(
            *(row.name, row.sha256, row.layout, row.n_rows),
            *(row.n_created, row.n_updated, row.n_unchanged, row.n_refused),
        )
        for row in session.scalars(query)
    )


def changed_wells(session: Session, run_id: int) -> int:
    """Return how many wells have another treatment since a run."""
    query = select(func.count(WellChange.well_id.distinct()))
    return session.scalar(query.where(WellChange.run_id == run_id)) or 0


def _frozen(
    split: str,
    field: LabelField,
    side: Subset,
    label: str,
    treatment: TreatmentFact | None,
    history: Sequence[TreatmentChange],
) -> FrozenLabel:
    now = _value(treatment, field)
    return FrozenLabel(
        split=split,
        field=LabelField(field).value,
        side=Subset(side).value,
        label=label,
        now=now,
        differs=now != label,
        since=None if now == label else _last_change(history, field),
    )


def _last_change(history: Sequence[TreatmentChange], field: LabelField) -> TreatmentChange | None:
    changes = [item for item in history if _value(item.old, field) != _value(item.new, field)]
    return changes[-1] if changes else None


def _value(treatment: TreatmentFact | None, field: LabelField) -> str | None:
    if treatment is None:
        return None
    return treatment.target if field == LabelField.TARGET else treatment.pert_iname


def _by_id(session: Session, treatment_id: int | None) -> TreatmentFact | None:
    return None if treatment_id is None else _fact(session.get_one(Treatment, treatment_id))


def _fact(row: Treatment) -> TreatmentFact:
    return TreatmentFact(
        kind=row.kind.value,
        pert_iname=row.pert_iname,
        target=row.target,
        control=row.control.value if row.control else None,
        identifier=row.identifier,
    )
