"""What every run said about an image, read from the database itself, by index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import Row, Select, select
from sqlalchemy.orm import Session

from ...db.models import (
    Cell,
    Image,
    Label,
    Prediction,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
)
from ...terms import ArtifactKind, LabelField, Subset
from .facts import Labelling, LabelVotes, SegmentationFact
from .runs import artifacts_of

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
    files = artifacts_of(session, run_id)
    return tuple(item.sha256 for item in files if item.kind == ArtifactKind.CHECKPOINT.value)
