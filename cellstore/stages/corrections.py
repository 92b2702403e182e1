"""Putting things right: rename, relabel, exclude and include, undo and delete.

Each verb finds what is named, changes the rows in one transaction with an event for each (who,
when, why, from what to what), and is undone by its counterpart. A dry run does the same and then
takes the transaction back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, and_, delete, exists, false, func, or_, select, union, update
from sqlalchemy.orm import Session

from ..config import RunName
from ..db.bulk import in_lists, one_ingest_at_a_time
from ..db.events import (
    Change,
    caller,
    grown_digest,
    record_events,
    record_runs,
    recording_removed,
    table_digests,
)
from ..db.fields import stands
from ..enums import AnnotationKind, Control, Level, PerturbationKind, Stage, Status
from ..errors import UnknownNameError, UserInputError, some_of
from ..io.tables import MISSING, RowRefusedError
from ..io.treatments import TreatmentRecord, normalised_name
from ..jobs.lookup import (
    IN_RECIPES,
    channels_of_recipes,
    find_plate,
    find_run,
    find_well,
    name_of,
    readable,
    recipe_channels,
)
from ..jobs.workspace import Workspace
from ..models import (
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
    """Return the plates that changed, or wells of them; None: any, as rows were deleted."""
    if any(change.table_name == "runs" or "rows" in (change.old or {}) for change in changes):
        return None
    wells = [change.row_id for change in changes if change.table_name == "wells"]
    plates = [change.row_id for change in changes if change.table_name == "plates"]
    of_wells = session.scalars(select(Well.plate_id).where(Well.id.in_(wells)))
    return {plate for plate in (*plates, *of_wells) if plate is not None}


def concerned(
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


def images_of_level(level: Level, *ids: int) -> Select[Any]:
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
    """
    if kind not in ("plate", "channel"):
        raise UnknownNameError.of("thing to rename", kind, ("plate", "channel"))
    old, new = readable(old), name_given("name", new)
    if old == new:
        raise UserInputError(f"The {kind} is called {new} already.")
    if kind == "channel":
        return carry_out(workspace, reason, dry_run, lambda s: _rename_channel(s, old, new, plate))
    if plate is not None or "/" in new:
        raise UserInputError("The name of a plate has no slash, and --plate is for channels only.")
    return carry_out(workspace, reason, dry_run, lambda s: _rename_plate(s, old, new))


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
        **concerned(session, images_of_level(Level.PLATE, plate)),
        notes=(f"Tables that name {old} are read as {new} from now on.",),
    )
    return found, [change]


def _rename_channel(
    session: Session, old: str, new: str, plate: str | None
) -> tuple[Correction, list[Change]]:
    def files(channel: str) -> Select[Any]:
        query = select(ImageFile.image_id).where(ImageFile.channel == channel)
        if plate is not None:
            on_plate = images_of_level(Level.PLATE, find_plate(session, readable(plate)))
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
    about = concerned(session, images)
    named, used = recipe_channels(session), channels_of_recipes(session)
    measured = set(session.scalars(select(ImageQuality.channel).distinct()))

    def kept(plate: int | None) -> dict[str, str]:
        """The name that recipes keep, if one has it and the channel can be told by it."""
        names = named.get(plate, named.get(None, {}))
        before = names.get(old, old)
        known = before.lower() in used or before in measured or new in names.values()
        return {IN_RECIPES: before} if known and before != new else {}

    # What was made of the image stays as it is: its bytes are the same.
    renaming = update(ImageFile).where(ImageFile.channel == old, ImageFile.image_id.in_(images))
    session.execute(renaming.values(channel=new), execution_options={"synchronize_session": False})
    changes = [
        Change("plates", p, {"channel": old}, {"channel": new, **kept(p)})
        for p in (*([None] if plate is None else []), *(p.id for p in plates))
    ]  # first that of plates that will come
    where = f" of plate {readable(plate)}" if plate is not None else ""
    note = f"Tables and folders{where} that name {old} are read as {new} from now on."
    shown = tuple(
        {"name": p.barcode, "old": {"channel": old}, "new": {"channel": new}} for p in plates
    )
    return Correction("rename channel", old, shown, **about, notes=(note,)), changes


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
    """
    if treatment is None and (dose is not None or control is None):
        raise UserInputError("Say what the well got: --treatment NAME, perhaps with --dose.")
    if control is not None and control not in (*Control, "none"):
        raise UnknownNameError.of("control", control, [*(c.value for c in Control), "none"])

    def act(session: Session) -> tuple[Correction, list[Change]]:
        row = session.get_one(Well, find_well(session, well))
        name = name_of(session, "wells", row.id)
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
        change = Change("wells", row.id, old, new)
        shown = (_shown_change(session, change),)
        about = concerned(session, images_of_level(Level.WELL, row.id))
        return Correction("relabel", name, shown, **about, notes=tuple(notes)), [change]

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
    name = name_given("treatment", name)
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
    for alike in known:
        if normalised_name(alike) == normalised_name(name):
            raise UserInputError(f"Unknown treatment {name!r}. Did you mean {alike}?")
    if " + " in name:
        raise UserInputError(
            f"No table has named the combination {name!r}. Give it in a plate map, and ingest that."
        )
    notes.append(f"{name} is new: no table has named it. It is kept as a compound.")
    return TreatmentRecord(PerturbationKind.COMPOUND, name)


# ---- What people say ----


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
    """What a person says (by default: who runs this process, now); ``undoes_id``: or takes back."""
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
    """
    files: list[str] = []

    def act(session: Session) -> tuple[Correction, list[Change]]:
        found = find_run(session, run)
        ranges = _check_undoable(session, found)
        images = select(Image.id).where(_within(Image.id, ranges["images"]))
        mine = or_(Segmentation.run_id == found.id, Segmentation.image_id.in_(images))
        restored, later, notes = _restorable(session, found.id)
        relying = _relying(session, images, select(Segmentation.id).where(mine), found.id)
        relying += [*later, *_relying_on_rows(session, found.id, ranges)]
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
        brought = _within(Image.id, ranges["images"])
        touched = or_(brought, Image.id.in_(segmented), Image.well_id.in_(labelled))
        about = concerned(session, select(Image.id).where(touched))
        deletion = _Deletion(session)
        features = deletion.of_files(FeatureFile.run_id == found.id, with_sets=True)
        deletion.of(Segmentation, mine)
        deletion.of(Image, brought)
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
            "undo", f"run {found.id}", (*rows, *features), **about, notes=tuple(notes)
        ), [*changes, status]

    return carry_out(workspace, reason, dry_run, act, files)


def delete_plate(
    workspace: Workspace, name: str, *, reason: str | None = None, dry_run: bool = False
) -> Correction:
    """Delete a plate with its wells, images, cells and measurements; to undo it, ingest it again.

    Image files stay where they are. Measurements in files that hold other plates, too, stay there.
    """
    files: list[str] = []

    def act(session: Session) -> tuple[Correction, list[Change]]:
        plate = find_plate(session, readable(name))
        images = images_of_level(Level.PLATE, plate)
        segmentations = select(Segmentation.id).where(Segmentation.image_id.in_(images))
        _refuse_if(
            _relying(session, images, segmentations, None), f"Plate {name} cannot be deleted"
        )
        notes = _corrected_by_hand(session, select(Well.id).where(Well.plate_id == plate), images)
        about = concerned(session, images)
        deletion = _Deletion(session)
        with recording_removed(session, [images]):
            deletion.of(Plate, Plate.id == plate)
            # Measured sets stay: the next plate is measured into them.
            deletion.of_files(_of_deleted_cells(deletion.changes))
        files.extend(deletion.unused_files())
        *changes, own = deletion.changes
        changes.append(replace(own, old={**(own.old or {}), "barcode": name}))
        shown = tuple(_shown_change(session, change) for change in changes)
        done = Correction("delete plate", name, shown, **about, notes=tuple(notes))
        return done, changes

    return carry_out(workspace, reason, dry_run, act, files)


_UNDONE = "Undone."


def _check_undoable(session: Session, run: Run) -> Ranges:
    """Return the new rows of an ingest run by table, as ranges of ids."""
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
    """A note of the wells and images that people corrected: that is lost with them."""
    by_hand = select(Event.table_name, Event.row_id).distinct()
    by_hand = by_hand.where(Event.run_id.is_(None), Event.old.is_not(None), Event.new.is_not(None))
    of_wells = and_(Event.table_name == "wells", Event.row_id.in_(wells))
    of_images = and_(Event.table_name == "images", Event.row_id.in_(images))
    found = session.execute(by_hand.where(or_(of_wells, of_images)))
    names = sorted(name_of(session, *row) for row in found)
    if not names:
        return []
    return [
        f"Corrected or excluded by hand: {some_of(names)}. Do that again if the images come back."
    ]


def _refuse_if(relying: Sequence[str], refused: str) -> None:
    if relying:
        raise UserInputError(
            f"{refused}. Nothing was changed. Later work relies on it: {some_of(relying)}.\n"
            "Undo later ingest runs first (cellstore undo RUN), and delete splits (cellstore split "
            "delete NAME) and plates (cellstore delete plate NAME) that were made of it. What "
            "predictions rely on stays; to let it count nowhere: cellstore exclude plate NAME"
        )


def _references(table: Any) -> Iterator[Any]:
    """The columns of all tables that refer to rows of a table, both as the classes have them."""
    for mapper in Base.registry.mappers:
        for key in mapper.local_table.foreign_keys:
            if key.column.table is table.__table__:
                yield getattr(mapper.class_, key.parent.name)


def _relying(
    session: Session, images: Select[Any], segmentations: Select[Any], run_id: int | None
) -> list[str]:
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
    found = [f"predictions of run {number}" for number in sorted(session.scalars(predicted))]
    splits = select(Split.name).join(SplitMember, SplitMember.split_id == Split.id)
    splits = splits.where(SplitMember.image_id.in_(images)).distinct().order_by(Split.name)
    found += [f"split {name}" for name in session.scalars(splits)]
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
    runs = select(Run.stage, Run.id).where(Run.id.in_(numbers - {run_id})).order_by(Run.id.desc())
    return found + [f"{Stage(stage).value} run {number}" for stage, number in session.execute(runs)]


def _relying_on_rows(session: Session, run_id: int, ranges: Ranges) -> list[str]:
    """Which other ingests put files to images, images into wells, or wells onto plates of a run."""
    found = list[str]()
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
            found.append(f"ingest run {by} brought {name}")
    labelled = select(Event.run_id).where(
        Event.table_name == "wells",
        Event.row_id.in_(select(Well.id).where(_within(Well.id, ranges["wells"]))),
        Event.run_id != run_id,
        Event.old.is_not(None),
        Event.run_id.in_(select(Run.id).where(Run.status != Status.CANCELLED)),
    )
    numbers = session.scalars(labelled.distinct().order_by(Event.run_id.desc()))
    return found + [f"ingest run {number} corrected its wells" for number in numbers]


def _restorable(session: Session, run_id: int) -> tuple[list[Change], list[str], list[str]]:
    """What a run changed of rows that were there before it: its events, the last first.

    Returns also the runs that changed the same since, and a note of what people corrected since.
    """
    query = select(Event).where(Event.run_id == run_id, Event.old.is_not(None))
    query = query.where(Event.new.is_not(None), Event.table_name != "runs")
    changes, later, kept = [], set[tuple[int, str]](), set[str]()
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
                kept.add(called)
            else:
                later.add((by, f"ingest run {by} changed {called} again"))
        if "treatment_id" in by_hand:
            by_hand.add("treatment")  # its name
        if by_hand:
            old, new = ({k: v for k, v in some.items() if k not in by_hand} for some in (old, new))
        if old or new:
            changes.append(replace(change, old=old, new=new))
        present[key] |= row.old or {}
    notes = [f"Corrected by hand since, and kept: {some_of(sorted(kept))}."] if kept else []
    return changes, [entry for _, entry in sorted(later, reverse=True)], notes


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
            entry = (
                Annotation.level == level,
                Annotation.row_id.in_(select(table.id).where(which)),
            )
            for row in session.scalars(select(Annotation).where(*entry, stands(Annotation))).all():
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
