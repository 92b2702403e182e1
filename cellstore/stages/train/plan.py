"""What a training will read: all that is known, and refused, before the first cell is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...artifacts import sha256_of
from ...config import TrainParams, as_parameters
from ...db.models import Recipe, Split, SplitMember
from ...errors import UserInputError
from ...ops.branches import BRANCHES, IMAGE
from ...reading.branches import choose_branches, choose_channels
from ...reading.cells import (
    CellSource,
    Flagged,
    ImageBlock,
    choose_recipes,
    count_flagged,
    list_blocks,
    recipes_of_set,
)
from ...reading.featuresets import open_set
from ...reading.learning import flags_that_count, taught_wells, training_labels
from ...runs import RecipeSpec, Workspace, find_split, register
from ...terms import Stage, Subset

VERSION = 1
PUBLISHED = "published"
NO_WEIGHTS = "none"
IMAGENET = "imagenet"
FROM_FILE = "file"
"""What a recipe calls a file of weights, wherever it lay."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first cell is read.

    ``untaught``: images of the validation side whose class is not on the training side; they are
    left out.
    """

    params: TrainParams
    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    labels: dict[str, int]
    sides: dict[str, tuple[ImageBlock, ...]]
    members: dict[str, int]
    validation_side: Subset
    branches: tuple[str, ...]
    channels: tuple[str, ...]
    remarks: tuple[str, ...]
    flagged: Flagged | None
    untaught: int
    spec: RecipeSpec


Names = tuple[str | None, str | None, str | None]
"""Of the split, the segmentation and the measurement; none: the latest."""


def make_plan(
    workspace: Workspace, params: TrainParams, names: Names, weights: str | None = None
) -> Plan:
    """Return the plan. ``weights``: the sha256 of a file of weights that is not needed any more."""
    weights = weights or _weights_sha256(params.weights)
    with workspace.database.read() as session:
        split = find_split(session, names[0])
        if params.features is None:
            segment, measure = choose_recipes(session, names[1], names[2])
        else:
            segment, measure = recipes_of_set(session, params.features, names[1], names[2])
        features = open_set(session, workspace.artifacts, measure.id)
        qc, unseen = flags_that_count(session, params.leave_out_flagged, split.id, segment.id)
        leak = taught_wells(session, measure, split.id)
        source = CellSource(segment.id, measure.id, split.id, features=features)
        source = replace(source, unflagged_by=qc.id if qc else None)
        branches, remark = choose_branches(session, source, _wanted(params))
        channels: tuple[str, ...] = ()
        if IMAGE in branches:
            channels = choose_channels(session, source, params.channels)
        blocks = list_blocks(session, source)
        labels = training_labels(session, split.id)
        made_by = session.get_one(Recipe, split.recipe_id)
        other = Subset.TEST if split.protocol == PUBLISHED else Subset.VALIDATION
        flagged = count_flagged(session, source, blocks, (Subset.TRAIN, other))
        members = _members(session, split.id)
        by_qc = (session.get_one(Recipe, qc.recipe_id),) if qc else ()
    parameters = _parameters(params, source, branches, channels)
    parameters |= {"split": split.fingerprint, "cells": _digest_of(blocks)}
    validated = [block for block in blocks if block.subset is other]
    taught = tuple(block for block in validated if block.label_id in labels.values())
    return Plan(
        params=params,
        split=split,
        segment=segment,
        measure=measure,
        source=source,
        labels=labels,
        sides={
            "train": tuple(block for block in blocks if block.subset is Subset.TRAIN),
            "validation": taught,
        },
        members={"train": members.get(Subset.TRAIN, 0), "validation": members.get(other, 0)},
        validation_side=other,
        branches=branches,
        channels=channels,
        remarks=tuple(text for text in (remark, unseen, leak) if text),
        flagged=flagged,
        untaught=len(validated) - len(taught),
        spec=RecipeSpec(
            Stage.TRAIN, VERSION, parameters, weights, (made_by, segment, measure, *by_qc)
        ),
    )


def _wanted(params: TrainParams) -> tuple[str, ...] | None:
    if params.channels and IMAGE not in (params.branches or ()):
        raise UserInputError(
            "Channels are looked at by the branch image: name it, too, for example with "
            "--branches mask,flow,image,tabular."
        )
    return params.branches


def _parameters(
    params: TrainParams,
    source: CellSource,
    branches: tuple[str, ...],
    channels: tuple[str, ...],
) -> dict[str, Any]:
    # A file of weights counts by its bytes; where it lay on this machine does not. The feature
    # set is named by the measure recipe; what is as published is not named at all.
    named = params.weights if params.weights in (NO_WEIGHTS, IMAGENET) else FROM_FILE
    parameters = as_parameters(params) | {"weights": named}
    del parameters["features"], parameters["branches"], parameters["leave_out_flagged"]
    if source.unflagged_by is not None:
        parameters["leave_out_flagged"] = source.unflagged_by
    if channels:
        parameters["channels"] = list(channels)
    if params.augment:
        parameters["augment"] = sorted(params.augment)
    if branches != BRANCHES:
        parameters["branches"] = list(branches)
    if not source.features.in_table:
        parameters |= {"feature_files": source.features.mark, "gaps": "mean of the training side"}
    return parameters


def _weights_sha256(weights: str) -> str | None:
    if weights in (NO_WEIGHTS, IMAGENET):
        return None
    path = Path(weights)
    if not path.is_file():
        raise UserInputError(
            f"There is no file of weights {weights}. Give the path of one, or 'none' or 'imagenet'."
        )
    return sha256_of(path)


def _members(session: Session, split_id: int) -> dict[Subset, int]:
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    return dict(session.execute(query.group_by(SplitMember.subset)).all())


def _digest_of(blocks: Sequence[ImageBlock]) -> str:
    """What decides the cells beside the recipes: which images have how many of them, by now."""
    digest = hashlib.sha256()
    for line in sorted((b.content_sha256 or "", b.subset.value, b.n_cells) for b in blocks):
        digest.update(repr(line).encode())
    return digest.hexdigest()


def check_sides(plan: Plan) -> None:
    """Refuse a split of one class, or without measured cells on a side that is needed."""
    if len(plan.labels) == 1:
        raise UserInputError(
            f"All images on the training side of split {plan.split.name!r} are of one class, "
            f"{next(iter(plan.labels))!r}: there is nothing to tell apart. Make another split."
        )
    for side, blocks in plan.sides.items():
        if blocks:
            continue
        named = "test" if (side, plan.validation_side) == ("validation", Subset.TEST) else side
        if side == "validation" and plan.untaught:
            raise UserInputError(
                f"No class on the {named} side of split {plan.split.name!r} is on its training "
                "side, too. Make another split, without --allow-missing."
            )
        if plan.members[side] == 0:
            raise UserInputError(
                f"Split {plan.split.name!r} has no image on its {named} side. Make another split: "
                "classes with three wells or more give one, or ask for another validation size."
            )
        raise UserInputError(
            f"None of the {plan.members[side]} images on the {named} side of split "
            f"{plan.split.name!r} has {_what_lacks(plan)}"
        )


def _what_lacks(plan: Plan) -> str:
    features = plan.source.features
    if plan.flagged is not None and plan.flagged.images:
        return (
            f"a measured cell that quality-control run {plan.flagged.run_id} has not flagged. "
            "Train without --leave-out-flagged, or make quality control less strict: "
            "cellstore qc --help"
        )
    if features.in_table:
        return "measured cells. Run: cellstore segment, then: cellstore measure"
    group = plan.measure.parameters.get("group")
    lacking = f"cells in feature set {features.name!r}"
    if group is not None:
        return f"{lacking}. Run: cellstore measure --features {group}"
    return f"{lacking}. Ingest the features of these images too."


def commit(workspace: Workspace, plan: Plan) -> Recipe:
    """Register the recipe; the run that follows freezes the split."""
    with workspace.database.begin() as session:
        return register(session, plan.spec)
