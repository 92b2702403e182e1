"""The figures of a report, by matplotlib, as SVG that takes its ink from the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...drawing.plates import layout_of, well_names
from ...drawing.svg import BLUE, GREY, ORANGE, colour_bar, short, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .facts import BaselineScore, Score

MAX_TICKS = 40


def headline(found: Sequence[Score], chance: float) -> str:
    """Accuracy of every level and vote, with its interval and the majority class."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, score in enumerate(reversed(found)):
            if score.low is not None and score.high is not None:
                axes.plot([score.low, score.high], [y, y], color=BLUE, lw=2, solid_capstyle="round")
            axes.plot(score.accuracy, y, "o", color=BLUE, ms=6)
            if score.majority is not None:
                axes.plot(score.majority, y, "|", color=ORANGE, ms=13, mew=2)
        names = [_level_name(score) for score in reversed(found)]
        axes.set_yticks(range(len(found)), names)
        axes.axvline(chance, color=GREY, lw=0.8, ls=(0, (2, 3)))
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy")

    return svg("headline", (6.2, 0.42 * len(found) + 0.7), draw)


def rivals(best: Score, found: Sequence[BaselineScore]) -> str:
    """Accuracy of images by hard vote: of the run, and of each baseline, with intervals."""
    rows = [("this run", best.accuracy, best.low, best.high, BLUE)]
    rows += [
        (item.baseline, item.accuracy, item.low, item.high, ORANGE if item.null else GREY)
        for item in found
        if (item.level, item.vote) == (best.level, best.vote)
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (_, accuracy, low, high, colour) in enumerate(reversed(rows)):
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="round")
            axes.plot(accuracy, y, "o", color=colour, ms=6)
        if best.low is not None:
            axes.axvline(best.low, color=BLUE, lw=0.8, ls=(0, (2, 3)))
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy of images by hard vote")

    return svg("rivals", (6.2, 0.42 * len(rows) + 0.7), draw)


def training_curves(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Loss and accuracy by epoch, on the training and the validation side."""

    def draw(figure: Figure) -> None:
        for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for side, colour in (("train", BLUE), ("validation", ORANGE)):
                points = metrics.get(f"{side}_{kind}", ())
                epochs, values = [p[0] for p in points], [p[1] for p in points]
                axes.plot(epochs, values, "-o", color=colour, ms=3, lw=1.4, label=side)
            axes.set_title(kind)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].legend()

    return svg("curves", (7.2, 2.7), draw)


def confusion(counts: NDArray[np.int64], labels: Sequence[str]) -> str:
    """Share of each true class (row) that got each label (column)."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(2.4 + 0.24 * len(labels), 3.6, 7.2))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        if len(labels) <= MAX_TICKS:
            axes.set_xticks(range(len(labels)), [short(x) for x in labels], rotation=90)
            axes.set_yticks(range(len(labels)), [short(x) for x in labels])
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel("label by vote")
        axes.set_ylabel("truth")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        colour_bar(figure, picture, "share of the true class")

    return svg("confusion", (size + 0.9, size), draw)


def plate_map(name: str, wells: Sequence[tuple[int, int, float | None]]) -> str:
    """A plate from above, each well coloured by its value in 0..1; grey: not scored.

    ``wells`` are row, column (from 1) and value.
    """
    rows, columns = layout_of(wells)
    values = np.full((rows, columns), np.nan)
    present = np.full((rows, columns), np.nan)
    for row, column, value in wells:
        present[row - 1, column - 1] = 1.0
        values[row - 1, column - 1] = np.nan if value is None else value

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh: dict[str, Any] = {"edgecolors": "none", "linewidth": 0}
        edges = np.arange(columns + 1) + 0.5, np.arange(rows + 1) + 0.5
        axes.pcolormesh(*edges, present, cmap="Greys", vmin=0, vmax=5, **mesh)
        picture = axes.pcolormesh(*edges, values, cmap="viridis", vmin=0, vmax=1, **mesh)
        well_names(axes, rows, columns)
        axes.set_title(name, pad=8)
        colour_bar(figure, picture, "image accuracy")

    return svg(f"plate {name}", (7.2, 7.2 * rows / columns * 0.86 + 0.5), draw)


def _level_name(score: Score) -> str:
    return score.level if score.level == "cell" else f"{score.level}, {score.vote} vote"
