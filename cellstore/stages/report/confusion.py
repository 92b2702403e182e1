"""What was taken for what: the order of the classes, the numbers, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...drawing.svg import BLUE, GREY, ORANGE, short, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        _groups(axes, found, size)


def _groups(axes: Axes, found: Confusion, size: int) -> None:
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
