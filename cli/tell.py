"""Reports as text for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from . import render
from .context import say

if TYPE_CHECKING:
    from cellstore.report.scoring import BaselineScore, ReportResult, Score

FEW = 3
NAME_WIDTH = 16
LEVELS = ("image", "well", "cell")

Item = TypeVar("Item")


def report(result: ReportResult) -> None:
    """Tell how good the labels of a predict run are."""
    _headline(result)
    _facts(result)
    _scores(result.scores)
    _part("Without the wells that were seen in training", result.unseen)
    _part("Without control wells", result.without_controls)
    _baselines(result.baselines)
    _groups(result)
    _compared(result)
    render.wrapped(result.against_nulls)
    render.wrapped(result.leak)
    for note in result.notes:
        say(note)
    if result.html:
        typer.echo(f"report: {result.html}")


def _headline(result: ReportResult) -> None:
    best = result.score("image", "hard")
    wells = f"95 % interval over wells: {interval(best.low, best.high)}"
    bounds = "one well only, so no interval" if best.low is None else wells
    typer.echo(f"{percent(best.accuracy)} of {render.count(best.n, 'image')} are right ({bounds})")
    nulls = [i for i in result.baselines if i.null and (i.level, i.vote) == ("image", "hard")]
    if nulls:
        most = max(nulls, key=lambda item: item.accuracy)
        typer.echo(f"the best null baseline ({most.baseline}): {percent(most.accuracy)}")
    typer.echo("")


def _facts(result: ReportResult) -> None:
    pairs = [
        ("predict run", result.run_id),
        ("train run", result.train_run_id),
        ("split", f"{result.split} ({result.protocol}, by {result.group_level})"),
        ("scored", f"{', '.join(result.subsets)}; {render.cell(result.field)}"),
        ("cells", f"{result.cells:,}"),
        ("images", f"{result.images:,}"),
        ("wells", f"{result.wells:,} ({result.wells_seen:,} seen in training)"),
        ("classes", result.classes),
        ("chance", percent(result.chance)),
        ("always the same", result.majority_label),
    ]
    silent = result.score("image", "hard").abstained
    if silent:
        pairs.append(("without answer", f"{silent:,} of {result.images:,} images (hard vote)"))
    render.facts(pairs)
    typer.echo("")


def _scores(found: Sequence[Score]) -> None:
    """Tell the scores in two tables, since one would be too wide."""
    silent = any(score.abstained for score in found)
    render.table(
        (
            *("per", "vote", "n", *(["silent"] if silent else [])),
            *("right", "accuracy", "95 % interval", "ties"),
        ),
        [
            (
                *(score.level, score.vote, score.n),
                *([score.abstained] if silent else []),
                *(score.correct, percent(score.accuracy), interval(score.low, score.high)),
                score.ties,
            )
            for score in found
        ],
    )
    typer.echo("")
    render.table(
        ("per", "vote", "majority", "balanced", "macro F1", "top 5", "log loss", "ECE"),
        [
            (
                *(score.level, score.vote, percent(score.majority)),
                percent(score.balanced_accuracy),
                *(f"{score.macro_f1:.3f}", percent(score.top_5), _number(score.log_loss)),
                f"{score.ece:.3f}",
            )
            for score in found
        ],
    )
    missing = [score.log_loss_missing for score in found if score.level == "cell"]
    if missing and missing[0]:
        render.wrapped(f"No log loss: {missing[0]}")
    typer.echo("")


def _part(title: str, found: Sequence[Score]) -> None:
    if not found:
        return
    typer.echo(f"{title}:")
    render.table(
        ("per", "vote", "n", "accuracy", "95 % interval", "balanced", "macro F1"),
        [
            (
                *(score.level, score.vote, score.n, percent(score.accuracy)),
                *(interval(score.low, score.high), percent(score.balanced_accuracy)),
                f"{score.macro_f1:.3f}",
            )
            for score in found
            if score.vote == "hard"
        ],
    )
    typer.echo("")


def _baselines(found: Sequence[BaselineScore]) -> None:
    """Tell what a score has to beat: a row per baseline, by hard votes."""
    from cellstore.report.scoring import by_baseline

    if not found:
        return
    rows = []
    for row in by_baseline(found):
        first, image = next(iter(row.values())), row.get("image")
        bounds = interval(image.low, image.high) if image else "-"
        scored = [percent(item.accuracy if item else None) for item in map(row.get, LEVELS)]
        rows.append((first.baseline, first.run_id, scored[0], bounds, *scored[1:]))
    heads = ("baseline", "run", "per image", "95 % interval", "per well", "per cell")
    render.table(heads, rows)
    typer.echo("")


def _groups(result: ReportResult) -> None:
    """Tell the best and the worst classes, plates and genes."""
    classes = [item for item in result.by_class if item.support]
    _table(
        ("class", "images", "right", "same gene", "recall", "95 % interval", "precision"),
        classes,
        lambda item: (item.label, item.f1),
        lambda item: (
            *(item.support, item.correct, item.same_target, percent(item.recall)),
            *(interval(item.low, item.high), percent(item.precision)),
        ),
    )
    heads = ("images", "wells", "right", "same gene", "accuracy", "95 % interval")
    for kind, groups in (("plate", result.by_plate), ("target gene", result.by_target)):
        if kind == "plate" or len(groups) > 1:
            _table(
                (kind, *heads),
                groups,
                lambda item: (item.name, item.accuracy),
                lambda item: (
                    *(item.n, item.wells, item.correct, item.same_target),
                    *(percent(item.accuracy), interval(item.low, item.high)),
                ),
            )


def _table(
    heads: Sequence[str],
    found: Sequence[Item],
    key: Callable[[Item], tuple[str, float]],
    cells: Callable[[Item], tuple[Any, ...]],
) -> None:
    """Print the best and the worst few, with what is left out."""
    if not found:
        return
    ranked = sorted(found, key=lambda item: (-key(item)[1], key(item)[0]))
    few = ranked if len(ranked) <= 2 * FEW else [*ranked[:FEW], *ranked[-FEW:]]
    render.table(
        heads, [(render.shortened(key(item)[0], NAME_WIDTH), *cells(item)) for item in few]
    )
    left = len(ranked) - len(few)
    if left:
        typer.echo(f"the best and the worst; {left:,} between them (all with --json or --html)")
    typer.echo("")


def _compared(result: ReportResult) -> None:
    if result.comparison is None:
        return
    from .tell_compare import comparison

    other = result.comparison.second.run_id
    typer.echo(f"Beside run {other}:")
    comparison(result.comparison, shown=2 * FEW)
    typer.echo("")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if share is None else f"{100 * share:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """Return the bounds of a share."""
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"
