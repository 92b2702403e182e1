"""What a name is the name of, where nobody says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..db.fields import wells_changed
from ..enums import TARGET, ArtifactKind, Control, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import (
    RUN_WORDS,
    find_image,
    find_well,
    hex_start,
    looks_like_well,
    neighbours,
    readable,
    run_in,
    starts_with,
)
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    CellFlag,
    Event,
    FeatureFile,
    FeatureSet,
    Image,
    ImageFile,
    ImageFlag,
    IngestFile,
    Job,
    Label,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    Well,
)


@dataclass(frozen=True)
class FileFact:
    """A file of an image; no ``sha256``: it has not been found yet."""

    channel: str
    name: str
    uri: str | None
    sha256: str | None
    size_bytes: int | None


@dataclass(frozen=True)
class SegmentationFact:
    """The cells of an image. ``current``: the image still has the bytes they were found in.

    Of what another tool found, ``imported`` names the tool; ``diameter`` may be unknown (null),
    and ``has_masks`` says whether the masks are known.
    """

    id: int
    run_id: int
    recipe_id: int
    fingerprint: str
    weights_sha256: str | None
    parameters: dict[str, Any]
    made_at: str
    n_cells: int
    diameter: float | None
    current: bool
    has_masks: bool
    imported: str | None


@dataclass(frozen=True)
class LabelVotes:
    """How many cells chose a label first, and the sum of the probabilities that all gave it."""

    label: str
    cells: int
    probability: float


@dataclass(frozen=True)
class Labelling:
    """What one predict run said about an image.

    ``winner`` is the label of the hard vote, ``soft_winner`` of the summed probabilities, ``tie``
    whether the hard vote was a draw. ``side`` is the image's side of the split (``outside``: not
    in it), ``well_sides`` all sides on which this well has images.
    """

    run_id: int
    started_at: str
    user: str
    host: str
    code_version: str
    train_run_id: int | None
    checkpoints: tuple[str, ...]
    split: str | None
    protocol: str | None
    side: str
    well_sides: tuple[str, ...]
    well_in_training: bool
    segmentation_ids: tuple[int, ...]
    segment_recipes: tuple[int, ...]
    segment_weights: tuple[str, ...]
    n_cells: int
    votes: tuple[LabelVotes, ...]
    winner: str
    soft_winner: str
    tie: bool
    truth: str | None
    correct: bool | None


@dataclass(frozen=True)
class TreatmentFact:
    """What was done to a well, in a few words."""

    kind: str
    name: str
    target: str | None
    control: str | None
    identifier: str | None


@dataclass(frozen=True)
class TreatmentChange:
    """A file said something else of a well than was known; ``old`` is null where nothing was."""

    old: TreatmentFact | None
    new: TreatmentFact | None
    changed_at: str
    run_id: int | None
    file: str
    line: int | None


@dataclass(frozen=True)
class FrozenLabel:
    """The label that a split keeps, and what the well has ``now`` in the same field.

    ``since``: the last change of that field, where the two differ.
    """

    split: str
    field: str
    side: str
    label: str
    now: str | None
    differs: bool
    since: TreatmentChange | None


@dataclass(frozen=True)
class WellAudit:
    """All that is known about what a well got. ``images`` are ids."""

    well_id: int
    plate: str
    well: str
    treatment: TreatmentFact | None
    history: tuple[TreatmentChange, ...]
    images: tuple[int, ...]
    frozen_labels: tuple[FrozenLabel, ...]
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class FlagFact:
    """A quality-control run held an image or a cell to be odd.

    Its ``value`` is not from ``low`` to ``high``; ``channel`` is null where it is about the whole.
    """

    run_id: int
    reason: str
    channel: str | None
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Came:
    """Some of what came of something: ``count`` of ``what``, by ``runs``, or called ``names``."""

    what: str
    count: int
    runs: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageAudit:
    """All that is known about an image and the labels it got; ``flags`` of every finished run.

    ``came``: what came of it, counted.
    """

    image_id: int
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    core_name: str
    content_sha256: str | None
    treatment: str | None
    target: str | None
    control: str | None
    treatment_history: tuple[TreatmentChange, ...]
    frozen_labels: tuple[FrozenLabel, ...]
    files: tuple[FileFact, ...]
    missing_files: int
    segmentations: tuple[SegmentationFact, ...]
    labellings: tuple[Labelling, ...]
    flags: tuple[FlagFact, ...] = ()
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One choice of a cell in one predict run."""

    run_id: int
    rank: int
    label: str
    probability: float


@dataclass(frozen=True)
class CellAudit:
    """All that is known about a cell. ``box`` is min row, min col, max row, max col (half open).

    ``box`` and ``centroid`` are null where another tool found the cell and does not say.
    """

    cell_id: int
    image: str
    image_id: int
    label: int
    box: tuple[int, int, int, int] | None
    centroid: tuple[float, float] | None
    excluded: str | None
    segmentation: SegmentationFact
    features: dict[str, dict[str, float | None]]
    choices: tuple[Choice, ...]
    flags: tuple[FlagFact, ...] = ()


@dataclass(frozen=True)
class RunFact:
    """One run in a few words."""

    id: int
    stage: str
    status: str
    started_at: str


@dataclass(frozen=True)
class RecipeFact:
    """One recipe in a few words."""

    id: int
    stage: str
    version: int
    fingerprint: str
    weights_sha256: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ArtifactFact:
    """A file that a run wrote or relies on."""

    kind: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class IngestFact:
    """A file that an ingest run read; ``rows`` is the sum of the four numbers after it."""

    name: str
    sha256: str
    layout: str
    rows: int
    created: int
    updated: int
    unchanged: int
    refused: int


@dataclass(frozen=True)
class RunAudit:
    """All that is known about a run. ``inputs`` are the recipes it reads from, all the way up.

    Of an ingest: ``ingested`` are the files it read, ``changed_wells`` counts the wells whose
    treatment it changed.
    """

    run: RunFact
    ended_at: str | None
    user: str
    host: str
    command: str
    code_version: str
    environment: dict[str, Any]
    seed: int | None
    query: str | None
    result: dict[str, Any] | None
    error: str | None
    recipe: RecipeFact
    inputs: tuple[RecipeFact, ...]
    parents: tuple[RunFact, ...]
    children: tuple[RunFact, ...]
    split: str | None
    split_counts: dict[str, int]
    jobs: dict[str, int]
    artifacts: tuple[ArtifactFact, ...]
    ingested: tuple[IngestFact, ...]
    changed_wells: int
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class KnownFile:
    """A file as the store knows it: what it is (``kind``), where, and of what.

    ``kind``: that of a stored artifact, or ``image file``, ``ingested table`` or ``weights``.
    ``key``: the id of its row; of weights that of the first recipe. ``runs`` wrote or read it.
    """

    kind: str
    key: int
    name: str
    place: str | None
    sha256: str
    size_bytes: int | None
    about: tuple[str, ...]
    runs: tuple[RunFact, ...]
    came: tuple[Came, ...]


@dataclass(frozen=True)
class ArtifactAudit:
    """What the store knows of a file. ``hashed``: the path of a file on disk that was looked up."""

    asked: str
    sha256: str
    hashed: str | None
    known: tuple[KnownFile, ...]


def image_flags(session: Session, image_id: int) -> tuple[FlagFact, ...]:
    """Return the flags of an image by every finished run."""
    flag = ImageFlag
    query = select(flag).where(flag.image_id == image_id)
    query = query.order_by(flag.run_id, flag.reason, flag.channel)
    return tuple(
        FlagFact(row.run_id, row.reason.value, row.channel or None, row.value, row.low, row.high)
        for row in session.scalars(_finished(query, flag))
    )


def cell_flags(session: Session, cell_id: int) -> tuple[FlagFact, ...]:
    """Return the flags of a cell by every finished run."""
    query = select(CellFlag).where(CellFlag.cell_id == cell_id)
    query = query.order_by(CellFlag.run_id, CellFlag.reason)
    return tuple(
        FlagFact(row.run_id, row.reason.value, None, row.value)
        for row in session.scalars(_finished(query, CellFlag))
    )


def _finished(query: Select[Any], flag: Any) -> Select[Any]:
    return query.join(Run, Run.id == flag.run_id).where(Run.status == Status.DONE)


def segmentations_of(session: Session, image: Image) -> tuple[SegmentationFact, ...]:
    """Return the segmentations of an image, the oldest first."""
    query = (
        select(Segmentation, Recipe)
        .join(Recipe, Recipe.id == Segmentation.recipe_id)
        .where(Segmentation.image_id == image.id)
        .order_by(Segmentation.id)
    )
    return tuple(
        segmentation_fact(found, recipe, image) for found, recipe in session.execute(query)
    )


def segmentation_fact(found: Segmentation, recipe: Recipe, image: Image) -> SegmentationFact:
    """Return a segmentation in a few words."""
    return SegmentationFact(
        id=found.id,
        run_id=found.run_id,
        recipe_id=recipe.id,
        fingerprint=recipe.fingerprint,
        weights_sha256=recipe.weights_sha256,
        parameters=recipe.parameters,
        made_at=found.created_at.isoformat(),
        n_cells=found.n_cells,
        diameter=found.diameter,
        # Unknown bytes count as current: nothing can contradict them.
        current=found.content_sha256 in (None, image.content_sha256),
        has_masks=found.mask_artifact_id is not None,
        imported=recipe.parameters.get("imported"),
    )


def audit_cell(workspace: Workspace, cell_id: int) -> CellAudit:
    """Return a cell, its masks, its measurements and what every run said about it.

    Raises:
        UnknownNameError: there is no such cell.
    """
    with workspace.database.read() as session:
        cell = session.get(Cell, cell_id)
        if cell is None:
            raise UnknownNameError(
                f"There is no cell {cell_id}. See which there are with: "
                "cellstore sql 'FROM cells LIMIT 5'"
            )
        found = session.get_one(Segmentation, cell.segmentation_id)
        image = session.get_one(Image, found.image_id)
        well = session.get_one(Well, image.well_id)
        recipe = session.get_one(Recipe, found.recipe_id)
        return CellAudit(
            cell_id=cell.id,
            image=f"{session.get_one(Plate, well.plate_id).barcode}/{image.core_name}",
            image_id=image.id,
            label=cell.object_number,
            box=_box(cell),
            centroid=_centroid(cell),
            excluded=cell.excluded,
            segmentation=segmentation_fact(found, recipe, image),
            features=_features(session, cell.id),
            choices=_choices(session, cell.id),
            flags=cell_flags(session, cell.id),
        )


def _box(cell: Cell) -> tuple[int, int, int, int] | None:
    first, last = (cell.min_row, cell.min_col), (cell.max_row, cell.max_col)
    if first[0] is None or first[1] is None or last[0] is None or last[1] is None:
        return None
    return first[0], first[1], last[0], last[1]


def _centroid(cell: Cell) -> tuple[float, float] | None:
    if cell.centroid_row is None or cell.centroid_col is None:
        return None
    return cell.centroid_row, cell.centroid_col


def _features(session: Session, cell_id: int) -> dict[str, dict[str, float | None]]:
    keys = ("cell_id", "recipe_id", "run_id")
    names = [column.name for column in CellFeatures.__table__.columns if column.name not in keys]
    query = select(CellFeatures).where(CellFeatures.cell_id == cell_id)
    return {
        f"recipe {row.recipe_id}": {name: getattr(row, name) for name in names}
        for row in session.scalars(query.order_by(CellFeatures.recipe_id))
    }


def _choices(session: Session, cell_id: int) -> tuple[Choice, ...]:
    query = (
        select(Prediction.run_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.cell_id == cell_id)
        .order_by(Prediction.run_id, Prediction.rank)
    )
    return tuple(Choice(*row) for row in session.execute(query))


def came_of_images(session: Session, images: Select[int]) -> tuple[Came, ...]:
    """Return what came of some images, a query of their ids."""
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images))
    found = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(found.where(Segmentation.image_id.in_(images))).one()
    by = select(Segmentation.run_id).where(Segmentation.image_id.in_(images)).distinct()
    runs = tuple(sorted(session.scalars(by)))
    made = [Came("segmentations", n_found, runs), Came("cells", n_cells or 0)]
    made += [_measured(session, cells), *_measured_beside(session, images)]
    made += _splits(session, images)
    return _some([*made, *_labelled(session, cells)])


def _measured(session: Session, cells: Select[int]) -> Came:
    """Cells with built-in measurements."""
    query = select(CellFeatures.run_id, func.count()).where(CellFeatures.cell_id.in_(cells))
    rows = session.execute(query.group_by(CellFeatures.run_id)).all()
    return Came("measured cells", sum(n for _, n in rows), tuple(sorted(run for run, _ in rows)))


def _measured_beside(session: Session, images: Select[int]) -> list[Came]:
    """Feature sets in files that were measured on the images."""
    query = (
        select(FeatureSet.name, Job.run_id)
        .join(FeatureSet, FeatureSet.recipe_id == Job.recipe_id)
        .where(Job.image_id.in_(images), Job.status == Status.DONE)
        .distinct()
    )
    rows = session.execute(query).all()
    names, runs = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    return [Came("feature sets", len(names), tuple(runs), tuple(names))]


def _splits(session: Session, images: Select[int]) -> list[Came]:
    query = (
        select(Split.id, Split.name)
        .join(SplitMember, SplitMember.split_id == Split.id)
        .where(SplitMember.image_id.in_(images))
        .distinct()
    )
    rows = sorted(session.execute(query).all())
    trained = select(Run.id).where(Run.split_id.in_([row[0] for row in rows]))
    runs = tuple(session.scalars(trained.where(Run.stage == Stage.TRAIN).order_by(Run.id)))
    return [
        Came("splits", len(rows), names=tuple(row[1] for row in rows)),
        Came("trainings on these splits", len(runs), runs),
    ]


def _labelled(session: Session, cells: Select[int]) -> list[Came]:
    query = select(Prediction.run_id, func.count())
    query = query.where(Prediction.cell_id.in_(cells), Prediction.rank == 1)
    rows = session.execute(query.group_by(Prediction.run_id)).all()
    return [Came("labelled cells", sum(n for _, n in rows), tuple(sorted(run for run, _ in rows)))]


def came_of_recipes(session: Session, recipe_ids: Collection[int]) -> tuple[Came, ...]:
    """Return what came of some recipes, and of those that read what they wrote."""
    below = recipes_below(session, recipe_ids)
    runs = select(Run.stage, Run.id).where(Run.recipe_id.in_(below)).order_by(Run.id)
    by_stage: dict[Stage, list[int]] = {}
    for stage, run_id in session.execute(runs):
        by_stage.setdefault(Stage(stage), []).append(run_id)
    made = [_segmented(session, below), _cells(session, below), _sets(session, below)]
    for stage in (Stage.SPLIT, Stage.TRAIN, Stage.PREDICT):
        found = tuple(by_stage.get(stage, ()))
        made.append(Came(f"{stage.value} runs", len(found), found))
    return _some([*made, _images_labelled(session, by_stage.get(Stage.PREDICT, ()))])


def recipes_below(session: Session, recipe_ids: Collection[int]) -> list[int]:
    """Return the ids of recipes and of all that read from them, however indirectly."""
    found = set(recipe_ids)
    level = set(recipe_ids)
    while level:
        query = select(RecipeInput.recipe_id).where(RecipeInput.input_id.in_(level))
        level = set(session.scalars(query)) - found
        found |= level
    return sorted(found)


def _segmented(session: Session, recipes: Collection[int]) -> Came:
    by = select(Run.id).where(Run.recipe_id.in_(recipes), Run.stage == Stage.SEGMENT)
    runs = tuple(session.scalars(by.order_by(Run.id)))
    query = select(func.count()).where(Segmentation.recipe_id.in_(recipes))
    return Came("segmentations", session.scalar(query) or 0, runs)


def _cells(session: Session, recipes: Collection[int]) -> Came:
    query = select(func.sum(Segmentation.n_cells)).where(Segmentation.recipe_id.in_(recipes))
    return Came("cells", session.scalar(query) or 0)


def _sets(session: Session, recipes: Collection[int]) -> Came:
    query = select(FeatureSet.name).where(FeatureSet.recipe_id.in_(recipes))
    names = tuple(session.scalars(query.order_by(FeatureSet.id)))
    return Came("feature sets", len(names), names=names)


def _images_labelled(session: Session, runs: Iterable[int]) -> Came:
    query = select(func.count()).where(Job.run_id.in_(list(runs)), Job.status == Status.DONE)
    return Came("images labelled", session.scalar(query) or 0)


def came_of_runs(session: Session, run_ids: Collection[int]) -> tuple[Came, ...]:
    """Return what runs made themselves, and what relies on their results."""
    found = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(found.where(Segmentation.run_id.in_(run_ids))).one()
    files = select(func.count(), func.sum(FeatureFile.n_rows))
    n_files, n_rows = session.execute(files.where(FeatureFile.run_id.in_(run_ids))).one()
    made = [
        Came("segmentations", n_found),
        Came("cells", n_cells or 0),
        Came("feature files", n_files),
        Came("cells in feature files", n_rows or 0),
        Came("wells with another treatment", changed_wells(session, Event.run_id.in_(run_ids))),
    ]
    children = select(Run.stage, Run.id).where(Run.parent_id.in_(run_ids)).order_by(Run.id)
    by_stage: dict[Stage, list[int]] = {}
    for stage, run_id in session.execute(children):
        by_stage.setdefault(Stage(stage), []).append(run_id)
    made += [Came(f"{stage} runs", len(ids), tuple(ids)) for stage, ids in by_stage.items()]
    return _some([*made, _images_labelled(session, by_stage.get(Stage.PREDICT, ()))])


def images_of_wells_changed_by(run_ids: Collection[int]) -> Select[int]:
    """Return the query of the images in wells that got another treatment by ingest runs."""
    return select(Image.id).where(Image.well_id.in_(wells_changed(Event.run_id.in_(run_ids))))


def recipes_with_weights(session: Session, sha256: str) -> list[Recipe]:
    """Return the recipes of all stages that began from the weights with this sha256."""
    query = select(Recipe).where(Recipe.weights_sha256 == sha256).order_by(Recipe.id)
    return list(session.scalars(query))


def _some(made: Iterable[Came]) -> tuple[Came, ...]:
    return tuple(item for item in made if item.count)


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
    return None if row is None else _fact(row, well.control)


def well_history(session: Session, well_id: int) -> tuple[TreatmentChange, ...]:
    """Return the changes of a well's treatment, the first one first."""
    well = session.get_one(Well, well_id)
    parts = well.treatment.parts if well.treatment else []
    of_well = and_(Event.table_name == "wells", Event.row_id == well_id)
    of_parts = and_(
        Event.table_name == "perturbations",
        Event.row_id.in_([part.perturbation_id for part in parts]),
    )
    changes = []
    for event in session.scalars(select(Event).where(or_(of_well, of_parts)).order_by(Event.id)):
        old, new = event.old or {}, event.new or {}
        facts: list[TreatmentFact | None]
        if event.table_name == "perturbations" and well.treatment:
            now = _fact(well.treatment)
            facts = [replace(now, target=values.get("target")) for values in (old, new)]
        elif "treatment_id" in new:
            facts = [_by_id(session, values["treatment_id"]) for values in (old, new)]
        else:
            continue
        changes.append(
            TreatmentChange(
                old=facts[0],
                new=facts[1],
                changed_at=event.created_at.isoformat(),
                run_id=event.run_id,
                file=event.file or "",
                line=event.line,
            )
        )
    return tuple(changes)


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


def changed_wells(session: Session, condition: ColumnElement[bool]) -> int:
    """Return how many wells have another treatment by events that meet ``condition``."""
    wells = wells_changed(condition).subquery()
    return session.scalar(select(func.count()).select_from(wells)) or 0


def _frozen(
    split: str,
    field: str,
    side: Subset,
    label: str,
    treatment: TreatmentFact | None,
    history: Sequence[TreatmentChange],
) -> FrozenLabel:
    now = _value(treatment, field)
    return FrozenLabel(
        split=split,
        field=field,
        side=Subset(side).value,
        label=label,
        now=now,
        differs=now != label,
        since=None if now == label else _last_change(history, field),
    )


def _last_change(history: Sequence[TreatmentChange], field: str) -> TreatmentChange | None:
    changes = [item for item in history if _value(item.old, field) != _value(item.new, field)]
    return changes[-1] if changes else None


def _value(treatment: TreatmentFact | None, field: str) -> str | None:
    if treatment is None:
        return None
    return treatment.target if field == TARGET else treatment.name


def _by_id(session: Session, treatment_id: int | None) -> TreatmentFact | None:
    return None if treatment_id is None else _fact(session.get_one(Treatment, treatment_id))


def _identifiers(row: Treatment) -> str | None:
    known = [part.perturbation.identifier for part in row.parts]
    return " + ".join(filter(None, known)) or None


def _fact(row: Treatment, control: Control | None = None) -> TreatmentFact:
    return TreatmentFact(
        kind=" + ".join(part.perturbation.kind.value for part in row.parts),
        name=row.name,
        target=row.target,
        control=text_of(control),
        identifier=_identifiers(row),
    )


def audit_run(workspace: Workspace, reference: str) -> RunAudit:
    """Return a run (a number, or ``latest``): what it did, from what, and what came of it.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = run_in(session, reference)
        recipe = session.get_one(Recipe, run.recipe_id)
        split = session.get(Split, run.split_id) if run.split_id else None
        return RunAudit(
            run=run_fact(run),
            ended_at=moment(run.ended_at),
            user=run.user_name,
            host=run.host,
            command=run.command,
            code_version=run.code_version,
            environment=run.environment,
            seed=run.seed,
            query=run.query,
            result=run.result,
            error=run.error,
            recipe=recipe_fact(recipe),
            inputs=_recipes_above(session, recipe.id),
            parents=_parents(session, run),
            children=_children(session, run.id),
            split=split.name if split else None,
            split_counts=_split_counts(session, split.id) if split else {},
            jobs=_job_counts(session, run.id),
            artifacts=artifacts_of(session, run.id),
            ingested=ingested(session, run.id),
            changed_wells=changed_wells(session, Event.run_id == run.id),
            came=came_of_runs(session, [run.id]),
        )


def artifacts_of(session: Session, run_id: int) -> tuple[ArtifactFact, ...]:
    """Return the files that a run wrote or relies on, the oldest first."""
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id)
        .order_by(Artifact.id)
    )
    return tuple(
        ArtifactFact(ArtifactKind(item.kind).value, item.path, item.sha256, item.size_bytes)
        for item in session.scalars(query)
    )


def recipe_fact(recipe: Recipe) -> RecipeFact:
    """Return a recipe in a few words."""
    return RecipeFact(
        recipe.id,
        str(text_of(recipe.stage)),
        recipe.version,
        recipe.fingerprint,
        recipe.weights_sha256,
        recipe.parameters,
    )


def _recipes_above(session: Session, recipe_id: int) -> tuple[RecipeFact, ...]:
    found: dict[int, RecipeFact] = {}
    level = {recipe_id}
    while level:
        inputs = select(RecipeInput.input_id).where(RecipeInput.recipe_id.in_(level))
        above = session.scalars(select(Recipe).where(Recipe.id.in_(inputs)))
        new = {item.id: recipe_fact(item) for item in above if item.id not in found}
        found |= new
        level = set(new)
    return tuple(found[key] for key in sorted(found))


def inputs_of(session: Session, recipe_id: int) -> list[Recipe]:
    """Return the recipes that a recipe reads from itself, by id."""
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    return list(
        session.scalars(query.where(RecipeInput.recipe_id == recipe_id).order_by(Recipe.id))
    )


def _parents(session: Session, run: Run) -> tuple[RunFact, ...]:
    found: list[RunFact] = []
    while run.parent_id is not None:
        run = session.get_one(Run, run.parent_id)
        found.append(run_fact(run))
    return tuple(found)


def _children(session: Session, run_id: int) -> tuple[RunFact, ...]:
    query = select(Run).where(Run.parent_id == run_id).order_by(Run.id)
    return tuple(run_fact(run) for run in session.scalars(query))


def run_fact(run: Run) -> RunFact:
    """Return a run in a few words."""
    return RunFact(
        run.id, str(text_of(run.stage)), str(text_of(run.status)), run.started_at.isoformat()
    )


def _split_counts(session: Session, split_id: int) -> dict[str, int]:
    query = (
        select(SplitMember.subset, func.count())
        .where(SplitMember.split_id == split_id)
        .group_by(SplitMember.subset)
    )
    counts = {Subset(subset).value: number for subset, number in session.execute(query)}
    return {side.value: counts.get(side.value, 0) for side in Subset}


def _job_counts(session: Session, run_id: int) -> dict[str, int]:
    query = select(Job.status, func.count()).where(Job.run_id == run_id).group_by(Job.status)
    return {str(text_of(status)): number for status, number in session.execute(query)}


def moment(value: datetime | None) -> str | None:
    """Return a moment as ISO 8601, or None."""
    return None if value is None else value.isoformat()


def text_of(value: Any) -> str | None:
    """Return the value of an enum as text, or None."""
    return None if value is None else str(getattr(value, "value", value))


LISTED = 8
IMAGE_FILE, TABLE, WEIGHTS = "image file", "ingested table", "weights"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Candidate(NamedTuple):
    """A row that a text may mean."""

    kind: str
    key: int
    sha256: str
    name: str


def audit_artifact(workspace: Workspace, text: str) -> ArtifactAudit:
    """Return what a file is to the store, and what came of it.

    ``text``: the path or name of a file that the store wrote or read, the first digits (6 at
    least) of its sha256, the id of an artifact, or the path of a file on this machine, which is
    hashed and looked up by its bytes.

    Raises:
        UnknownNameError: the store knows no such file.
        UserInputError: several files have that name; they are listed.
    """
    path = _on_disk(text)
    digest = None if path is None else sha256_of(path)
    text = readable(text)
    with workspace.database.read() as session:
        if digest is not None:
            found = _by_sha256(session, digest)
            if not found:
                raise _unknown_bytes(session, text, digest)
        else:
            found = _by_name(session, text)
        sha256 = _one_file(session, text, found)
        known = _by_sha256(session, sha256)
        return ArtifactAudit(
            asked=text,
            sha256=sha256,
            hashed=None if path is None else str(path),
            known=tuple(_known(session, item) for item in _each_once(known)),
        )


def _on_disk(text: str) -> Path | None:
    try:
        path = Path(text)
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _one_file(session: Session, text: str, found: Sequence[_Candidate]) -> str:
    if not found:
        near = [
            *neighbours(session, ImageFile.name, text),
            *neighbours(session, IngestFile.name, text),
        ]
        hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise UnknownNameError(
            f"The store knows no file {text!r}.{hint} A file is named by its path, its name, the "
            "id of an artifact, or the first 6 digits or more of its sha256."
        )
    different = {item.sha256: item for item in found}
    if len(different) > 1:
        shown = [f"{item.kind} {item.name} ({item.sha256[:12]})" for item in different.values()]
        more = ", ..." if len(shown) > LISTED else ""
        raise UserInputError(
            f"{text!r} names several files: {', '.join(shown[:LISTED])}{more}. "
            "Name one by the start of its sha256."
        )
    return found[0].sha256


def _unknown_bytes(session: Session, text: str, digest: str) -> UnknownNameError:
    same = [item.sha256[:12] for item in _named(session, re.split(r"[/\\]", text)[-1])]
    hint = f" A file of that name was known with sha256 {', '.join(same[:3])}." if same else ""
    return UnknownNameError(
        f"The store knows no file with the bytes of {text} (sha256 {digest[:12]}).{hint}"
    )


def _by_name(session: Session, text: str) -> list[_Candidate]:
    found: list[_Candidate] = []
    if text.isdecimal() and len(text) < 19:
        found = _artifacts(session, select(Artifact).where(Artifact.id == int(text)))
    found = found or _artifacts(session, select(Artifact).where(Artifact.path == text))
    name = re.split(r"[/\\]", text)[-1]
    found = found or _named(session, text) or (_named(session, name) if name != text else [])
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _starting(session, start))


def _named(session: Session, name: str) -> list[_Candidate]:
    images = select(ImageFile).where(ImageFile.name == name, ImageFile.sha256.is_not(None))
    tables = select(IngestFile).where(IngestFile.name == name)
    return [*_image_files(session, images), *_tables(session, tables)]


def _starting(session: Session, start: str) -> list[_Candidate]:
    return [
        *_artifacts(session, select(Artifact).where(starts_with(Artifact.sha256, start))),
        *_image_files(session, select(ImageFile).where(starts_with(ImageFile.sha256, start))),
        *_tables(session, select(IngestFile).where(starts_with(IngestFile.sha256, start))),
        *_weights(session, select(Recipe).where(starts_with(Recipe.weights_sha256, start))),
    ]


def _by_sha256(session: Session, sha256: str) -> list[_Candidate]:
    return [
        *_artifacts(session, select(Artifact).where(Artifact.sha256 == sha256)),
        *_image_files(session, select(ImageFile).where(ImageFile.sha256 == sha256)),
        *_tables(session, select(IngestFile).where(IngestFile.sha256 == sha256)),
        *_weights(session, select(Recipe).where(Recipe.weights_sha256 == sha256)),
    ]


_MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""


def _artifacts(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.limit(_MOST))
    return [
        _Candidate(ArtifactKind(row.kind).value, row.id, row.sha256, row.path.rpartition("/")[2])
        for row in rows
    ]


def _image_files(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.limit(_MOST))
    return [_Candidate(IMAGE_FILE, row.id, row.sha256 or "", row.name) for row in rows]


def _tables(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.order_by(IngestFile.id).limit(_MOST))
    return [_Candidate(TABLE, row.id, row.sha256, row.name) for row in rows]


def _weights(session: Session, query: Select[Any]) -> list[_Candidate]:
    return [
        _Candidate(WEIGHTS, row.id, row.weights_sha256 or "", _weights_name(row))
        for row in session.scalars(query.order_by(Recipe.id).limit(_MOST))
    ]


def _weights_name(recipe: Recipe) -> str:
    named = recipe.parameters.get("model", recipe.parameters.get("weights"))
    return str(named or f"{recipe.stage.value} recipe {recipe.id}")


def _each_once(found: Iterable[_Candidate]) -> list[_Candidate]:
    """One candidate of each kind; of image files each, for they are of several images."""
    kinds: dict[Any, list[_Candidate]] = defaultdict(list)
    for item in found:
        kinds[(item.kind, item.key if item.kind == IMAGE_FILE else None)].append(item)
    return [items[0] for items in kinds.values()]


def _known(session: Session, item: _Candidate) -> KnownFile:
    if item.kind == IMAGE_FILE:
        return _known_image_file(session, item)
    if item.kind == TABLE:
        return _known_table(session, item)
    if item.kind == WEIGHTS:
        return _known_weights(session, item)
    return _known_artifact(session, item)


def _known_image_file(session: Session, item: _Candidate) -> KnownFile:
    file = session.get_one(ImageFile, item.key)
    query = select(Plate.barcode, Well.name, Image.site, Image.core_name)
    query = query.join(Well, Well.plate_id == Plate.id).join(Image, Image.well_id == Well.id)
    barcode, well, site, core = session.execute(query.where(Image.id == file.image_id)).one()
    return KnownFile(
        *(item.kind, item.key, file.name, file.uri, item.sha256, file.size_bytes),
        about=(f"channel {file.channel} of image {barcode}/{well}/{site} {core}",),
        runs=(),
        came=came_of_images(session, select(Image.id).where(Image.id == file.image_id)),
    )


def _known_table(session: Session, item: _Candidate) -> KnownFile:
    query = select(IngestFile).where(IngestFile.sha256 == item.sha256).order_by(IngestFile.id)
    rows = session.scalars(query).all()
    run_ids = [row.run_id for row in rows]
    about = tuple(
        f"run {row.run_id} read it as {row.layout}: {row.n_rows:,} rows, {row.n_created:,} new, "
        f"{row.n_updated:,} updated, {row.n_unchanged:,} unchanged, {row.n_refused:,} refused"
        for row in rows
    )
    relabelled = came_of_images(session, images_of_wells_changed_by(run_ids))
    of_them = (Came(f"{c.what} of these wells", c.count, c.runs, c.names) for c in relabelled)
    return KnownFile(
        *(item.kind, item.key, item.name, None, item.sha256, rows[0].size_bytes),
        about=about,
        runs=_runs(session, run_ids),
        came=(*came_of_runs(session, run_ids), *of_them),
    )


def _known_weights(session: Session, item: _Candidate) -> KnownFile:
    recipes = recipes_with_weights(session, item.sha256)
    ids = [recipe.id for recipe in recipes]
    runs = session.scalars(select(Run.id).where(Run.recipe_id.in_(ids)).order_by(Run.id)).all()
    about = tuple(
        f"{recipe.stage.value} recipe {recipe.id} ({recipe.fingerprint[:12]}) uses it"
        for recipe in recipes
    )
    return KnownFile(
        *(item.kind, item.key, item.name, None, item.sha256, None),
        about=about,
        runs=_runs(session, runs),
        came=came_of_recipes(session, ids),
    )


def _known_artifact(session: Session, item: _Candidate) -> KnownFile:
    file = session.get_one(Artifact, item.key)
    written = select(RunArtifact.run_id).where(RunArtifact.artifact_id == file.id)
    by = set(session.scalars(written))
    about, came = _of_artifact(session, file, by)
    return KnownFile(
        *(item.kind, item.key, item.name, file.path, file.sha256, file.size_bytes),
        about=about,
        runs=_runs(session, by),
        came=came,
    )


def _of_artifact(
    session: Session, file: Artifact, by: set[int]
) -> tuple[tuple[str, ...], tuple[Came, ...]]:
    """What an artifact is of, and what came of it; the runs that wrote it are added to ``by``."""
    if file.kind in (ArtifactKind.MASK, ArtifactKind.FLOW):
        column = {
            ArtifactKind.MASK: Segmentation.mask_artifact_id,
            ArtifactKind.FLOW: Segmentation.flow_artifact_id,
        }[file.kind]
        rows = session.scalars(select(Segmentation).where(column == file.id).limit(_MOST)).all()
        by.update(row.run_id for row in rows)
        images = [row.image_id for row in rows]
        names = select(Plate.barcode, Image.core_name).join(Well, Well.plate_id == Plate.id)
        names = names.join(Image, Image.well_id == Well.id).where(Image.id.in_(images))
        about = tuple(f"of image {plate}/{core}" for plate, core in session.execute(names))
        chosen = select(Image.id).where(Image.id.in_(images))
        return about, came_of_images(session, chosen)
    if file.kind is ArtifactKind.FEATURES:
        return _of_features(session, file, by)
    return (), came_of_runs(session, by)


def _of_features(
    session: Session, file: Artifact, by: set[int]
) -> tuple[tuple[str, ...], tuple[Came, ...]]:
    query = select(FeatureFile, FeatureSet).join(
        FeatureSet, FeatureSet.id == FeatureFile.feature_set_id
    )
    rows = session.execute(query.where(FeatureFile.artifact_id == file.id)).all()
    by.update(part.run_id for part, _ in rows)
    about = tuple(
        f"of feature set {found.name}: {part.n_rows:,} cells, "
        f"ids {part.first_cell_id} to {part.last_cell_id}"
        for part, found in rows
    )
    return about, came_of_recipes(session, [found.recipe_id for _, found in rows])


def _runs(session: Session, ids: Iterable[int]) -> tuple[RunFact, ...]:
    query = select(Run).where(Run.id.in_(sorted(set(ids)))).order_by(Run.id)
    return tuple(run_fact(run) for run in session.scalars(query))


VoteRow = Row[int, int, float, str, int]

EXACT = 10**12
"""Summed probabilities are compared as whole numbers of 1e-12, as the view ``image_votes`` does."""


def votes_query(image_id: int) -> Select[int, int, float, str, int]:
    """Return the query of the choices of an image's cells; every step goes through an index."""
    return (
        select(
            Prediction.run_id,
            Prediction.rank,
            Prediction.probability,
            Label.value,
            Segmentation.id.label("segmentation_id"),
        )
        .join(Cell, Cell.id == Prediction.cell_id)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .join(Label, Label.id == Prediction.label_id)
        .where(Segmentation.image_id == image_id, Cell.excluded.is_(None))
    )


def labellings_of(
    session: Session,
    image: Image,
    treatment: Treatment | None,
    segmentations: Sequence[SegmentationFact],
) -> tuple[Labelling, ...]:
    """Return what each run said, the oldest run first."""
    by_run: dict[int, list[VoteRow]] = defaultdict(list)
    for row in session.execute(votes_query(image.id)):
        by_run[row.run_id].append(row)
    return tuple(
        _labelling(session, session.get_one(Run, run_id), image, treatment, segmentations, rows)
        for run_id, rows in sorted(by_run.items())
    )


def _labelling(
    session: Session,
    run: Run,
    image: Image,
    treatment: Treatment | None,
    segmentations: Sequence[SegmentationFact],
    rows: Sequence[VoteRow],
) -> Labelling:
    trained = session.get(Run, run.parent_id) if run.parent_id else None
    split_id = run.split_id or (trained.split_id if trained else None)
    split = session.get(Split, split_id) if split_id else None
    side, truth = _side_and_truth(session, split, image.id, treatment)
    well_sides = _well_sides(session, split, image.well_id)
    used = [item for item in segmentations if item.id in {row.segmentation_id for row in rows}]
    votes = _counted(rows)
    ranked = sorted(votes, key=_by_hard_vote)
    soft_winner = min(votes, key=lambda item: (-item.probability, item.label)).label
    return Labelling(
        run_id=run.id,
        started_at=run.started_at.isoformat(),
        user=run.user_name,
        host=run.host,
        code_version=run.code_version,
        train_run_id=run.parent_id,
        checkpoints=_checkpoints(session, run.parent_id),
        split=split.name if split else None,
        protocol=split.protocol if split else None,
        side=side,
        well_sides=well_sides,
        well_in_training=Subset.TRAIN.value in well_sides,
        segmentation_ids=tuple(item.id for item in used),
        segment_recipes=tuple(item.recipe_id for item in used),
        segment_weights=tuple(item.weights_sha256 or "" for item in used),
        n_cells=sum(item.cells for item in votes),
        votes=tuple(ranked),
        winner=ranked[0].label,
        soft_winner=soft_winner,
        tie=len(ranked) > 1 and ranked[0].cells == ranked[1].cells,
        truth=truth,
        correct=None if truth is None else ranked[0].label == truth,
    )


def _counted(rows: Iterable[VoteRow]) -> list[LabelVotes]:
    cells: dict[str, int] = defaultdict(int)
    weight: dict[str, int] = defaultdict(int)
    for row in rows:
        cells[row.value] += row.rank == 1
        weight[row.value] += round(row.probability * EXACT)
    return [LabelVotes(label, cells[label], weight[label] / EXACT) for label in weight]


def _by_hard_vote(votes: LabelVotes) -> tuple[int, float, str]:
    return (-votes.cells, -votes.probability, votes.label)


def _side_and_truth(
    session: Session, split: Split | None, image_id: int, treatment: Treatment | None
) -> tuple[str, str | None]:
    if split is None:
        return "outside", None
    query = (
        select(SplitMember.subset, Label.value)
        .join(Label, Label.id == SplitMember.label_id)
        .where(SplitMember.split_id == split.id, SplitMember.image_id == image_id)
    )
    member = session.execute(query).first()
    if member is not None:
        return Subset(member.subset).value, member.value
    if treatment is None:
        return "outside", None
    by_target = split.field == TARGET
    return "outside", treatment.target if by_target else treatment.name


def _well_sides(session: Session, split: Split | None, well_id: int) -> tuple[str, ...]:
    if split is None:
        return ()
    query = (
        select(SplitMember.subset)
        .join(Image, Image.id == SplitMember.image_id)
        .where(SplitMember.split_id == split.id, Image.well_id == well_id)
        .distinct()
    )
    found = {Subset(value) for value in session.scalars(query)}
    return tuple(side.value for side in Subset if side in found)


def _checkpoints(session: Session, run_id: int | None) -> tuple[str, ...]:
    if run_id is None:
        return ()
    files = artifacts_of(session, run_id)
    return tuple(item.sha256 for item in files if item.kind == ArtifactKind.CHECKPOINT.value)


def audit_image(workspace: Workspace, text: str) -> ImageAudit:
    """Return every run that labelled the image that ``text`` names, with its evidence.

    Raises:
        UnknownNameError: no image has that name.
        UserInputError: several have it.
    """
    with workspace.database.read() as session:
        image = find_image(session, text)
        well = session.get_one(Well, image.well_id)
        plate = session.get_one(Plate, well.plate_id)
        treatment = session.get(Treatment, well.treatment_id) if well.treatment_id else None
        files = _files(session, image.id)
        segmentations = segmentations_of(session, image)
        history, now = well_history(session, well.id), treatment_of(session, well)
        return ImageAudit(
            image_id=image.id,
            plate=plate.barcode,
            well=well.name,
            site=image.site,
            plane=image.plane,
            time_point=image.time_point,
            core_name=image.core_name,
            content_sha256=image.content_sha256,
            treatment=treatment.name if treatment else None,
            target=treatment.target if treatment else None,
            control=text_of(well.control),
            treatment_history=history,
            frozen_labels=frozen_labels(session, well.id, image.id, now, history),
            files=files,
            missing_files=sum(file.sha256 is None for file in files),
            segmentations=segmentations,
            labellings=labellings_of(session, image, treatment, segmentations),
            flags=image_flags(session, image.id),
            came=came_of_images(session, select(Image.id).where(Image.id == image.id)),
        )


def _files(session: Session, image_id: int) -> tuple[FileFact, ...]:
    query = select(ImageFile).where(ImageFile.image_id == image_id)
    return tuple(
        FileFact(file.channel, file.name, file.uri, file.sha256, file.size_bytes)
        for file in session.scalars(query.order_by(ImageFile.position, ImageFile.channel))
    )


Audit = ImageAudit | WellAudit | RunAudit | ArtifactAudit

KINDS = ("image", "well", "cell", "run", "artifact")


def audit_anything(workspace: Workspace, text: str) -> Audit:
    """Return the audit of what ``text`` names: a file on disk, a run, a well, an image, a file.

    Raises:
        UnknownNameError: it names nothing.
        UserInputError: it is a number, which may be that of anything; or several have that name.
    """
    word = readable(text)
    if word.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {word}" for kind in KINDS if kind != "well")
        raise UserInputError(f"{word} is the number of what? Say one of: {ways}.")
    if _is_file(word):
        return audit_artifact(workspace, text)
    if word.lower().startswith(("#", "run ", *RUN_WORDS)):
        return audit_run(workspace, word)
    if looks_like_well(word):
        return audit_well(workspace, word)
    return _first_known(workspace, word)


def _first_known(workspace: Workspace, word: str) -> Audit:
    first: UnknownNameError | None = None
    ways: tuple[Callable[[Workspace, str], Audit], ...] = (audit_image, audit_artifact)
    for way in ways:
        try:
            return way(workspace, word)
        except UnknownNameError as error:
            first = first or error
    assert first is not None
    raise first


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):
        return False
