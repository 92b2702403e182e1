"""In which options the recipes of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...analytics import Questions
from .comparison_facts import RecipeDifference

RECIPES = """
    WITH RECURSIVE above(id) AS (
        SELECT recipe_id FROM runs WHERE id = ?
        UNION SELECT input_id FROM recipe_inputs JOIN above ON recipe_inputs.recipe_id = above.id
    )
    SELECT r.id, r.stage, r.version, r.parameters, r.weights_sha256
    FROM recipes AS r JOIN above ON above.id = r.id ORDER BY r.id
"""
RUNS = """
    SELECT p.code_version AS predicted_by, t.code_version AS trained_by, t.seed, s.name AS split
    FROM runs AS p LEFT JOIN runs AS t ON t.id = p.parent_id
    LEFT JOIN splits AS s ON s.id = coalesce(p.split_id, t.split_id) WHERE p.id = ?
"""
LONGEST = 60


def recipes_apart(questions: Questions, first: int, second: int) -> tuple[RecipeDifference, ...]:
    """Return the options in which two predict runs, and all that they read from, differ.

    Options are called ``stage.option``; those of one stage with several recipes are numbered.
    """
    one, other = (_options(questions, run) for run in (first, second))
    return tuple(
        RecipeDifference(name, one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    )


def _options(questions: Questions, run: int) -> dict[str, str]:
    row = questions.ask(RUNS, [run]).to_pylist()[0]
    found = {
        "split": row["split"],
        "train.seed": row["seed"],
        "train.code": row["trained_by"],
        "predict.code": row["predicted_by"],
    }
    numbers: dict[str, int] = {}
    for recipe in questions.ask(RECIPES, [run]).to_pylist():
        numbers[recipe["stage"]] = number = numbers.get(recipe["stage"], 0) + 1
        stage = recipe["stage"] if number == 1 else f"{recipe['stage']}{number}"
        found |= dict(_named(stage, recipe))
    return {name: _short(value) for name, value in found.items() if value is not None}


def _named(stage: str, recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield f"{stage}.version", recipe["version"]
    yield f"{stage}.weights", (recipe["weights_sha256"] or "")[:12] or None
    parameters = recipe["parameters"]
    yield from _flat(stage, json.loads(parameters) if isinstance(parameters, str) else parameters)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
