"""Splits as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from . import render
from .context import say

if TYPE_CHECKING:
    from cellstore.stages.split import SplitLine, SplitResult

LEFT_OUT = {
    "without_label": "without a label",
    "missing_files": "missing files",
    "flagged": "flagged by qc",
}
ROWS = {
    "rows_without_image": "rows without an image",
    "rows_refused": "rows not usable",
}
EXAMPLES = 5
"""How many of the classes left out are named; --json lists all."""


def show_split(result: SplitResult, *, as_json: bool) -> None:
    """Print a split; what makes it less useful goes to stderr."""
    if as_json:
        render.as_json(result)
        return
    render.facts(
        [
            ("split", result.name),
            ("protocol", _protocol(result)),
            *_fold(result),
            ("predicts", f"{result.field}, {render.count(result.classes, 'class', 'classes')}"),
            ("images", f"{result.images:,}"),
            *((f"  {side}", f"{number:,}") for side, number in result.counts.items()),
            ("wells on both sides", f"{result.wells_on_both_sides:,}"),
            ("frozen", "yes, a run relies on it" if result.frozen else "no"),
            ("fingerprint", result.fingerprint[:12]),
            *_left_out(result.left_out),
        ]
    )
    _warn(result)


def show_folds(name: str, results: Sequence[SplitResult], *, as_json: bool) -> None:
    """Print the folds of a cross-validation: what they share, then a line for each."""
    if as_json:
        render.as_json(results)
        return
    first = results[0]
    render.facts(
        [
            ("folds", f"{len(results)}, {name}-1 to {name}-{len(results)}"),
            ("protocol", _protocol(first)),
            ("predicts", f"{first.field}, {render.count(first.classes, 'class', 'classes')}"),
            ("images", f"{first.images:,}, each in one test side"),
            *_left_out(first.left_out),
        ]
    )
    typer.echo()
    render.table(
        ("split", "train", "validation", "test", "wells on both sides"),
        [(r.name, *r.counts.values(), r.wells_on_both_sides) for r in results],
    )
    for text in dict.fromkeys(map(_leaking, results)):
        if text:
            say(text)


def show_list(lines: Sequence[SplitLine], *, as_json: bool) -> None:
    """Print a line for each split."""
    if as_json:
        render.as_json(lines)
    elif not lines:
        typer.echo("There is no split yet. Make one with: cellstore split create NAME")
    else:
        headers = ("split", "how", "predicts", "train", "validation", "test", "runs", "frozen")
        render.table(headers, [_cells(line) for line in lines])


def _cells(line: SplitLine) -> tuple[Any, ...]:
    how = f"by {line.group_level}" if line.protocol == "grouped" else line.protocol
    counts = (line.train, line.validation, line.test, line.runs)
    return (line.name, how, line.field, *counts, "yes" if line.frozen else "no")


def _protocol(result: SplitResult) -> str:
    drawn = "" if result.protocol == "imported" else f", seed {result.seed}"
    return f"{result.protocol}, by {result.group_level}{drawn}"


def _fold(result: SplitResult) -> list[tuple[str, str]]:
    return [] if result.family is None else [("fold", f"{result.fold} of {result.family}")]


def _warn(result: SplitResult) -> None:
    if result.protocol == "grouped" and not result.counts["validation"]:
        say(
            "Careful: there is no validation side, so `cellstore train` cannot use this split. A "
            f"class needs three {result.group_level}s or more to have one."
        )
    if text := _leaking(result):
        say(text)


def _leaking(result: SplitResult) -> str:
    if not result.leaking:
        return ""
    return (
        "Careful: wells are on both sides. Scores under this split are those of wells that "
        "were already seen. See: cellstore split check"
    )


def _left_out(left_out: dict[str, Any]) -> list[tuple[str, str]]:
    shown = _flags_of(left_out) + [
        (title, f"{render.count(left_out[name], 'image')} left out")
        for name, title in LEFT_OUT.items()
        if left_out.get(name)
    ]
    shown += _rows(left_out)
    for label, cut in left_out.get("downsampled", {}).items():
        shown.append((f"{label}, downsampled", f"{cut['after']} of {cut['before']} images"))
    return shown + _classes(left_out.get("classes", []))


def _flags_of(left_out: dict[str, Any]) -> list[tuple[str, str]]:
    if "qc_run" not in left_out:
        return []
    unseen = left_out.get("unseen_by_qc", 0)
    kept = f"; {render.count(unseen, 'image')} kept that it has not looked at" if unseen else ""
    return [("flags of", f"qc run {left_out['qc_run']}{kept}")]


def _rows(left_out: dict[str, Any]) -> list[tuple[str, str]]:
    shown = []
    for name, title in ROWS.items():
        found = left_out.get(name, {"count": 0})
        if found["count"]:
            shown.append((title, f"{found['count']:,}, first {found['examples'][0]}"))
    return shown


def _classes(classes: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    shown = []
    by_reason: dict[str, list[str]] = {}
    for item in classes:
        by_reason.setdefault(item["reason"], []).append(item["label"])
    for reason, labels in by_reason.items():
        more = ", ..." if len(labels) > EXAMPLES else ""
        named = f"{', '.join(labels[:EXAMPLES])}{more}"
        shown.append((f"{render.count(len(labels), 'class', 'classes')} left out", reason))
        shown += [("", line) for line in textwrap.wrap(named, 56)]
    return shown
