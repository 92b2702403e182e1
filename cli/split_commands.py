"""Commands about splits: create, import, list, show, check, delete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import SplitParams, option, option_of
from cellstore.enums import GroupLevel
from cellstore.errors import UserInputError
from cellstore.store import Store

from . import output
from .app import PRESET, Common, command, confirm
from .output import say

if TYPE_CHECKING:
    from cellstore.analysis.leaks import SplitCheck
    from cellstore.stages.split import Deleted, SplitLine, SplitResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)
split = typer.Typer(
    help="Say which images train a network and which ones test it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(split, name="split")

NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The split. Default: the latest.")
]
NewNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the split is called.")]
SHOWN_CLASSES = 5
"""How many of the excluded classes are named; --json lists all."""
NOT_NEW = "This was there already; nothing has changed."
MARGIN = 9
"""Width of the column of severities: ``warning`` and a gap."""


def _show_split(result: SplitResult) -> None:
    """Print a split; what makes it less useful goes to stderr."""
    fold = [] if result.family is None else [("fold", f"{result.fold} of {result.family}")]
    output.pairs(
        [
            ("split", result.name),
            ("protocol", _protocol(result)),
            *fold,
            ("predicts", f"{result.field}, {output.count(result.classes, 'class', 'classes')}"),
            ("images", result.images),
            *((f"  {subset}", number) for subset, number in result.counts.items()),
            ("wells in two subsets", result.wells_in_both_subsets),
            ("frozen", "yes, a run relies on it" if result.frozen else "no"),
            ("fingerprint", result.fingerprint[:12]),
            *_excluded(result.excluded),
        ]
    )
    if result.protocol == "grouped" and result.validation_classes < 2:
        what = "has one class only" if result.validation_classes else "is empty"
        say(
            f"Careful: the validation subset {what}, so it cannot say when to stop training. A "
            f"class needs three {result.group_level}s or more to have images that validate."
        )
    _warn([result])


def _show_new_split(result: SplitResult) -> None:
    _show_split(result)
    if not result.created:
        say(NOT_NEW)


def _show_folds(name: str, results: Sequence[SplitResult], left_out: str | None) -> None:
    """Print the folds of a cross-validation: what they share, then a line for each."""
    first = results[0]
    output.pairs(
        [
            ("folds", f"{len(results)}, {name}-1 to {name}-{len(results)}"),
            ("protocol", _protocol(first)),
            ("predicts", f"{first.field}, {output.count(first.classes, 'class', 'classes')}"),
            ("images", f"{first.images:,}, each tested once"),
            *([("each tests", f"one {left_out}, in the order of their names")] if left_out else []),
            *_excluded(first.excluded),
        ]
    )
    typer.echo()
    output.table(
        ("split", "train", "validation", "test", "wells in two subsets"),
        [(r.name, *r.counts.values(), r.wells_in_both_subsets) for r in results],
    )
    _warn(results)
    if not any(result.created for result in results):
        say(NOT_NEW)


def _warn(results: Sequence[SplitResult]) -> None:
    if any(result.leaking for result in results):
        say(
            "Careful: some wells are in training and in test. Scores under this split are those of "
            "wells that were already seen. See: cellstore split check"
        )


def _protocol(result: SplitResult) -> str:
    drawn = "" if result.protocol == "imported" else f", seed {result.seed}"
    return f"{result.protocol}, by {result.group_level}{drawn}"


def _excluded(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was excluded, and why."""
    shown = []
    if "qc_run" in found:
        unseen = output.count(found.get("unseen_by_qc", 0), "image")
        kept = f"; {unseen} kept that it has not looked at" if found.get("unseen_by_qc") else ""
        shown.append(("flags of", f"qc run {found['qc_run']}{kept}"))
    titles = {
        "without_label": "without a label",
        "missing_files": "missing files",
        "annotated": "excluded by annotations",
        "flagged": "flagged by qc",
        "rows_without_image": "rows without an image",
        "rows_refused": "rows not usable",
    }
    for name, title in titles.items():
        number = found.get(name)
        if isinstance(number, dict) and number["count"]:
            shown.append((title, f"{number['count']:,}, first {number['examples'][0]}"))
        elif number and isinstance(number, int):
            shown.append((title, f"{output.count(number, 'image')} excluded"))
    for label, cut in found.get("downsampled", {}).items():
        shown.append((f"{label}, downsampled", f"{cut['after']} of {cut['before']} images"))
    by_reason: dict[str, list[str]] = {}
    for item in found.get("classes", []):
        by_reason.setdefault(item["reason"], []).append(item["label"])
    for reason, labels in by_reason.items():
        more = ", ..." if len(labels) > SHOWN_CLASSES else ""
        named = f"{', '.join(labels[:SHOWN_CLASSES])}{more}"
        shown.append((f"{output.count(len(labels), 'class', 'classes')} excluded", reason))
        shown.append(("", named))
    return shown


@command(split, "create", then=True)
def create(
    name: NewNameArgument,
    params: SplitParams,
    store: Store,
    common: Common,
    preset: str | None = PRESET,
) -> None:
    """Assign the images to train, validation and test.

    No well (with --group: no plate, no perturbation) is in two subsets. The split is kept under
    its name, and once a run has used it, nobody can change it.

    \b
    Example:
      cellstore split create by-well --where "batch = '2026_03'" --min-images 6
      cellstore split create by-plate --group plate --test-plates P7,P8
      cellstore split create new-drugs --group perturbation --field target
      cellstore split create five --folds 5 --downsample DMSO=median
      cellstore split create each --leave-out plate --validation-size 0
      cellstore split create as-published --preset published --allow-missing
    """
    if not params.several:
        common.show(store.create_split(name, params), _show_new_split)
    else:
        common.show(
            store.create_folds(name, params), lambda made: _show_folds(name, made, params.leave_out)
        )


@command(split, "import", _show_new_split, then=True)
def import_(
    name: NewNameArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Tables with a column split, and tables that say which wells they mean.",
        ),
    ],
    store: Store,
    field: str = option_of(SplitParams, "field"),
    group: GroupLevel = option(
        GroupLevel.IMAGE, "What the split keeps in one subset. image: nothing is known of wells."
    ),
    allow_missing: bool = option_of(SplitParams, "allow_missing"),
) -> SplitResult:
    """Take over a split that others made, from tables.

    A row gives the subset (train, validation, test) of images: by plate, well and site, or by
    treatment (broad_sample, pert_iname). JUMP-CP's datasplits name treatments with their cell line
    and time point; give the table that lists those wells as a further FILE. Rows without
    an image in the store are counted.

    \b
    Example:
      cellstore split import theirs split.csv
      cellstore split import jump split_example_1.csv cpjump1_metadata.csv.gz
    """
    return store.import_split(
        name, files, field=field, group_level=group, allow_missing=allow_missing
    )


def _show_list(lines: Sequence[SplitLine]) -> None:
    if not lines:
        typer.echo("There is no split yet. Make one with: cellstore split create NAME")
        return
    rows = [
        (
            line.name,
            f"by {line.group_level}" if line.protocol == "grouped" else line.protocol,
            *(line.field, line.train, line.validation, line.test, line.runs),
            "yes" if line.frozen else "no",
        )
        for line in lines
    ]
    headers = ("split", "how", "predicts", "train", "validation", "test", "runs", "frozen")
    output.table(headers, rows)


@command(split, "list", _show_list)
def list_(store: Store) -> Sequence[SplitLine]:
    """List all splits, with the images of each subset and the runs that rely on them.

    \b
    Example:
      cellstore split list
    """
    return store.list_splits()


@command(split, "show", _show_split, then=True)
def show(store: Store, name: NameArgument = None) -> SplitResult:
    """Show the subsets of a split, and what was excluded.

    \b
    Example:
      cellstore split show by-well
    """
    return store.show_split(name)


def _show_deleted(found: Deleted) -> None:
    typer.echo(f"Deleted {', '.join(found.names)}. The images themselves are as they were.")


@command(split, "delete", _show_deleted, then=True)
def delete(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The split, or the name that its folds share.")
    ],
    store: Store,
    yes: bool = option(False, "Do not ask."),
) -> Deleted:
    """Delete a split that no run uses. One that a run relies on stays.

    \b
    Example:
      cellstore split delete by-well
    """
    if not yes:
        found = store.delete_split(name, dry_run=True)
        images = output.count(found.images, "image")
        confirm(f"Delete {', '.join(found.names)} ({images} assigned)?")
    return store.delete_split(name)


@command(split, "check", then=True)
def check(
    common: Common,
    name: NameArgument = None,
    csv: tuple[Path, ...] = option(
        (),
        "Check a split table instead, without a store; may be given several times, as the "
        "files of `split import`.",
        metavar="FILE",
        repeated=True,
    ),
    field: str | None = option(
        None, "What a table (--csv) is to predict. Default: the target, if it has one."
    ),
    group: GroupLevel | None = option(
        None, "What a table (--csv) should keep in one subset. Default: well."
    ),
    strict: bool = option(False, "End with 1 on warnings, too."),
) -> None:
    """Look for ways in which a network has already seen its test images.

    Leaks: wells, equal image files, or one compound under two names in training and in test.
    Warnings: classes that are missing in a subset, or that can be guessed from the plate or the
    position of the well alone. Ends with 1 if there is a leak.

    \b
    Example:
      cellstore split check by-well
      cellstore split check --csv split.csv --csv wells.csv --strict
    """
    if csv:
        from cellstore.stages.split import check_tables

        if name is not None:
            raise UserInputError("Name a split of the store, or tables with --csv, not both.")
        result = check_tables(csv, field, group or GroupLevel.WELL)
    else:
        if field or group:
            raise UserInputError("--field and --group are for tables: add --csv FILE.")
        with common.open() as store:
            result = store.check_split(name)
    common.show(result, _show_check)
    if result.leaks or (strict and result.warnings):
        raise typer.Exit(1)


def _show_check(result: SplitCheck) -> None:
    classes = f"{result.labels_in_both_subsets:,} of {result.labels:,}"
    rows: list[tuple[str, Any]] = [
        ("split", f"{result.split} ({result.protocol}, by {result.group_level})"),
        ("rows", result.rows) if result.rows else ("images", result.images),
    ]
    if result.wells:
        wells = f"{result.wells_in_both_subsets:,} of {result.wells:,}"
        rows.append(("wells in two subsets", wells))
    rows.append(("classes in two subsets", classes))
    if result.unseen:
        rows.append(("bytes not compared", f"{output.count(result.unseen, 'image')} without files"))
    if result.refused:
        rows.append(("rows not usable", result.refused))
    if result.relabelled:
        number = len(result.relabelled)
        more = f" and {number - SHOWN_CLASSES:,} more" if number > SHOWN_CLASSES else ""
        rows.append(("relabelled since", ", ".join(result.relabelled[:SHOWN_CLASSES]) + more))
    output.pairs(rows)
    if result.findings:
        typer.echo()
    for finding in result.findings:
        lead = f"{finding.severity.value:<{MARGIN}}"
        typer.echo(output.filled(output.cell(finding.message), " " * MARGIN, lead))
        others = ["..."] if finding.count > len(finding.examples) else []
        output.wrapped(", ".join([*finding.examples, *others]), " " * MARGIN)
    if not result.leaks:
        careful = " Read the warnings, too." if result.warnings else ""
        typer.echo(f"No leak found: the test images are not seen in training.{careful}")
    if result.rows:
        unknown = "" if result.wells else "wells, plates and "
        typer.echo(f"Tables do not name {unknown}image files, so these were not compared.")
