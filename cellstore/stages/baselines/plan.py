"""What baselines will learn from: all that is known, and refused, before a cell is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...config import BaselineParams
from ...db.models import Image, Recipe, Split, SplitMember, Well
from ...errors import UnknownNameError, UserInputError
from ...ops import baselines
from ...reading.cells import (
    CellSource,
    ImageBlock,
    choose_recipes,
    list_blocks,
    recipes_of_set,
)
from ...reading.featuresets import open_set
from ...reading.learning import flags_that_count, taught_wells, training_labels
from ...reading.normalising import NORMALISATIONS, TRAIN
from ...runs import RecipeSpec, Workspace, find_split, register
from ...terms import Stage, Subset

VERSION = 1
_USED = {
    baselines.MAJORITY: (),
    baselines.SHUFFLED: ("max_cells", "seed", "strength"),
    baselines.CELLCOUNT: ("max_cells", "seed", "strength"),
    baselines.POSITION: ("max_cells", "seed", "trees"),
    baselines.LOGISTIC: ("max_cells", "seed", "strength"),
    baselines.FOREST: ("max_cells", "seed", "trees", "depth", "smallest_leaf"),
}
"""The parameters that decide what each baseline learns."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``source`` is the training side, ``blocks`` its images that have cells, ``labels`` the classes
    of these by value; ``without`` are the classes that have no cell to learn from.
    """

    params: BaselineParams
    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    blocks: tuple[ImageBlock, ...]
    labels: dict[str, int]
    without: tuple[str, ...]
    remarks: tuple[str, ...]
    inputs: tuple[Recipe, ...]

    def spec(self, kind: str) -> RecipeSpec:
        """Return what decides the result of one baseline."""
        parameters = {name: getattr(self.params, name) for name in _USED[kind]}
        parameters |= {"baseline": kind, "split": self.split.fingerprint}
        parameters |= {"cells": _digest_of(self.blocks)}
        if self.source.unflagged_by is not None:
            parameters["leave_out_flagged"] = self.source.unflagged_by
        if kind in baselines.ON_FEATURES:
            parameters |= _reading(self.params, self.source)
        return RecipeSpec(Stage.TRAIN, VERSION, parameters, None, self.inputs)


def _reading(params: BaselineParams, source: CellSource) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if params.normalise != TRAIN:
        found["normalise"] = params.normalise
    if not source.features.in_table:
        found |= {"feature_files": source.features.mark, "gaps": "mean of the training side"}
    return found


def make_plan(
    workspace: Workspace, params: BaselineParams, names: tuple[str | None, str | None, str | None]
) -> Plan:
    """Return the plan; ``names`` are those of the split, the segmentation and the measurement."""
    _check(params)
    with workspace.database.read() as session:
        split = find_split(session, names[0])
        if params.features is None:
            segment, measure = choose_recipes(session, names[1], names[2])
        else:
            segment, measure = recipes_of_set(session, params.features, names[1], names[2])
        features = open_set(session, workspace.artifacts, measure.id)
        qc, unseen = flags_that_count(session, params.leave_out_flagged, split.id, segment.id)
        source = CellSource(segment.id, measure.id, split.id, Subset.TRAIN, features=features)
        source = replace(source, unflagged_by=qc.id if qc else None)
        blocks = tuple(list_blocks(session, source))
        labels, without = _labels(session, split, blocks)
        made_by = session.get_one(Recipe, split.recipe_id)
        by_qc = (session.get_one(Recipe, qc.recipe_id),) if qc else ()
        leak = taught_wells(session, measure, split.id)
    inputs = (made_by, segment, measure, *by_qc)
    remarks = tuple(text for text in (unseen, leak) if text)
    return Plan(params, split, segment, measure, source, blocks, labels, without, remarks, inputs)


def _check(params: BaselineParams) -> None:
    counts = (params.max_cells, params.trees, params.depth, params.smallest_leaf)
    if min(counts) < 1 or params.strength <= 0:
        raise UserInputError(
            "The numbers of cells, trees and levels and the penalty must be above 0."
        )
    if params.normalise not in NORMALISATIONS:
        raise UnknownNameError.of("normalisation", params.normalise, NORMALISATIONS)


def _labels(
    session: Session, split: Split, blocks: Sequence[ImageBlock]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Label ids by value, sorted by value, and the values that no block has."""
    seen = {block.label_id for block in blocks}
    every = training_labels(session, split.id)
    known = {value: label_id for value, label_id in every.items() if label_id in seen}
    return known, tuple(value for value in every if value not in known)


def _digest_of(blocks: Sequence[ImageBlock]) -> str:
    digest = hashlib.sha256()
    for line in sorted((b.content_sha256 or "", b.label_id, b.n_cells) for b in blocks):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def check_blocks(plan: Plan) -> None:
    """Refuse a training side without measured cells, or of one class."""
    if not plan.blocks:
        what = f"cells in feature set {plan.source.features.name!r}"
        raise UserInputError(
            f"No image on the training side of split {plan.split.name!r} has "
            f"{'measured cells' if plan.source.features.in_table else what}. "
            "Run: cellstore segment, then: cellstore measure; or name another split with --split."
        )
    if len(plan.labels) < 2:
        raise UserInputError(
            f"The training side of split {plan.split.name!r} has cells of one class only "
            f"({next(iter(plan.labels))}), so there is nothing to tell apart. Make another split."
        )
    if plan.params.max_cells < len(plan.labels):
        raise UserInputError(
            f"{plan.params.max_cells} cells cannot be of all {len(plan.labels)} classes. Give more "
            "--max-cells."
        )


@dataclass(frozen=True)
class WellOf:
    """A well: where it is, and the label of its training images."""

    well_id: int
    row: int
    column: int
    label_id: int


def training_wells(session: Session, plan: Plan) -> list[WellOf]:
    """Return the wells of the training images that have cells, by id."""
    query = (
        select(Well.id, Well.row, Well.column, SplitMember.label_id, SplitMember.image_id)
        .join(Image, Image.well_id == Well.id)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == plan.split.id, SplitMember.subset == Subset.TRAIN)
        .order_by(Well.id, Image.id)
        .execution_options(yield_per=10_000)
    )
    seen = {block.image_id for block in plan.blocks}
    found: dict[int, WellOf] = {}
    for well_id, row, column, label_id, image_id in session.execute(query):
        if image_id in seen and well_id not in found:
            found[well_id] = WellOf(well_id, row, column, label_id)
    return list(found.values())


def commit(workspace: Workspace, plan: Plan, kind: str) -> Recipe:
    """Register the recipe; the run that follows freezes the split."""
    with workspace.database.begin() as session:
        return register(session, plan.spec(kind))


def as_list(values: Sequence[Any]) -> str:
    """Return the first few of ``values``, with commas."""
    return ", ".join(str(value) for value in values[:5])
