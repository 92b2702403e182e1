"""Where a report comes from: split, runs, recipes and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models import Split
from ..query.engine import Questions
from .scoring import Subject

SHOWN_RUNS = 24
RECIPES = """
    WITH RECURSIVE above(id) AS (
        SELECT recipe_id FROM runs WHERE id = ?
        UNION SELECT input_id FROM recipe_inputs JOIN above ON recipe_inputs.recipe_id = above.id
    ),
    used(id) AS (
        SELECT id FROM above
        UNION SELECT recipe_id FROM runs WHERE list_contains(?, id)
        UNION SELECT recipe_id FROM splits WHERE id = ?
    )
    SELECT recipes.* FROM recipes JOIN used ON used.id = recipes.id ORDER BY recipes.id
"""
RUNS = """
    WITH RECURSIVE above(id) AS (
        SELECT ?::BIGINT
        UNION SELECT runs.parent_id FROM runs JOIN above ON runs.id = above.id
        WHERE runs.parent_id IS NOT NULL
    ),
    found(id) AS (
        SELECT id FROM above
        UNION SELECT s.run_id FROM segmentations AS s WHERE s.id IN (
            SELECT DISTINCT c.segmentation_id FROM predictions AS p
            JOIN cells AS c ON c.id = p.cell_id WHERE p.run_id = ? AND p.rank = 1
        )
        UNION SELECT r.id FROM runs AS r JOIN recipe_inputs AS i ON i.input_id = r.recipe_id
        JOIN runs AS x ON x.recipe_id = i.recipe_id JOIN above ON above.id = x.id
        WHERE r.status = 'done' AND r.stage = 'measure'
    )
    SELECT runs.* FROM runs JOIN found ON runs.id = found.id ORDER BY runs.id
"""
FILES = """
    SELECT a.kind, a.path, a.sha256, r.run_id FROM artifacts AS a
    JOIN run_artifacts AS r ON r.artifact_id = a.id
    WHERE list_contains(?, r.run_id) AND a.kind IN ('checkpoint', 'network')
    ORDER BY r.run_id, a.path
"""


@dataclass(frozen=True)
class Provenance:
    """Rows of the database: the runs in their order, their recipes, the files of networks.

    ``commands``: what was typed, in order, each once. ``more_runs`` are not shown.
    """

    split: Split
    runs: tuple[Mapping[str, Any], ...]
    more_runs: int
    recipes: tuple[Mapping[str, Any], ...]
    files: tuple[Mapping[str, Any], ...]
    commands: tuple[str, ...]


def provenance(questions: Questions, subject: Subject) -> Provenance:
    """Return what the labels of a run were made from."""
    run_id = subject.run.id
    runs = questions.ask(RUNS, [run_id, run_id]).to_pylist()
    ids = [row["id"] for row in runs]
    recipes = questions.ask(RECIPES, [run_id, ids, subject.split.id]).to_pylist()
    shown = runs[-SHOWN_RUNS:]
    return Provenance(
        split=subject.split,
        runs=tuple({**row, "environment": _pairs(row["environment"])} for row in shown),
        more_runs=len(runs) - len(shown),
        recipes=tuple({**row, "parameters": _pairs(row["parameters"])} for row in recipes),
        files=tuple(questions.ask(FILES, [ids]).to_pylist()),
        commands=tuple(dict.fromkeys(row["command"] for row in runs)),
    )


def _pairs(text: str | None) -> list[tuple[str, str]]:
    """Return the fields of a JSON object as text."""
    found = json.loads(text or "{}")
    return [(str(key), _written(value)) for key, value in found.items()]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
