"""The page of an audit: a picture of the lineage, and its record as tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import func, select

from ..errors import CellstoreError
from ..jobs.workspace import Workspace
from ..models import Segmentation
from ..notebooks import plain
from ..settings import need
from .audit import Audit, is_part, shown
from .drawing import BLUE, GREY, ORANGE, Place, element, field_picture, nowhere, short, write_html
from .gallery import read_field

FIELDS = 4
"""Fields of a well that are shown."""
ROWS = 200
"""Rows of a table on the page; the rest are counted."""
LISTED = 12
"""Values of a list in one cell of a table."""
MOST_BOXES = 4
"""Files, changes or runs that are drawn one by one."""
SHORT = 10
"""Digits of a sha256 in a box."""


def write_lineage(workspace: Workspace, audit: Audit, path: Path) -> Path:
    """Write the page, one file that needs nothing else, and return where it is."""
    need("report")
    path = path.resolve()
    write_html(path, "lineage.html.j2", lineage_content(workspace, audit))
    return path


def lineage_content(workspace: Workspace, audit: Audit, place: Place = nowhere) -> dict[str, Any]:
    """Return what the page shows; boxes lead to where ``place`` has an address for them."""
    lineage = lineage_of(audit, place)
    values, tables = record_parts(audit.record)
    return {
        "title": audit.title,
        "picture": draw_lineage(lineage),
        "boxes": len(lineage.boxes),
        "fields": fields_of(workspace, audit),
        "place": place,
        "values": values,
        "tables": tables,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "version": version("cellstore"),
        "database": workspace.database.shown,
    }


def record_parts(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Return the values of a record with their names, and its lists as tables."""
    values: list[tuple[str, str]] = []
    tables: list[dict[str, Any]] = []
    for key, value in record.items():
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
            tables.append({"title": title, "heads": heads, "rows": rows, "n": len(value)})
        else:
            values.append((title, shown(key, value, digits=64, most=LISTED)))
    return values, tables


def fields_of(workspace: Workspace, audit: Audit) -> list[dict[str, Any]]:
    """Return pictures of the image, of a well those of its first images, with outlines.

    Of a cell its own outline alone. ``picture`` is None where there is a ``problem``.
    """
    record = audit.record
    ids: list[int] = record["images"][:FIELDS] if audit.kind == "well" else []
    if audit.kind in ("image", "cell"):
        ids = [record["image_id"]]
    newest = select(Segmentation.image_id, func.max(Segmentation.id)).group_by(
        Segmentation.image_id
    )
    newest = newest.where(
        Segmentation.image_id.in_(ids), Segmentation.mask_artifact_id.is_not(None)
    )
    with workspace.database.read() as session:
        masked = {row[0]: row[1] for row in session.execute(newest)}
    if audit.kind == "cell":
        masked = {ids[0]: record["segmentation"]["id"]}
    shown = []
    for image in ids:
        picture, problem = None, None
        try:
            plane, masks = read_field(workspace, image, masked.get(image))
            if masks is not None and audit.kind == "cell":
                masks = np.where(masks == record["object_number"], masks, 0)
            picture = field_picture(plane, masks)
        except CellstoreError as error:
            problem = str(error)
        shown.append({"image": image, "picture": picture, "problem": problem})
    return shown


@dataclass
class Lineage:
    """Boxes by key, the arrows between them, and the key of what it is all about.

    A box is its kind, then its lines; ``addresses`` of some are known.
    """

    subject: str
    boxes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arrows: list[tuple[str, str]] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    place: Place = nowhere

    def add(
        self,
        key: str,
        kind: str,
        *lines: str | None,
        after: Iterable[str | None] = (),
        at: tuple[object, ...] | None = None,
    ) -> str:
        """Add a box, unless it is there, below those of ``after``; return its key.

        ``at``: what ``place`` gives its address for.
        """
        self.boxes.setdefault(key, (kind, *(line for line in lines if line)))
        if at is not None and (address := self.place(*at)):
            self.addresses[key] = address
        for source in after:
            if source is not None and source != key and (source, key) not in self.arrows:
                self.arrows.append((source, key))
        return key

    def add_run(self, run: Mapping[str, Any], *after: str | None) -> str:
        """Add the box of a run by its row in a record."""
        when = f"run {run['run_id']}, {run['started_at'][:10]}"
        status = run.get("status", "done")
        lines = (when, f"by {run['user']}", run["code_version"], status if status != "done" else "")
        key, at = f"run {run['run_id']}", ("run", run["run_id"])
        return self.add(key, run.get("stage", "predict"), *lines, after=after, at=at)

    def add_checkpoint(self, run: str, digests: Iterable[str]) -> str:
        """Add what a run wrote for the next one to read: its checkpoint, else it is the run."""
        for digest in digests:
            at = ("lineage", "artifact", digest)
            return self.add(
                f"checkpoint {digest}", "checkpoint", digest[:SHORT], after=[run], at=at
            )
        return run

    def add_downstream(self, source: str, downstream: Iterable[Mapping[str, Any]]) -> None:
        """Add what came of something, a box for each kind of thing."""
        for item in downstream:
            what = item["what"]
            kind = next((kind for part, kind in BOX_KINDS.items() if part in what), "result")
            self.add(f"{source}: {what}", kind, *_counted(item), after=[source])


BOX_KINDS = {
    "label": "label",
    "split": "split",
    "train": "train",
    "predict": "predict",
    "cell": "cell",
    "segment": "segmentation",
    "feature": "measurement",
    "measure": "measurement",
}
"""The kind of a box by what is in its name; the first that fits."""


def _counted(item: Mapping[str, Any]) -> tuple[str, str]:
    names = ", ".join(item["names"]) or ", ".join(f"run {run}" for run in item["runs"])
    what = re.sub(r"s\b", "", item["what"], count=1) if item["count"] == 1 else item["what"]
    return f"{item['count']:,} {what}", names


def lineage_of(audit: Audit, place: Place = nowhere) -> Lineage:
    """Return the picture of a record: boxes for its rows, arrows for what they name."""
    record = audit.record
    graph = Lineage(audit.kind, place=place)
    match audit.kind:
        case "image":
            _draw_image(graph, record)
        case "plate":
            lines = (f"plate {record['barcode']}", f"{record['images']:,} images")
            graph.add("plate", "well", *lines, at=("plate", record["barcode"]))
            graph.add_downstream("plate", record["downstream"])
        case "well":
            treatment = record["treatment"]
            after = _draw_treatment(graph, record, treatment and treatment["name"])
            name, number = f"{record['plate']}/{record['well']}", len(record["images"])
            of_well = ("well", record["plate"], record["well"])
            graph.add("well", "well", name, f"{number:,} images", after=[after], at=of_well)
            graph.add_downstream("well", record["downstream"])
        case "cell":
            assert audit.image is not None
            _draw_image(graph, audit.image.record)
            lines = (f"cell {record['cell_id']}", f"object {record['object_number']}")
            found = f"segmentation {record['segmentation']['id']}"
            graph.add("cell", "cell", *lines, after=[found], at=("cell", record["cell_id"]))
            for choice in record["choices"]:
                if choice["rank"] == 1:
                    text = f"{choice['label']}, {choice['probability']:.2f}"
                    after_run = f"run {choice['run_id']}"
                    # A run whose cells are all excluded now has no vote, so no box of its own.
                    at = ("run", choice["run_id"])
                    graph.add(after_run, "predict", after_run, after=["cell"], at=at)
                    key = f"choice {choice['run_id']}"
                    graph.add(key, "label", text, "this cell alone", after=[after_run])
        case "run":
            graph.subject = f"run {record['run_id']}"
            _draw_run(graph, record)
        case _:
            graph.subject = "file"
            known = record["known"]
            graph.add("file", "file", known[0]["name"], record["sha256"][:SHORT])
            for item in known:
                key = f"known {item['kind']} {item['key']}"
                graph.add(key, item["kind"], *item["about"][:2], after=["file"])
                for run in item["runs"][:MOST_BOXES]:
                    # Only what the store wrote has a path of its own: an image file was read.
                    wrote = item["path"] is not None and item["kind"] != "image file"
                    box = graph.add_run(run, None if wrote else "file")
                    if wrote:
                        graph.add("file", "file", after=[box])
                graph.add_downstream(key, item["downstream"])
    return graph


def _draw_image(graph: Lineage, record: Mapping[str, Any]) -> None:
    files = record["files"]
    if len(files) > MOST_BOXES:
        number = f"{len(files)} files, {record['missing_files']} missing"
        after = [graph.add("files", "file", number, files[0]["name"])]
    else:
        after = [
            graph.add(
                f"file {file['channel']}",
                "file",
                *(file["channel"], file["name"], _short(file)),
                at=file["sha256"] and ("lineage", "artifact", file["sha256"]),
            )
            for file in files
        ]
    name = f"{record['plate']}/{record['well']}/{record['site']}"
    digest = (record["content_sha256"] or "")[:SHORT]
    at = ("field", record["image_id"])
    graph.add("image", "image", name, record["core_name"], digest, after=after, at=at)
    treatment = _draw_treatment(graph, record, record["treatment"])
    found = []
    for item in record["segmentations"]:
        model = str(item["parameters"].get("model") or item["imported"] or "")
        sources = ["image"]
        if item["weights_sha256"]:
            key = f"weights {item['weights_sha256']}"
            file = ("lineage", "artifact", item["weights_sha256"])
            start = _short(item, "weights_sha256")
            sources.append(graph.add(key, "weights", model, start, at=file))
        when = f"run {item['run_id']}, {item['made_at'][:10]}"
        lines = (when, f"{item['n_cells']:,} cells", model)
        key, at = f"segmentation {item['id']}", ("run", item["run_id"])
        found.append(graph.add(key, "segmentation", *lines, after=sources, at=at))
    for item in record["downstream"]:
        if item["what"] in ("measured cells", "feature sets"):
            graph.add(item["what"], "measurement", *_counted(item), after=found)
    for run in record["labellings"]:
        cells = [f"segmentation {number}" for number in run["segmentation_ids"]]
        read: list[str | None] = [*(cells or ["image"])]  # or the model sees whole images
        if (parent := run["train_run_id"]) is not None:
            train = graph.add(f"run {parent}", "train", f"run {parent}", at=("run", parent))
            read.append(graph.add_checkpoint(train, run["checkpoints"]))
            if run["split"] is not None:
                key = f"split {run['split']}"
                graph.add(key, "split", run["split"], run["protocol"], after=[treatment])
                graph.add(train, "train", after=[key])
        box = graph.add_run(run, *read)
        truth = {True: "right", False: "wrong", None: "truth unknown"}[run["correct"]]
        seen = {True: "", False: "not ", None: "perhaps "}[run["well_in_training"]]
        known = f"well was {seen}in training"
        most = f"{next(iter(run['votes'].values()))} of {run['n_cells']} cells"
        most = most if cells else "whole image"
        label = (run["winner"], most, truth, known)
        at = ("run", run["run_id"])
        graph.add(f"label {run['run_id']}", "label", *label, after=[box], at=at)


def _draw_treatment(graph: Lineage, record: Mapping[str, Any], name: str | None) -> str:
    """Draw what a well has now, below the last tables that changed it."""
    tables = []
    changes = [item for item in record["corrections"] if {"treatment", "target"} & set(item["new"])]
    for number, item in enumerate(changes[-MOST_BOXES:]):
        line = "" if item["line"] is None else f"line {item['line']}"
        who = item["by"] if item["run_id"] is None else f"run {item['run_id']}"
        lines = (item["file"] or "correction", line, f"{who}, {item['changed_at'][:10]}")
        tables.append(graph.add(f"table {number}", "table", *lines))
    return graph.add("treatment", "treatment", name or "unknown", after=tables)


def _draw_run(graph: Lineage, record: Mapping[str, Any]) -> None:
    recipes = {item["id"]: item for item in (record["recipe"], *record["inputs"])}

    def draw_inputs(recipe: Mapping[str, Any]) -> list[str]:
        """What a recipe reads; what a run before this one wrote is drawn as that run."""
        found = []
        if recipe["stage"] == "segment" and recipe["weights_sha256"]:
            key = f"weights {recipe['weights_sha256']}"
            model = str(recipe["parameters"].get("model", ""))
            found.append(graph.add(key, "weights", model, _short(recipe, "weights_sha256")))
        names = {"segment": "segmentation", "measure": "measurement", "qc": "qc"}
        for source in (recipes[number] for number in recipe["reads"]):
            if source["stage"] in names:
                line = f"recipe {source['id']} ({source['fingerprint'][:SHORT]})"
                key = f"recipe {source['id']}"
                found.append(
                    graph.add(key, names[source["stage"]], line, after=draw_inputs(source))
                )
        return found

    above: str | None = None
    if record["split"] is not None:
        above = graph.add("split", "split", record["split"], record["protocol"])
    for run in reversed(record["parents"]):
        read = draw_inputs(recipes[run["recipe_id"]]) if run["recipe_id"] in recipes else []
        above = graph.add_checkpoint(graph.add_run(run, *read, above), run["checkpoints"])
    read = draw_inputs(record["recipe"])
    for file in record["ingested"][: 2 * MOST_BOXES]:
        read.append(graph.add(f"table {file['sha256']}", "table", file["name"], _short(file)))
    subject = graph.add_run(record, *read, above)
    own = [file["sha256"] for file in record["artifacts"] if file["kind"] == "checkpoint"]
    for child in record["children"][: 2 * MOST_BOXES]:
        graph.add_run(child, graph.add_checkpoint(subject, own))
    if record["stage"] == "predict" and record["result"]:
        result = record["result"]
        lines = [f"{result.get(what, 0):,} {what} labelled" for what in ("images", "cells")]
        graph.add("labels", "label", *lines, after=[subject])
    came = [item for item in record["downstream"] if not item["what"].endswith(" runs")]
    graph.add_downstream(subject, came)


def _short(row: Mapping[str, Any], key: str = "sha256") -> str | None:
    return row[key] and str(row[key])[:SHORT]


BOX = (187.0, 96.0)
"""Pixels of a box."""
GAP = (24.0, 37.0)
"""Pixels between boxes side by side, and between layers."""
TOP = 10.0
LETTERS = 29
"""Of a line in a box, at most."""
LINES = 4
LINE = 16
"""Pixels of a line."""
SWEEPS = 8

COLOURS = {
    **dict.fromkeys(("file", "image file", "table", "ingested table", "weights", "well"), GREY),
    **dict.fromkeys(("image", "treatment", "split"), GREY),
    **dict.fromkeys(("label", "predict"), ORANGE),
}


ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
    f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>'
)


def draw_lineage(lineage: Lineage) -> str:
    """Return the picture as an SVG element for a page."""
    positions, paths, (width, height) = lay_out(lineage)
    half, parts = BOX[1] / 2, [ARROW]
    for path in paths:
        # From the foot of a box to the head of another, straight past those between.
        points = [positions[key] for key in path]
        way = [(points[0][0], points[0][1] + half)]
        for x, y in points[1:-1]:
            way += [(x, y - half), (x, y + half)]
        way.append((points[-1][0], points[-1][1] - half))
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in way)
        parts.append(f'<path d="M{line}" fill="none" stroke="{GREY}" marker-end="url(#arrow)"/>')
    for key, (kind, *lines) in lineage.boxes.items():
        x, y = positions[key]
        left, top = x - BOX[0] / 2, y - half
        colour, is_subject = COLOURS.get(kind, BLUE), key == lineage.subject
        if len(lines) < LINES and lines and len(lines[-1]) > LETTERS:
            # A long last line goes on in the next one.
            lines[-1:] = textwrap.wrap(lines[-1], LETTERS) or [""]
        shown_lines = [(kind, colour, 19)]
        for number, line in enumerate(lines[:LINES]):
            shown_lines.append((short(line, LETTERS), "currentColor", 36 + LINE * number))
        texts = [
            f'<text x="{left + 8:.1f}" y="{top + down:.1f}" fill="{ink}">{escape(words)}</text>'
            for words, ink, down in shown_lines
        ]
        frame = (
            f'<rect class="link{" subject" * is_subject}" x="{left:.1f}" y="{top:.1f}" '
            f'width="{BOX[0]:g}" height="{BOX[1]:g}" rx="8" stroke="{colour}" '
            f'stroke-width="{2.4 if is_subject else 1}"/>'
        )
        box = "".join([frame, *texts])
        if (address := lineage.addresses.get(key)) is not None:
            label = plain(" ".join(lineage.boxes[key]))
            box = f'<a href="{escape(address)}" aria-label="{escape(label)}">{box}</a>'
        parts.append(box)
    alt = f"Lineage in {len(lineage.boxes)} boxes."
    drawn = element("lineage", width, height, "".join(parts), alt)
    return drawn.replace('role="img"', 'role="group"', 1) if lineage.addresses else drawn


Point = tuple[float, float]


def lay_out(lineage: Lineage) -> tuple[dict[str, Point], list[list[str]], Point]:
    """Return the middle of each box in pixels (x to the right, y down), the arrows, and the size.

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
    size = (widest * (BOX[0] + GAP[0]) + GAP[0], len(layers) * (BOX[1] + GAP[1]) + TOP)
    positions = {}
    for number, layer in enumerate(layers):
        y = TOP + BOX[1] / 2 + number * (BOX[1] + GAP[1])
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
