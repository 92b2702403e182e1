"""Putting things right: rename, relabel, exclude and include, undo and delete.

Each verb finds what is named, changes the rows in one transaction with an event for each (who,
when, why, from what to what), and is undone by its counterpart. A dry run does the same and then
takes the transaction back.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, and_, delete, exists, false, func, or_, select, union, update
from sqlalchemy.orm import Session

from ..config import RunName
from ..db.bulk import IN_AT_ONCE, in_lists, one_ingest_at_a_time
from ..db.events import (
    Change,
    caller,
    grown_digest,
    record_events,
    record_runs,
    recording_removed,
    table_digests,
)
from ..db.fields import stands, wells_relabelled
from ..enums import AnnotationKind, Control, ExclusionSource, Level, PerturbationKind, Stage, Status
from ..errors import UnknownNameError, UserInputError, some_of
from ..io.tables import MISSING, RowRefusedError
from ..io.treatments import TreatmentRecord, normalised_name
from ..jobs.lookup import (
    IN_RECIPES,
    channels_of_recipes,
    find_cell,
    find_image,
    find_plate,
    find_run,
    find_well,
    readable,
    recipe_channels,
)
from ..jobs.workspace import Workspace
from ..models import (
    EXCLUSIONS,
    METADATA,
    Annotation,
    Artifact,
    Base,
    Cell,
    Event,
    FeatureFile,
    FeatureSet,
    Image,
    ImageFile,
    ImagePrediction,
    ImageQuality,
    Perturbation,
    Plate,
    Prediction,
    RecipeInput,
    Run,
    RunArtifact,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    TreatmentScore,
    Well,
)
from ..notebooks import Shown
from .ingest.account import Account
from .ingest.write_treatments import TreatmentWriter, retarget

LONGEST = 255
_NAMED = 5
"""Things that a message names."""
SHOWN = 20
"""Changes of many rows that are shown, each with its name."""
_CLASSES: dict[str, Any] = {
    mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers
}
"""The classes of all tables, by the names of these."""


@dataclass(frozen=True)
class Correction(Shown):
    """What a verb changed, or would change (``dry_run``).

    ``changes``: for each row what it is called, and its old and new values. ``images``, ``cells``
    (of all segmentations) and ``predictions`` (one for each run and cell, or whole image) are what
    it is about.
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


def carry_out(
    workspace: Workspace,
    reason: str | None,
    dry_run: bool,
    act: Act,
    files: Sequence[str] = (),
    *,
    annotating: bool = False,
) -> Correction:
    """Do ``act`` in one transaction, which a dry run takes back.

    ``files``: where ``act`` puts the paths of files that are needed no more. ``annotating``: it
    only adds rows to table ``annotations``.

    Raises:
        UserInputError: the reason is empty.
    """
    if reason is not None and not (reason := readable(reason)):
        raise UserInputError("Say why: --reason TEXT.")
    with workspace.database.begin() as session:
        one_ingest_at_a_time(session)
        last = (session.scalar(select(func.max(Annotation.id))) or 0) if annotating else 0
        done, changes = act(session)
        if dry_run:
            session.rollback()
        else:
            session.flush()
            if annotating:
                digests = grown_digest(session, last)
            else:
                digests = table_digests(session, _plates_of(session, changes))
            left = Change("store", None, None, {"tables": digests})
            record_events(session, [left, *changes], reason=reason)
            undone = [item.row_id for item in changes if item.table_name == "runs"]
            record_runs(session, [number for number in undone if number])
    for path in () if dry_run else files:
        workspace.artifacts.remove(path)
    return replace(done, reason=reason, dry_run=dry_run)


def _plates_of(session: Session, changes: Sequence[Change]) -> set[int] | None:
    """Return the plates whose wells or images changed; None: any, as rows were deleted."""
    ids: dict[str, set[int]] = {"plates": set(), "wells": set(), "images": set()}
    for change in changes:
        if change.table_name == "runs" or "rows" in (change.old or {}):
            return None
        if change.table_name in ids and change.row_id is not None:
            ids[change.table_name].add(change.row_id)
    found = ids["plates"]
    for some in in_lists(ids["wells"]):
        found.update(session.scalars(select(Well.plate_id).where(Well.id.in_(some))))
    of_images = select(Well.plate_id).join(Image, Image.well_id == Well.id)
    for some in in_lists(ids["images"]):
        found.update(session.scalars(of_images.where(Image.id.in_(some))))
    return found


def _concerned(
    session: Session, images: Select[Any], only: Sequence[int] | None = None
) -> dict[str, Any]:
    """Count images (a query of their ids), their cells and predictions; or of cells ``only``."""
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images) if only is None else Cell.id.in_(only))
    first = select(func.count()).where(Prediction.rank == 1, Prediction.cell_id.in_(cells))
    number = session.scalar(first) or 0
    if only is None:
        whole = select(func.count()).where(ImagePrediction.rank == 1)
        number += session.scalar(whole.where(ImagePrediction.image_id.in_(images))) or 0
    return {
        "images": session.scalar(select(func.count()).select_from(images.subquery())) or 0,
        "cells": session.scalar(select(func.count()).select_from(cells.subquery())) or 0,
        "predictions": number,
    }


def _images_of(level: Level, *ids: int) -> Select[Any]:
    """The query of the ids of the images of plates, wells or cells; of images themselves."""
    query = select(Image.id)
    match level:
        case Level.PLATE:
            return query.join(Well, Well.id == Image.well_id).where(Well.plate_id.in_(ids))
        case Level.WELL:
            return query.where(Image.well_id.in_(ids))
        case Level.IMAGE:
            return query.where(Image.id.in_(ids))
    of_cell = select(Segmentation.image_id).join(Cell, Cell.segmentation_id == Segmentation.id)
    return query.where(Image.id.in_(of_cell.where(Cell.id.in_(ids))))


def name_of(session: Session, table: str, row_id: int | None) -> str:
    """What a row is called: ``P1``, ``P1/A01``, ``P1/A01/1``, ``cell 7 of P1/A01/1``.

    One that is gone has its number, and one without a name the name of its table.
    """
    if row_id is None:
        return table
    row = session.get(_CLASSES[table], row_id)
    return f"{table[:-1]} {row_id}" if row is None else _called(row) or table


def _called(row: Any) -> str:
    match row:
        case Plate():
            return row.barcode
        case Perturbation():
            return row.name
        case Well():
            return f"{row.plate.barcode}/{row.name}"
        case Image():
            return f"{_called(row.well)}/{row.site}"
        case ImageFile():
            return f"channel {row.channel} of {_called(row.image)}"
        case Cell():
            return f"cell {row.id} of {_called(row.segmentation.image)}"
    return ""


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

    What was made of the channel stays valid: recipes and models that name it keep the name that
    it had, and mean the same pixels.

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
        return carry_out(workspace, reason, dry_run, lambda s: _rename_plate(s, old, new))
    if kind != "channel":
        raise UnknownNameError.of("thing to rename", kind, ("plate", "channel"))
    return carry_out(workspace, reason, dry_run, lambda s: _rename_channel(s, old, new, plate))


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
    names = (Event.old["channel"].as_string() == old, Event.new["channel"].as_string() == new)
    renamed = select(Event.id).where(Event.table_name == "plates", *names).limit(1)
    if not plates and session.scalar(renamed) and session.scalar(files(new).limit(1)):
        note = f"{old} was renamed before: it is called {new} already."
        return Correction("rename channel", old, (), notes=(note,)), []
    if not plates:
        known = session.scalars(select(ImageFile.channel).distinct())
        raise UnknownNameError.of("channel", old, sorted(known))
    both = session.scalar(images.where(ImageFile.image_id.in_(files(new))).limit(1))
    if both is not None:
        raise UserInputError(
            f"Image {name_of(session, 'images', both)} has a channel {new} already. To swap "
            "two channels, rename one of them to a third name first."
        )
    concerned = _concerned(session, images)
    named, used = recipe_channels(session), channels_of_recipes(session)
    measured = select(ImageQuality.channel).distinct()

    def kept(plate: int | None) -> dict[str, str]:
        """The name that recipes keep, if one has it and the channel can be told by it."""
        names = named.get(plate, named.get(None, {}))
        before = names.get(old, old)
        if before.lower() in used or before in found or new in names.values():
            return {IN_RECIPES: before} if before != new else {}
        return {}

    found = set(session.scalars(measured))
    # What was made of the image stays as it is: its bytes are the same.
    renaming = update(ImageFile).where(ImageFile.channel == old, ImageFile.image_id.in_(images))
    session.execute(renaming.values(channel=new), execution_options={"synchronize_session": False})
    changes = [
        Change("plates", p, {"channel": old}, {"channel": new, **kept(p)})
        for p in (*([None] if plate is None else []), *(p.id for p in plates))
    ]  # first that of plates that will come
    where = f" of plate {readable(plate)}" if plate is not None else ""
    notes = [f"Tables and folders{where} that name {old} are read as {new} from now on."]
    said = sorted({(change.new or {}).get(IN_RECIPES, new) for change in changes} - {new})
    if said:
        notes.append(
            f"What was made of it stays valid: recipes and models go on to call it "
            f"{' or '.join(said)}, and mean the same channel."
        )
    shown = tuple(
        {"name": p.barcode, "old": {"channel": old}, "new": {"channel": new}} for p in plates
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
        name = _called(row)
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
        used = select(Split.id, Split.name).join(SplitMember, SplitMember.split_id == Split.id)
        used = used.where(SplitMember.image_id.in_(_images_of(Level.WELL, row.id))).distinct()
        for split_id, split in session.execute(used.order_by(Split.name)).all():
            for well_now in wells_relabelled(session, split_id, row.id):
                notes.append(
                    f"Split {split} keeps the label {well_now.frozen} of this well. A new split "
                    "has the new one."
                )
        change = Change("wells", row.id, old, new)
        shown = (_shown_change(session, change),)
        concerned = _concerned(session, _images_of(Level.WELL, row.id))
        return Correction("relabel", name, shown, **concerned, notes=tuple(notes)), [change]

    return carry_out(workspace, reason, dry_run, act)


def _label_of(session: Session, well: Well) -> dict[str, Any]:
    found = None if well.treatment_id is None else session.get_one(Treatment, well.treatment_id)
    return {
        "treatment_id": well.treatment_id,
        "treatment": found and found.name_with_dose,
        "control": well.control and Control(well.control).value,
    }


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
    if name and name in MISSING:
        if name.lower() != "none" or dose is not None:
            raise UserInputError(
                f"{name!r} is not a treatment. Where it is not known: --treatment none, "
                "without --dose"
            )
        return None
    if not 1 <= len(name) <= LONGEST or not name.isprintable():
        raise UserInputError(f"A treatment needs a name of 1 to {LONGEST} printable characters.")
    if dose is None:
        has_wells = exists().where(Well.treatment_id == Treatment.id)
        query = select(Treatment.id, Treatment.name_with_dose, has_wells.label("used"))
        for named in (Treatment.name_with_dose, Treatment.name):
            if same := session.execute(query.where(named == name)).all():
                break
        used = same if len(same) == 1 else [row for row in same if row.used]
        if len(used) == 1:
            return int(used[0].id)
        if same:
            listed = some_of(sorted({row.name_with_dose for row in same}))
            raise UserInputError(
                f"{name} is in the store in several ways: {listed}. Add --dose, for example "
                '--dose "5 uM", or name one by its identifier.'
            )
    record = _perturbation_named(session, name, notes)
    try:
        record = record if dose is None else record.with_dose(readable(dose))
    except RowRefusedError as error:
        raise UserInputError(
            f'A dose is a number and a unit, as in "5 uM", not {dose!r}.'
        ) from error
    return TreatmentWriter(session, Account(0, "")).ids([record])[record]


def _perturbation_named(session: Session, name: str, notes: list[str]) -> TreatmentRecord:
    """The perturbation ``name`` (or of this identifier), without dose; a new one is a compound."""
    columns = (Perturbation.kind, Perturbation.name, Perturbation.identifier)
    query = select(*columns).where(or_(Perturbation.name == name, Perturbation.identifier == name))
    found = session.execute(query).all()
    if len(found) > 1:
        used = select(TreatmentPart.perturbation_id).join(
            Well, Well.treatment_id == TreatmentPart.treatment_id
        )
        found = session.execute(query.where(Perturbation.id.in_(used))).all() or found
    if len(found) > 1:
        listed = some_of(sorted(str(row.identifier) for row in found))
        raise UserInputError(f"{name} is several samples: {listed}. Name one by its identifier.")
    if found:
        return TreatmentRecord(found[0].kind, found[0].name, identifier=found[0].identifier)
    known = session.scalars(select(Perturbation.name).distinct())
    alike = next(
        (other for other in known if normalised_name(other) == normalised_name(name)), None
    )
    if alike is not None:
        raise UserInputError(f"Unknown treatment {name!r}. Did you mean {alike}?")
    if " + " in name:
        raise UserInputError(
            f"No table has named the combination {name!r}. Give it in a plate map, and ingest that."
        )
    notes.append(f"{name} is new: no table has named it. It is kept as a compound.")
    return TreatmentRecord(PerturbationKind.COMPOUND, name)


# ---- Exclude and include ----


def set_excluded(
    workspace: Workspace,
    level: str,
    names: Names,
    excluded: bool,
    *,
    user: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Correction:
    """Let plates, wells, images or cells count nowhere, with a reason; or let them count again.

    They stay visible. Only what a person excluded can be included again. Of several, those that
    are so already stay as they are. ``user``: who says so, if not who runs this process.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: it is excluded already, or nobody excluded it.
    """
    of = level_named(level)
    user = None if user is None else name_given("user", user)

    def act(session: Session) -> tuple[Correction, list[Change]]:
        ids = rows_named(session, of, names)
        found = EXCLUSIONS.c
        mine = and_(found.level == of.value, found.id.in_(ids))
        query = select(found.id, found.reason, found.annotation_id).where(mine, _BY_PERSON)
        present: dict[int, list[Any]] = {}
        for row in session.execute(query.order_by(found.annotation_id)):
            present.setdefault(row.id, []).append(row)
        to_do = [row_id for row_id in ids if (row_id in present) is not excluded]
        if not to_do:
            called = name_of(session, f"{of.value}s", ids[0])
            if excluded:
                raise UserInputError(f"{called} is excluded already: {present[ids[0]][0].reason}.")
            raise UserInputError(_why_not_included(session, of, ids[0], called))
        why, at = reason and readable(reason), datetime.now(UTC)
        changes = []
        for row_id in to_do:
            if excluded:
                session.add(annotation(of, row_id, why, user=user, at=at))
                old, new = {"excluded": None}, {"excluded": why}
            else:
                for row in present[row_id]:
                    undone = row.annotation_id
                    session.add(annotation(of, row_id, why, user=user, at=at, undoes_id=undone))
                old, new = {"excluded": present[row_id][0].reason}, {"excluded": None}
            changes.append(Change(f"{of.value}s", row_id, old, new))
        session.flush()
        shown = tuple(_shown_change(session, change) for change in changes[:SHOWN])
        concerned = _concerned(session, _images_of(of, *to_do), to_do if of is Level.CELL else None)
        verb = f"{'exclude' if excluded else 'include'} {of.value}"
        called = shown[0]["name"] if len(to_do) == 1 else f"{len(to_do)} {of.value}s"
        same = len(ids) - len(to_do)
        notes = (f"{same} of {len(ids)} stay as they are.",) if same else ()
        return Correction(verb, called, shown, **concerned, notes=notes), changes

    return carry_out(workspace, reason, dry_run, act, annotating=True)


_FINDERS: dict[Level, Callable[[Session, str], int]] = {
    Level.PLATE: find_plate,
    Level.WELL: find_well,
    Level.IMAGE: find_image,
    Level.CELL: lambda session, number: find_cell(session, number)[0],
}
_BY_PERSON = EXCLUSIONS.c.source == ExclusionSource.ANNOTATION.value

Names = str | Sequence[str | int]
"""One name as ``audit`` takes it, or names and ids."""


def level_named(level: str) -> Level:
    """Return the level of this name.

    Raises:
        UnknownNameError: there is none.
    """
    if level not in list(Level):
        raise UnknownNameError.of("kind", level, [item.value for item in Level])
    return Level(level)


def rows_named(session: Session, level: Level, names: Names) -> list[int]:
    """Return the ids of plates, wells, images or cells, each once, in the order of their names.

    Raises:
        UnknownNameError: one is not there.
        UserInputError: there are none, or too many.
    """
    given = [names] if isinstance(names, str) else list(names)
    if not 1 <= len(given) <= IN_AT_ONCE:
        raise UserInputError(f"Name 1 to {IN_AT_ONCE:,} {level.value}s at once.")
    found = list[int]()
    for name in given:
        if isinstance(name, str) and (level is not Level.CELL or not name.strip().isdecimal()):
            found.append(_FINDERS[level](session, readable(name)))
        else:
            found.append(int(name) if len(str(name)) < 19 else -1)
    table = METADATA.tables[f"{level.value}s"].c.id
    there = set(session.scalars(select(table).where(table.in_(set(found)))))
    for name, row_id in zip(given, found, strict=True):
        if row_id not in there:
            if level is Level.CELL:
                find_cell(session, str(name))  # whose error says what a cell is named by
            raise UnknownNameError(f"There is no {level.value} with the id {name}.")
    return list(dict.fromkeys(found))


def name_given(what: str, text: str) -> str:
    """Return a label, a field or an author as it is kept; raises UserInputError if it is none."""
    text = readable(text)
    if not 1 <= len(text) <= LONGEST or not text.isprintable():
        raise UserInputError(f"A {what} needs 1 to {LONGEST} printable characters.")
    return text


def annotation(
    level: Level,
    row_id: int,
    reason: str | None,
    *,
    user: str | None = None,
    at: datetime | None = None,
    kind: AnnotationKind = AnnotationKind.EXCLUSION,
    **more: Any,
) -> Annotation:
    """What a person says (by default: who runs this process, now); ``undoes_id``: or takes back.

    What is said in one go has the same moment.
    """
    return Annotation(
        level=level,
        row_id=row_id,
        kind=kind,
        reason=reason,
        user_name=user or caller()[0][:LONGEST],
        created_at=at or datetime.now(UTC),
        **more,
    )


def undoing(
    row: Annotation, reason: str | None, user: str | None = None, at: datetime | None = None
) -> Annotation:
    """Return the row that takes an annotation back."""
    more: dict[str, Any] = {"kind": row.kind, "field": row.field, "undoes_id": row.id}
    return annotation(row.level, row.row_id, reason, user=user, at=at, **more)


def _why_not_included(session: Session, level: Level, row_id: int, called: str) -> str:
    """Why there is nothing to take back: what excludes it instead, if anything does."""
    begin = f"{called[:1].upper()}{called[1:]}"
    if level is Level.CELL and (why := session.get_one(Cell, row_id).excluded) is not None:
        return f"{begin} was excluded when it was found ({why}); it stays so."
    query = select(Image.id, Image.well_id, Well.plate_id).join(Well, Well.id == Image.well_id)
    image = session.execute(query.where(Image.id.in_(_images_of(level, row_id))).limit(1)).first()
    found = EXCLUSIONS.c
    of_person = select(found.id).where(_BY_PERSON)
    for higher, number in zip((Level.IMAGE, Level.WELL, Level.PLATE), image or (), strict=False):
        named = of_person.where(found.level == higher.value, found.id == number).limit(1)
        is_above = list(Level).index(higher) < list(Level).index(level)
        if is_above and session.scalar(named) is not None:
            return (
                f"Not {called} itself is excluded, but its {higher.value}. To include that: "
                f"cellstore include {higher.value} {name_of(session, f'{higher.value}s', number)}"
            )
    return f"{begin} is not excluded, so there is nothing to include."


# ---- Undo and delete ----

_BROUGHT = ("image_files", "images", "wells", "plates", "treatments", "perturbations")
"""The tables of which an ingest records the new rows; those that refer to others come first."""

_STAYING = (Prediction, ImagePrediction, SplitMember)
"""What is never deleted with an image or a cell: these are not deleted while they have it."""

Ranges = Mapping[str, Sequence[tuple[int, int]]]
"""By table the first and the last id of new rows."""


def undo(
    workspace: Workspace, run: RunName, *, reason: str | None = None, dry_run: bool = False
) -> Correction:
    """Take back what an ingest run brought or changed, if nothing relies on it.

    The run is marked as cancelled, so that its source can be ingested again. What a person has
    corrected since keeps the correction, which a note names. Where files were found stays known.

    Raises:
        UnknownNameError: there is no such run.
        UserInputError: it is no ingest run, or later work relies on it: the message names that.
    """
    files: list[str] = []

    def act(session: Session) -> tuple[Correction, list[Change]]:
        found = find_run(session, run)
        ranges = _check_undoable(session, found)
        images = select(Image.id).where(_within(Image.id, ranges["images"]))
        mine = or_(Segmentation.run_id == found.id, Segmentation.image_id.in_(images))
        restored, later, notes = _restorable(session, found.id)
        relying = _relying(session, images, select(Segmentation.id).where(mine), found.id)
        relying |= _relying_on_rows(session, found.id, ranges) | later
        _refuse_if(relying, f"Run {found.id} cannot be undone")
        wells = select(Well.id).where(_within(Well.id, ranges["wells"]))
        notes = [*_corrected_by_hand(session, wells, images), *notes]
        # A file that was not seen has no part in the content of its image, unless that is null.
        completed = (
            select(ImageFile.image_id)
            .join(Image, Image.id == ImageFile.image_id)
            .where(_within(ImageFile.id, ranges["image_files"]), Image.id.not_in(images))
            .where(or_(ImageFile.sha256.is_not(None), Image.content_sha256.is_(None)))
        )
        partly = set(session.scalars(completed.distinct()))
        segmented = select(Segmentation.image_id).where(Segmentation.run_id == found.id)
        of_run = select(Event.row_id).where(Event.run_id == found.id, Event.old.is_not(None))
        labelled = of_run.where(Event.table_name == "wells")  # by a plate map
        for about in (
            images,
            segmented.distinct(),
            select(Image.id).where(Image.well_id.in_(labelled)),
        ):
            concerned = _concerned(session, about)
            if concerned["images"]:
                break
        deletion = _Deletion(session)
        features = deletion.of_files(FeatureFile.run_id == found.id, with_sets=True)
        deletion.of(Segmentation, mine)
        deletion.of(Image, _within(Image.id, ranges["images"]))
        deletion.of(ImageFile, _within(ImageFile.id, ranges["image_files"]))
        if partly:
            from .ingest.ingest_images import write_contents  # it reads images: slow to import

            for some in in_lists(partly):
                write_contents(session, some)
        deletion.of(Well, _within(Well.id, ranges["wells"]))
        deletion.of(Plate, _within(Plate.id, ranges["plates"]))
        changes = [*deletion.changes, *_restore(session, restored)]
        changes += _delete_unused_treatments(session, ranges)
        files.extend(deletion.unused_files())
        before, found.status = Status(found.status), Status.CANCELLED
        found.error = f"{_UNDONE} {reason}" if reason else _UNDONE
        status = Change("runs", found.id, {"status": before.value}, {"status": found.status.value})
        rows = [_shown_change(session, change) for change in changes]
        return Correction(
            "undo", f"run {found.id}", (*rows, *features), **concerned, notes=tuple(notes)
        ), [*changes, status]

    return carry_out(workspace, reason, dry_run, act, files)


def delete_plate(
    workspace: Workspace, name: str, *, reason: str | None = None, dry_run: bool = False
) -> Correction:
    """Delete a plate with its wells, images, cells and measurements; to undo it, ingest it again.

    Image files stay where they are. Measurements in files that hold other plates, too, stay there.

    Raises:
        UnknownNameError: there is no such plate.
        UserInputError: predictions or splits rely on it; the message names them.
    """
    files: list[str] = []

    def act(session: Session) -> tuple[Correction, list[Change]]:
        plate = find_plate(session, readable(name))
        images = _images_of(Level.PLATE, plate)
        segmentations = select(Segmentation.id).where(Segmentation.image_id.in_(images))
        _refuse_if(
            _relying(session, images, segmentations, None), f"Plate {name} cannot be deleted"
        )
        notes = _corrected_by_hand(session, select(Well.id).where(Well.plate_id == plate), images)
        concerned = _concerned(session, images)
        deletion = _Deletion(session)
        with recording_removed(session, [images]):
            deletion.of(Plate, Plate.id == plate)
            # Measured sets stay: the next plate is measured into them.
            deletion.of_files(_of_deleted_cells(deletion.changes))
        files.extend(deletion.unused_files())
        *changes, own = deletion.changes
        changes.append(replace(own, old={**(own.old or {}), "barcode": name}))
        shown = tuple(_shown_change(session, change) for change in changes)
        done = Correction("delete plate", name, shown, **concerned, notes=tuple(notes))
        return done, changes

    return carry_out(workspace, reason, dry_run, act, files)


_UNDONE = "Undone."


def _check_undoable(session: Session, run: Run) -> Ranges:
    """Return the new rows of an ingest run by table, as ranges of ids.

    Raises:
        UserInputError: the run cannot be undone, whatever relies on it.
    """
    if run.stage is not Stage.INGEST:
        raise UserInputError(
            f"Run {run.id} is a {Stage(run.stage).value} run. Only ingest runs are undone; results "
            "of other runs stand beside each other. To keep images out: cellstore exclude"
        )
    if run.status is Status.RUNNING:
        raise UserInputError(f"Run {run.id} is running. Stop it first: cellstore cancel {run.id}")
    if (run.error or "").startswith(_UNDONE):
        raise UserInputError(f"Run {run.id} was undone already.")
    query = select(Event.table_name, Event.new).where(Event.run_id == run.id, Event.old.is_(None))
    ranges: dict[str, list[tuple[int, int]]] = {table: [] for table in _BROUGHT}
    for table, new in session.execute(query.where(Event.table_name.in_(_BROUGHT))):
        if new and "first_id" in new:
            ranges[table].append((new["first_id"], new["last_id"]))
    return ranges


def _within(column: Any, ranges: Sequence[tuple[int, int]]) -> Any:
    return or_(false(), *(column.between(first, last) for first, last in ranges))


def _corrected_by_hand(session: Session, wells: Select[Any], images: Select[Any]) -> list[str]:
    """A note of the wells that people corrected, themselves or an image: that is lost with them."""
    of_image = select(Image.well_id).join(Event, Event.row_id == Image.id)
    of_image = of_image.where(Event.table_name == "images", Image.id.in_(images))
    of_well = select(Well.id).join(Event, Event.row_id == Well.id)
    of_well = of_well.where(Event.table_name == "wells", Well.id.in_(wells))
    by_hand = (Event.run_id.is_(None), Event.old.is_not(None), Event.new.is_not(None))
    found = session.scalars(of_well.where(*by_hand).union(of_image.where(*by_hand))).all()
    if not found:
        return []
    names = some_of([name_of(session, "wells", number) for number in sorted(found)])
    return [f"Corrected or excluded by hand: {names}. Do that again if the images come back."]


Relying = dict[str, str]
"""Later work that relies on something, with the command that takes it back, if there is one."""

_EXCLUDE = "cellstore exclude plate PLATE --reason TEXT"


def _refuse_if(relying: Relying, refused: str) -> None:
    if relying:
        names = list(relying)
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        commands = dict.fromkeys(command for command in relying.values() if command)
        last = commands.pop(_EXCLUDE, "") is None
        lines = [
            f"{refused}. Nothing was changed. Later work relies on it:",
            f"{', '.join(names[:_NAMED])}{more}.",
        ]
        if commands:
            lines += ["Take that back first, in this order:", *(f"  {item}" for item in commands)]
        if last:
            lines += ["To let a plate count nowhere instead:", f"  {_EXCLUDE}"]
        raise UserInputError("\n".join(lines))


def _undo_of(runs: Iterable[tuple[int, str]]) -> Relying:
    """What runs did, the last first: so they have to be undone."""
    by_run = sorted(runs, key=lambda item: -item[0])
    return {text: f"cellstore undo {number}" for number, text in by_run}


def _references(table: Any) -> Iterator[Any]:
    """The columns of all tables that refer to rows of a table, both as the classes have them."""
    for other in _CLASSES.values():
        for key in other.__table__.foreign_keys:
            if key.column.table is table.__table__:
                yield getattr(other, key.parent.name)


def _relying(
    session: Session, images: Select[Any], segmentations: Select[Any], run_id: int | None
) -> Relying:
    """What relies on images and segmentations: predictions, splits, and other runs than ``run_id``.

    Without ``run_id`` only predictions and splits: the rest can be made again.
    """
    cells = select(Cell.id).where(Cell.segmentation_id.in_(segmentations))
    made_by = {
        column.class_: select(column.class_.run_id).where(column.in_(ids))
        for table, ids in ((Image, images), (Cell, cells))
        for column in _references(table)
        if hasattr(column.class_, "run_id")
    }
    predicted = union(*(made_by.pop(table) for table in (Prediction, ImagePrediction)))
    runs = sorted(session.scalars(predicted))
    found = {f"predictions of run {number}": _EXCLUDE for number in runs}
    splits = select(Split.name, Split.frozen_at)
    splits = splits.join(SplitMember, SplitMember.split_id == Split.id)
    splits = splits.where(SplitMember.image_id.in_(images)).distinct().order_by(Split.name)
    for name, frozen_at in session.execute(splits):
        free = f"cellstore split delete {shlex.quote(name)}"
        found[f"split {name}"] = _EXCLUDE if frozen_at else free
    if run_id is None:
        return found
    recipes = select(Segmentation.recipe_id).where(Segmentation.run_id == run_id)
    first, last = session.execute(
        select(func.min(Cell.id), func.max(Cell.id)).where(Cell.id.in_(cells))
    ).one()
    in_files = (
        select(FeatureFile.run_id)  # each is of cells that one ingest has brought
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .join(RecipeInput, RecipeInput.recipe_id == FeatureSet.recipe_id)
        .where(RecipeInput.input_id.in_(recipes))
        .where(FeatureFile.first_cell_id <= (last or 0), FeatureFile.last_cell_id >= (first or 0))
    )
    of_recipes = (
        select(Run.id)
        .join(RecipeInput, RecipeInput.recipe_id == Run.recipe_id)
        .where(RecipeInput.input_id.in_(recipes), Run.id > run_id)
    )
    queries: list[Any] = [*made_by.values(), in_files, of_recipes]
    numbers = {number for query in queries for number in session.scalars(query.distinct())}
    stages = select(Run.id, Run.stage).where(Run.id.in_(numbers - {run_id})).order_by(Run.id)
    plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
    plates = plates.join(Image, Image.well_id == Well.id).where(Image.id.in_(images)).distinct()
    gone = [
        f"cellstore delete plate {shlex.quote(name)}"
        for name in session.scalars(plates.order_by(Plate.barcode).limit(_NAMED))
    ]
    for number, stage in session.execute(stages):
        name = f"{Stage(stage).value} run {number}"
        if stage is Stage.INGEST:
            found |= _undo_of([(number, name)])
        else:  # what it made goes with its plates
            found[name] = "; ".join(gone)
    return found


def _relying_on_rows(session: Session, run_id: int, ranges: Ranges) -> Relying:
    """Which other ingests put files to images, images into wells, or wells onto plates of a run."""
    found = list[tuple[int, str]]()
    of: Any
    for of in (ImageFile.image_id, Image.well_id, Well.plate_id):
        table, (key,) = of.class_, of.expression.foreign_keys
        mine = _within(of, ranges[key.column.table.name])
        theirs = ~_within(table.id, ranges[table.__tablename__])
        row_id = session.scalar(select(table.id).where(mine, theirs).limit(1))
        if row_id is not None:
            made = select(Event.run_id).where(
                Event.table_name == table.__tablename__, Event.row_id >= row_id
            )
            by = session.scalar(made.where(Event.old.is_(None)).order_by(Event.row_id).limit(1))
            name = name_of(session, table.__tablename__, row_id)
            found.append((by or 0, f"ingest run {by} brought {name}"))
    labelled = select(Event.run_id).where(
        Event.table_name == "wells",
        Event.row_id.in_(select(Well.id).where(_within(Well.id, ranges["wells"]))),
        Event.run_id != run_id,
        Event.old.is_not(None),
        Event.run_id.in_(select(Run.id).where(Run.status != Status.CANCELLED)),
    )
    for number in session.scalars(labelled.distinct()):
        found.append((number or 0, f"ingest run {number} corrected its wells"))
    return _undo_of(found)


def _restorable(session: Session, run_id: int) -> tuple[list[Change], Relying, list[str]]:
    """What a run changed of rows that were there before it: its events, the last first.

    Returns also the runs that changed the same since, and a note of what people corrected since.
    """
    query = select(Event).where(Event.run_id == run_id, Event.old.is_not(None))
    query = query.where(Event.new.is_not(None), Event.table_name != "runs")
    changes, later, kept = [], dict[tuple[int, str], None](), dict[str, None]()
    present: dict[tuple[str, int], dict[str, Any]] = {}
    corrected: dict[tuple[str, int], set[str]] = {}
    for row in session.scalars(query.order_by(Event.id.desc())):
        table, old, new = METADATA.tables[row.table_name], row.old or {}, row.new or {}
        change = Change(row.table_name, row.row_id, row.old, row.new)
        if row.row_id is None:
            changes.append(change)
            continue
        key = row.table_name, row.row_id
        if key not in present:
            same = select(table).where(table.c.id == row.row_id)
            present[key] = dict(session.execute(same).mappings().first() or {})
        if not present[key]:  # deleted since, with its plate
            continue
        by_hand = corrected.setdefault(key, set())
        for name, value in new.items():
            if name not in table.c or name in by_hand or present[key][name] == value:
                continue
            since = select(Run.id, Event.new).join(Run, Run.id == Event.run_id)
            since = since.where(Event.table_name == row.table_name, Event.row_id == row.row_id)
            since = since.where(Event.id > row.id, Run.status != Status.CANCELLED)
            found = session.execute(since.order_by(Event.id.desc()))
            by = next((run for run, values in found if name in (values or {})), None)
            called = name_of(session, row.table_name, row.row_id)
            if by is None:
                by_hand.add(name)
                kept[called] = None
            else:
                later[by, f"ingest run {by} changed {called} again"] = None
        if "treatment_id" in by_hand:
            by_hand.add("treatment")  # its name
        if by_hand:
            old, new = ({k: v for k, v in some.items() if k not in by_hand} for some in (old, new))
        if old or new:
            changes.append(replace(change, old=old, new=new))
        present[key] |= row.old or {}
    notes = [f"Corrected by hand since, and kept: {some_of(sorted(kept))}."] if kept else []
    return changes, _undo_of(later), notes


def _restore(session: Session, changes: Sequence[Change]) -> list[Change]:
    """Put the old values of events back; return the events of that."""
    for change in changes:
        old, table = change.old or {}, METADATA.tables[change.table_name]
        values = {name: value for name, value in old.items() if name in table.c}
        ids = old["ids"] if change.row_id is None else [change.row_id]
        for some in in_lists(ids):
            session.execute(update(table).where(table.c.id.in_(some)).values(values))
        if change.table_name == "perturbations" and "target" in old:
            retarget(session, change.row_id or 0)
    return [replace(c, old=c.new, new=c.old, line=None) for c in changes]


def _delete_unused_treatments(session: Session, ranges: Ranges) -> list[Change]:
    """Delete treatments and perturbations of a run that no well or score has; return the events."""
    deletion = _Deletion(session)
    has = or_(*(exists().where(t.treatment_id == Treatment.id) for t in (Well, TreatmentScore)))
    deletion.of(Treatment, and_(_within(Treatment.id, ranges["treatments"]), ~has))
    has_part = exists().where(TreatmentPart.perturbation_id == Perturbation.id)
    described = exists().where(Event.table_name == "perturbations", Event.row_id == Perturbation.id)
    mine = _within(Perturbation.id, ranges["perturbations"])
    deletion.of(Perturbation, and_(mine, ~has_part, ~described))
    return [replace(change, row_id=None) for change in deletion.changes]


def _shown_change(session: Session, change: Change) -> dict[str, Any]:
    """A change as people see it: the name of the row, or how many rows are deleted."""
    hidden = ("first_id", "ids", "treatment_id")
    old, new = (
        None if values is None else {k: v for k, v in values.items() if k not in hidden}
        for values in (change.old, change.new)
    )
    row_id = None if new is None else change.row_id
    return {"name": name_of(session, change.table_name, row_id), "old": old, "new": new}


class _Deletion:
    """Deletes rows, with all rows that belong to them.

    ``changes`` are the events of it. What was written for them is named by :meth:`unused_files`.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.changes: list[Change] = []
        self.artifacts: set[int] = set()

    def of(self, table: Any, which: Any) -> None:
        """Delete the rows of a table that meet a condition."""
        for column in _references(table):
            if not column.expression.nullable and column.class_ not in _STAYING:
                self.of(column.class_, column.in_(select(table.id).where(which)))
        for column in _references(Artifact):
            if column.class_ is table:
                found = self.session.scalars(select(column).where(which).distinct())
                self.artifacts |= {number for number in found if number is not None}
        if table is Cell or table.__tablename__ in _BROUGHT[1:]:
            self._record(table, which)
        options = {"synchronize_session": False}
        self.session.execute(delete(table).where(which), execution_options=options)

    def _record(self, table: Any, which: Any) -> None:
        """Keep the event of a deletion, and take back what people said of the rows."""
        session, name = self.session, table.__tablename__
        counted = select(func.count(), func.min(table.id), func.max(table.id)).where(which)
        number, first, last = session.execute(counted).one()
        if not number:
            return
        for level in (level for level in Level if level.value == name[:-1]):
            said = (Annotation.level == level, Annotation.row_id.in_(select(table.id).where(which)))
            for row in session.scalars(select(Annotation).where(*said, stands(Annotation))).all():
                session.add(undoing(row, "deleted"))
        session.flush()
        old = {"rows": number, "first_id": first}
        if table is Cell:  # files of measurements may keep these, and cells of others lie between
            order = (table.id - func.row_number().over(order_by=table.id)).label("island")
            each = select(table.id, order).where(which).subquery()
            bounds = select(func.min(each.c.id), func.max(each.c.id)).group_by(each.c.island)
            old["ids"] = sorted([*row] for row in session.execute(bounds))
        self.changes.append(Change(name, last, old, None))

    def of_files(self, which: Any, *, with_sets: bool = False) -> list[dict[str, Any]]:
        """Delete feature files; ``with_sets``: the sets, too, that have no other file, returned."""
        session, shown = self.session, []
        of_file = and_(
            FeatureFile.artifact_id == RunArtifact.artifact_id,
            FeatureFile.run_id == RunArtifact.run_id,
        )
        query = select(FeatureSet).join(FeatureFile).where(which).distinct()
        sets = session.scalars(query.with_only_columns(FeatureSet.id)).all() if with_sets else ()
        self.of(RunArtifact, exists().where(of_file, which))
        self.of(FeatureFile, which)
        others = exists().where(FeatureFile.feature_set_id == FeatureSet.id)
        for kept in session.scalars(select(FeatureSet).where(FeatureSet.id.in_(sets), ~others)):
            shown.append({"name": "feature_sets", "old": {"name": kept.name}, "new": None})
            session.delete(kept)
        session.flush()
        return shown

    def unused_files(self) -> list[str]:
        """Delete the artifacts of what was deleted that nothing names any more; their paths."""
        paths: list[str] = []
        named = or_(*(exists().where(column == Artifact.id) for column in _references(Artifact)))
        for some in in_lists(self.artifacts):
            query = select(Artifact.id, Artifact.path).where(Artifact.id.in_(some), ~named)
            unused = self.session.execute(query).all()
            ids = [row.id for row in unused]
            self.session.execute(delete(Artifact).where(Artifact.id.in_(ids)))
            paths += [row.path for row in unused]
        return paths


def _of_deleted_cells(changes: Sequence[Change]) -> Any:
    """The condition on a feature file that it has cells just deleted, and none that are left."""
    left = (
        exists()
        .where(Cell.id.between(FeatureFile.first_cell_id, FeatureFile.last_cell_id))
        .where(Segmentation.id == Cell.segmentation_id)
        .where(RecipeInput.input_id == Segmentation.recipe_id)
        .where(RecipeInput.recipe_id == FeatureSet.recipe_id)
        .where(FeatureSet.id == FeatureFile.feature_set_id)
        .correlate(FeatureFile)
    )
    touched = (
        and_(
            FeatureFile.first_cell_id <= change.row_id,
            FeatureFile.last_cell_id >= (change.old or {})["first_id"],
        )
        for change in changes
        if change.table_name == "cells"
    )
    return and_(or_(false(), *touched), ~left)
