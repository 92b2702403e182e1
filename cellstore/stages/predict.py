"""Predict: label the images of a selection, in one run that is whole when it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import Select, and_, case, exists, false, func, or_, select
from sqlalchemy.orm import Session, aliased

from ..artifacts import ArtifactFolder
from ..config import (
    THIS_PROCESS,
    ApplyParams,
    PredictParams,
    Resources,
    RunName,
    Selection,
)
from ..db.bulk import bulk_insert, in_lists
from ..db.events import recording_removed
from ..enums import ArtifactKind, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.execute import ImageStage, RunCounter, run_jobs
from ..jobs.lookup import IS_CURRENT, find_run, find_split, first_of, images_of
from ..jobs.queue import JobScope, Task, among, count_images, reopen, requeue
from ..jobs.runs import (
    RecipeSpec,
    RunHandle,
    digest_of_images,
    digest_of_numbers,
    keep_files,
    known_recipe,
    register,
    running,
)
from ..jobs.workspace import Workspace
from ..learn.branches import TABULAR
from ..learn.normalising import describe_plates
from ..models import (
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    ImagePrediction,
    Job,
    Label,
    Plate,
    Prediction,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from ..notebooks import Shown
from ..query.cells import CellSource, as_text, cells_query
from ..query.feature_files import (
    ROWS_OF_FILE,
    WrittenFile,
    forget_lost_files,
    images_of_lost_files,
    images_per_file,
    make_set,
    register_files,
    set_of_recipe,
    write_features,
)
from ..query.source import check_set_name
from ..settings import need

if TYPE_CHECKING:
    from ..learn.crops import CellBlock
    from ..learn.trained_models import OpenModel

VERSION = 1
EMBEDDING_VERSION = 1
LAYER = "projection"

MOST_ROWS = 2_000_000
"""Predictions that wait for each other where embeddings are written in one file, at most."""

ROWS_AT_ONCE = 100_000

COLUMNS = ("run_id", "cell_id", "rank", "label_id", "probability")


@dataclass(frozen=True)
class PredictResult(Shown):
    """What a predict run did.

    ``selected`` images were asked for; ``waiting`` of them have no measured cells yet;
    ``earlier`` were labelled before, by this run or one of the same recipe; ``done`` now.
    ``cells`` were labelled now. ``run_id``: where the predictions are. ``split`` is that of the
    training run. ``feature_set``: where the embeddings are. ``notes`` are sentences that a reader
    of the labels has to know.
    """

    run_id: int
    recipe_id: int
    train_run_id: int
    split: str
    selected: int
    waiting: int
    earlier: int
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int
    feature_set: str | None = None
    notes: tuple[str, ...] = ()


def predict(
    workspace: Workspace,
    params: PredictParams | None = None,
    *,
    run: RunName = "latest",
    device: str = "auto",
) -> PredictResult:
    """Label the cells of some images with the model of a training run; see ``Store.predict``.

    An interrupted run of the same checkpoint and images is resumed, and so is a finished one whose
    files of embeddings are gone. Where more images have been measured since, a new run labels all
    of them, so that every finished run is whole.
    """
    need("train")
    from ..learn.trained_models import fit_new_plates, open_model

    params = params or PredictParams()
    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        model = open_model(session, workspace, trained, device)
        record, source = model.record, replace(model.source, plates=params.plates)

        # Which images.
        split = session.get_one(Split, trained.split_id)
        asked = split if params.split is None else find_split(session, params.split)
        split_id = None if params.subset is None and params.split is None else asked.id
        if split_id is not None:
            source = replace(source, split_id=asked.id, subset=params.subset)
        selected, n_selected = select_images(session, params, split_id, params.subset)
        # A model that opens no image does not need the files of one.
        unseen = record.branches == (TABULAR,)
        segmented = selected.join(Segmentation, IS_CURRENT)
        segmented = segmented.where(Segmentation.recipe_id == source.segment_id)
        images = measured_images(segmented, source, pixels=not unseen)

        # How many images there are, and how many of them the training has met: that it has learned
        # from, others of the wells of these, and that stopped it. Lists that are made once: asked
        # image by image, a join would walk the split for each.
        of_split = select(SplitMember.image_id).where(SplitMember.split_id == trained.split_id)
        learned = of_split.where(SplitMember.subset == Subset.TRAIN)
        other = aliased(Image)
        wells = select(other.well_id).where(other.id.in_(learned))
        stopped_by = (trained.result or {}).get("validation_subset")
        conditions = (
            Image.id.in_(learned),
            and_(Image.id.not_in(learned), Image.well_id.in_(wells)),
            Image.id.in_(of_split.where(SplitMember.subset == stopped_by))
            if stopped_by
            else false(),
        )
        counts = (func.count().filter(condition) for condition in conditions)
        counted_images = select(func.count(), *counts).select_from(Image)
        ready, *met = session.execute(counted_images.where(Image.id.in_(images))).one()
        if ready == 0:
            raise UserInputError(
                f"Of the {n_selected} images that meet every condition none has cells measured by "
                f"the recipes of training run {trained.id}. Choose others, or measure these. Run: "
                "cellstore segment, then: cellstore measure"
            )
        query = cells_query(source)
        if params.wells or params.where is not None or params.limit is not None:
            query = query.where(Image.id.in_(selected))

        # By which labels, scales and columns.
        values = select(Label.value, Label.id).where(Label.field == record.field)
        labels = dict(session.execute(values).all())
        gone = [value for value in record.labels if value not in labels]
        if gone:
            raise UnknownNameError.of("label", gone[0], labels)
        on_plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
        on_plates = on_plates.join(Image, Image.well_id == Well.id).where(Image.id.in_(images))
        barcodes = sorted(session.scalars(on_plates.distinct()))
        model, plates = fit_new_plates(session, workspace, model, barcodes)
        n_labels = len(record.labels)
        top_k = n_labels if params.all_probabilities else min(params.top_k, n_labels)

        # What makes it the same work as before.
        parameters = asdict(params) | {"images": digest_of_images(session, images)}
        if params.split is not None:
            parameters["split"] = asked.fingerprint
        if params.all_probabilities:
            del parameters["top_k"]
        mark = source.features.mark(session, model.segment.id, images)
        if mark is not None:
            parameters["feature_files"] = mark
        fitted = None
        if plates:
            fitted = hashlib.sha256(json.dumps(plates, sort_keys=True).encode()).hexdigest()
            parameters["fitted_plates"] = fitted
        inputs = (trained.recipe, model.segment, model.measure)
        spec = RecipeSpec(Stage.PREDICT, VERSION, parameters, model.file.sha256, inputs)
        embedded_by = None
        if params.embedding is not None:
            embedded_by = plan_embedding(session, params.embedding, model, fitted)

    # Images that the model has met before: their labels prove nothing.
    met_as = (
        f"were used to train run {trained.id}",
        f"are from wells that run {trained.id} was trained on",
        f"decided when the training of run {trained.id} stopped",
    )
    notes = [
        f"{number:,} of the {ready:,} images {what}. Accuracy on them tells little about new wells."
        for number, what in zip(met, met_as, strict=True)
        if number
    ]
    notes += describe_plates(model.record.scaler, barcodes)

    with workspace.database.begin() as session:
        recipe = register(session, spec)
        counted = count_images(session, recipe.id, images, unseen=unseen)
        todo, recipes, per_file, again = counted.todo + counted.failed, [recipe.id], 1, 0
        embedding = None
        if params.embedding is not None and embedded_by is not None:
            embedding = register_embedding(session, params.embedding, model, embedded_by)
            recipes.append(embedding)
            most = min(ROWS_OF_FILE, MOST_ROWS // top_k)
            per_file = images_per_file(session, model.segment.id, most)
            # A job is believed to be done of its file as well as of its row.
            lost = images_of_lost_files(session, workspace.artifacts, embedding)
            if lost is not None:
                with recording_removed(session, list(in_lists(lost))):
                    reopen(session, embedding, lost)
                    forget_lost_files(session, workspace.artifacts, embedding)
            embedded = count_images(session, embedding, images, unseen=unseen)
            again = embedded.todo + embedded.failed
        latest = latest_run(session, recipe.id)
        whole = latest is not None and latest.status is Status.DONE
    if latest is not None and whole and todo == again == 0:
        did = RunCounter(latest.id, recipe.id)
    else:
        stage = Predict(
            workspace.artifacts,
            model=model,
            label_ids=np.array([labels[value] for value in record.labels], dtype=np.int64),
            top_k=top_k,
            embedding=embedding,
            images_per_file=per_file,
        )
        with running(
            workspace.database,
            recipe,
            parent_id=trained.id,
            split_id=split.id,
            query=as_text(query),
            resume=None if latest is None or (whole and todo) else latest.id,
            device=model.reader.device,
        ) as current:
            if latest is None:
                check_alone(workspace, recipe.id, current.id)
            if plates:
                text = json.dumps(plates, indent=1, sort_keys=True, allow_nan=False)
                file = workspace.artifacts.write(ArtifactKind.CHECKPOINT, text.encode(), ".json")
                with workspace.database.begin() as session:
                    keep_files(session, [file], current.id)
            scope = JobScope(dict.fromkeys(recipes, current.id), images, unseen)
            did = label_all(workspace, stage, scope, current)
            if params.embedding is not None:
                current.result["feature_set"] = params.embedding
            current.result["notes"] = list(notes)
            if whole and not todo:
                notes.append(
                    f"The embeddings of {again:,} images were made again: their files were gone."
                )
    return PredictResult(
        run_id=did.run_id,
        recipe_id=recipe.id,
        train_run_id=trained.id,
        split=split.name,
        selected=n_selected,
        waiting=n_selected - ready,
        earlier=ready - todo,
        done=did.images,
        failures=tuple(did.failures),
        cells=did.cells,
        feature_set=params.embedding,
        notes=tuple(notes),
    )


def select_images(
    session: Session,
    params: PredictParams | ApplyParams,
    split_id: int | None,
    subset: Subset | None,
) -> tuple[Select[int], int]:
    """Return a query of the images that are asked for, and how many these are."""
    selected = images_of(session, Selection(params.plates, params.wells, params.where))
    if split_id is not None:
        members = select(SplitMember.image_id).where(SplitMember.split_id == split_id)
        if subset is not None:
            members = members.where(SplitMember.subset == subset)
        selected = selected.where(Image.id.in_(members))
    if params.limit is not None:  # of the images of the subset
        selected = first_of(session, selected, params.limit)
    number = select(func.count()).select_from(Image).where(Image.id.in_(selected))
    return selected, session.scalar(number) or 0


def latest_run(session: Session, recipe_id: int) -> Run | None:
    """Return the latest run of a recipe that has jobs; if none has any, the latest.

    One that was begun at the same time as another, and gave up, has none.
    """
    with_jobs = case((exists().where(Job.run_id == Run.id), 0), else_=1)
    runs = select(Run).where(Run.recipe_id == recipe_id)
    return session.scalars(runs.order_by(with_jobs, Run.id.desc()).limit(1)).first()


def check_alone(workspace: Workspace, recipe_id: int, run_id: int) -> None:
    """Refuse a run that another command has begun at the same time: neither would be whole."""
    others = select(Run.id).where(Run.recipe_id == recipe_id, Run.id != run_id)
    others = others.where(Run.status.in_((Status.RUNNING, Status.DONE)))
    with workspace.database.read() as session:
        if (other := session.scalar(others.limit(1))) is not None:
            raise UserInputError(
                f"Another command began the same at the same time, as run {other}. Wait until it "
                "is over, and give the same command again."
            )


def label_all(
    workspace: Workspace,
    stage: ImageStage[Any, Any],
    scope: JobScope,
    run: RunHandle,
    resources: Resources = THIS_PROCESS,
) -> RunCounter:
    """Label all images of a scope, whose first recipe is that of the predictions.

    A run is whole or not finished: what failed before is tried again, and while an image fails, the
    run is not finished, so that the next call goes on with it.
    """
    recipe_id, *_ = scope.runs
    with workspace.database.begin() as session:
        requeue(session, Job.recipe_id.in_(scope.runs), among(scope.images))
    counters = run_jobs(workspace, stage, scope, resources)
    did = counters[recipe_id]
    failures = [failure for counter in counters.values() for failure in counter.failures]
    did.failures = list(dict.fromkeys(failures))
    # The whole run, earlier attempts included.
    mine = and_(Job.run_id == run.id, Job.recipe_id == recipe_id, Job.status == Status.DONE)
    labelled = and_(Prediction.run_id == run.id, Prediction.rank == 1)
    with workspace.database.read() as session:
        run.result = {
            "images": session.scalar(select(func.count()).select_from(Job).where(mine)),
            "failed": len(did.failures),
            "cells": session.scalar(select(func.count()).where(labelled)),
        }
    if failed := len(did.failures):
        run.error = (
            f"{failed} of {failed + did.images} images could not be labelled; the others are done. "
            "See why with: cellstore jobs --failed. Running the same command again retries them."
        )
    return did


def measured_images(images: Select[int], source: CellSource, *, pixels: bool) -> Select[int]:
    """Those of ``images``, joined to their segmentations, whose cells are measured.

    An image without cells is measured, too. ``pixels``: not those that have not been seen.
    """
    measured = aliased(Job)  # the jobs of this stage are looked up around it
    of_recipe = and_(measured.recipe_id == source.measure_id, measured.image_id == Image.id)
    done = exists().where(
        of_recipe,
        measured.content_sha256 == Image.content_sha256,
        measured.status == Status.DONE,
    )
    if source.features.files is None:
        return images.where(done)
    # Imported features have no jobs: then cells within the range of cells of a file are known. One
    # that is, and has no row there, is labelled as an image without cells.
    imported = ~exists().where(measured.recipe_id == source.measure_id)
    file = and_(
        Cell.segmentation_id == Segmentation.id,
        FeatureSet.recipe_id == source.measure_id,
        FeatureFile.feature_set_id == FeatureSet.id,
        Cell.id.between(FeatureFile.first_cell_id, FeatureFile.last_cell_id),
    )
    in_files = or_(Segmentation.n_cells == 0, exists().where(file).correlate(Segmentation))
    found = images.where(or_(done, and_(imported, in_files)))
    return found.where(Image.content_sha256.is_not(None)) if pixels else found


def plan_embedding(session: Session, name: str, model: OpenModel, plates: str | None) -> RecipeSpec:
    """Return by what recipe a model fills feature set ``name``, which may be there already.

    ``plates``: the digest of what was fitted to plates that the training has not seen.
    """
    run_id = model.run.id
    if not model.width:
        raise UserInputError(
            f"Training run {run_id} is a baseline and has no embedding. Name the run of a "
            "network, or leave --embedding out."
        )
    check_set_name(name, "--embedding")
    parameters = {"embedding": LAYER, "width": model.width}
    if plates is not None:
        parameters |= {"fitted_plates": plates}
    spec = RecipeSpec(
        Stage.MEASURE, EMBEDDING_VERSION, parameters, model.file.sha256, (model.segment,)
    )
    recipe = known_recipe(session, spec)
    mine = None if recipe is None else set_of_recipe(session, recipe.id)
    if mine is not None and mine.name != name:
        raise UserInputError(
            f"These embeddings are kept as feature set {mine.name!r} already: "
            f"give --embedding {mine.name}."
        )
    found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
    if found is not None and (mine is None or found.id != mine.id):
        raise UserInputError(
            f"Feature set {name!r} is there already, and is not the embedding of training run "
            f"{run_id} on these plates. Give another --embedding name."
        )
    return spec


def register_embedding(session: Session, name: str, model: OpenModel, spec: RecipeSpec) -> int:
    """Insert the recipe and the feature set on their first use; return the id of the recipe."""
    recipe = register(session, spec)
    make_set(
        session,
        name,
        recipe.id,
        embedding_columns(model.width),
        dtype="float32",
        source=f"cellstore predict: {LAYER} of the network of training run {model.run.id}",
        description="What the classifier reads of a cell: 0 or more, meaningless alone.",
    )
    return recipe.id


def embedding_columns(width: int) -> list[str]:
    """Return the names of the columns of an embedding of so many numbers."""
    return [f"embedding_{index:03d}" for index in range(width)]


class PredictionRows(NamedTuple):
    """Rows of table ``predictions`` about one image, by cell and rank: (N,) each."""

    cell_ids: NDArray[np.int64]
    ranks: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def insert_predictions(
    session: Session, run_id: int, images: Iterable[PredictionRows], *, whole: bool = False
) -> None:
    """Insert the predictions of some images; ``whole``: about these themselves, not their cells."""
    table = ImagePrediction if whole else Prediction
    named = ("run_id", "image_id", *COLUMNS[2:]) if whole else COLUMNS
    waiting: list[tuple[Any, ...]] = []
    for rows in images:
        columns = (column.tolist() for column in rows)
        waiting += zip(repeat(run_id, len(rows.ranks)), *columns, strict=True)
        if len(waiting) >= ROWS_AT_ONCE:
            bulk_insert(session, table, named, waiting)
            waiting = []
    bulk_insert(session, table, named, waiting)


def best_rows(
    cell_ids: NDArray[np.int64],
    label_ids: NDArray[np.int64],
    probabilities: NDArray[Any],
    top_k: int,
) -> PredictionRows:
    """Return the ``top_k`` most probable labels of N cells, of equals the first, as rows.

    ``label_ids`` (K,) are those of the columns of ``probabilities`` (N, K).
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(probabilities, order, axis=1).astype(np.float64)
    cells, kept = order.shape
    return PredictionRows(
        np.repeat(cell_ids, kept),
        np.tile(np.arange(1, kept + 1), cells),
        label_ids[order].ravel(),
        np.clip(best, 0.0, 1.0).ravel(),
    )


class CellAnswers(NamedTuple):
    """What was said of the N cells of an image: ``rows`` of predictions, numbers (N, D), or both.

    ``cell_ids`` (N,) ascend.
    """

    cell_ids: NDArray[np.int64]
    rows: PredictionRows | None
    values: NDArray[Any]


@dataclass(frozen=True)
class Predict(ImageStage[int, CellAnswers]):
    """The stage: it runs in this process. ``label_ids``: of the classes of ``model``.

    ``embedding``: the recipe by which the embeddings are kept, too, if they are.
    """

    label = "predict"

    artifacts: ArtifactFolder
    model: OpenModel
    label_ids: NDArray[np.int64]
    top_k: int
    embedding: int | None = None
    images_per_file: int = 1

    def fetch(self, session: Session, tasks: Sequence[Task]) -> Mapping[int, int]:
        """Return the ids of the images: their cells are read where they are labelled."""
        return {task.image_id: task.image_id for task in tasks}

    def read(self, task_input: int) -> CellBlock:
        """Return the cells of the image with this id."""
        return self.model.reader(task_input)

    def compute(self, loaded: CellBlock) -> CellAnswers:
        """Return the labels of the cells."""
        probabilities, vectors = self.model.predict(loaded)
        ids = loaded.cell_ids.cpu().numpy()
        rows = best_rows(ids, self.label_ids, probabilities, self.top_k)
        return CellAnswers(ids, rows, vectors)

    def write_together(
        self, run: RunCounter, done: Sequence[tuple[Task, CellAnswers]]
    ) -> Sequence[WrittenFile]:
        """Write the embeddings of some images."""
        if run.recipe_id != self.embedding:
            return ()
        names = embedding_columns(self.model.width)
        schema = pa.schema([(name, pa.float32()) for name in names])
        ids = [output.cell_ids for _, output in done]
        return write_features(self.artifacts, schema, ids, [o.values.T for _, o in done])

    def digest(self, recipe_id: int, output: CellAnswers) -> str:
        """Return the digest of cell, rank, label, probability (N * K, 4), or of the embeddings."""
        if output.rows is None or recipe_id == self.embedding:
            return digest_of_numbers(output.values)
        return digest_of_numbers(np.column_stack(output.rows))

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, CellAnswers]],
        files: Sequence[WrittenFile],
    ) -> int:
        """Write the predictions; of the embeddings, whose they are."""
        if run.recipe_id == self.embedding:
            found = set_of_recipe(session, run.recipe_id)
            assert found is not None
            register_files(session, self.artifacts, found.id, run.run_id, files)
        else:
            insert_predictions(session, run.run_id, (o.rows for _, o in done if o.rows))
        return sum(len(output.cell_ids) for _, output in done)
