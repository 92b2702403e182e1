"""The stage: label the images of a selection, in one run that is whole when it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from ..analysis.features import Feature
from ..artifacts import ArtifactFolder
from ..config import PredictParams, as_parameters
from ..db.bulk import bulk_insert
from ..db.statements import insert_new
from ..enums import ArtifactKind, FeatureStorage, Stage, Status, Subset
from ..errors import JobsFailedError, UnknownNameError, UserInputError
from ..extras import need
from ..jobs.execute import ImageStage, RunCounter, run_jobs
from ..jobs.lookup import find_run, find_split
from ..jobs.queue import JobScope, Task, count_images, requeue_failed
from ..jobs.recipes import RecipeSpec, fingerprint, register
from ..jobs.runs import RunHandle, attach, fail_if_any, keep_file, running
from ..jobs.selection import first_of, images_of, segmented
from ..jobs.workspace import Workspace
from ..learn.branches import TABULAR
from ..learn.models import OpenModel, know_plates, open_model
from ..learn.normalising import describe_plates
from ..models import (
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Label,
    Plate,
    Prediction,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from ..query.cells import CellSource, as_text, cells_query
from ..query.feature_files import ROWS_OF_FILE, WrittenFile, register_files, set_of_recipe
from ..query.feature_output import images_per_file, write_features
from ..query.feature_sets import check_set_name

if TYPE_CHECKING:
    from ..learn.crops import CellBlock
    from ..learn.models import ModelMeta


EMBEDDING_VERSION = 1
LAYER = "projection"


@dataclass(frozen=True)
class Embedding:
    """A feature set of ``width`` columns, filled by the network of one training run.

    Images that another predict run has embedded with the same network are not embedded again.
    """

    name: str
    spec: RecipeSpec
    features: tuple[Feature, ...]

    @property
    def schema(self) -> pa.Schema:
        """The columns of its files, without the cell id."""
        return pa.schema([(feature.name, pa.float32()) for feature in self.features])

    def register(self, session: Session) -> int:
        """Insert recipe and feature set on their first use; return the id of the recipe."""
        recipe = register(session, self.spec)
        row = {
            "name": self.name,
            "recipe_id": recipe.id,
            "columns": [feature.to_json() for feature in self.features],
            "storage": FeatureStorage.FILES,
        }
        insert_new(session, FeatureSet, [row])
        return recipe.id


def plan_embedding(session: Session, name: str, model: OpenModel, plates: str | None) -> Embedding:
    """Return the feature set for the embedding of a model.

    ``plates``: the digest of what was fitted to plates that the training has not seen.

    Raises:
        UserInputError: the model has no embedding, or the name is bad or taken.
    """
    from ..learn.models import NetworkModel

    if not isinstance(model.model, NetworkModel):
        raise UserInputError(
            f"Training run {model.run.id} is a baseline and has no embedding. Name the run of a "
            "network, or leave --embedding out."
        )
    check_set_name(name, "--embedding")
    parameters = {"embedding": LAYER, "width": model.model.width}
    if plates is not None:
        parameters |= {"fitted_plates": plates}
    sha256 = model.checkpoint.tensors.sha256
    spec = RecipeSpec(Stage.MEASURE, EMBEDDING_VERSION, parameters, sha256, (model.segment,))
    _check_taken(session, name, model.run.id, spec)
    features = tuple(_feature(i, model.run.id) for i in range(model.model.width))
    return Embedding(name, spec, features)


def _feature(index: int, run_id: int) -> Feature:
    return Feature(
        name=f"embedding_{index:03d}",
        dtype="float32",
        unit="1",
        source=f"cellstore predict: {LAYER} of the network of training run {run_id}",
        formula="",
        description="What the classifier reads of a cell: 0 or more, meaningless alone.",
    )


def _check_taken(session: Session, name: str, run_id: int, spec: RecipeSpec) -> None:
    recipe = session.scalars(
        select(Recipe).where(Recipe.fingerprint == fingerprint(spec), Recipe.stage == spec.stage)
    ).one_or_none()
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


VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The model of the training run, and the images to label; ``unseen``: it opens none.

    ``split`` is that of the training run. ``plates`` is what was fitted to plates that the training
    has not seen. ``notes`` are sentences that a reader of the labels has to know.
    """

    params: PredictParams
    model: OpenModel
    split: Split
    label_ids: NDArray[np.int64]
    images: Select[int]
    selected: int
    ready: int
    unseen: bool
    query: str
    plates: Mapping[str, Any]
    notes: tuple[str, ...]
    spec: RecipeSpec
    embedding: Embedding | None

    @property
    def trained(self) -> Run:
        """The training run."""
        return self.model.run

    @property
    def top_k(self) -> int:
        """How many labels are kept of a cell."""
        n_labels = len(self.label_ids)
        return n_labels if self.params.all_probabilities else min(self.params.top_k, n_labels)


def check_params(params: PredictParams) -> PredictParams:
    """Return ``params``, if they can be used.

    Raises:
        UserInputError, UnknownNameError: they cannot.
    """
    if params.top_k < 1:
        raise UserInputError(f"Top-k must be 1 or more, not {params.top_k}.")
    if params.subset is not None and params.subset not in list(Subset):
        raise UnknownNameError.of("side", params.subset, list(Subset))
    return params


def make_plan(
    session: Session, workspace: Workspace, params: PredictParams, model: OpenModel
) -> Plan:
    """Return the plan.

    Raises:
        UnknownNameError: no such plate, well or split, or a label of the model is gone.
        UserInputError: none of the images has measured cells, or the embedding cannot have its
            name.
    """
    split = session.get_one(Split, model.run.split_id)
    chosen, source = _chosen(session, params, split, model.source)
    unseen = model.meta.branches == (TABULAR,)
    images = _measured(segmented(chosen, source.segment_id), source, not unseen)
    selected, ready = (_count(session, query) for query in (chosen, images))
    if ready == 0:
        raise UserInputError(_nothing_to_label(params, selected, model.run.id))
    label_ids = _label_ids(session, model.meta)
    barcodes = _plates_of(session, images)
    model, plates = know_plates(session, workspace, model, barcodes)
    notes = _seen(session, model.run, split, images, ready)
    notes += describe_plates(model.meta.scaler, model.meta.whites, barcodes)
    mark = _mark(plates)
    embedding = None
    if params.embedding is not None:
        embedding = plan_embedding(session, params.embedding, model, mark)
    return Plan(
        params,
        model,
        split,
        label_ids,
        images,
        selected,
        ready,
        unseen,
        _text(params, source, chosen),
        plates,
        tuple(notes),
        _spec(session, params, model, images, source, mark),
        embedding,
    )


def _chosen(
    session: Session, params: PredictParams, split: Split, source: CellSource
) -> tuple[Select[int], CellSource]:
    """The images that are asked for, and the cells of the side and the plates that they are of."""
    chosen = images_of(session, params.selection)
    asked = split if params.split is None else find_split(session, params.split)
    source = replace(source, plates=params.plates)
    if params.subset is not None or params.split is not None:
        members = select(SplitMember.image_id).where(SplitMember.split_id == asked.id)
        if params.subset is not None:
            members = members.where(SplitMember.subset == params.subset)
        chosen = chosen.where(Image.id.in_(members))
        source = replace(source, split_id=asked.id, subset=params.subset)
    if params.limit is not None:
        chosen = first_of(session, chosen, params.limit)
    return chosen, source


def _text(params: PredictParams, source: CellSource, chosen: Select[int]) -> str:
    """The query of the cells, as it is kept with the run."""
    query = cells_query(source)
    if params.wells or params.where is not None or params.limit is not None:
        query = query.where(Image.id.in_(chosen))
    return as_text(query)


def _measured(images: Select[int], source: CellSource, pixels: bool) -> Select[int]:
    """Those of ``images``, joined to their segmentations, whose cells are measured.

    An image without cells is measured, too. ``pixels``: not those that have not been seen.
    """
    measured = aliased(Job)  # the jobs of this stage are looked up around it
    done = and_(
        measured.recipe_id == source.measure_id,
        measured.image_id == Image.id,
        measured.content_sha256 == Image.content_sha256,
        measured.status == Status.DONE,
    )
    if source.features.in_table:
        return images.where(exists().where(done))
    imported = ~exists().where(measured.recipe_id == source.measure_id)
    found = images.where(or_(exists().where(done), and_(imported, _in_files(source))))
    return found.where(Image.content_sha256.is_not(None)) if pixels else found


def _in_files(source: CellSource) -> ColumnElement[bool]:
    """Whether cells of a segmentation are within the range of cells of a file of the feature set.

    One that is, and has no row there, is labelled as an image without cells.
    """
    file = and_(
        Cell.segmentation_id == Segmentation.id,
        FeatureSet.recipe_id == source.measure_id,
        FeatureFile.feature_set_id == FeatureSet.id,
        Cell.id.between(FeatureFile.first_cell_id, FeatureFile.last_cell_id),
    )
    return or_(Segmentation.n_cells == 0, exists().where(file).correlate(Segmentation))


def _count(session: Session, images: Select[int], *more: ColumnElement[bool]) -> int:
    named = select(func.count()).select_from(Image).where(Image.id.in_(images), *more)
    return session.scalar(named) or 0


def _nothing_to_label(params: PredictParams, selected: int, run_id: int) -> str:
    if selected == 0:
        split = "the run's split" if params.split is None else f"split {params.split!r}"
        where = "in the store" if params.subset is None and params.split is None else f"in {split}"
        side = "" if params.subset is None else f" on the {params.subset} side"
        return (
            f"There is no image{side} {where} to label that meets every condition. Choose another "
            "side, or other plates, wells or conditions."
        )
    return (
        f"None of the {selected} images has cells measured by the recipes of training run "
        f"{run_id}. Run: cellstore segment, then: cellstore measure; or ingest their features"
    )


def _label_ids(session: Session, meta: ModelMeta) -> NDArray[np.int64]:
    query = select(Label.value, Label.id).where(Label.field == meta.field)
    known = dict(session.execute(query).all())
    gone = [value for value in meta.labels if value not in known]
    if gone:
        raise UnknownNameError.of("label", gone[0], known)
    return np.array([known[value] for value in meta.labels], dtype=np.int64)


def _plates_of(session: Session, images: Select[int]) -> list[str]:
    query = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
    query = query.join(Image, Image.well_id == Well.id).where(Image.id.in_(images)).distinct()
    return sorted(session.scalars(query))


def _seen(
    session: Session, trained: Run, split: Split, images: Select[int], ready: int
) -> list[str]:
    """Sentences on images that the model has met before: what it says of them proves nothing."""
    # Lists that are made once: asked image by image, a join would walk the split for each.
    members = select(SplitMember.image_id).where(SplitMember.split_id == split.id)
    trained_on = members.where(SplitMember.subset == Subset.TRAIN)
    other = aliased(Image)
    wells = select(other.well_id).where(other.id.in_(trained_on))
    is_train, in_well = Image.id.in_(trained_on), Image.well_id.in_(wells)
    side = (trained.result or {}).get("validation_side")
    chose = Image.id.in_(members.where(SplitMember.subset == side))
    counts = [
        (_count(session, images, is_train), "training run {} was trained on"),
        (_count(session, images, ~is_train, in_well), "are of wells that training run {} has seen"),
        (_count(session, images, chose) if side else 0, "chose the epoch of training run {}"),
    ]
    return [
        f"{number:,} of the {ready:,} images {what.format(trained.id)}: labels of these say "
        "little about new wells."
        for number, what in counts
        if number
    ]


def _mark(plates: Mapping[str, Any]) -> str | None:
    if not plates:
        return None
    return hashlib.sha256(json.dumps(plates, sort_keys=True).encode()).hexdigest()


def _spec(
    session: Session,
    params: PredictParams,
    model: OpenModel,
    images: Select[int],
    source: CellSource,
    mark: str | None,
) -> RecipeSpec:
    parameters = as_parameters(params) | {"images": _digest_of(session, images)}
    if params.split is not None:
        parameters["split"] = find_split(session, params.split).fingerprint
    if params.all_probabilities:
        del parameters["top_k"]
    if source.features.mark is not None:
        parameters["feature_files"] = source.features.mark
    if mark is not None:
        parameters["fitted_plates"] = mark
    inputs = (session.get_one(Recipe, model.run.recipe_id), model.segment, model.measure)
    sha256 = model.checkpoint.tensors.sha256
    return RecipeSpec(Stage.PREDICT, VERSION, parameters, sha256, inputs)


def _digest_of(session: Session, images: Select[int]) -> str:
    """What the images of the selection hold: with more of them, a run of its own labels all."""
    digest = hashlib.sha256()
    query = select(Image.content_sha256, Image.id).where(Image.id.in_(images))
    ordered = query.order_by(Image.content_sha256, Image.id).execution_options(yield_per=10_000)
    for content, image_id in session.execute(ordered):
        digest.update(f"{content or image_id}\n".encode())
    return digest.hexdigest()


MOST_ROWS = 2_000_000
"""Predictions that wait for each other where embeddings are written in one file, at most."""

ROWS_AT_ONCE = 100_000

_COLUMNS = ("run_id", "cell_id", "rank", "label_id", "probability")


@dataclass(frozen=True)
class PredictOutput:
    """What is said of the N cells of an image: K labels each, the most probable first.

    ``cell_ids`` (N,) ascend; ``label_ids`` and ``probabilities`` are (N, K), ``vectors``
    (N, width), if embeddings are wanted.
    """

    cell_ids: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    vectors: NDArray[np.float32] | None


@dataclass(frozen=True)
class Predict(ImageStage[int, PredictOutput]):
    """The stage: it runs in this process. ``label_ids``: of the classes of ``model``.

    ``embedding``: what else is made; its jobs are those of the recipe ``embedding_id``.
    """

    label = "predict"

    artifacts: ArtifactFolder
    model: OpenModel
    label_ids: NDArray[np.int64]
    top_k: int
    embedding: Embedding | None = None
    embedding_id: int | None = None
    images_per_file: int = 1

    def fetch(self, session: Session, tasks: Sequence[Task]) -> Mapping[int, int]:
        """Return the ids of the images: their cells are read where they are labelled."""
        return {task.image_id: task.image_id for task in tasks}

    def read(self, task_input: int) -> CellBlock:
        """Return the cells of the image with this id."""
        return self.model.reader(task_input)

    def compute(self, loaded: Sequence[CellBlock]) -> list[PredictOutput]:
        """Return what is said of the cells of each image."""
        outputs = []
        for cells in loaded:
            if self.embedding is not None:
                chances, vectors = self.model.predict_and_embed(cells)
            else:
                chances, vectors = self.model.predict(cells), None
            order = np.argsort(-chances, axis=1, kind="stable")[:, : self.top_k]
            best = np.clip(np.take_along_axis(chances, order, axis=1), 0.0, 1.0)
            ids = cells.cell_ids.cpu().numpy()
            outputs.append(PredictOutput(ids, self.label_ids[order], best, vectors))
        return outputs

    def write_together(
        self, run: RunCounter, done: Sequence[tuple[Task, PredictOutput]]
    ) -> Sequence[WrittenFile]:
        """Write the embeddings of some images."""
        if self.embedding is None or run.recipe_id != self.embedding_id:
            return ()
        ids = [output.cell_ids for _, output in done]
        vectors = [output.vectors.T for _, output in done if output.vectors is not None]
        return write_features(self.artifacts, self.embedding.schema, ids, vectors)

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, PredictOutput]],
        files: Sequence[WrittenFile],
    ) -> int:
        """Write the predictions; of the embeddings, whose they are."""
        if run.recipe_id == self.embedding_id:
            found = set_of_recipe(session, run.recipe_id)
            assert found is not None
            register_files(session, self.artifacts, found.id, run.run_id, files)
        else:
            waiting: list[tuple[Any, ...]] = []
            for _, output in done:
                cells, kept = output.label_ids.shape
                waiting += zip(
                    repeat(run.run_id, cells * kept),
                    np.repeat(output.cell_ids, kept).tolist(),
                    np.tile(np.arange(1, kept + 1), cells).tolist(),
                    output.label_ids.ravel().tolist(),
                    output.probabilities.ravel().tolist(),
                    strict=True,
                )
                if len(waiting) >= ROWS_AT_ONCE:
                    bulk_insert(session, Prediction, _COLUMNS, waiting)
                    waiting = []
            bulk_insert(session, Prediction, _COLUMNS, waiting)
        return sum(len(output.cell_ids) for _, output in done)


@dataclass(frozen=True)
class PredictResult:
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
    run: str = "latest",
    device: str = "auto",
) -> PredictResult:
    """Label the cells of a selection of images with the model of a training run.

    Rows are appended, never changed. An interrupted run of the same checkpoint and images is gone
    on with. Where more images have been measured since, a new run labels all of them, so that
    every finished run is whole.

    Raises:
        MissingExtraError: torch and the like are not installed.
        UnknownNameError: no such training run, split, plate, well or channel, a label of the model
            is gone, or the feature set is.
        UserInputError: the run has no checkpoint, none of the images has measured cells, the
            feature set is not the one that the model was trained on, a plate has no control cells
            to be normalised against, or the embedding cannot have its name.
        StorageError: the checkpoint is damaged.

    """
    need("train")
    from ..analysis.devices import pick_device

    params, chosen = check_params(params or PredictParams()), str(pick_device(device))
    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        model = open_model(session, workspace, trained, chosen)
        plan = make_plan(session, workspace, params, model)
    with workspace.database.begin() as session:
        recipe = register(session, plan.spec)
        embedding_id = None if plan.embedding is None else plan.embedding.register(session)
        state = count_images(session, recipe.id, plan.images, unseen=plan.unseen)
        todo = state.todo + state.failed
        earlier = _latest(session, recipe.id)
    unfinished = earlier if earlier is not None and earlier.status is not Status.DONE else None
    if earlier is not None and unfinished is None and todo == 0:
        return _result(plan, recipe, earlier.id, plan.ready, RunCounter(earlier.id, recipe.id))
    return _run(workspace, plan, recipe, embedding_id, unfinished, plan.ready - todo)


def _latest(session: Session, recipe_id: int) -> Run | None:
    query = select(Run).where(Run.recipe_id == recipe_id, Run.stage == Stage.PREDICT)
    return session.scalars(query.order_by(Run.id.desc()).limit(1)).first()


def _run(
    workspace: Workspace,
    plan: Plan,
    recipe: Recipe,
    embedding_id: int | None,
    unfinished: Run | None,
    earlier: int,
) -> PredictResult:
    stage = Predict(workspace.artifacts, plan.model, plan.label_ids, plan.top_k)
    recipes = [recipe.id]
    if embedding_id is not None:
        most = min(ROWS_OF_FILE, MOST_ROWS // plan.top_k)
        with workspace.database.read() as session:
            per_file = images_per_file(session, plan.model.segment.id, most)
        stage = replace(
            stage, embedding=plan.embedding, embedding_id=embedding_id, images_per_file=per_file
        )
        recipes.append(embedding_id)
    did: RunCounter | None = None
    try:
        with running(
            workspace.database,
            recipe,
            parent_id=plan.trained.id,
            split_id=plan.split.id,
            query=plan.query,
            resume=None if unfinished is None else unfinished.id,
        ) as run:
            did = RunCounter(run.id, recipe.id)
            _keep_plates(workspace, run, plan)
            scope = JobScope(dict.fromkeys(recipes, run.id), plan.images, plan.unseen)
            with workspace.database.begin() as session:
                # A run is whole or not finished: what failed is tried again.
                requeue_failed(session, scope)
            counters = run_jobs(workspace, stage, scope)
            did = counters[recipe.id]
            failures = [failure for one in counters.values() for failure in one.failures]
            did.failures = list(dict.fromkeys(failures))
            run.result = _summary(workspace, plan, run, recipe, did)
            # A run that lacks images is not finished: the next call goes on with it.
            fail_if_any(len(did.failures), did.images, "labelled")
    except JobsFailedError:
        assert did is not None
    return _result(plan, recipe, did.run_id, earlier, did)


def _keep_plates(workspace: Workspace, run: RunHandle, plan: Plan) -> None:
    """Keep what was fitted to plates that the training has not seen, as a file of the run."""
    if not plan.plates:
        return
    text = json.dumps(plan.plates, indent=1, sort_keys=True, allow_nan=False)
    file = workspace.artifacts.write(ArtifactKind.CHECKPOINT, text.encode(), ".json")
    with workspace.database.begin() as session:
        attach(session, run.id, keep_file(session, file))


def _summary(
    workspace: Workspace, plan: Plan, run: RunHandle, recipe: Recipe, did: RunCounter
) -> dict[str, Any]:
    """The whole run, earlier attempts included."""
    mine = and_(Job.run_id == run.id, Job.recipe_id == recipe.id, Job.status == Status.DONE)
    with workspace.database.read() as session:
        images = session.scalar(select(func.count()).select_from(Job).where(mine))
        cells = session.scalar(
            select(func.count()).where(Prediction.run_id == run.id, Prediction.rank == 1)
        )
    counts = {"images": images, "failed": len(did.failures), "cells": cells}
    named = {"feature_set": plan.embedding.name} if plan.embedding else {}
    return {**counts, **named, "notes": list(plan.notes)}


def _result(
    plan: Plan, recipe: Recipe, run_id: int, earlier: int, did: RunCounter
) -> PredictResult:
    return PredictResult(
        run_id=run_id,
        recipe_id=recipe.id,
        train_run_id=plan.trained.id,
        split=plan.split.name,
        selected=plan.selected,
        waiting=plan.selected - plan.ready,
        earlier=earlier,
        done=did.images,
        failures=tuple(did.failures),
        cells=did.cells,
        feature_set=plan.embedding.name if plan.embedding else None,
        notes=plan.notes,
    )
