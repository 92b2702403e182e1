"""What is to be labelled by which model: all that is known, and refused, before any run begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from ...config import PredictParams, as_parameters
from ...db.models import (
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Label,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from ...errors import UnknownNameError, UserInputError
from ...ops.branches import TABULAR
from ...reading.cells import CellSource, as_text, cells_query
from ...reading.models import OpenModel, know_plates
from ...reading.normalising import describe_plates
from ...runs import RecipeSpec, Workspace, find_split, first_of, images_of, segmented
from ...terms import LabelField, Stage, Status, Subset
from .embedding import Embedding, plan_embedding

if TYPE_CHECKING:
    from ...ops.models import ModelMeta

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
    query = select(Label.value, Label.id).where(Label.field == LabelField(meta.field))
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
