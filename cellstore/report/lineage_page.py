"""The page of a lineage: a picture, and the facts of the audit as tables."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..artifacts import write_atomically
from ..enums import ArtifactKind, Stage
from ..extras import need
from ..jobs.workspace import Workspace
from ..models import Recipe, Run, Segmentation, Split
from ..settings import check_not_of_a_store
from .audit import (
    ArtifactAudit,
    Came,
    CellAudit,
    ImageAudit,
    KnownFile,
    Labelling,
    RunAudit,
    TreatmentChange,
    WellAudit,
    artifacts_of,
    audit_image,
)
from .drawing import BLUE, GREY, INK, ORANGE, render, short, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SHORT = 10
MOST_FILES = 4
"""Files of an image that are drawn one by one; of more, one box says how many there are."""


@dataclass(frozen=True)
class Node:
    """A box: what it is, and what is written in it."""

    kind: str
    lines: tuple[str, ...]


@dataclass
class Lineage:
    """Boxes by key, the arrows between them, and the key of what it is all about."""

    subject: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, kind: str, *lines: str | None) -> str:
        """Add a box, unless it is there."""
        self.nodes.setdefault(key, Node(kind, tuple(line for line in lines if line)))
        return key

    def link(self, *keys: str) -> None:
        """Draw an arrow from each key to the next."""
        for edge in pairwise(keys):
            if edge not in self.edges and edge[0] != edge[1]:
                self.edges.append(edge)


def lineage_of(
    workspace: Workspace, audit: ImageAudit | WellAudit | CellAudit | RunAudit | ArtifactAudit
) -> Lineage:
    """Return the graph around what was audited."""
    if isinstance(audit, ImageAudit):
        return _of_image(audit)
    if isinstance(audit, CellAudit):
        return _of_cell(audit, audit_image(workspace, str(audit.image_id)))
    if isinstance(audit, WellAudit):
        return _of_well(audit)
    if isinstance(audit, ArtifactAudit):
        return _of_file(audit)
    with workspace.database.read() as session:
        return _of_run(session, audit)


def _short(digest: str | None) -> str | None:
    return digest[:SHORT] if digest else None


def _of_image(audit: ImageAudit) -> Lineage:
    graph = Lineage("image")
    name = f"{audit.plate}/{audit.well}/{audit.site}"
    graph.add("image", "image", name, audit.core_name, _short(audit.content_sha256))
    _files(graph, audit)
    treatment = _treatment(graph, audit.treatment, audit.treatment_history)
    for found in audit.segmentations:
        model = str(found.parameters.get("model") or found.imported or "")
        when = found.made_at[:10]
        lines = (f"run {found.run_id}, {when}", f"{found.n_cells:,} cells", model)
        key = graph.add(f"segmentation {found.id}", "segmentation", *lines)
        graph.link("image", key)
        if found.weights_sha256:
            weights = graph.add(
                f"weights {found.weights_sha256}", "weights", model, _short(found.weights_sha256)
            )
            graph.link(weights, key)
    _measurements(graph, audit)
    for labelling in audit.labellings:
        _labelling(graph, labelling, treatment)
    return graph


def _files(graph: Lineage, audit: ImageAudit) -> None:
    if len(audit.files) > MOST_FILES:
        what = f"{len(audit.files)} files, {audit.missing_files} missing"
        graph.link(graph.add("files", "file", what, audit.files[0].name), "image")
        return
    for number, file in enumerate(audit.files):
        key = graph.add(f"file {number}", "file", file.channel, file.name, _short(file.sha256))
        graph.link(key, "image")


def _measurements(graph: Lineage, audit: ImageAudit) -> None:
    for item in audit.came:
        if item.what in ("measured cells", "feature sets"):
            key = graph.add(item.what, "measurement", *_graph_lines(item))
            for found in audit.segmentations:
                graph.link(f"segmentation {found.id}", key)


def _labelling(graph: Lineage, found: Labelling, treatment: str) -> None:
    run = graph.add(
        f"run {found.run_id}",
        "predict",
        f"run {found.run_id}, {found.started_at[:10]}",
        f"by {found.user}",
        found.code_version,
    )
    for number in found.segmentation_ids:
        graph.link(f"segmentation {number}", run)
    if found.train_run_id is not None:
        train = graph.add(f"run {found.train_run_id}", "train", f"run {found.train_run_id}")
        for digest in found.checkpoints[:1]:
            checkpoint = graph.add(f"checkpoint {digest}", "checkpoint", _short(digest))
            graph.link(train, checkpoint, run)
        if not found.checkpoints:
            graph.link(train, run)
        if found.split is not None:
            split = graph.add(f"split {found.split}", "split", found.split, found.protocol)
            graph.link(treatment, split, train)
    verdict = {True: "right", False: "wrong", None: "not judged"}[found.correct]
    seen = "well was in training" if found.well_in_training else "well was not in training"
    votes = f"{found.votes[0].cells} of {found.n_cells} cells" if found.votes else None
    label = graph.add(f"label {found.run_id}", "label", found.winner, votes, verdict, seen)
    graph.link(run, label)


def _treatment(graph: Lineage, name: str | None, history: Sequence[TreatmentChange]) -> str:
    key = graph.add("treatment", "treatment", name or "unknown")
    for number, change in enumerate(history[-MOST_FILES:]):
        line = "" if change.line is None else f"line {change.line}"
        when = f"run {change.run_id}, {change.changed_at[:10]}"
        said = graph.add(f"table {number}", "table", change.file, line, when)
        graph.link(said, key)
    return key


def _of_cell(audit: CellAudit, image: ImageAudit) -> Lineage:
    graph = _of_image(image)
    graph.subject = graph.add("cell", "cell", f"cell {audit.cell_id}", f"label {audit.label}")
    segmentation = f"segmentation {audit.segmentation.id}"
    graph.link(segmentation, "cell")
    for choice in audit.choices:
        if choice.rank == 1:
            said = f"{choice.label}, {choice.probability:.2f}"
            graph.link("cell", f"run {choice.run_id}")
            key = graph.add(f"choice {choice.run_id}", "label", said, "this cell alone")
            graph.link(f"run {choice.run_id}", key)
    return graph


def _of_well(audit: WellAudit) -> Lineage:
    graph = Lineage("well")
    name = audit.treatment.name if audit.treatment else None
    treatment = _treatment(graph, name, audit.history)
    graph.add("well", "well", f"{audit.plate}/{audit.well}", f"{len(audit.images)} images")
    graph.link(treatment, "well")
    _what_came(graph, "well", audit.came)
    return graph


def _what_came(graph: Lineage, source: str, came: Sequence[Came]) -> None:
    for item in came:
        key = graph.add(f"{source}: {item.what}", _kind(item.what), *_graph_lines(item))
        graph.link(source, key)


_KINDS = {
    "label": "label",
    "split": "split",
    "train": "train",
    "predict": "predict",
    "cell": "cell",
    "segment": "segmentation",
    "feature": "measurement",
    "measure": "measurement",
}


def _kind(what: str) -> str:
    return next((kind for word, kind in _KINDS.items() if word in what), "result")


def _graph_lines(item: Came) -> tuple[str, ...]:
    names = ", ".join(item.names) or ", ".join(f"run {run}" for run in item.runs)
    return (f"{item.count:,} {item.what}", names)


def _of_file(audit: ArtifactAudit) -> Lineage:
    graph = Lineage("bytes")
    graph.add("bytes", "file", audit.known[0].name, _short(audit.sha256))
    for known in audit.known:
        _known(graph, known)
    return graph


def _known(graph: Lineage, known: KnownFile) -> None:
    kinds = {item.value: item.value for item in ArtifactKind}
    key = graph.add(f"known {known.kind} {known.key}", known.kind, *known.about[:2])
    wrote = known.kind in kinds
    for run in known.runs[:MOST_FILES]:
        maker = graph.add(f"run {run.id}", run.stage, f"run {run.id}, {run.started_at[:10]}")
        graph.link(*((maker, "bytes") if wrote else ("bytes", maker)))
    graph.link("bytes", key)
    _what_came(graph, key, known.came)


def _of_run(session: Session, audit: RunAudit) -> Lineage:
    graph = Lineage(f"run {audit.run.id}")
    _run_up(session, graph, session.get_one(Run, audit.run.id))
    for child in audit.children[: 2 * MOST_FILES]:
        lines = (f"run {child.id}, {child.started_at[:10]}", child.status)
        key = graph.add(f"run {child.id}", child.stage, *lines)
        graph.link(_last_of(session, graph, audit.run.id), key)
    for file in audit.ingested[: 2 * MOST_FILES]:
        table = graph.add(f"table {file.sha256}", "table", file.name, _short(file.sha256))
        graph.link(table, graph.subject)
    if audit.run.stage == Stage.PREDICT.value and audit.result:
        said = [f"{audit.result.get(what, 0):,} {what} labelled" for what in ("images", "cells")]
        graph.link(graph.subject, graph.add("labels", "label", *said))
    own = [item for item in audit.came if not item.what.endswith(" runs")]
    _what_came(graph, graph.subject, own)
    return graph


def _last_of(session: Session, graph: Lineage, run_id: int) -> str:
    """The checkpoint of a run, which is drawn after it; else the run."""
    files = artifacts_of(session, run_id)
    found = [f.sha256 for f in files if f.kind == ArtifactKind.CHECKPOINT.value]
    if not found:
        return f"run {run_id}"
    key = graph.add(f"checkpoint {found[0]}", "checkpoint", _short(found[0]))
    graph.link(f"run {run_id}", key)
    return key


def _run_up(session: Session, graph: Lineage, run: Run) -> str:
    """Add a run and all that led to it."""
    key = graph.add(
        f"run {run.id}",
        run.stage.value,
        f"run {run.id}, {run.started_at:%Y-%m-%d}",
        f"by {run.user_name}",
        run.code_version,
    )
    if run.parent_id is not None:
        parent = session.get_one(Run, run.parent_id)
        _run_up(session, graph, parent)
        graph.link(_last_of(session, graph, parent.id), key)
    elif run.split_id is not None:
        split = session.get_one(Split, run.split_id)
        drawn = graph.add(f"split {split.id}", "split", split.name, split.protocol)
        graph.link(drawn, key)
    _recipes_up(session, graph, session.get_one(Recipe, run.recipe_id), key)
    return key


def _recipes_up(session: Session, graph: Lineage, recipe: Recipe, target: str) -> None:
    from .audit import inputs_of

    if recipe.stage is Stage.SEGMENT and recipe.weights_sha256:
        model = str(recipe.parameters.get("model", ""))
        digest = recipe.weights_sha256
        graph.link(graph.add(f"weights {digest}", "weights", model, _short(digest)), target)
    for source in inputs_of(session, recipe.id):
        if source.stage in (Stage.SEGMENT, Stage.MEASURE, Stage.QC):
            key = graph.add(
                f"recipe {source.id}", _stage_name(source), *_of_recipe(session, source)
            )
            graph.link(key, target)
            _recipes_up(session, graph, source, key)


def _stage_name(recipe: Recipe) -> str:
    names = {Stage.SEGMENT: "segmentation", Stage.MEASURE: "measurement"}
    return names.get(recipe.stage, recipe.stage.value)


def _of_recipe(session: Session, recipe: Recipe) -> tuple[str, ...]:
    lines = [f"recipe {recipe.id} ({recipe.fingerprint[:SHORT]})"]
    if recipe.stage is Stage.SEGMENT:
        query = select(func.count()).where(Segmentation.recipe_id == recipe.id)
        lines.append(f"{session.scalar(query) or 0:,} images")
    return tuple(lines)


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


ROWS = 200
"""Rows of a table on the page; the rest are counted."""

Audited = ImageAudit | WellAudit | CellAudit | RunAudit | ArtifactAudit


def write_lineage(workspace: Workspace, audit: Audited, path: Path) -> Path:
    """Write the page, one file that needs nothing else, and return where it is.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        StorageError: the file cannot be written.
    """
    need("report")
    lineage = lineage_of(workspace, audit)
    content = {
        "title": _title(audit),
        "picture": draw_lineage(lineage),
        "boxes": len(lineage.nodes),
        "facts": _facts(audit),
        "tables": _tables(audit),
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "version": version("cellstore"),
        "database": workspace.database.shown,
    }
    path = path.resolve()
    check_not_of_a_store(path)
    write_atomically(path, render("lineage.html.j2", content).encode("utf-8", "replace"))
    return path


def _title(audit: Audited) -> str:
    if isinstance(audit, ImageAudit):
        return f"Image {audit.plate}/{audit.well}/{audit.site}"
    if isinstance(audit, WellAudit):
        return f"Well {audit.plate}/{audit.well}"
    if isinstance(audit, CellAudit):
        return f"Cell {audit.cell_id} of {audit.image}"
    if isinstance(audit, RunAudit):
        return f"Run {audit.run.id}: {audit.run.stage}"
    return f"File {audit.known[0].name}"


def _facts(audit: Audited) -> list[tuple[str, str]]:
    """The values of the audit that are no lists."""
    found = []
    for name, value in asdict(audit).items():
        if isinstance(value, dict):
            found += [(f"{name} {key}", _text(item)) for key, item in value.items()]
        elif not isinstance(value, list | tuple):
            found.append((name, _text(value)))
    return [(name.replace("_", " "), text) for name, text in found]


def _tables(audit: Audited) -> list[dict[str, Any]]:
    """The lists of records of the audit, each as a table."""
    tables = []
    for name, value in asdict(audit).items():
        if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
            continue
        heads = list(value[0])
        rows = [[_text(row[head]) for head in heads] for row in value[:ROWS]]
        title = name.replace("_", " ")
        heads = [head.replace("_", " ") for head in heads]
        tables.append(
            {"title": title, "heads": heads, "rows": rows, "more": len(value) - len(rows)}
        )
    return tables


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = "; ".join(_text(item) for item in value[:12])
        return f"{shown}; and {len(value) - 12} more" if len(value) > 12 else shown
    return f"{value:.6g}" if isinstance(value, float) else str(value)
