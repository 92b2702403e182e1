"""Images of a report: fields of view with the outlines of their cells."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...analytics import Questions
from ...db.models import Recipe, Segmentation
from ...drawing.pictures import WIDEST, jpeg, middle, smaller
from ...errors import CellstoreError
from ...ops.overlay import outline_overlay, to_grey
from ...reading.cells import plane_of, read_masks
from ...reading.planes import read_image
from ...runs import Workspace
from .comparison_facts import Comparison, Difference

SHOWN_VOTES = 4
MISTAKES = 6
HITS = 3
SAMPLES = 4
DIFFERENT = 6

PLACES = """
    SELECT s.image_id, s.id AS segmentation_id, p.barcode AS plate, w.name AS well, i.site,
        s.n_cells
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    WHERE list_contains(?, s.image_id) AND s.id IN (
        SELECT c.segmentation_id FROM cells AS c JOIN predictions AS x ON x.cell_id = c.id
        WHERE x.run_id = ? AND x.rank = 1
    )
    ORDER BY s.id
"""
VOTES = """
    SELECT image_id, label, cells FROM image_label_votes
    WHERE run_id = ? AND list_contains(?, image_id) AND cells > 0
    ORDER BY cells DESC, probability DESC, label
"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """An image of the report. ``picture`` is a data URI, or ``None`` with the reason why not.

    ``kind`` is right, wrong or different; then ``difference`` says what two runs made of it.
    """

    title: str
    kind: str
    truth: str
    winner: str
    share: float | None
    tie: bool
    votes: tuple[tuple[str, int], ...]
    more_votes: int
    n_cells: int
    picture: str | None
    problem: str | None
    difference: Difference | None = None


@dataclass(frozen=True)
class Sample:
    """The middle of an image at full size, bare and with outlines."""

    title: str
    n_cells: int
    bare: str
    outlined: str


@dataclass(frozen=True)
class Pictures:
    """All images of a report."""

    wrong: tuple[Example, ...]
    right: tuple[Example, ...]
    different: tuple[Example, ...]
    samples: tuple[Sample, ...]


def pictures(
    workspace: Workspace,
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    comparison: Comparison | None = None,
) -> Pictures:
    """Return the most confident mistakes, some hits and samples, and what two runs differ in.

    ``images`` are rows of the view ``verdicts``, every vote of each image. What is drawn by chance
    is the same for the same run.
    """
    draw = random.Random(run_id)  # noqa: S311 - which pictures are shown is no secret
    soft = [row for row in images if row["vote"] == "soft" and row["correct"] is not None]
    wrong = _apart(_surest(row for row in soft if not row["correct"]), MISTAKES)
    right = _apart(_shuffled(draw, (row for row in soft if row["correct"])), HITS)
    drawn = _shuffled(draw, soft)
    differing = _differing(comparison)
    by_id = {row["unit_id"]: row for row in soft}
    compared = [by_id[item.unit_id] for item in differing if item.unit_id in by_id]
    rows = _placed(questions, run_id, images, [*wrong, *right, *compared], drawn)
    said = {item.unit_id: item for item in differing}
    return Pictures(
        tuple(_example(workspace, rows[row["unit_id"]], "wrong") for row in wrong),
        tuple(_example(workspace, rows[row["unit_id"]], "right") for row in right),
        tuple(
            _example(workspace, rows[row["unit_id"]], "different", said[row["unit_id"]])
            for row in compared
        ),
        tuple(islice(_samples(workspace, _by_plate(drawn, rows)), SAMPLES)),
    )


def _surest(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-(row["confidence"] or 0), row["unit_id"]))


def _shuffled(draw: random.Random, rows: Iterable[Row]) -> list[Row]:
    ordered = sorted(rows, key=lambda row: int(row["unit_id"]))
    draw.shuffle(ordered)
    return ordered


def _apart(rows: Sequence[Row], number: int) -> list[Row]:
    """Return the first rows, one of each well; more of a well only where wells run out."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row["well_id"], row)
        if len(first) == number:
            break
    chosen = list(first.values())
    ids = {row["unit_id"] for row in chosen}
    return [*chosen, *(row for row in rows if row["unit_id"] not in ids)][:number]


def _differing(comparison: Comparison | None) -> list[Difference]:
    """Return some images that two runs differ in: one after the other of each kind, wells apart."""
    if comparison is None or comparison.level != "image":
        return []
    kinds: dict[str, list[Difference]] = {"first": [], "second": [], "neither": []}
    for item in comparison.differing:
        if all(_well(item) != _well(other) for other in kinds[item.right]):
            kinds[item.right].append(item)
    some = [
        item
        for place in range(DIFFERENT)
        for found in (kinds["first"], kinds["second"])
        for item in found[place : place + 1]
    ]
    return [*some, *kinds["neither"]][:DIFFERENT]


def _well(item: Difference) -> str:
    return item.name.rsplit("/", 1)[0]


def _placed(
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    chosen: Sequence[Row],
    drawn: Sequence[Row],
) -> dict[int, dict[str, Any]]:
    """Return what must be known of each image that may be shown, by its id."""
    hard = {row["unit_id"]: row for row in images if row["vote"] == "hard"}
    ids = list(dict.fromkeys(row["unit_id"] for row in [*chosen, *drawn[: 20 * SAMPLES]]))
    by_id = {row["unit_id"]: row for row in [*drawn, *chosen]}
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for vote in questions.ask(VOTES, [run_id, [row["unit_id"] for row in chosen]]).to_pylist():
        votes[vote["image_id"]].append((vote["label"], vote["cells"]))
    return {
        place["image_id"]: {
            **by_id[place["image_id"]],
            **place,
            "hard_tie": hard.get(place["image_id"], {}).get("tie", False),
            "votes": votes[place["image_id"]],
        }
        for place in questions.ask(PLACES, [ids, run_id]).to_pylist()
    }


def _by_plate(drawn: Sequence[Row], rows: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return images in the order drawn, but one of each plate before the second of any."""
    plates: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in drawn:
        if row["unit_id"] in rows:
            found = rows[row["unit_id"]]
            plates[found["plate"]].append(found)
    most = max((len(some) for some in plates.values()), default=0)
    return [some[place] for place in range(most) for some in plates.values() if place < len(some)]


def _pixels(
    workspace: Workspace, segmentation_id: int
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    with workspace.database.read() as session:
        found = session.get_one(Segmentation, segmentation_id)
        wanted = plane_of(session.get_one(Recipe, found.recipe_id))
        masks = read_masks(session, workspace.artifacts, found)
    plane = read_image(workspace.database, found.image_id, wanted)
    return plane, masks.astype(np.int64)


def _example(
    workspace: Workspace, row: Row, kind: str, difference: Difference | None = None
) -> Example:
    picture, problem = None, None
    try:
        plane, masks = _pixels(workspace, row["segmentation_id"])
        step = -(-max(plane.shape) // WIDEST)
        picture = jpeg(outline_overlay(smaller(plane, step), masks[::step, ::step]))
    except CellstoreError as error:
        problem = str(error)
    votes = row["votes"]
    return Example(
        title=_title(row),
        kind=kind,
        truth=row["truth"],
        winner=row["predicted"],
        share=row["confidence"],
        tie=bool(row["hard_tie"]),
        votes=tuple(votes[:SHOWN_VOTES]),
        more_votes=sum(cells for _, cells in votes[SHOWN_VOTES:]),
        n_cells=sum(cells for _, cells in votes),
        picture=picture,
        problem=problem,
        difference=difference,
    )


def _title(row: Row) -> str:
    return f"{row['plate']} {row['well']}, site {row['site']}"


def _samples(workspace: Workspace, rows: Sequence[Row]) -> Iterator[Sample]:
    """Yield what can be opened, of the first so many."""
    for row in rows[: 3 * SAMPLES]:
        try:
            plane, masks = _pixels(workspace, row["segmentation_id"])
        except CellstoreError:
            continue
        places = tuple(middle(length) for length in plane.shape)
        bare = np.repeat(to_grey(plane)[places][..., None], 3, axis=-1)
        outlined = outline_overlay(plane, masks)[places]
        yield Sample(_title(row), row["n_cells"], jpeg(bare), jpeg(outlined))
