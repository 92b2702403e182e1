"""Which wells are compared: all that is known, and refused, before a cell is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from ...config import ContrastParams, Selection, as_parameters
from ...db.models import Cell, Image, Plate, Recipe, Segmentation, Treatment, Well
from ...errors import UnknownNameError, UserInputError
from ...reading.cells import CellSource, cells_query, choose_recipes, recipes_of_set
from ...reading.featuresets import open_set
from ...reading.learning import teacher_of
from ...runs import RecipeSpec, Workspace, images_of
from ...terms import Control, Stage

VERSION = 1
POOLED = "all treatments"


@dataclass(frozen=True)
class Group:
    """What is compared: a name, the ids of its treatments, and its plates that have controls.

    ``lost``: plates of it without control wells. ``but``: it is all treatments but these.
    """

    name: str
    treatment_ids: tuple[int, ...]
    plate_ids: tuple[int, ...]
    n_wells: int
    lost: int = 0
    but: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``teacher``: the training that the features were learned in, labels and all.
    """

    params: ContrastParams
    source: CellSource
    control: Group
    groups: tuple[Group, ...]
    spec: RecipeSpec
    teacher: int | None = None


def make_plan(
    workspace: Workspace, params: ContrastParams, names: tuple[str | None, str | None]
) -> Plan:
    """Return the plan; ``names`` are those of the segmentation and the measurement."""
    _check(params)
    with workspace.database.read() as session:
        if params.features is None:
            segment, measure = choose_recipes(session, *names)
        else:
            segment, measure = recipes_of_set(session, params.features, *names)
        features = open_set(session, workspace.artifacts, measure.id)
        source = CellSource(segment.id, measure.id, plates=params.plates, features=features)
        images_of(session, Selection(plates=params.plates))  # that there are such plates
        wells = _wells(session, params)
        control = _control(wells, params)
        groups = _groups(wells, control, params)
        spec = _spec(session, source, params, (segment, measure))
        teacher = teacher_of(session, measure)
    return Plan(params, source, control, groups, spec, teacher.id if teacher else None)


def _check(params: ContrastParams) -> None:
    if params.folds < 2 or params.max_cells < 2 or params.nulls < 0:
        raise UserInputError("A contrast needs 2 folds or more, and 2 cells or more on a side.")


@dataclass(frozen=True)
class _Wells:
    plate_id: int
    treatment_id: int
    name: str
    negative: bool
    number: int


def _wells(session: Session, params: ContrastParams) -> list[_Wells]:
    """Treatments on plates: a row for each pair, with how many wells."""
    keys = (Well.plate_id, Treatment.id, Treatment.pert_iname, Treatment.control)
    query = (
        select(*keys, func.count())
        .join(Treatment, Treatment.id == Well.treatment_id)
        .join(Plate, Plate.id == Well.plate_id)
        .group_by(*keys)
    )
    if params.plates:
        query = query.where(Plate.barcode.in_(params.plates))
    found = session.execute(query.order_by(Well.plate_id, Treatment.id))
    return [_Wells(*row[:3], row[3] == Control.NEGATIVE, row[4]) for row in found]


def _control(wells: Sequence[_Wells], params: ContrastParams) -> Group:
    wanted = params.control
    chosen = [w for w in wells if (w.negative if wanted is None else w.name == wanted)]
    if not chosen and wanted is None:
        raise UserInputError(
            "No treatment is marked as negative control. Name one with --control, or mark it as "
            "negcon in the treatment table."
        )
    if not chosen:
        raise UnknownNameError.of("treatment", wanted, sorted({w.name for w in wells}))
    return _group(", ".join(sorted({w.name for w in chosen})), chosen)


def _groups(wells: Sequence[_Wells], control: Group, params: ContrastParams) -> tuple[Group, ...]:
    others = [w for w in wells if w.treatment_id not in control.treatment_ids]
    names = sorted({w.name for w in others})
    for name in params.treatments:
        if name not in names:
            raise UnknownNameError.of("treatment", name, names)
    chosen = params.treatments or tuple(names)
    if not chosen:
        raise UserInputError("Every well has the control. There is nothing to compare it with.")
    if params.pooled:
        pool = _group(POOLED, [w for w in others if w.name in set(chosen)])
        if not params.treatments:  # there may be more than a database takes one by one
            pool = replace(pool, treatment_ids=control.treatment_ids, but=True)
        found = [pool]
    else:
        by_name: dict[str, list[_Wells]] = {name: [] for name in chosen}
        for well in others:
            by_name.get(well.name, []).append(well)
        found = [_group(name, some) for name, some in by_name.items()]
    matched = (_on_plates_of(group, control) for group in found)
    # Those of the same plates follow each other, so that their controls are read once.
    return tuple(sorted(matched, key=lambda group: (group.plate_ids, group.name)))


def _group(name: str, wells: Sequence[_Wells]) -> Group:
    treatments, plates = ({w.treatment_id for w in wells}, {w.plate_id for w in wells})
    number = sum(some.number for some in wells)
    return Group(name, tuple(sorted(treatments)), tuple(sorted(plates)), number)


def _on_plates_of(group: Group, control: Group) -> Group:
    shared = tuple(plate for plate in group.plate_ids if plate in set(control.plate_ids))
    return replace(group, plate_ids=shared, lost=len(group.plate_ids) - len(shared))


def _spec(
    session: Session, source: CellSource, params: ContrastParams, inputs: tuple[Recipe, ...]
) -> RecipeSpec:
    parameters = as_parameters(params) | {"cells": _digest_of(session, source)}
    del parameters["features"], parameters["plates"]  # the cells say it
    parameters["treatments"] = sorted(params.treatments)
    if not source.features.in_table:
        parameters["feature_files"] = source.features.mark
    return RecipeSpec(Stage.CONTRAST, VERSION, parameters, None, inputs)


def _digest_of(session: Session, source: CellSource) -> str:
    """What decides the cells beside the recipes: images, their treatments, and how many cells."""
    keys = (Image.id, Segmentation.content_sha256, Well.id, Well.treatment_id)
    cells = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
    query: Any = cells.with_only_columns(*keys, func.count(Cell.id))
    if source.plates:
        on_plate = select(Plate.id).where(Plate.barcode.in_(source.plates))
        query = query.where(Well.plate_id.in_(on_plate))
    query = query.group_by(*keys).order_by(Image.id).execution_options(yield_per=10_000)
    digest = hashlib.sha256()
    for row in session.execute(query):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def cells_of(source: CellSource, group: Group) -> Any:
    """Return the query of the cells of a group on its plates."""
    query = cells_query(replace(source, plates=())).join(Well, Well.id == Image.well_id)
    named = Well.treatment_id.in_(group.treatment_ids)
    treated = and_(Well.treatment_id.is_not(None), ~named) if group.but else named
    return query.where(treated, Well.plate_id.in_(group.plate_ids))
