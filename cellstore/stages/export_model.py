"""The stage: gather what a model needs elsewhere, and write it as one folder or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..enums import Stage, Subset
from ..errors import ImageError, StorageError, UserInputError
from ..extras import need
from ..jobs.lookup import find_run
from ..jobs.selection import segmented
from ..jobs.workspace import Workspace
from ..learn.branches import TABULAR
from ..learn.models import OpenModel, know_plates, open_model
from ..models import Image, Recipe, RecipeInput, Run, RunMetric, Segmentation, Split, SplitMember
from ..query.cells import plate_of, read_cells
from ..query.feature_files import SetReader, set_of_recipe

if TYPE_CHECKING:
    from ..learn.crops import CellBlock


EXAMPLE = '''\
"""Label the cells of cells.safetensors: python example.py. Needs no network and no cellstore."""

from pathlib import Path

from classifier import Classifier
from safetensors.torch import load_file

here = Path(__file__).parent
classifier = Classifier.load(here)

cells = load_file(here / "cells.safetensors")
crops = {name[6:]: values for name, values in cells.items() if name.startswith("crops.")}
plate = classifier.record["example"]["plate"]
chances = classifier(crops, cells["features"], plate)

for cell, row in zip(cells["cell_ids"].tolist(), chances, strict=True):
    best = row.argsort(descending=True)[:3].tolist()
    print(f"cell {cell}:", ", ".join(f"{classifier.labels[i]} {row[i]:.6f}" for i in best))
'''

CROPS: Mapping[str, Sequence[str]] = {
    "mask": (
        "the cell itself, 0 or 1",
        "its inner outline, 0 or 1",
        "other cells, 0 or 1",
        "the intensity of the segmented plane inside the cell, divided by its white level",
    ),
    "flow": (
        "red of Cellpose's flow image / 255",
        "green of it / 255",
        "blue of it / 255",
        "cell probability / 255",
    ),
}
"""The channels of the crops of each branch, in their order."""

_CUT = (
    "The bounding box of the cell, cut out of the image and resized to size x size pixels, "
    "bilinear and with antialiasing where it shrinks (torchvision's Resize); the aspect ratio is "
    "not kept. Values from 0 to 1; (x - mean) / std is done by classifier.py."
)
_WHITE = (
    "The white level is the 99.9th percentile of the whole image; with 'whites' in this file it is "
    "that of the plate: first of the segmented plane, then of each of 'channels'."
)


def crop_rules(branches: Sequence[str], channels: Sequence[str]) -> dict[str, Any]:
    """Return how the crops are made that a network looks at."""
    pictures = [name for name in branches if name != "tabular"]
    if not pictures:
        return {}
    planes = [f"channel {name}, divided by its white level, not masked" for name in channels]
    of_branch = {name: list(CROPS.get(name, planes)) for name in pictures}
    return {"channels": of_branch, "cut": _CUT, "white": _WHITE}


def readme(record: Mapping[str, Any]) -> str:
    """Return the README of a folder, for its ``model.json``."""
    lineage, labels = record["lineage"], record["labels"]
    split = lineage["split"]
    columns = len(record["columns"])
    return f"""# A classifier of cells

Kind: {record["model"]}. It tells {len(labels)} classes ({record["field"]}) apart:
{", ".join(labels[:10])}{", ..." if len(labels) > 10 else ""}.

Trained by cellstore {lineage["code_version"]} in run {lineage["train_run"]}, on the training side
of split {split["name"]!r} ({split["protocol"]}, grouped by {split["group_level"]}). What it was
worth there, and what each recipe did, is in `model.json` under `lineage`. On other assays, other
staining or other microscopes it may be worth nothing: test it on wells whose treatment you know.

## Files

- `model.safetensors`: the tensors. `model.json`: labels, scales, how crops are made, lineage.
  Both are numbers and text. Reading them runs no code.
- `classifier.py`: puts them together. Read it before you run it; it needs torch, torchvision and
  safetensors.
- `cells.safetensors`: {record["example"]["cells"]} cells as they go into the model, and
  `example.py`, which labels them: `python example.py`.

## What goes in

- `features`, (N, {columns}): {columns} measurements as they come from the microscope's images,
  not scaled; names, units and sources are in `model.json` under `columns`.
- `crops`, by branch (N, channels, size, size), from 0 to 1: `model.json` under `crops` says how
  they are made. None, where the model looks at measurements only.
- `plate`: the barcode, for a model that normalises plate by plate.

Out comes the probability of each class, (N, {len(labels)}), in the order of `labels`.
"""


FORMAT = 1
EXAMPLE_CELLS = 3
NO_CELLS = "No image with measured cells could be read, so the example has no cells."
_IMAGES_TRIED = 8


@dataclass(frozen=True)
class ExportedModel:
    """A folder that was written. ``model``: the kind; ``cells``: those of the example."""

    path: str
    train_run_id: int
    model: str
    classes: int
    cells: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Example:
    """A few cells of one plate as they go into ``model``, which knows this plate."""

    model: OpenModel
    tensors: dict[str, Any]
    plate: str | None
    cells: int


def export_model(
    workspace: Workspace, run: str = "latest", output: Path | None = None
) -> ExportedModel:
    """Write the model of a training run to a new folder (default: ``model-RUN`` here).

    The folder opens without this store and without cellstore; see its README. It is there whole or
    not at all.

    Raises:
        MissingExtraError: torch and the like are not installed.
        UnknownNameError: no such training run, or its feature set is gone.
        UserInputError: the folder is there and not empty, or the run has no checkpoint, is a null
            baseline, or its feature set is another one since.
        StorageError: the checkpoint is damaged, or the folder cannot be written.

    """
    need("train")
    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        target = _free(output or Path(f"model-{trained.id}"))
        model = open_model(session, workspace, trained)
        _check_kind(model)
        example = _example(session, workspace, model)
        record = _record(session, example)
        tensors = model.checkpoint.tensors
        data = workspace.artifacts.read(tensors.path, tensors.sha256)
    contents = _contents(record, data, example)
    _write(target, contents)
    return ExportedModel(
        path=str(target),
        train_run_id=trained.id,
        model=record["model"],
        classes=len(model.labels),
        cells=example.cells,
        files=tuple(contents),
        notes=() if example.cells else (NO_CELLS,),
    )


def _free(target: Path) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserInputError(
            f"{target} is there already and not empty. Name a new folder with --output."
        )
    return target.absolute()


def _check_kind(model: OpenModel) -> None:
    from ..learn.baselines import NULLS

    kind = model.checkpoint.record.get("model")
    if kind in NULLS:
        raise UserInputError(
            f"Training run {model.run.id} is the null baseline {kind!r}: it is what others are "
            "compared with here, and of no use elsewhere. Name another run."
        )


def _example(session: Session, workspace: Workspace, model: OpenModel) -> _Example:
    """Cells of the test side if there are some, else of any image that can be read."""
    for image_id in _images(session, model):
        plate = plate_of(session, image_id)
        try:
            known, _ = know_plates(session, workspace, model, [plate])
            cells = known.reader(image_id)
        except (ImageError, UserInputError):
            continue  # what is wrong with one image is no reason to export nothing
        if len(cells):
            tensors = _first_cells(session, known, image_id, cells)
            return _Example(known, tensors, plate, len(tensors["cell_ids"]))
    return _Example(model, _no_cells(model), None, 0)


def _images(session: Session, model: OpenModel) -> list[int]:
    done = segmented(select(Image.id), model.segment.id).where(Segmentation.n_cells > 0)
    members = select(SplitMember.image_id).where(SplitMember.split_id == model.run.split_id)
    test = done.where(Image.id.in_(members.where(SplitMember.subset == Subset.TEST)))
    found = [
        *session.scalars(test.order_by(Image.id).limit(_IMAGES_TRIED)),
        *session.scalars(done.order_by(Image.id).limit(_IMAGES_TRIED)),
    ]
    return list(dict.fromkeys(found))


def _first_cells(
    session: Session, model: OpenModel, image_id: int, cells: CellBlock
) -> dict[str, Any]:
    """Crops from 0 to 1 and features as measured, of the first cells of an image."""
    from torch import from_numpy

    reader = None if model.source.features.files is None else SetReader(model.source.features.files)
    names = model.meta.scaler.names
    rows = read_cells(session, model.source, image_id, names, reader)
    crop = model.checkpoint.record.get("crop", {})
    tensors = {
        # In 64 bits, so that the way back ends at the very numbers that the network reads here.
        f"crops.{name}": crops[:EXAMPLE_CELLS].double() * crop["std"] + crop["mean"]
        for name, crops in cells.crops.items()
    }
    tensors["cell_ids"] = cells.cell_ids[:EXAMPLE_CELLS].contiguous()
    tensors["features"] = from_numpy(rows.features[:EXAMPLE_CELLS].copy())
    return tensors


def _no_cells(model: OpenModel) -> dict[str, Any]:
    from torch import empty, float64, int64

    meta, size = model.meta, model.meta.crop_size
    channels = {"image": len(meta.channels)}
    crops = {
        f"crops.{name}": empty(0, channels.get(name, len(CROPS["mask"])), size, size)
        for name in meta.branches
        if name != TABULAR
    }
    features = empty(0, len(meta.scaler.names), dtype=float64)
    return {**crops, "cell_ids": empty(0, dtype=int64), "features": features}


def _record(session: Session, example: _Example) -> dict[str, Any]:
    """All that stands in ``model.json``: the record of the checkpoint, and what explains it."""
    model, meta = example.model, example.model.meta
    kept = {**model.checkpoint.record, **meta.to_json()}
    return {
        **kept,
        "format": FORMAT,
        "model": kept.get("model", "network"),
        "columns": _columns(session, model),
        "crops": crop_rules(meta.branches, meta.channels),
        "lineage": _lineage(session, model.run),
        "example": {"plate": example.plate, "cells": example.cells},
    }


def _columns(session: Session, model: OpenModel) -> list[dict[str, Any]]:
    """What is known of the measurements that the model reads, in their order."""
    found = set_of_recipe(session, model.measure.id)
    known = {item["name"]: item for item in (found.columns if found else [])}
    return [dict(known.get(name, {"name": name})) for name in model.meta.scaler.names]


def _lineage(session: Session, run: Run) -> dict[str, Any]:
    split = session.get_one(Split, run.split_id)
    metrics = select(RunMetric).where(RunMetric.run_id == run.id)
    best = (run.result or {}).get("best_epoch")
    values = session.scalars(metrics.where(RunMetric.epoch == best)) if best is not None else ()
    return {
        "train_run": run.id,
        "code_version": run.code_version,
        "environment": run.environment,
        "started": run.started_at.isoformat(),
        "result": run.result,
        "metrics_of_best_epoch": {item.name: item.value for item in values},
        "split": {
            "name": split.name,
            "fingerprint": split.fingerprint,
            "protocol": split.protocol,
            "group_level": split.group_level.value,
            "seed": split.seed,
        },
        "recipes": _recipes(session, session.get_one(Recipe, run.recipe_id)),
    }


def _recipes(session: Session, recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe and all that it reads from, each once."""
    found, left = {}, [recipe]
    while left:
        item = left.pop()
        found[item.id] = item
        query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
        inputs = session.scalars(query.where(RecipeInput.recipe_id == item.id))
        left += [one for one in inputs if one.id not in found]
    return [
        {
            "stage": item.stage.value,
            "fingerprint": item.fingerprint,
            "weights_sha256": item.weights_sha256,
            "parameters": item.parameters,
        }
        for item in found.values()
    ]


def _contents(record: Mapping[str, Any], tensors: bytes, example: _Example) -> dict[str, bytes]:
    from safetensors.torch import save

    classifier = files("cellstore.stages").joinpath("exported_classifier.py")
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    return {
        "model.safetensors": tensors,
        "model.json": text.encode(),
        "classifier.py": classifier.read_bytes(),
        "cells.safetensors": save(example.tensors),
        "example.py": EXAMPLE.encode(),
        "README.md": readme(record).encode(),
    }


def _write(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder beside its place, then move it there."""
    part = target.parent / f".part-{uuid.uuid4().hex}"
    try:
        part.mkdir(parents=True)
        for name, data in contents.items():
            (part / name).write_bytes(data)
        part.replace(target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise StorageError(
            f"{target} cannot be written: {error.strerror}. Free some space, mend the permissions "
            "or name another folder with --output."
        ) from error
