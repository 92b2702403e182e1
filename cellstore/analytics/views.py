"""The views: each a file in ``sql/`` that begins with its description."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

ORDER = (
    "run_images",
    "voters",
    "image_label_votes",
    "image_votes",
    "well_votes",
    "verdicts",
    "accuracy",
    "confusion",
    "class_report",
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


def voters_unflagged(run_id: int) -> str:
    """Return the query of ``voters`` without what a quality-control run has flagged."""
    return _view("voters_unflagged").query.replace("{run}", str(int(run_id)))


def _view(name: str) -> View:
    text = files("cellstore.analytics.sql").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    lines = text.splitlines()
    length = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    words = " ".join(line.removeprefix("--").strip() for line in lines[:length])
    return View(name, words, "\n".join(lines[length:]))
