"""What a run was asked to do, read back from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...config import (
    BaselineParams,
    ImageInput,
    MeasureParams,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from ...db.models import FeatureSet, Recipe, RecipeInput, Run, Split
from ...ops.branches import BRANCHES
from ...reading.cells import plane_of
from ...terms import FeatureStorage, GroupLevel, LabelField, Projection, Stage, Subset
from .facts import Order

MARK = 16
"""Digits of a fingerprint that name a recipe in a command, in any store that has it."""

FROM_FILE = "file"
"""What a recipe of a training calls a file of weights."""


def order_of(session: Session, run: Run, recipe: Recipe) -> Order | None:
    """Return the order of a run; none: its stage is redone by the command that was typed."""
    read = _READ.get(recipe.stage)
    return None if read is None else read(session, run, recipe)


def _known(kind: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    values = {name: value for name, value in stored.items() if name in names}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}


def _plane(stored: Mapping[str, Any]) -> ImageInput:
    return ImageInput(tuple(stored["channels"]), Projection(stored["projection"]))


def _segment(_session: Session, _run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "imported" in stored:
        return None
    values = _known(SegmentParams, stored)
    values["image"] = _plane(stored["image"])
    if values.get("nuclei") is not None:
        values["nuclei"] = _plane(stored["nuclei"])
    if values.get("diameter_from") is not None:
        values["diameter_from"] = values["diameter_from"][:MARK]
    return Order(SegmentParams(**values))


def _measure(session: Session, _run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "group" in stored:
        channels = ImageInput(tuple(stored["channels"]))
        params = MeasureParams(channels, (stored["group"],))
    elif "image" in stored:
        segment = input_of(session, recipe, Stage.SEGMENT)
        plane = _plane(stored["image"])
        same = segment is not None and plane == _plane_of(segment)
        params = MeasureParams(None if same else plane)
        if not same and not plane.channels:
            doubt = "it looked at the first channels, not at what was segmented: from Python only"
            return Order(params, _named(session, recipe), (doubt,))
    else:
        return None
    return Order(params, _named(session, recipe))


def _plane_of(segment: Recipe) -> ImageInput | None:
    return plane_of(segment) if "image" in segment.parameters else None


def _named(session: Session, recipe: Recipe) -> dict[str, str]:
    """Segmentation and measurement that a recipe reads, by fingerprint."""
    words = {Stage.SEGMENT: "segmentation", Stage.MEASURE: "measurement"}
    found = {}
    for stage, word in words.items():
        source = input_of(session, recipe, stage)
        if source is not None:
            found[word] = source.fingerprint[:MARK]
    return found


def input_of(session: Session, recipe: Recipe, stage: Stage) -> Recipe | None:
    """Return the recipe of a stage that ``recipe`` reads from, if there is one."""
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    query = query.where(RecipeInput.recipe_id == recipe.id, Recipe.stage == stage)
    return session.scalars(query.order_by(Recipe.id).limit(1)).first()


def _split(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "files" in stored or "seed" not in stored:  # the tables of others
        return None
    values = _known(SplitParams, stored)
    values["field"] = LabelField(stored["field"])
    values["group_level"] = GroupLevel(stored["group_level"])
    if values.get("downsample") is not None:
        values["downsample"] = tuple((label, size) for label, size in stored["downsample"])
    if stored.get("leave_out_flagged") is not None:
        values["leave_out_flagged"] = str(stored["leave_out_flagged"])
    params = SplitParams(**values)
    result = run.result or {}
    query = select(Split).where(Split.recipe_id == recipe.id).order_by(Split.id)
    made = session.scalars(query).all()
    told = result.get("splits", [result.get("split")])
    mine = [split for split in made if split.name in told] or made
    if not mine:
        return Order(params, {"name": str(told[0])}, ("the split is deleted",))
    return Order(params, {"name": mine[0].family or mine[0].name})


def _set_name(session: Session, recipe: Recipe) -> str | None:
    """The feature set that a training read by name: one in files."""
    measure = input_of(session, recipe, Stage.MEASURE)
    if measure is None:
        return None
    query = select(FeatureSet.name).where(FeatureSet.recipe_id == measure.id)
    return session.scalar(query.where(FeatureSet.storage == FeatureStorage.FILES))


def _train(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    split = session.get(Split, run.split_id) if run.split_id else None
    names = _named(session, recipe) | ({"split": split.name} if split else {})
    flagged = stored.get("leave_out_flagged")
    more = {
        "features": _set_name(session, recipe),
        "leave_out_flagged": None if flagged is None else str(flagged),
    }
    if "baseline" in stored:
        kind = str(stored["baseline"])
        params = BaselineParams(**_known(BaselineParams, stored) | more)
        return Order(params, names | {"baseline": kind})
    values = {"branches": BRANCHES} | _known(TrainParams, stored) | more
    if stored.get("weights") == FROM_FILE:
        doubt = (
            "it began from a file of weights that the store does not hold: put the path of the "
            f"file with sha256 {recipe.weights_sha256} in place of --weights=file"
        )
        return Order(TrainParams(**values), names, (doubt,))
    return Order(TrainParams(**values), names)


def _predict(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    values = _known(PredictParams, stored)
    if values.get("subset") is not None:
        values["subset"] = Subset(values["subset"])
    params = PredictParams(**values)
    doubts: tuple[str, ...] = ()
    if params.split is not None:
        query = select(Split.name).where(Split.fingerprint == params.split).order_by(Split.id)
        name = session.scalar(query.limit(1))
        doubts = () if name else ("the split whose side it labelled is deleted",)
        params = replace(params, split=name or params.split)
    return Order(params, {"run": str(run.parent_id)}, doubts)


_READ: Mapping[Stage, Callable[[Session, Run, Recipe], Order | None]] = {
    Stage.SEGMENT: _segment,
    Stage.MEASURE: _measure,
    Stage.SPLIT: _split,
    Stage.TRAIN: _train,
    Stage.PREDICT: _predict,
}
