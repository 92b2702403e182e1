"""Commands about splits: create, import, list, show, check, delete."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import SplitParams
from cellstore.enums import PERTURBATION, GroupLevel
from cellstore.errors import UserInputError

from . import render
from .checks import check
from .context import open_store, say, sentences
from .options import (
    JsonOption,
    LeaveOutOption,
    PlatesOption,
    QcRunOption,
    StoreOption,
    WhereOption,
    leave_out,
    names,
)
from .tell_splits import show_folds, show_list, show_split

if TYPE_CHECKING:
    from cellstore.stages.split import SplitResult

app = typer.Typer(
    help="Say which images train a network and which ones test it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The split. Default: the latest.")
]
NewNameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="What the split is called.", show_default=False)
]
FieldOption = Annotated[
    str,
    typer.Option("--field", help="What is to be predicted: compound name or target gene."),
]
AllowMissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Also images whose files are not here yet.")
]
NOT_CUT = "none"


class Protocol(StrEnum):
    """How a split is drawn."""

    GROUPED = "grouped"
    PUBLISHED = "published"


class Unit(StrEnum):
    """What ``--downsample`` counts."""

    IMAGE = "image"
    CELL = "cell"


@app.command("create")
@sentences
def create(
    ctx: typer.Context,
    name: NewNameArgument,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="grouped: a well (--group) is on one side only. published: by image, as in the "
            "published study; fields of one well are on both sides, so scores are too good."
        ),
    ] = Protocol.GROUPED,
    field: FieldOption = PERTURBATION,
    group: Annotated[
        GroupLevel | None,
        typer.Option(
            help="What stays together on one side (grouped protocol). treatment leaves whole "
            "compounds out, so it needs a coarser --field. "
            f"Default: {SplitParams.group_level.value}.",
            show_default=False,
        ),
    ] = None,
    test_size: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            max=1.0,
            help=f"Share of the groups that test. Default: {SplitParams.test_size:g}.",
            show_default=False,
        ),
    ] = None,
    validation_size: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            max=1.0,
            help="Share of the groups that stop the training (grouped protocol). 0: none. "
            f"Default: {SplitParams.validation_size:g}.",
            show_default=False,
        ),
    ] = None,
    test_plates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="These plates test, with --group plate.",
            show_default=False,
        ),
    ] = None,
    validation_plates: Annotated[
        str | None,
        typer.Option(
            metavar="C,...",
            help="These plates validate. Default: drawn from the others.",
            show_default=False,
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=2,
            help="Cross-validation: make the splits NAME-1 to NAME-K. Each image tests in one of "
            "them; the fold after the one that tests validates.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same split.")] = 0,
    plate: PlatesOption = None,
    where: WhereOption = None,
    downsample: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=SIZE",
            help="Cut a class to a number of images, to second-largest or to median; may be given "
            "several times. none: cut nothing. Default: the class with most groups (wells) is cut "
            "to the groups of the second.",
            show_default=False,
        ),
    ] = None,
    downsample_by: Annotated[
        Unit, typer.Option(help="What the sizes of --downsample count; whole images are dropped.")
    ] = Unit.IMAGE,
    min_images: Annotated[
        int, typer.Option(metavar="N", min=0, help="Leave out classes with fewer images.")
    ] = 0,
    allow_missing: AllowMissingOption = False,
    leave_out_flagged: LeaveOutOption = False,
    qc_run: QcRunOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Assign the images to train, validation and test.

    The split is stored as rows under its name, and never changes once a run relies on it: the
    database refuses. It refuses a well (plate, treatment) on two sides as well.

    \b
    Example:
      cellstore split create by-well --where "batch = '2026_03'" --min-images 6
      cellstore split create by-plate --group plate --test-plates P7,P8
      cellstore split create new-drugs --group treatment --field target
      cellstore split create five --folds 5 --downsample DMSO=median
      cellstore split create as-published --protocol published --allow-missing
    """
    if folds is not None and test_size is not None:
        raise UserInputError("With --folds K each fold tests one part of K: leave out --test-size.")
    _check_published(protocol, {"--group": group, "--validation-size": validation_size})
    params = SplitParams(
        protocol=protocol.value,
        field=field,
        group_level=group or SplitParams.group_level,
        test_size=_or(test_size, SplitParams.test_size),
        validation_size=_or(validation_size, SplitParams.validation_size),
        seed=seed,
        plates=tuple(plate or ()),
        allow_missing=allow_missing,
        leave_out_flagged=leave_out(leave_out_flagged, qc_run),
        where=where,
        test_plates=names(test_plates),
        validation_plates=names(validation_plates),
        folds=folds,
        downsample=_cuts(downsample),
        downsample_by=downsample_by.value,
        min_images=min_images,
    )
    with open_store(ctx, store, quiet=as_json) as opened:
        made = (
            (opened.create_split(name, params),)
            if folds is None
            else opened.create_folds(name, params)
        )
    if folds is None:
        show_split(made[0], as_json=as_json)
    else:
        show_folds(name, made, as_json=as_json)
    _say_if_there(made, as_json=as_json)


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _check_published(protocol: Protocol, given: Mapping[str, object]) -> None:
    named = [option for option, value in given.items() if value is not None]
    if protocol is Protocol.PUBLISHED and named:
        raise UserInputError(
            "The published protocol splits single images, with no validation side: leave out "
            f"{' and '.join(named)}, or choose --protocol grouped."
        )


@app.command("import")
@sentences
def import_(
    ctx: typer.Context,
    name: NewNameArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Tables with a column split, and tables that say which wells they mean.",
            show_default=False,
        ),
    ],
    field: FieldOption = PERTURBATION,
    group: Annotated[
        GroupLevel,
        typer.Option(help="What the split keeps on one side. image: it promises nothing."),
    ] = GroupLevel.IMAGE,
    allow_missing: AllowMissingOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a split that others made, as tables.

    A row says the side (train, validation, test) of images: by plate, well and site, or by
    treatment (broad_sample, pert_iname). JUMP-CP's datasplits name treatments with their cell line
    and time point; give the table that says which wells those are as a further FILE. Rows without
    an image in the store are counted.

    \b
    Example:
      cellstore split import theirs split.csv
      cellstore split import jump split_example_1.csv cpjump1_metadata.csv.gz
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.import_split(
            name, files, field=field, group_level=group, allow_missing=allow_missing
        )
    show_split(result, as_json=as_json)
    _say_if_there((result,), as_json=as_json)


@app.command("list")
@sentences
def list_(ctx: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List all splits, with the images on each side and the runs that rely on them.

    \b
    Example:
      cellstore split list
    """
    with open_store(ctx, store, quiet=True) as opened:
        lines = opened.list_splits()
    show_list(lines, as_json=as_json)


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
    show_split(result, as_json=as_json)


app.command("check")(check)


@app.command("delete")
@sentences
def delete(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The split, or the name that its folds share.", show_default=False
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a split that no run uses. One that a run relies on stays.

    \b
    Example:
      cellstore split delete by-well
    """
    with open_store(ctx, store, quiet=True) as opened:
        found = opened.deletable_split(name)
        words = f"{', '.join(found.names)} ({render.count(found.images, 'image')} assigned)"
        if not yes and not typer.confirm(f"Delete {words}?", err=True):
            say("Nothing was deleted.")
            raise typer.Exit(1)
        result = opened.delete_split(name)
    if as_json:
        render.as_json(result)
    else:
        typer.echo(f"Deleted {words}. The images themselves are as they were.")


def _cuts(words: list[str] | None) -> tuple[tuple[str, str], ...] | None:
    if words is None or words == [NOT_CUT]:
        return None if words is None else ()
    pairs = [word.rpartition("=") for word in words]
    for label, mark, _ in pairs:
        if not mark or not label:
            raise UserInputError(
                "Write --downsample CLASS=SIZE, for example --downsample DMSO=second-largest, "
                f"or --downsample {NOT_CUT} alone."
            )
    return tuple((label, size) for label, _, size in pairs)


def _say_if_there(made: tuple[SplitResult, ...], *, as_json: bool) -> None:
    if as_json or any(result.created for result in made):
        return
    were = "This split was" if len(made) == 1 else "These splits were"
    say(f"{were} there already; nothing has changed.")
