"""Runs by what people type, read without the classes of the tables, which load slowly.

No such run, or none that is done, is an ``UnknownNameError``; what is no name of a run, or a run of
another stage than is wanted, a ``UserInputError``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import JSON, column, or_, select, table
from sqlalchemy.orm import Session

from ..config import RunName
from ..enums import Origin, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError

RUN_WORDS = ("latest", "last")

_RUNS = table(
    "runs",
    *map(column, ("id", "stage", "status", "parent_id", "recipe_id", "origin", "split_id")),
)
_RECIPES = table(
    "recipes", *map(column, ("id", "version", "weights_sha256")), column("parameters", JSON)
)
_INPUTS = table("recipe_inputs", column("recipe_id"), column("input_id"))
_SPLITS = table("splits", *map(column, ("id", "family", "fold")))
_NARROWER = ("plates", "wells", "where", "limit", "split")
"""Parameters with which a predict run may have labelled fewer than all test images."""


class NamedRun(NamedTuple):
    """A run that somebody has named.

    ``folds``: the predict runs of all folds of a cross-validation, which are read as one under the
    number of the last of them; ``name``: what was typed for it.
    """

    id: int
    stage: Stage
    status: Status
    folds: tuple[int, ...] = ()
    name: str = ""

    @property
    def read_as(self) -> dict[int, int]:
        """The predict runs that are read, each with the number under which it is."""
        return dict.fromkeys(self.folds or (self.id,), self.id)


def find_named_run(session: Session, reference: RunName, stages: Sequence[Stage] = ()) -> NamedRun:
    """Return the run with this number, or the ``latest`` finished one of ``stages``.

    The stage may be typed, too: ``latest predict``, ``train-latest``. Also ``#3`` and ``run 3``.

    Baselines stand behind: they are the latest only where there is nothing else, so that what
    follows a training by a baseline still means the network. So do trainings that were declared,
    whose networks cannot be opened.
    """
    text = str(reference).strip().lower()
    words = [] if text.startswith("-") else re.split(r"[\s_:#-]+", text)
    words = [word for word in words if word not in ("", "run", "the")]
    typed = [Stage(word) for word in words if word in list(Stage)]
    others = [word for word in words if word not in list(Stage)]
    if stages and typed and typed[0] not in stages:
        wanted = " or ".join(stage.value for stage in stages)
        raise UserInputError(f"This needs a {wanted} run, not a {typed[0].value} run.")
    stages = typed or stages
    named = others or ([RUN_WORDS[0]] if typed else [])
    name = named[0] if len(named) == 1 and len(typed) < 2 else ""
    runs = _RUNS.c
    query = select(runs.id, runs.stage, runs.status).order_by(runs.id.desc())
    if stages:
        query = query.where(runs.stage.in_([stage.value for stage in stages]))
    if name in RUN_WORDS:
        chosen = query.where(runs.status == Status.DONE.value)
        if stages:
            trained = _RUNS.alias()
            baseline = (
                select(trained.c.id)
                .join(_RECIPES, _RECIPES.c.id == trained.c.recipe_id)
                .where(or_(trained.c.id == runs.id, trained.c.id == runs.parent_id))
                .where(_RECIPES.c.parameters["baseline"].as_string().is_not(None))
            )
            behind = (runs.stage == Stage.TRAIN.value) & (runs.origin == Origin.DECLARED.value)
            chosen = chosen.order_by(None)
            chosen = chosen.order_by(or_(baseline.exists(), behind), runs.id.desc())
    else:
        if not name.isdecimal() or len(name) > 18:
            raise UserInputError(
                f"A run is named by its number, 'latest' or 'latest predict', not {reference!r}."
            )
        chosen = query.where(runs.id == int(name))
    found = session.execute(chosen.limit(1)).first()
    if found is None:
        kind = f"{' or '.join(stage.value for stage in stages)} run" if stages else "run"
        known = [row.id for row in session.execute(query.limit(5))]
        if name in RUN_WORDS:
            none = f"No {kind} has come to its end" if known else f"There is no {kind} yet"
            first = f"cellstore {stages[0].value}" if stages else "cellstore status"
            raise UnknownNameError(f"{none}. Next: {first}")
        raise UnknownNameError.of(kind, name, known)
    return NamedRun(found.id, Stage(found.stage), Status(found.status))


def find_predict_run(session: Session, reference: RunName) -> NamedRun:
    """Return the predict run of this name; a train run stands for its latest predict run.

    The name of a cross-validation stands for those of all its folds; see :func:`find_folds`.
    """
    reference = str(reference).strip()
    named = reference not in RUN_WORDS
    folds = None
    if named and not reference.lstrip("#").isdecimal():
        folds = find_folds(session, reference)
    if folds is not None:
        return folds
    run = find_named_run(session, reference, () if named else (Stage.PREDICT,))
    if run.stage == Stage.TRAIN:
        later = select(_RUNS.c.id).where(_RUNS.c.parent_id == run.id)
        later = later.where(_RUNS.c.stage == Stage.PREDICT.value)
        done = later.where(_RUNS.c.status == Status.DONE.value).order_by(_RUNS.c.id.desc())
        if (found := session.scalar(done.limit(1))) is not None:
            run = NamedRun(found, Stage.PREDICT, Status.DONE)
    if run.stage != Stage.PREDICT:
        raise UnknownNameError(
            f"Run {run.id} ({run.stage.value}) has no predictions to report on. "
            "Label images with a trained run first: cellstore predict"
        )
    return run


class Model(NamedTuple):
    """Trainings that are alike in all but their split: one, or one for each fold.

    ``kind``: the baseline, or the name that was declared; empty for a network. ``runs``: the last
    train run of each split, by its id. ``labelled``: the last predict run that has labelled all
    test images of its split, by the train run.
    """

    kind: str
    parameters: dict[str, Any]
    runs: dict[int, int]
    labelled: dict[int, int]


def models_of(session: Session, splits: Collection[int]) -> list[Model]:
    """Return the finished trainings on some splits, those together that were done alike."""
    runs, recipes, predicting = _RUNS.c, _RECIPES.c, _RUNS.alias()
    trained = session.execute(
        select(runs.id, runs.split_id, recipes.id.label("recipe"), recipes.version)
        .add_columns(recipes.weights_sha256, recipes.parameters)
        .join(_RECIPES, recipes.id == runs.recipe_id)
        .where(runs.split_id.in_(splits), runs.stage == Stage.TRAIN.value)
        .where(runs.status == Status.DONE.value)
        .order_by(runs.id)
    ).all()
    used = select(_INPUTS.c.recipe_id, _INPUTS.c.input_id).order_by(_INPUTS.c.input_id)
    inputs: dict[int, list[int]] = {}
    for pair in session.execute(used.where(_INPUTS.c.recipe_id.in_({x.recipe for x in trained}))):
        inputs.setdefault(pair.recipe_id, []).append(pair.input_id)
    labelled: dict[int, int] = {}
    folds_query = (
        select(predicting.c.id, predicting.c.parent_id, recipes.parameters)
        .join(_RECIPES, recipes.id == predicting.c.recipe_id)
        .where(predicting.c.parent_id.in_({row.id for row in trained}))
        .where(predicting.c.status == Status.DONE.value)
        .order_by(predicting.c.id)
    )
    for one in session.execute(folds_query):
        narrowed = any(one.parameters.get(name) for name in _NARROWER)
        if one.parameters.get("subset") in (None, Subset.TEST.value) and not narrowed:
            labelled[one.parent_id] = one.id
    found: dict[str, Model] = {}
    for row in trained:
        chosen = row.parameters.get("where") or row.parameters.get("sql")
        per_fold = ("split", "cells") if chosen else ("split",)
        own = {name: value for name, value in row.parameters.items() if name not in per_fold}
        key = repr((row.version, row.weights_sha256, sorted(own.items()), inputs.get(row.recipe)))
        kind = str(own.get("baseline", own.get("declared", "")))
        if "declared" in own:  # of these nothing but their name is alike
            key = kind
        model = found.setdefault(key, Model(kind, own, {}, {}))
        model.runs[row.split_id] = row.id
        if row.id in labelled:
            model.labelled[row.id] = labelled[row.id]
    return list(found.values())


def find_folds(session: Session, reference: str) -> NamedRun | None:
    """Return the predict runs of a cross-validation as one, ``None`` if none is called so.

    ``FAMILY`` means the models trained last in the same way on all folds, ``FAMILY:7`` those that
    were trained as in run 7, ``FAMILY:logistic`` those of a baseline.
    """
    splits = _SPLITS.c
    family, wanted = reference, ""
    query = select(splits.id, splits.fold).order_by(splits.fold)
    found = session.execute(query.where(splits.family == family)).all()
    if not found and ":" in reference:
        family, _, wanted = reference.rpartition(":")
        found = session.execute(query.where(splits.family == family)).all()
    if not found:
        return None
    models = models_of(session, [row.id for row in found])
    names = [
        {item.kind, *map(str, (*item.runs.values(), *item.labelled.values()))} for item in models
    ]
    named = [item for item, own in zip(models, names, strict=True) if wanted in own or not wanted]
    if not named:
        known = sorted(set().union(*names) - {""})
        if wanted and known:
            raise UnknownNameError.of(f"model of cross-validation {family}", wanted, known)
        raise UnknownNameError(
            f"No fold of cross-validation {family!r} has a model yet. Next: cellstore train "
            f"--split {shlex.quote(family)}"
        )

    def labelled(model: Model, split: int) -> int | None:
        run = model.runs.get(split)
        return None if run is None else model.labelled.get(run)

    def rank(model: Model) -> tuple[bool, bool, int]:
        whole = all(labelled(model, row.id) for row in found)
        # What was declared may have the name of a baseline.
        first = "baseline" in model.parameters if wanted else not model.kind
        return whole, first, max(model.runs.values())

    model = max(named, key=rank)
    missing = [str(row.fold) for row in found if not labelled(model, row.id)]
    if missing:
        command = f"cellstore train --split {shlex.quote(family)}"
        if "declared" in model.parameters:
            command = "cellstore predictions add"
        raise UnknownNameError(
            f"Fold {', '.join(missing)} of cross-validation {family!r} has no labels. Finish it "
            f"with the command that began it: {command}"
        )
    folds = tuple(run for row in found if (run := labelled(model, row.id)))
    return NamedRun(max(folds), Stage.PREDICT, Status.DONE, folds, reference)
