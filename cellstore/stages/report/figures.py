"""The figures of a report, by matplotlib, as SVG that takes its ink from the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...drawing.svg import BLUE, GREY, ORANGE, short, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .facts import BaselineScore, CalibrationBin, ReportResult, Score

Limits = tuple[float | None, float | None]
DOTTED = (0, (2, 3))
TITLES = {"cell": "per cell", "image": "per image, soft vote"}


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: a share in 0..1 with its interval; ``mark``: another value to see."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = BLUE
    mark: float | None = None


def standing(result: ReportResult, best: Score, unseen: Score | None) -> str:
    """The one look: the accuracy of images beside what knows nothing, and guessing."""
    rows = [Dot(f"run {result.run_id}", best.accuracy, best.low, best.high)]
    if unseen is not None:
        rows.append(Dot("… in unseen wells", unseen.accuracy, unseen.low, unseen.high))
    rows += [_rival(item) for item in result.baselines if _same(item, best)]
    if best.majority is not None and not any(row.name == "majority" for row in rows):
        rows.append(Dot(f"always {short(result.majority_label or '')}", best.majority, colour=GREY))
    beside = ", ".join(f"{row.name} {_percent(row.value)}" for row in rows[1:])
    alt = f"Accuracy of images: run {result.run_id} {_percent(best.accuracy)}; beside it {beside}."
    return dots("standing", rows, alt, guess=result.chance, start=best.low, width=5.4)


def _rival(item: BaselineScore) -> Dot:
    return Dot(item.baseline, item.accuracy, item.low, item.high, ORANGE if item.null else GREY)


def _same(item: BaselineScore, best: Score) -> bool:
    return (item.level, item.vote) == (best.level, best.vote)


def levels(found: Sequence[Score], chance: float) -> str:
    """Accuracy of every level and vote, with its interval and the majority class."""
    rows = [
        Dot(_level_name(item), item.accuracy, item.low, item.high, mark=item.majority)
        for item in found
    ]
    said = ", ".join(f"{row.name} {_percent(row.value)}" for row in rows)
    return dots("levels", rows, f"Accuracy by level and vote: {said}.", guess=chance)


def dots(
    name: str,
    rows: Sequence[Dot],
    alt: str,
    *,
    guess: float | None = None,
    start: float | None = None,
    label: str = "accuracy, %",
    width: float = 6.6,
) -> str:
    """Shares with their intervals, one below the other; dotted: guessing, or where one starts."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(reversed(rows)):
            _dot(axes, y, row)
        for place, colour in ((guess, GREY), (start, BLUE)):
            if place is not None:
                axes.axvline(100 * place, color=colour, lw=0.8, ls=DOTTED, zorder=0)
        axes.set_yticks(range(len(rows)), [short(row.name, 28) for row in reversed(rows)])
        most = max(
            (value for row in rows for value in (row.value, row.high, row.mark) if value), default=1
        )
        axes.set_xlim(-0.5, 100 * min(1.08, max(1.18 * most, 0.05)))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)

    return svg(name, (width, (0.3 if len(rows) < 20 else 0.26) * len(rows) + 0.75), draw, alt)


def _dot(axes: Axes, y: int, row: Dot) -> None:
    if row.mark is not None:
        axes.plot(100 * row.mark, y, "|", color=ORANGE, ms=11, mew=2)
    if row.value is None:
        return
    value = 100 * row.value
    low, high = (None if x is None else 100 * x for x in (row.low, row.high))
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=row.colour, lw=2.2, solid_capstyle="round")
    axes.plot(value, y, "o", color=row.colour, ms=6, clip_on=False)
    end = value if high is None else high
    if row.mark is not None and end <= 100 * row.mark < end + 8:
        end = 100 * row.mark  # the number stands beside the mark, not on it
    text = f"{value:.1f}"
    axes.annotate(text, (end, y), (7, 0), textcoords="offset points", va="center", size=9)


def training_curves(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Loss and accuracy by epoch, on the training and the validation side."""
    best = min(metrics.get("validation_loss", ()), key=lambda point: point[1], default=None)

    def draw(figure: Figure) -> None:
        for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for side, colour, mark in (("train", BLUE, "-o"), ("validation", ORANGE, "-s")):
                points = metrics.get(f"{side}_{kind}", ())
                scale = 100 if kind == "accuracy" else 1
                epochs, values = [p[0] for p in points], [scale * p[1] for p in points]
                axes.plot(epochs, values, mark, color=colour, ms=3, lw=1.4, label=side)
            if best is not None:
                axes.axvline(best[0], color=GREY, lw=0.8, ls=DOTTED, zorder=0)
            axes.set_title("accuracy per cell, %" if kind == "accuracy" else kind)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].legend()

    alt = "Loss and accuracy by epoch, training and validation."
    if best is not None:
        alt += f" The validation loss is lowest ({best[1]:.3g}) in epoch {best[0]}."
    return svg("curves", (7.2, 2.7), draw, alt)


def reliability(bins: Sequence[CalibrationBin]) -> str:
    """How often answers are right by how sure they were, and how many answers there are."""
    kinds = [kind for kind in TITLES if any(item.level == kind for item in bins)]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(kinds), height_ratios=(3, 1), sharex="col", squeeze=False)
        for column, kind in enumerate(kinds):
            some = [item for item in bins if item.level == kind]
            _reliability(grid[0, column], some, TITLES[kind])
            _counts(grid[1, column], some)
        grid[0, 0].set_ylabel("right, %")
        grid[1, 0].set_ylabel("answers")

    said = "; ".join(_calibration_words(kind, bins) for kind in kinds)
    return svg("reliability", (3.6 * len(kinds), 4.2), draw, f"Confidence and accuracy. {said}.")


def _reliability(axes: Axes, bins: Sequence[CalibrationBin], title: str) -> None:
    axes.plot([0, 100], [0, 100], color=GREY, lw=0.9, ls=DOTTED)
    sure = [100 * item.confidence for item in bins]
    right = [100 * item.accuracy for item in bins]
    axes.vlines(sure, sure, right, color=ORANGE, lw=1.6, alpha=0.7)
    axes.plot(sure, right, "-o", color=BLUE, ms=5, lw=1.2)
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 102)
    axes.set_title(title)


def _counts(axes: Axes, bins: Sequence[CalibrationBin]) -> None:
    for item in bins:
        width = 100 * (item.high - item.low)
        axes.bar(100 * item.low, item.n, width=0.9 * width, align="edge", color=GREY)
    axes.set_xlabel("confidence, %")
    axes.yaxis.set_major_formatter(lambda value, _: _brief(value))
    axes.locator_params(axis="y", nbins=3)


def _calibration_words(kind: str, bins: Sequence[CalibrationBin]) -> str:
    last = max((item for item in bins if item.level == kind), key=lambda item: item.confidence)
    return (
        f"{TITLES[kind]}: where the confidence is {_percent(last.confidence)} on average, "
        f"{_percent(last.accuracy)} of {last.n:,} answers are right"
    )


def ranked(values: Sequence[float]) -> str:
    """The share found of every class, the best first: for more classes than have room for names."""
    shares = 100 * np.sort(np.array(values))[::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.fill_between(
            np.arange(shares.size + 1),
            [*shares, shares[-1]],
            step="post",
            color=BLUE,
            alpha=0.35,
            lw=0,
        )
        axes.step(np.arange(shares.size + 1), [*shares, shares[-1]], where="post", color=BLUE)
        axes.set_xlim(0, shares.size)
        axes.set_ylim(0, 102)
        axes.set_xlabel("classes, the best first")
        axes.set_ylabel("found, %")

    never = int(np.sum(shares == 0))
    half = int(np.sum(shares >= 50))
    alt = (
        f"Of {shares.size} classes {half} are found in half of their images or more, {never} never."
    )
    return svg("ranked", (7.2, 2.4), draw, alt)


def shares_of(first: str, second: str, counts: Mapping[str, int]) -> str:
    """How two runs agree: one bar, in parts."""
    total = max(1, sum(counts.values()))
    colours = ("#6f9fcf", BLUE, ORANGE, GREY)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = 0.0
        for (name, number), colour in zip(counts.items(), colours, strict=True):
            width = 100 * number / total
            axes.barh(0, width, left=left, color=colour, edgecolor="none", label=name)
            if width > 6:
                axes.text(
                    left + width / 2,
                    0,
                    f"{number:,}",
                    ha="center",
                    va="center",
                    color="white" if colour != ORANGE else "black",
                    size=9,
                )
            left += width
        axes.set_xlim(0, 100)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("images, %")
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    said = ", ".join(f"{name}: {number:,}" for name, number in counts.items())
    return svg("agreement", (7.2, 1.7), draw, f"{first} and {second}. {said}.")


def _level_name(score: Score) -> str:
    return score.level if score.level == "cell" else f"{score.level}, {score.vote} vote"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _brief(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
