"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..enums import PERTURBATION, TARGET, TREATMENT
from ..errors import CellstoreError
from ..jobs.workspace import Workspace
from ..query.engine import Questions
from .answers import Subject, seen_wells
from .audit import audit
from .drawing import (
    LARGE_MAP,
    SMALL_MAP,
    Place,
    PlateMap,
    WellPosition,
    colour_limits,
    field_picture,
    nowhere,
    plate_map_svg,
    write_html,
)
from .gallery import WINDOW, WellPictures, read_field
from .lineage_page import record_parts
from .report_figures import class_content, score_figures, sure_of, training_curves
from .repro import repro
from .scoring import HEADLINE, ReportResult, by_baseline

Row = Mapping[str, Any]

LISTED = 12
"""Rows of a table that are shown at once; the others unfold."""
VOTED = """
    SELECT vote, unit_id, well_id, plate_id, truth, winner AS predicted, share AS confidence, tie,
        correct, control
    FROM votes
    WHERE run_id = ? AND level = 'image' AND vote <> 'median' AND abstained IS NULL
        AND truth IS NOT NULL AND list_contains(?, subset)
    ORDER BY vote, unit_id
"""
"""The scored votes of images that have an answer."""


def write_page(
    workspace: Workspace,
    questions: Questions,
    subject: Subject,
    result: ReportResult,
    path: Path,
) -> None:
    """Write the page of a report; raises StorageError."""
    write_html(path, "report.html.j2", report_content(workspace, questions, subject, result))


def report_content(
    workspace: Workspace,
    questions: Questions,
    subject: Subject,
    result: ReportResult,
    *,
    place: Place = nowhere,
) -> dict[str, Any]:
    """Return what the page of a report shows.

    ``place`` gives addresses of wells, fields and groups of images, to which the page then leads;
    where there are such, it shows no plate maps and few pictures, but leads to them.
    """
    alone = place is nowhere
    subset = result.subsets[0] if len(result.subsets) == 1 else None
    images_at = partial(place, "run", subject.run.id, "images", subset=subset)
    run_id = subject.run.id
    images = questions.ask_ours(VOTED, [run_id, list(result.subsets)]).records()
    hard = [row for row in images if row["vote"] == "hard"]
    best = result.score(*HEADLINE)
    unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
    seen = set(seen_wells(questions, run_id).tolist())
    drawn_maps, more_plates = plate_maps(questions, run_id, hard, seen) if alone else ([], 0)
    width = SMALL_MAP if drawn_maps and len(drawn_maps[0]) > 1 else LARGE_MAP
    return {
        "place": place,
        "whole": not questions.only_image_votes,
        "result": result,
        "run": subject.run,
        "baseline": subject.baseline,
        "best": best,
        "unseen": unseen,
        "rival_rows": by_baseline(result.baselines),
        **score_figures(result, best, unseen),
        "images_at": images_at,
        **class_content(result, hard, images_at),
        **extremes(workspace, questions, result, hard, seen),
        "map_groups": [
            (some[0], [(m, plate_map_svg(m, width, scale=False)) for m in some])
            for some in drawn_maps
        ],
        "seen_wells": any(one.marked for some in drawn_maps for one in some),
        "more_plates": more_plates,
        "curves": training_curves(questions, subject.run.parent_id),
        "mistakes": mistakes_of(workspace, questions, run_id, images, seen) if alone else [],
        "origin": origin_of(workspace, subject) if alone else None,
        "listed": LISTED,
    }


# The first screen

KINDS_OF_LABEL = {
    TREATMENT: ("treatment", "treatments"),
    PERTURBATION: ("treatment", "treatments"),
    TARGET: ("target gene", "target genes"),
}
"""What people call the labels of a field."""
CONTROLS = """
    SELECT w.id, w.plate_id, w.well_row, w.well_column, coalesce(t.name, 'no treatment') AS name
    FROM wells AS w LEFT JOIN treatments AS t ON t.id = w.treatment_id
    WHERE w.control = 'negative' AND list_contains(?, w.plate_id)
"""
PLACES = "SELECT id, well_row, well_column FROM wells WHERE list_contains(?, id)"


def extremes(
    workspace: Workspace,
    questions: Questions,
    result: ReportResult,
    images: Sequence[Row],
    seen: Collection[int],
) -> dict[str, Any]:
    """Return the label that is recognised best, and worst, with a field of each beside a control.

    Labels of images count, of equal ones the votes for them; labels of negative controls do not.
    ``images``: rows of the votes, one per image; ``seen``: wells that trained the model.
    """
    of_label: dict[str, list[Row]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            of_label[row["truth"]].append(row)
    usual = {label for label, rows in of_label.items() if all(_is_negative(x) for x in rows)}
    order = sorted(
        (item for item in result.by_class if item.support and item.label not in usual),
        key=lambda item: (item.recall or 0, sure_of(images, item.label) or 0, item.label),
    )
    ends = [("best", order[-1]), ("worst", order[0])] if len(order) > 1 else []
    chosen = {item.label: _usual_image(of_label[item.label], end) for end, item in ends}
    plates = sorted({row["plate_id"] for row in chosen.values()})
    controls = questions.ask_ours(CONTROLS, [plates]).records() if plates else []
    fields = {row["well_id"]: row["unit_id"] for row in chosen.values()}
    wells = questions.ask_ours(PLACES, [sorted(fields)]).records() if fields else []
    places = {row["id"]: (row["well_row"], row["well_column"]) for row in wells}
    pictures = WellPictures(workspace)
    pictures.look_up({*fields, *(row["id"] for row in controls)}, fields)
    shown = []
    for end, item in ends:
        row = chosen[item.label]
        well = row["well_id"]
        near = sorted(
            (max(abs(c["well_row"] - y), abs(c["well_column"] - x)), c["id"], c["name"])
            for y, x in (places[well],)
            for c in controls
            if c["plate_id"] == row["plate_id"] and c["id"] in pictures.images and c["id"] != well
        )
        treated, control = pictures.pair(well, near[0][1] if near else well)
        taken = Counter(x["predicted"] for x in of_label[item.label] if not x["correct"])
        shown.append(
            {
                "end": end,
                "item": item,
                "row": row,
                "seen": well in seen,
                "sure": sure_of(images, item.label),
                "taken": taken.most_common(1)[0] if taken else None,
                "treated": treated,
                "control": {**control, "name": near[0][2]} if near else None,
            }
        )
    usual_scores = [item for item in result.by_class if item.label in usual and item.support]
    return {
        "extremes": shown,
        "usual": usual_scores[0] if len(usual_scores) == 1 else None,
        "window": WINDOW,
        "colours": pictures.colours(),
        "kind": KINDS_OF_LABEL.get(result.field, ("label", "labels")),
    }


def _is_negative(row: Row) -> bool:
    return str(row["control"]) == "negative"


def _usual_image(rows: Sequence[Row], end: str) -> Row:
    """Return an image of the middle confidence: a right one of the best label, else a wrong one."""
    wanted = [row for row in rows if row["correct"] == (end == "best")] or list(rows)
    wanted.sort(key=lambda row: (row["confidence"] or 0, row["unit_id"]))
    return wanted[len(wanted) // 2]


# Plate maps

SHOWN_PLATES = 12
WELLS = """
    SELECT p.barcode AS plate, w.id, w.well_row, w.well_column
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
    ORDER BY p.barcode, w.well_row, w.well_column
"""
USED_CELLS = """
    WITH of_run AS (
        SELECT DISTINCT c.segmentation_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
        WHERE p.run_id = ? AND p.rank = 1
    ),
    used AS (
        SELECT coalesce(max(s.id) FILTER (s.id IN (FROM of_run)), max(s.id)) AS segmentation_id
        FROM segmentations AS s JOIN images AS i ON i.id = s.image_id
        WHERE list_contains(?, i.well_id) AND s.recipe_id IN (
            SELECT recipe_id FROM segmentations WHERE id IN (FROM of_run)
        )
        GROUP BY s.image_id
    ),
    found AS (
        SELECT c.cell_id AS id, c.image_id, i.well_id FROM eligible_cells AS c
        JOIN images AS i ON i.id = c.image_id
        WHERE c.segmentation_id IN (FROM used)
    )
"""
"""The cells of some wells that a run has labelled, or could: those of the same segmentation."""


def plate_maps(
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    seen: Collection[int] = (),
) -> tuple[list[list[PlateMap]], int]:
    """Return the maps of accuracy and of cells on the scored plates; how many plates are not shown.

    Cells are those that the run could label. ``images``: rows of the votes, one per image. Wells of
    ``images`` that were ``seen`` in training are marked on the map of accuracy.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            right[row["well_id"]].append(row["correct"])
    accuracy = {well: 100 * sum(some) / len(some) for well, some in right.items()}
    plates: dict[str, dict[int, WellPosition]] = defaultdict(dict)
    well_ids = sorted({row["well_id"] for row in images})
    for row in questions.ask_ours(WELLS, [well_ids]).records():
        plates[row["plate"]][row["id"]] = (row["well_row"], row["well_column"])
    shown = dict(list(plates.items())[:SHOWN_PLATES])
    asked = [run_id, sorted(well for wells in shown.values() for well in wells)]
    count = "SELECT well_id, count(*) / count(DISTINCT image_id) FROM found GROUP BY well_id"
    cells = dict(questions.ask_ours(f"{USED_CELLS} {count}", asked).rows())
    measures = [
        ("Accuracy", "images with the right label, %", accuracy, (0.0, 100.0)),
        ("Cells", "cells in an image", cells, colour_limits(cells.values())),
    ]
    maps = [
        [
            PlateMap(
                plate,
                title,
                unit,
                {wells[well]: value for well, value in values.items() if well in wells},
                limits,
                wells=wells.values(),
                marked=[wells[x] for x in seen if x in wells and x in right] if shows_right else (),
            )
            for plate, wells in shown.items()
        ]
        for title, unit, values, limits in measures
        for shows_right in (values is accuracy,)
    ]
    return maps, max(0, len(plates) - SHOWN_PLATES)


# Pictures

SHOWN_VOTES = 4
MISTAKES = 6

IMAGES = """
    SELECT i.id, p.barcode || ' ' || w.name || ', site ' || i.site AS title,
        s.id AS segmentation_id
    FROM images AS i
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    LEFT JOIN segmentations AS s ON s.image_id = i.id AND s.id IN (
        SELECT c.segmentation_id FROM cells AS c JOIN predictions AS x ON x.cell_id = c.id
        WHERE x.run_id = ? AND x.rank = 1
    )
    WHERE list_contains(?, i.id)
    ORDER BY s.id
"""
VOTES = """
    SELECT unit_id AS image_id, label, cells FROM label_votes
    WHERE run_id = ? AND level = 'image' AND vote = 'hard' AND list_contains(?, unit_id)
        AND cells > 0
    ORDER BY cells DESC, probability DESC, label
"""


def mistakes_of(
    workspace: Workspace,
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    seen: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Return the most confident mistakes of the soft vote.

    ``images`` are rows of the votes, every vote of each image; ``seen``: wells that trained the
    model. ``picture`` is a data URI, or None with the ``problem``.
    """
    wrong = [row for row in images if row["vote"] == "soft" and row["correct"] is False]
    wrong.sort(key=lambda row: (-(row["confidence"] or 0), row["unit_id"]))
    wrong = _wells_apart(wrong, MISTAKES)
    ids = [row["unit_id"] for row in wrong]
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for image_id, label, cells in questions.ask_ours(VOTES, [run_id, ids]).rows():
        votes[image_id].append((label, cells))
    ties = {row["unit_id"] for row in images if row["vote"] == "hard" and row["tie"]}
    known = {item["id"]: item for item in questions.ask_ours(IMAGES, [run_id, ids]).records()}
    found = []
    for row in wrong:
        image = row["unit_id"]
        segmentation = known[image]["segmentation_id"]
        picture, problem = None, None
        try:
            picture = field_picture(*read_field(workspace, image, segmentation))
        except CellstoreError as error:
            problem = str(error)
        found.append(
            {
                "title": known[image]["title"],
                "image": image,
                "seen": row["well_id"] in seen,
                "truth": row["truth"],
                "winner": row["predicted"],
                "share": row["confidence"],
                "tie": image in ties,
                "votes": votes[image][:SHOWN_VOTES],
                "more_votes": sum(cells for _, cells in votes[image][SHOWN_VOTES:]),
                "n_cells": 0 if segmentation is None else sum(n for _, n in votes[image]),
                "picture": picture,
                "problem": problem,
            }
        )
    return found


def _wells_apart(rows: Sequence[Row], number: int) -> list[Row]:
    """Return the first rows, one of each well; more of a well only where wells run out."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row["well_id"], row)
        if len(first) == number:
            break
    ids = {row["unit_id"] for row in first.values()}
    return [*first.values(), *(row for row in rows if row["unit_id"] not in ids)][:number]


# Origin


def origin_of(workspace: Workspace, subject: Subject) -> dict[str, Any]:
    """What the labels of a run were made from: its split, its audit, and what does it again."""
    runs = [str(run.id) for run in subject.folds or (subject.run,)]
    scripts = []
    for run in runs:
        try:
            scripts.append(repro(workspace, run).script)
        except CellstoreError as error:
            scripts.append(f"# {error}")
    audits = [audit(workspace, run, "run") for run in runs]
    return {
        "split": subject.split,
        "script": "\n".join(scripts),
        "audits": [(found.title, *record_parts(found.record)) for found in audits],
    }
