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

from ..artifacts import writing
from ..config import RunName
from ..enums import Stage, Subset
from ..errors import ImageError, UserInputError, some_of
from ..jobs.lookup import IS_CURRENT, find_run
from ..jobs.workspace import Workspace
from ..learn.branches import TABULAR
from ..models import Image, Recipe, Run, Segmentation, SplitMember
from ..notebooks import Shown
from ..query.cells import plate_of, read_cells
from ..query.feature_files import set_of_recipe
from ..settings import need

if TYPE_CHECKING:
    from ..learn.trained_models import OpenModel


EXAMPLE = '''\
"""Label the cells of cells.safetensors: python example.py. Needs no network and no cellstore."""

from pathlib import Path

from classifier import Classifier
from safetensors.torch import load_file

here = Path(__file__).parent
classifier = Classifier(here)

cells = load_file(here / "cells.safetensors")
crops = {name[6:]: values for name, values in cells.items() if name.startswith("crops.")}
plate = classifier.record["example"]["plate"]
probabilities = classifier(crops, cells["features"], plate)

for cell, row in zip(cells["cell_ids"].tolist(), probabilities, strict=True):
    best = row.argsort(descending=True)[:3].tolist()
    print(f"cell {cell}:", ", ".join(f"{classifier.labels[i]} {row[i]:.6f}" for i in best))
'''

CROPS: Mapping[str, Sequence[str]] = {
    "mask": (
        "the cell itself, 0 or 1",
        "its inner outline, 0 or 1",
        "other cells, 0 or 1",
        "the intensity of the segmented plane inside the cell, divided by its intensity scale",
    ),
    "flow": (
        "red of Cellpose's flow image / 255",
        "green of it / 255",
        "blue of it / 255",
        "cell probability / 255",
    ),
}
"""The channels of the crops of each branch, in their order."""

CUT = (
    "The bounding box of the cell, cut out of the image and resized to size x size pixels, "
    "bilinear and with antialiasing where it shrinks (torchvision's Resize); the aspect ratio is "
    "not kept. Values from 0 to 1; (x - mean) / std is done by classifier.py."
)
SCALE = (
    "The intensity scale is the 99.9th percentile of the whole image; with 'intensities' under "
    "'scaler' it is that of the plate: first of the segmented plane, then of each of 'channels'."
)


def readme(record: Mapping[str, Any]) -> str:
    """Return the README of a folder, for its ``model.json``."""
    from ..learn.exported_classifier import TIMM

    lineage, labels = record["lineage"], record["labels"]
    split = lineage["split"]
    columns = len(record["columns"])
    needs = ["torch", "torchvision", "safetensors"]
    if record["model"] != "network":
        needs += ["scikit-learn", "skops"]
    elif record["shape"]["backbone"].startswith(TIMM):
        needs += ["timm"]
    return f"""# A classifier of cells

Kind: {record["model"]}. It tells {len(labels)} classes ({record["field"]}) apart:
{some_of(labels, 10)}.

Trained by cellstore {lineage["code_version"]} in run {lineage["train_run"]}, on the training
subset of split {split["name"]!r} ({split["protocol"]}, grouped by {split["group_level"]}). What it
was worth there, and what each recipe did, is in `model.json` under `lineage`. On other assays,
other staining or other microscopes it may be worth nothing: test it on wells whose treatment you
know.

## Files

- `{record["file"]}`: what was learned. `model.json`: labels, scales, how crops are made, lineage.
  Both are numbers and text. Reading them runs no code.
- `classifier.py`: puts them together. Read it before you run it; it needs
  {", ".join(needs[:-1])} and {needs[-1]}.
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


EXAMPLE_CELLS = 3
NO_CELLS = "No image with measured cells could be read, so the example has no cells."
IMAGES_TRIED = 8


@dataclass(frozen=True)
class ExportedModel(Shown):
    """A folder that was written. ``model``: the kind; ``cells``: those of the example."""

    path: str
    train_run_id: int
    model: str
    classes: int
    cells: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def export_model(
    workspace: Workspace, run: RunName = "latest", output: Path | None = None
) -> ExportedModel:
    """Write the model of a training run to a new folder; see ``Store.export_model``.

    The folder is there whole or not at all.
    """
    need("train")
    from safetensors.torch import save

    from ..learn.baselines import NULLS
    from ..learn.trained_models import open_model

    with workspace.database.read() as session:
        trained = find_run(session, run, Stage.TRAIN)
        target = (output or Path(f"model-{trained.id}")).absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserInputError(
                f"{target} is there already and not empty. Name a new folder with --output."
            )
        model = open_model(session, workspace, trained)
        kind = model.record.model
        if kind in NULLS:
            raise UserInputError(
                f"Training run {trained.id} is the null baseline {kind!r}: it is what others are "
                "compared with here, and of no use elsewhere. Name another run."
            )
        model, tensors, plate = _example(session, workspace, model)
        cells = len(tensors["cell_ids"])
        found = set_of_recipe(session, model.measure.id)
        columns = {item["name"]: item for item in (found.columns if found else [])}
        file = f"model.{model.file.path.rpartition('.')[2]}"
        planes = [
            f"channel {name}, divided by its intensity scale, not masked"
            for name in model.record.channels
        ]
        pictures = [name for name in model.record.branches if name != TABULAR]
        channels = {name: list(CROPS.get(name, planes)) for name in pictures}
        crops = {"channels": channels, "cut": CUT, "scale": SCALE} if pictures else {}
        record = {
            **model.json,
            **model.record.to_json(),
            "file": file,
            "columns": [
                dict(columns.get(name, {"name": name})) for name in model.record.scaler.names
            ],
            "crops": crops,
            "lineage": _lineage(trained),
            "example": {"plate": plate, "cells": cells},
        }
        data = workspace.artifacts.read(model.file.path, model.file.sha256)
    classifier = files("cellstore.learn").joinpath("exported_classifier.py")
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    contents = {
        file: data,
        "model.json": text.encode(),
        "classifier.py": classifier.read_bytes(),
        "cells.safetensors": save(tensors),
        "example.py": EXAMPLE.encode(),
        "README.md": readme(record).encode(),
    }
    part = target.parent / f".part-{uuid.uuid4().hex}"
    try:
        with writing(target):
            part.mkdir(parents=True)
            for name, data in contents.items():
                (part / name).write_bytes(data)
            part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ExportedModel(
        path=str(target),
        train_run_id=trained.id,
        model=kind,
        classes=len(model.record.labels),
        cells=cells,
        files=tuple(contents),
        notes=() if cells else (NO_CELLS,),
    )


def _example(
    session: Session, workspace: Workspace, model: OpenModel
) -> tuple[OpenModel, dict[str, Any], str | None]:
    """Crops from 0 to 1 and features as measured, of the first cells of an image, and its plate.

    Of the test subset if there are some, else of any image that can be read. The model that is
    returned knows this plate.
    """
    from torch import empty, float64, from_numpy, int64

    from ..learn.trained_models import fit_new_plates

    segmented_images = select(Image.id).join(Segmentation, IS_CURRENT)
    segmented_images = segmented_images.where(Segmentation.recipe_id == model.segment.id)
    with_cells = segmented_images.where(Segmentation.n_cells > 0).order_by(Image.id)
    members = select(SplitMember.image_id).where(SplitMember.split_id == model.run.split_id)
    test = with_cells.where(Image.id.in_(members.where(SplitMember.subset == Subset.TEST)))
    tried = [
        image_id
        for query in (test, with_cells)
        for image_id in session.scalars(query.limit(IMAGES_TRIED))
    ]
    for image_id in dict.fromkeys(tried):
        plate = plate_of(session, image_id)
        try:
            fitted, _ = fit_new_plates(session, workspace, model, [plate])
            cells = fitted.reader(image_id)
        except (ImageError, UserInputError):
            continue  # what is wrong with one image is no reason to export nothing
        if not len(cells):
            continue
        rows = read_cells(session, fitted.source, image_id, fitted.record.scaler.names)
        crop = model.json.get("crop", {})
        tensors = {
            # In 64 bits, so that the way back ends at the very numbers that the network reads here.
            f"crops.{name}": crops[:EXAMPLE_CELLS].double() * crop["std"] + crop["mean"]
            for name, crops in cells.crops.items()
        }
        tensors["cell_ids"] = cells.cell_ids[:EXAMPLE_CELLS].contiguous()
        tensors["features"] = from_numpy(rows.features[:EXAMPLE_CELLS].copy())
        return fitted, tensors, plate
    record, size = model.record, model.record.crop_size
    shape = record.shape
    pictures = {} if shape is None else shape.pictures
    nothing = {f"crops.{name}": empty(0, n, size, size) for name, n in pictures.items()}
    nothing["cell_ids"] = empty(0, dtype=int64)
    nothing["features"] = empty(0, len(record.scaler.names), dtype=float64)
    return model, nothing, None


def _lineage(run: Run) -> dict[str, Any]:
    split, best = run.split, (run.result or {}).get("best_epoch")
    assert split is not None
    recipes, waiting = dict[int, Recipe](), [run.recipe]
    while waiting:  # a recipe and all that it reads from, each once
        recipe = waiting.pop()
        recipes[recipe.id] = recipe
        waiting += [item for item in recipe.inputs if item.id not in recipes]
    return {
        "train_run": run.id,
        "code_version": run.code_version,
        "environment": run.environment,
        "started": run.started_at.isoformat(),
        "result": run.result,
        "metrics_of_best_epoch": {m.name: m.value for m in run.metrics if m.epoch == best},
        "split": {
            "name": split.name,
            "fingerprint": split.fingerprint,
            "protocol": split.protocol,
            "group_level": split.group_level.value,
            "seed": split.seed,
        },
        "recipes": [
            {
                "stage": item.stage.value,
                "fingerprint": item.fingerprint,
                "weights_sha256": item.weights_sha256,
                "parameters": item.parameters,
            }
            for item in recipes.values()
        ],
    }
