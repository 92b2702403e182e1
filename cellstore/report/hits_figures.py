"""The figures of the page of hits, and what they are drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.components import components_of, umap_of
from ..enums import Verdict
from ..stages.hits import HitRow, HitsResult
from .drawing import (
    BLUE,
    GREY,
    LARGE_MAP,
    ORANGE,
    SMALL_MAP,
    PlateMap,
    brief,
    colour_limits,
    plate_map_svg,
    short,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Wells = NDArray[np.int64]
"""Row numbers of wells in a table."""

NAMED = 10
"""Points of a scatter plot with their names."""
CHANGES, CHANGED = 5, 1.0
"""Features that are named, and the standard deviations of the controls by which they differ."""
ALIKE, SIMILAR = 0.5, 5
"""Least cosine of profiles that are called similar, and how many are listed."""
MAP_ROWS, MAP_COLUMNS = 80, 60
"""Treatments and features of the heat map."""
SHOWN_PLATES = 12
FEWEST_WELLS, MOST_WELLS = 15, 2_000
"""Wells that UMAP needs, and wells that are drawn."""
MOST_DOTS = 400

PURPLE, PALE = "#7a5ea8", "#b9bec7"
MARKS: Mapping[str, tuple[str, str, str]] = {
    Verdict.HIT: ("●", "o", BLUE),
    Verdict.FEWER_CELLS: ("▲", "^", ORANGE),
    Verdict.SMALL: ("◆", "D", PURPLE),
    Verdict.NO: ("○", ".", PALE),
    Verdict.UNKNOWN: ("\u00d7", "x", GREY),
}
"""By verdict, in the order of the page: a letter, matplotlib's mark and a colour."""


@dataclass(frozen=True)
class Judged:
    """A treatment with its dose on the plates of a set, and what was found of it.

    ``number`` is its rank from 1; ``wells`` and ``controls``: row numbers of its wells that were
    compared, and of the controls of their plates.
    """

    number: int
    row: HitRow
    perturbation: str
    dose: float | None
    wells: Wells
    controls: Wells

    @property
    def is_different(self) -> bool:
        """Whether it differs from the controls in any way."""
        return self.row.verdict in (Verdict.HIT, Verdict.FEWER_CELLS, Verdict.SMALL)


@dataclass(frozen=True)
class Screen:
    """What a page is about.

    Of each of N wells, rows of ``table`` (columns of ``WellProfiles``): ``z`` (N, F) how far it is
    from the controls of its plate, in their standard deviations, NaN where it has no profile;
    ``effects`` (N,) its distance as it was scored; ``cells`` (N,) its cell count by that of the
    controls of its plate; ``controls`` (N,) whether it is one; ``on_edge`` (N,) whether it lies in
    the outermost row or column of its plate.
    """

    result: HitsResult
    table: Any
    z: Floats
    columns: tuple[str, ...]
    effects: Floats
    cells: Floats
    controls: Flags
    on_edge: Flags
    judged: Sequence[Judged]

    @cached_property
    def usable(self) -> Flags:
        """The wells with a profile (N,)."""
        return np.asarray(np.isfinite(self.z).all(axis=1), bool)

    @cached_property
    def plates(self) -> NDArray[np.str_]:
        """The barcodes (N,)."""
        return np.asarray(self.table["plate"].to_numpy(dtype=str))

    @cached_property
    def middles(self) -> Floats:
        """The median profile of each treatment (T, F); NaN where no well has one."""
        found = np.full((len(self.judged), len(self.columns)), np.nan)
        for row, item in enumerate(self.judged):
            wells = item.wells[self.usable[item.wells]]
            if len(wells):
                found[row] = np.median(self.z[wells], axis=0)
        return found

    @cached_property
    def directions(self) -> Floats:
        """The median profiles, each of length 1 (T, F); 0 where there is none."""
        return _unit(np.nan_to_num(self.middles))

    def position(self, well: int) -> tuple[int, int]:
        """Row and column of a well."""
        return int(self.table["well_row"].iat[well]), int(self.table["well_column"].iat[well])

    @cached_property
    def barcodes(self) -> list[str]:
        """Each plate once, by name."""
        return sorted(set(self.plates.tolist()))


# Of one treatment


def strip(screen: Screen, item: Judged) -> str:
    """The effect of each well of a treatment above that of the controls of their plates."""
    effects = screen.effects
    mine = item.wells[np.isfinite(effects[item.wells])]
    usual = item.controls[np.isfinite(effects[item.controls])]
    if not len(mine):
        return ""
    colour, step = MARKS[item.row.verdict][2], -(-len(usual) // MOST_DOTS) or 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvspan(-2, 2, color=GREY, alpha=0.1, lw=0)
        for rows, y, tint, size in ((mine, 1.0, colour, 22), (usual[::step], 0.0, GREY, 8)):
            # The golden ratio spreads dots without chance.
            shift = (np.arange(len(rows)) * 0.618034 % 1 - 0.5) * 0.6
            axes.scatter(effects[rows], y + shift, s=size, c=tint, alpha=0.8, linewidths=0)
        axes.set_yticks([])

    ends = [brief(float(end(effects[mine]))) for end in (np.min, np.max, np.median)]
    alt = "Effect of {} wells, {} to {}, median {}, above those of {} controls."
    caption = alt.format(len(mine), *ends, len(usual))
    return svg(f"strip {item.number}", (3.2, 1.2), draw, caption)


def position_map(screen: Screen, item: Judged) -> str:
    """Where the wells of a treatment are on their plates, one plate upon the other."""
    on_plates = np.isin(screen.plates, screen.plates[item.wells])
    values = Counter(screen.position(well) for well in item.wells)
    found = PlateMap(
        item.row.name,
        "Its wells",
        "plates",
        {position: float(number) for position, number in values.items()},
        (0.0, float(max(values.values()))),
        wells={screen.position(well) for well in np.flatnonzero(on_plates)},
        marked={screen.position(well) for well in item.controls},
    )
    return plate_map_svg(found, scale=False)


# Large figures


def volcano(screen: Screen, limit: float) -> str:
    """Effect against q, each verdict with its colour and mark; a line at the ``limit`` of q."""
    points = [
        (item, item.row.effect, -float(np.log10(max(item.row.q, 1e-12))))
        for item in screen.judged
        if item.row.q is not None and item.row.effect is not None
    ]
    if not points:
        return ""
    most = max(2.2, *(y for _, _, y in points))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for verdict, (_, mark, colour) in reversed(list(MARKS.items())):
            some = np.array([(x, y) for item, x, y in points if item.row.verdict == verdict])
            if len(some):
                size, line = {".": 16, "x": 22}.get(mark, 26), 1.2 if mark == "x" else 0
                axes.scatter(some[:, 0], some[:, 1], s=size, c=colour, marker=mark, linewidths=line)
        axes.margins(x=0.12)
        axes.set_ylim(-0.04 * most, 1.1 * most)
        steps = [1, 0.2, 0.05, 0.01, 0.001, 1e-4, 1e-5, 1e-6]
        shown = [q for q in steps if -np.log10(q) <= 1.05 * most]
        axes.set_yticks([-np.log10(q) for q in shown], [f"{q:g}" for q in shown])
        axes.axvline(0, color=GREY, lw=0.8, alpha=0.6)
        axes.axhline(-np.log10(limit), color=GREY, lw=0.9, ls=(0, (2, 3)))
        axes.set(xlabel="effect, SD of the controls", ylabel="q (higher: surer)")
        _name_points(figure, axes, points)

    counted = Counter(item.row.verdict for item, _, _ in points)
    alt = f"Effect against q: {', '.join(f'{n} {name}' for name, n in counted.items())}."
    return svg("volcano", (5.4, 4.2), draw, alt)


def _name_points(figure: Figure, axes: Axes, points: Sequence[tuple[Judged, float, float]]) -> None:
    """Write the names of the strongest beside their points, where they cover no other name."""
    strongest = sorted(
        (point for point in points if point[0].is_different), key=lambda point: -abs(point[1])
    )
    wide, high = (72 * side for side in figure.get_size_inches())
    wide, high = wide - 60, high - 45  # about what axes leave
    into = axes.transData + axes.transAxes.inverted()
    at = [into.transform((x, y)) * (wide, high) for _, x, y in strongest]
    taken = [(y, x - 3, x + 3) for x, y in at]
    for (item, *point), (x, y) in zip(strongest[:NAMED], at[:NAMED], strict=True):
        text = short(item.row.name, 20)
        length = 4.6 * len(text)
        tries = ((side, shift) for shift in (0, 10, -10, 20, -20, 30, -30) for side in (1, -1))
        for side, shift in tries:
            line, start = y + shift, x + 6 if side > 0 else x - 6 - length
            free = all(
                abs(line - other) > 8 or start + length < begin or end < start
                for other, begin, end in taken
            )
            if free and 0 < line < high and 0 < start < wide - length:
                taken.append((line, start, start + length))
                axes.annotate(
                    text, (point[0], point[1]), (6 * side, shift), textcoords="offset points",
                    size=8, va="center", ha="left" if side > 0 else "right",
                )  # fmt: skip
                break


@dataclass(frozen=True)
class Clusters:
    """Treatments that differ, in the order of a dendrogram, each with the number of its cluster.

    ``rows``: numbers in ``Screen.judged``; ``numbers``: of the clusters, from 1; ``columns``:
    numbers of features, in their order. ``more`` treatments have no room.
    """

    rows: Sequence[int] = ()
    numbers: Sequence[int] = ()
    columns: Sequence[int] = ()
    more: int = 0


def clusters_of(screen: Screen) -> Clusters:
    """Group treatments by the cosine of their median profiles (mean linkage, cut at ``ALIKE``)."""
    known = (screen.directions != 0).any(axis=1)
    rows = [i for i, item in enumerate(screen.judged) if item.is_different and known[i]]
    more, rows = max(0, len(rows) - MAP_ROWS), rows[:MAP_ROWS]
    if not rows:
        return Clusters()
    strongest = np.abs(screen.middles[rows]).max(axis=0)
    columns = np.argsort(-strongest, kind="stable")[:MAP_COLUMNS]
    columns = columns[strongest[columns] >= min(2 * CHANGED, strongest.max())]
    order, groups = _linked(screen.directions[rows])
    across, _ = _linked(_unit(screen.middles[rows][:, columns].T))
    first = dict.fromkeys(groups[i] for i in order)
    numbers = {group: number for number, group in enumerate(first, start=1)}
    return Clusters(
        [rows[i] for i in order],
        [numbers[groups[i]] for i in order],
        [int(columns[i]) for i in across],
        more,
    )


def _unit(rows: Floats) -> Floats:
    """Rows with length 1 (N, F); those of length 0 stay 0."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1))


def _linked(directions: Floats) -> tuple[list[int], list[int]]:
    """Return an order of vectors of length 1 (N, F) in which like ones meet, and their groups."""
    if len(directions) < 2:
        return list(range(len(directions))), [1] * len(directions)
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

    apart = np.clip(1 - directions @ directions.T, 0, 2)
    tree = linkage(apart[np.triu_indices(len(apart), 1)], "average", optimal_ordering=True)
    groups = fcluster(tree, 1 - ALIKE, "distance")
    return [int(i) for i in leaves_list(tree)], [int(i) for i in groups]


def heat_map(screen: Screen, found: Clusters) -> str:
    """Median profiles of treatments (rows) in the features that changed most (columns)."""
    values = screen.middles[list(found.rows)][:, list(found.columns)]
    limit = float(np.clip(np.percentile(np.abs(values), 97), 2, 10))
    tall, wide = len(found.rows), len(found.columns)
    names = [
        f"{number}  {short(screen.judged[row].row.name, 24)}"
        for row, number in zip(found.rows, found.numbers, strict=True)
    ]
    height = 0.145 * tall + 2.6
    width = float(np.clip(0.16 * wide + 3.2, 5, 12.5))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        picture = axes.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none"
        )
        axes.set_yticks(range(tall), names, size=8)
        labels = [short(screen.columns[column], 34) for column in found.columns]
        axes.set_xticks(range(wide), labels, rotation=90, size=7)
        axes.tick_params(length=0)
        axes.spines[:].set(visible=True, alpha=0.4)
        for row in range(1, tall):
            if found.numbers[row] != found.numbers[row - 1]:
                axes.axhline(row - 0.5, color="#0a0b0d", lw=0.8)
        bar = figure.colorbar(picture, ax=axes, shrink=min(1.0, 1.6 / height), aspect=12, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)

    alt = f"Heat map of {tall} treatments by {wide} features, in {max(found.numbers)} clusters."
    return svg("heat map", (width, height), draw, alt)


def well_figure(screen: Screen, seed: int) -> tuple[str, str]:
    """The wells on a plane on which like ones lie beside each other, and how it was made.

    Nothing, with fewer than 3 of them.
    """
    order = list(MARKS)
    verdicts = np.where(screen.controls, len(order), -1)
    for item in screen.judged:
        verdicts[item.wells] = order.index(item.row.verdict)
    wells = np.flatnonzero(screen.usable & (verdicts >= 0))
    if len(wells) < 3:
        return "", ""
    how = ""
    if len(wells) > MOST_WELLS:
        how = f" of {MOST_WELLS:,} of {len(wells):,} wells, drawn by chance"
        rng = np.random.default_rng(seed)
        wells = np.sort(rng.choice(wells, MOST_WELLS, replace=False))
    values = np.clip(screen.z[wells], -20, 20)
    values = values - values.mean(axis=0)
    points = values @ components_of(values)
    if len(wells) < FEWEST_WELLS:
        points = np.pad(points, [(0, 0), (0, max(0, 2 - points.shape[1]))])[:, :2]
        how = f"first two principal components{how} (fewer than {FEWEST_WELLS} wells: no UMAP)"
    else:
        points, how = umap_of(points, seed), f"UMAP{how}, seed {seed}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        kinds = [("controls", "+", GREY)]
        kinds += [(verdict, *MARKS[verdict][1:]) for verdict in reversed(order)]
        for code, (label, mark, colour) in zip(range(len(order), -1, -1), kinds, strict=True):
            x, y = points[verdicts[wells] == code].T
            size, line = {".": 30, "+": 24}.get(mark, 20), 0.8 if mark in "+x" else 0
            if len(x):
                axes.scatter(x, y, s=size, c=colour, marker=mark, label=label, linewidths=line)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, alpha=0.3)
        figure.legend(loc="outside lower left", ncols=2, fontsize=9, markerscale=1.2)

    return svg("wells", (5.2, 5.4), draw, f"{how}: {len(wells)} wells by verdict."), how


def plate_figures(screen: Screen) -> tuple[list[tuple[PlateMap, str, str]], int]:
    """Maps of the effect of wells, each with a sentence about its edge; and how many more."""
    finite = screen.effects[np.isfinite(screen.effects)]
    limits = colour_limits(finite.tolist())
    names = screen.barcodes
    found = []
    for plate in names[:SHOWN_PLATES]:
        rows = np.flatnonzero(screen.plates == plate)
        positions = [screen.position(i) for i in rows]
        values = {
            where: float(screen.effects[i])
            for i, where in zip(rows, positions, strict=True)
            if np.isfinite(screen.effects[i])
        }
        marked = [where for i, where in zip(rows, positions, strict=True) if screen.controls[i]]
        made = PlateMap(plate, "Effect", "SD of the controls", values, limits, positions, marked)
        width = LARGE_MAP if len(names) == 1 else SMALL_MAP
        found.append((made, plate_map_svg(made, width), edge_sentence(screen, rows)))
    return found, len(names) - len(found)


def edge_sentence(screen: Screen, rows: Wells) -> str:
    """Compare the control wells at the edge of a plate with those inside, in words."""
    usual = rows[screen.controls[rows] & np.isfinite(screen.effects[rows])]
    edge, inside = usual[screen.on_edge[usual]], usual[~screen.on_edge[usual]]
    if not len(edge) or not len(inside):
        return "Controls are not both at the edge and inside: an edge effect cannot be seen."
    apart = float(np.median(screen.effects[edge]) - np.median(screen.effects[inside]))
    caption = f"Controls at the edge {apart:+.1f} SD from those inside"
    many = min(len(edge), len(inside)) > 3
    return f"⚠ {caption}: an edge effect." if abs(apart) > 1 and many else f"{caption}."
