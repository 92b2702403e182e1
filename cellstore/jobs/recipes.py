"""Recipes: what to do, named by a fingerprint of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..db.statements import insert_new
from ..enums import Stage
from ..errors import UserInputError
from ..models import Recipe, RecipeInput


@dataclass(frozen=True)
class RecipeSpec:
    """Everything that decides the result of a stage.

    ``version`` is the stage's own number, raised when its output changes; ``inputs`` are the
    recipes whose results it reads.
    """

    stage: Stage
    version: int
    parameters: dict[str, Any]
    weights_sha256: str | None = None
    inputs: tuple[Recipe, ...] = ()


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
        "parameters": spec.parameters,
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
