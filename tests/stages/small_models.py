"""Training runs made by hand: a checkpoint of a small network that nobody trained."""

from __future__ import annotations

import json
from typing import Any

import torch
from sqlalchemy import select

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.enums import ArtifactKind, Stage
from cellstore.jobs.runs import RecipeSpec, keep_files, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.learn.branches import TABULAR
from cellstore.learn.networks import FusionNet, NetShape, build_net
from cellstore.learn.normalising import Scaler
from cellstore.learn.trained_models import NETWORK, ModelRecord, save_net
from cellstore.models import Recipe, Split

WIDTH = 5
"""Numbers in the embedding of a made-up network."""

CALM = 200.0
"""Real crops excite a network that nobody trained so much that it would be certain of all cells."""

PLAIN = Scaler(FEATURE_NAMES, (100.0,) * len(FEATURE_NAMES), (1000.0,) * len(FEATURE_NAMES))


def craft(
    workspace: Workspace,
    scaler: Scaler = PLAIN,
    *,
    seed: int = 1,
    number: int = 0,
    labels: tuple[str, ...] = ("DMSO", "drug"),
    branches: tuple[str, ...] = (TABULAR,),
    crop_size: int = 32,
    record: dict[str, Any] | None = None,
    **meta: Any,
) -> int:
    """The number of a finished training run of the latest split whose weights were drawn.

    ``number`` tells runs apart that are alike otherwise; ``record`` replaces what stands in the
    record of the checkpoint.
    """
    shape = NetShape(len(labels), len(scaler.names), projection_width=WIDTH, branches=branches)
    tensors = save_net(awake(build_net(shape, seed=seed), crop_size).state_dict())
    made = ModelRecord(
        NETWORK,
        labels,
        "perturbation",
        scaler,
        {"train": "x"},
        shape=shape,
        crop_size=crop_size,
        **meta,
    )
    write = workspace.artifacts.write
    with workspace.database.begin() as session:
        split = session.scalars(select(Split).order_by(Split.id.desc())).first()
        assert split is not None
        inputs = [session.get_one(Recipe, split.recipe_id), *_recipes(session)]
        parameters = {
            "seed": seed,
            "number": number,
            "labels": list(labels),
            "branches": list(branches),
            "scaler": scaler.to_json(),
        }
        recipe = register(session, RecipeSpec(Stage.TRAIN, 1, parameters, None, tuple(inputs)))
    with running(workspace.database, recipe, split_id=split.id) as run:
        file = write(ArtifactKind.CHECKPOINT, tensors, ".safetensors")
        kept = made.to_json() | {"model_sha256": file.sha256} | (record or {})
        text = write(ArtifactKind.CHECKPOINT, json.dumps(kept).encode(), ".json")
        with workspace.database.begin() as session:
            keep_files(session, [file, text], run.id)
        run.result = {"validation_subset": "validation", "best_epoch": 1}
    return run.id


def awake(net: FusionNet, size: int) -> FusionNet:
    """The network with the statistics that some noise gives its layers, in evaluation mode.

    With those it is made with, a deep network says the same of every crop.
    """
    shape, generator = net.shape, torch.Generator().manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    crops = {
        name: 2 * torch.rand((16, channels, size, size), generator=generator) - 1
        for name, channels in shape.pictures.items()
    }
    features = torch.randn((16, shape.n_features), generator=generator)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        net.train()(crops, features)
        net.classifier.weight /= CALM * net.eval()(crops, features).std()
    return net


def _recipes(session: Any) -> list[Recipe]:
    """The segment and the measure recipe that were used first."""
    return [
        session.scalars(select(Recipe).where(Recipe.stage == stage).order_by(Recipe.id)).first()
        for stage in (Stage.SEGMENT, Stage.MEASURE)
    ]
