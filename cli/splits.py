"""Commands about splits: create, show, check."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import SplitParams
from cellstore.terms import GroupLevel, LabelField

from . import render
from .context import open_store, say, sentences
from .options import (
    JsonOption,
    LeaveOutOption,
    PlatesOption,
    QcRunOption,
    StoreOption,
    leave_out,
)

if TYPE_CHECKING:
    from cellstore.stages.split import CheckResult, SplitResult

app = typer.Typer(
    help="Say which images train a network and which ones test it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The split. Default: the latest.")
]


LEFT_OUT = {
    "without_label": "without a label",
    "missing_files": "missing files",
    "flagged": "flagged by qc",
}


class Protocol(StrEnum):
    """How a split is drawn."""

    GROUPED = "grouped"
    PUBLISHED = "published"


@app.command("create")
@sentences
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the split is called.")],
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="grouped: a well (--group) is on one side only. published: by image, as in the "
            "published study; fields of one well are on both sides, so scores are too good."
        ),
    ] = Protocol.GROUPED,
    field: Annotated[
        LabelField, typer.Option(help="What is to be predicted: compound name or target gene.")
    ] = LabelField.PERT_INAME,
    group: Annotated[
        GroupLevel, typer.Option(help="What stays together on one side (grouped protocol).")
    ] = GroupLevel.WELL,
    test_size: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Share of the groups that test.")
    ] = 0.2,
    validation_size: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0.0,
            max=1.0,
            help="Share of the groups that stop the training (grouped protocol).",
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same split.")] = 0,
    plate: PlatesOption = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Also images whose files are not here yet.")
    ] = False,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Assign the images to train, validation and test.

    The split is stored as rows under its name, and never changes once a run relies on it.

    \b
    Example:
      cellstore split create by-well
      cellstore split create as-published --protocol published --allow-missing
    """
    params = SplitParams(
        protocol=protocol.value,
        field=field,
        group_level=group,
        test_size=test_size,
        validation_size=validation_size,
        seed=seed,
        plates=tuple(plate or ()),
        allow_missing=allow_missing,
        leave_out_flagged=leave_out(leave_out_flagged, qc_run),
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.create_split(name, params)
    _show(result, as_json=as_json)
    if not result.created and not as_json:
        say("This split was there already; nothing has changed.")


@app.command("show")
@sentences
def show(
    ctx: typer.Context,
    name: NameArgument = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the sides of a split, and what was left out.

    \b
    Example:
      cellstore split show by-well
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.show_split(name)
    _show(result, as_json=as_json)


@app.command("check")
@sentences
def check(
    ctx: typer.Context,
    name: NameArgument = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what lets the test side be seen in training.

    Same well, same file, or same compound by another spelling on both sides; a class that is
    missing on one side. Ends with 1 if something is found.

    \b
    Example:
      cellstore split check by-well
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.check_split(name)
    if as_json:
        render.as_json(result)
    else:
        _show_check(result)
    if result.findings:
        raise typer.Exit(1)


def _show(result: SplitResult, *, as_json: bool) -> None:
    if as_json:
        render.as_json(result)
        return
    render.facts(
        [
            ("split", result.name),
            ("protocol", f"{result.protocol}, by {result.group_level}, seed {result.seed}"),
            ("predicts", f"{result.field}, {render.count(result.classes, 'class', 'classes')}"),
            ("images", f"{result.images:,}"),
            *((f"  {side}", f"{number:,}") for side, number in result.counts.items()),
            ("wells on both sides", f"{result.wells_on_both_sides:,}"),
            ("frozen", "yes, a run relies on it" if result.frozen else "no"),
            ("fingerprint", result.fingerprint[:12]),
            *_left_out(result),
        ]
    )
    if result.protocol == "grouped" and not result.counts["validation"]:
        say(
            "Careful: there is no validation side, so `cellstore train` cannot use this split. A "
            f"class needs three {result.group_level}s or more to have one."
        )
    if result.leaking:
        say(
            "Careful: wells are on both sides. Scores under this split are those of wells that "
            "were already seen. See: cellstore split check"
        )


EXAMPLES = 5
"""How many of the classes left out are named; --json lists all."""


def _flags_of(left_out: dict[str, Any]) -> list[tuple[str, str]]:
    if "qc_run" not in left_out:
        return []
    unseen = left_out.get("unseen_by_qc", 0)
    kept = f"; {render.count(unseen, 'image')} kept that it has not looked at" if unseen else ""
    return [("flags of", f"qc run {left_out['qc_run']}{kept}")]


def _left_out(result: SplitResult) -> list[tuple[str, str]]:
    left_out = result.left_out
    shown = _flags_of(left_out) + [
        (title, f"{render.count(left_out[name], 'image')} left out")
        for name, title in LEFT_OUT.items()
        if left_out.get(name)
    ]
    for label, cut in left_out.get("downsampled", {}).items():
        shown.append((f"{label}, downsampled", f"{cut['after']} of {cut['before']} images"))
    by_reason: dict[str, list[str]] = {}
    for item in left_out.get("classes", []):
        by_reason.setdefault(item["reason"], []).append(item["label"])
    for reason, labels in by_reason.items():
        more = ", ..." if len(labels) > EXAMPLES else ""
        named = f"{', '.join(labels[:EXAMPLES])}{more}"
        shown.append((f"{render.count(len(labels), 'class', 'classes')} left out", reason))
        shown.append(("", named))
    return shown


def _show_check(result: CheckResult) -> None:
    render.facts(
        [
            ("split", f"{result.split} ({result.protocol})"),
            ("images", f"{result.images:,}"),
            ("wells on both sides", f"{result.wells_on_both_sides:,} of {result.wells:,}"),
            ("labels on both sides", f"{result.labels_on_both_sides:,} of {result.labels:,}"),
            ("plates on both sides", f"{result.plates_on_both_sides:,}"),
        ]
    )
    for finding in result.findings:
        typer.echo(f"{finding.kind}: {finding.message}")
        if finding.examples:
            typer.echo(f"  for example {render.cell(', '.join(finding.examples))}")
    if not result.findings:
        typer.echo("Nothing found: the test side is not seen in training.")
