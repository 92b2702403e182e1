"""Training runs made by hand: a checkpoint of a small network that nobody trained."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select

from cellstore.db.models import Recipe, Split
from cellstore.ops.branches import TABULAR
from cellstore.ops.checkpoints import CheckpointMeta, save_net
from cellstore.ops.nets import NetShape, build_net
from cellstore.ops.scaling import FeatureScaler, Scaler
from cellstore.reading.cells import FEATURE_COLUMNS
from cellstore.runs import RecipeSpec, Workspace, attach, keep_file, register, running
from cellstore.terms import ArtifactKind, Stage

WIDTH = 5
"""Numbers in the embedding of a made-up network."""

PLAIN = Scaler(FEATURE_COLUMNS, (10.0,) * len(FEATURE_COLUMNS), (20.0,) * len(FEATURE_COLUMNS))


def craft(
    workspace: Workspace,
    scaler: FeatureScaler = PLAIN,
    *,
    seed: int = 1,
    labels: tuple[str, ...] = ("DMSO", "drug"),
    branches: tuple[str, ...] = (TABULAR,),
    crop_size: int = 32,
    record: dict[str, Any] | None = None,
    **meta: Any,
) -> int:
    """The number of a finished training run of the latest split whose weights were drawn.

    ``record`` replaces what stands in the record of the checkpoint.
    """
    shape = NetShape(len(labels), len(scaler.names), projection_width=WIDTH, branches=branches)
    tensors = save_net(build_net(shape, seed=seed).state_dict())
    made = CheckpointMeta(shape, labels, "pert_iname", scaler, crop_size, {"train": "x"}, **meta)
    write = workspace.artifacts.write
    with workspace.database.begin() as session:
        split = session.scalars(select(Split).order_by(Split.id.desc())).first()
        assert split is not None
        inputs = [session.get_one(Recipe, split.recipe_id), *_recipes(session)]
        parameters = {"seed": seed, "labels": list(labels), "branches": list(branches)}
        parameters["scaler"] = scaler.to_json()
        recipe = register(session, RecipeSpec(Stage.TRAIN, 1, parameters, None, tuple(inputs)))
    with running(workspace.database, recipe, split_id=split.id) as run:
        file = write(ArtifactKind.CHECKPOINT, tensors, ".safetensors")
        kept = made.to_json() | {"tensors_sha256": file.sha256} | (record or {})
        text = write(ArtifactKind.CHECKPOINT, json.dumps(kept).encode(), ".json")
        with workspace.database.begin() as session:
            for one in (file, text):
                attach(session, run.id, keep_file(session, one))
        run.result = {"validation_side": "validation", "best_epoch": 1}
    return run.id


def _recipes(session: Any) -> list[Recipe]:
    """The segment and the measure recipe that were used first."""
    return [
        session.scalars(select(Recipe).where(Recipe.stage == stage).order_by(Recipe.id)).first()
        for stage in (Stage.SEGMENT, Stage.MEASURE)
    ]
