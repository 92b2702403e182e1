"""Draw splits, and keep them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.orm import Session

from ...config import SplitParams, as_parameters
from ...db.models import Recipe
from ...errors import UserInputError
from ...extras import need
from ...ops.splitting import (
    Assignment,
    LeftOut,
    SplitImage,
    balanced,
    cut_by_groups,
    enough,
    folds,
    grouped_split,
    named_split,
    published_split,
)
from ...reading.cells import as_text, last_with_masks
from ...runs import RecipeSpec, Workspace
from ...terms import GroupLevel, Stage
from .candidates import CELL, Pool, read_pool
from .facts import PUBLISHED, SplitResult
from .params import caps, checked, checked_name
from .writing import Drawn, keep

VERSION = 1


@dataclass(frozen=True)
class _Drawing:
    """What was drawn: one assignment, or one for each fold."""

    params: SplitParams
    pool: Pool
    assignments: tuple[Assignment, ...]
    spec: RecipeSpec


def create_split(workspace: Workspace, name: str, params: SplitParams | None = None) -> SplitResult:
    """Assign the images that have a treatment to sides, and keep that under ``name``.

    The same images and parameters give the same split in every store. Protocol ``published``
    works by image, so wells are on both sides; ``grouped`` keeps groups together.

    Raises:
        UserInputError: the name is taken by another split, or the images cannot be split.
        UnknownNameError: no such protocol, field, plate, class or column.
        MissingExtraError: the published protocol needs scikit-learn.

    """
    name, params = checked_name(name), checked(params or SplitParams())
    if params.folds is not None:
        raise UserInputError("Folds are several splits: make them with create_folds.")
    drawing = _draw(workspace, params)
    (result,) = keep(workspace, _drawn(drawing, [name]), drawing.spec)
    return result


def create_folds(workspace: Workspace, name: str, params: SplitParams) -> tuple[SplitResult, ...]:
    """Make the splits ``NAME-1`` to ``NAME-k`` of a cross-validation, all or none.

    Their test sides partition the images; of each, the next fold's test side validates. They are
    one family, and share the images, the classes and what is left out.

    Raises:
        UserInputError: a name is taken by another split, or the images cannot be split so.
        UnknownNameError: no such protocol, field, plate, class or column.
        MissingExtraError: groups that hold several classes need scikit-learn.

    """
    name, params = checked_name(name, more=5), checked(params)
    if params.folds is None:
        raise UserInputError("Say how many folds there are.")
    drawing = _draw(workspace, params)
    names = [f"{name}-{number}" for number in range(1, params.folds + 1)]
    return keep(workspace, _drawn(drawing, names, name), drawing.spec)


def _drawn(drawing: _Drawing, names: Sequence[str], family: str | None = None) -> list[Drawn]:
    pool, params = drawing.pool, drawing.params
    return [
        Drawn(
            name,
            params,
            as_text(pool.query),
            tuple((pool.candidates[i], side) for i, side in sorted(assignment.subsets.items())),
            {**pool.left_out, **_left_out_by(assignment)},
            family,
            number if family else None,
        )
        for number, (name, assignment) in enumerate(
            zip(names, drawing.assignments, strict=True), start=1
        )
    ]


def _draw(workspace: Workspace, params: SplitParams) -> _Drawing:
    with workspace.database.read() as session:
        segment = last_with_masks(session) if params.downsample_by == CELL else None
        pool = read_pool(session, params, segment.id if segment else None)
        inputs = _inputs(session, pool, segment)
    assignments = _assign(pool, params)
    parameters = _parameters(params, pool) | {"images": pool.digest}
    spec = RecipeSpec(Stage.SPLIT, VERSION, parameters, inputs=inputs)
    return _Drawing(params, pool, assignments, spec)


def _inputs(session: Session, pool: Pool, segment: Recipe | None) -> tuple[Recipe, ...]:
    qc = session.get_one(Recipe, pool.qc.recipe_id) if pool.qc else None
    return tuple(recipe for recipe in (qc, segment) if recipe is not None)


def _parameters(params: SplitParams, pool: Pool) -> dict[str, Any]:
    parameters = as_parameters(params)
    del parameters["leave_out_flagged"]  # unless it is asked for, a split is as it always was
    return parameters if pool.qc is None else {**parameters, "leave_out_flagged": pool.qc.id}


def _assign(pool: Pool, params: SplitParams) -> tuple[Assignment, ...]:
    images = [
        SplitImage(index, item.label, item.group(params.group_level), item.cells)
        for index, item in enumerate(pool.candidates)
    ]
    out: tuple[LeftOut, ...] = ()
    if params.min_images:
        images, out = enough(images, params.min_images)
    cut: dict[str, tuple[int, int]] = {}
    if params.downsample is not None or params.downsample_by == CELL:
        images, cut = balanced(images, params.seed, caps(params), params.downsample_by == CELL)
    elif params.folds is not None:
        images, cut = cut_by_groups(images, params.seed)
    by_default = params.downsample is None and params.downsample_by != CELL
    return tuple(
        replace(
            found,
            left_out=(*out, *found.left_out),
            downsampled={**cut, **found.downsampled},
        )
        for found in _assigned(images, params, balance=by_default)
    )


def _assigned(
    images: Sequence[SplitImage], params: SplitParams, *, balance: bool
) -> list[Assignment]:
    seed, validation = params.seed, params.validation_size
    if params.folds is not None:
        need("train")
        return folds(images, seed, params.folds, validation > 0)
    if params.protocol == PUBLISHED:
        need("train")
        return [published_split(images, seed, params.test_size)]
    if params.test_plates:
        sides = (params.test_plates, params.validation_plates)
        return [named_split(images, seed, *sides, validation)]
    by_class = params.group_level is GroupLevel.TREATMENT
    return [grouped_split(images, seed, params.test_size, validation, balance, by_class)]


def _left_out_by(assignment: Assignment) -> dict[str, Any]:
    classes = [_class_left_out(item) for item in assignment.left_out]
    cut = {
        label: {"before": before, "after": after}
        for label, (before, after) in assignment.downsampled.items()
    }
    return {"classes": classes, "downsampled": cut}


def _class_left_out(item: LeftOut) -> dict[str, Any]:
    return {"label": item.label, "images": len(item.image_ids), "reason": item.reason}
