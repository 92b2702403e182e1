"""Putting things right: rename, relabel, exclude and include.

Each verb finds what is named, changes the rows in one transaction with an event for each (who,
when, why, from what to what), and is undone by its counterpart. A dry run does the same and then
takes the transaction back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, and_, func, or_, select, update
from sqlalchemy.orm import Session

from ..db.bulk import insert_new, one_ingest_at_a_time
from ..db.events import Change, caller, record_events
from ..enums import AnnotationKind, Control, ExclusionSource, Level, PerturbationKind, Stage
from ..errors import UnknownNameError, UserInputError
from ..io.platemaps import normalised_name
from ..jobs.lookup import find_cell, find_image, find_plate, find_well, readable
from ..jobs.workspace import Workspace
from ..models import (
    EXCLUSIONS,
    Annotation,
    Cell,
    Image,
    ImageFile,
    Label,
    Perturbation,
    Plate,
    Prediction,
    Recipe,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from .ingest.write_treatments import Part, PerturbationKey, normalised_dose, treatment_values

LONGEST = 255
_NAMED = 5
"""Things that a message names."""
_DOSE = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)\s*(\S.*)?")


@dataclass(frozen=True)
class Correction:
    """What a verb changed, or would change (``dry_run``).

    ``changes``: for each row what it is called, and its old and new values. ``images``, ``cells``
    (of all segmentations) and ``predictions`` (one for each run and cell) are what it is about.
    """

    verb: str
    name: str
    changes: tuple[dict[str, Any], ...]
    images: int = 0
    cells: int = 0
    predictions: int = 0
    notes: tuple[str, ...] = ()
    reason: str | None = None
    dry_run: bool = False


Act = Callable[[Session], tuple[Correction, list[Change]]]
"""Changes rows in a transaction; returns what it did, and its events."""


def _carry_out(workspace: Workspace, reason: str | None, dry_run: bool, act: Act) -> Correction:
    """Do ``act`` in one transaction, which a dry run takes back.

    Raises:
        UserInputError: the reason is empty.
    """
    if reason is not None and not (reason := readable(reason)):
        raise UserInputError("Say why: --reason TEXT.")
    with workspace.database.begin() as session:
        one_ingest_at_a_time(session)
        done, changes = act(session)
        if dry_run:
            session.rollback()
        else:
            record_events(session, changes, reason=reason)
    return replace(done, reason=reason, dry_run=dry_run)


def _concerned(session: Session, images: Select[Any], cell: int | None = None) -> dict[str, Any]:
    """Count images (a query of their ids), their cells and predictions; of ``cell`` alone its."""
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images) if cell is None else Cell.id == cell)
    first = select(func.count()).where(Prediction.rank == 1, Prediction.cell_id.in_(cells))
    return {
        "images": session.scalar(select(func.count()).select_from(images.subquery())) or 0,
        "cells": session.scalar(select(func.count()).select_from(cells.subquery())) or 0,
        "predictions": session.scalar(first) or 0,
    }


def _images_of(level: Level, row_id: int) -> Select[Any]:
    """The query of the ids of the images of a plate, a well or a cell; of an image itself."""
    query = select(Image.id)
    match level:
        case Level.PLATE:
            return query.join(Well, Well.id == Image.well_id).where(Well.plate_id == row_id)
        case Level.WELL:
            return query.where(Image.well_id == row_id)
        case Level.IMAGE:
            return query.where(Image.id == row_id)
    of_cell = select(Segmentation.image_id).join(Cell, Cell.segmentation_id == Segmentation.id)
    return query.where(Image.id.in_(of_cell.where(Cell.id == row_id)))


def _name_of(session: Session, level: Level, row_id: int) -> str:
    """What a row is called: ``P1``, ``P1/A01``, ``P1/A01/1``, ``cell 7 of P1/A01/1``."""
    if level is Level.PLATE:
        return session.get_one(Plate, row_id).barcode
    if level is Level.WELL:
        well = session.get_one(Well, row_id)
        return f"{well.plate.barcode}/{well.name}"
    if level is Level.IMAGE:
        image = session.get_one(Image, row_id)
        return f"{image.well.plate.barcode}/{image.well.name}/{image.site}"
    image_id = session.get_one(Cell, row_id).segmentation.image_id
    return f"cell {row_id} of {_name_of(session, Level.IMAGE, image_id)}"


def _find(session: Session, level: Level, name: str) -> int:
    """The id of what is named, as in ``audit``."""
    match level:
        case Level.PLATE:
            return find_plate(session, readable(name))
        case Level.WELL:
            return find_well(session, name)
        case Level.IMAGE:
            return find_image(session, name)
    return find_cell(session, readable(name))[0]


# ---- Rename ----


def rename(
    workspace: Workspace,
    kind: str,
    old: str,
    new: str,
    *,
    plate: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Give a plate, or a channel of all plates (or of one ``plate``), another name.

    Raises:
        UnknownNameError: there is no such plate or channel.
        UserInputError: the new name is taken, or is none.
    """
    old, new = readable(old), readable(new)
    if not 1 <= len(new) <= LONGEST or not new.isprintable() or (kind == "plate" and "/" in new):
        raise UserInputError(
            f"A {kind} needs a name of 1 to {LONGEST} printable characters"
            f"{', without a slash' if kind == 'plate' else ''}."
        )
    if old == new:
        raise UserInputError(f"The {kind} is called {new} already.")
    if kind == "plate":
        if plate is not None:
            raise UserInputError("--plate says on which plate a channel is renamed. Leave it out.")
        return _carry_out(workspace, reason, dry_run, lambda s: _rename_plate(s, old, new))
    if kind != "channel":
        raise UnknownNameError.of("thing to rename", kind, ("plate", "channel"))
    return _carry_out(workspace, reason, dry_run, lambda s: _rename_channel(s, old, new, plate))


def _rename_plate(session: Session, old: str, new: str) -> tuple[Correction, list[Change]]:
    plate = find_plate(session, old)
    if session.scalar(select(Plate.id).where(Plate.barcode == new)) is not None:
        raise UserInputError(f"There is a plate {new} already. Choose another name.")
    session.execute(update(Plate).where(Plate.id == plate).values(barcode=new))
    change = Change("plates", plate, {"barcode": old}, {"barcode": new})
    found = Correction(
        "rename plate",
        old,
        ({"name": old, "old": change.old, "new": change.new},),
        **_concerned(session, _images_of(Level.PLATE, plate)),
        notes=(f"Tables that name {old} are read as {new} from now on.",),
    )
    return found, [change]


def _rename_channel(
    session: Session, old: str, new: str, plate: str | None
) -> tuple[Correction, list[Change]]:
    def files(channel: str) -> Select[Any]:
        query = select(ImageFile.image_id).where(ImageFile.channel == channel)
        if plate is not None:
            on_plate = _images_of(Level.PLATE, find_plate(session, readable(plate)))
            query = query.where(ImageFile.image_id.in_(on_plate))
        return query

    images = files(old)
    of = select(Plate.id, Plate.barcode).join(Well, Well.plate_id == Plate.id)
    of = of.join(Image, Image.well_id == Well.id).where(Image.id.in_(images)).distinct()
    plates = session.execute(of.order_by(Plate.id)).all()
    if not plates:
        known = session.scalars(select(ImageFile.channel).distinct())
        raise UnknownNameError.of("channel", old, sorted(known))
    both = session.scalar(images.where(ImageFile.image_id.in_(files(new))).limit(1))
    if both is not None:
        raise UserInputError(
            f"Image {_name_of(session, Level.IMAGE, both)} has a channel {new} already. To swap "
            "two channels, rename one of them to a third name first."
        )
    concerned = _concerned(session, images)
    recipes = session.scalars(select(Recipe).order_by(Recipe.id))
    naming = [
        f"{Stage(recipe.stage).value} recipe {recipe.id}"
        for recipe in recipes
        if old in (recipe.parameters.get("channels") or ())
    ]
    # What was made of the image stays as it is: its bytes are the same.
    renamed = update(ImageFile).where(ImageFile.channel == old, ImageFile.image_id.in_(images))
    session.execute(renamed.values(channel=new), execution_options={"synchronize_session": False})
    changes = [Change("plates", p.id, {"channel": old}, {"channel": new}) for p in plates]
    notes = []
    if naming:
        notes.append(
            f"These recipes ask for {old}, and cannot be used with {new}: "
            f"{', '.join(naming[:_NAMED])}{', ...' if len(naming) > _NAMED else ''}. Name the "
            "channel anew with --channels."
        )
    shown = tuple(
        {"name": p.barcode, "old": c.old, "new": c.new}
        for p, c in zip(plates, changes, strict=True)
    )
    return Correction("rename channel", old, shown, **concerned, notes=tuple(notes)), changes


# ---- Relabel ----


def relabel(
    workspace: Workspace,
    well: str,
    *,
    treatment: str | None = None,
    dose: str | None = None,
    control: str | None = None,
    reason: str,
    dry_run: bool = False,
) -> Correction:
    """Say what a well really got; ``treatment`` ``none``: it is not known.

    Without ``control`` a well that gets another treatment has the role that the other wells of
    this treatment have. ``none`` is no control.

    Raises:
        UnknownNameError: there is no such well.
        UserInputError: nothing would change, or the treatment is ambiguous.
    """
    if treatment is None and (dose is not None or control is None):
        raise UserInputError("Say what the well got: --treatment NAME, perhaps with --dose.")
    if control is not None and control not in (*Control, "none"):
        raise UnknownNameError.of("control", control, [*(c.value for c in Control), "none"])

    def act(session: Session) -> tuple[Correction, list[Change]]:
        row = session.get_one(Well, find_well(session, well))
        name = _name_of(session, Level.WELL, row.id)
        before = _label_of(session, row)
        notes: list[str] = []
        if treatment is not None:
            row.treatment_id = _treatment_named(session, readable(treatment), dose, notes)
        if control is not None:
            row.control = None if control == "none" else Control(control)
        elif row.treatment_id != before["treatment_id"]:
            row.control = _usual_control(session, row)
        session.flush()
        after = _label_of(session, row)
        changed = [key for key in before if before[key] != after[key]]
        if not changed:
            raise UserInputError(f"Well {name} has this already; nothing would change.")
        old, new = ({key: item[key] for key in changed} for item in (before, after))
        frozen = (
            select(Split.name, Label.value)
            .join(SplitMember, SplitMember.split_id == Split.id)
            .join(Label, Label.id == SplitMember.label_id)
            .where(SplitMember.image_id.in_(_images_of(Level.WELL, row.id)))
        )
        notes += [
            f"Split {split} keeps the label {label} of this well. A new split takes the new one."
            for split, label in session.execute(frozen.distinct().order_by(Split.name))
        ]
        shown = {"name": name, "old": _without_id(old), "new": _without_id(new)}
        concerned = _concerned(session, _images_of(Level.WELL, row.id))
        found = Correction("relabel", name, (shown,), **concerned, notes=tuple(notes))
        return found, [Change("wells", row.id, old, new)]

    return _carry_out(workspace, reason, dry_run, act)


def _label_of(session: Session, well: Well) -> dict[str, Any]:
    found = None if well.treatment_id is None else session.get_one(Treatment, well.treatment_id)
    return {
        "treatment_id": well.treatment_id,
        "treatment": found and found.name_with_dose,
        "control": well.control and Control(well.control).value,
    }


def _without_id(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "treatment_id"}


def _usual_control(session: Session, well: Well) -> Control | None:
    """The role of the other wells that have the treatment of a well, if they have one."""
    if well.treatment_id is None:
        return None
    key = session.get_one(Treatment, well.treatment_id).perturbations_key
    query = select(Well.control).join(Treatment, Treatment.id == Well.treatment_id).distinct()
    query = query.where(Treatment.perturbations_key == key, Well.id != well.id)
    found = session.scalars(query.limit(2)).all()
    return found[0] if len(found) == 1 else None


def _treatment_named(session: Session, name: str, dose: str | None, notes: list[str]) -> int | None:
    """The id of a treatment by its name (with its dose, or with ``dose``), made if it is new."""
    if name.lower() == "none" and dose is None:
        return None
    if not 1 <= len(name) <= LONGEST or not name.isprintable():
        raise UserInputError(f"A treatment needs a name of 1 to {LONGEST} printable characters.")
    if dose is None:
        query = select(Treatment.id, Treatment.name_with_dose).order_by(Treatment.id)
        same = session.execute(query.where(Treatment.name_with_dose == name)).all()
        same = same or session.execute(query.where(Treatment.name == name)).all()
        if len(same) == 1:
            return int(same[0].id)
        used = [row for row in same if _has_wells(session, row.id)]
        if len(used) == 1:
            return int(used[0].id)
        if len(same) > 1:
            listed = ", ".join(sorted({row.name_with_dose for row in same})[:_NAMED])
            raise UserInputError(
                f"{name} is in the store in several ways: {listed}. Add --dose, for example "
                '--dose "5 uM", or name one by its identifier.'
            )
    key = _perturbation_named(session, name, notes)
    number, unit = _dose_of(dose)
    part = Part(key, number, unit)
    values = treatment_values([part])
    insert_new(session, Perturbation, [key._asdict()])
    matches = [getattr(Perturbation, column) == value for column, value in key._asdict().items()]
    perturbation = session.scalars(select(Perturbation).where(*matches)).one()
    known = select(Treatment.id).where(Treatment.identity == values["identity"])
    found = session.scalar(known)
    if found is None:
        insert_new(session, Treatment, [values | {"target": perturbation.target}])
        found = session.scalars(known).one()
        row: dict[str, Any] = {"treatment_id": found, "position": 1}
        row["perturbation_id"] = perturbation.id
        if number is not None:
            plain, plain_unit = normalised_dose(number, unit)
            row |= {"dose": plain, "dose_unit": plain_unit, "dose_original": dose}
        insert_new(session, TreatmentPart, [row])
    return found


def _has_wells(session: Session, treatment: int) -> bool:
    return (
        session.scalar(select(Well.id).where(Well.treatment_id == treatment).limit(1)) is not None
    )


def _perturbation_named(session: Session, name: str, notes: list[str]) -> PerturbationKey:
    """What names the perturbation ``name`` (or of this identifier); a new one is a compound."""
    columns = (Perturbation.kind, Perturbation.name, Perturbation.identifier)
    query = select(*columns).where(or_(Perturbation.name == name, Perturbation.identifier == name))
    found = session.execute(query).all()
    if len(found) > 1:
        used = select(TreatmentPart.perturbation_id).join(
            Well, Well.treatment_id == TreatmentPart.treatment_id
        )
        found = session.execute(query.where(Perturbation.id.in_(used))).all() or found
    if len(found) > 1:
        listed = ", ".join(sorted(str(row.identifier) for row in found)[:_NAMED])
        raise UserInputError(f"{name} is several samples: {listed}. Name one by its identifier.")
    if found:
        return PerturbationKey(*found[0])
    known = session.scalars(select(Perturbation.name).distinct())
    alike = next(
        (other for other in known if normalised_name(other) == normalised_name(name)), None
    )
    if alike is not None:
        raise UserInputError(f"Unknown treatment {name!r}. Did you mean {alike}?")
    notes.append(f"{name} is new: no table has named it. It is kept as a compound.")
    return PerturbationKey(PerturbationKind.COMPOUND, name, None)


def _dose_of(text: str | None) -> tuple[float | None, str | None]:
    """The number and the unit of a dose.

    Raises:
        UserInputError: it is none.
    """
    if text is None:
        return None, None
    match = _DOSE.fullmatch(readable(text))
    try:
        return float(match[1] if match else text), match[2] if match else None
    except ValueError as error:
        raise UserInputError(
            f'A dose is a number and a unit, as in "5 uM", not {text!r}.'
        ) from error


# ---- Exclude and include ----


def exclude(
    workspace: Workspace, level: str, name: str, *, reason: str, dry_run: bool = False
) -> Correction:
    """Let a plate, well, image or cell count nowhere; it stays visible.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: it is excluded already.
    """
    return _set_excluded(workspace, level, name, reason, dry_run, excluded=True)


def include(
    workspace: Workspace,
    level: str,
    name: str,
    *,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Let something count again that a person excluded.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: nobody excluded it.
    """
    return _set_excluded(workspace, level, name, reason, dry_run, excluded=False)


def _set_excluded(
    workspace: Workspace,
    level: str,
    name: str,
    reason: str | None,
    dry_run: bool,
    *,
    excluded: bool,
) -> Correction:
    if level not in list(Level):
        raise UnknownNameError.of("kind", level, [item.value for item in Level])
    of = Level(level)

    def act(session: Session) -> tuple[Correction, list[Change]]:
        row_id = _find(session, of, name)
        called = _name_of(session, of, row_id)
        found = EXCLUSIONS.c
        mine = and_(found.level == of.value, found.id == row_id)
        by_person = found.source == ExclusionSource.ANNOTATION.value
        query = select(found.reason, found.annotation_id).where(mine, by_person)
        present = session.execute(query.order_by(found.annotation_id)).all()
        user_name, _ = caller()
        values = {
            "level": of,
            "row_id": row_id,
            "kind": AnnotationKind.EXCLUSION,
            "reason": reason and readable(reason),
            "user_name": user_name[:LONGEST],
            "created_at": datetime.now(UTC),
        }
        if excluded:
            if present:
                raise UserInputError(f"{called} is excluded already: {present[0].reason}.")
            session.add(Annotation(**values))
            old, new = {"excluded": None}, {"excluded": values["reason"]}
        else:
            if not present:
                raise UserInputError(_why_not_included(session, of, row_id, called))
            for row in present:
                session.add(Annotation(**values, undoes_id=row.annotation_id))
            old, new = {"excluded": present[0].reason}, {"excluded": None}
        session.flush()
        change = Change(f"{of.value}s", row_id, old, new)
        shown = {"name": called, "old": old, "new": new}
        concerned = _concerned(
            session, _images_of(of, row_id), row_id if of is Level.CELL else None
        )
        verb = "exclude" if excluded else "include"
        return Correction(f"{verb} {of.value}", called, (shown,), **concerned), [change]

    return _carry_out(workspace, reason, dry_run, act)


def _why_not_included(session: Session, level: Level, row_id: int, called: str) -> str:
    """Why there is nothing to take back: what excludes it instead, if anything does."""
    begin = f"{called[:1].upper()}{called[1:]}"
    if level is Level.CELL and (why := session.get_one(Cell, row_id).excluded) is not None:
        return f"{begin} was excluded when it was found ({why}); it stays so."
    query = select(Image.id, Image.well_id, Well.plate_id).join(Well, Well.id == Image.well_id)
    image = session.execute(query.where(Image.id.in_(_images_of(level, row_id))).limit(1)).first()
    found = EXCLUSIONS.c
    of_person = select(found.id).where(found.source == ExclusionSource.ANNOTATION.value)
    for higher, number in zip((Level.IMAGE, Level.WELL, Level.PLATE), image or (), strict=False):
        named = of_person.where(found.level == higher.value, found.id == number).limit(1)
        is_above = list(Level).index(higher) < list(Level).index(level)
        if is_above and session.scalar(named) is not None:
            return (
                f"Not {called} itself is excluded, but its {higher.value}. To include that: "
                f"cellstore include {higher.value} {_name_of(session, higher, number)}"
            )
    return f"{begin} is not excluded, so there is nothing to include."
