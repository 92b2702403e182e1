"""Runs by what people type, read without the classes of the tables, which load slowly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import JSON, column, or_, select, table
from sqlalchemy.orm import Session

from ..config import RunName
from ..enums import Origin, Stage, Status
from ..errors import UnknownNameError, UserInputError

RUN_WORDS = ("latest", "last")

_RUNS = table("runs", *map(column, ("id", "stage", "status", "parent_id", "recipe_id", "origin")))
_RECIPES = table("recipes", column("id"), column("parameters", JSON))


class NamedRun(NamedTuple):
    """A run that somebody has named."""

    id: int
    stage: Stage
    status: Status


def find_named_run(session: Session, reference: RunName, stages: Sequence[Stage] = ()) -> NamedRun:
    """Return the run with this number, or the ``latest`` finished one of ``stages``.

    The stage may be typed, too: ``latest predict``, ``train-latest``. Also ``#3`` and ``run 3``.

    Baselines stand behind: they are the latest only where there is nothing else, so that what
    follows a training by a baseline still means the network. So do trainings that were declared,
    whose networks cannot be opened.

    Raises:
        UnknownNameError: there is none.
        UserInputError: it is no number, or a run of another stage is wanted.
    """
    reference = str(reference)
    words = [word for word in re.split(r"[\s_:-]+", reference.strip().lower()) if word]
    words = [word for word in words if word not in ("run", "the")]
    typed = [Stage(word) for word in words if word in list(Stage)]
    others = [word for word in words if word not in list(Stage)]
    if len(words) == 1 and others:
        reference = others[0]
    elif len(typed) == 1 and len(others) <= 1:
        reference = (others or [RUN_WORDS[0]])[0]
        if stages and typed[0] not in stages:
            wanted = " or ".join(stage.value for stage in stages)
            raise UserInputError(f"This needs a {wanted} run, not a {typed[0].value} run.")
        stages = typed
    runs = _RUNS.c
    query = select(runs.id, runs.stage, runs.status).order_by(runs.id.desc())
    if stages:
        query = query.where(runs.stage.in_([stage.value for stage in stages]))
    if reference in RUN_WORDS:
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
        number = reference.strip().lstrip("#")
        if not number.isdecimal() or len(number) > 18:
            raise UserInputError(
                f"A run is named by its number, 'latest' or 'latest predict', not {reference!r}."
            )
        chosen = query.where(runs.id == int(number))
    found = session.execute(chosen.limit(1)).first()
    if found is None:
        kind = f"{' or '.join(stage.value for stage in stages)} run" if stages else "run"
        known = [row.id for row in session.execute(query.limit(5))]
        if not known and reference in RUN_WORDS:
            first = f"cellstore {stages[0].value}" if stages else "cellstore status"
            raise UnknownNameError(f"There is no {kind} yet. Next: {first}")
        raise UnknownNameError.of(kind, reference, known)
    return NamedRun(found.id, Stage(found.stage), Status(found.status))


def find_predict_run(session: Session, reference: RunName) -> NamedRun:
    """Return the predict run of this name; a train run stands for its latest predict run.

    Raises:
        UnknownNameError: there is no such run, or it has no predictions.
    """
    named = reference not in RUN_WORDS
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
