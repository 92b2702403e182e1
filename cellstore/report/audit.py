"""The history of an image, a well, a cell, a run or a file: what it comes from, what came of it."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..db.fields import field_column, wells_changed
from ..enums import TARGET, ArtifactKind, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import (
    find_image,
    find_run,
    find_well,
    hex_start,
    looks_like_well,
    neighbours,
    readable,
    starts_with,
)
from ..jobs.run_names import RUN_WORDS
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    CellFlag,
    Event,
    FeatureFile,
    FeatureSet,
    Image,
    ImageFile,
    ImageFlag,
    IngestFile,
    Job,
    Label,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    Well,
)
from ..query.engine import open_questions
from ..query.exclusions import why_excluded

KINDS = ("image", "well", "cell", "run", "artifact")
SHORT = 10
"""Digits of a sha256 in a box."""
MOST_BOXES = 4
"""Files, changes or runs that are drawn one by one."""

Record = dict[str, Any]


@dataclass
class Lineage:
    """Boxes by key, the arrows between them, and the key of what it is all about.

    A box is its kind, then its lines.
    """

    subject: str
    boxes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arrows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, kind: str, *lines: str | None) -> str:
        """Add a box, unless it is there, and return its key."""
        self.boxes.setdefault(key, (kind, *(line for line in lines if line)))
        return key

    def link(self, *keys: str) -> None:
        """Draw an arrow from each key to the next."""
        for arrow in pairwise(keys):
            if arrow not in self.arrows and arrow[0] != arrow[1]:
                self.arrows.append(arrow)


@dataclass(frozen=True)
class Audit:
    """What the store knows of one thing.

    ``record`` holds values and lists of records, as ``audit --json`` prints them; the text and the
    tables of the page are made from it. Times are ISO 8601 in UTC.
    """

    kind: str
    title: str
    record: Record
    lineage: Lineage


def audit_anything(workspace: Workspace, text: str, kind: str | None = None) -> Audit:
    """Return the audit of what ``text`` names; without a ``kind``, of whatever has that name.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: it is a number without a kind; or several things have that name.
    """
    name = readable(text)
    by_kind = {
        "image": audit_image,
        "well": audit_well,
        "cell": audit_cell,
        "run": audit_run,
        "artifact": audit_artifact,
    }
    if kind is not None:
        return by_kind[kind](workspace, text)
    if name.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {name}" for kind in KINDS if kind != "well")
        raise UserInputError(f"{name} is the number of what? Use one of: {ways}.")
    if _on_disk(name) is not None:
        return audit_artifact(workspace, text)
    if name.lower().startswith(("#", "run ", *RUN_WORDS)):
        return audit_run(workspace, name)
    if looks_like_well(name):
        return audit_well(workspace, name)
    try:
        return audit_image(workspace, name)
    except UnknownNameError as unknown_image:
        try:
            return audit_artifact(workspace, name)
        except UnknownNameError:
            raise unknown_image from None


def _record(row: Any, *names: str) -> Record:
    """Columns of a row as JSON knows them."""
    found = {name: getattr(row, name) for name in names}
    for name, value in found.items():
        if isinstance(value, Enum):
            found[name] = value.value
        elif isinstance(value, datetime):
            found[name] = value.isoformat()
    return found


RUN = ("stage", "status", "started_at")
RECIPE = ("id", "stage", "version", "fingerprint", "weights_sha256", "parameters")


def _run(run: Run, *more: str) -> Record:
    return {"run_id": run.id, **_record(run, *RUN, *more)}


# Images, wells and cells


def audit_image(workspace: Workspace, text: str) -> Audit:
    """Return every run that labelled the image that ``text`` names, with its evidence.

    Raises:
        UnknownNameError: no image has that name.
        UserInputError: several have it.
    """
    with workspace.database.read() as session:
        return _image(workspace, session, find_image(session, text))


def _image(workspace: Workspace, session: Session, image: Image) -> Audit:
    well, treatment = image.well, image.well.treatment
    name = f"{well.plate.barcode}/{well.name}/{image.site}"
    graph = Lineage("image")
    graph.add("image", "image", name, image.core_name, _short(image.content_sha256))
    missing = sum(file.sha256 is None for file in image.files)
    if len(image.files) > MOST_BOXES:
        number = f"{len(image.files)} files, {missing} missing"
        graph.link(graph.add("files", "file", number, image.files[0].name), "image")
    else:
        for file in image.files:
            box = graph.add(f"file {file.id}", "file", file.channel, file.name, _short(file.sha256))
            graph.link(box, "image")
    history, treatment_box = _treatment_history(session, graph, well)
    one = select(Image.id).where(Image.id == image.id)
    frozen, notes = _frozen_labels(session, well, history, one)
    for found in image.segmentations:
        stored = found.recipe.parameters
        model = str(stored.get("model") or stored.get("imported") or "")
        when = f"run {found.run_id}, {found.created_at:%Y-%m-%d}"
        box = f"segmentation {found.id}"
        graph.add(box, "segmentation", when, f"{found.n_cells:,} cells", model)
        graph.link("image", box)
        if (digest := found.recipe.weights_sha256) is not None:
            graph.link(graph.add(f"weights {digest}", "weights", model, _short(digest)), box)
    downstream = _downstream_of_images(session, one)
    for item in downstream:
        if item["what"] in ("measured cells", "feature sets"):
            graph.add(item["what"], "measurement", *_counted(item))
            for found in image.segmentations:
                graph.link(f"segmentation {found.id}", item["what"])
    flags = select(ImageFlag).join(Run, Run.id == ImageFlag.run_id)
    flags = flags.where(ImageFlag.image_id == image.id, Run.status == Status.DONE)
    flags = flags.order_by(ImageFlag.run_id, ImageFlag.reason, ImageFlag.channel)
    record = {
        "image_id": image.id,
        "plate": well.plate.barcode,
        "well": well.name,
        **_record(image, "site", "plane", "time_point", "core_name", "pixel_size"),
        "content_sha256": image.content_sha256,
        "treatment": treatment.name if treatment else None,
        "target": treatment.target if treatment else None,
        **_record(well, "control"),
        "missing_files": missing,
        "notes": notes,
        "treatment_history": history,
        "frozen_labels": frozen,
        "flags": [
            _record(flag, "run_id", "reason", "channel", "value", "low", "high")
            | {"channel": flag.channel or None}
            for flag in session.scalars(flags)
        ],
        "files": [
            _record(file, "channel", "name", "uri", "sha256", "size_bytes") for file in image.files
        ],
        "segmentations": [_segmentation(found) for found in image.segmentations],
        "labellings": _labellings(workspace, session, graph, image, treatment_box),
        "downstream": downstream,
    }
    return Audit("image", f"Image {name}", record, graph)


def _segmentation(found: Segmentation) -> Record:
    """Its cells are ``current`` where the image still has the bytes in which they were found.

    Of cells that another tool found, ``imported`` names the tool, and the diameter may be unknown.
    """
    return {
        **_record(found, "id", "run_id", "recipe_id"),
        **_record(found.recipe, "fingerprint", "weights_sha256", "parameters"),
        "made_at": found.created_at.isoformat(),
        **_record(found, "n_cells", "diameter"),
        # Unknown bytes count as current: nothing can contradict them.
        "current": found.content_sha256 in (None, found.image.content_sha256),
        "has_masks": found.mask_artifact_id is not None,
        "imported": found.recipe.parameters.get("imported"),
    }


_VOTES = """
    SELECT run_id, vote, winner, tie, n_cells, subset, truth, correct FROM votes
    WHERE level = 'image' AND vote <> 'median' AND unit_id = $image
"""
_LABEL_VOTES = """
    SELECT run_id, label, cells, probability FROM label_votes
    WHERE level = 'image' AND vote = 'hard' AND unit_id = $image
    ORDER BY run_id, votes DESC, probability DESC, position
"""
_USED = """
    SELECT DISTINCT p.run_id, c.segmentation_id
    FROM eligible_predictions AS p JOIN cells AS c ON c.id = p.cell_id WHERE p.image_id = $image
"""
_OF_WELL = "SELECT DISTINCT run_id, subset FROM run_images WHERE subset <> 'outside'"


def _labellings(
    workspace: Workspace, session: Session, graph: Lineage, image: Image, treatment_box: str
) -> list[Record]:
    """What each predict run answered for an image, the oldest run first.

    ``winner`` is the label of the hard vote, ``soft_winner`` that of the summed probabilities;
    ``subset`` that of the image in the split (``outside``: in none), ``well_subsets`` all in which
    its well has images.
    """
    with open_questions(workspace, image=image.id) as questions:
        values = {"image": image.id}
        rows = questions.ask_ours(_VOTES, values).records()
        votes = {(row["run_id"], row["vote"]): row for row in rows}
        labels = questions.ask_ours(_LABEL_VOTES, values).records()
        used = list(questions.ask_ours(_USED, values).rows())
        of_well = list(questions.ask_ours(_OF_WELL).rows())
    found = []
    for run_id in sorted({number for number, _ in votes}):
        run = session.get_one(Run, run_id)
        split = run.split or (run.parent.split if run.parent else None)
        hard = votes[run_id, "hard"]
        own = [row for row in labels if row["run_id"] == run_id]
        well_subsets = [s.value for s in Subset if (run_id, s.value) in of_well]
        seen = Subset.TRAIN.value in well_subsets
        segmentations = [item for item in image.segmentations if (run_id, item.id) in used]
        found.append(
            {
                "run_id": run_id,
                "started_at": run.started_at.isoformat(),
                "user": run.user_name,
                **_record(run, "host", "code_version"),
                "train_run_id": run.parent_id,
                "checkpoints": [
                    file.sha256
                    for file in (run.parent.artifacts if run.parent else ())
                    if file.kind is ArtifactKind.CHECKPOINT
                ],
                "split": split.name if split else None,
                "protocol": split.protocol if split else None,
                "subset": hard["subset"],
                "well_subsets": well_subsets,
                "well_in_training": seen,
                "segmentation_ids": [item.id for item in segmentations],
                "segment_recipes": [item.recipe_id for item in segmentations],
                "segment_weights": [item.recipe.weights_sha256 or "" for item in segmentations],
                "n_cells": hard["n_cells"],
                "votes": {row["label"]: row["cells"] for row in own},
                "probabilities": {row["label"]: row["probability"] for row in own},
                "winner": hard["winner"],
                "soft_winner": votes[run_id, "soft"]["winner"],
                **{key: hard[key] for key in ("tie", "truth", "correct")},
            }
        )
        box = _run_box(graph, run)
        for item in segmentations:
            graph.link(f"segmentation {item.id}", box)
        if run.parent is not None:
            train = graph.add(f"run {run.parent_id}", "train", f"run {run.parent_id}")
            graph.link(_result_box(graph, run.parent), box)
            if split is not None:
                named = graph.add(f"split {split.id}", "split", split.name, split.protocol)
                graph.link(treatment_box, named, train)
        truth = {True: "right", False: "wrong", None: "truth unknown"}[hard["correct"]]
        known = "well was in training" if seen else "well was not in training"
        most = f"{own[0]['cells']} of {hard['n_cells']} cells"
        answer = graph.add(f"label {run_id}", "label", hard["winner"], most, truth, known)
        graph.link(box, answer)
    return found


def _treatment(found: Treatment | None) -> Record | None:
    if found is None:
        return None
    return {
        "name": found.name,
        "kind": "|".join(item.kind.value for item in found.perturbations),
        "target": found.target,
        "identifier": "|".join(item.identifier or "" for item in found.perturbations) or None,
    }


def _treatment_history(session: Session, graph: Lineage, well: Well) -> tuple[list[Record], str]:
    """The changes of a well's treatment, the first one first, and the box of what it has now."""
    name = well.treatment.name if well.treatment else "unknown"
    box = graph.add("treatment", "treatment", name)
    history: list[Record] = []
    parts = [part.perturbation_id for part in well.treatment.parts] if well.treatment else []
    of_well = and_(Event.table_name == "wells", Event.row_id == well.id)
    of_parts = and_(Event.table_name == "perturbations", Event.row_id.in_(parts))
    for event in session.scalars(select(Event).where(or_(of_well, of_parts)).order_by(Event.id)):
        values = (event.old or {}, event.new or {})
        states: list[Record | None]
        if event.table_name == "perturbations":
            now = _treatment(well.treatment) or {}
            states = [{**now, "target": item.get("target")} for item in values]
        elif "treatment_id" in values[1]:
            # What it is called now; other columns that were corrected are events themselves.
            states = [
                _treatment(session.get(Treatment, item["treatment_id"] or 0)) for item in values
            ]
        else:  # another control
            continue
        history.append(
            {
                "changed_at": event.created_at.isoformat(),
                **_record(event, "run_id", "file", "line"),
                "old": states[0],
                "new": states[1],
            }
        )
    for number, item in enumerate(history[-MOST_BOXES:]):
        line = "" if item["line"] is None else f"line {item['line']}"
        when = f"run {item['run_id']}, {item['changed_at'][:10]}"
        graph.link(graph.add(f"table {number}", "table", item["file"], line, when), box)
    return history, box


def _frozen_labels(
    session: Session, well: Well, history: Sequence[Record], images: Select[int]
) -> tuple[list[Record], list[str]]:
    """The labels that splits keep of some images of a well, and a sentence where the well differs.

    ``since``: the run, file and line by which it came to differ.
    """
    query = (
        select(Split.name, Split.field, SplitMember.subset, Label.value)
        .join(SplitMember, SplitMember.split_id == Split.id)
        .join(Label, Label.id == SplitMember.label_id)
        .where(SplitMember.image_id.in_(images))
        .distinct()
        .order_by(Split.name, SplitMember.subset, Label.value)
    )
    found, notes = [], []
    for split, label_field, subset, label in session.execute(query):
        labelled = select(field_column(label_field)).select_from(Well).join(Plate)
        now = session.scalar(labelled.outerjoin(Treatment).where(Well.id == well.id))
        since = None
        if now != label:
            key = "target" if label_field == TARGET else "name"
            text = f"label in split {split}: {label}; the well now has: {now or 'none'}"
            for item in history:  # the last change of this field counts
                if (item["old"] or {}).get(key) != (item["new"] or {}).get(key):
                    since = {name: item[name] for name in ("run_id", "file", "line")}
            if since is not None:
                line = "" if since["line"] is None else f", line {since['line']}"
                text += f", since run {since['run_id']} ({since['file']}{line})"
            notes.append(text)
        found.append(
            {
                "split": split,
                "field": label_field,
                "subset": Subset(subset).value,
                "label": label,
                "now": now,
                "differs": now != label,
                "since": since,
            }
        )
    return found, notes


def audit_well(workspace: Workspace, text: str) -> Audit:
    """Return what a well (``PLATE/A01``) has, what it had, and its labels in splits.

    Raises:
        UnknownNameError: there is no such plate or well.
        UserInputError: the text does not name a well.
    """
    with workspace.database.read() as session:
        plate, well = find_well(session, text)
        name = f"{plate.barcode}/{well.name}"
        graph = Lineage("well")
        history, treatment_box = _treatment_history(session, graph, well)
        images = select(Image.id).where(Image.well_id == well.id)
        ids = list(session.scalars(images.order_by(Image.id)))
        graph.link(treatment_box, graph.add("well", "well", name, f"{len(ids)} images"))
        frozen, notes = _frozen_labels(session, well, history, images)
        downstream = _downstream_of_images(session, images)
        _add_downstream(graph, "well", downstream)
        record = {
            "well_id": well.id,
            "plate": plate.barcode,
            "well": well.name,
            **_record(well, "control"),
            "treatment": _treatment(well.treatment),
            "images": ids,
            "notes": notes,
            "treatment_history": history,
            "frozen_labels": frozen,
            "downstream": downstream,
        }
        return Audit("well", f"Well {name}", record, graph)


def audit_cell(workspace: Workspace, cell_id: int | str) -> Audit:
    """Return a cell, its masks, its measurements and what every run predicted for it.

    ``box`` is min row, min col, max row, max col (half open) in pixels; it and ``centroid`` are
    null where another tool found the cell and does not report them.

    Raises:
        UnknownNameError: there is no such cell.
    """
    with workspace.database.read() as session:
        number = str(cell_id).strip()
        known = number.isdecimal() and len(number) < 19
        cell = session.get(Cell, int(number)) if known else None
        if cell is None:
            raise UnknownNameError(
                f"There is no cell {number}. A cell is named by its id in table cells; see some "
                "with: cellstore sql 'FROM cells LIMIT 5'"
            )
        image = cell.segmentation.image
        name = f"{image.well.plate.barcode}/{image.core_name}"
        graph = _image(workspace, session, image).lineage
        graph.subject = graph.add("cell", "cell", f"cell {cell.id}", f"object {cell.object_number}")
        graph.link(f"segmentation {cell.segmentation_id}", "cell")
        for choice in cell.predictions:
            if choice.rank == 1:
                text = f"{choice.label.value}, {choice.probability:.2f}"
                own = graph.add(f"choice {choice.run_id}", "label", text, "this cell alone")
                graph.link("cell", f"run {choice.run_id}", own)
        box = [cell.min_row, cell.min_col, cell.max_row, cell.max_col]
        centroid = [cell.centroid_row, cell.centroid_col]
        keys = ("cell_id", "recipe_id", "run_id")
        measured = [c.name for c in CellFeatures.__table__.columns if c.name not in keys]
        flags = select(CellFlag).join(Run, Run.id == CellFlag.run_id)
        flags = flags.where(CellFlag.cell_id == cell.id, Run.status == Status.DONE)
        flags = flags.order_by(CellFlag.run_id, CellFlag.reason)
        record = {
            "cell_id": cell.id,
            "image": name,
            "image_id": image.id,
            "object_number": cell.object_number,
            "box": None if None in box else box,
            "centroid": None if None in centroid else centroid,
            "excluded": next(iter(why_excluded(session, cell)), None),
            "flags": [
                _record(flag, "run_id", "reason", "value") for flag in session.scalars(flags)
            ],
            "segmentation": _segmentation(cell.segmentation),
            "features": {
                f"recipe {row.recipe_id}": _record(row, *measured)
                for row in sorted(cell.features, key=lambda row: row.recipe_id)
            },
            "choices": [
                {
                    **_record(choice, "run_id", "rank"),
                    "label": choice.label.value,
                    "probability": choice.probability,
                }
                for choice in cell.predictions
            ],
        }
        return Audit("cell", f"Cell {cell.id} of {name}", record, graph)


# Runs


def audit_run(workspace: Workspace, reference: str) -> Audit:
    """Return a run (a number, or ``latest``): what it did, from what, and what came of it.

    ``inputs`` are the recipes it reads from, all the way up. Of an ingest: ``ingested`` are the
    files it read, ``changed_wells`` counts the wells whose treatment it changed.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = find_run(session, reference)
        graph = Lineage(f"run {run.id}")
        parents: list[Run] = []
        below, parent = _run_box(graph, run), run.parent
        _add_recipes(session, graph, run.recipe, below)
        while parent is not None:
            parents.append(parent)
            graph.link(_result_box(graph, parent), below)
            below = _run_box(graph, parent)
            _add_recipes(session, graph, parent.recipe, below)
            parent = parent.parent
        first = parents[-1] if parents else run
        if first.split is not None:
            split = first.split
            graph.link(graph.add(f"split {split.id}", "split", split.name, split.protocol), below)
        inputs: dict[int, Recipe] = {}
        level = list(run.recipe.inputs)
        while level:
            inputs |= {recipe.id: recipe for recipe in level}
            level = [up for recipe in level for up in recipe.inputs if up.id not in inputs]
        members = {} if run.split is None else {s.value: 0 for s in Subset}
        if run.split is not None:
            subsets = select(SplitMember.subset, func.count()).group_by(SplitMember.subset)
            counts = session.execute(subsets.where(SplitMember.split_id == run.split_id))
            members |= {Subset(s).value: n for s, n in counts}
        jobs = select(Job.status, func.count()).where(Job.run_id == run.id).group_by(Job.status)
        changed = wells_changed(Event.run_id == run.id).subquery()
        downstream = _downstream(session, runs=[run.id])
        record = {
            **_run(run, "ended_at"),
            "user": run.user_name,
            **_record(run, "host", "origin", "command", "code_version", "seed", "query", "error"),
            "split": run.split.name if run.split else None,
            "changed_wells": session.scalar(select(func.count()).select_from(changed)) or 0,
            "split_counts": members,
            "jobs": {Status(status).value: number for status, number in session.execute(jobs)},
            **_record(run, "result", "environment"),
            "recipe": _record(run.recipe, *RECIPE),
            "inputs": [_record(inputs[number], *RECIPE) for number in sorted(inputs)],
            "parents": [_run(item) for item in parents],
            "children": [_run(child) for child in run.children],
            "ingested": [
                _record(file, "name", "layout", "sha256")
                | {
                    name: getattr(file, f"n_{name}")
                    for name in ("rows", "created", "updated", "unchanged", "refused")
                }
                for file in run.files
            ],
            "artifacts": [
                _record(file, "kind", "path", "sha256", "size_bytes")
                for file in sorted(run.artifacts, key=lambda file: file.id)
            ],
            "downstream": downstream,
        }
        for child in run.children[: 2 * MOST_BOXES]:
            graph.link(_result_box(graph, run), _run_box(graph, child, child.status.value))
        for file in run.files[: 2 * MOST_BOXES]:
            table = graph.add(f"table {file.sha256}", "table", file.name, _short(file.sha256))
            graph.link(table, graph.subject)
        if run.stage is Stage.PREDICT and run.result:
            lines = [f"{run.result.get(what, 0):,} {what} labelled" for what in ("images", "cells")]
            graph.link(graph.subject, graph.add("labels", "label", *lines))
        own = [item for item in downstream if not item["what"].endswith(" runs")]
        _add_downstream(graph, graph.subject, own)
        return Audit("run", f"Run {run.id}: {run.stage.value}", record, graph)


def _run_box(graph: Lineage, run: Run, *lines: str) -> str:
    when = f"run {run.id}, {run.started_at:%Y-%m-%d}"
    more = lines or (f"by {run.user_name}", run.code_version)
    return graph.add(f"run {run.id}", run.stage.value, when, *more)


def _result_box(graph: Lineage, run: Run) -> str:
    """The checkpoint of a run, which is drawn below it; of a run without one the run."""
    box = f"run {run.id}"
    for file in run.artifacts:
        if file.kind is ArtifactKind.CHECKPOINT:
            checkpoint = graph.add(f"checkpoint {file.sha256}", "checkpoint", _short(file.sha256))
            graph.link(box, checkpoint)
            return checkpoint
    return box


def _add_recipes(session: Session, graph: Lineage, recipe: Recipe, target: str) -> None:
    """Add the recipes of segmentations, measurements and flags that a recipe reads from."""
    if recipe.stage is Stage.SEGMENT and recipe.weights_sha256:
        model, digest = str(recipe.parameters.get("model", "")), recipe.weights_sha256
        graph.link(graph.add(f"weights {digest}", "weights", model, _short(digest)), target)
    names = {Stage.SEGMENT: "segmentation", Stage.MEASURE: "measurement", Stage.QC: "qc"}
    for source in sorted(recipe.inputs, key=lambda item: item.id):
        if source.stage not in names:
            continue
        lines = [f"recipe {source.id} ({source.fingerprint[:SHORT]})"]
        if source.stage is Stage.SEGMENT:
            images = select(func.count()).where(Segmentation.recipe_id == source.id)
            lines.append(f"{session.scalar(images) or 0:,} images")
        box = graph.add(f"recipe {source.id}", names[source.stage], *lines)
        graph.link(box, target)
        _add_recipes(session, graph, source, box)


# What came of something


def _came(
    what: str, count: int | None, runs: Iterable[int] = (), names: Iterable[str] = ()
) -> list[Record]:
    """One record, or none where there is nothing."""
    found = {"what": what, "count": count or 0, "runs": sorted(runs), "names": list(names)}
    return [found] if count else []


def _downstream_of_images(session: Session, images: Select[int]) -> list[Record]:
    """What came of some images, a query of their ids."""
    segmented = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(segmented.where(Segmentation.image_id.in_(images))).one()
    by = select(Segmentation.run_id).where(Segmentation.image_id.in_(images)).distinct()
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images))
    measured = select(CellFeatures.run_id, func.count()).group_by(CellFeatures.run_id)
    by_measure = session.execute(measured.where(CellFeatures.cell_id.in_(cells))).all()
    sets = select(FeatureSet.name, Job.run_id).distinct()
    sets = sets.join(FeatureSet, FeatureSet.recipe_id == Job.recipe_id)
    in_sets = session.execute(sets.where(Job.image_id.in_(images), Job.status == Status.DONE)).all()
    set_names = sorted({name for name, _ in in_sets})
    named = select(Split.id, Split.name).join(SplitMember, SplitMember.split_id == Split.id)
    named = named.where(SplitMember.image_id.in_(images)).distinct().order_by(Split.id)
    splits = session.execute(named).all()
    trained = select(Run.id).where(Run.split_id.in_([split_id for split_id, _ in splits]))
    trainings = session.scalars(trained.where(Run.stage == Stage.TRAIN)).all()
    labelled = select(Prediction.run_id, func.count()).group_by(Prediction.run_id)
    labelled = labelled.where(Prediction.cell_id.in_(cells), Prediction.rank == 1)
    by_predict = session.execute(labelled).all()
    return [
        *_came("segmentations", n_found, session.scalars(by)),
        *_came("cells", n_cells),
        *_came("measured cells", sum(n for _, n in by_measure), (run for run, _ in by_measure)),
        *_came("feature sets", len(set_names), {run for _, run in in_sets}, set_names),
        *_came("splits", len(splits), names=[name for _, name in splits]),
        *_came("trainings on these splits", len(trainings), trainings),
        *_came("labelled cells", sum(n for _, n in by_predict), (run for run, _ in by_predict)),
    ]


def _downstream(
    session: Session, *, runs: Iterable[int] = (), recipes: Iterable[int] = ()
) -> list[Record]:
    """What came of runs, or of recipes and of all recipes that read what they wrote."""
    run_ids, below = list(runs), set(recipes)
    level = set(below)
    while level:
        query = select(RecipeInput.recipe_id).where(RecipeInput.input_id.in_(level))
        level = set(session.scalars(query)) - below
        below |= level
    segmented = select(func.count(), func.sum(Segmentation.n_cells))
    made = Segmentation.recipe_id.in_(below) if below else Segmentation.run_id.in_(run_ids)
    n_found, n_cells = session.execute(segmented.where(made)).one()
    files = select(func.count(), func.sum(FeatureFile.n_rows))
    n_files, n_rows = session.execute(files.where(FeatureFile.run_id.in_(run_ids))).one()
    named = select(FeatureSet.name).where(FeatureSet.recipe_id.in_(below)).order_by(FeatureSet.id)
    sets = session.scalars(named).all()
    changed = select(func.count()).select_from(wells_changed(Event.run_id.in_(run_ids)).subquery())
    by_stage: dict[Stage, list[int]] = defaultdict(list)
    later = Run.recipe_id.in_(below) if below else Run.parent_id.in_(run_ids)
    for stage, run_id in session.execute(select(Run.stage, Run.id).where(later).order_by(Run.id)):
        by_stage[Stage(stage)].append(run_id)
    labelled = select(func.count()).where(Job.run_id.in_(by_stage.get(Stage.PREDICT, [])))
    return [
        *_came("segmentations", n_found),
        *_came("cells", n_cells),
        *_came("feature sets", len(sets), names=sets),
        *_came("feature files", n_files),
        *_came("cells in feature files", n_rows),
        *_came("wells with another treatment", session.scalar(changed)),
        *(_came(f"{stage.value} runs", len(ids), ids)[0] for stage, ids in by_stage.items()),
        *_came("images labelled", session.scalar(labelled.where(Job.status == Status.DONE))),
    ]


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


def _add_downstream(graph: Lineage, source: str, found: Sequence[Record]) -> None:
    for item in found:
        what = item["what"]
        kind = next((kind for part, kind in BOX_KINDS.items() if part in what), "result")
        graph.link(source, graph.add(f"{source}: {what}", kind, *_counted(item)))


def _counted(item: Record) -> tuple[str, str]:
    names = ", ".join(item["names"]) or ", ".join(f"run {run}" for run in item["runs"])
    what = re.sub(r"s\b", "", item["what"], count=1) if item["count"] == 1 else item["what"]
    return f"{item['count']:,} {what}", names


def _short(digest: str | None) -> str | None:
    return digest[:SHORT] if digest else None


# Files

LISTED = 8
MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""
WROTE, IMAGE_FILE, TABLE, WEIGHTS = "artifact", "image file", "ingested table", "weights"

File = tuple[str, Any, str]
"""Which table knows a file, its row there, and the sha256. A recipe knows the weights it uses."""


def audit_artifact(workspace: Workspace, text: str) -> Audit:
    """Return what a file is to the store, and what came of it.

    ``text``: the path or name of a file that the store wrote or read, the first digits (6 at
    least) of its sha256, the id of an artifact, or the path of a file on this machine, which is
    hashed and looked up by its bytes.

    Raises:
        UnknownNameError: the store knows no such file.
        UserInputError: several files have that name; they are listed.
    """
    path = _on_disk(text)
    digest = None if path is None else sha256_of(path)
    text = readable(text)
    with workspace.database.read() as session:
        found = _files_named(session, text) if digest is None else _files_by(session, digest)
        different = {file[2]: file for file in found}
        if not found:
            raise _unknown_file(session, text, digest)
        if len(different) > 1:
            shown = [f"{_kind(file)} {_name(file)} ({d[:12]})" for d, file in different.items()]
            more = ", ..." if len(shown) > LISTED else ""
            raise UserInputError(
                f"{text!r} names several files: {', '.join(shown[:LISTED])}{more}. "
                "Name one by the start of its sha256."
            )
        (sha256,) = different
        # One row of each kind; of image files each, for they are of several images.
        files: dict[tuple[str, int | None], File] = {}
        for file in _files_by(session, sha256):
            files.setdefault((_kind(file), file[1].id if file[0] == IMAGE_FILE else None), file)
        known = [_known(session, file) for file in files.values()]
        graph = Lineage("bytes")
        graph.add("bytes", "file", known[0]["name"], _short(sha256))
        for (source, _, _), item in zip(files.values(), known, strict=True):
            key = f"known {item['kind']} {item['key']}"
            graph.add(key, item["kind"], *item["about"][:2])
            for run in item["runs"][:MOST_BOXES]:
                box = _run_box(graph, session.get_one(Run, run["run_id"]))
                graph.link(*((box, "bytes") if source == WROTE else ("bytes", box)))
            graph.link("bytes", key)
            _add_downstream(graph, key, item["downstream"])
        record = {
            "asked": text,
            "sha256": sha256,
            "hashed": None if path is None else str(path),
            "known": known,
        }
        return Audit("artifact", f"File {known[0]['name']}", record, graph)


def _on_disk(text: str) -> Path | None:
    try:
        path = Path(text)
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _unknown_file(session: Session, text: str, digest: str | None) -> UnknownNameError:
    if digest is not None:
        files = _files_of_name(session, re.split(r"[/\\]", text)[-1])
        same = ", ".join(sha256[:12] for _, _, sha256 in files[:3])
        hint = f" A file of that name was known with sha256 {same}." if same else ""
        return UnknownNameError(
            f"The store knows no file with the bytes of {text} (sha256 {digest[:12]}).{hint}"
        )
    near = [
        *neighbours(session, ImageFile.name, text),
        *neighbours(session, IngestFile.name, text),
    ]
    hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    return UnknownNameError(
        f"The store knows no file {text!r}.{hint} A file is named by its path, its name, the "
        "id of an artifact, or the first 6 digits or more of its sha256."
    )


def _files_named(session: Session, text: str) -> list[File]:
    """The files that ``text`` may mean: by id, path, name, or the start of a sha256."""
    artifact = None
    if text.isdecimal() and len(text) < 19:
        artifact = session.get(Artifact, int(text))
    if artifact is None:
        artifact = session.scalars(select(Artifact).where(Artifact.path == text)).first()
    if artifact is not None:
        return [(WROTE, artifact, artifact.sha256)]
    name = re.split(r"[/\\]", text)[-1]
    found = _files_of_name(session, text) or _files_of_name(session, name)
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _files_by(session, start))


def _files_of_name(session: Session, name: str) -> list[File]:
    images = select(ImageFile).where(ImageFile.name == name, ImageFile.sha256.is_not(None))
    tables = select(IngestFile).where(IngestFile.name == name).order_by(IngestFile.id)
    return [
        *((IMAGE_FILE, row, row.sha256 or "") for row in session.scalars(images.limit(MOST))),
        *((TABLE, row, row.sha256) for row in session.scalars(tables.limit(MOST))),
    ]


def _files_by(session: Session, digits: str) -> list[File]:
    """The files by their sha256, or by its start."""
    sources: tuple[tuple[str, Any, Any], ...] = (
        (WROTE, Artifact, Artifact.sha256),
        (IMAGE_FILE, ImageFile, ImageFile.sha256),
        (TABLE, IngestFile, IngestFile.sha256),
        (WEIGHTS, Recipe, Recipe.weights_sha256),
    )
    found: list[File] = []
    for source, table, column in sources:
        named = column == digits if len(digits) == 64 else starts_with(column, digits)
        query = select(table, column).where(named).order_by(table.id).limit(MOST)
        found += [(source, row, digest) for row, digest in session.execute(query)]
    return found


def _kind(file: File) -> str:
    source, row, _ = file
    return str(row.kind.value) if source == WROTE else source


def _name(file: File) -> str:
    source, row, _ = file
    if source == WEIGHTS:
        named = row.parameters.get("model", row.parameters.get("weights"))
        return str(named or f"{row.stage.value} recipe {row.id}")
    return str(row.path.rpartition("/")[2] if source == WROTE else row.name)


def _known(session: Session, file: File) -> Record:
    """A file as one row knows it: what it is, where, of what, by which runs, and what came of it.

    ``key`` is the id of the row.
    """
    source, row, sha256 = file
    about: list[str] = []
    runs: set[int] = set()
    recipes: set[int] = set()
    images: Select[Any] | None = None
    if source == IMAGE_FILE:
        image = row.image
        well = f"{image.well.plate.barcode}/{image.well.name}"
        about = [f"channel {row.channel} of image {well}/{image.site} {image.core_name}"]
        images = select(Image.id).where(Image.id == image.id)
    elif source == TABLE:
        same = select(IngestFile).where(IngestFile.sha256 == sha256).order_by(IngestFile.id)
        for read in session.scalars(same):
            runs.add(read.run_id)
            about.append(
                f"run {read.run_id} read it as {read.layout}: {read.n_rows:,} rows, "
                f"{read.n_created:,} new, {read.n_updated:,} updated, "
                f"{read.n_unchanged:,} unchanged, {read.n_refused:,} refused"
            )
    elif source == WEIGHTS:
        using = select(Recipe).where(Recipe.weights_sha256 == sha256).order_by(Recipe.id)
        for recipe in session.scalars(using):
            recipes.add(recipe.id)
            runs.update(run.id for run in recipe.runs)
            short = recipe.fingerprint[:12]
            about.append(f"{recipe.stage.value} recipe {recipe.id} ({short}) uses it")
    else:
        runs = {run.id for run in row.runs}
        if row.kind in (ArtifactKind.MASK, ArtifactKind.FLOW):
            masks = row.kind is ArtifactKind.MASK
            column = Segmentation.mask_artifact_id if masks else Segmentation.flow_artifact_id
            found = session.scalars(select(Segmentation).where(column == row.id).limit(MOST)).all()
            runs.update(item.run_id for item in found)
            drawn = [item.image for item in found]
            about = [f"of image {i.well.plate.barcode}/{i.core_name}" for i in drawn]
            images = select(Image.id).where(Image.id.in_([image.id for image in drawn]))
        elif row.kind is ArtifactKind.FEATURES:
            parts = session.scalars(select(FeatureFile).where(FeatureFile.artifact_id == row.id))
            for part in parts:
                runs.add(part.run_id)
                recipes.add(part.feature_set.recipe_id)
                about.append(
                    f"of feature set {part.feature_set.name}: {part.n_rows:,} cells, "
                    f"ids {part.first_cell_id} to {part.last_cell_id}"
                )
    if images is not None:
        downstream = _downstream_of_images(session, images)
    elif recipes:
        downstream = _downstream(session, recipes=recipes)
    else:
        downstream = _downstream(session, runs=runs)
    if source == TABLE:
        relabelled = Image.well_id.in_(wells_changed(Event.run_id.in_(runs)))
        for item in _downstream_of_images(session, select(Image.id).where(relabelled)):
            downstream.append({**item, "what": f"{item['what']} of these wells"})
    by = select(Run).where(Run.id.in_(runs)).order_by(Run.id)
    return {
        "kind": _kind(file),
        "key": row.id,
        "name": _name(file),
        "path": row.path if source == WROTE else row.uri if source == IMAGE_FILE else None,
        "sha256": sha256,
        "size_bytes": None if source == WEIGHTS else row.size_bytes,
        "about": about,
        "runs": [_run(run) for run in session.scalars(by)],
        "downstream": downstream,
    }


# As text

WIDTH = 80
SHOWN = 20
"""Records of a list."""
GAP = "  "
WRAPPED = 20
"""Wider columns of a table are wrapped."""


def audit_text(audit: Audit) -> str:
    """Return the record of an audit as lines of 80 characters at most, where names allow it."""
    record = {name: value for name, value in audit.record.items() if name != "notes"}
    lines = [audit.title, *_lines(record, "")]
    for note in audit.record.get("notes", ()):
        lines += ["", *textwrap.wrap(note, WIDTH)]
    printable = ("".join(char if char.isprintable() else " " for char in line) for line in lines)
    return "\n".join(printable) + "\n"


def is_part(value: Any) -> bool:
    """Whether a value is a record, or a list of records."""
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _lines(record: Mapping[str, Any], margin: str) -> Iterable[str]:
    """Values, then the parts of a record, each below its name.

    The records of a list are a table if that fits, else one below the other, without what is
    unknown.
    """
    parts = {name: value for name, value in record.items() if is_part(value)}
    values = {k: v for k, v in record.items() if k not in parts and v not in ([], {})}
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        lead = f"{margin}{name.replace('_', ' '):<{width}}{GAP}"
        room = max(20, WIDTH - len(lead))
        for line in textwrap.wrap(shown(name, value), room, break_on_hyphens=False) or [""]:
            yield f"{lead}{line}".rstrip()
            lead = " " * len(lead)
    for name, part in parts.items():
        if not part:
            continue
        yield ""
        yield f"{margin}{name.replace('_', ' ')}"
        if isinstance(part, Mapping):
            yield from _lines(part, margin + GAP)
            continue
        rows = part[:SHOWN]
        cells = [[key.replace("_", " ") for key in rows[0]]]
        cells += [[shown(key, value) for key, value in row.items()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        nested = any(isinstance(value, list) and is_part(value) for value in rows[0].values())
        # A table if that fits, with its widest columns wrapped.
        wide = [width for width in widths if width > WRAPPED]
        fixed = sum(widths) - sum(wide) + len(GAP) * len(widths) + len(margin)
        room = (WIDTH - fixed) // max(1, len(wide))
        if not nested and fixed <= WIDTH and room >= (WRAPPED if wide else 0):
            widths = [min(width, room) if width > WRAPPED else width for width in widths]
            for row in cells:
                columns = (
                    textwrap.wrap(text, width, break_on_hyphens=False)
                    for text, width in zip(row, widths, strict=True)
                )
                for texts in zip_longest(*columns, fillvalue=""):
                    padded = (f"{GAP}{t:<{w}}" for t, w in zip(texts, widths, strict=True))
                    yield (margin + "".join(padded)).rstrip()
        else:
            for number, row in enumerate(rows):
                if number:
                    yield ""
                known = {
                    key: shown(key, value) if isinstance(value, Mapping) else value
                    for key, value in row.items()
                    if value is not None
                }
                yield from _lines(known, margin + GAP)
        if len(part) > SHOWN:
            yield f"{margin}{GAP}and {len(part) - SHOWN:,} more (all with --json)"


def shown(name: str, value: Any, *, digits: int = 12, most: int = 6) -> str:
    """Return a value as one line: ``digits`` of a sha256, ``most`` items of a list or record."""
    if isinstance(value, Mapping | list):
        if isinstance(value, Mapping):
            pairs = [(f"{key.replace('_', ' ')} ", key, item) for key, item in value.items()]
        else:
            pairs = [("", name, item) for item in value]
        texts = [
            lead + shown(key, item, digits=digits, most=most) for lead, key, item in pairs[:most]
        ]
        more = [f"and {len(pairs) - most} more"] if len(pairs) > most else []
        return ", ".join([*texts, *more]) or "-"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not name.endswith("id"):
        return f"{value:,}"
    text = str(value)
    if name.endswith(("sha256", "fingerprint", "checkpoints", "weights")):
        text = text[:digits]
    elif name.endswith("_at"):
        text = text[:19].replace("T", " ")
    return text
