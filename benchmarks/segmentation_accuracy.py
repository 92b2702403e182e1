"""How well the shipped network finds cells: a table of mean AP at IoU 0.5 and 0.75.

python benchmarks/segmentation_accuracy.py --data DIR

Each set is segmented with Cellpose's default thresholds (flow 0.4, cell probability 0.0) and
with those of cellstore (0.7, -5), once with every image's true median diameter and once with the
estimated one. Sets: the demo's rendered plates, and, if DIR holds ``dsb2018/images/*.png`` and
``dsb2018/labels/*_label.tif``, those real annotated images.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from cellpose.metrics import average_precision
from cellpose.utils import diameters
from skimage.io import imread

from cellstore.ops.rendering import PlateDesign, render_field
from cellstore.ops.segmentation import DEFAULT_MODEL, find_model, load_segmenter

Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
THRESHOLDS = {"Cellpose (0.4, 0.0)": (0.4, 0.0), "cellstore (0.7, -5)": (0.7, -5.0)}


def rendered_plate(every: int) -> Iterator[Pair]:
    """(median over the channels, truth) of every n-th field of the demo's plates."""
    design = PlateDesign()
    for spec in itertools.islice(design.fields(), 0, None, every):
        field = render_field(design, spec)
        yield np.median(field.channels, axis=0), field.masks


def annotated(folder: Path) -> Iterator[Pair]:
    """(image, truth) of a folder with ``images`` and ``labels``."""
    for path in sorted((folder / "images").glob("*.png")):
        picture = imread(path)
        grey = picture[..., :3].mean(axis=-1) if picture.ndim == 3 else picture
        yield grey, tifffile.imread(folder / "labels" / f"{path.stem}_label.tif")


def score(pairs: list[Pair], model: str, flow: float, prob: float, known: bool) -> list[float]:
    """Mean AP at 0.5 and 0.75, mean of estimated over true diameter, seconds per image."""
    files = find_model(model)
    estimator = load_segmenter(files, flow_threshold=flow, cellprob_threshold=prob)
    started, found, ratios = time.perf_counter(), [], []
    for image, truth in pairs:
        true = float(diameters(truth)[0])
        segmenter = estimator
        if known:
            segmenter = load_segmenter(
                files, flow_threshold=flow, cellprob_threshold=prob, diameter=true
            )
        result = segmenter.segment(image.astype(np.float32))
        found.append(result.masks.astype(np.int32))
        ratios.append(result.diameter / true)
    seconds = (time.perf_counter() - started) / len(pairs)
    truths = [truth.astype(np.int32) for _, truth in pairs]
    precision = average_precision(truths, found, threshold=[0.5, 0.75])[0]
    return [*precision.mean(axis=0), float(np.median(ratios)), seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds dsb2018")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or path of the network")
    parser.add_argument("--every", type=int, default=1, help="use every n-th rendered field")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    sets = {"rendered plate": list(rendered_plate(chosen.every))}
    if chosen.data:
        if not (chosen.data / "dsb2018").is_dir():
            parser.error(f"{chosen.data} holds no folder dsb2018")
        sets["dsb2018"] = list(annotated(chosen.data / "dsb2018"))
    header = f"{'set':15} {'n':>3} {'thresholds':20} {'diameter':10}"
    print(f"{header} AP@0.5 AP@0.75 est/true s/image")
    for (name, pairs), (label, limits), known in itertools.product(
        sets.items(), THRESHOLDS.items(), (True, False)
    ):
        row = score(pairs, chosen.model, *limits, known)
        kind = "true" if known else "automatic"
        print(
            f"{name:15} {len(pairs):3d} {label:20} {kind:10} "
            f"{row[0]:6.3f} {row[1]:7.3f} {row[2]:8.2f} {row[3]:7.2f}"
        )


if __name__ == "__main__":
    main()
