"""Images of a report: fields of view with the outlines of their cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...analytics import Questions
from ...db.models import Recipe, Segmentation
from ...drawing.pictures import WIDEST, jpeg, middle, smaller
from ...errors import CellstoreError
from ...ops.overlay import outline_overlay, to_grey
from ...reading.cells import plane_of, read_masks
from ...reading.planes import read_image
from ...runs import Workspace
from .subject import Subject

SHOWN_VOTES = 4

PER_KIND = 3
PLACES = """
    SELECT s.image_id, s.id AS segmentation_id, p.barcode AS plate, w.name AS well, i.site
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    WHERE list_contains(?, s.image_id) AND s.id IN (
        SELECT c.segmentation_id FROM cells AS c JOIN predictions AS x ON x.cell_id = c.id
        WHERE x.run_id = ? AND x.rank = 1
    )
"""
VOTES = """
    SELECT image_id, label, cells FROM image_label_votes
    WHERE run_id = ? AND list_contains(?, image_id)
    ORDER BY cells DESC, probability DESC, label
"""


@dataclass(frozen=True)
class Example:
    """An image of the report. ``picture`` is a data URI, or ``None`` with the reason why not."""

    title: str
    kind: str
    truth: str
    winner: str
    share: float
    tie: bool
    votes: tuple[tuple[str, int], ...]
    n_cells: int
    picture: str | None
    problem: str | None


@dataclass(frozen=True)
class Sample:
    """The middle of an image at full size, bare and with outlines."""

    title: str
    bare: str
    outlined: str


def examples(
    workspace: Workspace, questions: Questions, subject: Subject, images: pa.Table
) -> tuple[list[Example], Sample | None]:
    """Return the most confident mistakes and hits, and a sample of the segmentation.

    ``images`` are rows of the view ``verdicts``, both votes of each image.
    """
    chosen = _chosen(questions, subject.run.id, images.to_pylist())
    found: list[Example] = []
    sample: Sample | None = None
    for row in chosen:
        try:
            plane, masks = _pixels(workspace, row["segmentation_id"])
        except CellstoreError as error:
            found.append(_example(row, None, str(error)))
            continue
        step = -(-max(plane.shape) // WIDEST)
        picture = outline_overlay(smaller(plane, step), masks[::step, ::step])
        found.append(_example(row, jpeg(picture), None))
        sample = sample or _sample(_title(row), plane, masks)
    return found, sample


def _chosen(
    questions: Questions, run_id: int, images: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the images to show: by confidence of the soft vote, mistakes first."""
    ties = {row["unit_id"]: row["tie"] for row in images if row["vote"] == "hard"}
    soft = [row for row in images if row["vote"] == "soft"]
    soft.sort(key=lambda row: (-row["confidence"], row["unit_id"]))
    rows = [
        row
        for right in (False, True)
        for row in [x for x in soft if x["correct"] is right][:PER_KIND]
    ]
    ids = [row["unit_id"] for row in rows]
    places = {row["image_id"]: row for row in questions.ask(PLACES, [ids, run_id]).to_pylist()}
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for vote in questions.ask(VOTES, [run_id, ids]).to_pylist():
        votes[vote["image_id"]].append((vote["label"], vote["cells"]))
    return [
        {**row, **places[key], "hard_tie": ties[key], "votes": votes[key]}
        for key, row in zip(ids, rows, strict=True)
    ]


def _pixels(
    workspace: Workspace, segmentation_id: int
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    with workspace.database.read() as session:
        found = session.get_one(Segmentation, segmentation_id)
        wanted = plane_of(session.get_one(Recipe, found.recipe_id))
        masks = read_masks(session, workspace.artifacts, found)
    plane = read_image(workspace.database, found.image_id, wanted)
    return plane, masks.astype(np.int64)


def _example(row: Mapping[str, Any], picture: str | None, problem: str | None) -> Example:
    return Example(
        title=_title(row),
        kind="right" if row["correct"] else "wrong",
        truth=row["truth"],
        winner=row["predicted"],
        share=row["confidence"],
        tie=row["hard_tie"],
        votes=tuple(row["votes"][:SHOWN_VOTES]),
        n_cells=sum(cells for _, cells in row["votes"]),
        picture=picture,
        problem=problem,
    )


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['plate']} {row['well']}, site {row['site']}"


def _sample(title: str, plane: NDArray[np.float32], masks: NDArray[np.integer[Any]]) -> Sample:
    rows, columns = (middle(length) for length in plane.shape)
    grey = to_grey(plane)[rows, columns]
    outlined = outline_overlay(plane, masks)[rows, columns]
    return Sample(title, jpeg(np.repeat(grey[..., None], 3, axis=-1)), jpeg(outlined))
