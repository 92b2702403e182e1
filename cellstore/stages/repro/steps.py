"""All runs that a run relies on, in the order of redoing them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import (
    FeatureFile,
    FeatureSet,
    Image,
    IngestFile,
    Job,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Split,
)
from ...runs import Workspace, run_in
from ...terms import Stage, Status
from .facts import Repro, Step, TableRead
from .orders import order_of
from .script import script_of
from .words import words_of

SELECTIONS = ("--plate", "--well", "--where", "--limit")
"""What says which images a command was about: no part of a recipe, so it is read as typed."""

_BY_IMAGE = (Stage.SEGMENT, Stage.MEASURE)
_COMMANDS = {Stage.INGEST: (("ingest",), ("refresh",))}
"""How commands begin that make runs of a stage, where they are not called like it."""

_NOT_PACKAGES = ("python", "platform", "resumed", "cellstore")


def repro(workspace: Workspace, reference: str) -> Repro:
    """Return the commands and versions that redo a run, and all that it relies on.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = run_in(session, reference)
        steps = tuple(step_of(session, item) for item in _chain(session, run))
    known = run.environment
    packages = {n: str(v) for n, v in known.items() if n not in _NOT_PACKAGES}
    python = str(known["python"]) if "python" in known else None
    return Repro(
        run_id=run.id,
        stage=run.stage.value,
        steps=steps,
        packages=packages,
        python=python,
        code_version=run.code_version,
        script=script_of(run, steps, packages, python),
    )


def _chain(session: Session, run: Run) -> list[Run]:
    """The run and all before it that it relies on, by number; ingests are all needed."""
    found: dict[int, Run] = {}
    waiting = [run]
    while waiting:
        item = waiting.pop()
        if item.id in found:
            continue
        found[item.id] = item
        waiting += [other for other in _before(session, item) if other.id <= item.id]
    ingests = select(Run).where(Run.stage == Stage.INGEST, Run.id < run.id)
    for item in session.scalars(ingests.where(Run.status == Status.DONE)):
        found.setdefault(item.id, item)
    return [found[key] for key in sorted(found)]


def _before(session: Session, run: Run) -> Iterator[Run]:
    if run.parent_id is not None:
        yield session.get_one(Run, run.parent_id)
    recipe = session.get_one(Recipe, run.recipe_id)
    flagged = recipe.parameters.get("leave_out_flagged")
    if isinstance(flagged, int):
        yield session.get_one(Run, flagged)
    if run.split_id is not None:
        split = session.get_one(Split, run.split_id)
        yield from _makers(session, session.get_one(Recipe, split.recipe_id), run)
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    for source in session.scalars(query.where(RecipeInput.recipe_id == recipe.id)):
        if source.stage is not Stage.TRAIN:
            yield from _makers(session, source, run)


def _makers(session: Session, recipe: Recipe, run: Run) -> list[Run]:
    """The finished runs before ``run`` that made what a recipe stands for."""
    mine = select(Run).where(Run.recipe_id == recipe.id, Run.stage == recipe.stage)
    done = mine.where(Run.id < run.id, Run.status == Status.DONE).order_by(Run.id)
    made = list(session.scalars(done))
    if made:
        return made
    # Brought in by an ingest, or by a predict run that kept its embedding.
    ids = set(
        session.scalars(
            select(Segmentation.run_id).where(Segmentation.recipe_id == recipe.id).distinct()
        )
    )
    files = select(FeatureFile.run_id).join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
    ids |= set(session.scalars(files.where(FeatureSet.recipe_id == recipe.id).distinct()))
    return list(session.scalars(select(Run).where(Run.id.in_(ids)).order_by(Run.id)))


def step_of(session: Session, run: Run) -> Step:
    """Return how one run is redone."""
    recipe = session.get_one(Recipe, run.recipe_id)
    order = order_of(session, run, recipe)
    typed = typed_words(run.command)
    if typed is not None and typed[:1] not in _COMMANDS.get(run.stage, ((run.stage.value,),)):
        typed = None  # of a command that does much more, such as demo
    if order is None:
        words: tuple[str, ...] = typed or ()
        doubts: tuple[str, ...] = () if typed else (f"it was begun by: {run.command}",)
    else:
        words, doubts = words_of(order)
        if run.stage in _BY_IMAGE and not _did_all(session, run):
            words, doubts = _with_selection(words, doubts, typed)
    return Step(
        run_id=run.id,
        stage=run.stage.value,
        words=words,
        spelled=order is not None,
        doubts=doubts,
        fingerprint=recipe.fingerprint,
        weights_sha256=recipe.weights_sha256,
        code_version=run.code_version,
        environment=run.environment,
        started_at=run.started_at.isoformat(),
        tables=_tables(session, run),
    )


def _did_all(session: Session, run: Run) -> bool:
    """Whether a run did every image that the store has the files of, so that none need be named."""
    mine = select(func.count()).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
    there = select(func.count()).where(Image.content_sha256.is_not(None))
    return session.scalar(mine.where(Job.status == Status.DONE)) == session.scalar(there)


def _with_selection(
    words: tuple[str, ...], doubts: tuple[str, ...], typed: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if typed is None:
        doubt = "which images it was about is not known: it was begun from Python"
        return words, (*doubts, doubt)
    return (*words, *selection_of(typed)), doubts


def selection_of(typed: tuple[str, ...]) -> list[str]:
    """Return the options of a typed command that say which images it was about."""
    found = []
    for number, word in enumerate(typed):
        name, mark, value = word.partition("=")
        if name not in SELECTIONS:
            continue
        if mark:
            found.append(f"{name}={value}")
        elif number + 1 < len(typed):
            found.append(f"{name}={typed[number + 1]}")
    return found


def typed_words(command: str) -> tuple[str, ...] | None:
    """Return the words after ``cellstore`` of a command that was typed, without its ``--store``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if not words or words[0] != "cellstore":
        return None
    kept: list[str] = []
    skip = False
    for word in words[1:]:
        if skip or word == "--store":
            skip = not skip
            continue
        if not re.match(r"--store=|--json$", word):
            kept.append(word)
    return tuple(kept)


def _tables(session: Session, run: Run) -> tuple[TableRead, ...]:
    query = select(IngestFile).where(IngestFile.run_id == run.id).order_by(IngestFile.id)
    return tuple(
        TableRead(row.name, row.sha256, row.layout, row.n_rows) for row in session.scalars(query)
    )
