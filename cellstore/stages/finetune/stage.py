"""Finetune: train a Cellpose network further on corrected masks, and keep what comes out."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...artifacts import StoredFile
from ...config import FinetuneParams, as_parameters
from ...db.models import Recipe, Run, RunMetric
from ...errors import UserInputError
from ...extras import need
from ...reading.matching import check_plate
from ...reading.networks import OF_A_RUN, SIZE_MODEL, Network, find_network
from ...reading.planes import check_channels
from ...runs import (
    RecipeSpec,
    RunHandle,
    Workspace,
    attach,
    fingerprint,
    keep_file,
    register,
    running,
)
from ...terms import ArtifactKind, Stage, Status
from .examples import Opened, Sides, digest_of, find_examples

if TYPE_CHECKING:
    from ...ops.cellpose_size import SizeModel
    from ...ops.finetuning import FinetuneConfig

VERSION = 1


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned network. ``model``: what ``segment --model`` calls it.

    ``before`` and ``after``: mean average precision at IoU 0.5 on the ``held_out`` images, each
    scaled by the true diameter; ``None``: none were held out. ``size_error``: median relative
    error of the diameters that the new size model estimates; ``None``: there is no size model,
    and the network needs a diameter. ``refused``: files that were not used, and why.
    """

    run_id: int
    recipe_id: int
    model: str
    already_done: bool
    start: str
    images: int
    cells: int
    held_out: int
    before: float | None
    after: float | None
    size_error: float | None
    losses: tuple[float, ...]
    refused: tuple[dict[str, str], ...]


def finetune(
    workspace: Workspace,
    masks: Sequence[Path],
    params: FinetuneParams | None = None,
    *,
    plate: str | None = None,
    weights_dir: Path | None = None,
    device: str = "auto",
    force: bool = False,
) -> FinetuneResult:
    """Train the network ``params.model`` further on label images of images of the store.

    ``masks``: folders and files, matched to images by name as ``ingest masks`` matches them. A
    part of the wells is held out to tell whether the new network is better. The same network,
    masks and options again return what came out before, unless ``force``.

    Raises:
        MissingExtraError: Cellpose 3 is not installed.
        UserInputError: no usable masks, no such model, run, plate or channel, or parameters out
            of range.
    """
    need("segment")
    params = params or FinetuneParams()
    _check(params)
    start = find_network(workspace, params.model, weights_dir)
    with workspace.database.read() as session:
        check_plate(session, plate)
        check_channels(session, params.image)
        if params.nuclei is not None:
            check_channels(session, params.nuclei)
    sides = find_examples(workspace, masks, params, plate)
    spec = _spec(params, start, sides)
    earlier = None if force else _finished(workspace, spec)
    if earlier is not None:
        return earlier
    with workspace.database.begin() as session:
        recipe = register(session, spec)
    with running(workspace.database, recipe, parent_id=start.run_id, seed=params.seed) as run:
        run.result = _train(workspace, run, params, start, sides, device)
    with workspace.database.read() as session:
        return _result(session, session.get_one(Run, run.id), already_done=False)


def _check(params: FinetuneParams) -> None:
    from ...ops.segmentation import installed_generation

    if installed_generation() not in (None, 3):
        raise UserInputError(
            "Fine-tuning works with Cellpose 3. Install cellstore in an environment of its own "
            "with: pip install 'cellstore[segment]'"
        )
    if params.epochs < 1:
        raise UserInputError(f"There must be at least one epoch, not {params.epochs}.")
    if not (math.isfinite(params.learning_rate) and params.learning_rate > 0):
        raise UserInputError(f"The learning rate must be above 0, not {params.learning_rate}.")
    if not 0 <= params.held_out < 1:
        raise UserInputError(f"The held-out share must be from 0 to 1, not {params.held_out}.")


def _spec(params: FinetuneParams, start: Network, sides: Sides) -> RecipeSpec:
    named = as_parameters(params) | {
        "model": Path(start.files.name).name,
        "training": digest_of(sides.training),
        "judged_by": digest_of(sides.held_out),
    }
    return RecipeSpec(Stage.FINETUNE, VERSION, named, start.files.sha256)


def _train(
    workspace: Workspace,
    run: RunHandle,
    params: FinetuneParams,
    start: Network,
    sides: Sides,
    device: str,
) -> dict[str, Any]:
    from ...ops.finetuning import FinetuneConfig, precision

    training, held_out = (
        Opened(workspace, side, params.image, params.nuclei)
        for side in (sides.training, sides.held_out)
    )
    before = precision(start.files.network, held_out, device) if sides.held_out else None
    config = FinetuneConfig(
        epochs=params.epochs,
        learning_rate=params.learning_rate,
        seed=params.seed,
        device=device,
    )
    network = _fit(workspace, run.id, start.files.network, training, config)
    path = workspace.artifacts.locate(network.path)
    after = precision(path, held_out, device) if sides.held_out else None
    size_error = _keep_sizes(workspace, run.id, path, training, device)
    _link(workspace, run.id, [example.masks for example in sides.training + sides.held_out])
    return {
        "start": start.files.name,
        "images": len(sides.training),
        "cells": sum(example.cells for example in sides.training),
        "held_out": len(sides.held_out),
        "before": before,
        "after": after,
        "size_error": size_error,
        "network_sha256": network.sha256,
        "refused": [item._asdict() for item in sides.refused],
    }


def _fit(
    workspace: Workspace, run_id: int, start: Path, training: Opened, config: FinetuneConfig
) -> StoredFile:
    """Train, and keep the network and the loss of every epoch."""
    from ...ops.finetuning import Prepared, finetune

    def tell(epoch: int, loss: float) -> None:
        with workspace.database.begin() as session:
            session.add(RunMetric(run_id=run_id, epoch=epoch, name="loss", value=loss))
        workspace.progress.advance()

    with tempfile.TemporaryDirectory(prefix="cellstore-finetune-") as folder:
        prepared = Prepared(Path(folder))
        for example in training:
            prepared.add(example)
        workspace.progress.start("finetune", config.epochs)
        try:
            state = finetune(start, prepared, config, tell)
        finally:
            workspace.progress.finish()
    stored = workspace.artifacts.write(ArtifactKind.NETWORK, state, ".pt")
    _link(workspace, run_id, [stored])
    return stored


def _keep_sizes(
    workspace: Workspace, run_id: int, network: Path, training: Opened, device: str
) -> float | None:
    """Fit and keep a size model, if there are images enough; return its median relative error."""
    from ...ops.finetuning import size_model_of

    found = size_model_of(network, training, device)
    if found is None:
        return None
    model, error = found
    stored = workspace.artifacts.write(ArtifactKind.NETWORK, _bytes_of(model), SIZE_MODEL)
    _link(workspace, run_id, [stored])
    return math.expm1(error)


def _bytes_of(model: SizeModel) -> bytes:
    from ...ops.cellpose_size import save_size_model

    buffer = io.BytesIO()
    save_size_model(buffer, model)
    return buffer.getvalue()


def _link(workspace: Workspace, run_id: int, files: Sequence[StoredFile]) -> None:
    with workspace.database.begin() as session:
        for file in files:
            attach(session, run_id, keep_file(session, file))


def _finished(workspace: Workspace, spec: RecipeSpec) -> FinetuneResult | None:
    query = select(Run).join(Recipe, Recipe.id == Run.recipe_id)
    query = query.where(Recipe.stage == Stage.FINETUNE, Recipe.fingerprint == fingerprint(spec))
    query = query.where(Run.status == Status.DONE).order_by(Run.id.desc())
    with workspace.database.read() as session:
        found = session.scalars(query.limit(1)).first()
        return None if found is None else _result(session, found, already_done=True)


def _result(session: Session, run: Run, *, already_done: bool) -> FinetuneResult:
    kept = dict(run.result or {})
    kept.pop("network_sha256")
    losses = select(RunMetric.value).where(RunMetric.run_id == run.id, RunMetric.name == "loss")
    values = session.scalars(losses.order_by(RunMetric.epoch))
    return FinetuneResult(
        run_id=run.id,
        recipe_id=run.recipe_id,
        model=f"{OF_A_RUN}{run.id}",
        already_done=already_done,
        losses=tuple(math.nan if value is None else value for value in values),
        **(kept | {"refused": tuple(kept["refused"])}),
    )
