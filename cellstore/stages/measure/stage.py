"""The stage: what is to be measured, by which recipes, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from ...config import EVERYTHING, THIS_PROCESS, MeasureParams, Resources, Selection
from ...db.models import Recipe, Segmentation
from ...errors import UserInputError
from ...reading.cells import last_with_masks
from ...runs import (
    JobsResult,
    Part,
    Tallies,
    Work,
    Workspace,
    execute_together,
    find_recipe,
    images_of,
    segmented,
)
from ...terms import Stage
from .groups import GroupPlan, plan_groups
from .rows import Target, measure_work


@dataclass(frozen=True)
class MeasureResult(JobsResult):
    """What was done for one group of features; ``others``: for the other groups of the call."""

    group: str = ""
    feature_set: str = ""
    others: tuple[MeasureResult, ...] = ()


def measure(
    workspace: Workspace,
    params: MeasureParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    segmentation: str | None = None,
    resources: Resources = THIS_PROCESS,
    dry_run: bool = False,
) -> MeasureResult:
    """Measure the cells found by one segment recipe (default: the one used last).

    Masks that another tool made are measured as our own. Intensities are those of the segmented
    plane unless ``params`` names another. Each group of features is a recipe and a run of its
    own; the files of an image are opened once for all of them. Returns what was done for the
    first group, with that of the others.

    Raises:
        UnknownNameError: nothing has been segmented, or no such recipe, plate, group or channel.
        UserInputError: the masks of that recipe's cells are unknown.
    """
    params = params or MeasureParams()
    with workspace.database.read() as session:
        source = _source(session, segmentation)
        images = segmented(images_of(session, selection), source.id)
        plans = plan_groups(session, params, source, images)

    def work_of(tallies: Tallies) -> Work[Any, Any]:
        targets = [
            Target(plans[place], tally, beside=number > 0)
            for number, (place, tally) in enumerate(tallies)
        ]
        return measure_work(workspace, targets)

    parts = [Part(plan.spec, plan.register) for plan in plans]
    results = execute_together(
        workspace, parts, images, work_of, resources=resources, dry_run=dry_run
    )
    return _together(plans, results)


def _together(plans: list[GroupPlan], results: list[JobsResult]) -> MeasureResult:
    first, *others = (
        (plan, {field.name: getattr(result, field.name) for field in fields(JobsResult)})
        for plan, result in zip(plans, results, strict=True)
    )
    beside = tuple(_result(*one) for one in others)
    return _result(*first, beside)


def _result(
    plan: GroupPlan, values: dict[str, Any], others: tuple[MeasureResult, ...] = ()
) -> MeasureResult:
    return MeasureResult(**values, group=plan.name, feature_set=plan.feature_set, others=others)


def _source(session: Session, segmentation: str | None) -> Recipe:
    if segmentation is None:
        return last_with_masks(session)
    found = find_recipe(session, Stage.SEGMENT, segmentation)
    cells = exists().where(Segmentation.recipe_id == found.id)
    masks = cells.where(Segmentation.mask_artifact_id.is_not(None))
    if session.scalar(select(cells)) and not session.scalar(select(masks)):
        raise UserInputError(
            f"Another tool found the cells of segment recipe {found.id} and their masks are "
            "unknown, so they cannot be measured. If you have the masks, run: cellstore ingest "
            "masks DIR"
        )
    return found
