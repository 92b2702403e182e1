"""The views: each a file in ``sql/`` that begins with its description."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..config import VoteRules

ORDER = (
    "vote_rules",
    "run_images",
    "voters",
    "placed_predictions",
    "ballots",
    "image_label_counts",
    "image_winners",
    "image_answers",
    "image_label_votes",
    "image_label_medians",
    "well_label_medians",
    "image_votes",
    "well_votes",
    "verdicts",
    "accuracy",
    "confusion",
    "class_report",
    "disagreements",
    "lineage",
    "image_locations",
)
"""A view comes after those it reads."""


@dataclass(frozen=True)
class View:
    """A named question. ``description`` is the comment at the head of its file."""

    name: str
    description: str
    query: str


@cache
def views() -> tuple[View, ...]:
    """Return all views, a view after those it reads."""
    return tuple(_view(name) for name in ORDER)


def queries(rules: VoteRules) -> dict[str, str]:
    """Return the query of every view, by name, under these rules of the vote."""
    found = {view.name: view.query for view in views()}
    found["vote_rules"] = (
        f"SELECT {int(rules.min_cells)} AS min_cells, "
        f"CAST({float(rules.min_margin)!r} AS DOUBLE) AS min_margin, "
        f"{'true' if rules.controls else 'false'} AS controls"
    )
    if rules.exclude_flagged is not None:
        for name in ("voters", "ballots"):
            without = _view(f"{name}_unflagged").query
            found[name] = without.replace("{run}", str(int(rules.exclude_flagged)))
    return found


def _view(name: str) -> View:
    text = files("cellstore.query.sql").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    lines = text.splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    words = " ".join(line.removeprefix("--").strip() for line in lines[:length])
    return View(name, words, "\n".join(lines[length:]))
