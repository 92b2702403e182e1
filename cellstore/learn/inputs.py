"""The cells of an image for a baseline that looks at no cell: how many there are, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import distinct, func, select
from sqlalchemy.orm import Session, aliased

from ..enums import ArtifactKind, Stage, Subset
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Image,
    Label,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    SplitMember,
    Well,
)
from ..query.cells import (
    CellSource,
    check_cells,
    check_plates,
    count_unseen,
    find_qc_run,
    read_cells,
    unseen_note,
)
from ..query.feature_files import SetReader
from .baselines import CELLCOUNT, POSITION, BaselineMeta, count_rows
from .crops import UNKNOWN_LABEL, CellBlock


def training_labels(session: Session, split_id: int) -> dict[str, int]:
    """Return label ids by value, sorted by value: the order of a model's outputs."""
    query = (
        select(Label.value, Label.id)
        .join(SplitMember, SplitMember.label_id == Label.id)
        .where(SplitMember.split_id == split_id, SplitMember.subset == Subset.TRAIN)
        .distinct()
    )
    return dict(sorted(session.execute(query).all()))


def flags_that_count(
    session: Session, reference: str | None, split_id: int, segment_id: int
) -> tuple[Run | None, str | None]:
    """Return the quality-control run whose flags count, and what must be said of it.

    Raises:
        UnknownNameError: there is no such run.
        UserInputError: it has not looked at these plates or these cells.
    """
    if reference is None:
        return None, None
    run = find_qc_run(session, reference)
    members = select(SplitMember.image_id).where(SplitMember.split_id == split_id)
    check_plates(session, run, members)
    check_cells(session, run, segment_id)
    unseen = count_unseen(session, run, members)
    return run, unseen_note(run, unseen) if unseen else None


def teacher_of(session: Session, measure: Recipe) -> Run | None:
    """Return the training whose network made the features of a recipe; None: none did."""
    if "embedding" not in measure.parameters:
        return None
    query = (
        select(Run)
        .join(RunArtifact, RunArtifact.run_id == Run.id)
        .join(Artifact, Artifact.id == RunArtifact.artifact_id)
        .where(Artifact.kind == ArtifactKind.CHECKPOINT, Run.stage == Stage.TRAIN)
        .where(Artifact.sha256 == measure.weights_sha256)
        .order_by(Run.id)
    )
    return session.scalars(query.limit(1)).first()


def _teachers(session: Session, measure: Recipe) -> Iterator[Run]:
    """The training that made features, the one that made those that it read, and so on."""
    found: Recipe | None = measure
    while found is not None and (teacher := teacher_of(session, found)) is not None:
        yield teacher
        found = _measure_of(session, teacher)


def _measure_of(session: Session, trained: Run) -> Recipe | None:
    query = (
        select(Recipe)
        .join(RecipeInput, RecipeInput.input_id == Recipe.id)
        .where(RecipeInput.recipe_id == trained.recipe_id, Recipe.stage == Stage.MEASURE)
    )
    return session.scalars(query.limit(1)).first()


def taught_wells(session: Session, measure: Recipe, split_id: int) -> str | None:
    """Say whether features were learned on wells that a split does not train on.

    An embedding knows the labels of the wells that its network was trained on, or stopped by; so
    does one by a network that has learned from another's embedding.
    """
    teachers = [run for run in _teachers(session, measure) if run.split_id not in (None, split_id)]
    if not teachers:
        return None
    mine, theirs = aliased(SplitMember), aliased(SplitMember)
    image, other = aliased(Image), aliased(Image)
    taught = (
        select(other.well_id)
        .join(theirs, theirs.image_id == other.id)
        .where(theirs.split_id.in_([run.split_id for run in teachers]))
        .where(theirs.subset != Subset.TEST)
    )
    query = (
        select(func.count(distinct(image.well_id)))
        .join(mine, mine.image_id == image.id)
        .where(mine.split_id == split_id, mine.subset != Subset.TRAIN)
        .where(image.well_id.in_(taught))
    )
    number = session.scalar(query) or 0
    if number == 0:
        return None
    runs = " and ".join(str(run.id) for run in teachers)
    return (
        f"A leak: the features are an embedding by training run {runs}, which was taught the "
        f"labels of {number:,} wells that this split does not train on. Scores are too good; use "
        "the split of that training."
    )


def leak_of(session: Session, trained: Run, split_id: int) -> str | None:
    """Say of a training what :func:`taught_wells` says of its features."""
    measure = _measure_of(session, trained)
    return None if measure is None else taught_wells(session, measure, split_id)


class PlaceReader:
    """Call it with an image id to get its cells, all with what the baseline knows of the image."""

    def __init__(self, workspace: Workspace, source: CellSource, meta: BaselineMeta) -> None:
        self._workspace, self._source, self._meta = workspace, source, meta
        self._values = SetReader(source.features.files or ())

    def __call__(self, image_id: int) -> CellBlock:
        """Return the cells of an image, by cell id."""
        with self._workspace.database.read() as session:
            ids = read_cells(session, self._source, image_id, (), self._values).cell_ids
            row = self._row(session, image_id, len(ids))
        scaled = torch.from_numpy(self._meta.scaler.transform(row))
        unknown = torch.full((len(ids),), UNKNOWN_LABEL, dtype=torch.int64)
        return CellBlock({}, scaled.expand(len(ids), -1), unknown, torch.from_numpy(ids))

    def _row(self, session: Session, image_id: int, n_cells: int) -> NDArray[np.float64]:
        """(1, F): what is known of the image."""
        if self._meta.model == CELLCOUNT:
            return count_rows([n_cells])
        if self._meta.model == POSITION:
            query = select(Well.well_row, Well.well_column).join(Image, Image.well_id == Well.id)
            place: Any = session.execute(query.where(Image.id == image_id)).one()
            return np.array([tuple(place)], dtype=np.float64)
        return np.empty((1, 0))
