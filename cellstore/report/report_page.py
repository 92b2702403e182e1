"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ImageInput
from ..errors import CellstoreError, UnknownNameError
from ..jobs.planes import read_image
from ..jobs.workspace import Workspace
from ..models import Recipe, Segmentation
from ..query.cells import plane_of, read_masks
from ..query.engine import Questions
from ..query.guard import quoted
from ..query.source import group_of
from .comparison import RECIPES_BEHIND, Comparison, Difference
from .drawing import (
    LARGE_MAP,
    SMALL_MAP,
    PlateMap,
    WellPosition,
    colour_limits,
    field_picture,
    plate_map_svg,
    write_html,
)
from .report_figures import class_content, score_figures, training_curves
from .repro import repro
from .scoring import HEADLINE, ReportResult, Subject, by_baseline

LISTED = 12
"""Rows of a table that are shown at once; the others unfold."""
VOTED = """
    SELECT vote, unit_id, well_id, truth, predicted, confidence, tie, correct
    FROM scored_predictions
    WHERE run_id = ? AND level = 'image' AND vote <> 'median' AND abstained IS NULL
        AND list_contains(?, subset)
    ORDER BY vote, unit_id
"""
"""The scored votes of images that have an answer."""


def write_page(
    workspace: Workspace,
    questions: Questions,
    subject: Subject,
    result: ReportResult,
    path: Path,
    maps: Sequence[str],
) -> None:
    """Write the page of a report; see :func:`.scoring.report` for the options and errors."""
    run_id = subject.run.id
    images = questions.ask_ours(VOTED, [run_id, list(result.subsets)]).records()
    hard = [row for row in images if row["vote"] == "hard"]
    best = result.score(*HEADLINE)
    unseen = next((x for x in result.unseen if (x.level, x.vote) == HEADLINE), None)
    drawn_maps, more_plates = plate_maps(questions, run_id, hard, maps)
    scripts, steps = list[str](), set[int]()
    for one in result.folds or (run_id,):
        steps.add(one)
        try:
            made = repro(workspace, str(one))
            scripts.append(made.script)
            steps |= {step.run_id for step in made.steps}
        except CellstoreError as error:
            scripts.append(f"# {error}")
    script, behind = "\n".join(scripts), sorted(steps)
    content = {
        "result": result,
        "run": subject.run,
        "baseline": subject.baseline,
        "best": best,
        "unseen": unseen,
        "rival_rows": by_baseline(result.baselines),
        **score_figures(result, best, unseen),
        **class_content(result, hard),
        "map_groups": [
            (
                some[0],
                [(m, plate_map_svg(m, SMALL_MAP if some[1:] else LARGE_MAP)) for m in some],
            )
            for some in drawn_maps
        ],
        "more_plates": more_plates,
        "measured": len(drawn_maps) > 2,
        "curves": training_curves(questions, subject.run.parent_id),
        "pictures": pictures(workspace, questions, run_id, images, result.comparison),
        "origin": origin_of(questions, subject, behind),
        "script": script,
        "listed": LISTED,
    }
    write_html(path, "report.html.j2", content)


# Plate maps

SHOWN_PLATES = 12
USUAL_FEATURES = ("area", "mean_intensity")
"""Features that are shown if none is named, and they were measured."""
WELLS = """
    SELECT p.barcode AS plate, w.id, w.well_row, w.well_column
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
    ORDER BY p.barcode, w.well_row, w.well_column
"""
USED_CELLS = """
    WITH used AS (
        SELECT DISTINCT c.segmentation_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
        WHERE p.run_id = ? AND p.rank = 1
    ),
    found AS (
        SELECT c.cell_id AS id, c.image_id, i.well_id FROM eligible_cells AS c
        JOIN images AS i ON i.id = c.image_id
        WHERE c.segmentation_id IN (SELECT segmentation_id FROM used)
    )
"""
SIZES = """
    SELECT p.barcode AS plate, min(i.pixel_size) AS size
    FROM images AS i JOIN wells AS w ON w.id = i.well_id JOIN plates AS p ON p.id = w.plate_id
    GROUP BY p.barcode
    HAVING min(i.pixel_size) = max(i.pixel_size) AND count(i.pixel_size) = count(*)
"""
"""The plates whose images all have one pixel size."""
MICROMETRES = {"pixel": (1, "\u00b5m"), "pixel^2": (2, "\u00b5m\u00b2")}
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "BOOLEAN", "HUGEINT")


def plate_maps(
    questions: Questions, run_id: int, images: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> tuple[list[list[PlateMap]], int]:
    """Return the maps of each measure on the scored plates, and how many plates are not shown.

    The measures are accuracy, cells, and the features ``wanted``, else the usual ones: a feature is
    a column of a feature set, or SET.COLUMN, and its value the mean over the cells of a well that
    the run could label. ``images``: rows of the votes, one per image.

    Raises:
        UnknownNameError: no feature set has such a column of numbers.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            right[row["well_id"]].append(row["correct"])
    accuracy = {well: 100 * sum(some) / len(some) for well, some in right.items()}
    count = "SELECT well_id, count(*) / count(DISTINCT image_id) AS value FROM found GROUP BY 1"
    counted = questions.ask_ours(f"{USED_CELLS} {count}", [run_id]).records()
    cells = {row["well_id"]: row["value"] for row in counted}
    measures = [
        ("Accuracy", "images with the right label, %", accuracy, (0.0, 100.0)),
        ("Cells", "cells in an image", cells, colour_limits(cells.values())),
    ]
    plates: dict[str, dict[int, WellPosition]] = defaultdict(dict)
    well_ids = sorted({row["well_id"] for row in images})
    for row in questions.ask_ours(WELLS, [well_ids]).records():
        plates[row["plate"]][row["id"]] = (row["well_row"], row["well_column"])
    sizes = {row["plate"]: row["size"] for row in questions.ask_ours(SIZES).records()}
    units = {
        (row["name"], column["name"]): column.get("unit")
        for row in questions.ask_ours("SELECT name, columns FROM feature_sets").records()
        for column in json.loads(row["columns"])
    }
    for (name, column), means in _feature_means(questions, run_id, wanted).items():
        unit, values = units.get((name, column)), means
        if unit in MICROMETRES and plates.keys() <= sizes.keys():
            power, unit = MICROMETRES[unit]
            values = {
                well: means[well] * sizes[plate] ** power
                for plate, wells in plates.items()
                for well in wells
                if well in means
            }
        shown = f"mean of the cells{f' in {unit}' if unit else ''}, set {name}"
        measures.append((column, shown, values, colour_limits(values.values())))
    maps = [
        [
            PlateMap(
                plate,
                title,
                unit,
                {wells[well]: value for well, value in values.items() if well in wells},
                limits,
                wells=wells.values(),
            )
            for plate, wells in list(plates.items())[:SHOWN_PLATES]
        ]
        for title, unit, values, limits in measures
    ]
    return maps, max(0, len(plates) - SHOWN_PLATES)


def _feature_means(
    questions: Questions, run_id: int, wanted: Sequence[str]
) -> dict[tuple[str, str], dict[int, float]]:
    """The means of features by well id, each by its set and column."""
    columns: dict[str, tuple[str, str]] = {}  # a bare name means the newest set
    sets = questions.ask_ours("SELECT name FROM feature_sets ORDER BY id DESC").records()
    for name in (item["name"] for item in sets):
        for column, kind in questions.columns(name):
            if kind in NUMBERS and column != "cell_id":
                columns[f"{name}.{column}"] = (name, column)
                if group := group_of(name):
                    columns.setdefault(f"{group}.{column}", (name, column))
                columns.setdefault(column, (name, column))
    for name in wanted:
        if name not in columns:
            raise UnknownNameError.of("feature", name, sorted(columns))
    usual = [name for name in USUAL_FEATURES if name in columns]
    means: dict[tuple[str, str], dict[int, float]] = {
        columns[name]: {} for name in (wanted or usual)
    }
    for name in dict.fromkeys(name for name, _ in means):
        chosen = [column for other, column in means if other == name]
        values = ", ".join(
            f"avg(f.{quoted(c)}) FILTER (WHERE isfinite(f.{quoted(c)}::DOUBLE)) AS v{number}"
            for number, c in enumerate(chosen)
        )
        query = (
            f"{USED_CELLS} SELECT found.well_id, {values} FROM found "  # noqa: S608 - names are quoted
            f"JOIN {quoted(name)} AS f ON f.cell_id = found.id GROUP BY 1"
        )
        for row in questions.ask_ours(query, [run_id]).records():
            for number, column in enumerate(chosen):
                if row[f"v{number}"] is not None:
                    means[name, column][row["well_id"]] = row[f"v{number}"]
    return means


# Pictures

SHOWN_VOTES = 4
MISTAKES = 6
HITS = 3
SAMPLES = 4
DIFFERENT = 6

IMAGES = """
    SELECT i.id AS image_id, s.id AS segmentation_id, p.barcode AS plate, w.name AS well, i.site,
        s.n_cells
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

Row = Mapping[str, Any]


def pictures(
    workspace: Workspace,
    questions: Questions,
    run_id: int,
    images: Sequence[Row],
    comparison: Comparison | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the most confident mistakes, some hits, what two runs differ in, and some samples.

    ``images`` are rows of the votes, every vote of each image. What is drawn by chance is the same
    for the same run. Of ``wrong``, ``right`` and ``different`` images: ``picture`` is a data URI,
    or None with the ``problem``. Of ``samples``: the middle at full size, ``bare`` and
    ``outlined``.
    """
    draw = random.Random(run_id)  # noqa: S311 - which pictures are shown is no secret
    soft = [row for row in images if row["vote"] == "soft" and row["correct"] is not None]
    soft.sort(key=lambda row: int(row["unit_id"]))
    hits, drawn = [row for row in soft if row["correct"]], list(soft)
    draw.shuffle(hits)
    draw.shuffle(drawn)
    mistakes = [row for row in soft if not row["correct"]]
    mistakes.sort(key=lambda row: (-(row["confidence"] or 0), row["unit_id"]))
    differences = _some_differences(comparison)
    by_id = {row["unit_id"]: row for row in soft}
    chosen = {
        "wrong": _wells_apart(mistakes, MISTAKES),
        "right": _wells_apart(hits, HITS),
        "different": [by_id[unit] for unit in differences if unit in by_id],
    }
    shown = [row["unit_id"] for rows in chosen.values() for row in rows]
    votes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for image_id, label, cells in questions.ask_ours(VOTES, [run_id, shown]).rows():
        votes[image_id].append((label, cells))
    ties = {row["unit_id"] for row in images if row["vote"] == "hard" and row["tie"]}
    ids = list(dict.fromkeys([*shown, *(row["unit_id"] for row in drawn[: 20 * SAMPLES])]))
    images_asked = questions.ask_ours(IMAGES, [run_id, ids]).records()
    for item in images_asked:
        item["title"] = f"{item['plate']} {item['well']}, site {item['site']}"
    known = {item["image_id"]: item for item in images_asked}
    found: dict[str, list[dict[str, Any]]] = {"samples": []}
    for kind, rows in chosen.items():
        found[kind] = []
        for row in rows:
            image = row["unit_id"]
            of_cells = known[image]["segmentation_id"] is not None
            picture, problem = None, None
            try:
                picture = field_picture(*_pixels(workspace, known[image]))
            except CellstoreError as error:
                problem = str(error)
            found[kind].append(
                {
                    "title": known[image]["title"],
                    "kind": kind,
                    "truth": row["truth"],
                    "winner": row["predicted"],
                    "share": row["confidence"],
                    "tie": image in ties,
                    "votes": votes[image][:SHOWN_VOTES],
                    "more_votes": sum(cells for _, cells in votes[image][SHOWN_VOTES:]),
                    "n_cells": sum(cells for _, cells in votes[image]) if of_cells else 0,
                    "picture": picture,
                    "problem": problem,
                    "difference": differences[image] if kind == "different" else None,
                }
            )
    # One of each plate before the second of any; the first that can be opened.
    plates: dict[str, list[Row]] = defaultdict(list)
    for row in drawn:
        about = known.get(row["unit_id"])
        if about is not None and about["segmentation_id"] is not None:
            plates[about["plate"]].append(about)
    mixed = [row for rows in zip_longest(*plates.values()) for row in rows if row is not None]
    for row in mixed[: 3 * SAMPLES]:
        if len(found["samples"]) < SAMPLES:
            with suppress(CellstoreError):
                plane, masks = _pixels(workspace, row)
                bare = field_picture(plane, detail=True)
                outlined = field_picture(plane, masks, detail=True)
                found["samples"].append({**row, "bare": bare, "outlined": outlined})
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


def _some_differences(comparison: Comparison | None) -> dict[int, Difference]:
    """Return some images that two runs differ in: one after the other of each kind, wells apart."""
    if comparison is None or comparison.level != "image":
        return {}
    kinds: dict[str, dict[str, Difference]] = {"first": {}, "second": {}, "neither": {}}
    for item in comparison.differing:
        kinds[item.right].setdefault(item.name.rsplit("/", 1)[0], item)
    pairs = zip_longest(kinds["first"].values(), kinds["second"].values())
    some = [item for pair in pairs for item in pair if item is not None]
    return {item.unit_id: item for item in [*some, *kinds["neither"].values()][:DIFFERENT]}


def _pixels(
    workspace: Workspace, image: Row
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]] | None]:
    """The plane of an image, and its masks if the run has labelled cells."""
    wanted, masks = ImageInput(), None
    if image["segmentation_id"] is not None:
        with workspace.database.read() as session:
            found = session.get_one(Segmentation, image["segmentation_id"])
            wanted = plane_of(session.get_one(Recipe, found.recipe_id))
            masks = read_masks(session, workspace.artifacts, found)
    return read_image(workspace.database, image["image_id"], wanted), masks


# Origin

SHOWN_RUNS = 24
NETWORK_FILES = """
    SELECT a.kind, a.path, a.sha256, r.run_id FROM artifacts AS a
    JOIN run_artifacts AS r ON r.artifact_id = a.id
    WHERE list_contains(?, r.run_id) AND a.kind IN ('checkpoint', 'network')
    ORDER BY r.run_id, a.path
"""


def origin_of(questions: Questions, subject: Subject, behind: Sequence[int]) -> dict[str, Any]:
    """What the labels of a run were made from: rows of runs, recipes and files of networks.

    ``behind``: the runs that it relies on, itself among them.
    ``commands``: what was typed, in order, each once. ``more_runs`` are not shown.
    """

    def pairs(text: str | None) -> list[tuple[str, str]]:
        """The fields of a JSON object as text."""
        found = json.loads(text or "{}")
        return [
            (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in found.items()
        ]

    query = "SELECT * FROM runs WHERE list_contains(?, id) ORDER BY id"
    runs = questions.ask_ours(query, [behind]).records()
    recipes = questions.ask_ours(RECIPES_BEHIND, [behind]).records()
    shown = runs[-SHOWN_RUNS:]
    return {
        "split": subject.split,
        "runs": [{**row, "environment": pairs(row["environment"])} for row in shown],
        "more_runs": len(runs) - len(shown),
        "recipes": [{**row, "parameters": pairs(row["parameters"])} for row in recipes],
        "files": questions.ask_ours(NETWORK_FILES, [behind]).records(),
        "commands": list(dict.fromkeys(row["command"] for row in runs)),
    }
