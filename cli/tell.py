"""Reports as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from . import render
from .context import say

if TYPE_CHECKING:
    from cellstore.stages.report import BaselineScore, ReportResult

SCORE_HEADERS = (
    *("per", "vote", "n", "correct", "accuracy", "95 % interval", "majority"),
    *("balanced", "F1", "ties"),
)


def report(result: ReportResult) -> None:
    """Tell how good the labels of a predict run are."""
    render.facts(
        [
            ("predict run", result.run_id),
            ("train run", result.train_run_id),
            ("split", f"{result.split} ({result.protocol}, by {result.group_level})"),
            ("scored", f"{', '.join(result.sides)}; {render.cell(result.field)}"),
            ("cells", f"{result.cells:,}"),
            ("images", f"{result.images:,}"),
            ("wells", f"{result.wells:,} ({result.wells_seen:,} seen in training)"),
            ("classes", result.classes),
            ("chance", percent(result.chance)),
            ("always the same", result.majority_label),
        ]
    )
    typer.echo("")
    render.table(
        SCORE_HEADERS,
        [
            (
                *(score.level, score.vote, score.n, score.correct, percent(score.accuracy)),
                interval(score.low, score.high),
                percent(score.majority),
                percent(score.balanced_accuracy),
                f"{score.macro_f1:.3f}",
                score.ties,
            )
            for score in result.scores
        ],
    )
    typer.echo("")
    _baselines(result.baselines)
    typer.echo(result.against_nulls)
    typer.echo(result.leak)
    for note in result.notes:
        say(note)
    if result.html:
        typer.echo(f"report: {result.html}")


def _baselines(found: Sequence[BaselineScore]) -> None:
    """Tell what a score has to beat: a row per baseline, by hard votes."""
    from cellstore.stages.report import by_baseline

    if not found:
        return
    levels = ("image", "well", "cell")
    rows = []
    for row in by_baseline(found):
        first = next(iter(row.values()))
        scored = [value for level in levels for value in _score(row.get(level))]
        rows.append((first.baseline, first.run_id, *scored))
    heads = [head for level in levels for head in (f"per {level}", "95 % interval")]
    render.table(("baseline", "run", *heads), rows)
    typer.echo("")


def _score(found: BaselineScore | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return percent(found.accuracy), interval(found.low, found.high)


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if share is None else f"{100 * share:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """Return the bounds of a share."""
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"
