"""From what people type to rows: runs, recipes, splits; images and wells: see ``places``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session, aliased

from ..db.models import Recipe, Run, Split
from ..errors import UnknownNameError, UserInputError
from ..terms import Stage, Status

RUN_WORDS = ("latest", "last")
_FILLERS = ("run", "the")


def run_in(session: Session, reference: str, stages: Sequence[Stage] = ()) -> Run:
    """Return the run with this number, or the ``latest`` finished one of ``stages``.

    The stage may be typed, too: ``latest predict``, ``train-latest``. Also ``#3`` and ``run 3``.

    Baselines stand behind: they are the latest only where there is nothing else, so that what
    follows a training by a baseline still means the network.

    Raises:
        UnknownNameError: there is none.

    """
    reference, typed = _words(reference)
    if typed is not None:
        stages = _agreed(typed, stages)
    query = select(Run).order_by(Run.id.desc())
    if stages:
        query = query.where(Run.stage.in_(stages))
    if reference in RUN_WORDS:
        done = query.where(Run.status == Status.DONE)
        ordered = done.order_by(None).order_by(_of_baseline(), Run.id.desc()) if stages else done
        found = session.scalars(ordered.limit(1)).first()
    else:
        found = session.scalars(query.where(Run.id == _number(reference)).limit(1)).first()
    if found is None:
        kind = f"{' or '.join(stage.value for stage in stages)} run" if stages else "run"
        known = [run.id for run in session.scalars(query.limit(5))]
        raise UnknownNameError.of(kind, reference, known)
    return found


def _words(reference: str) -> tuple[str, Stage | None]:
    """What of ``latest predict`` names a run, and the stage if there is one."""
    parts = [part for part in re.split(r"[\s_:-]+", reference.strip().lower()) if part]
    parts = [part for part in parts if part not in _FILLERS]
    stages = [Stage(part) for part in parts if part in list(Stage)]
    others = [part for part in parts if part not in list(Stage)]
    if len(parts) == 1 and others:
        return others[0], None
    if len(stages) == 1 and len(others) <= 1:
        return (others or [RUN_WORDS[0]])[0], stages[0]
    return reference, None


def _agreed(typed: Stage, stages: Sequence[Stage]) -> Sequence[Stage]:
    if stages and typed not in stages:
        wanted = " or ".join(stage.value for stage in stages)
        raise UserInputError(f"A {wanted} run is wanted here, not a {typed.value} run.")
    return (typed,)


def _of_baseline() -> ColumnElement[bool]:
    """Whether a run trained a baseline, or labelled with one."""
    trained = aliased(Run)
    query = select(trained.id).join(Recipe, Recipe.id == trained.recipe_id)
    query = query.where(or_(trained.id == Run.id, trained.id == Run.parent_id))
    return query.where(Recipe.parameters["baseline"].as_string().is_not(None)).exists()


def find_run(session: Session, reference: str, stage: Stage) -> Run:
    """Return a run of one ``stage``; see :func:`run_in`."""
    return run_in(session, reference, (stage,))


def find_recipe(session: Session, stage: Stage, reference: str | None = None) -> Recipe:
    """Return a recipe by its number, else the start of its fingerprint; default: the last used.

    Raises:
        UnknownNameError: there is none, so the stage has not been run.

    """
    query = select(Recipe).where(Recipe.stage == stage)
    if reference is None:
        last = query.join(Run, Run.recipe_id == Recipe.id).order_by(Run.id.desc()).limit(1)
        found = session.scalars(last).first()
        if found is None:
            raise UnknownNameError(
                f"Nothing has been through {stage.value!r} yet. Run: cellstore {stage.value}"
            )
        return found
    recipes = session.scalars(query).all()
    matches = [item for item in recipes if reference == str(item.id)]
    matches = matches or [item for item in recipes if item.fingerprint.startswith(reference)]
    if len(matches) != 1:
        known = [f"{item.id} ({item.fingerprint[:8]})" for item in recipes]
        raise UnknownNameError.of(f"{stage.value} recipe", reference, known)
    return matches[0]


def find_split(session: Session, name: str | None) -> Split:
    """Return the split of this name; without a name the only or the latest one.

    Raises:
        UnknownNameError: there is none.

    """
    query = select(Split).order_by(Split.id.desc())
    found = session.scalars(query.where(Split.name == name) if name else query).first()
    if found is None and name is None:
        raise UnknownNameError("There is no split yet. Make one with: cellstore split create NAME")
    if found is None:
        raise UnknownNameError.of("split", name, [item.name for item in session.scalars(query)])
    return found


def _number(text: str) -> int:
    word = text.strip().lstrip("#")
    if not word.isdecimal() or len(word) > 18:
        raise UserInputError(
            f"A run is named by its number, 'latest' or 'latest predict', not {text!r}."
        )
    return int(word)
