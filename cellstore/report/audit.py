"""Where something comes from and what came of it: an image, a well, a cell, a run or a file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..db.fields import field_column, wells_changed
from ..enums import TARGET, ArtifactKind, Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import (
    RUN_WORDS,
    find_image,
    find_well,
    hex_start,
    looks_like_well,
    neighbours,
    readable,
    run_in,
    starts_with,
)
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


def audit_anything(workspace: Workspace, text: str) -> Audit:
    """Return the audit of what ``text`` names: a file on disk, a run, a well, an image, a file.

    Raises:
        UnknownNameError: it names nothing.
        UserInputError: it is a number, which may be that of anything; or several have that name.
    """
    word = readable(text)
    if word.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {word}" for kind in KINDS if kind != "well")
        raise UserInputError(f"{word} is the number of what? Say one of: {ways}.")
    if _on_disk(word) is not None:
        return audit_artifact(workspace, text)
    if word.lower().startswith(("#", "run ", *RUN_WORDS)):
        return audit_run(workspace, word)
    if looks_like_well(word):
        return audit_well(workspace, word)
    try:
        return audit_image(workspace, word)
    except UnknownNameError as unknown_image:
        try:
            return audit_artifact(workspace, word)
        except UnknownNameError:
            raise unknown_image from None


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
        recipe = found.recipe
        model = str(recipe.parameters.get("model") or recipe.parameters.get("imported") or "")
        when = f"run {found.run_id}, {found.created_at:%Y-%m-%d}"
        box = f"segmentation {found.id}"
        graph.add(box, "segmentation", when, f"{found.n_cells:,} cells", model)
        graph.link("image", box)
        if recipe.weights_sha256:
            weights = f"weights {recipe.weights_sha256}"
            graph.link(graph.add(weights, "weights", model, _short(recipe.weights_sha256)), box)
    downstream = _downstream_of_images(session, one)
    for item in downstream:
        if item["what"] in ("measured cells", "feature sets"):
            graph.add(item["what"], "measurement", *_counted(item))
            for found in image.segmentations:
                graph.link(f"segmentation {found.id}", item["what"])
    flag = ImageFlag
    flags = select(flag).join(Run, Run.id == flag.run_id)
    flags = flags.where(flag.image_id == image.id, Run.status == Status.DONE)
    record = {
        "image_id": image.id,
        "plate": well.plate.barcode,
        "well": well.name,
        "site": image.site,
        "plane": image.plane,
        "time_point": image.time_point,
        "core_name": image.core_name,
        "pixel_size": image.pixel_size,
        "content_sha256": image.content_sha256,
        "treatment": treatment.name if treatment else None,
        "target": treatment.target if treatment else None,
        "control": well.control.value if well.control else None,
        "missing_files": missing,
        "notes": notes,
        "treatment_history": history,
        "frozen_labels": frozen,
        "flags": [
            {
                "run_id": item.run_id,
                "reason": item.reason.value,
                "channel": item.channel or None,
                "value": item.value,
                "low": item.low,
                "high": item.high,
            }
            for item in session.scalars(flags.order_by(flag.run_id, flag.reason, flag.channel))
        ],
        "files": [
            {
                "channel": file.channel,
                "name": file.name,
                "uri": file.uri,
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
            }
            for file in image.files
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
        "id": found.id,
        "run_id": found.run_id,
        "recipe_id": found.recipe_id,
        "fingerprint": found.recipe.fingerprint,
        "weights_sha256": found.recipe.weights_sha256,
        "parameters": found.recipe.parameters,
        "made_at": found.created_at.isoformat(),
        "n_cells": found.n_cells,
        "diameter": found.diameter,
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
    """What each predict run said of an image, the oldest run first.

    ``winner`` is the label of the hard vote, ``soft_winner`` that of the summed probabilities;
    ``subset`` that of the image in the split (``outside``: in none), ``well_subsets`` all in which
    its well has images.
    """
    with open_questions(workspace, image=image.id) as questions:
        values = {"image": image.id}
        votes = {
            (row["run_id"], row["vote"]): row
            for row in questions.ask_ours(_VOTES, values).records()
        }
        labels = questions.ask_ours(_LABEL_VOTES, values).records()
        used = set(questions.ask_ours(_USED, values).rows())
        of_well = {(row["run_id"], row["subset"]) for row in questions.ask_ours(_OF_WELL).records()}
    found = []
    for run_id in sorted({number for number, _ in votes}):
        run = session.get_one(Run, run_id)
        split = run.split or (run.parent.split if run.parent else None)
        checkpoints = [
            file.sha256
            for file in (run.parent.artifacts if run.parent else ())
            if file.kind is ArtifactKind.CHECKPOINT
        ]
        hard, soft = votes[run_id, "hard"], votes[run_id, "soft"]
        own = [row for row in labels if row["run_id"] == run_id]
        well_subsets = [s.value for s in Subset if (run_id, s.value) in of_well]
        winner, seen = hard["winner"], Subset.TRAIN.value in well_subsets
        correct = hard["correct"]
        segmentations = [item for item in image.segmentations if (run_id, item.id) in used]
        found.append(
            {
                "run_id": run_id,
                "started_at": run.started_at.isoformat(),
                "user": run.user_name,
                "host": run.host,
                "code_version": run.code_version,
                "train_run_id": run.parent_id,
                "checkpoints": checkpoints,
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
                "winner": winner,
                "soft_winner": soft["winner"],
                "tie": hard["tie"],
                "truth": hard["truth"],
                "correct": correct,
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
        truth = {True: "right", False: "wrong", None: "truth unknown"}[correct]
        knows = "well was in training" if seen else "well was not in training"
        most = f"{own[0]['cells']} of {hard['n_cells']} cells"
        graph.link(box, graph.add(f"label {run_id}", "label", winner, most, truth, knows))
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
        old: Record | None
        new: Record | None
        if event.table_name == "perturbations":
            present = _treatment(well.treatment) or {}
            old, new = ({**present, "target": item.get("target")} for item in values)
        elif "treatment_id" in values[1]:
            old, new = (
                None
                if (number := item["treatment_id"]) is None
                # What it is called now; other columns that were corrected are events themselves.
                else _treatment(session.get_one(Treatment, number))
                for item in values
            )
        else:  # another control
            continue
        history.append(
            {
                "changed_at": event.created_at.isoformat(),
                "run_id": event.run_id,
                "file": event.file,
                "line": event.line,
                "old": old,
                "new": new,
            }
        )
    for number, item in enumerate(history[-MOST_BOXES:]):
        line = "" if item["line"] is None else f"line {item['line']}"
        when = f"run {item['run_id']}, {item['changed_at'][:10]}"
        graph.link(graph.add(f"table {number}", "table", item["file"], line, when), box)
    return history, box


def _label_now(session: Session, well: Well, label_field: str) -> str | None:
    query = select(field_column(label_field)).select_from(Well).join(Plate).outerjoin(Treatment)
    return session.scalar(query.where(Well.id == well.id))


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
        key = "target" if label_field == TARGET else "name"
        now = _label_now(session, well, label_field)
        changes = [
            item for item in history if (item["old"] or {}).get(key) != (item["new"] or {}).get(key)
        ]
        since = None
        if now != label:
            text = f"label in split {split}: {label}; the well now has: {now or 'none'}"
            if changes:
                since = {name: changes[-1][name] for name in ("run_id", "file", "line")}
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
            "control": well.control.value if well.control else None,
            "treatment": _treatment(well.treatment),
            "images": ids,
            "notes": notes,
            "treatment_history": history,
            "frozen_labels": frozen,
            "downstream": downstream,
        }
        return Audit("well", f"Well {name}", record, graph)


def audit_cell(workspace: Workspace, cell_id: int) -> Audit:
    """Return a cell, its masks, its measurements and what every run said about it.

    ``box`` is min row, min col, max row, max col (half open) in pixels; it and ``centroid`` are
    null where another tool found the cell and does not say.

    Raises:
        UnknownNameError: there is no such cell.
    """
    with workspace.database.read() as session:
        cell = session.get(Cell, cell_id)
        if cell is None:
            raise UnknownNameError(
                f"There is no cell {cell_id}. See which there are with: "
                "cellstore sql 'FROM cells LIMIT 5'"
            )
        image = cell.segmentation.image
        name = f"{image.well.plate.barcode}/{image.core_name}"
        graph = _image(workspace, session, image).lineage
        number = f"object {cell.object_number}"
        graph.subject = graph.add("cell", "cell", f"cell {cell.id}", number)
        graph.link(f"segmentation {cell.segmentation_id}", "cell")
        for choice in cell.predictions:
            if choice.rank == 1:
                run = f"run {choice.run_id}"
                text = f"{choice.label.value}, {choice.probability:.2f}"
                own = graph.add(f"choice {choice.run_id}", "label", text, "this cell alone")
                graph.link("cell", run, own)
        box = [cell.min_row, cell.min_col, cell.max_row, cell.max_col]
        centroid = [cell.centroid_row, cell.centroid_col]
        keys = ("cell_id", "recipe_id", "run_id")
        measured = [
            column.name for column in CellFeatures.__table__.columns if column.name not in keys
        ]
        flags = select(CellFlag).join(Run, Run.id == CellFlag.run_id)
        flags = flags.where(CellFlag.cell_id == cell.id, Run.status == Status.DONE)
        record = {
            "cell_id": cell.id,
            "image": name,
            "image_id": image.id,
            "object_number": cell.object_number,
            "box": None if None in box else box,
            "centroid": None if None in centroid else centroid,
            "excluded": cell.excluded,
            "flags": [
                {"run_id": item.run_id, "reason": item.reason.value, "value": item.value}
                for item in session.scalars(flags.order_by(CellFlag.run_id, CellFlag.reason))
            ],
            "segmentation": _segmentation(cell.segmentation),
            "features": {
                f"recipe {row.recipe_id}": {key: getattr(row, key) for key in measured}
                for row in sorted(cell.features, key=lambda row: row.recipe_id)
            },
            "choices": [
                {
                    "run_id": choice.run_id,
                    "rank": choice.rank,
                    "label": choice.label.value,
                    "probability": choice.probability,
                }
                for choice in cell.predictions
            ],
        }
        return Audit("cell", f"Cell {cell.id} of {name}", record, graph)


def audit_run(workspace: Workspace, reference: str) -> Audit:
    """Return a run (a number, or ``latest``): what it did, from what, and what came of it.

    ``inputs`` are the recipes it reads from, all the way up. Of an ingest: ``ingested`` are the
    files it read, ``changed_wells`` counts the wells whose treatment it changed.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = run_in(session, reference)
        graph = Lineage(f"run {run.id}")
        _add_run(session, graph, run)
        parents, parent = [], run.parent
        while parent is not None:
            parents.append(_run(parent))
            parent = parent.parent
        subsets = select(SplitMember.subset, func.count()).group_by(SplitMember.subset)
        subsets = subsets.where(SplitMember.split_id == run.split_id)
        members = {} if run.split is None else {s.value: 0 for s in Subset}
        if run.split is not None:
            members |= {Subset(s).value: n for s, n in session.execute(subsets)}
        jobs = select(Job.status, func.count()).where(Job.run_id == run.id).group_by(Job.status)
        changed = wells_changed(Event.run_id == run.id).subquery()
        downstream = _downstream_of_runs(session, [run.id])
        record = {
            **_run(run),
            "ended_at": None if run.ended_at is None else run.ended_at.isoformat(),
            "user": run.user_name,
            "host": run.host,
            "origin": run.origin.value,
            "command": run.command,
            "code_version": run.code_version,
            "seed": run.seed,
            "query": run.query,
            "error": run.error,
            "split": run.split.name if run.split else None,
            "changed_wells": session.scalar(select(func.count()).select_from(changed)) or 0,
            "split_counts": members,
            "jobs": {Status(status).value: number for status, number in session.execute(jobs)},
            "result": run.result,
            "environment": run.environment,
            "recipe": _recipe(run.recipe),
            "inputs": [_recipe(item) for item in _recipes_above(session, run.recipe)],
            "parents": parents,
            "children": [_run(child) for child in run.children],
            "ingested": [
                {
                    "name": file.name,
                    "layout": file.layout,
                    "sha256": file.sha256,
                    "rows": file.n_rows,
                    "created": file.n_created,
                    "updated": file.n_updated,
                    "unchanged": file.n_unchanged,
                    "refused": file.n_refused,
                }
                for file in run.files
            ],
            "artifacts": [
                {
                    "kind": file.kind.value,
                    "path": file.path,
                    "sha256": file.sha256,
                    "size_bytes": file.size_bytes,
                }
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


def _run(run: Run) -> Record:
    return {
        "run_id": run.id,
        "stage": run.stage.value,
        "status": run.status.value,
        "started_at": run.started_at.isoformat(),
    }


def _recipe(recipe: Recipe) -> Record:
    return {
        "id": recipe.id,
        "stage": recipe.stage.value,
        "version": recipe.version,
        "fingerprint": recipe.fingerprint,
        "weights_sha256": recipe.weights_sha256,
        "parameters": recipe.parameters,
    }


def _recipes_above(session: Session, recipe: Recipe) -> list[Recipe]:
    """The recipes that a recipe reads from, all the way up, by id."""
    above = (
        select(RecipeInput.input_id).where(RecipeInput.recipe_id == recipe.id).cte(recursive=True)
    )
    more = select(RecipeInput.input_id).join(above, RecipeInput.recipe_id == above.c.input_id)
    every = above.union(more)
    query = select(Recipe).where(Recipe.id.in_(select(every.c.input_id))).order_by(Recipe.id)
    return list(session.scalars(query))


def _add_run(session: Session, graph: Lineage, run: Run) -> None:
    """Add a run and all that led to it."""
    box = _run_box(graph, run)
    if run.parent is not None:
        _add_run(session, graph, run.parent)
        graph.link(_result_box(graph, run.parent), box)
    elif run.split is not None:
        split = graph.add(f"split {run.split_id}", "split", run.split.name, run.split.protocol)
        graph.link(split, box)
    _add_recipes(session, graph, run.recipe, box)


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
) -> Record:
    return {"what": what, "count": count or 0, "runs": sorted(runs), "names": list(names)}


def _some(found: Iterable[Record]) -> list[Record]:
    return [item for item in found if item["count"]]


def _downstream_of_images(session: Session, images: Select[int]) -> list[Record]:
    """What came of some images, a query of their ids."""
    segmented = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(segmented.where(Segmentation.image_id.in_(images))).one()
    by = select(Segmentation.run_id).where(Segmentation.image_id.in_(images)).distinct()
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images))
    measured = select(CellFeatures.run_id, func.count()).group_by(CellFeatures.run_id)
    by_measure = session.execute(measured.where(CellFeatures.cell_id.in_(cells))).all()
    sets = (
        select(FeatureSet.name, Job.run_id)
        .join(FeatureSet, FeatureSet.recipe_id == Job.recipe_id)
        .where(Job.image_id.in_(images), Job.status == Status.DONE)
        .distinct()
    )
    in_sets = session.execute(sets).all()
    set_names = sorted({name for name, _ in in_sets})
    named = select(Split.id, Split.name).join(SplitMember, SplitMember.split_id == Split.id)
    named = named.where(SplitMember.image_id.in_(images)).distinct().order_by(Split.id)
    splits = session.execute(named).all()
    trained = select(Run.id).where(Run.split_id.in_([split_id for split_id, _ in splits]))
    trainings = session.scalars(trained.where(Run.stage == Stage.TRAIN)).all()
    labelled = select(Prediction.run_id, func.count()).group_by(Prediction.run_id)
    labelled = labelled.where(Prediction.cell_id.in_(cells), Prediction.rank == 1)
    by_predict = session.execute(labelled).all()
    return _some(
        [
            _came("segmentations", n_found, session.scalars(by)),
            _came("cells", n_cells),
            _came("measured cells", sum(n for _, n in by_measure), (run for run, _ in by_measure)),
            _came("feature sets", len(set_names), {run for _, run in in_sets}, set_names),
            _came("splits", len(splits), names=[name for _, name in splits]),
            _came("trainings on these splits", len(trainings), trainings),
            _came("labelled cells", sum(n for _, n in by_predict), (run for run, _ in by_predict)),
        ]
    )


def _downstream_of_recipes(session: Session, recipe_ids: Collection[int]) -> list[Record]:
    """What came of some recipes, and of those that read what they wrote."""
    below = set(recipe_ids)
    level = set(recipe_ids)
    while level:
        query = select(RecipeInput.recipe_id).where(RecipeInput.input_id.in_(level))
        level = set(session.scalars(query)) - below
        below |= level
    by_stage: dict[Stage, list[int]] = defaultdict(list)
    runs = select(Run.stage, Run.id).where(Run.recipe_id.in_(below)).order_by(Run.id)
    for stage, run_id in session.execute(runs):
        by_stage[Stage(stage)].append(run_id)
    segmented = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(segmented.where(Segmentation.recipe_id.in_(below))).one()
    named = select(FeatureSet.name).where(FeatureSet.recipe_id.in_(below)).order_by(FeatureSet.id)
    sets = session.scalars(named).all()
    stages = (Stage.SPLIT, Stage.TRAIN, Stage.PREDICT)
    return _some(
        [
            _came("segmentations", n_found, by_stage[Stage.SEGMENT]),
            _came("cells", n_cells),
            _came("feature sets", len(sets), names=sets),
            *(_came(f"{s.value} runs", len(by_stage[s]), by_stage[s]) for s in stages),
            _came("images labelled", _images_labelled(session, by_stage[Stage.PREDICT])),
        ]
    )


def _downstream_of_runs(session: Session, run_ids: Collection[int]) -> list[Record]:
    """What runs made themselves, and what relies on their results."""
    segmented = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(segmented.where(Segmentation.run_id.in_(run_ids))).one()
    files = select(func.count(), func.sum(FeatureFile.n_rows))
    n_files, n_rows = session.execute(files.where(FeatureFile.run_id.in_(run_ids))).one()
    changed = wells_changed(Event.run_id.in_(run_ids)).subquery()
    wells = select(func.count()).select_from(changed)
    by_stage: dict[Stage, list[int]] = defaultdict(list)
    children = select(Run.stage, Run.id).where(Run.parent_id.in_(run_ids)).order_by(Run.id)
    for stage, run_id in session.execute(children):
        by_stage[Stage(stage)].append(run_id)
    return _some(
        [
            _came("segmentations", n_found),
            _came("cells", n_cells),
            _came("feature files", n_files),
            _came("cells in feature files", n_rows),
            _came("wells with another treatment", session.scalar(wells)),
            *(_came(f"{stage.value} runs", len(ids), ids) for stage, ids in by_stage.items()),
            _came("images labelled", _images_labelled(session, by_stage[Stage.PREDICT])),
        ]
    )


def _images_labelled(session: Session, runs: Collection[int]) -> int:
    query = select(func.count()).where(Job.run_id.in_(runs), Job.status == Status.DONE)
    return session.scalar(query) or 0


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


def _add_downstream(graph: Lineage, source: str, found: Sequence[Record]) -> None:
    for item in found:
        what = item["what"]
        kind = next((kind for word, kind in BOX_KINDS.items() if word in what), "result")
        graph.link(source, graph.add(f"{source}: {what}", kind, *_counted(item)))


def _counted(item: Record) -> tuple[str, str]:
    names = ", ".join(item["names"]) or ", ".join(f"run {run}" for run in item["runs"])
    return f"{item['count']:,} {item['what']}", names


def _short(digest: str | None) -> str | None:
    return digest[:SHORT] if digest else None


# Files

LISTED = 8
MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""
IMAGE_FILE, TABLE, WEIGHTS = "image file", "ingested table", "weights"

FileRow = Artifact | ImageFile | IngestFile | Recipe
"""A row that knows a file; a recipe knows that of the weights it began from."""


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
        found = _rows_named(session, text) if digest is None else _rows_by(session, digest)
        different = {_sha256(row): row for row in found}
        if not found:
            raise _unknown_file(session, text, digest)
        if len(different) > 1:
            shown = [f"{_kind(row)} {_name(row)} ({d[:12]})" for d, row in different.items()]
            more = ", ..." if len(shown) > LISTED else ""
            raise UserInputError(
                f"{text!r} names several files: {', '.join(shown[:LISTED])}{more}. "
                "Name one by the start of its sha256."
            )
        (sha256,) = different
        # One row of each kind; of image files each, for they are of several images.
        rows = {
            (_kind(row), row.id if isinstance(row, ImageFile) else None): row
            for row in reversed(_rows_by(session, sha256))
        }
        known = [_known(session, row) for row in reversed(rows.values())]
        graph = Lineage("bytes")
        graph.add("bytes", "file", known[0]["name"], _short(sha256))
        kinds = {kind.value for kind in ArtifactKind}
        for item in known:
            key = f"known {item['kind']} {item['key']}"
            graph.add(key, item["kind"], *item["about"][:2])
            for run in item["runs"][:MOST_BOXES]:
                box = _run_box(graph, session.get_one(Run, run["run_id"]))
                graph.link(*((box, "bytes") if item["kind"] in kinds else ("bytes", box)))
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
        same = [_sha256(row)[:12] for row in _rows_of_name(session, re.split(r"[/\\]", text)[-1])]
        hint = f" A file of that name was known with sha256 {', '.join(same[:3])}." if same else ""
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


def _rows_named(session: Session, text: str) -> list[FileRow]:
    """The rows that ``text`` may mean: by id, path, name, or the start of a sha256."""
    found: list[FileRow] = []
    if text.isdecimal() and len(text) < 19:
        found += session.scalars(select(Artifact).where(Artifact.id == int(text)))
    found = found or list(session.scalars(select(Artifact).where(Artifact.path == text)))
    name = re.split(r"[/\\]", text)[-1]
    found = found or _rows_of_name(session, text) or _rows_of_name(session, name)
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _rows_by(session, start))


def _rows_of_name(session: Session, name: str) -> list[FileRow]:
    images = select(ImageFile).where(ImageFile.name == name, ImageFile.sha256.is_not(None))
    tables = select(IngestFile).where(IngestFile.name == name).order_by(IngestFile.id)
    return [*session.scalars(images.limit(MOST)), *session.scalars(tables.limit(MOST))]


def _rows_by(session: Session, digits: str) -> list[FileRow]:
    """The rows of files by their sha256, or by its start."""

    def has(column: Any) -> ColumnElement[bool]:
        same: ColumnElement[bool] = column == digits
        return same if len(digits) == 64 else starts_with(column, digits)

    queries: tuple[Select[Any], ...] = (
        select(Artifact).where(has(Artifact.sha256)),
        select(ImageFile).where(has(ImageFile.sha256)),
        select(IngestFile).where(has(IngestFile.sha256)).order_by(IngestFile.id),
        select(Recipe).where(has(Recipe.weights_sha256)).order_by(Recipe.id),
    )
    return [row for query in queries for row in session.scalars(query.limit(MOST))]


def _kind(row: FileRow) -> str:
    if isinstance(row, Artifact):
        return row.kind.value
    return {ImageFile: IMAGE_FILE, IngestFile: TABLE, Recipe: WEIGHTS}[type(row)]


def _sha256(row: FileRow) -> str:
    return (row.weights_sha256 if isinstance(row, Recipe) else row.sha256) or ""


def _name(row: FileRow) -> str:
    if isinstance(row, Artifact):
        return row.path.rpartition("/")[2]
    if isinstance(row, Recipe):
        named = row.parameters.get("model", row.parameters.get("weights"))
        return str(named or f"{row.stage.value} recipe {row.id}")
    return row.name


def _known(session: Session, row: FileRow) -> Record:
    """A file as one row knows it: what it is, where, of what, by which runs, and what came of it.

    ``key`` is the id of the row.
    """
    about: list[str] = []
    runs: set[int] = set()
    path = row.uri if isinstance(row, ImageFile) else None
    if isinstance(row, ImageFile):
        image = row.image
        well = f"{image.well.plate.barcode}/{image.well.name}"
        about = [f"channel {row.channel} of image {well}/{image.site} {image.core_name}"]
        downstream = _downstream_of_images(session, select(Image.id).where(Image.id == image.id))
    elif isinstance(row, IngestFile):
        same = select(IngestFile).where(IngestFile.sha256 == row.sha256).order_by(IngestFile.id)
        for file in session.scalars(same):
            runs.add(file.run_id)
            about.append(
                f"run {file.run_id} read it as {file.layout}: {file.n_rows:,} rows, "
                f"{file.n_created:,} new, {file.n_updated:,} updated, "
                f"{file.n_unchanged:,} unchanged, {file.n_refused:,} refused"
            )
        relabelled = select(Image.id).where(
            Image.well_id.in_(wells_changed(Event.run_id.in_(runs)))
        )
        downstream = _downstream_of_runs(session, runs)
        for item in _downstream_of_images(session, relabelled):
            downstream.append({**item, "what": f"{item['what']} of these wells"})
    elif isinstance(row, Recipe):
        same_weights = select(Recipe).where(Recipe.weights_sha256 == row.weights_sha256)
        recipes = session.scalars(same_weights.order_by(Recipe.id)).all()
        for recipe in recipes:
            runs.update(run.id for run in recipe.runs)
            short = recipe.fingerprint[:12]
            about.append(f"{recipe.stage.value} recipe {recipe.id} ({short}) uses it")
        downstream = _downstream_of_recipes(session, [recipe.id for recipe in recipes])
    else:
        path = row.path
        runs = {run.id for run in row.runs}
        if row.kind in (ArtifactKind.MASK, ArtifactKind.FLOW):
            masks = row.kind is ArtifactKind.MASK
            column = Segmentation.mask_artifact_id if masks else Segmentation.flow_artifact_id
            found = session.scalars(select(Segmentation).where(column == row.id).limit(MOST)).all()
            runs.update(item.run_id for item in found)
            images = [item.image for item in found]
            about = [f"of image {i.well.plate.barcode}/{i.core_name}" for i in images]
            ids = select(Image.id).where(Image.id.in_([image.id for image in images]))
            downstream = _downstream_of_images(session, ids)
        elif row.kind is ArtifactKind.FEATURES:
            parts = session.scalars(select(FeatureFile).where(FeatureFile.artifact_id == row.id))
            recipe_ids = []
            for part in parts:
                runs.add(part.run_id)
                recipe_ids.append(part.feature_set.recipe_id)
                about.append(
                    f"of feature set {part.feature_set.name}: {part.n_rows:,} cells, "
                    f"ids {part.first_cell_id} to {part.last_cell_id}"
                )
            downstream = _downstream_of_recipes(session, recipe_ids)
        else:
            downstream = _downstream_of_runs(session, runs)
    by = select(Run).where(Run.id.in_(runs)).order_by(Run.id)
    return {
        "kind": _kind(row),
        "key": row.id,
        "name": _name(row),
        "path": path,
        "sha256": _sha256(row),
        "size_bytes": None if isinstance(row, Recipe) else row.size_bytes,
        "about": about,
        "runs": [_run(run) for run in session.scalars(by)],
        "downstream": downstream,
    }
