"""The figures and tables of a report: scores, training, classes and the confusion matrix."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..query.engine import Questions
from .drawing import BLUE, GREY, ORANGE, Place, interval_bar, svg
from .scoring import HEADLINE, GroupScore, ReportResult, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTTED = (0, (2, 3))
METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"


Standing = tuple[str, float, float | None, float | None, str]
"""A name, an accuracy with its interval, and a colour."""


def score_figures(result: ReportResult, best: Score, unseen: Score | None) -> dict[str, Any]:
    """The figures of accuracy and confidence.

    ``best``: the score of images by hard votes, ``unseen`` without wells seen in training.
    """
    bins = [item for item in result.calibration if item.level == "cell"]
    total = sum(item.n for item in bins)
    gaps = sum(item.n * (item.confidence - item.accuracy) for item in bins)
    return {
        "standing": standing(result, best, unseen),
        "reliability": reliability(result) if result.calibration else None,
        # By how much the cells' confidence is above their accuracy, on average.
        "overconfidence": gaps / total if total else None,
    }


def standing(result: ReportResult, best: Score, unseen: Score | None) -> list[Standing]:
    """Return the accuracies that stand beside each other, with their intervals and colours."""
    rows: list[Standing] = [(f"run {result.name}", best.accuracy, best.low, best.high, BLUE)]
    if unseen is not None:
        rows.append(("in unseen wells", unseen.accuracy, unseen.low, unseen.high, BLUE))
    for item in result.baselines:
        if (item.level, item.vote) == HEADLINE:
            colour = ORANGE if item.null else GREY
            rows.append((item.name, item.accuracy, item.low, item.high, colour))
    if best.majority is not None and not any(row[0] == "majority" for row in rows):
        rows.append((f"always {result.majority_label}", best.majority, None, None, GREY))
    return rows


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
            f"{titles[level]}: where the confidence is {100 * last.confidence:.1f} % on average, "
            f"{100 * last.accuracy:.1f} % of {last.n:,} answers are right"
        )
    alt = f"Confidence and accuracy. {'; '.join(sentences)}."
    return svg("reliability", (3.6 * len(by_level), 4.2), draw, alt)


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
    of_classes = Counter((item.support, item.correct) for item in by_recall if item.support)

    def new(groups: Sequence[GroupScore]) -> list[GroupScore]:
        others = Counter((item.n, item.correct) for item in groups) - of_classes
        return list(groups) if others else []

    return {
        "confusion": found,
        "matrix": matrix_of(found, images_at),
        "class_rows": [
            (item, mistaken_for.get(item.label), sure[item.label]) for item in by_recall
        ],
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


@dataclass(frozen=True)
class Confusion:
    """Images by truth (row) and answer (column): ``counts`` in the order of ``labels``.

    ``genes``: the target of each label, ``None`` where there is none. ``same_gene`` counts mistakes
    for another label of the same gene, ``wrong`` all mistakes.
    """

    labels: tuple[str, ...]
    genes: tuple[str | None, ...]
    counts: NDArray[np.int64]
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
    return Confusion(
        labels=tuple(labels),
        genes=tuple(genes.get(label) for label in labels),
        counts=counts,
        wrong=sum(number for pair, number in counted.items() if pair[0] != pair[1]),
        same_gene=sum(
            number
            for (truth, predicted), number in counted.items()
            if truth != predicted
            and genes.get(truth) is not None
            and genes.get(truth) == genes.get(predicted)
        ),
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


@dataclass(frozen=True)
class Matrix:
    """A matrix as a table; its ``caption`` says which classes are not shown.

    Of a row: truth, gene, and its squares: ``count``, ``kind`` (right, same gene or other),
    ``solid`` from 0 to 1, what is ``said`` of it and its ``address``.
    """

    caption: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, str | None, list[dict[str, Any]]], ...]


def matrix_of(found: Confusion, at: Place) -> Matrix:
    """Return the matrix; of more classes than have room for names, of those most confused.

    A square leads to what it counts where ``at`` has an address for the ``label`` that is true and
    the one that was ``predicted``.
    """
    totals = found.counts.sum(axis=1)
    if len(found.labels) <= NAMED_CLASSES:
        return _table("", found, at, totals)
    block = most_confused(found) or list(range(BLOCK))
    some = replace(
        found,
        labels=tuple(found.labels[i] for i in block),
        genes=tuple(found.genes[i] for i in block),
        counts=found.counts[np.ix_(block, block)],
    )
    caption = (
        f"The {len(block)} of {len(found.labels)} classes between which most mistakes are. Answers "
        "outside this block are not shown, so a row need not be full."
    )
    return _table(caption, some, at, totals[block])


def _table(caption: str, found: Confusion, at: Place, totals: NDArray[np.int64]) -> Matrix:
    """A matrix as a table; ``totals`` (K,): the images of each row, those not shown included."""
    rows = []
    for truth, gene, counts, total in zip(
        found.labels, found.genes, found.counts.tolist(), totals.tolist(), strict=True
    ):
        squares = []
        for predicted, other, count in zip(found.labels, found.genes, counts, strict=True):
            same = gene is not None and gene == other
            kind = "right" if truth == predicted else "same" if same else "other"
            tooltip = f"{truth}: {count} of {total} got the label {predicted}"
            address = at(label=truth, predicted=predicted) if count else None
            solid = round(count / max(1, total), 2)
            squares.append(
                {"count": count, "kind": kind, "solid": solid, "said": tooltip, "address": address}
            )
        rows.append((truth, gene, squares))
    return Matrix(caption, found.labels, tuple(rows))
