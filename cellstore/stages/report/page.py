"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...analytics import Questions, open_questions
from ...artifacts import write_atomically
from ...config import VoteRules
from ...drawing.page import render
from ...extras import need
from ...ops import scores
from ...runs import Workspace
from .facts import ReportResult, by_baseline
from .rivals import HEADLINE
from .score import Evidence, Subject, find_subject, scored

METRICS = "SELECT name, epoch, value FROM run_metrics WHERE run_id = ? ORDER BY epoch"
PLATES = """
    SELECT p.barcode, w."row", w."column", w.id FROM wells AS w
    JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
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
    workspace: Workspace,
    run: str,
    path: Path,
    *,
    force: bool = False,
    leave_out_flagged: str | None = None,
) -> ReportResult:
    """Write the report on a predict run as one HTML file; see :func:`report` for the options.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UserInputError: there is nothing to report on.
    """
    need("report")
    subject = find_subject(workspace, run, leave_out_flagged)
    with open_questions(workspace, rules=VoteRules(unflagged_by=subject.qc_run_id)) as questions:
        evidence = scored(questions, subject, force=force)
        content = _content(workspace, questions, subject, evidence)
    write_atomically(path, render("cellstore.stages.report", content).encode())
    return replace(evidence.result, html=str(path))


def _content(
    workspace: Workspace, questions: Questions, subject: Subject, evidence: Evidence
) -> dict[str, Any]:
    from . import figures
    from .pictures import examples

    result, images = evidence.result, evidence.images
    hard = images.filter(pc.equal(images["vote"], "hard")).to_pylist()
    matrix, labels, mix_ups = _confusion(hard)
    metrics = _metrics(questions, subject.run.parent_id)
    plates = _plates(questions, hard)
    shown, sample = examples(workspace, questions, subject, images)
    return {
        "result": result,
        "best": result.score(*HEADLINE),
        "run": subject.run,
        "rivals": figures.rivals(result.score(*HEADLINE), result.baselines),
        "rival_rows": by_baseline(result.baselines),
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
    images: Sequence[dict[str, Any]],
) -> tuple[NDArray[np.int64], list[str], list[dict[str, Any]]]:
    truth, predicted = ([row[key] for row in images] for key in ("truth", "predicted"))
    labels = sorted({*truth, *predicted})
    pairs = Counter(zip(truth, predicted, strict=True))
    wrong = [
        {"truth": pair[0], "predicted": pair[1], "n": number}
        for pair, number in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        if pair[0] != pair[1]
    ]
    return scores.confusion_matrix(truth, predicted, labels), labels, wrong[:MIX_UPS]


def _plates(
    questions: Questions, images: Sequence[dict[str, Any]]
) -> list[tuple[str, list[tuple[int, int, float | None]]]]:
    by_well: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        by_well[row["well_id"]].append(row["correct"])
    found: dict[str, list[tuple[int, int, float | None]]] = defaultdict(list)
    for row in questions.ask(PLATES, [list(by_well)]).to_pylist():
        right = by_well.get(row["id"])
        value = sum(right) / len(right) if right else None
        found[row["barcode"]].append((row["row"], row["column"], value))
    return list(found.items())
