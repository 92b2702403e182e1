"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.overlay import outline_overlay, to_grey
from ..artifacts import write_atomically
from ..config import VoteRules
from ..db.models import Recipe, Segmentation
from ..errors import CellstoreError, UnknownNameError
from ..extras import need
from ..jobs.planes import read_image
from ..jobs.workspace import Workspace
from ..query.cells import plane_of, read_masks
from ..query.engine import Questions
from ..query.source import quoted
from ..settings import check_not_of_a_store
from .comparison import Comparison, Difference
from .drawing import (
    BLUE,
    GREY,
    ORANGE,
    WIDEST,
    jpeg,
    layout_of,
    middle,
    render,
    short,
    smaller,
    svg,
    well_names,
)
from .scoring import (
    HEADLINE,
    ClassScore,
    Evidence,
    GroupScore,
    ReportResult,
    Subject,
    by_baseline,
    gathered,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .scoring import BaselineScore, CalibrationBin, Score


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
    axes.yaxis.set_major_formatter(lambda value, _: _figures_brief(value))
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


def _figures_brief(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


SHOWN_PLATES = 12
USUAL = ("area", "mean_intensity")
"""Features that are shown if none is named, and they were measured."""
ABSENT = (0.54, 0.56, 0.6, 0.25)
"""Colour of a well without a value, seen on white as on black."""
SMALL, LARGE = 3.6, 7.4
LEFT, BAR, ABOVE = 0.3, 0.7, 0.35
"""Inches: widths of a map, and what is left for letters, colours and numbers."""

WELLS = """
    SELECT p.id AS plate_id, p.barcode AS plate, w.id, w.name, w."row", w."column"
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
    ORDER BY p.barcode, w."row", w."column"
"""
USED = """
    WITH used AS (
        SELECT DISTINCT c.segmentation_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
        WHERE p.run_id = ? AND p.rank = 1
    ),
    found AS (
        SELECT c.id, s.image_id, i.well_id FROM cells AS c
        JOIN segmentations AS s ON s.id = c.segmentation_id
        JOIN images AS i ON i.id = s.image_id
        WHERE c.excluded IS NULL AND s.id IN (SELECT segmentation_id FROM used)
    )
"""
COUNTED = "SELECT well_id, count(*) / count(DISTINCT image_id) AS value FROM found GROUP BY 1"
SETS = "SELECT name FROM feature_sets ORDER BY id DESC"
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "BOOLEAN", "HUGEINT")


@dataclass(frozen=True)
class Place:
    """A well of a scored plate."""

    well_id: int
    name: str
    row: int
    column: int


@dataclass(frozen=True)
class Measure:
    """A number for each well (by id). ``low`` and ``high``: from where to where colours go."""

    title: str
    unit: str
    values: Mapping[int, float]
    low: float
    high: float


@dataclass(frozen=True)
class PlateMap:
    """One plate by one measure, drawn, and in words how its lowest and highest wells are called."""

    plate: str
    svg: str
    extremes: str


@dataclass(frozen=True)
class MapGroup:
    """One measure on every plate that is shown."""

    measure: Measure
    maps: tuple[PlateMap, ...]


def plates_of(questions: Questions, wells: Sequence[int]) -> dict[str, list[Place]]:
    """Return all wells of the plates that ``wells`` are on, by barcode."""
    found: dict[str, list[Place]] = defaultdict(list)
    for row in questions.ask(WELLS, [list(wells)]).to_pylist():
        found[row["plate"]].append(Place(row["id"], row["name"], row["row"], row["column"]))
    return dict(found)


def measures(
    questions: Questions, run_id: int, images: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> list[Measure]:
    """Return accuracy and cells by well, and the features ``wanted``, else the usual ones.

    ``images``: rows of the view ``verdicts``, one per image. A feature is a column of a feature
    set, or SET.COLUMN; its value is the mean over the cells of a well that the run could label.

    Raises:
        UnknownNameError: no feature set has such a column of numbers.
    """
    columns = _columns(questions)
    chosen = [_find(columns, name) for name in wanted]
    if not wanted:
        chosen = [columns[name] for name in USUAL if name in columns]
    cells = questions.ask(f"{USED} {COUNTED}", [run_id]).to_pylist()
    return [
        Measure("Accuracy", "images with the right label, %", _accuracy(images), 0, 100),
        _measure("Cells", "cells in an image", {row["well_id"]: row["value"] for row in cells}),
        *_features(questions, run_id, chosen),
    ]


def _accuracy(images: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    by_well: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            by_well[row["well_id"]].append(row["correct"])
    return {well: 100 * sum(right) / len(right) for well, right in by_well.items()}


def _columns(questions: Questions) -> dict[str, tuple[str, str]]:
    """Return set and column by the names that mean them; a bare name means the newest set."""
    found: dict[str, tuple[str, str]] = {}
    for name in questions.ask(SETS)["name"].to_pylist():
        try:
            columns = questions.columns(name)
        except UnknownNameError:  # a set that is hidden by a table of that name
            continue
        for column, kind in columns:
            if kind in NUMBERS and column != "cell_id":
                found[f"{name}.{column}"] = (name, column)
                found.setdefault(column, (name, column))
    return found


def _find(columns: Mapping[str, tuple[str, str]], name: str) -> tuple[str, str]:
    if name not in columns:
        raise UnknownNameError.of("feature", name, sorted(columns))
    return columns[name]


def _features(
    questions: Questions, run_id: int, chosen: Sequence[tuple[str, str]]
) -> list[Measure]:
    by_set: dict[str, list[str]] = defaultdict(list)
    for name, column in dict.fromkeys(chosen):
        by_set[name].append(column)
    found: dict[tuple[str, str], Measure] = {}
    for name, columns in by_set.items():
        rows = questions.ask(_question(name, columns), [run_id]).to_pylist()
        for place, column in enumerate(columns):
            values = {row["well_id"]: row[f"v{place}"] for row in rows}
            known = {well: value for well, value in values.items() if value is not None}
            found[name, column] = _measure(column, f"mean of the cells, set {name}", known)
    return [found[key] for key in dict.fromkeys(chosen)]


def _question(name: str, columns: Sequence[str]) -> str:
    means = ", ".join(
        f"avg(f.{quoted(column)}) FILTER (WHERE isfinite(f.{quoted(column)}::DOUBLE)) AS v{place}"
        for place, column in enumerate(columns)
    )
    return (
        f"{USED} SELECT found.well_id, {means} FROM found "  # noqa: S608 - names are quoted
        f"JOIN {quoted(name)} AS f ON f.cell_id = found.id GROUP BY 1"
    )


def _measure(title: str, unit: str, values: Mapping[int, float]) -> Measure:
    """Colours end at the 2nd and 98th percentile: odd wells must not take them all."""
    if not values:
        return Measure(title, unit, values, 0, 1)
    numbers = list(values.values())
    low, high = (float(x) for x in np.percentile(numbers, [2, 98]))
    if low == high:
        low, high = min(numbers), max(numbers)
    return Measure(title, unit, values, low, high if high > low else low + 1)


def drawn(plates: Mapping[str, Sequence[Place]], found: Sequence[Measure]) -> list[MapGroup]:
    """Draw each measure on each of the first plates."""
    shown = list(plates.items())[:SHOWN_PLATES]
    small = len(shown) > 1
    return [
        MapGroup(
            item,
            tuple(
                PlateMap(plate, _map(plate, places, item, small=small), _extremes(places, item))
                for plate, places in shown
            ),
        )
        for item in found
    ]


def _extremes(places: Sequence[Place], found: Measure) -> str:
    values = found.values
    known = sorted((values[item.well_id], item.name) for item in places if item.well_id in values)
    if not known:
        return "no well has a value"
    (low, first), (high, last) = known[0], known[-1]
    if low == high:
        return f"{len(known)} wells, {_brief(low)} in each"
    return f"{len(known)} wells, from {_brief(low)} ({first}) to {_brief(high)} ({last})"


def _map(plate: str, places: Sequence[Place], found: Measure, *, small: bool) -> str:
    rows, columns = layout_of([(item.row, item.column, None) for item in places])
    values = np.full((rows, columns), np.nan)
    there = np.zeros((rows, columns, 4))
    for item in places:
        there[item.row - 1, item.column - 1] = ABSENT
        values[item.row - 1, item.column - 1] = found.values.get(item.well_id, np.nan)
    width = SMALL if small else LARGE
    height = (width - LEFT - BAR) * rows / columns + ABOVE

    def draw(figure: Figure) -> None:
        # Fixed places: to lay out dozens of maps by their texts takes seconds.
        figure.set_layout_engine("none")
        base, tall = 0.05 / height, (height - ABOVE - 0.05) / height
        axes = figure.add_axes((LEFT / width, base, (width - LEFT - BAR) / width, tall))
        # A picture of one pixel for each well: a path for each is long.
        spread: dict[str, Any] = {
            "interpolation": "none",
            "extent": (0.5, columns + 0.5, rows + 0.5, 0.5),
        }
        axes.imshow(there, **spread)
        picture = axes.imshow(values, cmap="viridis", vmin=found.low, vmax=found.high, **spread)
        axes.set_ylim(0.5, rows + 0.5)
        well_names(axes, rows, columns, small=small)
        axes.spines[:].set(visible=True, alpha=0.3)
        beside = figure.add_axes(((width - BAR + 0.08) / width, base, 0.1 / width, tall))
        scale = figure.colorbar(picture, cax=beside)
        scale.outline.set_visible(False)
        scale.ax.tick_params(length=0, labelsize=7 if small else 8)

    alt = f"Plate {plate}, {found.title} ({found.unit}): {_extremes(places, found)}."
    return svg(f"{plate} {found.title} {found.unit}", (width, height), draw, alt)


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


NAMED = 45
"""Classes that have room for their names."""
BLOCK = 30
"""Classes of the most confused block, where not all have room."""
MIX_UPS = 12
FAINTEST = 0.18
FAINTEST_UNNAMED = 0.5
"""How solid the smallest share is drawn, so that a single image is seen; more where squares
are small."""


@dataclass(frozen=True)
class MixUp:
    """A class that was taken for another in ``n`` images; ``gene``: that of both, if it is."""

    truth: str
    predicted: str
    n: int
    gene: str | None


@dataclass(frozen=True)
class Confusion:
    """Images by truth (row) and answer (column): ``counts`` in the order of ``labels``.

    ``genes``: the target of each label, ``None`` where there is none. ``same_gene`` counts mistakes
    for another label of the same gene, ``wrong`` all mistakes.
    """

    labels: tuple[str, ...]
    genes: tuple[str | None, ...]
    counts: NDArray[np.int64]
    mix_ups: tuple[MixUp, ...]
    wrong: int
    same_gene: int

    @property
    def grouped(self) -> bool:
        """Whether some labels share a gene, so that mistakes within a gene can be."""
        known = [gene for gene in self.genes if gene is not None]
        return len(set(known)) < len(known)

    def only(self, chosen: Sequence[int]) -> Confusion:
        """Return the rows and columns of some labels."""
        return Confusion(
            tuple(self.labels[i] for i in chosen),
            tuple(self.genes[i] for i in chosen),
            self.counts[np.ix_(chosen, chosen)],
            self.mix_ups,
            self.wrong,
            self.same_gene,
        )


def confusion_of(pairs: Sequence[tuple[str, str]], genes: Mapping[str, str | None]) -> Confusion:
    """Count ``pairs`` of truth and answer, the labels of a gene beside each other."""
    named = sorted({label for pair in pairs for label in pair}, key=lambda x: _place(x, genes))
    index = {label: position for position, label in enumerate(named)}
    counted = Counter(pairs)
    counts = np.zeros((len(named), len(named)), np.int64)
    for (truth, said), number in counted.items():
        counts[index[truth], index[said]] = number
    wrong = sorted(
        (pair for pair in counted if pair[0] != pair[1]), key=lambda pair: (-counted[pair], pair)
    )
    same = {pair: _shared(*pair, genes) for pair in wrong}
    return Confusion(
        labels=tuple(named),
        genes=tuple(genes.get(label) for label in named),
        counts=counts,
        mix_ups=tuple(MixUp(*pair, counted[pair], same[pair]) for pair in wrong[:MIX_UPS]),
        wrong=sum(counted[pair] for pair in wrong),
        same_gene=sum(counted[pair] for pair in wrong if same[pair]),
    )


def _place(label: str, genes: Mapping[str, str | None]) -> tuple[bool, str, str]:
    gene = genes.get(label)
    return gene is not None, gene or "", label


def _shared(one: str, other: str, genes: Mapping[str, str | None]) -> str | None:
    gene = genes.get(one)
    return gene if gene is not None and gene == genes.get(other) else None


def most_confused(found: Confusion, number: int = BLOCK) -> list[int]:
    """Return the places of the labels between which most mistakes are, in their order."""
    mistakes = found.counts + found.counts.T
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-np.triu(mistakes), axis=None, kind="stable")
    chosen: dict[int, None] = {}
    for place in order:
        row, column = divmod(int(place), len(found.labels))
        if mistakes[row, column] == 0 or len(chosen) >= number:
            break
        chosen.update({row: None, column: None})
    return sorted(chosen)[:number]


def by_gene(found: Confusion) -> Confusion:
    """Return the same images by the gene of truth and answer."""
    keys = [gene or label for gene, label in zip(found.genes, found.labels, strict=True)]
    named = list(dict.fromkeys(keys))
    into = np.zeros((len(keys), len(named)), np.int64)
    into[np.arange(len(keys)), [named.index(key) for key in keys]] = 1
    counts = into.T @ found.counts @ into
    return Confusion(tuple(named), (None,) * len(named), counts, (), found.wrong, found.same_gene)


def figure_of(name: str, found: Confusion, *, what: str = "label") -> str:
    """Draw the share of each true class (row) that got each answer (column).

    Blue: right; orange: another label of the same gene; grey: another one. The paper shows where
    there is nothing. Names stand beside up to ``NAMED`` classes.
    """
    number = len(found.labels)
    named = number <= NAMED
    size = float(np.clip(1.9 + 0.19 * number, 3.2, 8.2)) if named else 6.4

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # A picture of one pixel for each pair: a path for each is long.
        axes.imshow(_colours(found), interpolation="none")
        _frame(axes, found, named=named)
        axes.set_xlabel(f"{what} by vote")
        axes.set_ylabel("truth")

    right = int(np.trace(found.counts))
    alt = (
        f"Confusion matrix of {number} classes: {right:,} images on the diagonal are right, "
        f"{found.counts.sum() - right:,} beside it are not."
    )
    return svg(name, (size + (1.2 if named and found.grouped else 0.4), size), draw, alt)


def _colours(found: Confusion) -> NDArray[np.float64]:
    """Colour (K, K, 4): the hue says what kind of answer it is, the opacity how frequent."""
    from matplotlib.colors import to_rgb

    number = len(found.labels)
    shares = found.counts / np.maximum(found.counts.sum(axis=1, keepdims=True), 1)
    genes = np.array([gene or "" for gene in found.genes])
    same = (genes[:, None] == genes) & (genes != "")
    picture = np.zeros((number, number, 4))
    picture[..., :3] = to_rgb(GREY)
    picture[same, :3] = to_rgb(ORANGE)
    picture[np.arange(number), np.arange(number), :3] = to_rgb(BLUE)
    faintest = FAINTEST if number <= NAMED else FAINTEST_UNNAMED
    picture[..., 3] = np.where(shares > 0, faintest + (1 - faintest) * shares, 0)
    return picture


def _frame(axes: Axes, found: Confusion, *, named: bool) -> None:
    number = len(found.labels)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_alpha(0.4)
    axes.tick_params(length=0)
    if not named:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    size = 8 if number > 20 else 9
    axes.set_xticks(range(number), [short(x, 18) for x in found.labels], rotation=90, size=size)
    axes.set_yticks(range(number), [short(x, 18) for x in found.labels], size=size)
    if found.grouped:
        _confusion_groups(axes, found, size)


def _confusion_groups(axes: Axes, found: Confusion, size: int) -> None:
    """Draw a line around the labels of each gene, and its name on the right."""
    middles, names = [], []
    for gene, some in groupby(range(len(found.labels)), key=lambda i: found.genes[i]):
        places = list(some)
        if places[0]:
            for line in (axes.axhline, axes.axvline):
                line(places[0] - 0.5, color=GREY, lw=0.5, alpha=0.6)
        if gene is not None:
            middles.append((places[0] + places[-1]) / 2)
            names.append(short(gene, 12))
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(middles, names, size=size)
    beside.tick_params(length=0)
    beside.spines[:].set_visible(False)


SHOWN_VOTES = 4
MISTAKES = 6
HITS = 3
SAMPLES = 4
DIFFERENT = 6

PLACES = """
    SELECT s.image_id, s.id AS segmentation_id, p.barcode AS plate, w.name AS well, i.site,
        s.n_cells
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    WHERE list_contains(?, s.image_id) AND s.id IN (
        SELECT c.segmentation_id FROM cells AS c JOIN predictions AS x ON x.cell_id = c.id
        WHERE x.run_id = ? AND x.rank = 1
    )
    ORDER BY s.id
"""
VOTES = """
    SELECT image_id, label, cells FROM image_label_votes
    WHERE run_id = ? AND list_contains(?, image_id) AND cells > 0
    ORDER BY cells DESC, probability DESC, label
"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """An image of the report. ``picture`` is a data URI, or ``None`` with the reason why not.

    ``kind`` is right, wrong or different; then ``difference`` says what two runs made of it.
    """

    title: str
    kind: str
    truth: str
    winner: str
    share: float | None
    tie: bool
    votes: tuple[tuple[str, int], ...]
    more_votes: int
    n_cells: int
    picture: str | None
    problem: str | None
    difference: Difference | None = None


@dataclass(frozen=True)
class Sample:
    """The middle of an image at full size, bare and with outlines."""

    title: str
    n_cells: int
    bare: str
    outlined: str


@dataclass(frozen=True)
class Pictures:
    """All images of a report."""

    wrong: tuple[Example, ...]
    right: tuple[Example, ...]
    different: tuple[Example, ...]
    samples: tuple[Sample, ...]


def pictures(
    workspace: Workspace,
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    comparison: Comparison | None = None,
) -> Pictures:
    """Return the most confident mistakes, some hits and samples, and what two runs differ in.

    ``images`` are rows of the view ``verdicts``, every vote of each image. What is drawn by chance
    is the same for the same run.
    """
    draw = random.Random(run_id)  # noqa: S311 - which pictures are shown is no secret
    soft = [row for row in images if row["vote"] == "soft" and row["correct"] is not None]
    wrong = _apart(_surest(row for row in soft if not row["correct"]), MISTAKES)
    right = _apart(_shuffled(draw, (row for row in soft if row["correct"])), HITS)
    drawn = _shuffled(draw, soft)
    differing = _differing(comparison)
    by_id = {row["unit_id"]: row for row in soft}
    compared = [by_id[item.unit_id] for item in differing if item.unit_id in by_id]
    rows = _placed(questions, run_id, images, [*wrong, *right, *compared], drawn)
    said = {item.unit_id: item for item in differing}
    return Pictures(
        tuple(_example(workspace, rows[row["unit_id"]], "wrong") for row in wrong),
        tuple(_example(workspace, rows[row["unit_id"]], "right") for row in right),
        tuple(
            _example(workspace, rows[row["unit_id"]], "different", said[row["unit_id"]])
            for row in compared
        ),
        tuple(islice(_samples(workspace, _by_plate(drawn, rows)), SAMPLES)),
    )


def _surest(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-(row["confidence"] or 0), row["unit_id"]))


def _shuffled(draw: random.Random, rows: Iterable[Row]) -> list[Row]:
    ordered = sorted(rows, key=lambda row: int(row["unit_id"]))
    draw.shuffle(ordered)
    return ordered


def _apart(rows: Sequence[Row], number: int) -> list[Row]:
    """Return the first rows, one of each well; more of a well only where wells run out."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row["well_id"], row)
        if len(first) == number:
            break
    chosen = list(first.values())
    ids = {row["unit_id"] for row in chosen}
    return [*chosen, *(row for row in rows if row["unit_id"] not in ids)][:number]


def _differing(comparison: Comparison | None) -> list[Difference]:
    """Return some images that two runs differ in: one after the other of each kind, wells apart."""
    if comparison is None or comparison.level != "image":
        return []
    kinds: dict[str, list[Difference]] = {"first": [], "second": [], "neither": []}
    for item in comparison.differing:
        if all(_well(item) != _well(other) for other in kinds[item.right]):
            kinds[item.right].append(item)
    some = [
        item
        for place in range(DIFFERENT)
        for found in (kinds["first"], kinds["second"])
        for item in found[place : place + 1]
    ]
    return [*some, *kinds["neither"]][:DIFFERENT]


def _well(item: Difference) -> str:
    return item.name.rsplit("/", 1)[0]


def _placed(
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    chosen: Sequence[Row],
    drawn: Sequence[Row],
) -> dict[int, dict[str, Any]]:
    """Return what must be known of each image that may be shown, by its id."""
    hard = {row["unit_id"]: row for row in images if row["vote"] == "hard"}
    ids = list(dict.fromkeys(row["unit_id"] for row in [*chosen, *drawn[: 20 * SAMPLES]]))
    by_id = {row["unit_id"]: row for row in [*drawn, *chosen]}
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for vote in questions.ask(VOTES, [run_id, [row["unit_id"] for row in chosen]]).to_pylist():
        votes[vote["image_id"]].append((vote["label"], vote["cells"]))
    return {
        place["image_id"]: {
            **by_id[place["image_id"]],
            **place,
            "hard_tie": hard.get(place["image_id"], {}).get("tie", False),
            "votes": votes[place["image_id"]],
        }
        for place in questions.ask(PLACES, [ids, run_id]).to_pylist()
    }


def _by_plate(drawn: Sequence[Row], rows: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return images in the order drawn, but one of each plate before the second of any."""
    plates: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in drawn:
        if row["unit_id"] in rows:
            found = rows[row["unit_id"]]
            plates[found["plate"]].append(found)
    most = max((len(some) for some in plates.values()), default=0)
    return [some[place] for place in range(most) for some in plates.values() if place < len(some)]


def _pixels(
    workspace: Workspace, segmentation_id: int
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    with workspace.database.read() as session:
        found = session.get_one(Segmentation, segmentation_id)
        wanted = plane_of(session.get_one(Recipe, found.recipe_id))
        masks = read_masks(session, workspace.artifacts, found)
    plane = read_image(workspace.database, found.image_id, wanted)
    return plane, masks.astype(np.int64)


def _example(
    workspace: Workspace, row: Row, kind: str, difference: Difference | None = None
) -> Example:
    picture, problem = None, None
    try:
        plane, masks = _pixels(workspace, row["segmentation_id"])
        step = -(-max(plane.shape) // WIDEST)
        picture = jpeg(outline_overlay(smaller(plane, step), masks[::step, ::step]))
    except CellstoreError as error:
        problem = str(error)
    votes = row["votes"]
    return Example(
        title=_title(row),
        kind=kind,
        truth=row["truth"],
        winner=row["predicted"],
        share=row["confidence"],
        tie=bool(row["hard_tie"]),
        votes=tuple(votes[:SHOWN_VOTES]),
        more_votes=sum(cells for _, cells in votes[SHOWN_VOTES:]),
        n_cells=sum(cells for _, cells in votes),
        picture=picture,
        problem=problem,
        difference=difference,
    )


def _title(row: Row) -> str:
    return f"{row['plate']} {row['well']}, site {row['site']}"


def _samples(workspace: Workspace, rows: Sequence[Row]) -> Iterator[Sample]:
    """Yield what can be opened, of the first so many."""
    for row in rows[: 3 * SAMPLES]:
        try:
            plane, masks = _pixels(workspace, row["segmentation_id"])
        except CellstoreError:
            continue
        places = tuple(middle(length) for length in plane.shape)
        bare = np.repeat(to_grey(plane)[places][..., None], 3, axis=-1)
        outlined = outline_overlay(plane, masks)[places]
        yield Sample(_title(row), row["n_cells"], jpeg(bare), jpeg(outlined))


METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"
NAMED_ROWS = 40
"""Rows of a dot plot that has room for their names."""
LISTED = 12
"""Rows of a table that are shown at once; the others unfold."""


def write_report(
    workspace: Workspace,
    run: str,
    path: Path,
    *,
    compare: str | None = None,
    rules: VoteRules | None = None,
    force: bool = False,
    maps: Sequence[str] = (),
    redo: Callable[[int], str] | None = None,
) -> ReportResult:
    """Write the report on a predict run as one HTML file; see :func:`report` for the options.

    ``maps``: features to show on plate maps, each a column of a feature set or SET.COLUMN.
    ``redo`` tells the commands that redo a run; without it the page has those that were typed.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UnknownNameError: there is no such run or feature.
        UserInputError: there is nothing to report on.
    """
    need("report")
    with gathered(
        workspace,
        run,
        compare=compare,
        rules=rules,
        force=force,
    ) as (questions, subject, evidence):
        content = _content(workspace, questions, subject, evidence, maps)
        content["script"] = _script(redo, subject.run.id)
    check_not_of_a_store(path)
    write_atomically(path, render("report.html.j2", content).encode())
    return replace(evidence.result, html=str(path))


def _content(
    workspace: Workspace,
    questions: Questions,
    subject: Subject,
    evidence: Evidence,
    wanted: Sequence[str],
) -> dict[str, Any]:
    from .provenance import provenance

    result = evidence.result
    images = evidence.images.to_pylist()
    hard = [row for row in images if row["vote"] == "hard"]
    return {
        "result": result,
        "run": subject.run,
        "baseline": subject.baseline,
        **_scores(result),
        **_classes(result, hard),
        **_groups(result),
        **_plates(questions, subject, hard, wanted),
        **_training(questions, subject),
        "pictures": pictures(workspace, questions, subject.run.id, images, result.comparison),
        "from": provenance(questions, subject),
    }


def _script(redo: Callable[[int], str] | None, run_id: int) -> str | None:
    try:
        return None if redo is None else redo(run_id)
    except CellstoreError as error:
        return f"# {error}"


def _scores(result: ReportResult) -> dict[str, Any]:

    best = result.score(*HEADLINE)
    unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
    return {
        "best": best,
        "unseen": unseen,
        "standing": standing(result, best, unseen),
        "levels": levels(result.scores, result.chance),
        "rival_rows": by_baseline(result.baselines),
        "reliability": reliability(result.calibration) if result.calibration else None,
        "overconfidence": _overconfidence(result),
        "agreement": _agreement(result),
    }


def _overconfidence(result: ReportResult) -> float | None:
    """By how much the cells' confidence is above their accuracy, on average."""
    bins = [item for item in result.calibration if item.level == "cell"]
    total = sum(item.n for item in bins)
    if not total:
        return None
    return sum(item.n * (item.confidence - item.accuracy) for item in bins) / total


def _agreement(result: ReportResult) -> str | None:

    found = result.comparison
    if found is None:
        return None
    first, second = (f"run {side.run_id}" for side in (found.first, found.second))
    counts = {
        "both right": found.both_right,
        f"only {first} right": found.only_first,
        f"only {second} right": found.only_second,
        "both wrong": found.both_wrong,
    }
    return shares_of(first, second, counts)


def _classes(result: ReportResult, hard: Sequence[Mapping[str, Any]]) -> dict[str, Any]:

    genes = {item.label: item.target for item in result.by_class}
    pairs = [(row["truth"], row["predicted"]) for row in hard if row["correct"] is not None]
    found = confusion_of(pairs, genes)
    taken = _taken_for(found)
    by_recall = sorted(result.by_class, key=lambda item: (-(item.recall or 0), item.label))
    true = [item for item in by_recall if item.support]
    recalls = None
    if true:
        recalls = (
            dots(
                "recalls",
                [_class_dot(item) for item in true],
                _recall_words(true),
                label="images found, %",
            )
            if len(true) <= NAMED_ROWS
            else ranked([item.recall or 0 for item in true])
        )
    return {
        "confusion": found,
        "matrices": _matrices(found),
        "class_rows": [(item, taken.get(item.label)) for item in by_recall],
        "recalls": recalls,
        "listed": LISTED,
    }


def _matrices(found: Confusion) -> list[tuple[str, str, bool]]:
    """Return the matrices that can be read: what is to be said, the figure, if it has names."""
    number = len(found.labels)
    if number <= NAMED:
        return [("", figure_of("confusion", found), True)]
    shown: list[tuple[str, str, bool]] = []
    block = most_confused(found)
    if block:
        some = found.only(block)
        words = (
            f"The {len(block)} classes between which most mistakes are. Answers outside this "
            "block are not drawn, so a row need not be full."
        )
        shown.append((words, figure_of("most confused", some), True))
    genes = by_gene(found)
    if found.grouped and len(genes.labels) <= NAMED:
        words = "The same by target gene: the diagonal holds every image whose gene is right."
        shown.append((words, figure_of("genes", genes, what="gene of the label"), True))
    words = f"All {number} classes, those of a gene beside each other, in order of gene and name."
    shown.append((words, figure_of("confusion", found), False))
    return shown


def _taken_for(found: Confusion) -> dict[str, tuple[str, int]]:
    """Return what each class was most often mistaken for, and how often."""
    mistakes = found.counts.copy()
    mistakes[range(len(mistakes)), range(len(mistakes))] = 0
    most = mistakes.argmax(axis=1)
    return {
        label: (found.labels[place], int(mistakes[row, place]))
        for row, (label, place) in enumerate(zip(found.labels, most.tolist(), strict=True))
        if mistakes[row, place]
    }


def _class_dot(item: ClassScore) -> Any:

    return Dot(item.label, item.recall, item.low, item.high)


def _recall_words(rows: Sequence[ClassScore]) -> str:
    best, worst = rows[0], rows[-1]
    return (
        f"Share of the images of each class that were found, from {best.label} "
        f"({100 * (best.recall or 0):.0f} %) to {worst.label} ({100 * (worst.recall or 0):.0f} %)."
    )


def _groups(result: ReportResult) -> dict[str, Any]:
    targets = sorted(result.by_target, key=lambda item: (-item.accuracy, item.name))
    return {
        "targets": targets,
        "target_figure": _group_figure("targets", targets) if len(targets) > 1 else None,
        "plate_figure": (
            _group_figure("plates", result.by_plate) if len(result.by_plate) > 1 else None
        ),
    }


def _group_figure(name: str, rows: Sequence[GroupScore]) -> str | None:
    """Accuracy of each group, the orange mark where the gene counts as right too."""
    if len(rows) > NAMED_ROWS:
        return None
    rated = [
        Dot(
            item.name,
            item.accuracy,
            item.low,
            item.high,
            mark=(item.correct + item.same_target) / max(1, item.n) if item.same_target else None,
        )
        for item in rows
    ]
    said = ", ".join(f"{item.name} {100 * item.accuracy:.0f} %" for item in rows)
    return dots(name, rated, f"Accuracy of images by {name[:-1]}: {said}.")


def _plates(
    questions: Questions,
    subject: Subject,
    hard: Sequence[Mapping[str, Any]],
    wanted: Sequence[str],
) -> dict[str, Any]:

    plates = plates_of(questions, sorted({row["well_id"] for row in hard}))
    found = measures(questions, subject.run.id, hard, wanted)
    return {
        "map_groups": drawn(plates, found),
        "more_plates": max(0, len(plates) - SHOWN_PLATES),
        "measured": len(found) > 2,
    }


def _training(questions: Questions, subject: Subject) -> dict[str, Any]:

    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in questions.ask(METRICS, [subject.run.parent_id]).to_pylist():
        if row["value"] is not None:
            metrics[row["name"]].append((row["epoch"], row["value"]))
    drawn = any(name.endswith(("_loss", "_accuracy")) for name in metrics)
    return {"curves": training_curves(metrics) if drawn else None}
