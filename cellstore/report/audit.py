"""The history of an image, a well, a cell, a run or a file: what it comes from, what came of it.

An audit is a record: values, and lists of rows, each row of the same keys. ``audit --json`` prints
it, the command line shows it as text, and ``lineage_page`` draws it: all three from these rows.
The tables are read as such. Their classes would take longer to load than an audit takes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Numeric,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..db.fields import field_column, wells_changed
from ..enums import (
    PERTURBATION,
    TARGET,
    TREATMENT,
    ArtifactKind,
    ExclusionSource,
    Origin,
    Stage,
    Status,
    Subset,
)
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import (
    channels_now,
    find_cell,
    find_image,
    find_plate,
    find_well,
    hex_start,
    looks_like_well,
    neighbours,
    readable,
    starts_with,
)
from ..jobs.run_names import RUN_WORDS, find_named_run
from ..jobs.workspace import Workspace
from ..models import EXCLUSIONS, METADATA
from ..query.exclusions import cell_counts, image_counts, why_excluded

T = METADATA.tables
artifacts, cell_flags, cells = (T[name] for name in ("artifacts", "cell_flags", "cells"))
events, features, folders = (T[name] for name in ("events", "features", "folders"))
feature_files, feature_sets = (T[name] for name in ("feature_files", "feature_sets"))
image_files, image_flags, images = (T[name] for name in ("image_files", "image_flags", "images"))
ingest_files, jobs, labels = (T[name] for name in ("ingest_files", "jobs", "labels"))
perturbations, plates = (T[name] for name in ("perturbations", "plates"))
predictions, recipe_inputs = (T[name] for name in ("predictions", "recipe_inputs"))
image_predictions = T["image_predictions"]
recipes, run_artifacts, runs = (T[name] for name in ("recipes", "run_artifacts", "runs"))
segmentations, split_members = (T[name] for name in ("segmentations", "split_members"))
splits, treatment_parts = (T[name] for name in ("splits", "treatment_parts"))
treatments, wells = (T[name] for name in ("treatments", "wells"))

KINDS = ("plate", "well", "image", "cell", "run", "artifact")

EXACT = 1e12
"""Probabilities times this are added as whole numbers."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What the store knows of one thing, as a record; times are ISO 8601 in UTC.

    ``image``: of a cell the audit of its image, which the picture shows with it.
    """

    kind: str
    title: str
    record: Record
    image: Audit | None = None


def audit(workspace: Workspace, text: str, kind: str | None = None) -> Audit:
    """Return the audit of what ``text`` names; without a ``kind``, of whatever has that name.

    See ``cellstore audit --help`` for the names, docs/provenance.md for the keys of the record.

    Raises:
        UnknownNameError: nothing has that name.
        UserInputError: it is a number without a kind; or several things have that name.
    """
    name = readable(text)
    with workspace.database.read() as session:
        if kind is None:
            kind = _kind_of(session, name)
        if kind == "plate":
            return _plate(session, find_plate(session, name))
        if kind == "image":
            return _image(session, find_image(session, text))
        if kind == "well":
            return _well(session, find_well(session, text))
        if kind == "cell":
            return _cell(session, name)
        if kind == "run":
            return _run(session, find_named_run(session, name).id)
        return _artifact(session, text)


def _kind_of(session: Session, name: str) -> str:
    """What a name is of."""
    if name.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {name}" for kind in KINDS[2:])
        raise UserInputError(f"{name} is the number of what? Use one of: {ways}.")
    if _on_disk(name) is not None:
        return "artifact"
    if name.lower().startswith(("#", "run ", *RUN_WORDS)):
        return "run"
    if session.scalar(select(plates.c.id).where(plates.c.barcode == name)) is not None:
        return "plate"
    if looks_like_well(name):
        return "well"
    try:
        find_image(session, name)
    except UnknownNameError:
        if _files_named(session, name):
            return "artifact"
        barcodes = list(session.scalars(select(plates.c.barcode).limit(500)))
        if "/" not in name and get_close_matches(name, barcodes):
            raise UnknownNameError.of("plate", name, barcodes) from None
    return "image"


def _rows(
    session: Session, query: Select[Any], values: Mapping[str, Any] | None = None
) -> list[Record]:
    """The rows of a query, with values that JSON knows."""
    found = [dict(row) for row in session.execute(query, values).mappings()]
    for row in found:
        for name, value in row.items():
            if isinstance(value, Enum):
                row[name] = value.value
            elif isinstance(value, datetime):
                row[name] = value.isoformat()
    return found


# Plates, images, wells and cells


def _corrections(session: Session, *rows: tuple[str, int]) -> list[Record]:
    """What people and tables changed of some rows (table, id), the first change first.

    Of a well also what they changed of the perturbations that it has now. An event about several
    rows has the last of their ids; it names the first.
    """
    keys = ("created_at", "user_name", "run_id", "file", "line", "table_name", "old", "new")
    query = select(events.c.id, *(events.c[key] for key in keys), events.c.reason)
    at = [and_(events.c.table_name == table, events.c.row_id == row_id) for table, row_id in rows]
    at += [_of_perturbations(row_id) for table, row_id in rows if table == "wells"]
    found = session.execute(query.where(or_(*at)).order_by(events.c.id)).mappings()
    return [
        {
            "changed_at": row["created_at"].isoformat(),
            "by": row["user_name"],
            "of": row["table_name"].removesuffix("s"),
            "old": old,
            "new": new,
            "reason": row["reason"],
            **{key: row[key] for key in ("run_id", "file", "line")},
        }
        for row in found.all()
        if "first_id" not in (row["new"] or row["old"] or {})
        for old, new in (_said(session, row["old"], row["new"]),)
    ]


def _of_perturbations(well_id: int) -> ColumnElement[bool]:
    """The events of the perturbations that a well has."""
    parts = select(treatment_parts.c.perturbation_id)
    parts = parts.join(wells, wells.c.treatment_id == treatment_parts.c.treatment_id)
    return and_(
        events.c.table_name == "perturbations",
        events.c.row_id.in_(parts.where(wells.c.id == well_id)),
    )


def _said(session: Session, *values: Mapping[str, Any] | None) -> tuple[Record, ...]:
    """The values of an event, before and after, by the names that people use.

    A treatment by its name with dose, and with its target where that differs.
    """
    found: tuple[Record, ...] = tuple(dict(some or {}) for some in values)
    labels = [_labels_of(session, some.pop("treatment_id", None)) for some in found]
    if any(labels):
        for some, label in zip(found, labels, strict=True):
            some.setdefault(TREATMENT, label.get(TREATMENT))
        targets = [label.get(TARGET) for label in labels]
        if len(set(targets)) > 1:
            for some, target in zip(found, targets, strict=True):
                some[TARGET] = target
    return found


def _labels_of(session: Session, treatment_id: int | None) -> Record:
    """What splits may call a treatment, by label field; of none, nothing."""
    fields = (PERTURBATION, TREATMENT, TARGET)
    query = select(*(field_column(name).label(name) for name in fields))
    row = session.execute(query.where(treatments.c.id == treatment_id)).mappings().first()
    return dict(row or {})


def _plate(session: Session, plate_id: int) -> Audit:
    """What the store has of a plate, and every correction of it."""
    columns = ("barcode", "batch", "cell_line", "time_point", "metadata")
    query = select(plates.c.id.label("plate_id"), *(plates.c[name] for name in columns))
    (record,) = _rows(session, query.where(plates.c.id == plate_id))
    of_plate = select(images.c.id).join(wells).where(wells.c.plate_id == plate_id)
    in_wells = select(func.count()).where(wells.c.plate_id == plate_id)
    record |= {
        "wells": session.scalar(in_wells),
        "images": session.scalar(select(func.count()).select_from(of_plate.subquery())),
        "excluded": _why_excluded(session, ("plate", plate_id)),
        "corrections": _corrections(session, ("plates", plate_id)),
        "downstream": _downstream_of_images(session, of_plate),
    }
    return Audit("plate", f"Plate {record['barcode']}", record)


def _why_excluded(session: Session, *of: tuple[str, int]) -> str | None:
    """Why a row does not count: the first reason that a person gave for it (level, id)."""
    found = EXCLUSIONS.c
    one_of = or_(*(and_(found.level == level, found.id == row_id) for level, row_id in of))
    query = select(found.level, found.reason).where(one_of)
    by_person = found.source == ExclusionSource.ANNOTATION.value
    reasons: dict[str, str] = dict(session.execute(query.where(by_person)).all())
    return next((reasons[level] for level, _ in of if level in reasons), None)


def _image(session: Session, image_id: int) -> Audit:
    """Every run that labelled an image, with its evidence."""
    query = select(
        images.c.id.label("image_id"),
        plates.c.barcode.label("plate"),
        wells.c.name.label("well"),
        *(images.c[name] for name in ("site", "plane", "time_point", "core_name", "pixel_size")),
        *(
            images.c.content_sha256,
            treatments.c.name_with_dose.label("treatment"),
            treatments.c.target,
        ),
        *(wells.c.control, images.c.well_id, wells.c.plate_id),
    ).select_from(images.join(wells).join(plates).outerjoin(treatments))
    (record,) = _rows(session, query.where(images.c.id == image_id))
    well_id, plate_id = record.pop("well_id"), record.pop("plate_id")
    uri = func.rtrim(folders.c.uri, "/", type_=Text) + "/" + image_files.c.name
    of_image = image_files.c.image_id == image_id
    query = select(image_files.c.channel, image_files.c.name, uri.label("uri"))
    query = query.add_columns(image_files.c.sha256, image_files.c.size_bytes)
    query = query.select_from(image_files.outerjoin(folders)).where(of_image)
    files = _rows(session, query.order_by(image_files.c.position))
    one = select(images.c.id).where(images.c.id == image_id)
    frozen, notes = _frozen_labels(session, well_id, one)
    flags = select(
        *(image_flags.c.run_id, image_flags.c.reason),
        func.nullif(image_flags.c.channel, "").label("channel"),
        *(image_flags.c.value, image_flags.c.low, image_flags.c.high),
    ).join(runs, runs.c.id == image_flags.c.run_id)
    flags = flags.where(image_flags.c.image_id == image_id, runs.c.status == Status.DONE)
    flags = flags.order_by(image_flags.c.run_id, image_flags.c.reason, image_flags.c.channel)
    now = channels_now(session, record["plate"])
    flagged = [
        flag | {"channel": now.get(flag["channel"], flag["channel"])}
        for flag in _rows(session, flags)
    ]
    found = _segmentations(session, segmentations.c.image_id == image_id)
    downstream = _downstream_of_images(session, one)
    labelled = any(item["what"] == "labelled cells" for item in downstream)
    above = (("well", well_id), ("plate", plate_id))
    of_files = select(image_files.c.folder_id).where(image_files.c.image_id == image_id)
    moved = [("folders", number) for number in session.scalars(of_files.distinct()) if number]
    record |= {
        "excluded": _why_excluded(session, ("image", image_id), *above),
        "missing_files": sum(file["sha256"] is None for file in files),
        "notes": notes,
        "corrections": _corrections(
            session, ("images", image_id), ("wells", well_id), ("plates", plate_id), *moved
        ),
        "frozen_labels": frozen,
        "flags": flagged,
        "files": files,
        "segmentations": found,
        "labellings": _labellings(session, image_id, well_id, found) if labelled else [],
        "downstream": downstream,
    }
    name = "{plate}/{well}/{site}".format(**record)
    return Audit("image", f"Image {name}", record)


def _segmentations(session: Session, condition: ColumnElement[bool]) -> list[Record]:
    """Segmentations: ``current`` where the image still has the bytes in which cells were found.

    Of cells that another tool found, ``imported`` names the tool, and the diameter may be unknown.
    """
    # Unknown bytes count as current: nothing can contradict them.
    seen = segmentations.c.content_sha256
    current = func.coalesce(seen == images.c.content_sha256, seen.is_(None))
    query = select(
        *(segmentations.c[name] for name in ("id", "run_id", "recipe_id")),
        *(recipes.c[name] for name in ("fingerprint", "weights_sha256", "parameters")),
        segmentations.c.created_at.label("made_at"),
        *(segmentations.c.n_cells, segmentations.c.diameter, current.label("current")),
        segmentations.c.mask_artifact_id.is_not(None).label("has_masks"),
        recipes.c.parameters["imported"].as_string().label("imported"),
    )
    query = query.select_from(segmentations.join(recipes).join(images)).where(condition)
    return _rows(session, query.order_by(segmentations.c.id))


@cache
def _label_counts() -> CompoundSelect[Any]:
    """How many cells of ``:image`` that count chose which label, by run and segmentation.

    Counted as in ``image_label_counts``: probabilities are added as whole numbers, so that their
    sum is the same in any order. Made once: that takes longer than the answer.
    """
    # Of the type decimal, PostgreSQL rounds halves up, as others do.
    whole = cast(func.round(cast(predictions.c.probability * EXACT, Numeric)), BigInteger)
    label = labels.c.value.label("label")
    keys = (predictions.c.run_id, predictions.c.label_id, label, cells.c.segmentation_id)
    counted = func.count().filter(predictions.c.rank == 1).label("cells")
    query = select(*keys, counted, cast(func.sum(whole), BigInteger).label("summed"))
    query = query.select_from(predictions.join(cells).join(segmentations).join(images))
    query = query.join(labels, labels.c.id == predictions.c.label_id).group_by(*keys)
    of_image = segmentations.c.image_id == bindparam("image")
    query = query.where(of_image, cell_counts(), image_counts())
    # Of a model that sees whole images: one vote.
    whole = cast(func.round(cast(image_predictions.c.probability * EXACT, Numeric)), BigInteger)
    first = case((image_predictions.c.rank == 1, 1), else_=0)
    votes = select(image_predictions.c.run_id, image_predictions.c.label_id, label)
    votes = votes.add_columns(null(), first, whole)
    votes = votes.join(labels, labels.c.id == image_predictions.c.label_id).join(images)
    of_image = image_predictions.c.image_id == bindparam("image")
    return union_all(query, votes.where(of_image, image_counts()))


@cache
def _asked_runs() -> Select[Any]:
    """The predict runs ``:runs``, and what their split says of ``:image``."""
    parents, own = runs.alias(), split_members.alias()
    split = func.coalesce(runs.c.split_id, parents.c.split_id)
    of_image = and_(own.c.split_id == splits.c.id, own.c.image_id == bindparam("image"))
    query = select(
        runs.c.id.label("run_id"),
        *(runs.c.started_at, runs.c.user_name.label("user"), runs.c.host, runs.c.code_version),
        *(runs.c.parent_id.label("train_run_id"), splits.c.name.label("split"), splits.c.protocol),
        *(
            splits.c.id.label("split_id"),
            splits.c.field,
            own.c.subset,
            labels.c.value.label("truth"),
        ),
        *(runs.c.origin, recipes.c.parameters["declared"].as_string().label("model")),
        recipes.c.parameters["trained_on"].as_string().label("trained_on"),
    )
    query = query.outerjoin(parents, parents.c.id == runs.c.parent_id)
    query = query.outerjoin(recipes, recipes.c.id == parents.c.recipe_id)
    query = query.outerjoin(splits, splits.c.id == split).outerjoin(own, of_image)
    query = query.outerjoin(labels, labels.c.id == own.c.label_id)
    return query.where(runs.c.id.in_(bindparam("runs", expanding=True))).order_by(runs.c.id)


def _counted(session: Session, image_id: int) -> list[Record]:
    """What the cells of an image predicted: a row per predict run and label.

    ``segmentations``: those that the cells are of.
    """
    counted: dict[tuple[int, int], Record] = {}
    for row in session.execute(_label_counts(), {"image": image_id}).mappings():
        empty = {"cells": 0, "summed": 0, "segmentations": set()}
        same = counted.setdefault((row["run_id"], row["label_id"]), {**row, **empty})
        same["segmentations"].add(row["segmentation_id"])
        for key in ("cells", "summed"):
            same[key] += row[key]
    return [{**row, "probability": row["summed"] / EXACT} for row in counted.values()]


def _labellings(
    session: Session, image_id: int, well_id: int, found: Sequence[Record]
) -> list[Record]:
    """What each predict run answered for an image, the oldest run first.

    ``winner`` is the label of the hard vote, ``soft_winner`` that of the summed probabilities;
    ``subset`` that of the image in the split (``outside``: in none), ``well_subsets`` all in which
    its well has images. ``found``: its segmentations.
    """
    from ..query.engine import rank_counts  # DuckDB takes some time to load

    counts = _counted(session, image_id)
    ranked = rank_counts(counts)
    asked = {"image": image_id, "runs": sorted({row["run_id"] for row in counts})}
    checkpoints: dict[int | None, list[str]] = {}
    of_well = select(split_members.c.split_id, split_members.c.subset).distinct()
    in_well = session.execute(of_well.join(images).where(images.c.well_id == well_id)).all()
    labellings = []
    for run in _rows(session, _asked_runs(), asked):
        label_field, truth = run["field"], run["truth"]
        if truth is None and label_field is not None:
            labelled = select(field_column(label_field))
            labelled = labelled.select_from(wells.join(plates).outerjoin(treatments))
            truth = session.scalar(labelled.where(wells.c.id == well_id))
        hard, soft = (ranked[run["run_id"], vote] for vote in ("hard", "soft"))
        mine = [row for row in counts if row["run_id"] == run["run_id"]]
        names = {row["label_id"]: row["label"] for row in mine}
        winner = names[hard["winner_id"]]
        mine.sort(key=lambda row: (-row["cells"], -row["probability"], row["label"]))
        used = {number for row in mine for number in row["segmentations"]}
        seen = [item for item in found if item["id"] in used]
        well_subsets = [s.value for s in Subset if (run["split_id"], s) in in_well]
        learned, known = {Subset.TRAIN.value}, True
        if run["origin"] == Origin.DECLARED:
            learned, known = (
                set((run["trained_on"] or "").split(",")),
                run["trained_on"] is not None,
            )
        keys = ["run_id", "started_at", "user", "host", "code_version", "train_run_id"]
        keys += ["origin", "model"]
        if (trained := run["train_run_id"]) not in checkpoints:
            checkpoints[trained] = _checkpoints(session, trained)
        labellings.append(
            {
                **{key: run[key] for key in keys},
                "checkpoints": checkpoints[trained],
                "split": run["split"],
                "protocol": run["protocol"],
                "subset": run["subset"] or "outside",
                "well_subsets": well_subsets,
                "well_in_training": not learned.isdisjoint(well_subsets) if known else None,
                "segmentation_ids": [item["id"] for item in seen],
                "segment_recipes": [item["recipe_id"] for item in seen],
                "segment_weights": [item["weights_sha256"] or "" for item in seen],
                "n_cells": hard["n_cells"],
                "votes": {row["label"]: row["cells"] for row in mine},
                "probabilities": {row["label"]: row["probability"] for row in mine},
                "winner": winner,
                "soft_winner": names[soft["winner_id"]],
                "tie": hard["votes"] == hard["runner_up_votes"],
                "truth": truth,
                "correct": None if truth is None else winner == truth,
            }
        )
    return labellings


def _checkpoints(session: Session, run_id: int | None) -> list[str]:
    """The sha256 of the checkpoints of a run."""
    query = select(artifacts.c.sha256).join(run_artifacts).order_by(artifacts.c.id)
    query = query.where(artifacts.c.kind == ArtifactKind.CHECKPOINT)
    return list(session.scalars(query.where(run_artifacts.c.run_id == run_id)))


def _treatment(session: Session, treatment_id: int | None) -> Record | None:
    named = treatments.c.name_with_dose.label("name")
    query = select(named, treatments.c.target, perturbations.c.kind)
    query = query.add_columns(perturbations.c.identifier).where(treatments.c.id == treatment_id)
    query = query.select_from(treatments.outerjoin(treatment_parts).outerjoin(perturbations))
    parts = _rows(session, query.order_by(treatment_parts.c.position))
    if not parts:
        return None
    return {
        "name": parts[0]["name"],
        "kind": "|".join(part["kind"] or "" for part in parts),
        "target": parts[0]["target"],
        "identifier": "|".join(part["identifier"] or "" for part in parts) or None,
    }


def _frozen_labels(
    session: Session, well_id: int, of: Select[Any]
) -> tuple[list[Record], list[str]]:
    """The labels that splits keep of some images of a well, and a sentence where the well differs.

    ``since``: who or which run made it differ, when, from which file and line, for what reason;
    what is not known is left out.
    """
    query = (
        select(splits.c.name, splits.c.field, split_members.c.subset, labels.c.value)
        .select_from(split_members.join(splits).join(labels))
        .where(split_members.c.image_id.in_(of))
        .distinct()
        .order_by(splits.c.name, split_members.c.subset, labels.c.value)
    )
    found, notes = [], []
    for split, label_field, subset, label in session.execute(query):
        labelled = select(field_column(label_field))
        labelled = labelled.select_from(wells.join(plates).outerjoin(treatments))
        now = session.scalar(labelled.where(wells.c.id == well_id))
        since = _since(session, well_id, label_field) if now != label else None
        if now != label:
            text = f"label in split {split}: {label}; the well now has: {now or 'none'}"
            if since is not None and "run_id" in since:
                text += f", since run {since['run_id']}"
                line = f", line {since['line']}" if "line" in since else ""
                text += f" ({since['file']}{line})" if "file" in since else ""
            elif since is not None:
                text += f", corrected by {since['by']} on "
                text += since["changed_at"][:16].replace("T", " ")
                text += f" ({since['reason']})" if "reason" in since else ""
            if text not in notes:  # the images of a well may be in several subsets
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


def _since(session: Session, well_id: int, label_field: str) -> Record | None:
    """The last change of what a well is called in a label field; None: not known."""
    of_well = and_(events.c.table_name == "wells", events.c.row_id == well_id)
    query = select(events).where(or_(of_well, _of_perturbations(well_id)))
    for event in session.execute(query.order_by(events.c.id.desc())).mappings():
        old, new = event["old"] or {}, event["new"] or {}
        if event["table_name"] == "perturbations":
            changed = label_field in new
        else:
            before, after = (_labels_of(session, some.get("treatment_id")) for some in (old, new))
            changed = before.get(label_field) != after.get(label_field)
        if changed:
            since = {"by": event["user_name"], "changed_at": event["created_at"].isoformat()}
            since |= {key: event[key] for key in ("run_id", "file", "line", "reason")}
            return {key: value for key, value in since.items() if value is not None}
    return None


def _well(session: Session, well_id: int) -> Audit:
    """What a well has, what it had, and its labels in splits."""
    query = select(wells.c.id.label("well_id"), plates.c.barcode.label("plate"))
    query = query.add_columns(wells.c.name.label("well"), wells.c.control, wells.c.treatment_id)
    query = query.add_columns(wells.c.plate_id)
    (record,) = _rows(session, query.join(plates).where(wells.c.id == well_id))
    of_well = select(images.c.id).where(images.c.well_id == well_id)
    frozen, notes = _frozen_labels(session, well_id, of_well)
    record["treatment"] = _treatment(session, record.pop("treatment_id"))
    plate_id = record.pop("plate_id")
    record |= {
        "excluded": _why_excluded(session, ("well", well_id), ("plate", plate_id)),
        "images": list(session.scalars(of_well.order_by(images.c.id))),
        "notes": notes,
        "corrections": _corrections(session, ("wells", well_id), ("plates", plate_id)),
        "frozen_labels": frozen,
        "downstream": _downstream_of_images(session, of_well),
    }
    return Audit("well", f"Well {record['plate']}/{record['well']}", record)


def _cell(session: Session, number: str) -> Audit:
    """A cell, its masks, its measurements and what every run predicted for it.

    ``box`` is min row, min col, max row, max col (half open) in pixels; it and ``centroid`` are
    null where another tool found the cell and does not report them.
    """
    number_of, image_id = find_cell(session, number)
    cell = session.execute(select(cells).where(cells.c.id == number_of)).one()
    image = _image(session, image_id)
    name = "{plate}/{core_name}".format(**image.record)
    box = [cell.min_row, cell.min_col, cell.max_row, cell.max_col]
    centroid = [cell.centroid_row, cell.centroid_col]
    flags = select(*(cell_flags.c[key] for key in ("run_id", "reason", "value")))
    flags = flags.join(runs).where(cell_flags.c.cell_id == cell.id, runs.c.status == Status.DONE)
    measured = select(*(c for c in features.c if c.name not in ("cell_id", "run_id")))
    measured = measured.where(features.c.cell_id == cell.id).order_by(features.c.recipe_id)
    choices = select(predictions.c.run_id, predictions.c.rank, labels.c.value.label("label"))
    choices = choices.add_columns(predictions.c.probability).join(labels)
    choices = choices.where(predictions.c.cell_id == cell.id)
    record = {
        "cell_id": cell.id,
        "image": name,
        "image_id": image_id,
        "object_number": cell.object_number,
        "box": None if None in box else box,
        "centroid": None if None in centroid else centroid,
        "excluded": next(iter(why_excluded(session, cell.id)), None),
        "corrections": _corrections(session, ("cells", cell.id)),
        "flags": _rows(session, flags.order_by(cell_flags.c.run_id, cell_flags.c.reason)),
        "segmentation": next(
            item for item in image.record["segmentations"] if item["id"] == cell.segmentation_id
        ),
        "features": {f"recipe {row.pop('recipe_id')}": row for row in _rows(session, measured)},
        "choices": _rows(session, choices.order_by(predictions.c.run_id, predictions.c.rank)),
    }
    return Audit("cell", f"Cell {cell.id} of {name}", record, image)


# Runs

RUN = (
    *(runs.c.id.label("run_id"), runs.c.stage, runs.c.status, runs.c.started_at),
    *(runs.c.user_name.label("user"), runs.c.code_version),
)
RECIPE = tuple(
    recipes.c[name]
    for name in ("id", "stage", "version", "fingerprint", "weights_sha256", "parameters")
)


def _run(session: Session, run_id: int) -> Audit:
    """A run: what it did, from what, and what came of it.

    ``inputs`` are the recipes it reads from, all the way up. Of an ingest: ``ingested`` are the
    files it read, ``changed_wells`` counts the wells whose treatment it changed.
    """
    query = select(
        *(*RUN, runs.c.ended_at),
        *(runs.c[key] for key in ("host", "origin", "command", "seed", "query", "error")),
        *(splits.c.name.label("split"), splits.c.protocol, runs.c.result, runs.c.environment),
        *(runs.c.recipe_id, runs.c.split_id, runs.c.parent_id),
    ).outerjoin(splits, splits.c.id == runs.c.split_id)
    (record,) = _rows(session, query.where(runs.c.id == run_id))
    results = {key: record.pop(key) for key in ("result", "environment")}
    recipe_id, split_id = record.pop("recipe_id"), record.pop("split_id")
    parents: list[Record] = []
    parent_id = record.pop("parent_id")
    while parent_id is not None:
        above = select(*RUN, runs.c.parent_id, runs.c.recipe_id).where(runs.c.id == parent_id)
        parents += _rows(session, above)
        parent_id = parents[-1].pop("parent_id")
    recipe, *_ = _recipes(session, {recipe_id})
    inputs: dict[int, Record] = {}
    level = {*recipe["reads"]}
    while level:
        read = _recipes(session, level)
        inputs |= {item["id"]: item for item in read}
        level = {number for item in read for number in item["reads"]} - set(inputs)
    for parent in parents:
        parent["checkpoints"] = _checkpoints(session, parent["run_id"])
    members = {} if split_id is None else {s.value: 0 for s in Subset}
    subsets = select(split_members.c.subset, func.count()).group_by(split_members.c.subset)
    counts = session.execute(subsets.where(split_members.c.split_id == split_id))
    members |= {Subset(subset).value: number for subset, number in counts}
    statuses = select(jobs.c.status, func.count()).group_by(jobs.c.status)
    done = session.execute(statuses.where(jobs.c.run_id == run_id))
    changed = wells_changed(events.c.run_id == run_id).subquery()
    counted = [
        ingest_files.c[f"n_{name}"].label(name)
        for name in ("rows", "created", "updated", "unchanged", "refused")
    ]
    ingested = select(ingest_files.c.name, ingest_files.c.layout, ingest_files.c.sha256, *counted)
    ingested = ingested.where(ingest_files.c.run_id == run_id).order_by(ingest_files.c.id)
    written = select(*(artifacts.c[key] for key in ("kind", "path", "sha256", "size_bytes")))
    written = written.join(run_artifacts).where(run_artifacts.c.run_id == run_id)
    children = select(*RUN).where(runs.c.parent_id == run_id).order_by(runs.c.id)
    record |= {
        "corrections": [row for row in _corrections(session, ("runs", run_id)) if row["old"]],
        "changed_wells": session.scalar(select(func.count()).select_from(changed)) or 0,
        "split_counts": members,
        "jobs": {Status(status).value: number for status, number in done},
        **results,
        "recipe": recipe,
        "inputs": [inputs[number] for number in sorted(inputs)],
        "parents": parents,
        "children": _rows(session, children),
        "ingested": _rows(session, ingested),
        "artifacts": _rows(session, written.order_by(artifacts.c.id)),
        "downstream": _downstream(session, runs_of=[run_id]),
    }
    return Audit("run", f"Run {run_id}: {record['stage']}", record)


def _recipes(session: Session, ids: Collection[int]) -> list[Record]:
    """Recipes with the ids of those that they read from (``reads``)."""
    found = _rows(session, select(*RECIPE).where(recipes.c.id.in_(ids)).order_by(recipes.c.id))
    query = select(recipe_inputs).where(recipe_inputs.c.recipe_id.in_(ids))
    pairs = session.execute(query.order_by(recipe_inputs.c.input_id)).all()
    for recipe in found:
        recipe["reads"] = [input_id for recipe_id, input_id in pairs if recipe_id == recipe["id"]]
    return found


# What came of something


Came = tuple[str, int | None, Iterable[int], Iterable[str]]
"""What, how many, the runs that made it, its names."""


def _came(*found: Came) -> list[Record]:
    """What there is of something, as rows."""
    return [
        {"what": what, "count": count, "runs": sorted(by), "names": list(names)}
        for what, count, by, names in found
        if count
    ]


def _downstream_of_images(session: Session, of: Select[Any]) -> list[Record]:
    """What came of some images, a query of their ids."""
    segmented = segmentations.c.image_id.in_(of)
    number = select(func.count(), func.sum(segmentations.c.n_cells)).where(segmented)
    n_found, n_cells = session.execute(number).one()
    by = session.scalars(select(segmentations.c.run_id).where(segmented).distinct())
    in_images = select(cells.c.id).join(segmentations).where(segmented)
    measured = select(features.c.run_id, func.count()).group_by(features.c.run_id)
    by_measure = session.execute(measured.where(features.c.cell_id.in_(in_images))).all()
    sets = select(feature_sets.c.name, jobs.c.run_id).distinct()
    sets = sets.join(jobs, jobs.c.recipe_id == feature_sets.c.recipe_id)
    sets = sets.where(jobs.c.image_id.in_(of), jobs.c.status == Status.DONE)
    in_sets = session.execute(sets).all()
    set_names = sorted({name for name, _ in in_sets})
    named = select(splits.c.id, splits.c.name).join(split_members).distinct()
    named = named.where(split_members.c.image_id.in_(of)).order_by(splits.c.id)
    in_splits = session.execute(named).all()
    trained = select(runs.c.id).where(runs.c.split_id.in_([number for number, _ in in_splits]))
    trainings = session.scalars(trained.where(runs.c.stage == Stage.TRAIN)).all()
    labelled = select(predictions.c.run_id, func.count()).group_by(predictions.c.run_id)
    labelled = labelled.where(predictions.c.cell_id.in_(in_images), predictions.c.rank == 1)
    by_predict = session.execute(labelled).all()
    return _came(
        ("segmentations", n_found, by, ()),
        ("cells", n_cells, (), ()),
        ("measured cells", sum(n for _, n in by_measure), (run for run, _ in by_measure), ()),
        ("feature sets", len(set_names), {run for _, run in in_sets}, set_names),
        ("splits", len(in_splits), (), [name for _, name in in_splits]),
        ("trainings on these splits", len(trainings), trainings, ()),
        ("labelled cells", sum(n for _, n in by_predict), (run for run, _ in by_predict), ()),
    )


def _downstream(
    session: Session, *, runs_of: Collection[int] = (), recipes_of: Collection[int] = ()
) -> list[Record]:
    """What came of runs, or of recipes and of all recipes that read what they wrote."""
    below = set(recipes_of)
    level = set(below)
    while level:
        query = select(recipe_inputs.c.recipe_id).where(recipe_inputs.c.input_id.in_(level))
        level = set(session.scalars(query)) - below
        below |= level
    segmented = select(func.count(), func.sum(segmentations.c.n_cells))
    by = segmentations.c.recipe_id.in_(below) if below else segmentations.c.run_id.in_(runs_of)
    n_found, n_cells = session.execute(segmented.where(by)).one()
    files = select(func.count(), func.sum(feature_files.c.n_rows))
    n_files, n_rows = session.execute(files.where(feature_files.c.run_id.in_(runs_of))).one()
    named = select(feature_sets.c.name).where(feature_sets.c.recipe_id.in_(below))
    sets = session.scalars(named.order_by(feature_sets.c.id)).all()
    changed = wells_changed(events.c.run_id.in_(runs_of)).subquery()
    n_changed = session.scalar(select(func.count()).select_from(changed))
    by_stage: dict[Stage, list[int]] = defaultdict(list)
    later = runs.c.recipe_id.in_(below) if below else runs.c.parent_id.in_(runs_of)
    query = select(runs.c.stage, runs.c.id).where(later).order_by(runs.c.id)
    for stage, run_id in session.execute(query):
        by_stage[Stage(stage)].append(run_id)
    labelled = select(func.count()).where(jobs.c.run_id.in_(by_stage.get(Stage.PREDICT, [])))
    n_labelled = session.scalar(labelled.where(jobs.c.status == Status.DONE))
    return _came(
        ("segmentations", n_found, (), ()),
        ("cells", n_cells, (), ()),
        ("feature sets", len(sets), (), sets),
        ("feature files", n_files, (), ()),
        ("cells in feature files", n_rows, (), ()),
        ("wells with another treatment", n_changed, (), ()),
        *((f"{stage.value} runs", len(ids), ids, ()) for stage, ids in by_stage.items()),
        ("images labelled", n_labelled, (), ()),
    )


# Files

LISTED = 8
MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""
WROTE, IMAGE_FILE, TABLE, WEIGHTS = "artifact", "image file", "ingested table", "weights"

File = tuple[str, Row[Any], str]
"""Which table knows a file, its row there, and the sha256. A recipe knows the weights it uses."""


def _artifact(session: Session, text: str) -> Audit:
    """What a file is to the store, and what came of it.

    ``text``: the path or name of a file that the store wrote or read, the first digits (6 at
    least) of its sha256, the id of an artifact, or the path of a file on this machine, which is
    hashed and looked up by its bytes.
    """
    path = _on_disk(text)
    digest = None if path is None else sha256_of(path)
    text = readable(text)
    found = _files_named(session, text) if digest is None else _files_by(session, digest)
    different = {file[2]: file for file in found}
    if not found:
        raise _unknown_file(session, text, digest)
    if len(different) > 1:
        listed = [f"{_kind(file)} {_name(file)} ({d[:12]})" for d, file in different.items()]
        more = ", ..." if len(listed) > LISTED else ""
        raise UserInputError(
            f"{text!r} names several files: {', '.join(listed[:LISTED])}{more}. "
            "Name one by the start of its sha256."
        )
    (sha256,) = different
    # One row of each kind; of image files each, for they are of several images.
    files: dict[tuple[str, int | None], File] = {}
    for file in _files_by(session, sha256):
        files.setdefault((_kind(file), file[1].id if file[0] == IMAGE_FILE else None), file)
    record = {
        "asked": text,
        "sha256": sha256,
        "hashed": None if path is None else str(path),
        "known": [_known(session, file) for file in files.values()],
    }
    return Audit("artifact", f"File {record['known'][0]['name']}", record)  # type: ignore[index]


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
        *neighbours(session, image_files.c.name, text),
        *neighbours(session, ingest_files.c.name, text),
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
        artifact = session.execute(select(artifacts).where(artifacts.c.id == int(text))).first()
    if artifact is None:
        artifact = session.execute(select(artifacts).where(artifacts.c.path == text)).first()
    if artifact is not None:
        return [(WROTE, artifact, artifact.sha256)]
    name = re.split(r"[/\\]", text)[-1]
    found = _files_of_name(session, text) or _files_of_name(session, name)
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _files_by(session, start))


def _files_of_name(session: Session, name: str) -> list[File]:
    seen = select(image_files).where(image_files.c.name == name)
    seen = seen.where(image_files.c.sha256.is_not(None)).limit(MOST)
    read = select(ingest_files).where(ingest_files.c.name == name).order_by(ingest_files.c.id)
    return [
        *((IMAGE_FILE, row, row.sha256) for row in session.execute(seen)),
        *((TABLE, row, row.sha256) for row in session.execute(read.limit(MOST))),
    ]


def _files_by(session: Session, digits: str) -> list[File]:
    """The files by their sha256, or by its start."""
    found: list[File] = []
    for source, table, column in (
        (WROTE, artifacts, artifacts.c.sha256),
        (IMAGE_FILE, image_files, image_files.c.sha256),
        (TABLE, ingest_files, ingest_files.c.sha256),
        (WEIGHTS, recipes, recipes.c.weights_sha256),
    ):
        named = column == digits if len(digits) == 64 else starts_with(column, digits)
        rows = session.execute(select(table).where(named).order_by(table.c.id).limit(MOST))
        found += [(source, row, row._mapping[column.name]) for row in rows]
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
    by: set[int] = set()
    using: set[int] = set()
    of: Select[Any] | None = None
    path = row.path if source == WROTE else None
    named = select(images.c.id, images.c.site, images.c.core_name, wells.c.name, plates.c.barcode)
    named = named.select_from(images.join(wells).join(plates))
    if source == IMAGE_FILE:
        image = session.execute(named.where(images.c.id == row.image_id)).one()
        where = f"{image.barcode}/{image.name}/{image.site} {image.core_name}"
        about = [f"channel {row.channel} of image {where}"]
        of = select(images.c.id).where(images.c.id == image.id)
        folder = session.scalar(select(folders.c.uri).where(folders.c.id == row.folder_id))
        path = None if folder is None else f"{folder.rstrip('/')}/{row.name}"
    elif source == TABLE:
        same = select(ingest_files).where(ingest_files.c.sha256 == sha256)
        for read in session.execute(same.order_by(ingest_files.c.id)):
            by.add(read.run_id)
            about.append(
                f"run {read.run_id} read it as {read.layout}: {read.n_rows:,} rows, "
                f"{read.n_created:,} new, {read.n_updated:,} updated, "
                f"{read.n_unchanged:,} unchanged, {read.n_refused:,} refused"
            )
    elif source == WEIGHTS:
        users = select(recipes).where(recipes.c.weights_sha256 == sha256).order_by(recipes.c.id)
        for recipe in session.execute(users):
            using.add(recipe.id)
            short = recipe.fingerprint[:12]
            about.append(f"{recipe.stage.value} recipe {recipe.id} ({short}) uses it")
        by.update(session.scalars(select(runs.c.id).where(runs.c.recipe_id.in_(using))))
    else:
        wrote = select(run_artifacts.c.run_id).where(run_artifacts.c.artifact_id == row.id)
        by.update(session.scalars(wrote))
        if row.kind in (ArtifactKind.MASK, ArtifactKind.FLOW):
            masks = row.kind is ArtifactKind.MASK
            column = segmentations.c["mask_artifact_id" if masks else "flow_artifact_id"]
            query = select(segmentations.c.run_id, segmentations.c.image_id)
            found = session.execute(query.where(column == row.id).limit(MOST)).all()
            by.update(item.run_id for item in found)
            of = select(images.c.id).where(images.c.id.in_([item.image_id for item in found]))
            drawn = session.execute(named.where(images.c.id.in_(of)))
            about = [f"of image {image.barcode}/{image.core_name}" for image in drawn]
        elif row.kind is ArtifactKind.FEATURES:
            parts = select(feature_files, feature_sets.c.name, feature_sets.c.recipe_id)
            parts = parts.join(feature_sets).where(feature_files.c.artifact_id == row.id)
            for part in session.execute(parts):
                by.add(part.run_id)
                using.add(part.recipe_id)
                about.append(
                    f"of feature set {part.name}: {part.n_rows:,} cells, "
                    f"ids {part.first_cell_id} to {part.last_cell_id}"
                )
    if of is not None:
        downstream = _downstream_of_images(session, of)
    else:
        downstream = _downstream(session, runs_of=() if using else by, recipes_of=using)
    if source == TABLE:
        of_wells = images.c.well_id.in_(wells_changed(events.c.run_id.in_(by)))
        brought, of_images = _brought(session, by)
        downstream = [*brought, *downstream]
        for these, which in (("wells", of_wells), ("images", of_images)):
            if which is None:
                continue
            for item in _downstream_of_images(session, select(images.c.id).where(which)):
                downstream.append({**item, "what": f"{item['what']} of these {these}"})
    return {
        "kind": _kind(file),
        "key": row.id,
        "name": _name(file),
        "path": path,
        "sha256": sha256,
        "size_bytes": None if source == WEIGHTS else row.size_bytes,
        "about": about,
        "runs": _rows(session, select(*RUN).where(runs.c.id.in_(by)).order_by(runs.c.id)),
        "downstream": downstream,
    }


def _brought(
    session: Session, ingests: Collection[int]
) -> tuple[list[Record], ColumnElement[bool] | None]:
    """What ingest runs brought, counted by table, and the condition of new images, if any."""
    first, last = (events.c.new[key].as_integer() for key in ("first_id", "last_id"))
    query = select(events.c.table_name, events.c.run_id, first, last)
    query = query.where(events.c.run_id.in_(ingests), events.c.old.is_(None), last.is_not(None))
    counts: dict[str, int] = defaultdict(int)
    by: dict[str, set[int]] = defaultdict(set)
    new_images: list[ColumnElement[bool]] = []
    for table, run_id, begin, end in session.execute(query.order_by(events.c.id)):
        counts[table] += end - begin + 1
        by[table].add(run_id)
        if table == "images":
            new_images.append(images.c.id.between(begin, end))
    came = ((f"new {table.replace('_', ' ')}", n, by[table], ()) for table, n in counts.items())
    return _came(*came), or_(*new_images) if new_images else None


def is_part(value: Any) -> bool:
    """Whether a value is a record, or a list of records."""
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


_SHA256 = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


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
    if name.endswith("_at"):
        return str(value)[:19].replace("T", " ")
    return _SHA256.sub(lambda found: found[0][:digits], str(value))
