"""What led to something and what came of it, as a graph that can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import Recipe, Run, Segmentation, Split
from ...runs import Workspace
from ...terms import ArtifactKind, Stage
from .facts import (
    ArtifactAudit,
    Came,
    CellAudit,
    ImageAudit,
    KnownFile,
    Labelling,
    RunAudit,
    TreatmentChange,
    WellAudit,
)
from .images import audit_image
from .runs import artifacts_of

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
            key = graph.add(item.what, "measurement", *_lines(item))
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
    name = audit.treatment.pert_iname if audit.treatment else None
    treatment = _treatment(graph, name, audit.history)
    graph.add("well", "well", f"{audit.plate}/{audit.well}", f"{len(audit.images)} images")
    graph.link(treatment, "well")
    _what_came(graph, "well", audit.came)
    return graph


def _what_came(graph: Lineage, source: str, came: Sequence[Came]) -> None:
    for item in came:
        key = graph.add(f"{source}: {item.what}", _kind(item.what), *_lines(item))
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


def _lines(item: Came) -> tuple[str, ...]:
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
        f"by {run.user}",
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
    from .runs import inputs_of

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
