"""Recipes: what to do, named by a fingerprint of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..db.statements import insert_new
from ..enums import Stage, Status
from ..errors import UserInputError
from ..models import Image, Plate, Recipe, RecipeInput, Run, Well


@dataclass(frozen=True)
class RecipeSpec:
    """Everything that decides the result of a stage.

    ``version`` is the stage's own number, raised when its output changes; ``inputs`` are the
    recipes whose results it reads. ``local`` is kept with the parameters, but does not count: row
    numbers, which mean nothing in another store.
    """

    stage: Stage
    version: int
    parameters: dict[str, Any]
    weights_sha256: str | None = None
    inputs: tuple[Recipe, ...] = ()
    local: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(spec: RecipeSpec) -> str:
    """Return the sha256 of the canonical JSON of ``spec``: same fingerprint, same result."""
    content = {
        "stage": spec.stage.value,
        "version": spec.version,
        "parameters": spec.parameters,
        "weights": spec.weights_sha256,
        "inputs": sorted(recipe.fingerprint for recipe in spec.inputs),
    }
    return digest(content)


def digest(content: Any) -> str:
    """Return the sha256 of ``content`` as canonical JSON (sorted keys, no spaces, no NaN).

    Raises:
        UserInputError: a number is infinite or none at all.
    """
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise UserInputError("A parameter is not a finite number. Give plain numbers.") from error
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_images(
    session: Session, images: Select[int], details: Mapping[int, Any] | None = None
) -> str:
    """Return a digest of images by what they are of and their bytes: the same in every store.

    ``images``: a query of their ids. ``details``: what else decides a result, such as how many
    cells an image has; images that it does not name do not count.
    """
    query = (
        select(Image.id, Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
        .add_columns(Image.content_sha256)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Image.id.in_(images))
        .execution_options(yield_per=10_000)
    )
    lines = (
        json.dumps([*keys, (details or {}).get(image_id)])
        for image_id, *keys in session.execute(query)
        if details is None or image_id in details
    )
    digests = sorted(hashlib.sha256(line.encode()).digest() for line in lines)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def finished_run(session: Session, spec: RecipeSpec, split_id: int | None = None) -> Run | None:
    """Return the latest run of ``spec``, and of a split, that came to its end."""
    query = (
        select(Run)
        .join(Recipe, Recipe.id == Run.recipe_id)
        .where(Recipe.fingerprint == fingerprint(spec), Recipe.stage == spec.stage)
        .where(Run.status == Status.DONE)
        .order_by(Run.id.desc())
    )
    if split_id is not None:
        query = query.where(Run.split_id == split_id)
    return session.scalars(query.limit(1)).first()


def known_recipe(session: Session, spec: RecipeSpec) -> Recipe | None:
    """Return the recipe of ``spec``, if it was ever used."""
    query = select(Recipe).where(Recipe.stage == spec.stage)
    return session.scalars(query.where(Recipe.fingerprint == fingerprint(spec))).one_or_none()


def register(session: Session, spec: RecipeSpec) -> Recipe:
    """Return the recipe of ``spec``, made on its first use."""
    mark = fingerprint(spec)
    row = {
        "stage": spec.stage,
        "version": spec.version,
        "parameters": {**spec.parameters, **spec.local},
        "weights_sha256": spec.weights_sha256,
        "fingerprint": mark,
        "created_at": datetime.now(UTC),
    }
    insert_new(session, Recipe, [row])
    recipe = known_recipe(session, spec)
    assert recipe is not None
    if spec.inputs:
        links = [{"recipe_id": recipe.id, "input_id": source.id} for source in spec.inputs]
        insert_new(session, RecipeInput, links)
    return recipe
