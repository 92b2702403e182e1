"""What a score is worth: the same network on plates with and without something to learn.

python benchmarks/honest_scores.py [--sets effect nothing wells] [--levels image well plate]
    [--epochs 20] [--crop-size 40] [--true-masks] [--tabular] [--picture FILE]
python benchmarks/honest_scores.py --recipes

Renders three sets of 4 plates with 12 treatments each, and takes each through the whole pipeline:

  effect    treatments change the cells, wells and plates differ a little
  nothing   treatments do nothing
  wells     treatments do nothing, but wells differ much

On each, a network is trained on splits by image, by well and by plate, beside the null baselines
and two classical models. Prints the accuracy per image of each (soft vote) with its 95 % interval
over wells; chance is 8.3 %. --picture draws those of network and forest, for docs/explanation.md.
The network is that of the defaults at small crops; --tabular has it look at measurements only,
and --true-masks spares the segmentation: together they take minutes, the whole about two hours.

--recipes is another table, for docs/training.md: on one small plate of four treatments, with its
true masks and a split by well, the default training beside others, with accuracy and time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellstore.analysis.rendering import TREATMENTS, PlateDesign
from cellstore.config import (
    BaselineParams,
    IngestParams,
    MeasureParams,
    PredictParams,
    SplitParams,
    TrainParams,
)
from cellstore.demo import render_plates
from cellstore.enums import GroupLevel
from cellstore.learn.baselines import BASELINES
from cellstore.report.scoring import Score
from cellstore.store import Store

PLATES = PlateDesign(
    plates=("PLATE1", "PLATE2", "PLATE3", "PLATE4"),
    treatments=TREATMENTS,
    control_wells=2,
    treated_wells=1,
    sites=4,
    n_channels=5,
)
SETS: dict[str, dict[str, float]] = {
    "effect": {},
    "nothing": {"effect": 0.0},
    "wells": {"effect": 0.0, "well_effect": 6.0},
}
LEVELS = (GroupLevel.IMAGE, GroupLevel.WELL, GroupLevel.PLATE)
CHANCE = 1 / len(TREATMENTS)


@dataclass(frozen=True)
class Line:
    """The score of one model under one protocol on one set of plates."""

    plates: str
    level: GroupLevel
    model: str
    score: Score


def fill(store: Store, folder: Path, changes: dict[str, float], *, true_masks: bool) -> str:
    """Render, ingest, segment and measure; return the feature set to learn from."""
    design = replace(PLATES, **changes)  # type: ignore[arg-type]
    plates = render_plates(folder / "plates", design=design)
    store.ingest(plates.metadata, IngestParams(images=plates.images))
    if true_masks:
        store.ingest(plates.truth, IngestParams(kind="masks"))
    else:
        store.segment()
    return store.measure(MeasureParams(features=("intensity", "basic"))).feature_set


def scored(store: Store, run_id: int) -> Score:
    """The image accuracy of a run on the test side of its split."""
    predicted = store.predict(PredictParams(), run=str(run_id))
    return store.report(str(predicted.run_id)).score("image", "soft")


def lines(
    store: Store, name: str, params: TrainParams, levels: Sequence[GroupLevel]
) -> Iterator[Line]:
    """Scores of all models under some protocols, the network's first."""
    for level in levels:
        sizes: dict[str, Any] = {"test_size": 0.25, "validation_size": 0.25}
        split = store.create_split(level.value, SplitParams(group_level=level, **sizes)).name
        network = store.train(params, split=split)
        yield Line(name, level, "network", scored(store, network.run_id))
        baselines = BaselineParams(features=params.features)
        for item in store.train_baselines(BASELINES, baselines, split=split, predict=False):
            yield Line(name, level, item.baseline, scored(store, item.run_id))


def show(line: Line) -> None:
    found = line.score
    low, high = found.low or 0.0, found.high or 1.0
    print(
        f"{line.plates:8} by {line.level.value:6} {line.model:10} {found.accuracy:6.1%}   "
        f"{low:5.1%} to {high:6.1%}   {found.n:4} images",
        flush=True,
    )


def score_of(found: list[Line], plates: str, level: GroupLevel, model: str) -> Score:
    return next(
        item.score
        for item in found
        if (item.plates, item.level, item.model) == (plates, level, model)
    )


def draw(found: list[Line], path: Path) -> None:
    """Draw scores with their intervals: the network's as dots, those of the forest as rings."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Words stay words, and the same numbers give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cellstore", "font.size": 10}):
        titles = {
            "effect": "treatments have effects",
            "nothing": "treatments do nothing",
            "wells": "only wells differ",
        }
        figure = Figure(figsize=(9, 2.4), layout="constrained")
        for axes, (name, title) in zip(
            figure.subplots(1, 3, sharey=True), titles.items(), strict=True
        ):
            for y, level in enumerate(reversed(LEVELS)):
                for model, up, face in (("network", 0.12, None), ("forest", -0.12, "white")):
                    score = score_of(found, name, level, model)
                    colour = "#c2571a" if level is GroupLevel.IMAGE else "#2a6f97"
                    axes.plot([score.low, score.high], [y + up] * 2, color=colour, lw=2)
                    axes.plot(score.accuracy, y + up, "o", color=colour, ms=7, mfc=face or colour)
            axes.axvline(CHANCE, color="#777777", lw=1, ls=":")
            axes.set_title(title, fontsize=11)
            axes.set_xlim(-0.03, 1.03)
            axes.set_ylim(-0.6, 2.6)
            axes.set_xlabel("image accuracy")
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.axes[0].set_yticks(range(3), [f"by {level.value}" for level in reversed(LEVELS)])
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


ONE_PLATE = PlateDesign(
    plates=("PLATE1",), treatments=TREATMENTS[:4], control_wells=5, treated_wells=5, sites=1
)
RECIPES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "default": (None, {"epochs": 14}),
    "without features": (None, {"epochs": 14, "branches": ("mask",)}),
    "crops of 224 pixels": (None, {"epochs": 2, "crop_size": 224}),
    "published, batches of 32": ("published", {"epochs": 2, "batch_size": 32}),
}
"""Those of 224 pixels have two epochs, or they would take all day on a CPU; 512 of them in one
batch, as published, need more than 24 GB."""


def compare_recipes(folder: Path) -> None:
    """Print accuracy and time of some ways to train on one plate."""
    with Store.create(folder / "store") as store:
        plates = render_plates(folder / "plates", design=ONE_PLATE)
        store.ingest(plates.metadata, IngestParams(images=plates.images))
        store.ingest(plates.truth, IngestParams(kind="masks"))
        store.measure()
        split = store.create_split("wells", SplitParams(test_size=0.25, validation_size=0.25)).name
        print("recipe  epochs  CPU seconds  per epoch (default: 1)  cells right  images right")
        first = 0.0
        for name, (preset, changes) in RECIPES.items():
            params = TrainParams.of(preset, **{"branches": ("mask", "tabular"), **changes})
            began = time.process_time()
            trained = store.train(params, split=split)
            seconds = time.process_time() - began
            each = seconds / trained.epochs
            first = first or each
            run = store.predict(PredictParams(), run=str(trained.run_id)).run_id
            found = store.report(str(run))
            cells, images = found.score("cell", "hard"), found.score("image", "soft")
            print(
                f"{name}  {trained.epochs}  {seconds:.0f}  {each / first:.1f}  "
                f"{cells.accuracy:.0%} of {cells.n}  {images.accuracy:.0%} of {images.n}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--crop-size", type=int, default=40)
    parser.add_argument("--tabular", action="store_true", help="measurements only, no pictures")
    parser.add_argument("--true-masks", action="store_true", help="do not segment")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--levels", nargs="+", default=LEVELS, type=GroupLevel)
    parser.add_argument("--picture", type=Path, help="where to draw the scores, as SVG")
    parser.add_argument("--recipes", action="store_true", help="ways to train, on one plate")
    given = parser.parse_args()
    if given.recipes:
        with tempfile.TemporaryDirectory() as name:
            compare_recipes(Path(name))
        return
    found: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sets:
            place = Path(folder) / name
            with Store.create(place / "store") as store:
                features = fill(store, place, SETS[name], true_masks=given.true_masks)
                for line in lines(store, name, network(given, features), given.levels):
                    show(line)
                    found.append(line)
    if given.picture is not None:
        draw(found, given.picture)


def network(given: argparse.Namespace, features: str) -> TrainParams:
    """How the network of this benchmark learns."""
    if given.tabular:
        return TrainParams.of(
            "published", features=features, branches=("tabular",), epochs=60, patience=20,
            batch_size=64, learning_rate=3e-3,
        )  # fmt: skip
    return TrainParams(
        features=features,
        epochs=given.epochs,
        crop_size=given.crop_size,
        branches=("mask", "image", "tabular"),
    )


if __name__ == "__main__":
    main()
