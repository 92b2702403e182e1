"""The history of an image, a well, a cell, a run or a file: what it comes from, what came of it.

An audit is a record: values, and lists of rows, each row of the same keys. ``audit --json`` prints
it, the command line shows it as text, and ``lineage_page`` draws it: all three from these rows.
Questions are SQL that both databases take. The classes of the tables would take longer to load than
an audit takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CompoundSelect,
    Numeric,
    and_,
    bindparam,
    case,
    cast,
    func,
    null,
    or_,
    select,
    text,
    union_all,
)
from sqlalchemy.orm import Session

from ..artifacts import sha256_of
from ..config import RunName
from ..db.fields import changed_since, field_column, is_label_now, wells_changed
from ..enums import TARGET, TREATMENT, Stage, Subset
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
)
from ..jobs.run_names import RUN_WORDS, find_named_run
from ..jobs.workspace import Workspace
from ..models import METADATA, UtcDateTime
from ..notebooks import Shown
from ..query.exclusions import cell_counts, image_counts, why_excluded

T = METADATA.tables
cells, events, image_files = (T[name] for name in ("cells", "events", "image_files"))
image_predictions, images = (T[name] for name in ("image_predictions", "images"))
ingest_files, labels, plates = (T[name] for name in ("ingest_files", "labels", "plates"))
predictions, segmentations = (T[name] for name in ("predictions", "segmentations"))
treatments, wells = (T[name] for name in ("treatments", "wells"))

KINDS = ("plate", "well", "image", "cell", "run", "artifact")

EXACT = 1e12
"""Probabilities times this are added as whole numbers."""

TYPES: dict[str, Any] = {
    **dict.fromkeys(("metadata", "parameters", "result", "environment", "old", "new"), JSON()),
    **dict.fromkeys(("changed_at", "made_at", "started_at", "ended_at"), UtcDateTime()),
    **dict.fromkeys(("current", "has_masks"), Boolean()),
}
"""Columns of answers that are more than a text or a number to SQLite."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Audit(Shown):
    """What the store knows of one thing, as a record; times are ISO 8601 in UTC.

    ``image``: of a cell the audit of its image, which the picture shows with it.
    """

    kind: str
    title: str
    record: Record
    image: Audit | None = None


def audit(
    workspace: Workspace, text: RunName, kind: str | None = None, *, on_disk: bool = True
) -> Audit:
    """Return the audit of what ``text`` names; see :meth:`cellstore.Store.audit`.

    ``on_disk``: it may be the path of a file on this machine, which is then read.
    """
    text = str(text)
    name = readable(text)
    with workspace.database.read() as session:
        if kind is None:
            kind = kind_of(session, name, on_disk=on_disk)
        if kind == "plate":
            return _plate(session, find_plate(session, name))
        if kind == "image":
            return _image(session, find_image(session, text))
        if kind == "well":
            return audit_well(session, find_well(session, text))
        if kind == "cell":
            return _cell(session, name)
        if kind == "run":
            return _run(session, find_named_run(session, name).id)
        return _artifact(session, text, on_disk=on_disk)


def kind_of(session: Session, name: str, *, on_disk: bool = True) -> str:
    """Return what a name is of; ``on_disk``: it may be the path of a file on this machine.

    Raises:
        UnknownNameError: no plate has it, but some have similar names.
        UserInputError: it is a number without a kind.
    """
    if name.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {name}" for kind in KINDS[2:])
        raise UserInputError(f"{name} is the number of what? Use one of: {ways}.")
    if on_disk and _on_disk(name) is not None:
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


@cache
def _query(sql: str) -> Any:
    """SQL of ours with the types of its columns; what follows ``IN`` is bound as a list."""
    names = set(re.findall(r"IN :(\w+)", sql))
    lists: Any = [bindparam(name, expanding=True) for name in names]
    return text(sql).bindparams(*lists).columns(**TYPES)


def _ask(session: Session, sql: str, **values: Any) -> list[Record]:
    """The rows of a query of ours, with values that JSON knows; ``values`` are bound."""
    values = {name: sorted(x) if isinstance(x, set) else x for name, x in values.items()}
    found = [dict(row) for row in session.execute(_query(sql), values).mappings()]
    for row in found:
        for name, value in row.items():
            if isinstance(value, datetime):
                row[name] = value.isoformat()
    return found


# Plates, images, wells and cells

OF_PERTURBATIONS = """
    events.table_name = 'perturbations' AND events.row_id IN (
        SELECT perturbation_id FROM treatment_parts
        JOIN wells ON wells.treatment_id = treatment_parts.treatment_id WHERE wells.id IN :wells
    )
"""
"""The events of the perturbations that wells have."""


def _corrections(session: Session, **ids: Collection[int]) -> list[Record]:
    """What people and tables changed of some rows (``ids`` by table), the first change first.

    Of a well also what they changed of the perturbations that it has now. An event about several
    rows has the last of their ids; it names the first.
    """
    of = [f"events.table_name = '{table}' AND events.row_id IN :{table}" for table in ids]
    of += [OF_PERTURBATIONS] if "wells" in ids else []
    query = f"""
        SELECT created_at AS changed_at, user_name AS "by", table_name AS "of", old, new, reason,
            run_id, file, line
        FROM events WHERE {" OR ".join(of)} ORDER BY id
    """  # noqa: S608 - our own words
    rows = []
    for row in _ask(session, query, **ids):
        if "first_id" not in (row["new"] or row["old"] or {}):
            row["old"], row["new"] = _in_words(session, row["old"], row["new"])
            row["of"] = row["of"].removesuffix("s")
            rows.append(row)
    return rows


def _in_words(session: Session, *values: Mapping[str, Any] | None) -> tuple[Record, ...]:
    """The values of an event, before and after, by the names that people use.

    A treatment by its name with dose, and with its target where that differs.
    """
    found: tuple[Record, ...] = tuple(dict(some or {}) for some in values)
    named = [_labels_of(session, some.pop("treatment_id", None)) for some in found]
    if any(named):
        for some, label in zip(found, named, strict=True):
            some.setdefault(TREATMENT, label.get(TREATMENT))
        targets = [label.get(TARGET) for label in named]
        if len(set(targets)) > 1:
            for some, target in zip(found, targets, strict=True):
                some[TARGET] = target
    return found


def _labels_of(session: Session, treatment_id: int | None) -> Record:
    """What splits may call a treatment, by label field; of none, nothing."""
    query = "SELECT name AS perturbation, name_with_dose AS treatment, target FROM treatments"
    return next(iter(_ask(session, f"{query} WHERE id = :id", id=treatment_id)), {})


def _plate(session: Session, plate_id: int) -> Audit:
    """What the store has of a plate, and every correction of it."""
    query = """
        SELECT id AS plate_id, barcode, batch, cell_line, time_point, metadata,
            (SELECT count(*) FROM wells WHERE wells.plate_id = plates.id) AS wells,
            (
                SELECT count(*) FROM images JOIN wells ON wells.id = images.well_id
                WHERE wells.plate_id = plates.id
            ) AS images
        FROM plates WHERE id = :plate
    """
    (record,) = _ask(session, query, plate=plate_id)
    of_plate = "SELECT images.id FROM images JOIN wells ON wells.id = well_id WHERE plate_id = :id"
    record |= {
        "excluded": why_not_counted(session, plate=plate_id),
        "annotations": _annotations(session, plate=plate_id),
        "corrections": _corrections(session, plates=[plate_id]),
        "downstream": _downstream_of_images(session, of_plate, id=plate_id),
    }
    return Audit("plate", f"Plate {record['barcode']}", record)


def why_not_counted(session: Session, **ids: int) -> str | None:
    """Why something does not count: the first reason that a person gave; ``ids`` by level."""
    of = " OR ".join(f"level = '{level}' AND id = :{level}" for level in ids)
    query = f"SELECT level, reason FROM exclusions WHERE source = 'annotation' AND ({of})"  # noqa: S608
    reasons = {row["level"]: row["reason"] for row in _ask(session, query, **ids)}
    return next((reasons[level] for level in ids if level in reasons), None)


def _annotations(session: Session, **ids: int) -> list[Record]:
    """The labels that people gave something and what it is part of; ``ids`` by level."""
    row = T["annotations"].c
    mine = or_(*(and_(row.level == level, row.row_id == number) for level, number in ids.items()))
    query = select(row.field, row.value.label("label"), row.level.label("of"))
    query = query.add_columns(row.user_name.label("by"), row.created_at, row.reason)
    found = session.execute(query.where(mine, is_label_now(row)).order_by(row.id))
    return [dict(row) | {"created_at": row["created_at"].isoformat()} for row in found.mappings()]


def _image(session: Session, image_id: int) -> Audit:
    """Every run that labelled an image, with its evidence."""
    query = """
        SELECT images.id AS image_id, barcode AS plate, wells.name AS well, site, plane,
            images.time_point, core_name, pixel_size, content_sha256,
            name_with_dose AS treatment, target, control, well_id, plate_id
        FROM images JOIN wells ON wells.id = well_id JOIN plates ON plates.id = plate_id
        LEFT JOIN treatments ON treatments.id = treatment_id
        WHERE images.id = :image
    """
    (record,) = _ask(session, query, image=image_id)
    well_id, plate_id = record.pop("well_id"), record.pop("plate_id")
    query = """
        SELECT channel, name, rtrim(uri, '/') || '/' || name AS uri, sha256, size_bytes, folder_id
        FROM image_files LEFT JOIN folders ON folders.id = folder_id
        WHERE image_id = :image ORDER BY position
    """
    files = _ask(session, query, image=image_id)
    moved = {file.pop("folder_id") for file in files} - {None}
    frozen, notes = _frozen_labels(session, well_id, "images.id = :id", image_id)
    query = """
        SELECT run_id, reason, nullif(channel, '') AS channel, value, low, high
        FROM image_flags JOIN runs ON runs.id = run_id
        WHERE image_id = :image AND status = 'done' ORDER BY run_id, reason, image_flags.channel
    """
    flags, now = _ask(session, query, image=image_id), channels_now(session, record["plate"])
    for flag in flags:
        flag["channel"] = now.get(flag["channel"], flag["channel"])
    # Of cells that another tool found, ``imported`` names it. Unknown bytes count as current:
    # nothing can contradict them.
    query = """
        SELECT segmentations.id, run_id, recipe_id, fingerprint, weights_sha256, parameters,
            segmentations.created_at AS made_at, n_cells, diameter,
            coalesce(
                segmentations.content_sha256 = images.content_sha256,
                segmentations.content_sha256 IS NULL
            ) AS current,
            mask_artifact_id IS NOT NULL AS has_masks, parameters ->> 'imported' AS imported
        FROM segmentations JOIN recipes ON recipes.id = recipe_id
        JOIN images ON images.id = image_id
        WHERE image_id = :image ORDER BY segmentations.id
    """
    found = _ask(session, query, image=image_id)
    downstream = _downstream_of_images(session, ":id", id=image_id)
    labelled = any(item["what"].startswith("labelled") for item in downstream)
    record |= {
        "excluded": why_not_counted(session, image=image_id, well=well_id, plate=plate_id),
        "annotations": _annotations(session, image=image_id, well=well_id, plate=plate_id),
        "missing_files": sum(file["sha256"] is None for file in files),
        "notes": notes,
        "corrections": _corrections(
            session, images=[image_id], wells=[well_id], plates=[plate_id], folders=moved
        ),
        "frozen_labels": frozen,
        "flags": flags,
        "files": files,
        "segmentations": found,
        "labellings": _labellings(session, image_id, well_id, found) if labelled else [],
        "downstream": downstream,
    }
    name = "{plate}/{well}/{site}".format(**record)
    return Audit("image", f"Image {name}", record)


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


def runs_about(
    session: Session, image_id: int, well_id: int, run_ids: Collection[int]
) -> list[Record]:
    """Return predict runs, the oldest first, and what each knew of an image before it looked.

    ``truth``: the label of the split, else what the well has in its field; ``subset`` is that of
    the image in the split, ``well_subsets`` all in which its well has images. ``well_in_training``:
    the network was trained on images of this well (None: not known of a model from elsewhere).
    """
    query = """
        SELECT runs.id AS run_id, runs.started_at, runs.user_name AS "user", runs.host,
            runs.code_version, runs.parent_id AS train_run_id, splits.name AS split, protocol,
            splits.id AS split_id, splits.field, subset, labels.value AS truth, runs.origin,
            runs.status,
            parameters ->> 'declared' AS model, parameters ->> 'trained_on' AS trained_on,
            parameters ->> 'baseline' AS baseline,
            CASE WHEN parameters ->> 'declared' IS NOT NULL THEN weights_sha256 END
                AS weights_sha256
        FROM runs LEFT JOIN runs AS parents ON parents.id = runs.parent_id
        LEFT JOIN recipes ON recipes.id = parents.recipe_id
        LEFT JOIN splits ON splits.id = coalesce(runs.split_id, parents.split_id)
        LEFT JOIN split_members
            ON split_members.split_id = splits.id AND split_members.image_id = :image
        LEFT JOIN labels ON labels.id = label_id
        WHERE runs.id IN :runs ORDER BY runs.id
    """
    runs = _ask(session, query, image=image_id, runs=sorted(run_ids))
    of_well = """
        SELECT DISTINCT split_id, subset FROM split_members JOIN images ON images.id = image_id
        WHERE well_id = :well
    """
    in_well = {(row["split_id"], row["subset"]) for row in _ask(session, of_well, well=well_id)}
    for run in runs:
        if run["truth"] is None and run["field"] is not None:
            now = _labels_now(session, run["field"], "images.id = :id", image_id)
            run["truth"] = next(iter(now), None)
        run["well_subsets"] = [s.value for s in Subset if (run["split_id"], s.value) in in_well]
        learned, known = {Subset.TRAIN.value}, True
        if run["model"] is not None:
            learned, known = (
                set((run["trained_on"] or "").split(",")),
                run["trained_on"] is not None,
            )
        seen = not learned.isdisjoint(run["well_subsets"])
        run["well_in_training"] = seen if known else None
    return runs


def _labellings(
    session: Session, image_id: int, well_id: int, found: Sequence[Record]
) -> list[Record]:
    """What each predict run answered for an image, the oldest run first; see :func:`runs_about`.

    ``winner`` is the label of the hard vote, ``soft_winner`` that of the summed probabilities;
    ``subset`` that of the image in the split (``outside``: in none). ``found``: its segmentations.
    """
    from ..query.engine import rank_counts  # DuckDB takes some time to load

    counts = _counted(session, image_id)
    ranked = rank_counts(counts)
    runs = runs_about(session, image_id, well_id, {row["run_id"] for row in counts})
    checkpoints: dict[int | None, list[str]] = {}
    labellings = []
    for run in runs:
        truth = run["truth"]
        hard, soft = (ranked[run["run_id"], vote] for vote in ("hard", "soft"))
        mine = [row for row in counts if row["run_id"] == run["run_id"]]
        names = {row["label_id"]: row["label"] for row in mine}
        winner = names[hard["winner_id"]]
        mine.sort(key=lambda row: (-row["cells"], -row["probability"], row["label"]))
        used = {number for row in mine for number in row["segmentations"]}
        seen = [item for item in found if item["id"] in used]
        keys = ["run_id", "started_at", "user", "host", "code_version", "train_run_id"]
        keys += ["origin", "status", "model", "weights_sha256"]
        if (trained := run["train_run_id"]) not in checkpoints:
            checkpoints[trained] = _checkpoints(session, trained)
        labellings.append(
            {
                **{key: run[key] for key in keys},
                "checkpoints": checkpoints[trained],
                "split": run["split"],
                "protocol": run["protocol"],
                "subset": run["subset"] or "outside",
                "well_subsets": run["well_subsets"],
                "well_in_training": run["well_in_training"],
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
    query = """
        SELECT sha256 FROM artifacts JOIN run_artifacts ON artifact_id = artifacts.id
        WHERE kind = 'checkpoint' AND run_id = :run ORDER BY artifacts.id
    """
    return [row["sha256"] for row in _ask(session, query, run=run_id)]


def _labels_now(session: Session, field: str, of: str, of_id: int) -> list[str]:
    """What the images that meet a condition are called now in a label field."""
    query = select(field_column(field).label("label")).distinct().where(text(of)).params(id=of_id)
    joined = images.join(wells).join(plates).outerjoin(treatments)
    found = session.scalars(query.select_from(joined).order_by("label"))
    return [label for label in found if label is not None]


def _frozen_labels(
    session: Session, well_id: int, of: str, of_id: int
) -> tuple[list[Record], list[str]]:
    """The labels that splits keep of some images of a well, and a sentence where the well differs.

    ``of``: the condition on these images, in which ``:id`` is ``of_id``. ``since``: who or which
    run made it differ, when, from which file and line, for what reason; what is not known is left
    out.
    """
    query = f"""
        SELECT DISTINCT splits.name AS split, splits.field, subset, labels.value AS label
        FROM split_members JOIN splits ON splits.id = split_id JOIN labels ON labels.id = label_id
        JOIN images ON images.id = image_id
        WHERE {of} ORDER BY splits.name, subset, labels.value
    """  # noqa: S608 - our own words
    found, notes = _ask(session, query, id=of_id), list[str]()
    for row in found:
        labels = _labels_now(session, row["field"], of, of_id)
        now = row["label"] if row["label"] in labels else ", ".join(labels) or None
        since = _since(session, well_id, row["field"]) if now != row["label"] else None
        row |= {"now": now, "differs": now != row["label"], "since": since}
        if now != row["label"]:
            text = f"label in split {row['split']}: {row['label']}; the well now has: "
            text += now or "none"
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
    return found, notes


def _since(session: Session, well_id: int, label_field: str) -> Record | None:
    """The last change of what a well is called in a label field; None: not known."""
    query = f"""
        SELECT user_name AS "by", created_at AS changed_at, run_id, file, line, reason, table_name,
            old, new
        FROM events WHERE table_name = 'wells' AND row_id IN :wells OR {OF_PERTURBATIONS}
        ORDER BY id DESC
    """  # noqa: S608 - our own words
    for event in _ask(session, query, wells=[well_id]):
        old, new = event.pop("old") or {}, event.pop("new") or {}
        if event.pop("table_name") == "perturbations":
            changed = label_field in new
        else:
            before, after = (_labels_of(session, some.get("treatment_id")) for some in (old, new))
            changed = before.get(label_field) != after.get(label_field)
        if changed:
            return {key: value for key, value in event.items() if value is not None}
    return None


def audit_well(session: Session, well_id: int) -> Audit:
    """Return what a well has, what it had, and its labels in splits."""
    query = """
        SELECT wells.id AS well_id, barcode AS plate, wells.name AS well, control, plate_id
        FROM wells JOIN plates ON plates.id = plate_id WHERE wells.id = :well
    """
    (record,) = _ask(session, query, well=well_id)
    plate_id = record.pop("plate_id")
    query = """
        SELECT name_with_dose AS name, kind, treatments.target, identifier
        FROM wells JOIN treatments ON treatments.id = wells.treatment_id
        LEFT JOIN treatment_parts ON treatment_parts.treatment_id = treatments.id
        LEFT JOIN perturbations ON perturbations.id = perturbation_id
        WHERE wells.id = :well ORDER BY treatment_parts.position
    """
    parts = _ask(session, query, well=well_id)
    kinds = "|".join(part["kind"] or "" for part in parts)
    identifiers = "|".join(part["identifier"] or "" for part in parts)
    whole = parts and {**parts[0], "kind": kinds, "identifier": identifiers or None}
    of_well = "SELECT id FROM images WHERE well_id = :id"
    frozen, notes = _frozen_labels(session, well_id, "images.well_id = :id", well_id)
    record |= {
        "treatment": whole or None,
        "excluded": why_not_counted(session, well=well_id, plate=plate_id),
        "images": [row["id"] for row in _ask(session, f"{of_well} ORDER BY id", id=well_id)],
        "notes": notes,
        "annotations": _annotations(session, well=well_id, plate=plate_id),
        "corrections": _corrections(session, wells=[well_id], plates=[plate_id]),
        "frozen_labels": frozen,
        "downstream": _downstream_of_images(session, of_well, id=well_id),
    }
    return Audit("well", f"Well {record['plate']}/{record['well']}", record)


def _cell(session: Session, number: str) -> Audit:
    """A cell, its masks, its measurements and what every run predicted for it.

    ``box`` is min row, min col, max row, max col (half open) in pixels; it and ``centroid`` are
    null where another tool found the cell and does not report them.
    """
    cell_id, image_id = find_cell(session, number)
    (cell,) = _ask(session, "SELECT * FROM cells WHERE id = :cell", cell=cell_id)
    image = _image(session, image_id)
    name = "{plate}/{core_name}".format(**image.record)
    box = [cell[key] for key in ("min_row", "min_col", "max_row", "max_col")]
    centroid = [cell[key] for key in ("centroid_row", "centroid_col")]
    flags = """
        SELECT run_id, reason, value FROM cell_flags JOIN runs ON runs.id = run_id
        WHERE cell_id = :cell AND status = 'done' ORDER BY run_id, reason
    """
    measured = _ask(
        session, "SELECT * FROM features WHERE cell_id = :cell ORDER BY recipe_id", cell=cell_id
    )
    for row in measured:
        del row["cell_id"], row["run_id"]
    choices = """
        SELECT run_id, rank, value AS label, probability
        FROM predictions JOIN labels ON labels.id = label_id
        WHERE cell_id = :cell ORDER BY run_id, rank
    """
    record = {
        "cell_id": cell_id,
        "image": name,
        "image_id": image_id,
        "object_number": cell["object_number"],
        "box": None if None in box else box,
        "centroid": None if None in centroid else centroid,
        "excluded": next(iter(why_excluded(session, cell_id)), None),
        "annotations": _annotations(session, cell=cell_id),
        "corrections": _corrections(session, cells=[cell_id]),
        "flags": _ask(session, flags, cell=cell_id),
        "segmentation": next(
            item for item in image.record["segmentations"] if item["id"] == cell["segmentation_id"]
        ),
        "features": {f"recipe {row.pop('recipe_id')}": row for row in measured},
        "choices": _ask(session, choices, cell=cell_id),
    }
    return Audit("cell", f"Cell {cell_id} of {name}", record, image)


# Runs

RUN = """
    runs.id AS run_id, stage, status, started_at, user_name AS "user", code_version
"""


def _run(session: Session, run_id: int) -> Audit:
    """A run: what it did, from what, and what came of it.

    ``inputs`` are the recipes it reads from, all the way up. ``notes``, of profile and hits runs,
    say whether wells were changed since. ``ingested``: the files that an ingest read.
    """
    query = f"""
        SELECT {RUN}, ended_at, host, origin, command, runs.seed, runs.query, error,
            splits.name AS split, protocol, result, environment, runs.recipe_id, split_id, parent_id
        FROM runs LEFT JOIN splits ON splits.id = split_id WHERE runs.id = :run
    """  # noqa: S608 - our own words
    (record,) = _ask(session, query, run=run_id)
    results = {key: record.pop(key) for key in ("result", "environment")}
    recipe_id, split_id = record.pop("recipe_id"), record.pop("split_id")
    parents: list[Record] = []
    parent_id = record.pop("parent_id")
    while parent_id is not None:
        above = f"SELECT {RUN}, parent_id, recipe_id FROM runs WHERE id = :run"  # noqa: S608
        parents += _ask(session, above, run=parent_id)
        parent_id = parents[-1].pop("parent_id")
        parents[-1]["checkpoints"] = _checkpoints(session, parents[-1]["run_id"])
    recipes = _recipes(session, recipe_id)
    members = {} if split_id is None else {s.value: 0 for s in Subset}
    query = """
        SELECT subset, count(*) AS n FROM split_members WHERE split_id = :split GROUP BY subset
    """
    members |= {row["subset"]: row["n"] for row in _ask(session, query, split=split_id)}
    statuses = "SELECT status, count(*) AS n FROM jobs WHERE run_id = :run GROUP BY status"
    ingested = """
        SELECT name, layout, sha256, n_rows AS "rows", n_created AS created, n_updated AS updated,
            n_unchanged AS unchanged, n_refused AS refused
        FROM ingest_files WHERE run_id = :run ORDER BY id
    """
    written = """
        SELECT kind, path, sha256, size_bytes
        FROM artifacts JOIN run_artifacts ON artifact_id = artifacts.id
        WHERE run_id = :run ORDER BY artifacts.id
    """
    children = f"SELECT {RUN} FROM runs WHERE parent_id = :run ORDER BY id"  # noqa: S608
    corrections = _corrections(session, runs=[run_id])
    record |= {
        "corrections": [row for row in corrections if row["old"]],
        "split_counts": members,
        "jobs": {row["status"]: row["n"] for row in _ask(session, statuses, run=run_id)},
        **results,
        "recipe": recipes.pop(recipe_id),
        "inputs": list(recipes.values()),
        "parents": parents,
        "children": _ask(session, children, run=run_id),
        "ingested": _ask(session, ingested, run=run_id),
        "artifacts": _ask(session, written, run=run_id),
        "downstream": _downstream(session, runs_of=[run_id]),
    }
    if record["stage"] in (Stage.PROFILE, Stage.HITS):
        record["notes"] = changed_since(session, run_id)
    return Audit("run", f"Run {run_id}: {record['stage']}", record)


def _recipes(session: Session, recipe_id: int) -> dict[int, Record]:
    """A recipe and all that it reads from, by id, each with the ids of those it reads itself."""
    above = """
        WITH RECURSIVE above(id) AS (
            SELECT id FROM recipes WHERE id = :recipe UNION
            SELECT input_id FROM recipe_inputs JOIN above ON above.id = recipe_id
        )
    """
    query = f"""{above}
        SELECT id, stage, version, fingerprint, weights_sha256, parameters FROM recipes
        WHERE id IN (SELECT id FROM above) ORDER BY id
    """  # noqa: S608 - our own words
    found = _ask(session, query, recipe=recipe_id)
    recipes = {row["id"]: {**row, "reads": []} for row in found}
    read = f"{above} SELECT * FROM recipe_inputs WHERE recipe_id IN (SELECT id FROM above)"  # noqa: S608
    for row in _ask(session, f"{read} ORDER BY recipe_id, input_id", recipe=recipe_id):
        recipes[row["recipe_id"]]["reads"].append(row["input_id"])
    return recipes


# What came of something


OF_IMAGES = {
    "segmentations": """
        SELECT count(*) AS n, run_id FROM segmentations
        WHERE image_id IN ({of}) GROUP BY run_id ORDER BY run_id
    """,
    "cells": "SELECT sum(n_cells) AS n FROM segmentations WHERE image_id IN ({of})",
    "measured cells": """
        SELECT count(*) AS n, features.run_id FROM features
        WHERE cell_id IN ({of_cells}) GROUP BY features.run_id ORDER BY features.run_id
    """,
    "feature sets": """
        SELECT DISTINCT name, run_id
        FROM jobs JOIN feature_sets ON feature_sets.recipe_id = jobs.recipe_id
        WHERE image_id IN ({of}) AND status = 'done' ORDER BY name, run_id
    """,
    "splits": """
        SELECT name FROM splits
        WHERE id IN (SELECT split_id FROM split_members WHERE image_id IN ({of})) ORDER BY id
    """,
    "trainings on these splits": """
        SELECT 1 AS n, id AS run_id FROM runs WHERE stage = 'train'
            AND split_id IN (SELECT split_id FROM split_members WHERE image_id IN ({of}))
        ORDER BY id
    """,
    "labelled cells": """
        SELECT count(*) AS n, predictions.run_id FROM predictions
        WHERE rank = 1 AND cell_id IN ({of_cells})
        GROUP BY predictions.run_id ORDER BY predictions.run_id
    """,
    "labelled images": """
        SELECT count(*) AS n, run_id FROM image_predictions
        WHERE rank = 1 AND image_id IN ({of}) GROUP BY run_id ORDER BY run_id
    """,
}
"""What may have come of images, whose ids are the query ``of``: questions, each by its name.

They say how many of it there are (``n``), by which run, or what it is called.
"""
OF_RUNS = {
    "segmentations": "SELECT count(*) AS n FROM segmentations WHERE {by}",
    "cells": "SELECT sum(n_cells) AS n FROM segmentations WHERE {by}",
    "feature sets": "SELECT name FROM feature_sets WHERE recipe_id IN :recipes ORDER BY id",
    "feature files": "SELECT count(*) AS n FROM feature_files WHERE run_id IN :runs",
    "cells in feature files": "SELECT sum(n_rows) AS n FROM feature_files WHERE run_id IN :runs",
    "wells with another treatment": "SELECT {changed} AS n",
    "{stage} runs": "SELECT 1 AS n, id AS run_id, stage FROM runs WHERE {later} ORDER BY id",
    "images labelled": """
        SELECT count(*) AS n FROM jobs WHERE status = 'done'
            AND run_id IN (SELECT id FROM runs WHERE stage = 'predict' AND {later})
    """,
    "scores of treatments": "SELECT count(*) AS n FROM treatment_scores WHERE run_id IN :runs",
}
"""What may have come of runs or recipes."""


def _came(
    session: Session, questions: Mapping[str, str], parts: Mapping[str, Any], **values: Any
) -> list[Record]:
    """What there is of something, a row for each kind of thing; what has names is counted by them.

    ``parts`` are put into the questions, ``values`` are bound.
    """
    found: dict[str, Record] = {}
    for name, query in questions.items():
        for row in _ask(session, query.format(**parts), **values):
            what = name.format(**row)
            item = found.setdefault(what, {"what": what, "count": 0, "runs": [], "names": []})
            item["count"] += row.get("n") or 0
            for key, value in (("runs", row.get("run_id")), ("names", row.get("name"))):
                if value is not None and value not in item[key]:
                    item[key].append(value)
    for item in found.values():
        item["runs"].sort()
        item["count"] = len(item["names"]) or item["count"]
    return [item for item in found.values() if item["count"]]


def _downstream_of_images(session: Session, of: str, **values: Any) -> list[Record]:
    """What came of some images; ``of`` is a query of their ids, with ``values`` in it."""
    of_cells = f"""
        SELECT cells.id FROM cells JOIN segmentations ON segmentations.id = segmentation_id
        WHERE image_id IN ({of})
    """  # noqa: S608 - our own words
    return _came(session, OF_IMAGES, {"of": of, "of_cells": of_cells}, **values)


def _downstream(
    session: Session, *, runs_of: Collection[int] = (), recipes_of: Collection[int] = ()
) -> list[Record]:
    """What came of runs, or of recipes and of all recipes that read what they wrote."""
    below = """
        WITH RECURSIVE below(id) AS (
            SELECT id FROM recipes WHERE id IN :recipes UNION
            SELECT recipe_id FROM recipe_inputs JOIN below ON below.id = input_id
        )
        SELECT id FROM below
    """
    recipes = [row["id"] for row in _ask(session, below, recipes=recipes_of)]
    changed = wells_changed(events.c.run_id.in_(runs_of)).subquery()
    parts = {
        "by": "recipe_id IN :recipes" if recipes else "run_id IN :runs",
        "later": "recipe_id IN :recipes" if recipes else "parent_id IN :runs",
        "changed": session.scalar(select(func.count()).select_from(changed)),
    }
    return _came(session, OF_RUNS, parts, runs=runs_of, recipes=recipes)


# Files

LISTED = 8
MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""
WROTE, IMAGE_FILE, TABLE, WEIGHTS = "artifact", "image file", "ingested table", "weights"
FILES = {
    WROTE: ("artifacts", "sha256"),
    IMAGE_FILE: ("image_files", "sha256"),
    TABLE: ("ingest_files", "sha256"),
    WEIGHTS: ("recipes", "weights_sha256"),
}
"""Which tables know files, and their columns of digests. A recipe knows the weights it uses."""


def _artifact(session: Session, text: str, *, on_disk: bool) -> Audit:
    """What a file is to the store, and what came of it.

    ``text``: the path or name of a file that the store wrote or read, the first digits (6 at
    least) of its sha256, the id of an artifact, or the path of a file on this machine, which is
    hashed and looked up by its bytes.
    """
    path = _on_disk(text) if on_disk else None
    digest = None if path is None else sha256_of(path)
    text = readable(text)
    found = _files_named(session, text) if digest is None else _files_by(session, digest)
    different = {file["sha256"]: file for file in found}
    if not found:
        raise _unknown_file(session, text, digest)
    if len(different) > 1:
        listed = [f"{file['kind']} {file['name']} ({d[:12]})" for d, file in different.items()]
        more = ", ..." if len(listed) > LISTED else ""
        raise UserInputError(
            f"{text!r} names several files: {', '.join(listed[:LISTED])}{more}. "
            "Name one by the start of its sha256."
        )
    (sha256,) = different
    # One row of each kind; of image files each, for they are of several images.
    files: dict[tuple[str, int | None], Record] = {}
    for file in _files_by(session, sha256):
        key = (file["kind"], file["id"] if file["source"] == IMAGE_FILE else None)
        files.setdefault(key, file)
    known = [_known(session, file) for file in files.values()]
    hashed = None if path is None else str(path)
    record = {"asked": text, "sha256": sha256, "hashed": hashed, "known": known}
    return Audit("artifact", f"File {known[0]['name']}", record)


def _on_disk(text: str) -> Path | None:
    try:
        path = Path(text)
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _unknown_file(session: Session, text: str, digest: str | None) -> UnknownNameError:
    if digest is not None:
        files = _files_of_name(session, re.split(r"[/\\]", text)[-1])
        same = ", ".join(file["sha256"][:12] for file in files[:3])
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


def _files_named(session: Session, text: str) -> list[Record]:
    """The files that ``text`` may mean: by id, path, name, or the start of a sha256."""
    found = []
    if text.isdecimal() and len(text) < 19:
        found = _files(session, WROTE, "id = :id", id=int(text))
    found = found or _files(session, WROTE, "path = :path", path=text)
    name = re.split(r"[/\\]", text)[-1]
    found = found or _files_of_name(session, text) or _files_of_name(session, name)
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _files_by(session, start))


def _files_of_name(session: Session, name: str) -> list[Record]:
    seen = _files(session, IMAGE_FILE, "name = :name AND sha256 IS NOT NULL", name=name)
    return [*seen, *_files(session, TABLE, "name = :name", name=name)]


def _files_by(session: Session, digits: str) -> list[Record]:
    """The files by their sha256, or by its start."""
    found: list[Record] = []
    for source, (_, column) in FILES.items():
        if len(digits) == 64:
            found += _files(session, source, f"{column} = :digits", digits=digits)
        else:  # as a range, for an index; g is the letter after all digits
            named = f"{column} >= :first AND {column} < :last"
            found += _files(session, source, named, first=digits, last=f"{digits}g")
    return found


def _files(session: Session, source: str, condition: str, **values: Any) -> list[Record]:
    """Files that a table knows: its rows, each with ``source``, ``kind``, ``name``, ``sha256``."""
    table, column = FILES[source]
    query = f"SELECT * FROM {table} WHERE {condition} ORDER BY id LIMIT {MOST}"  # noqa: S608
    found = []
    for row in _ask(session, query, **values):
        file = {"kind": source, "path": None, **row, "source": source, "sha256": row[column]}
        if source == WROTE:
            file["name"] = row["path"].rpartition("/")[2]
        elif source == WEIGHTS:
            named = row["parameters"].get("model", row["parameters"].get("weights"))
            file["name"] = str(named or f"{row['stage']} recipe {row['id']}")
        found.append(file)
    return found


def _known(session: Session, file: Record) -> Record:
    """A file as one row knows it: what it is, where, of what, by which runs, and what came of it.

    ``key`` is the id of the row.
    """
    about: list[str] = []
    by: set[int] = set()
    using: set[int] = set()
    source, own, of = file["source"], {"id": file["id"]}, ""
    if source == IMAGE_FILE:
        query = """
            SELECT barcode || '/' || wells.name || '/' || site || ' ' || core_name AS name,
                rtrim(uri, '/') || '/' || image_files.name AS path
            FROM image_files JOIN images ON images.id = image_id
            JOIN wells ON wells.id = well_id JOIN plates ON plates.id = plate_id
            LEFT JOIN folders ON folders.id = folder_id
            WHERE image_files.id = :id
        """
        (image,) = _ask(session, query, **own)
        about = [f"channel {file['channel']} of image {image['name']}"]
        of, file["path"] = "SELECT image_id FROM image_files WHERE id = :id", image["path"]
    elif source == TABLE:
        same = "SELECT * FROM ingest_files WHERE sha256 = :sha256 ORDER BY id"
        for read in _ask(session, same, sha256=file["sha256"]):
            by.add(read["run_id"])
            about.append(
                "run {run_id} read it as {layout}: {n_rows:,} rows, {n_created:,} new, "
                "{n_updated:,} updated, {n_unchanged:,} unchanged, {n_refused:,} refused".format(
                    **read
                )
            )
    elif source == WEIGHTS:
        users = """
            SELECT recipes.id, recipes.stage, fingerprint, runs.id AS run_id
            FROM recipes LEFT JOIN runs ON runs.recipe_id = recipes.id
            WHERE weights_sha256 = :sha256 ORDER BY recipes.id
        """
        for recipe in _ask(session, users, sha256=file["sha256"]):
            short = recipe["fingerprint"][:12]
            text = f"{recipe['stage']} recipe {recipe['id']} ({short}) uses it"
            about += [] if text in about else [text]
            using.add(recipe["id"])
            by |= {recipe["run_id"]} - {None}
    else:
        wrote = "SELECT run_id FROM run_artifacts WHERE artifact_id = :id"
        by.update(row["run_id"] for row in _ask(session, wrote, **own))
        if file["kind"] in ("mask", "flow"):
            of = f"""
                SELECT image_id FROM segmentations WHERE {file["kind"]}_artifact_id = :id
                LIMIT {MOST}
            """  # noqa: S608 - our own words
            drawn = f"""
                SELECT barcode || '/' || core_name AS name, run_id FROM segmentations
                JOIN images ON images.id = image_id JOIN wells ON wells.id = well_id
                JOIN plates ON plates.id = plate_id
                WHERE {file["kind"]}_artifact_id = :id LIMIT {MOST}
            """  # noqa: S608 - our own words
            found = _ask(session, drawn, **own)
            by.update(row["run_id"] for row in found)
            about = list(dict.fromkeys(f"of image {row['name']}" for row in found))
        elif file["kind"] == "features":
            parts = """
                SELECT run_id, recipe_id, name, n_rows, first_cell_id, last_cell_id
                FROM feature_files JOIN feature_sets ON feature_sets.id = feature_set_id
                WHERE artifact_id = :id
            """
            for part in _ask(session, parts, **own):
                by.add(part["run_id"])
                using.add(part["recipe_id"])
                about.append(
                    f"of feature set {part['name']}: {part['n_rows']:,} cells, "
                    f"ids {part['first_cell_id']} to {part['last_cell_id']}"
                )
    if of:
        downstream = _downstream_of_images(session, of, **own)
    else:
        downstream = _downstream(session, runs_of=() if using else by, recipes_of=using)
    if source == TABLE:
        downstream = _of_ingest(session, by, downstream)
    runs = f"SELECT {RUN} FROM runs WHERE id IN :ids ORDER BY id"  # noqa: S608 - our own words
    return {
        "kind": file["kind"],
        "key": file["id"],
        "name": file["name"],
        "path": file["path"],
        "sha256": file["sha256"],
        "size_bytes": file.get("size_bytes"),
        "about": about,
        "runs": _ask(session, runs, ids=by),
        "downstream": downstream,
    }


def _of_ingest(session: Session, by: Collection[int], came: list[Record]) -> list[Record]:
    """What ingest runs brought, what came of it, and of the wells that they changed."""
    first, last = (f"CAST(new ->> '{key}' AS BIGINT)" for key in ("first_id", "last_id"))
    new = f"run_id IN :runs AND old IS NULL AND {last} IS NOT NULL"
    brought = f"""
        SELECT replace(table_name, '_', ' ') AS kind, {last} - {first} + 1 AS n, run_id
        FROM events WHERE {new} ORDER BY id
    """  # noqa: S608 - our own words
    downstream = [*_came(session, {"new {kind}": brought}, {}, runs=by), *came]
    changed = wells_changed(events.c.run_id.in_(by))
    of_wells = select(images.c.id).where(images.c.well_id.in_(changed))
    of_images = f"""
        SELECT images.id FROM events CROSS JOIN images
        WHERE {new} AND table_name = 'images' AND images.id BETWEEN {first} AND {last}
    """  # noqa: S608 - our own words
    ids = str(of_wells.compile(session.connection(), compile_kwargs={"literal_binds": True}))
    for these, of in (("wells", ids), ("images", of_images)):
        for item in _downstream_of_images(session, of, runs=by):
            downstream.append({**item, "what": f"{item['what']} of these {these}"})
    return downstream


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
