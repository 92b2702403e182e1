"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.overlay import outline_overlay, to_grey
from ..artifacts import write_atomically
from ..config import VoteRules
from ..errors import CellstoreError, UnknownNameError
from ..extras import need
from ..jobs.planes import read_image
from ..jobs.workspace import Workspace
from ..models import Recipe, Segmentation
from ..query.cells import plane_of, read_masks
from ..query.engine import Questions
from ..query.guard import quoted
from ..settings import check_not_of_a_store
from .comparison import Comparison, Difference
from .drawing import (
    BLUE,
    GREY,
    LARGE_MAP,
    ORANGE,
    SMALL_MAP,
    WIDEST,
    PlateMap,
    WellPosition,
    colour_limits,
    jpeg,
    middle,
    plate_map_svg,
    render,
    short,
    smaller,
    svg,
)
from .provenance import provenance
from .scoring import HEADLINE, GroupScore, ReportResult, by_baseline, gathered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTTED = (0, (2, 3))
NAMED_ROWS = 40
"""Rows of a dot plot that has room for their names."""
LISTED = 12
"""Rows of a table that are shown at once; the others unfold."""
METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"


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
    ``redo`` returns the commands that redo a run; without it the page has those that were typed.

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
    ) as (questions, subject, result, votes):
        run_id, images = subject.run.id, votes.to_pylist()
        hard = [row for row in images if row["vote"] == "hard"]
        best = result.score(*HEADLINE)
        unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
        drawn_maps, more_plates = plate_maps(questions, run_id, hard, maps)
        try:
            script = None if redo is None else redo(run_id)
        except CellstoreError as error:
            script = f"# {error}"
        content = {
            "result": result,
            "run": subject.run,
            "baseline": subject.baseline,
            "best": best,
            "unseen": unseen,
            "rival_rows": by_baseline(result.baselines),
            **_score_figures(result),
            **_classes(result, hard),
            "map_groups": [
                (
                    some[0],
                    [(m, plate_map_svg(m, SMALL_MAP if some[1:] else LARGE_MAP)) for m in some],
                )
                for some in drawn_maps
            ],
            "more_plates": more_plates,
            "measured": len(drawn_maps) > 2,
            "curves": training_curves(questions, subject.run.parent_id),
            "pictures": pictures(workspace, questions, run_id, images, result.comparison),
            "origin": provenance(questions, subject),
            "script": script,
            "listed": LISTED,
        }
    check_not_of_a_store(path)
    write_atomically(path, render("report.html.j2", content).encode())
    return replace(result, html=str(path))


# Scores


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: a share in 0..1 with its interval; ``mark``: another value to see."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = BLUE
    mark: float | None = None


def _score_figures(result: ReportResult) -> dict[str, Any]:
    """The figures of accuracy, confidence and agreement with another run."""
    best = result.score(*HEADLINE)
    unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
    beside = [Dot(f"run {result.run_id}", best.accuracy, best.low, best.high)]
    if unseen is not None:
        beside.append(Dot("… in unseen wells", unseen.accuracy, unseen.low, unseen.high))
    for item in result.baselines:
        if (item.level, item.vote) == HEADLINE:
            colour = ORANGE if item.null else GREY
            beside.append(Dot(item.baseline, item.accuracy, item.low, item.high, colour))
    if best.majority is not None and not any(row.name == "majority" for row in beside):
        name = f"always {short(result.majority_label or '')}"
        beside.append(Dot(name, best.majority, colour=GREY))
    by_level = [
        Dot(
            item.level if item.level == "cell" else f"{item.level}, {item.vote} vote",
            item.accuracy,
            item.low,
            item.high,
            mark=item.majority,
        )
        for item in result.scores
    ]
    bins = [item for item in result.calibration if item.level == "cell"]
    total = sum(item.n for item in bins)
    gaps = sum(item.n * (item.confidence - item.accuracy) for item in bins)
    agreement = None
    if result.comparison is not None:
        found = result.comparison
        first, second = (f"run {side.run_id}" for side in (found.first, found.second))
        counts = {
            "both right": found.both_right,
            f"only {first} right": found.only_first,
            f"only {second} right": found.only_second,
            "both wrong": found.both_wrong,
        }
        agreement = shares_of(first, second, counts)
    return {
        "standing": dot_plot(
            "standing",
            beside,
            f"Accuracy of images: {_in_words(beside)}.",
            guess=result.chance,
            start=best.low,
            width=5.4,
        ),
        "levels": dot_plot(
            "levels",
            by_level,
            f"Accuracy by level and vote: {_in_words(by_level)}.",
            guess=result.chance,
        ),
        "reliability": reliability(result) if result.calibration else None,
        # By how much the cells' confidence is above their accuracy, on average.
        "overconfidence": gaps / total if total else None,
        "agreement": agreement,
    }


def _in_words(rows: Sequence[Dot]) -> str:
    return ", ".join(f"{row.name} {_percent(row.value)}" for row in rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def dot_plot(
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
            if row.mark is not None:
                axes.plot(100 * row.mark, y, "|", color=ORANGE, ms=11, mew=2)
            if row.value is None:
                continue
            end = 100 * row.value
            if row.low is not None and row.high is not None:
                end = 100 * row.high
                bar: dict[str, Any] = {"color": row.colour, "lw": 2.2, "solid_capstyle": "round"}
                axes.plot([100 * row.low, end], [y, y], **bar)
            axes.plot(100 * row.value, y, "o", color=row.colour, ms=6, clip_on=False)
            if row.mark is not None and end <= 100 * row.mark < end + 8:
                end = 100 * row.mark  # the number stands beside the mark, not on it
            text = f"{100 * row.value:.1f}"
            axes.annotate(text, (end, y), (7, 0), textcoords="offset points", va="center", size=9)
        for value, colour in ((guess, GREY), (start, BLUE)):
            if value is not None:
                axes.axvline(100 * value, color=colour, lw=0.8, ls=DOTTED, zorder=0)
        axes.set_yticks(range(len(rows)), [short(row.name, 28) for row in reversed(rows)])
        known = [value for row in rows for value in (row.value, row.high, row.mark) if value]
        axes.set_xlim(-0.5, 100 * min(1.08, max(1.18 * max(known, default=1), 0.05)))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)

    return svg(name, (width, (0.3 if len(rows) < 20 else 0.26) * len(rows) + 0.75), draw, alt)


def training_curves(questions: Questions, run_id: int | None) -> str | None:
    """Loss and accuracy of a train run by epoch, of its training and its validation images."""
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in questions.ask(METRICS, [run_id]).to_pylist():
        if row["value"] is not None:
            metrics[row["name"]].append((row["epoch"], row["value"]))
    if not any(name.endswith(("_loss", "_accuracy")) for name in metrics):
        return None
    best = min(metrics.get("validation_loss", ()), key=lambda point: point[1], default=None)

    def draw(figure: Figure) -> None:
        for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for subset, colour, mark in (("train", BLUE, "-o"), ("validation", ORANGE, "-s")):
                points = metrics.get(f"{subset}_{kind}", ())
                scale = 100 if kind == "accuracy" else 1
                epochs, values = [p[0] for p in points], [scale * p[1] for p in points]
                axes.plot(epochs, values, mark, color=colour, ms=3, lw=1.4, label=subset)
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


def reliability(result: ReportResult) -> str:
    """How often answers are right by how sure they were, and how many answers there are."""
    titles = {"cell": "per cell", "image": "per image, soft vote"}
    by_level = {
        level: [item for item in result.calibration if item.level == level] for level in titles
    }
    by_level = {level: bins for level, bins in by_level.items() if bins}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(by_level), height_ratios=(3, 1), sharex="col", squeeze=False)
        for column, (level, bins) in enumerate(by_level.items()):
            axes, below = grid[0, column], grid[1, column]
            sure = [100 * item.confidence for item in bins]
            right = [100 * item.accuracy for item in bins]
            axes.plot([0, 100], [0, 100], color=GREY, lw=0.9, ls=DOTTED)
            axes.vlines(sure, sure, right, color=ORANGE, lw=1.6, alpha=0.7)
            axes.plot(sure, right, "-o", color=BLUE, ms=5, lw=1.2)
            axes.set(xlim=(-2, 102), ylim=(-2, 102), title=titles[level])
            for item in bins:
                wide = 90 * (item.high - item.low)
                below.bar(100 * item.low, item.n, width=wide, align="edge", color=GREY)
            below.set_xlabel("confidence, %")
            below.yaxis.set_major_formatter(
                lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
            )
            below.locator_params(axis="y", nbins=3)
        grid[0, 0].set_ylabel("right, %")
        grid[1, 0].set_ylabel("answers")

    sentences = []
    for level, bins in by_level.items():
        last = max(bins, key=lambda item: item.confidence)
        sentences.append(
            f"{titles[level]}: where the confidence is {_percent(last.confidence)} on average, "
            f"{_percent(last.accuracy)} of {last.n:,} answers are right"
        )
    alt = f"Confidence and accuracy. {'; '.join(sentences)}."
    return svg("reliability", (3.6 * len(by_level), 4.2), draw, alt)


def ranked(values: Sequence[float]) -> str:
    """The share found of every class, the best first: for more classes than have room for names."""
    shares = 100 * np.sort(np.array(values))[::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        x, y = np.arange(shares.size + 1), [*shares, shares[-1]]
        axes.fill_between(x, y, step="post", color=BLUE, alpha=0.35, lw=0)
        axes.step(x, y, where="post", color=BLUE)
        axes.set(xlim=(0, shares.size), ylim=(0, 102))
        axes.set(xlabel="classes, the best first", ylabel="found, %")

    never, half = int(np.sum(shares == 0)), int(np.sum(shares >= 50))
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
                ink = "white" if colour != ORANGE else "black"
                where: dict[str, Any] = {"ha": "center", "va": "center", "size": 9}
                axes.text(left + width / 2, 0, f"{number:,}", color=ink, **where)
            left += width
        axes.set_xlim(0, 100)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("images, %")
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    parts = ", ".join(f"{name}: {number:,}" for name, number in counts.items())
    return svg("agreement", (7.2, 1.7), draw, f"{first} and {second}. {parts}.")


# Classes, targets and plates


def _classes(result: ReportResult, hard: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The confusion matrix, and the tables by class, target and plate."""
    genes = {item.label: item.target for item in result.by_class}
    pairs = [(row["truth"], row["predicted"]) for row in hard if row["correct"] is not None]
    found = confusion_of(pairs, genes)
    mistakes = found.counts.copy()
    np.fill_diagonal(mistakes, 0)
    mistaken_for = {
        label: (found.labels[most], int(mistakes[row, most]))
        for row, (label, most) in enumerate(zip(found.labels, mistakes.argmax(axis=1), strict=True))
        if mistakes[row, most]
    }
    by_recall = sorted(result.by_class, key=lambda item: (-(item.recall or 0), item.label))
    true = [item for item in by_recall if item.support]
    recalls = None
    if len(true) > NAMED_ROWS:
        recalls = ranked([item.recall or 0 for item in true])
    elif true:
        alt = (
            "Share of the images of each class that were found, "
            f"from {true[0].label} ({100 * (true[0].recall or 0):.0f} %) "
            f"to {true[-1].label} ({100 * (true[-1].recall or 0):.0f} %)."
        )
        rows = [Dot(item.label, item.recall, item.low, item.high) for item in true]
        recalls = dot_plot("recalls", rows, alt, label="images found, %")
    targets = sorted(result.by_target, key=lambda item: (-item.accuracy, item.name))
    return {
        "confusion": found,
        "matrices": confusion_figures(found),
        "class_rows": [(item, mistaken_for.get(item.label)) for item in by_recall],
        "recalls": recalls,
        "targets": targets,
        "target_figure": _group_figure("targets", targets),
        "plate_figure": _group_figure("plates", result.by_plate),
    }


def _group_figure(name: str, groups: Sequence[GroupScore]) -> str | None:
    """Accuracy of each group, the orange mark where the gene counts as right too."""
    if not 1 < len(groups) <= NAMED_ROWS:
        return None
    rows = [
        Dot(
            item.name,
            item.accuracy,
            item.low,
            item.high,
            mark=(item.correct + item.same_target) / max(1, item.n) if item.same_target else None,
        )
        for item in groups
    ]
    named = ", ".join(f"{item.name} {100 * item.accuracy:.0f} %" for item in groups)
    return dot_plot(name, rows, f"Accuracy of images by {name[:-1]}: {named}.")


NAMED_CLASSES = 45
"""Classes that have room for their names beside a matrix."""
BLOCK = 30
"""Classes of the most confused block, where not all have room."""
MIX_UPS = 12
FAINTEST, FAINTEST_UNNAMED = 0.18, 0.5
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


def confusion_of(pairs: Sequence[tuple[str, str]], genes: Mapping[str, str | None]) -> Confusion:
    """Count ``pairs`` of truth and answer, the labels of a gene beside each other."""
    labels = sorted(
        {label for pair in pairs for label in pair},
        key=lambda label: (genes.get(label) is not None, genes.get(label) or "", label),
    )
    index = {label: position for position, label in enumerate(labels)}
    counted = Counter(pairs)
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for (truth, predicted), number in counted.items():
        counts[index[truth], index[predicted]] = number
    mix_ups = [
        MixUp(
            *pair, number, genes.get(pair[0]) if genes.get(pair[0]) == genes.get(pair[1]) else None
        )
        for pair, number in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        if pair[0] != pair[1]
    ]
    return Confusion(
        labels=tuple(labels),
        genes=tuple(genes.get(label) for label in labels),
        counts=counts,
        mix_ups=tuple(mix_ups[:MIX_UPS]),
        wrong=sum(item.n for item in mix_ups),
        same_gene=sum(item.n for item in mix_ups if item.gene is not None),
    )


def most_confused(found: Confusion, number: int = BLOCK) -> list[int]:
    """Return the indices of the labels between which most mistakes are, in their order."""
    mistakes = found.counts + found.counts.T
    np.fill_diagonal(mistakes, 0)
    chosen: dict[int, None] = {}
    for pair in np.argsort(-np.triu(mistakes), axis=None, kind="stable"):
        row, column = divmod(int(pair), len(found.labels))
        if mistakes[row, column] == 0 or len(chosen) >= number:
            break
        chosen.update({row: None, column: None})
    return sorted(chosen)[:number]


def by_gene(found: Confusion) -> Confusion:
    """Return the same images by the gene of truth and answer."""
    keys = [gene or label for gene, label in zip(found.genes, found.labels, strict=True)]
    names = list(dict.fromkeys(keys))
    into = np.zeros((len(keys), len(names)), np.int64)
    into[np.arange(len(keys)), [names.index(key) for key in keys]] = 1
    counts = into.T @ found.counts @ into
    return replace(found, labels=tuple(names), genes=(None,) * len(names), counts=counts)


def confusion_figures(found: Confusion) -> list[tuple[str, str, bool]]:
    """Return the matrices that can be read: a caption, the figure, and whether classes are named.

    Of more classes than have room for names: those most confused, the genes, and all unnamed.
    """
    number = len(found.labels)
    if number <= NAMED_CLASSES:
        return [("", confusion_figure("confusion", found), True)]
    figures: list[tuple[str, str, bool]] = []
    block = most_confused(found)
    if block:
        some = replace(
            found,
            labels=tuple(found.labels[i] for i in block),
            genes=tuple(found.genes[i] for i in block),
            counts=found.counts[np.ix_(block, block)],
        )
        caption = (
            f"The {len(block)} classes between which most mistakes are. Answers outside this "
            "block are not drawn, so a row need not be full."
        )
        figures.append((caption, confusion_figure("most confused", some), True))
    genes = by_gene(found)
    if found.grouped and len(genes.labels) <= NAMED_CLASSES:
        caption = "The same by target gene: the diagonal holds every image whose gene is right."
        figure = confusion_figure("genes", genes, what="gene of the label")
        figures.append((caption, figure, True))
    caption = f"All {number} classes, those of a gene beside each other, in order of gene and name."
    figures.append((caption, confusion_figure("confusion", found), False))
    return figures


def confusion_figure(name: str, found: Confusion, *, what: str = "label") -> str:
    """Draw the share of each true class (row) that got each answer (column).

    Blue: right; orange: another label of the same gene; grey: another one. The paper shows where
    there is nothing. Names stand beside up to ``NAMED_CLASSES`` classes.
    """
    number = len(found.labels)
    named = number <= NAMED_CLASSES
    size = float(np.clip(1.9 + 0.19 * number, 3.2, 8.2)) if named else 6.4

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # A picture of one pixel for each pair: a path for each is long.
        axes.imshow(confusion_colours(found), interpolation="none")
        axes.spines[:].set(visible=True, alpha=0.4)
        axes.tick_params(length=0)
        axes.set_xlabel(f"{what} by vote")
        axes.set_ylabel("truth")
        if not named:
            axes.set_xticks([])
            axes.set_yticks([])
            return
        letters = 8 if number > 20 else 9
        names = [short(label, 18) for label in found.labels]
        axes.set_xticks(range(number), names, rotation=90, size=letters)
        axes.set_yticks(range(number), names, size=letters)
        if found.grouped:
            _mark_genes(axes, found, letters)

    right = int(np.trace(found.counts))
    alt = (
        f"Confusion matrix of {number} classes: {right:,} images on the diagonal are right, "
        f"{found.counts.sum() - right:,} beside it are not."
    )
    return svg(name, (size + (1.2 if named and found.grouped else 0.4), size), draw, alt)


def confusion_colours(found: Confusion) -> NDArray[np.float64]:
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
    faintest = FAINTEST if number <= NAMED_CLASSES else FAINTEST_UNNAMED
    picture[..., 3] = np.where(shares > 0, faintest + (1 - faintest) * shares, 0)
    return picture


def _mark_genes(axes: Axes, found: Confusion, size: int) -> None:
    """Draw a line around the labels of each gene, and its name on the right."""
    middles, names = [], []
    for gene, some in groupby(range(len(found.labels)), key=lambda i: found.genes[i]):
        rows = list(some)
        if rows[0]:
            for line in (axes.axhline, axes.axvline):
                line(rows[0] - 0.5, color=GREY, lw=0.5, alpha=0.6)
        if gene is not None:
            middles.append((rows[0] + rows[-1]) / 2)
            names.append(short(gene, 12))
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(middles, names, size=size)
    beside.tick_params(length=0)
    beside.spines[:].set_visible(False)


# Plate maps

SHOWN_PLATES = 12
USUAL_FEATURES = ("area", "mean_intensity")
"""Features that are shown if none is named, and they were measured."""
WELLS = """
    SELECT p.barcode AS plate, w.id, w.well_row, w.well_column
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
    ORDER BY p.barcode, w.well_row, w.well_column
"""
USED_CELLS = """
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
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "BOOLEAN", "HUGEINT")


def plate_maps(
    questions: Questions, run_id: int, images: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> tuple[list[list[PlateMap]], int]:
    """Return the maps of each measure on the scored plates, and how many plates are not shown.

    The measures are accuracy, cells, and the features ``wanted``, else the usual ones: a feature is
    a column of a feature set, or SET.COLUMN, and its value the mean over the cells of a well that
    the run could label. ``images``: rows of the votes, one per image.

    Raises:
        UnknownNameError: no feature set has such a column of numbers.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            right[row["well_id"]].append(row["correct"])
    accuracy = {well: 100 * sum(some) / len(some) for well, some in right.items()}
    count = "SELECT well_id, count(*) / count(DISTINCT image_id) AS value FROM found GROUP BY 1"
    counted = questions.ask(f"{USED_CELLS} {count}", [run_id]).to_pylist()
    cells = {row["well_id"]: row["value"] for row in counted}
    measures = [
        ("Accuracy", "images with the right label, %", accuracy, (0.0, 100.0)),
        ("Cells", "cells in an image", cells, colour_limits(cells.values())),
    ]
    for (name, column), values in _feature_means(questions, run_id, wanted).items():
        unit = f"mean of the cells, set {name}"
        measures.append((column, unit, values, colour_limits(values.values())))
    plates: dict[str, dict[int, WellPosition]] = defaultdict(dict)
    well_ids = sorted({row["well_id"] for row in images})
    for row in questions.ask(WELLS, [well_ids]).to_pylist():
        plates[row["plate"]][row["id"]] = (row["well_row"], row["well_column"])
    maps = [
        [
            PlateMap(
                plate,
                title,
                unit,
                {wells[well]: value for well, value in values.items() if well in wells},
                limits,
                wells=wells.values(),
            )
            for plate, wells in list(plates.items())[:SHOWN_PLATES]
        ]
        for title, unit, values, limits in measures
    ]
    return maps, max(0, len(plates) - SHOWN_PLATES)


def _feature_means(
    questions: Questions, run_id: int, wanted: Sequence[str]
) -> dict[tuple[str, str], dict[int, float]]:
    """The means of features by well id, each by its set and column."""
    columns: dict[str, tuple[str, str]] = {}  # a bare name means the newest set
    for name in questions.ask("SELECT name FROM feature_sets ORDER BY id DESC")["name"].to_pylist():
        try:
            known = questions.columns(name)
        except UnknownNameError:  # a set that is hidden by a table of that name
            continue
        for column, kind in known:
            if kind in NUMBERS and column != "cell_id":
                columns[f"{name}.{column}"] = (name, column)
                columns.setdefault(column, (name, column))
    for name in wanted:
        if name not in columns:
            raise UnknownNameError.of("feature", name, sorted(columns))
    usual = [name for name in USUAL_FEATURES if name in columns]
    means: dict[tuple[str, str], dict[int, float]] = {
        columns[name]: {} for name in (wanted or usual)
    }
    for name in dict.fromkeys(name for name, _ in means):
        chosen = [column for other, column in means if other == name]
        values = ", ".join(
            f"avg(f.{quoted(c)}) FILTER (WHERE isfinite(f.{quoted(c)}::DOUBLE)) AS v{number}"
            for number, c in enumerate(chosen)
        )
        query = (
            f"{USED_CELLS} SELECT found.well_id, {values} FROM found "  # noqa: S608 - names are quoted
            f"JOIN {quoted(name)} AS f ON f.cell_id = found.id GROUP BY 1"
        )
        for row in questions.ask(query, [run_id]).to_pylist():
            for number, column in enumerate(chosen):
                if row[f"v{number}"] is not None:
                    means[name, column][row["well_id"]] = row[f"v{number}"]
    return means


# Pictures

SHOWN_VOTES = 4
MISTAKES = 6
HITS = 3
SAMPLES = 4
DIFFERENT = 6

IMAGES = """
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
    SELECT unit_id AS image_id, label, cells FROM label_votes
    WHERE run_id = ? AND level = 'image' AND vote = 'hard' AND list_contains(?, unit_id)
        AND cells > 0
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

    ``images`` are rows of the votes, every vote of each image. What is drawn by chance is the same
    for the same run.
    """
    draw = random.Random(run_id)  # noqa: S311 - which pictures are shown is no secret
    soft = [row for row in images if row["vote"] == "soft" and row["correct"] is not None]
    soft.sort(key=lambda row: int(row["unit_id"]))
    hits, drawn = [row for row in soft if row["correct"]], list(soft)
    draw.shuffle(hits)
    draw.shuffle(drawn)
    mistakes = [row for row in soft if not row["correct"]]
    mistakes.sort(key=lambda row: (-(row["confidence"] or 0), row["unit_id"]))
    differences = {item.unit_id: item for item in _some_differences(comparison)}
    by_id = {row["unit_id"]: row for row in soft}
    chosen = {
        "wrong": _wells_apart(mistakes, MISTAKES),
        "right": _wells_apart(hits, HITS),
        "different": [by_id[unit] for unit in differences if unit in by_id],
    }
    shown = [row["unit_id"] for rows in chosen.values() for row in rows]
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for row in questions.ask(VOTES, [run_id, shown]).to_pylist():
        votes[row["image_id"]].append((row["label"], row["cells"]))
    ties = {row["unit_id"] for row in images if row["vote"] == "hard" and row["tie"]}
    ids = list(dict.fromkeys([*shown, *(row["unit_id"] for row in drawn[: 20 * SAMPLES])]))
    known = {row["image_id"]: row for row in questions.ask(IMAGES, [ids, run_id]).to_pylist()}
    examples: dict[str, tuple[Example, ...]] = {}
    for kind, rows in chosen.items():
        found = []
        for row in rows:
            image = row["unit_id"]
            picture, problem = None, None
            try:
                plane, masks = _pixels(workspace, known[image]["segmentation_id"])
                step = -(-max(plane.shape) // WIDEST)
                picture = jpeg(outline_overlay(smaller(plane, step), masks[::step, ::step]))
            except CellstoreError as error:
                problem = str(error)
            found.append(
                Example(
                    title=_title(known[image]),
                    kind=kind,
                    truth=row["truth"],
                    winner=row["predicted"],
                    share=row["confidence"],
                    tie=image in ties,
                    votes=tuple(votes[image][:SHOWN_VOTES]),
                    more_votes=sum(cells for _, cells in votes[image][SHOWN_VOTES:]),
                    n_cells=sum(cells for _, cells in votes[image]),
                    picture=picture,
                    problem=problem,
                    difference=differences[image] if kind == "different" else None,
                )
            )
        examples[kind] = tuple(found)
    # One of each plate before the second of any.
    plates: dict[str, list[Row]] = defaultdict(list)
    for row in drawn:
        if row["unit_id"] in known:
            plates[known[row["unit_id"]]["plate"]].append(known[row["unit_id"]])
    mixed = [row for rows in zip_longest(*plates.values()) for row in rows if row is not None]
    return Pictures(**examples, samples=_samples(workspace, mixed))


def _wells_apart(rows: Sequence[Row], number: int) -> list[Row]:
    """Return the first rows, one of each well; more of a well only where wells run out."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row["well_id"], row)
        if len(first) == number:
            break
    ids = {row["unit_id"] for row in first.values()}
    return [*first.values(), *(row for row in rows if row["unit_id"] not in ids)][:number]


def _some_differences(comparison: Comparison | None) -> list[Difference]:
    """Return some images that two runs differ in: one after the other of each kind, wells apart."""
    if comparison is None or comparison.level != "image":
        return []
    kinds: dict[str, dict[str, Difference]] = {"first": {}, "second": {}, "neither": {}}
    for item in comparison.differing:
        kinds[item.right].setdefault(item.name.rsplit("/", 1)[0], item)
    pairs = zip_longest(kinds["first"].values(), kinds["second"].values())
    some = [item for pair in pairs for item in pair if item is not None]
    return [*some, *kinds["neither"].values()][:DIFFERENT]


def _pixels(
    workspace: Workspace, segmentation_id: int
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    with workspace.database.read() as session:
        found = session.get_one(Segmentation, segmentation_id)
        wanted = plane_of(session.get_one(Recipe, found.recipe_id))
        masks = read_masks(session, workspace.artifacts, found)
    return read_image(workspace.database, found.image_id, wanted), masks.astype(np.int64)


def _title(row: Row) -> str:
    return f"{row['plate']} {row['well']}, site {row['site']}"


def _samples(workspace: Workspace, rows: Sequence[Row]) -> tuple[Sample, ...]:
    """The middles of the first images that can be opened."""
    samples: list[Sample] = []
    for row in rows[: 3 * SAMPLES]:
        if len(samples) == SAMPLES:
            break
        try:
            plane, masks = _pixels(workspace, row["segmentation_id"])
        except CellstoreError:
            continue
        window = tuple(middle(length) for length in plane.shape)
        bare = np.repeat(to_grey(plane)[window][..., None], 3, axis=-1)
        outlined = outline_overlay(plane, masks)[window]
        samples.append(Sample(_title(row), row["n_cells"], jpeg(bare), jpeg(outlined)))
    return tuple(samples)
