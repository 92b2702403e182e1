"""The picture of a lineage: boxes in layers, what was first on top."""

from __future__ import annotations

import textwrap
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...drawing.svg import BLUE, GREY, INK, ORANGE, short, svg
from .graph import Lineage, Node

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOX = (1.95, 0.92)
"""Inches of a box."""
GAP = (0.25, 0.38)
"""Inches between boxes side by side, and between layers."""
LETTERS = 29
"""Of a line in a box, at most."""
LINES = 4
SWEEPS = 8

COLOURS = {
    **dict.fromkeys(("file", "image file", "table", "ingested table", "weights", "well"), GREY),
    **dict.fromkeys(("image", "treatment", "split"), GREY),
    **dict.fromkeys(("label", "predict"), ORANGE),
}


def draw_lineage(lineage: Lineage) -> str:
    """Return the picture as an SVG element for a page."""
    places, paths, size = place(lineage)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")  # the places are settled
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        for path in paths:
            _arrow(axes, [places[key] for key in path])
        for key, node in lineage.nodes.items():
            _box(axes, places[key], node, key == lineage.subject)

    with warnings.catch_warnings():
        # Names may be in any script; what the font of the measuring lacks, the browser has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return svg("lineage", size, draw)


Point = tuple[float, float]


def place(lineage: Lineage) -> tuple[dict[str, Point], list[list[str]], Point]:
    """Return the middle of each box in inches (x to the right, y down), the arrows, and the size.

    A box is one layer below the lowest of those that point to it; within layers, boxes stand near
    those that they are joined to (barycentre heuristic of Sugiyama et al., 1981). An arrow is the
    keys on its way: past other layers it has a place of its own there.
    """
    layers = _layers(lineage)
    paths = _paths(lineage, layers)
    order = _ordered(paths, layers)
    widest = max(len(layer) for layer in order)
    size = (widest * (BOX[0] + GAP[0]) + GAP[0], len(order) * (BOX[1] + GAP[1]) + 0.1)
    places = {}
    for number, layer in enumerate(order):
        room = size[0] / len(layer)
        for position, key in enumerate(layer):
            places[key] = ((position + 0.5) * room, 0.1 + BOX[1] / 2 + number * (BOX[1] + GAP[1]))
    return places, paths, size


def _paths(lineage: Lineage, layers: list[list[str]]) -> list[list[str]]:
    """The keys on the way of each arrow; those between its ends are added to ``layers``."""
    depth = {key: number for number, layer in enumerate(layers) for key in layer}
    paths = []
    for source, target in lineage.edges:
        between = range(depth[source] + 1, depth[target])
        way = [f"{source} to {target} past {number}" for number in between]
        for key, number in zip(way, between, strict=True):
            layers[number].append(key)
        paths.append([source, *way, target])
    return paths


def _layers(lineage: Lineage) -> list[list[str]]:
    import networkx as nx

    graph: Any = nx.DiGraph()
    graph.add_nodes_from(lineage.nodes)
    graph.add_edges_from(lineage.edges)
    depth: dict[str, int] = {}
    for number, layer in enumerate(nx.topological_generations(graph)):
        depth |= dict.fromkeys(layer, number)
    for key in reversed(list(nx.topological_sort(graph))):
        after = [depth[target] for target in graph.successors(key)]
        if after and not graph.in_degree(key):
            depth[key] = min(after) - 1  # what nothing led to stands just above what it led to
    found: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for key in lineage.nodes:
        found[depth[key]].append(key)
    return [layer for layer in found if layer]


def _ordered(paths: list[list[str]], layers: list[list[str]]) -> list[list[str]]:
    near: dict[str, list[str]] = {key: [] for layer in layers for key in layer}
    for source, target in (pair for path in paths for pair in pairwise(path)):
        near[source].append(target)
        near[target].append(source)
    for sweep in range(SWEEPS):
        numbers = list(range(len(layers)))
        step = 1 if sweep % 2 == 0 else -1
        for before, number in pairwise(numbers[::step]):
            at = {key: n / len(layers[before]) for n, key in enumerate(layers[before])}
            layers[number] = _by_middle(layers[number], near, at)
    return layers


def _by_middle(layer: list[str], near: dict[str, list[str]], at: dict[str, float]) -> list[str]:
    """A layer in the order of the middles of what its boxes are joined to in the one beside it."""

    def middle(item: tuple[int, str]) -> float:
        places = [at[other] for other in near[item[1]] if other in at]
        return sum(places) / len(places) if places else item[0] / len(layer)

    return [key for _, key in sorted(enumerate(layer), key=middle)]


def _arrow(axes: Axes, points: list[Point]) -> None:
    """An arrow from the foot of a box to the head of another, straight past those between."""
    half = BOX[1] / 2
    way = [(points[0][0], points[0][1] + half)]
    for x, y in points[1:-1]:
        way += [(x, y - half), (x, y + half)]
    way.append((points[-1][0], points[-1][1] - half))
    style: dict[str, Any] = {"color": GREY, "linewidth": 0.8}
    if len(way) > 2:
        axes.plot(*zip(*way[:-1], strict=True), solid_joinstyle="round", **style)
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", xy=way[-1], xytext=way[-2], arrowprops=arrow)


def _box(axes: Axes, middle: tuple[float, float], node: Node, subject: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, top = middle[0] - BOX[0] / 2, middle[1] - BOX[1] / 2
    colour = COLOURS.get(node.kind, BLUE)
    style = "round,pad=0,rounding_size=0.08"
    width = 2.4 if subject else 1.0
    axes.add_patch(
        FancyBboxPatch((left, top), *BOX, boxstyle=style, fill=False, ec=colour, lw=width)
    )
    axes.text(left + 0.08, top + 0.17, node.kind, fontsize=7.5, color=colour, va="center")
    for number, line in enumerate(_lines(node)):
        weight = "bold" if number == 0 else "normal"
        height = top + 0.35 + 0.165 * number
        axes.text(left + 0.08, height, line, fontsize=8, color=INK, va="center", weight=weight)


def _lines(node: Node) -> list[str]:
    """What is written in a box; a long last line goes on in the next, if there is room."""
    printable = ["".join(c if c.isprintable() else " " for c in line) for line in node.lines]
    if len(printable) < LINES and printable and len(printable[-1]) > LETTERS:
        printable[-1:] = textwrap.wrap(printable[-1], LETTERS) or [""]
    return [short(line, LETTERS) for line in printable[:LINES]]
