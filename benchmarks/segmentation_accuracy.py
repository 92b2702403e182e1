"""How well a network finds cells: counts, and mean AP at IoU 0.5 and 0.75 where truth is known.

    python benchmarks/segmentation_accuracy.py --data DIR
    python benchmarks/segmentation_accuracy.py --data DIR --overlays pictures

Each set is segmented with Cellpose's default thresholds (flow 0.4, cell probability 0.0) and
with those of cellstore (0.7, -5), with the estimated diameter, and, where truth is known, also
with every image's true median diameter. ``found`` are the cells of all images of a set,
``expected`` what there is to be found; ``est/true`` is the median ratio of the diameters, or the
median estimate in pixels where the truth is not known. ``--only``, ``--diameter`` and ``--sets``
run less.

Sets: every n-th field of the demo's rendered plates and of freshly rendered validation fields
(seed 2026, never trained on), and, of those that DIR holds:

* ``dsb2018``: 10 annotated images of DSB 2018 (BBBC038); ``stardist``: one more;
* ``cytotable/ExampleHuman``: DNA; CellProfiler found 289 nuclei that do not touch the border (it
  left out those that do, so they are not counted here either), the truth is not known;
* ``cpjump1``: fields of CPJUMP1, DNA and RNA, no truth;
* ``cytodataframe/NF1_Plate_2``: DAPI, no truth but which pixels are nuclei (CellProfiler).

``--overlays`` writes a picture of every real image, and a sheet of each set, to look at.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from cellpose.metrics import average_precision
from cellpose.utils import diameters
from skimage.io import imread
from training_fields import render_nuclei

from cellstore.analysis.rendering import PlateDesign, render_field
from cellstore.analysis.segmentation import (
    SegmentationResult,
    find_model,
    load_segmenter,
)
from cellstore.enums import DEFAULT_MODEL
from cellstore.report.drawing import outline_overlay
from cellstore.report.segment_preview import captioned, png

Array = np.ndarray[Any, Any]
THRESHOLDS = {"cellpose": (0.4, 0.0), "cellstore": (0.7, -5.0)}
VALIDATION_FIELDS = 64
VALIDATION_SEED = 2026
HUMAN = "AS_09125_050116030001_D03f00d0.tif"
HUMAN_NUCLEI = 289


@dataclass(frozen=True)
class Picture:
    """An image, and what is known of it: its masks, or only how many whole cells there are.

    ``truth`` has consecutive labels: the measure of precision takes the largest for the count.
    """

    name: str
    image: Array
    truth: Array | None = None
    whole: int | None = None

    @property
    def expected(self) -> int | None:
        """How many cells there are to be found, if that is known."""
        return self.whole if self.truth is None else int(self.truth.max())

    def count(self, masks: Array) -> int:
        """How many cells were found, of the kind that is expected."""
        return int(masks.max()) if self.whole is None else whole_cells(masks)


def whole_cells(masks: Array) -> int:
    """Cells that do not touch the border."""
    cut = np.unique(np.concatenate([masks[0], masks[-1], masks[:, 0], masks[:, -1]]))
    return int(masks.max()) - int((cut > 0).sum())


def consecutive(labels: Array) -> Array:
    """The same cells with labels 1..n."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def rendered_plate(every: int) -> Iterator[Picture]:
    """Median over the channels of every n-th field of the demo's plates."""
    design = PlateDesign()
    for spec in itertools.islice(design.fields(), 0, None, every):
        field = render_field(design, spec)
        yield Picture("", np.median(field.channels, axis=0), field.masks)


def validation(every: int) -> Iterator[Picture]:
    """Fields as the network was trained on, of a seed of their own; at least one cell each."""
    for number in range(0, VALIDATION_FIELDS, every):
        rng = np.random.default_rng([VALIDATION_SEED, number])
        field = render_nuclei(rng, (256, 256))
        if field.masks.any():
            yield Picture(f"{number}", field.image, field.masks)


def annotated(folder: Path) -> Iterator[Picture]:
    """A folder with ``images`` and ``labels``."""
    for path in sorted((folder / "images").glob("*.png")):
        picture = imread(path)
        grey = picture[..., :3].mean(axis=-1) if picture.ndim == 3 else picture
        yield Picture(
            path.stem[:8], grey, tifffile.imread(folder / f"labels/{path.stem}_label.tif")
        )


def one_annotated(folder: Path) -> Iterator[Picture]:
    """The test image of stardist."""
    yield Picture("img2d", imread(folder / "img2d.tif"), consecutive(imread(folder / "mask2d.tif")))


def example_human(folder: Path) -> Iterator[Picture]:
    """Human nuclei, with CellProfiler's count."""
    yield Picture("D03", imread(folder / HUMAN), whole=HUMAN_NUCLEI)


def files(pattern: str) -> Callable[[Path], Iterator[Picture]]:
    """Images of which nothing is known."""

    def found(folder: Path) -> Iterator[Picture]:
        for path in sorted(folder.glob(pattern)):
            yield Picture(path.name.partition("-")[0].partition(".")[0], imread(path))

    return found


REAL = {
    "dsb2018": ("dsb2018", annotated),
    "stardist": ("stardist", one_annotated),
    "ExampleHuman": ("cytotable/ExampleHuman", example_human),
    "CPJUMP1 DNA": ("cpjump1/images", files("*/*-ch5*.tiff")),
    "CPJUMP1 RNA": ("cpjump1/images", files("*/*-ch3*.tiff")),
    "NF1 DAPI": ("cytodataframe/NF1_Plate_2/Plate_2_images", files("*_DAPI_*.tif")),
}
"""Sets of real images: folder below DIR, and what reads it."""


def segmented(
    pictures: list[Picture], model: str, flow: float, prob: float, known: bool
) -> tuple[list[SegmentationResult], float]:
    """What is found in each picture, and the seconds per picture."""
    load = partial(load_segmenter, find_model(model), flow_threshold=flow, cellprob_threshold=prob)
    estimator = None if known else load()
    started, results = time.perf_counter(), []
    for picture in pictures:
        true = float(diameters(picture.truth)[0]) if known else None
        segmenter = estimator or load(diameter=true)
        results.append(segmenter.segment(picture.image.astype(np.float32)))
    return results, (time.perf_counter() - started) / len(pictures)


def precision(pictures: list[Picture], results: list[SegmentationResult]) -> Array | None:
    """Mean AP at 0.5 and 0.75; ``None`` where the truth is not known."""
    if any(picture.truth is None for picture in pictures):
        return None
    truths = [np.asarray(picture.truth).astype(np.int32) for picture in pictures]
    found = [result.masks.astype(np.int32) for result in results]
    mean: Array = average_precision(truths, found, threshold=[0.5, 0.75])[0].mean(axis=0)
    return mean


def size(pictures: list[Picture], results: list[SegmentationResult]) -> float:
    """Median of the diameters used, each over the true one where that is known."""
    return float(
        np.median(
            [
                result.diameter / (1 if picture.truth is None else diameters(picture.truth)[0])
                for picture, result in zip(pictures, results, strict=True)
            ]
        )
    )


def report(
    name: str, label: str, known: bool, pictures: list[Picture], outcome: tuple[Any, float]
) -> None:
    """Print a line of the table."""
    results, seconds = outcome
    counts = [picture.expected for picture in pictures]
    there = "-" if None in counts else str(sum(count or 0 for count in counts))
    found = sum(p.count(r.masks) for p, r in zip(pictures, results, strict=True))
    scores = precision(pictures, results)
    numbers = "     -       -" if scores is None else f"{scores[0]:6.3f} {scores[1]:7.3f}"
    print(
        f"{name:13} {len(pictures):3d} {label:10} {'true' if known else 'automatic':9} "
        f"{found:6d} {there:>8} {numbers} "
        f"{size(pictures, results):8.2f} {seconds:7.2f}",
        flush=True,
    )


def write_overlays(
    folder: Path, name: str, label: str, pictures: list[Picture], results: list[SegmentationResult]
) -> None:
    """A picture with outlines for each image."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace(' ', '-')}_{label}"
    for picture, result in zip(pictures, results, strict=True):
        text = f"{picture.name}: {result.count} cells, diameter {result.diameter:.1f}"
        large = captioned(outline_overlay(picture.image, result.masks), text)
        (folder / f"{stem}_{picture.name}_{result.count}.png").write_bytes(png(large))


def sets_of(data: Path | None, every: int) -> dict[str, list[Picture]]:
    """All sets that are there, by name."""
    sets = {"rendered": list(rendered_plate(every)), "validation": list(validation(every))}
    for name, (folder, read) in REAL.items():
        pictures = list(read(data / folder)) if data and (data / folder).is_dir() else []
        sets |= {name: pictures} if pictures else {}
    return sets


def run_set(name: str, pictures: list[Picture], chosen: argparse.Namespace) -> None:
    """Every line of one set."""
    truth = all(picture.truth is not None for picture in pictures)
    kinds = [kind for kind in ("true", "automatic") if chosen.diameter in (None, kind)]
    labels = [chosen.only] if chosen.only else list(THRESHOLDS)
    for label, kind in itertools.product(labels, kinds):
        known = kind == "true"
        if known and not truth:
            continue
        outcome = segmented(pictures, chosen.model, *THRESHOLDS[label], known)
        report(name, label, known, pictures, outcome)
        if chosen.overlays and name in REAL and not known:
            write_overlays(chosen.overlays, name, label, pictures, outcome[0])


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds dsb2018 and the others")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or path of the network")
    parser.add_argument("--every", type=int, default=1, help="use every n-th rendered field")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="write pictures there")
    parser.add_argument("--only", choices=THRESHOLDS, help="only these thresholds")
    parser.add_argument("--diameter", choices=["true", "automatic"], help="only this one")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="only these sets")
    chosen = parser.parse_args()
    if chosen.data and not chosen.data.is_dir():
        parser.error(f"{chosen.data} is not a folder")
    return chosen


def main() -> None:
    """Print the table."""
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    head = f"{'set':13} {'n':>3} thresholds diameter   found expected AP@0.5 AP@0.75"
    print(f"{head} est/true s/image")
    for name, pictures in sets_of(chosen.data, chosen.every).items():
        if not chosen.sets or name in chosen.sets:
            run_set(name, pictures, chosen)


if __name__ == "__main__":
    main()
