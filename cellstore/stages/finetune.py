"""Finetune: train a Cellpose network further on corrected masks, and keep what comes out."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifacts import StoredFile
from ..config import FinetuneParams
from ..enums import ArtifactKind, Stage
from ..errors import ImageError, UserInputError
from ..io.image_files import decode_tiff, encode_tiff
from ..io.mask_files import mask_files
from ..io.tables import RowRefusedError
from ..jobs.lookup import find_plate
from ..jobs.mask_matching import read_masks_of
from ..jobs.planes import choose_channels, read_image
from ..jobs.runs import RecipeSpec, finished_run, keep_files, result_of, running
from ..jobs.workspace import Workspace
from ..models import Run, RunMetric
from ..notebooks import Shown
from ..settings import need, track
from .segment import OF_A_RUN, find_network

if TYPE_CHECKING:
    from ..analysis.segmentation import ModelFiles


VERSION = 1


@dataclass(frozen=True)
class Example:
    """Masks of an image. ``group``: the well, which is held out as a whole."""

    file: str
    image_id: int
    content_sha256: str | None
    group: str
    cells: int
    masks: StoredFile


@dataclass(frozen=True)
class FinetuneResult(Shown):
    """A fine-tuned network. ``model``: what ``segment --model`` calls it.

    ``before`` and ``after``: mean average precision at IoU 0.5 on the ``held_out`` images, each
    scaled by the true diameter; ``None``: none were held out. ``diameter``: the median of the
    cells learned from, in pixels. ``refused``: files that were not used, and why.
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
    losses: tuple[float, ...]
    refused: tuple[dict[str, str], ...]
    diameter: float | None = None


def finetune(
    workspace: Workspace,
    masks: Sequence[Path],
    params: FinetuneParams | None = None,
    *,
    plate: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> FinetuneResult:
    """Train a network further on label images of images of the store; see ``Store.finetune``.

    The same network, masks and options again return what came out before, unless ``force``.
    """
    from ..analysis.segmentation import installed_generation

    need("segment")
    params = params or FinetuneParams()
    if installed_generation() not in (None, 3):
        raise UserInputError(
            "Fine-tuning works with Cellpose 3. Install cellstore in an environment of its own "
            "with: pip install 'cellstore[segment]'"
        )
    start = find_network(workspace, params.model)
    with workspace.database.read() as session:
        if plate is not None:
            find_plate(session, plate)
        nuclei = choose_channels(session, params.nuclei)
        params = replace(params, channels=choose_channels(session, params.channels), nuclei=nuclei)
    examples, refused = find_examples(workspace, masks, params, plate)
    training, held_out = divide(examples, params.held_out, params.seed)
    parameters = asdict(params) | {
        "model": Path(start.name).name,
        "training": _digest(training),
        "judged_by": _digest(held_out),
    }
    spec = RecipeSpec(Stage.FINETUNE, VERSION, parameters, start.sha256)
    with workspace.database.read() as session:
        earlier = None if force else finished_run(session, spec)
        if earlier is not None:
            return _result(earlier)
    with running(
        workspace.database, spec, parent_id=start.run_id, seed=params.seed, device=device
    ) as run:
        run.result = {
            "start": start.name,
            "images": len(training),
            "cells": sum(example.cells for example in training),
            "held_out": len(held_out),
            **_train(workspace, run.id, params, start, training, held_out, device),
            "refused": refused,
        }
    with workspace.database.read() as session:
        return replace(_result(session.get_one(Run, run.id)), already_done=False)


def find_examples(
    workspace: Workspace, paths: Sequence[Path], params: FinetuneParams, plate: str | None
) -> tuple[list[Example], list[dict[str, str]]]:
    """Match files of masks to images, and keep them as artifacts.

    Returns also the files that are not learned from, and why.
    """
    examples: list[Example] = []
    refused: list[dict[str, str]] = []
    masks = mask_files(paths)
    for mask in track(workspace.progress, "read masks", len(masks), masks):
        try:
            image, labels = read_masks_of(
                workspace.database, mask, plate=plate, binary=params.binary
            )
        except RowRefusedError as error:
            refused.append({"file": mask.name, "reason": ": ".join(error.args)})
            continue
        if not labels.any():
            why = "it has no cells, so their size is not known"
        elif image.id in {example.image_id for example in examples}:
            why = f"other masks of {image} were read before it"
        else:
            tiff = encode_tiff(labels)
            examples.append(
                Example(
                    mask.name,
                    image.id,
                    image.content_sha256,
                    f"{image.plate}/{image.well}",
                    len(np.unique(labels)) - 1,
                    workspace.artifacts.write(ArtifactKind.MASK, tiff, ".tif"),
                )
            )
            continue
        refused.append({"file": mask.name, "reason": why})
    if not examples:
        reasons = "; ".join(f"{item['file']}: {item['reason']}" for item in refused[:3])
        raise UserInputError(f"None of the masks can be used for training. {reasons}")
    return sorted(examples, key=lambda example: example.image_id), refused


def divide(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: whole wells, or images where there is one well only.

    About ``share`` of the groups are held out, at least one of two or more; of one, none.
    """
    wells = {example.group for example in examples}
    groups = defaultdict(list)
    for example in examples:
        groups[example.group if len(wells) > 1 else str(example.image_id)].append(example)
    names = sorted(groups)
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 else 0
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    held = {names[position] for position in chosen}
    training = [example for name in names if name not in held for example in groups[name]]
    return training, [example for name in names if name in held for example in groups[name]]


def _digest(examples: Sequence[Example]) -> str:
    """A digest of images and masks: with others, another network comes out."""
    lines = [f"{item.content_sha256} {item.masks.sha256}" for item in examples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _train(
    workspace: Workspace,
    run_id: int,
    params: FinetuneParams,
    start: ModelFiles,
    training: Sequence[Example],
    held_out: Sequence[Example],
    device: str,
) -> dict[str, Any]:
    """Train, judge and keep a network; return how good it is, for the run."""
    from ..learn import finetuning

    def opened(examples: Sequence[Example]) -> Iterator[finetuning.Corrected]:
        for example in examples:
            tiff = workspace.artifacts.read(example.masks.path, example.masks.sha256)
            masks = decode_tiff(tiff).astype(np.int64)
            found = [read_image(workspace.database, example.image_id, p) for p in params.planes]
            pixels = found[0] if len(found) == 1 else np.stack(found)
            if masks.shape != pixels.shape[-2:]:
                raise ImageError(f"{example.file} and its image differ in size.")
            yield finetuning.Corrected(pixels, masks)

    def judged(network: Path) -> float | None:
        return finetuning.precision(network, opened(held_out), device) if held_out else None

    def keep(*files: StoredFile) -> None:
        with workspace.database.begin() as session:
            keep_files(session, files, run_id)

    def on_epoch(epoch: int, loss: float) -> None:
        with workspace.database.begin() as session:
            session.add(RunMetric(run_id=run_id, epoch=epoch, name="loss", value=loss))
        workspace.progress.advance()

    before = judged(start.network)
    with tempfile.TemporaryDirectory(prefix="cellstore-finetune-") as folder:
        prepared = finetuning.Prepared(Path(folder))
        for example in opened(training):
            prepared.add(example)
        workspace.progress.start("finetune", params.epochs)
        try:
            state = finetuning.finetune(start.network, prepared, params, device, on_epoch)
        finally:
            workspace.progress.finish()
    network = workspace.artifacts.write(ArtifactKind.NETWORK, state, ".pt")
    keep(network)
    after = judged(workspace.artifacts.locate(network.path))
    keep(*(example.masks for example in (*training, *held_out)))
    return {
        "before": before,
        "after": after,
        "diameter": round(median(prepared.diameters), 1),
        "network_sha256": network.sha256,
    }


def _result(run: Run) -> FinetuneResult:
    losses = tuple(math.nan if item.value is None else item.value for item in run.metrics)
    model = f"{OF_A_RUN}{run.id}"
    return result_of(run, FinetuneResult, model=model, already_done=True, losses=losses)
