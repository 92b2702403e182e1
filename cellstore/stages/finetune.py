"""Finetune: train a Cellpose network further on corrected masks, and keep what comes out."""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..artifacts import StoredFile
from ..config import FinetuneParams, ImageInput, as_parameters
from ..enums import ArtifactKind, Stage, Status
from ..errors import ImageError, UserInputError
from ..extras import need
from ..io.image_files import decode_tiff, encode_tiff
from ..io.mask_files import mask_files
from ..jobs.lookup import find_plate
from ..jobs.mask_matching import NoMatch, read_masks_of
from ..jobs.planes import check_channels, choose_channels, read_image
from ..jobs.runs import RecipeSpec, RunHandle, attach, fingerprint, keep_file, register, running
from ..jobs.workspace import Workspace
from ..learn.segmentation_networks import OF_A_RUN, SIZE_MODEL, Network, find_network
from ..models import Recipe, Run, RunMetric
from ..progress import track

if TYPE_CHECKING:
    from ..analysis.cellpose import SizeModel
    from ..learn.finetuning import Corrected, FinetuneConfig


class Refused(NamedTuple):
    """A file of masks that is not learned from, and why."""

    file: str
    reason: str


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
class Sides:
    """What the network learns from, and what it is judged by; and what could not be used."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    refused: tuple[Refused, ...]


def find_examples(
    workspace: Workspace, paths: Sequence[Path], params: FinetuneParams, plate: str | None
) -> Sides:
    """Match files of masks to images, keep them as artifacts, and divide them.

    Raises:
        UserInputError: no such file or folder, or none that can be learned from.
    """
    examples: list[Example] = []
    refused: list[Refused] = []
    masks = list(mask_files(paths))
    for mask in track(workspace.progress, "read masks", len(masks), masks):
        found = read_masks_of(workspace.database, mask, plate=plate, binary=params.binary)
        if isinstance(found, NoMatch):
            refused.append(Refused(mask.name, f"{found.reason}: {found.detail}"))
        elif not found.labels.any():
            refused.append(Refused(mask.name, "it has no cells, so their size is not known"))
        elif found.image.id in {example.image_id for example in examples}:
            refused.append(Refused(mask.name, f"other masks of {found.image} were read before it"))
        else:
            image = found.image
            examples.append(
                Example(
                    mask.name,
                    image.id,
                    image.content_sha256,
                    f"{image.plate}/{image.well}",
                    len(np.unique(found.labels)) - 1,
                    _kept(workspace, found.labels),
                )
            )
    if not examples:
        reasons = "; ".join(f"{item.file}: {item.reason}" for item in refused[:3])
        raise UserInputError(f"None of the masks can be used for training. {reasons}")
    examples.sort(key=lambda example: example.image_id)
    training, held_out = divide(examples, params.held_out, params.seed)
    return Sides(tuple(training), tuple(held_out), tuple(refused))


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
    held = {names[place] for place in chosen}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name in names:
        sides[name in held].extend(groups[name])
    return sides


def _kept(workspace: Workspace, labels: NDArray[np.uint32]) -> StoredFile:
    return workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(labels), ".tif")


def digest_of(examples: Sequence[Example]) -> str:
    """A digest of images and masks: with others, another network comes out."""
    lines = [f"{item.content_sha256} {item.masks.sha256}" for item in examples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Opened:
    """Examples as the network sees them, opened one by one, as often as they are asked for."""

    workspace: Workspace
    examples: tuple[Example, ...]
    planes: tuple[ImageInput, ...]

    def __iter__(self) -> Iterator[Corrected]:
        for example in self.examples:
            yield self._open(example)

    def _open(self, example: Example) -> Corrected:
        from ..learn.finetuning import Corrected

        stored = self.workspace.artifacts.read(example.masks.path, example.masks.sha256)
        masks, pixels = decode_tiff(stored), self._pixels(example.image_id)
        if masks.shape != pixels.shape[-2:]:
            raise ImageError(f"{example.file} and its image differ in size.")
        return Corrected(pixels, masks.astype(np.int64))

    def _pixels(self, image_id: int) -> NDArray[np.float32]:
        found = [read_image(self.workspace.database, image_id, plane) for plane in self.planes]
        return found[0] if len(found) == 1 else np.stack(found)


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
        if plate is not None:
            find_plate(session, plate)
        params = replace(params, channels=choose_channels(session, params.channels))
        for plane in params.planes:
            check_channels(session, plane)
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
    from ..analysis.segmentation import installed_generation

    if installed_generation() not in (None, 3):
        raise UserInputError(
            "Fine-tuning works with Cellpose 3. Install cellstore in an environment of its own "
            "with: pip install 'cellstore[segment]'"
        )
    if not (math.isfinite(params.learning_rate) and params.learning_rate > 0):
        raise UserInputError(f"The learning rate must be above 0, not {params.learning_rate}.")


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
    from ..learn.finetuning import FinetuneConfig, precision

    training, held_out = (
        Opened(workspace, side, params.planes) for side in (sides.training, sides.held_out)
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
    from ..learn.finetuning import Prepared, finetune

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
    from ..learn.finetuning import size_model_of

    found = size_model_of(network, training, device)
    if found is None:
        return None
    model, error = found
    stored = workspace.artifacts.write(ArtifactKind.NETWORK, _bytes_of(model), SIZE_MODEL)
    _link(workspace, run_id, [stored])
    return math.expm1(error)


def _bytes_of(model: SizeModel) -> bytes:
    from ..analysis.cellpose import save_size_model

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
