"""From what people type to rows: runs, recipes, splits, images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session, aliased

from ..db.models import Image, ImageFile, Plate, Recipe, Run, Split, Well
from ..errors import UnknownNameError, UserInputError
from ..terms import Stage, Status

RUN_WORDS = ("latest", "last")


def run_in(session: Session, reference: str, stages: Sequence[Stage] = ()) -> Run:
    """Return the run with this number, or the ``latest`` finished one of ``stages``.

    Baselines stand behind: they are the latest only where there is nothing else, so that what
    follows a training by a baseline still means the network.

    Raises:
        UnknownNameError: there is none.

    """
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


def find_image(session: Session, text: str) -> Image:
    """Return the image that ``text`` names.

    Accepts an id (``17``), a core file name (``r01c01f01``, with ``PLATE/`` before it where
    several plates have it), ``PLATE/A01/1`` (plate, well, site), or the name of one of its files.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: several images have it.

    """
    for query in _image_queries(text.strip()):
        found = list(session.scalars(query.distinct().limit(6)))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(_full_names(session, found))
            raise UserInputError(f"{text!r} names several images: {names}. Name one of them.")
    known = session.scalars(select(Image.core_name).order_by(Image.id).limit(5))
    raise UnknownNameError.of("image", text, known)


def _image_queries(text: str) -> list[Select[Image]]:
    base = select(Image).join(Well, Well.id == Image.well_id).join(Plate)
    parts = text.split("/")
    queries: list[Select[Image]] = []
    if text.isdecimal() and len(text) < 19:
        queries.append(base.where(Image.id == int(text)))
    if len(parts) == 3 and parts[2].isdecimal():
        queries.append(
            base.where(
                Plate.barcode == parts[0],
                Well.name == well_name(parts[1]),
                Image.site == int(parts[2]),
            )
        )
    if len(parts) == 2:
        queries.append(base.where(Plate.barcode == parts[0], Image.core_name == parts[1]))
    queries.append(base.where(Image.core_name == text))
    queries.append(base.where(_has_file(text)))
    return queries


def _has_file(name: str) -> Any:
    return Image.id.in_(select(ImageFile.image_id).where(ImageFile.name == name))


def well_name(text: str) -> str:
    """Return the name of a well as it is stored: ``D04`` of ``d4``; other words as they are."""
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d{1,2})", text.strip())
    return f"{match[1].upper()}{int(match[2]):02d}" if match else text


def _full_names(session: Session, images: Sequence[Image]) -> list[str]:
    query = select(Plate.barcode, Image.core_name).join(Well, Well.plate_id == Plate.id)
    query = query.join(Image, Image.well_id == Well.id)
    rows = session.execute(query.where(Image.id.in_([item.id for item in images])))
    return [f"{row.barcode}/{row.core_name}" for row in rows]


def _number(text: str) -> int:
    word = text.strip().lstrip("#")
    if not word.isdecimal() or len(word) > 18:
        raise UserInputError(f"A run is named by its number or 'latest', not {text!r}.")
    return int(word)
