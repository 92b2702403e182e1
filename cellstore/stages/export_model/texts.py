"""The words and the example in the folder of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
