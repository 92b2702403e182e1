"""Where a label comes from, read from the database itself, by index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from ...db.models import (
    Artifact,
    Cell,
    CellFeatures,
    Image,
    ImageFile,
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
from ...errors import UnknownNameError
from ...runs import Workspace, find_image, run_in
from ...terms import ArtifactKind, LabelField, Subset
from .facts import (
    ArtifactFact,
    CellAudit,
    Choice,
    FileFact,
    ImageAudit,
    Labelling,
    LabelVotes,
    RecipeFact,
    RunAudit,
    RunFact,
    SegmentationFact,
)
from .flags import cell_flags, image_flags
from .history import changed_wells, frozen_labels, ingested, treatment_of, well_history

VoteRow = Row[int, int, float, str, int]

EXACT = 10**12
"""Summed probabilities are compared as whole numbers of 1e-12, as the view ``image_votes`` does."""


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
        segmentations = _segmentations(session, image)
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
            treatment=treatment.pert_iname if treatment else None,
            target=treatment.target if treatment else None,
            control=_text(treatment.control) if treatment else None,
            treatment_history=history,
            frozen_labels=frozen_labels(session, well.id, image.id, now, history),
            files=files,
            missing_files=sum(file.sha256 is None for file in files),
            segmentations=segmentations,
            labellings=_labellings(session, image, treatment, segmentations),
            flags=image_flags(session, image.id),
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
            label=cell.label,
            box=_box(cell),
            centroid=_centroid(cell),
            excluded=cell.excluded,
            segmentation=_segmentation(found, recipe, image),
            features=_features(session, cell.id),
            choices=_choices(session, cell.id),
            flags=cell_flags(session, cell.id),
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
            run=_run_fact(run),
            ended_at=_moment(run.ended_at),
            user=run.user,
            host=run.host,
            command=run.command,
            code_version=run.code_version,
            environment=run.environment,
            seed=run.seed,
            query=run.query,
            result=run.result,
            error=run.error,
            recipe=_recipe_fact(recipe),
            inputs=_recipes_above(session, recipe.id),
            parents=_parents(session, run),
            children=_children(session, run.id),
            split=split.name if split else None,
            split_counts=_split_counts(session, split.id) if split else {},
            jobs=_job_counts(session, run.id),
            artifacts=_artifacts(session, run.id),
            ingested=ingested(session, run.id),
            changed_wells=changed_wells(session, run.id),
        )


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


def _files(session: Session, image_id: int) -> tuple[FileFact, ...]:
    query = select(ImageFile).where(ImageFile.image_id == image_id)
    return tuple(
        FileFact(file.channel, file.name, file.uri, file.sha256, file.size_bytes)
        for file in session.scalars(query.order_by(ImageFile.position, ImageFile.channel))
    )


def _segmentations(session: Session, image: Image) -> tuple[SegmentationFact, ...]:
    query = (
        select(Segmentation, Recipe)
        .join(Recipe, Recipe.id == Segmentation.recipe_id)
        .where(Segmentation.image_id == image.id)
        .order_by(Segmentation.id)
    )
    return tuple(_segmentation(found, recipe, image) for found, recipe in session.execute(query))


def _segmentation(found: Segmentation, recipe: Recipe, image: Image) -> SegmentationFact:
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


def _box(cell: Cell) -> tuple[int, int, int, int] | None:
    first, last = (cell.min_row, cell.min_col), (cell.max_row, cell.max_col)
    if first[0] is None or first[1] is None or last[0] is None or last[1] is None:
        return None
    return first[0], first[1], last[0], last[1]


def _centroid(cell: Cell) -> tuple[float, float] | None:
    if cell.centroid_row is None or cell.centroid_col is None:
        return None
    return cell.centroid_row, cell.centroid_col


def _labellings(
    session: Session,
    image: Image,
    treatment: Treatment | None,
    segmentations: Sequence[SegmentationFact],
) -> tuple[Labelling, ...]:
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
        user=run.user,
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
    by_target = split.field == LabelField.TARGET
    return "outside", treatment.target if by_target else treatment.pert_iname


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
    files = _artifacts(session, run_id)
    return tuple(item.sha256 for item in files if item.kind == ArtifactKind.CHECKPOINT.value)


def _artifacts(session: Session, run_id: int) -> tuple[ArtifactFact, ...]:
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


def _recipe_fact(recipe: Recipe) -> RecipeFact:
    return RecipeFact(
        recipe.id,
        str(_text(recipe.stage)),
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
        new = {item.id: _recipe_fact(item) for item in above if item.id not in found}
        found |= new
        level = set(new)
    return tuple(found[key] for key in sorted(found))


def _parents(session: Session, run: Run) -> tuple[RunFact, ...]:
    found: list[RunFact] = []
    while run.parent_id is not None:
        run = session.get_one(Run, run.parent_id)
        found.append(_run_fact(run))
    return tuple(found)


def _children(session: Session, run_id: int) -> tuple[RunFact, ...]:
    query = select(Run).where(Run.parent_id == run_id).order_by(Run.id)
    return tuple(_run_fact(run) for run in session.scalars(query))


def _run_fact(run: Run) -> RunFact:
    return RunFact(
        run.id, str(_text(run.stage)), str(_text(run.status)), run.started_at.isoformat()
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
    return {str(_text(status)): number for status, number in session.execute(query)}


def _moment(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()


def _text(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))
