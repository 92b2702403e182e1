"""The figures of a report, by matplotlib, as SVG that takes its ink from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .facts import Score

INK = "#0a0b0d"
"""Stands for the colour of the page's text until the SVG is done; see ``_as_svg``."""
BLUE, ORANGE, GREY = "#3b82c4", "#d97b28", "#8a8f98"
"""Told apart by the colour-blind, and seen on white as on black."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a compound may be called $x$
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
MAX_TICKS = 40
PLATES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 96, 384 and 1536 wells."""


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

    return _svg("headline", (6.2, 0.42 * len(found) + 0.7), draw)


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

    return _svg("curves", (7.2, 2.7), draw)


def confusion(counts: NDArray[np.int64], labels: Sequence[str]) -> str:
    """Share of each true class (row) that got each label (column)."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(2.4 + 0.24 * len(labels), 3.6, 7.2))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        if len(labels) <= MAX_TICKS:
            axes.set_xticks(range(len(labels)), [_short(x) for x in labels], rotation=90)
            axes.set_yticks(range(len(labels)), [_short(x) for x in labels])
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel("label by vote")
        axes.set_ylabel("truth")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _colour_bar(figure, picture, "share of the true class")

    return _svg("confusion", (size + 0.9, size), draw)


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
        _well_names(axes, rows, columns)
        axes.set_title(name, pad=8)
        _colour_bar(figure, picture, "image accuracy")

    return _svg(f"plate {name}", (7.2, 7.2 * rows / columns * 0.86 + 0.5), draw)


def layout_of(wells: Sequence[tuple[int, int, float | None]]) -> tuple[int, int]:
    """Return rows and columns of the smallest standard plate that has all ``wells``."""
    row, column = max(w[0] for w in wells), max(w[1] for w in wells)
    fitting = [size for size in PLATES if row <= size[0] and column <= size[1]]
    return fitting[0] if fitting else (row, column)


def _well_names(axes: Axes, rows: int, columns: int) -> None:
    step = 1 if columns <= 24 else 2
    letters = [chr(64 + r) if r <= 26 else f"A{chr(64 + r - 26)}" for r in range(1, rows + 1)]
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.set_xticks(range(1, columns + 1, step))
    axes.set_yticks(range(1, rows + 1, step), letters[::step])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _colour_bar(figure: Figure, picture: Any, label: str) -> None:
    bar = figure.colorbar(picture, fraction=0.03, pad=0.02, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _level_name(score: Score) -> str:
    return score.level if score.level == "cell" else f"{score.level}, {score.vote} vote"


def _short(text: str, longest: int = 22) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    return _as_svg(target.getvalue())


def _as_svg(text: str) -> str:
    """Return the element alone, its ink that of the page, its size that of its place."""
    element = text[text.index("<svg") :]
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)
    head, rest = element.replace(INK, "currentColor").split(">", 1)
    width = re.search(r'width="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    size = f' style="width:{width[1]}pt"' if width else ""
    return f'{head}{size} role="img">{rest}'
