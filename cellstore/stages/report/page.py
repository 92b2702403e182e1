"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ...analytics import Questions, open_questions
from ...artifacts import write_atomically
from ...extras import need
from ...runs import Workspace
from .facts import ReportResult
from .score import Subject, find_subject, scored

METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"
CONFUSION = """
    SELECT truth, predicted, sum(n)::BIGINT AS n FROM confusion
    WHERE run_id = ? AND level = 'image' AND vote = 'hard' AND list_contains(?, subset)
    GROUP BY truth, predicted ORDER BY truth, predicted
"""
PLATES = """
    WITH scored AS (
        SELECT well_id, avg(correct::INTEGER) AS accuracy FROM image_votes
        WHERE run_id = ? AND vote = 'hard' AND truth IS NOT NULL AND list_contains(?, subset)
        GROUP BY well_id
    ),
    shown AS (SELECT DISTINCT w.plate_id FROM scored JOIN wells AS w ON w.id = scored.well_id)
    SELECT p.barcode, w."row", w."column", scored.accuracy FROM wells AS w
    JOIN shown ON shown.plate_id = w.plate_id
    JOIN plates AS p ON p.id = w.plate_id
    LEFT JOIN scored ON scored.well_id = w.id
    ORDER BY p.barcode, w."row", w."column"
"""
RECIPES = """
    WITH RECURSIVE above(id) AS (
        SELECT recipe_id FROM runs WHERE id = ?
        UNION SELECT input_id FROM recipe_inputs JOIN above ON recipe_inputs.recipe_id = above.id
    )
    SELECT recipes.* FROM recipes JOIN above ON above.id = recipes.id ORDER BY recipes.id
"""
RUNS = """
    WITH RECURSIVE above(id) AS (
        SELECT ?::BIGINT
        UNION SELECT runs.parent_id FROM runs JOIN above ON runs.id = above.id
        WHERE runs.parent_id IS NOT NULL
    )
    SELECT runs.* FROM runs JOIN above ON above.id = runs.id ORDER BY runs.id
"""
FILES = """
    SELECT a.kind, a.path, a.sha256 FROM artifacts AS a
    JOIN run_artifacts AS r ON r.artifact_id = a.id WHERE r.run_id = ? ORDER BY a.path
"""
MIX_UPS = 8
SHOWN_PLATES = 12


def write_report(
    workspace: Workspace, run: str, path: Path, *, force: bool = False
) -> ReportResult:
    """Write the report on a predict run as one HTML file; see :func:`report` for ``force``.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UserInputError: there is nothing to report on.
    """
    need("report")
    subject = find_subject(workspace, run)
    with open_questions(workspace) as questions:
        result = scored(questions, subject, force=force)
        content = _content(workspace, questions, subject, result)
    write_atomically(path, render(content).encode())
    return replace(result, html=str(path))


def render(content: dict[str, Any]) -> str:
    """Return the page; every text that is not ours is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = files("cellstore.stages.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda value: _or_dash(value, 100, ".1f", " %")
    environment.filters["number"] = lambda value: _or_dash(value, 1, ".3f", "")
    environment.filters["svg"] = Markup  # figures are drawn by matplotlib, which escapes its texts
    return environment.from_string(source).render(content)


def _or_dash(value: float | None, factor: float, form: str, unit: str) -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"


def _content(
    workspace: Workspace, questions: Questions, subject: Subject, result: ReportResult
) -> dict[str, Any]:
    from . import figures
    from .pictures import examples

    sides = list(result.sides)
    matrix, labels, mix_ups = _confusion(questions, subject.run.id, sides)
    metrics = _metrics(questions, subject.run.parent_id)
    plates = _plates(questions, subject.run.id, sides)
    shown, sample = examples(workspace, questions, subject, result.sides)
    return {
        "result": result,
        "best": result.score("image", "hard"),
        "run": subject.run,
        "headline": figures.headline(result.scores, result.chance),
        "curves": figures.training_curves(metrics) if metrics else None,
        "confusion": figures.confusion(matrix, labels),
        "mix_ups": mix_ups,
        "plates": [figures.plate_map(*item) for item in plates[:SHOWN_PLATES]],
        "more_plates": max(0, len(plates) - SHOWN_PLATES),
        "wrong": [item for item in shown if item.kind == "wrong"],
        "right": [item for item in shown if item.kind == "right"],
        "sample": sample,
        "recipes": questions.ask(RECIPES, [subject.run.id]).to_pylist(),
        "runs": questions.ask(RUNS, [subject.run.id]).to_pylist(),
        "files": questions.ask(FILES, [subject.run.parent_id]).to_pylist(),
    }


def _metrics(questions: Questions, run_id: int | None) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in questions.ask(METRICS, [run_id]).to_pylist():
        if row["value"] is not None:
            found[row["name"]].append((row["epoch"], row["value"]))
    return dict(found)


def _confusion(
    questions: Questions, run_id: int, sides: Sequence[str]
) -> tuple[Any, list[str], list[dict[str, Any]]]:
    rows = questions.ask(CONFUSION, [run_id, sides]).to_pylist()
    labels = sorted({row["truth"] for row in rows} | {row["predicted"] for row in rows})
    place = {label: i for i, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), np.int64)
    for row in rows:
        matrix[place[row["truth"]], place[row["predicted"]]] = row["n"]
    wrong = [row for row in rows if row["truth"] != row["predicted"]]
    return matrix, labels, sorted(wrong, key=lambda row: -row["n"])[:MIX_UPS]


def _plates(
    questions: Questions, run_id: int, sides: Sequence[str]
) -> list[tuple[str, list[tuple[int, int, float | None]]]]:
    found: dict[str, list[tuple[int, int, float | None]]] = defaultdict(list)
    for row in questions.ask(PLATES, [run_id, sides]).to_pylist():
        found[row["barcode"]].append((row["row"], row["column"], row["accuracy"]))
    return list(found.items())
