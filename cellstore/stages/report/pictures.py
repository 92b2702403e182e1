"""Images of a report: fields of view with the outlines of their cells."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...analytics import Questions
from ...config import ImageInput
from ...db.models import Recipe, Segmentation
from ...errors import CellstoreError
from ...ops.overlay import outline_overlay, to_grey
from ...reading.planes import read_artifact_image, read_image
from ...runs import Workspace
from ...terms import Projection
from .score import Subject

WIDEST = 460
"""Pixels of a picture on the page."""
SHOWN_VOTES = 4

CANDIDATES = """
    SELECT s.image_id, s.winner, s.truth, s.share, s.correct, s.n_cells, h.tie,
        l.segmentation_id, l.plate, l.well, l.site
    FROM image_votes AS s
    JOIN image_votes AS h ON h.run_id = s.run_id AND h.image_id = s.image_id AND h.vote = 'hard'
    JOIN lineage AS l ON l.run_id = s.run_id AND l.image_id = s.image_id
    WHERE s.run_id = ? AND s.vote = 'soft' AND list_contains(?, s.subset) AND s.truth IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY s.correct ORDER BY s.share DESC, s.image_id) <= 3
    ORDER BY s.correct, s.share DESC, s.image_id
"""
VOTES = """
    SELECT label, cells, probability FROM image_label_votes
    WHERE run_id = ? AND image_id = ? ORDER BY cells DESC, probability DESC, label
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
    workspace: Workspace, questions: Questions, subject: Subject, sides: tuple[str, ...]
) -> tuple[list[Example], Sample | None]:
    """Return the most confident mistakes and hits, and a sample of the segmentation."""
    rows = questions.ask(CANDIDATES, [subject.run.id, list(sides)]).to_pylist()
    found: list[Example] = []
    sample: Sample | None = None
    for row in rows:
        votes = questions.ask(VOTES, [subject.run.id, row["image_id"]]).to_pylist()
        try:
            plane, masks = _pixels(workspace, row["segmentation_id"])
        except CellstoreError as error:
            found.append(_example(row, votes, None, str(error)))
            continue
        step = -(-max(plane.shape) // WIDEST)
        picture = outline_overlay(_smaller(plane, step), masks[::step, ::step])
        found.append(_example(row, votes, _jpeg(picture), None))
        sample = sample or _sample(_title(row), plane, masks)
    return found, sample


def _pixels(
    workspace: Workspace, segmentation_id: int
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    with workspace.database.read() as session:
        found = session.get_one(Segmentation, segmentation_id)
        named = session.get_one(Recipe, found.recipe_id).parameters.get("image", {})
        masks = read_artifact_image(session, workspace.artifacts, found.mask_artifact_id)
    wanted = ImageInput(
        tuple(named.get("channels", ())), Projection(named.get("projection", Projection.MEDIAN))
    )
    plane = read_image(workspace.database, found.image_id, wanted)
    return plane, masks.astype(np.int64)


def _example(
    row: Mapping[str, Any], votes: list[dict[str, Any]], picture: str | None, problem: str | None
) -> Example:
    return Example(
        title=_title(row),
        kind="right" if row["correct"] else "wrong",
        truth=row["truth"],
        winner=row["winner"],
        share=row["share"],
        tie=row["tie"],
        votes=tuple((item["label"], item["cells"]) for item in votes[:SHOWN_VOTES]),
        n_cells=row["n_cells"],
        picture=picture,
        problem=problem,
    )


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['plate']} {row['well']}, site {row['site']}"


def _sample(title: str, plane: NDArray[np.float32], masks: NDArray[np.integer[Any]]) -> Sample:
    rows, columns = (_middle(length) for length in plane.shape)
    grey = to_grey(plane)[rows, columns]
    outlined = outline_overlay(plane, masks)[rows, columns]
    return Sample(title, _jpeg(np.repeat(grey[..., None], 3, axis=-1)), _jpeg(outlined))


def _middle(length: int) -> slice:
    start = max(0, (length - WIDEST) // 2)
    return slice(start, start + WIDEST)


def _smaller(plane: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Return the means of squares of ``step`` pixels, in the shape of ``plane[::step, ::step]``."""
    missing = [(0, -length % step) for length in plane.shape]
    padded = np.pad(plane, missing, mode="edge")
    rows, columns = padded.shape[0] // step, padded.shape[1] // step
    means: NDArray[np.float32] = padded.reshape(rows, step, columns, step).mean(axis=(1, 3))
    return means


def _jpeg(picture: NDArray[np.uint8]) -> str:
    from imagecodecs import jpeg8_encode

    data = jpeg8_encode(np.ascontiguousarray(picture), level=85)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
