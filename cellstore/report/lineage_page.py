"""The page of an audit: a picture of the lineage, and its record as tables."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import open_atomically
from ..jobs.workspace import Workspace
from ..settings import check_not_of_a_store, need
from .audit import Audit, Lineage, is_part, shown
from .drawing import BLUE, GREY, INK, ORANGE, render, short, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 200
"""Rows of a table on the page; the rest are counted."""
LISTED = 12
"""Values of a list in one cell of a table."""


def write_lineage(workspace: Workspace, audit: Audit, path: Path) -> Path:
    """Write the page, one file that needs nothing else, and return where it is.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        StorageError: the file cannot be written.
    """
    need("report")
    values: list[tuple[str, str]] = []
    tables: list[dict[str, Any]] = []
    for key, value in audit.record.items():
        title = key.replace("_", " ")
        if isinstance(value, dict):
            named = {f"{title} {name}".replace("_", " "): (name, x) for name, x in value.items()}
            values += [(lead, shown(*item, digits=64, most=LISTED)) for lead, item in named.items()]
        elif is_part(value):
            rows = [
                [shown(name, x, digits=64, most=LISTED) for name, x in row.items()]
                for row in value[:ROWS]
            ]
            heads = [name.replace("_", " ") for name in value[0]]
            more = len(value) - len(rows)
            tables.append({"title": title, "heads": heads, "rows": rows, "more": more})
        else:
            values.append((title, shown(key, value, digits=64, most=LISTED)))
    content = {
        "title": audit.title,
        "picture": draw_lineage(audit.lineage),
        "boxes": len(audit.lineage.boxes),
        "values": values,
        "tables": tables,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "version": version("cellstore"),
        "database": workspace.database.shown,
    }
    path = path.resolve()
    check_not_of_a_store(path)
    with open_atomically(path) as file:
        file.write(render("lineage.html.j2", content).encode("utf-8", "replace"))
    return path


BOX = (1.95, 1.0)
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
    positions, paths, size = lay_out(lineage)
    half = BOX[1] / 2

    def draw(figure: Figure) -> None:
        from matplotlib.patches import FancyBboxPatch

        figure.set_layout_engine("none")  # the positions are settled
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        line: dict[str, Any] = {"color": GREY, "linewidth": 0.8}
        for path in paths:
            # From the foot of a box to the head of another, straight past those between.
            points = [positions[key] for key in path]
            way = [(points[0][0], points[0][1] + half)]
            for x, y in points[1:-1]:
                way += [(x, y - half), (x, y + half)]
            way.append((points[-1][0], points[-1][1] - half))
            if len(way) > 2:
                axes.plot(*zip(*way[:-1], strict=True), solid_joinstyle="round", **line)
            arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **line}
            axes.annotate("", xy=way[-1], xytext=way[-2], arrowprops=arrow)
        for key, (kind, *lines) in lineage.boxes.items():
            x, y = positions[key]
            left, top = x - BOX[0] / 2, y - half
            colour, width = COLOURS.get(kind, BLUE), 2.4 if key == lineage.subject else 1.0
            style = "round,pad=0,rounding_size=0.08"
            box = FancyBboxPatch((left, top), *BOX, boxstyle=style, fill=False, ec=colour, lw=width)
            axes.add_patch(box)
            axes.text(left + 0.08, top + 0.17, kind, fontsize=7.5, color=colour, va="center")
            printable = ["".join(c if c.isprintable() else " " for c in text) for text in lines]
            if len(printable) < LINES and printable and len(printable[-1]) > LETTERS:
                # A long last line goes on in the next one.
                printable[-1:] = textwrap.wrap(printable[-1], LETTERS) or [""]
            for number, text in enumerate(printable[:LINES]):
                weight: Any = "normal" if number else "bold"
                height = top + 0.35 + 0.165 * number
                ink = {"fontsize": 8, "color": INK, "va": "center", "weight": weight}
                axes.text(left + 0.08, height, short(text, LETTERS), **ink)

    return svg("lineage", size, draw, f"Lineage in {len(lineage.boxes)} boxes.")


Point = tuple[float, float]


def lay_out(lineage: Lineage) -> tuple[dict[str, Point], list[list[str]], Point]:
    """Return the middle of each box in inches (x to the right, y down), the arrows, and the size.

    A box is one layer below the lowest of those that point to it; within layers, boxes stand near
    those that they are joined to (barycentre heuristic of Sugiyama et al., 1981). An arrow is the
    keys on its way: past other layers it has a position of its own there.
    """
    layers = _layers(lineage)
    depth = {key: number for number, layer in enumerate(layers) for key in layer}
    paths = []
    for source, target in lineage.arrows:
        between = range(depth[source] + 1, depth[target])
        way = [f"{source} to {target} past {number}" for number in between]
        for key, number in zip(way, between, strict=True):
            layers[number].append(key)
        paths.append([source, *way, target])
    near: dict[str, list[str]] = {key: [] for layer in layers for key in layer}
    for source, target in (pair for path in paths for pair in pairwise(path)):
        near[source].append(target)
        near[target].append(source)
    for sweep in range(SWEEPS):
        order = range(len(layers)) if sweep % 2 == 0 else reversed(range(len(layers)))
        for before, number in pairwise(order):
            at = {key: n / len(layers[before]) for n, key in enumerate(layers[before])}
            middles = {}
            for n, key in enumerate(layers[number]):
                joined = [at[other] for other in near[key] if other in at]
                middles[key] = sum(joined) / len(joined) if joined else n / len(layers[number])
            layers[number] = sorted(layers[number], key=middles.__getitem__)
    widest = max(len(layer) for layer in layers)
    size = (widest * (BOX[0] + GAP[0]) + GAP[0], len(layers) * (BOX[1] + GAP[1]) + 0.1)
    positions = {}
    for number, layer in enumerate(layers):
        y = 0.1 + BOX[1] / 2 + number * (BOX[1] + GAP[1])
        for n, key in enumerate(layer):
            positions[key] = ((n + 0.5) * size[0] / len(layer), y)
    return positions, paths, size


def _layers(lineage: Lineage) -> list[list[str]]:
    """The keys of the boxes by layer, from top to bottom."""
    import networkx as nx

    graph: Any = nx.DiGraph()
    graph.add_nodes_from(lineage.boxes)
    graph.add_edges_from(lineage.arrows)
    depth: dict[str, int] = {}
    for number, layer in enumerate(nx.topological_generations(graph)):
        depth |= dict.fromkeys(layer, number)
    for key in reversed(list(nx.topological_sort(graph))):
        after = [depth[target] for target in graph.successors(key)]
        if after and not graph.in_degree(key):
            depth[key] = min(after) - 1  # what nothing led to stands just above what it led to
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for key in lineage.boxes:
        layers[depth[key]].append(key)
    return [layer for layer in layers if layer]
