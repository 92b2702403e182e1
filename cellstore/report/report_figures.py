"""The figures and tables of a report: scores, training, classes and the confusion matrix."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..query.engine import Questions
from .drawing import BLUE, GREY, ORANGE, Place, interval_bar, nowhere, short, svg
from .scoring import HEADLINE, GroupScore, ReportResult, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTTED = (0, (2, 3))
NAMED_ROWS = 40
"""Rows of a dot plot that has room for their names."""
METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: a share in 0..1 with its interval."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = BLUE


def score_figures(result: ReportResult, best: Score, unseen: Score | None) -> dict[str, Any]:
    """The figures of accuracy, confidence and agreement with another run.

    ``best``: the score of images by hard votes, ``unseen`` without wells seen in training.
    """
    beside = [Dot(f"run {result.name}", best.accuracy, best.low, best.high)]
    if unseen is not None:
        beside.append(Dot("… in unseen wells", unseen.accuracy, unseen.low, unseen.high))
    for item in result.baselines:
        if (item.level, item.vote) == HEADLINE:
            colour = ORANGE if item.null else GREY
            beside.append(Dot(item.name, item.accuracy, item.low, item.high, colour))
    if best.majority is not None and not any(row.name == "majority" for row in beside):
        name = f"always {short(result.majority_label or '')}"
        beside.append(Dot(name, best.majority, colour=GREY))
    bins = [item for item in result.calibration if item.level == "cell"]
    total = sum(item.n for item in bins)
    gaps = sum(item.n * (item.confidence - item.accuracy) for item in bins)
    agreement = None
    if result.comparison is not None:
        found = result.comparison
        first, second = (f"run {side.name}" for side in (found.first, found.second))
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
) -> str:
    """Shares with their intervals, one below the other; dotted: guessing, or where one starts."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(reversed(rows)):
            if row.value is None:
                continue
            end = 100 * row.value
            if row.low is not None and row.high is not None:
                end = 100 * row.high
                bar: dict[str, Any] = {"color": row.colour, "lw": 2.2, "solid_capstyle": "round"}
                axes.plot([100 * row.low, end], [y, y], **bar)
            axes.plot(100 * row.value, y, "o", color=row.colour, ms=6, clip_on=False)
            text = f"{100 * row.value:.1f}"
            axes.annotate(text, (end, y), (7, 0), textcoords="offset points", va="center", size=9)
        for value, colour in ((guess, GREY), (start, BLUE)):
            if value is not None:
                axes.axvline(100 * value, color=colour, lw=0.8, ls=DOTTED, zorder=0)
        axes.set_yticks(range(len(rows)), [short(row.name, 28) for row in reversed(rows)])
        known = [value for row in rows for value in (row.value, row.high) if value]
        axes.set_xlim(-0.5, 100 * min(1.08, max(1.18 * max(known, default=1), 0.05)))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy, %")

    return svg(name, (4.6, (0.3 if len(rows) < 20 else 0.26) * len(rows) + 0.75), draw, alt)


def training_curves(questions: Questions, run_id: int | None) -> str | None:
    """Loss and accuracy of a train run by epoch, of its training and its validation images."""
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in questions.ask_ours(METRICS, [run_id]).records():
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


def class_content(
    result: ReportResult, hard: Sequence[Mapping[str, Any]], images_at: Place
) -> dict[str, Any]:
    """The confusion matrix, and the tables by class, target, dose and plate.

    Targets and doses are listed only where a row says something else than a class does.
    """
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
    sure = {item.label: sure_of(hard, item.label) for item in result.by_class}
    by_recall = sorted(
        result.by_class,
        key=lambda item: (-(item.recall or 0), -(sure[item.label] or 0), item.label),
    )
    true = [item for item in by_recall if item.support]
    of_classes = Counter((item.support, item.correct) for item in true)

    def new(groups: Sequence[GroupScore]) -> list[GroupScore]:
        others = Counter((item.n, item.correct) for item in groups) - of_classes
        return list(groups) if others else []

    return {
        "confusion": found,
        "matrices": matrices_of(found, images_at),
        "class_rows": [
            (item, mistaken_for.get(item.label), sure[item.label]) for item in by_recall
        ],
        "recalls": ranked([item.recall or 0 for item in true]) if len(true) > NAMED_ROWS else None,
        "targets": new(sorted(result.by_target, key=lambda item: (-item.accuracy, item.name))),
        "doses": new(result.by_dose),
        "bar": interval_bar,
    }


def sure_of(images: Sequence[Mapping[str, Any]], label: str) -> float | None:
    """Return the mean share of the votes in the images of a label that got it."""
    right = [row["confidence"] for row in images if row["correct"] and row["truth"] == label]
    known = [share for share in right if share is not None]
    return sum(known) / len(known) if known else None


NAMED_CLASSES = 45
"""Classes that have room for their names beside a matrix."""
BLOCK = 30
"""Classes of the most confused block, where not all have room."""
MIX_UPS = 12
FAINTEST = 0.5
"""How solid the smallest share is drawn where squares are small, so that an image is seen."""


@dataclass(frozen=True)
class Confusion:
    """Images by truth (row) and answer (column): ``counts`` in the order of ``labels``.

    ``genes``: the target of each label, ``None`` where there is none. ``same_gene`` counts mistakes
    for another label of the same gene, ``wrong`` all mistakes; ``mix_ups`` are the most frequent
    ones: truth, answer, number of images, and the gene of both, if it is the same.
    """

    labels: tuple[str, ...]
    genes: tuple[str | None, ...]
    counts: NDArray[np.int64]
    mix_ups: tuple[tuple[str, str, int, str | None], ...]
    wrong: int
    same_gene: int

    @property
    def grouped(self) -> bool:
        """Whether some labels share a gene, so that mistakes within a gene can be."""
        known = [gene for gene in self.genes if gene is not None]
        return len(set(known)) < len(known)


def confusion_of(
    pairs: Sequence[tuple[str, str]] | Mapping[tuple[str, str], int],
    genes: Mapping[str, str | None],
) -> Confusion:
    """Count ``pairs`` of truth and answer, or take their numbers; labels of a gene in a row."""
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
        (*pair, number, gene if gene == genes.get(pair[1]) else None)
        for pair, number in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        for gene in (genes.get(pair[0]),)
        if pair[0] != pair[1]
    ]
    return Confusion(
        labels=tuple(labels),
        genes=tuple(genes.get(label) for label in labels),
        counts=counts,
        mix_ups=tuple(mix_ups[:MIX_UPS]),
        wrong=sum(number for *_, number, _ in mix_ups),
        same_gene=sum(number for *_, number, gene in mix_ups if gene is not None),
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


@dataclass(frozen=True)
class Square:
    """A cell of a matrix: ``kind`` right, same (gene) or other, ``solid`` from 0 to 1."""

    count: int
    kind: str
    solid: float
    said: str
    address: str | None


@dataclass(frozen=True)
class Matrix:
    """A matrix as a table, or as a ``picture`` where classes have no room for their names."""

    caption: str
    labels: tuple[str, ...] = ()
    rows: tuple[tuple[str, str | None, list[Square]], ...] = ()
    picture: str | None = None


def matrices_of(found: Confusion, at: Place) -> list[Matrix]:
    """Return the matrices that can be read.

    Of more classes than have room for names: those most confused, the genes, and all unnamed.
    A square leads to what it counts where ``at`` has an address for the ``label`` that is true and
    the one that was ``predicted``.
    """
    number = len(found.labels)
    if number <= NAMED_CLASSES:
        return [_table("", found, at)]
    matrices: list[Matrix] = []
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
            "block are not shown, so a row need not be full."
        )
        matrices.append(_table(caption, some, at, found.counts.sum(axis=1)[block]))
    genes = by_gene(found)
    if found.grouped and len(genes.labels) <= NAMED_CLASSES:
        caption = "The same by target gene: the diagonal holds every image whose gene is right."
        matrices.append(_table(caption, genes, nowhere))
    caption = f"All {number} classes, those of a gene beside each other, in order of gene and name."
    return [*matrices, Matrix(caption, picture=confusion_picture(found))]


def _table(
    caption: str,
    found: Confusion,
    at: Place,
    totals: NDArray[np.int64] | None = None,
) -> Matrix:
    """A matrix as a table; ``totals`` (K,): the images of each row, those not shown included."""
    totals = found.counts.sum(axis=1) if totals is None else totals
    rows = []
    for truth, gene, counts, total in zip(
        found.labels, found.genes, found.counts.tolist(), totals.tolist(), strict=True
    ):
        squares = []
        for predicted, other, count in zip(found.labels, found.genes, counts, strict=True):
            same = gene is not None and gene == other
            kind = "right" if truth == predicted else "same" if same else "other"
            said = f"{truth}: {count} of {total} got the label {predicted}"
            address = at(label=truth, predicted=predicted) if count else None
            squares.append(Square(count, kind, round(count / max(1, total), 2), said, address))
        rows.append((truth, gene, squares))
    return Matrix(caption, found.labels, tuple(rows))


def confusion_picture(found: Confusion) -> str:
    """Draw the share of each true class (row) that got each answer (column), without names.

    Blue: right; orange: another label of the same gene; grey: another one. The paper shows where
    there is nothing.
    """
    number = len(found.labels)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # A picture of one pixel for each pair: a path for each is long.
        axes.imshow(confusion_colours(found), interpolation="none")
        axes.spines[:].set(visible=True, alpha=0.4)
        axes.set_xlabel("label by vote")
        axes.set_ylabel("truth")
        axes.set_xticks([])
        axes.set_yticks([])

    right = int(np.trace(found.counts))
    alt = (
        f"Confusion matrix of {number} classes: {right:,} images on the diagonal are right, "
        f"{found.counts.sum() - right:,} beside it are not."
    )
    return svg("confusion", (6.8, 6.4), draw, alt)


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
    picture[..., 3] = np.where(shares > 0, FAINTEST + (1 - FAINTEST) * shares, 0)
    return picture
