"""One run of a stage that goes image by image, from its recipe to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, event, func, select
from sqlalchemy.orm import Session

from ..config import Resources
from ..db.models import Job, Recipe
from ..terms import Stage, Status
from .jobs import Outcome, Progressed, progressed
from .ledger import RunHandle, running
from .recipes import RecipeSpec, known_recipe, register
from .work import Share, Work, work_through
from .workspace import Workspace


@dataclass(frozen=True)
class Forecast:
    """What a run would do. ``seconds``: until its end, by what past jobs took; None: no idea.

    ``per_image`` is in seconds of one worker, from the last jobs of ``basis``: this recipe, or
    this stage with other options.
    """

    images: int
    workers: int
    per_image: float | None
    seconds: float | None
    basis: str | None


@dataclass(frozen=True)
class JobsResult:
    """What a stage that goes image by image did.

    ``run_id`` is None when nothing was done. ``selected`` counts the images that the selection
    names, ``waiting`` those of them whose files are still missing, ``failed_before`` those that
    failed in earlier runs and were left alone, ``cells`` what was written by this run.
    ``forecast``: of a dry run, which does nothing.
    """

    run_id: int | None
    recipe_id: int | None
    selected: int
    waiting: int
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int
    failed_before: int = 0
    forecast: Forecast | None = None


@dataclass
class Tally:
    """The run in whose name rows are written, and how many cells they are of.

    ``beside``: images that were done in the pass of another recipe.
    """

    run_id: int
    recipe_id: int
    cells: int = 0
    beside: int = 0

    def add(self, session: Session, cells: int, beside: int = 0) -> None:
        """Count what a transaction writes once it is committed; one that is undone counts not."""

        def kept(_session: Session) -> None:
            self.cells += cells
            self.beside += beside

        event.listen(session, "after_commit", kept, once=True)


@dataclass(frozen=True)
class Part:
    """One of the recipes of a call; ``on_register`` adds the rows that belong to it.

    ``parent_id``: the run whose result its run relies on.
    """

    spec: RecipeSpec
    on_register: Callable[[Session, Recipe], None] | None = None
    parent_id: int | None = None


Tallies = Sequence[tuple[int, Tally]]
"""The place of a recipe among the parts of a call, and its tally."""


def execute(
    workspace: Workspace,
    spec: RecipeSpec,
    candidates: Select[int],
    work_of: Callable[[Tally], Work[Any, Any]],
    *,
    resources: Resources,
    dry_run: bool = False,
    on_register: Callable[[Session, Recipe], None] | None = None,
    parent_id: int | None = None,
) -> JobsResult:
    """Do, in one run, what a recipe has not done of the candidates; or only say what it would do.

    ``on_register`` adds the rows that belong to the recipe itself. ``parent_id``: the run whose
    result this one relies on.

    Raises:
        StorageError, KeyboardInterrupt, RunCancelledError: see :func:`work_through`.
    """
    parts = [Part(spec, on_register, parent_id)]

    def only(tallies: Tallies) -> Work[Any, Any]:
        return work_of(tallies[0][1])

    return execute_together(
        workspace, parts, candidates, only, resources=resources, dry_run=dry_run
    )[0]


def execute_together(
    workspace: Workspace,
    parts: Sequence[Part],
    candidates: Select[int],
    work_of: Callable[[Tallies], Work[Any, Any]],
    *,
    resources: Resources,
    dry_run: bool = False,
) -> list[JobsResult]:
    """Do several recipes in one pass over the images, each in a run of its own.

    The work that ``work_of`` returns does the jobs of the first of some tallies, and closes those
    of the others beside it (``jobs.close_beside``). What is left of the others then, because the
    first was done before or failed, is done after that.

    Raises:
        StorageError, KeyboardInterrupt, RunCancelledError: see :func:`work_through`.
    """
    if dry_run:
        return [_forecast(workspace, part.spec, candidates, resources) for part in parts]
    with workspace.database.begin() as session:
        recipes = [_registered(session, part) for part in parts]
        states = [progressed(session, recipe.id, candidates) for recipe in recipes]
    open_parts = [place for place, state in enumerate(states) if state.todo]
    results = [_result(None, *pair) for pair in zip(recipes, states, strict=True)]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(_running(workspace, parts[place], recipes[place]))
            for place in open_parts
        ]
        tallies = [
            (place, Tally(run.id, recipes[place].id))
            for place, run in zip(open_parts, runs, strict=True)
        ]
        for number, (place, tally) in enumerate(tallies):
            work = work_of(tallies[number:])
            beside = tuple(other.run_id for _, other in tallies if other is not tally)
            outcome = _pass(workspace, work, tally, candidates, resources, beside)
            done = outcome.done + tally.beside
            runs[number].result = {
                "images": done, "failed": outcome.failed, "cells": tally.cells,
            }  # fmt: skip
            failures = tuple(outcome.failures)
            results[place] = _result(
                tally.run_id, recipes[place], states[place], done, failures, tally.cells
            )
    return results


def _running(workspace: Workspace, part: Part, recipe: Recipe) -> AbstractContextManager[RunHandle]:
    return running(workspace.database, recipe, parent_id=part.parent_id)


def _registered(session: Session, part: Part) -> Recipe:
    recipe = register(session, part.spec)
    if part.on_register is not None:
        part.on_register(session, recipe)
    return recipe


def _pass(
    workspace: Workspace,
    work: Work[Any, Any],
    tally: Tally,
    candidates: Select[int],
    resources: Resources,
    beside: tuple[int, ...],
) -> Outcome:
    if tally.beside:
        with workspace.database.read() as session:
            if not progressed(session, tally.recipe_id, candidates).todo:
                return Outcome()
    share = Share(tally.run_id, tally.recipe_id, candidates, beside=beside)
    return work_through(workspace.database, workspace.progress, work, share, resources)


def _result(
    run_id: int | None,
    recipe: Recipe | None,
    state: Progressed,
    done: int = 0,
    failures: tuple[tuple[str, str], ...] = (),
    cells: int = 0,
    forecast: Forecast | None = None,
) -> JobsResult:
    recipe_id = None if recipe is None else recipe.id
    return JobsResult(
        run_id,
        recipe_id,
        state.selected,
        state.waiting,
        done,
        failures,
        cells,
        state.failed,
        forecast,
    )


def _forecast(
    workspace: Workspace, spec: RecipeSpec, candidates: Select[int], resources: Resources
) -> JobsResult:
    with workspace.database.read() as session:
        recipe = known_recipe(session, spec)
        state = progressed(session, recipe.id if recipe else 0, candidates)
        per_image, basis = _past(session, spec.stage, recipe)
    workers = max(1, resources.workers)
    seconds = None if per_image is None else per_image * state.todo / workers
    forecast = Forecast(state.todo, workers, per_image, seconds, basis)
    return _result(None, recipe, state, forecast=forecast)


def _past(session: Session, stage: Stage, recipe: Recipe | None) -> tuple[float | None, str | None]:
    """Mean seconds of the last jobs of a recipe, else of the stage; and of which."""
    if recipe is not None and (found := _mean(session, recipe.id)) is not None:
        return found, "this recipe"
    query = (
        select(Job.recipe_id)
        .join(Recipe, Recipe.id == Job.recipe_id)
        .where(Recipe.stage == stage, Job.status == Status.DONE)
        .order_by(Job.id.desc())
    )
    other = session.scalar(query.limit(1))
    return (None, None) if other is None else (_mean(session, other), f"recipe {other}")


def _mean(session: Session, recipe_id: int) -> float | None:
    done = (Job.recipe_id == recipe_id, Job.status == Status.DONE)
    last = select(Job.seconds).where(*done).order_by(Job.id.desc()).limit(1000).subquery()
    return session.scalar(select(func.avg(last.c.seconds)))
