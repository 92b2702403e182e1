"""The views: each a file in ``sql/`` that begins with its description; and what each reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..config import VoteOptions
from .source import PREDICTION_COLUMNS, Columns

VIEWS = (
    "image_table",
    "well_table",
    "cell_table",
    "run_images",
    "prediction_table",
    "votes",
    "scored_predictions",
    "accuracy",
    "confusion",
    "class_report",
    "disagreements",
    "lineage",
    "image_locations",
    "vote_options",
    "eligible_cells",
    "eligible_predictions",
    "excluded_images",
    "later_exclusions",
    "predictions_with_image",
    "image_label_counts",
    "label_counts",
    "label_medians",
    "label_votes",
    "ranked_votes",
)
"""All views: first those that people ask for, then what these are made of."""

LATER = "later_exclusions"
PREDICTIONS = "predictions_with_image"
COUNTS = "image_label_counts"
RANKED = "ranked_votes"

KEPT: dict[str, Columns] = {
    PREDICTIONS: PREDICTION_COLUMNS,
    COUNTS: {
        "run_id": "BIGINT",
        "image_id": "BIGINT",
        "label_id": "BIGINT",
        "cells": "BIGINT",
        "named": "BIGINT",
        "probability": "DOUBLE",
    },
    RANKED: {
        "run_id": "BIGINT",
        "level": "VARCHAR",
        "vote": "VARCHAR",
        "unit_id": "BIGINT",
        "subset": "VARCHAR",
        "winner_id": "BIGINT",
        "votes": "DOUBLE",
        "runner_up_id": "BIGINT",
        "runner_up_votes": "DOUBLE",
        "n_cells": "BIGINT",
    },
}
"""Views of which copies are kept: their columns."""


@dataclass(frozen=True)
class View:
    """A named question. ``description`` is the comment at the head of its file."""

    name: str
    description: str
    query: str


@cache
def view(name: str) -> View:
    """Return a view as its file has it."""
    text = files("cellstore.query.sql").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    lines = text.splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    words = " ".join(line.removeprefix("--").strip() for line in lines[:length])
    return View(name, words, "\n".join(lines[length:]))


def view_query(name: str, options: VoteOptions) -> str:
    """Return the query of a view under these options of the vote."""
    if name == "vote_options":
        return (
            f"SELECT {int(options.min_cells)} AS min_cells, "
            f"CAST({float(options.min_margin)!r} AS DOUBLE) AS min_margin, "
            f"{'true' if options.controls else 'false'} AS controls"
        )
    query = view(name).query
    if name == LATER and options.exclude_flagged is not None:
        query += f"OR run_id = {int(options.exclude_flagged)}\n"
    return query
