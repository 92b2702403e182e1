"""Commands that say what runs answer, and how well: votes, report, compare."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import VoteOptions, option
from cellstore.errors import some_of
from cellstore.store import Store

from . import output
from .app import HTML, Common, command
from .output import AnswerOptions, Format, count, percent, say

if TYPE_CHECKING:
    from cellstore.report.comparison import (
        ComparedRun,
        Comparison,
        HitsComparison,
        RecipeDifference,
    )
    from cellstore.report.leaderboard import Leaderboard
    from cellstore.report.scoring import ReportResult, Score

app = typer.Typer(add_completion=False, rich_markup_mode=None)

FEW = 3
SHOWN_DIFFERENCES = 20
SHOWN_OPTIONS = 8

LEVEL = option("image", "Whether the cells of images or of wells vote.", choices=("image", "well"))
RUN = option(
    "latest",
    "The predict run, by number, or 'latest'; the name of a cross-validation: the runs of all its "
    "folds as one (NAME:logistic for a baseline, NAME:7 for the models trained as in run 7).",
    metavar="RUN",
)
VOTE = option(
    "hard",
    "hard: each cell counts once, for its first choice; soft: with its probabilities; median: of "
    "the probabilities that the cells gave.",
    choices=("hard", "soft", "median"),
)


@command(app, "votes", then=True)
def votes(
    vote_options: VoteOptions,
    answer: AnswerOptions,
    store: Store,
    common: Common,
    run: str = RUN,
    level: str = LEVEL,
    vote: str = VOTE,
    ties: bool = option(False, "Show only those with a tie."),
) -> None:
    """Show the label of every image by the vote of its cells.

    One row per image, or per well and subset of the split; the summary counts a well once. A tie
    goes to the label with the higher summed probability, then to the first in the alphabet, and is
    always marked. --json gives the summary and the rows; --format json the rows only.

    \b
    Example:
      cellstore votes --run 8
      cellstore votes --level well --vote soft --min-cells 20 --min-margin 0.1
      cellstore votes --ties --format csv --output ties.csv
    """
    from cellstore.report.votes import open_votes

    answer = answer.checked()
    with open_votes(
        store.workspace, run, level=level, vote=vote, vote_options=vote_options, ties_only=ties
    ) as (result, rows):
        if common.as_json:
            found = {item.name: getattr(result, item.name) for item in fields(result)}
            found |= {"accuracy": result.accuracy, "votes": rows.records()[: answer.limit]}
            del found["table"]
            _save(output.json_text(found), answer.output)
            store.wrote(answer.output)
            return
        # What is not for a person's screen has the summary beside it, not in it.
        show = typer.echo if answer.format is Format.TABLE and answer.output is None else say
        counts = f"{count(result.units, level)}, {count(result.ties, 'tie')}"
        counts += f", {count(result.abstained, 'abstention')}"
        show(f"Run {result.name}, {result.vote} vote: {counts}")
        for item in result.subsets:
            trained = " - the network was trained on these" if item.subset == "train" else ""
            share = f"{100 * item.accuracy:.2f} %"
            show(f"{item.subset}: {item.correct:,} of {item.n:,} right ({share}){trained}")
        for note in result.notes:
            show(output.filled(note))
        show("")
        output.write(rows, answer, _for_people)
        store.wrote(answer.output)


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a table shows of a vote; other formats have all columns."""
    share = row["share"]
    return {
        **{name: row[name] for name in ("plate", "well", "site") if name in row},
        "winner": row["winner"] or "",
        "share": None if share is None else round(share, 2),
        "cells": row["cells"],
        "truth": row["truth"] or "",
        "right": {True: "yes", False: "no", None: ""}[row["correct"]],
        "note": row["abstained"] or ("tie" if row["tie"] else ""),
    }


def show_report(result: ReportResult) -> None:
    """Print the scores of a report."""
    from cellstore.report.scoring import by_baseline

    best = result.score("image", "hard")
    bounds = f"{count(result.wells, 'well')}: too few for an interval"
    if best.low is not None:
        bounds = f"95 % interval over wells: {percent(best.low, best.high)}"
    typer.echo(f"{percent(best.accuracy)} of {count(best.n, 'image')} are right ({bounds})")
    typer.echo("")
    silent = f"{best.abstained:,} of {result.images:,} images (hard vote)"
    runs: dict[str, Any] = {"predict run": result.run_id, "train run": result.train_run_id}
    if result.folds:
        runs = {"predict runs": ", ".join(map(str, result.folds)) + " (one for each fold)"}
    none = sum(item.n == 0 for item in result.by_well)
    silent += f"; none of {count(none, 'well')}" if none else ""
    output.pairs(
        {
            **runs,
            "split": f"{result.split} ({result.protocol}, by {result.group_level})",
            "scored": f"{', '.join(result.subsets)}; {output.cell(result.field)}",
            "cells": result.cells,
            "images": result.images,
            "wells": f"{result.wells:,} ({result.wells_seen:,} seen in training)",
            "classes": result.classes,
            "chance": percent(result.chance),
            "most frequent class": result.majority_label,
            **({"without answer": silent} if best.abstained else {}),
        }
    )
    typer.echo("")
    # In two tables, since one would be too wide.
    no_answer = ["no answer"] if any(score.abstained for score in result.scores) else []
    _show_scores(result.scores, "n", *no_answer, "right", "accuracy", "95 % interval", "ties")
    _show_scores(result.scores, "majority", "balanced", "macro F1", "top 5", "log loss", "ECE")
    if result.unseen:
        typer.echo("Without the wells that were seen in training:")
        hard = [score for score in result.unseen if score.vote == "hard"]
        _show_scores(hard, "n", "accuracy", "95 % interval", "balanced", "macro F1")
    if result.baselines:
        rows = []
        for row in by_baseline(result.baselines):
            first, image = next(iter(row.values())), row.get("image")
            scored = [
                percent(item.accuracy if item else None)
                for item in map(row.get, ("image", "well", "cell"))
            ]
            interval = percent(image.low, image.high) if image else "-"
            rows.append((first.name, first.run_id, scored[0], interval, *scored[1:]))
        heads = ("baseline", "run", "per image", "95 % interval", "per well", "per cell")
        output.table(heads, rows)
        typer.echo("")
    # Each row of a group: its name, what it is ranked by, and what is shown.
    _show_best_and_worst(
        ("class", "images", "right", "same gene", "recall", "95 % interval", "precision"),
        [
            (
                *(item.label, item.f1),
                *(item.support, item.correct, item.same_target, percent(item.recall)),
                *(percent(item.low, item.high), percent(item.precision)),
            )
            for item in result.by_class
            if item.support
        ],
    )
    for kind, groups in (
        ("plate", result.by_plate),
        ("target gene", result.by_target),
        ("dose", result.by_dose),
    ):
        if kind == "plate" or len(groups) > 1:
            _show_best_and_worst(
                (kind, "images", "wells", "right", "same gene", "accuracy", "95 % interval"),
                [
                    (
                        *(item.name, item.accuracy),
                        *(item.n, item.wells, item.correct, item.same_target),
                        *(percent(item.accuracy), percent(item.low, item.high)),
                    )
                    for item in groups
                ],
            )
    if result.comparison is not None:
        typer.echo(f"Beside run {result.comparison.second.name}:")
        _show_comparison(result.comparison, shown=2 * FEW)
        typer.echo("")
    output.wrapped(result.against_nulls)
    output.wrapped(result.leak)
    if result.html:
        typer.echo(f"report: {result.html}")


SCORES: dict[str, Callable[[Score], Any]] = {
    "per": lambda score: score.level,
    "vote": lambda score: score.vote,
    "n": lambda score: score.n,
    "no answer": lambda score: score.abstained,
    "right": lambda score: score.correct,
    "accuracy": lambda score: percent(score.accuracy),
    "95 % interval": lambda score: percent(score.low, score.high),
    "ties": lambda score: score.ties,
    "majority": lambda score: percent(score.majority),
    "balanced": lambda score: percent(score.balanced_accuracy),
    "macro F1": lambda score: f"{score.macro_f1:.3f}",
    "top 5": lambda score: percent(score.top_5),
    "log loss": lambda score: "-" if score.log_loss is None else f"{score.log_loss:.3f}",
    "ECE": lambda score: f"{score.ece:.3f}",
}
"""Columns of the tables of scores."""


def _show_scores(scores: Iterable[Score], *heads: str) -> None:
    heads = ("per", "vote", *heads)
    output.table(heads, [[SCORES[head](score) for head in heads] for score in scores])
    typer.echo("")


def _show_best_and_worst(heads: Sequence[str], found: Sequence[tuple[Any, ...]]) -> None:
    """Print the best and the worst groups: name, what it is ranked by, and what is shown."""
    if not found:
        return
    ranked = sorted(found, key=lambda row: (-row[1], row[0]))
    few = ranked if len(ranked) <= 2 * FEW else [*ranked[:FEW], *ranked[-FEW:]]
    output.table(heads, [(row[0], *row[2:]) for row in few])
    left = len(ranked) - len(few)
    if left:
        typer.echo(f"the best and the worst; {left:,} between them (all with --json or --html)")
    typer.echo("")


@command(app, "report", show_report, then=True)
def report(
    vote_options: VoteOptions,
    store: Store,
    run: str = RUN,
    compare: str | None = option(
        None, "Put another predict run beside it; see cellstore compare.", metavar="RUN"
    ),
    html: Path | None = HTML,
    force: bool = option(False, "Also score images that the network was trained on; marked."),
) -> ReportResult:
    """Score a predict run: majority votes against the truth.

    The cells of an image vote; the winner is compared with the treatment of its well.

    \b
    Example:
      cellstore report
      cellstore report --run 8 --html report.html
      cellstore report --run 8 --compare 5 --min-cells 20 --no-controls
      cellstore report --run cv
    """
    return store.report(run, compare=compare, vote_options=vote_options, html=html, force=force)


def _show_runs(found: Leaderboard) -> None:
    typer.echo(f"split {found.split}\n")
    ranks = Counter(row.rank for row in found.runs)
    rows = [
        (
            "-" if row.rank is None else f"{row.rank}{'=' * (ranks[row.rank] > 1)}",
            row.name,
            row.model,
            percent(row.accuracy) if row.accuracy is not None else row.status,
            percent(row.low, row.high),
            row.wells or None,
            percent(row.validation_accuracy),
        )
        for row in found.runs
    ]
    heads = ("", "run", "model", "accuracy", "95 % interval", "wells", "validation")
    output.table(heads, rows)
    typer.echo("")
    for row in found.runs:
        if row.differs:
            values = "; ".join(f"{name} {value}" for name, value in row.differs.items())
            output.wrapped(f"run {row.name}: {values}")
        if row.then:
            output.wrapped(f"run {row.name}, {row.status}: {row.then}")
        elif row.accuracy is not None and row.status != "done":
            output.wrapped(f"run {row.name}: {row.status}")


def _then_of_runs(found: Leaderboard) -> tuple[str, ...]:
    best = [row for row in found.runs if row.predict_runs and row.images][:2]
    names = [shlex.quote(row.name) for row in best]
    steps = tuple(f"cellstore report --run {name}" for name in names[:1])
    if len(best) == 2:
        steps += (f"cellstore compare {' '.join(names)}",)
    return steps


@command(app, "runs", _show_runs, then=_then_of_runs)
def runs(
    store: Store,
    split: str | None = option(
        None,
        "Models on this split, or on all folds of this cross-validation. Default: the one that "
        "was trained on last.",
    ),
    by: str = option(
        "test",
        "What ranks them: images of the test subset, or cells of the validation subset.",
        choices=("test", "validation"),
    ),
) -> Leaderboard:
    """List trained models by their scores, the best first.

    Networks, baselines and models of your own, each with the share of test images that it labels
    right, a 95 % interval over wells, and in which parameters it differs from others of its kind.
    The folds of a cross-validation are one row. The name of a run can be given to report and
    compare.

    \b
    Example:
      cellstore runs
      cellstore runs --split five --by validation
    """
    return store.runs(split, by=by)


def _save(text: str, path: Path | None) -> None:
    """Print a text, or write it to a file, all or nothing."""
    if path is None:
        typer.echo(text, nl=False)
        return
    from cellstore.artifacts import open_atomically

    with open_atomically(path) as file:
        file.write(text.encode())
    say(f"written to {path}")


def _show_comparison(found: Comparison, shown: int | None = None) -> None:
    """Print where two runs differ; only the first ``shown`` of the differences, if it is given."""
    first, second = found.first.name, found.second.name
    typer.echo(
        f"{count(found.n, found.level)} of {count(found.wells, 'well')} that both have labelled\n"
    )

    def cells(item: ComparedRun) -> tuple[object, ...]:
        accuracy = (percent(item.accuracy), percent(item.low, item.high))
        return (item.name, item.train_run_id, item.split, item.correct, *accuracy,
                item.wells_seen)  # fmt: skip

    output.table(
        ("run", "train run", "split", "right", "accuracy", "95 % interval", "wells seen"),
        [cells(found.first), cells(found.second)],
    )
    typer.echo("")
    output.table(
        ("", f"{second} right", f"{second} wrong"),
        [
            (f"{first} right", found.both_right, found.only_first),
            (f"{first} wrong", found.only_second, found.both_wrong),
        ],
    )
    points = f"{100 * found.difference:+.1f} points"
    if found.difference_low is None or found.difference_high is None:
        points += " (too few wells for an interval)"
    else:
        low, high = 100 * found.difference_low, 100 * found.difference_high
        points += f" (95 % interval over wells: {low:+.1f} to {high:+.1f})"
    typer.echo("")
    output.wrapped(f"run {first} minus run {second}: {points}")
    output.wrapped(found.conclusion)
    for warning in found.warnings:
        output.wrapped(f"Careful: {warning}")
    _show_recipes(found.recipes, first, second)
    listed = found.differing[:shown]
    if not listed:
        return
    right = {"first": first, "second": second, "neither": "-"}
    typer.echo("")
    output.table(
        (found.level, "truth", f"run {first}", f"run {second}", "right"),
        [(item.name, item.truth, item.first, item.second, right[item.right]) for item in listed],
    )
    more = found.n_differing - len(listed)
    output.say_more(more, " in which they differ")


def _show_recipes(recipes: Sequence[RecipeDifference], first: object, second: object) -> None:
    """Print in which options two runs differ."""
    if not recipes:
        typer.echo("Their recipes are the same.")
        return
    typer.echo("")
    output.table(
        ("option", f"run {first}", f"run {second}"),
        [(item.what, item.first, item.second) for item in recipes[:SHOWN_OPTIONS]],
    )
    output.say_more(len(recipes) - SHOWN_OPTIONS, " of the options")


def _show_hits_comparison(found: HitsComparison) -> None:
    """Print which of two hits runs finds more, and the treatments that are a hit of one alone."""
    first, second = found.first, found.second
    typer.echo(f"{count(found.n, 'treatment')} that both could judge\n")
    output.table(
        ("run", "profiles", "features", "columns", "hits"),
        [
            (one.run_id, one.profile_run, one.features, one.columns, one.hits)
            for one in (first, second)
        ],
    )
    typer.echo("")
    output.table(
        ("", f"hit of {second.run_id}", f"not of {second.run_id}"),
        [
            (f"hit of {first.run_id}", found.both, found.only_first),
            (f"not of {first.run_id}", found.only_second, found.neither),
        ],
    )
    typer.echo("")
    output.wrapped(found.conclusion)
    if found.not_judged:
        typer.echo(f"{count(found.not_judged, 'treatment')} could not be judged by one or both.")
    for one, alone_in in ((first, found.only_in_first), (second, found.only_in_second)):
        if alone_in:
            typer.echo(f"{count(alone_in, 'treatment')} only in run {one.run_id}.")
    for warning in found.warnings:
        output.wrapped(f"Careful: {warning}")
    _show_recipes(found.recipes, first.run_id, second.run_id)

    def effect(value: float | None) -> str | None:
        return None if value is None else f"{value:.1f}"

    alone = [item for item in found.treatments if item.hit_of in ("first", "second")]
    if alone:
        typer.echo("")
        output.table(
            ("hit of one alone", f"run {first.run_id}", "effect", f"run {second.run_id}", "effect"),
            [
                (
                    " ".join(filter(None, (item.name, item.cell_line, item.time_point))),
                    item.first,
                    effect(item.first_effect),
                    item.second,
                    effect(item.second_effect),
                )
                for item in alone
            ],
        )
        more = found.only_first + found.only_second - len(alone)
        output.say_more(more, "")
    both = [item.name for item in found.treatments if item.hit_of == "both"]
    if both:
        output.wrapped(f"Hits of both: {some_of(both, SHOWN_DIFFERENCES)}")


def _show_either(found: Comparison | HitsComparison) -> None:
    from cellstore.report.comparison import Comparison

    if isinstance(found, Comparison):
        _show_comparison(found)
    else:
        _show_hits_comparison(found)


@command(app, "compare", _show_either, then=True)
def compare(
    first: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A predict run, by number, 'latest', or the name of a cross-validation; or a hits "
            "run.",
        ),
    ],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other one.")],
    vote_options: VoteOptions,
    store: Store,
    common: Common,
    level: str = LEVEL,
    vote: str = VOTE,
    limit: int | None = option(
        None, "List only the first N that differ. Default: 20; all with --json.", min=0
    ),
    force: bool = option(False, "Also compare images that a network was trained on; marked."),
) -> Comparison | HitsComparison:
    """Show where two predict or two hits runs differ, and which is right or finds more.

    Predict runs are compared on the images that both have labelled. McNemar's test takes each well
    once, because images of a well are alike. Hits runs are compared on the treatments that both
    could judge: which profiles find more of them at the same false discovery rate?

    \b
    Example:
      cellstore compare 8 12
      cellstore compare cv cv:logistic
      cellstore compare 8 12 --level well --vote soft
    """
    return store.compare(
        first,
        second,
        level=level,
        vote=vote,
        limit=SHOWN_DIFFERENCES if limit is None and not common.as_json else limit,
        vote_options=vote_options,
        force=force,
    )
