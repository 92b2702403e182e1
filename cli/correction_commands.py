"""Commands that put things right: rename, relabel, annotate, exclude, include, undo, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import option
from cellstore.enums import ANNOTATION, Control, Level
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.store import Store

from . import output
from .app import command, confirm

if TYPE_CHECKING:
    from cellstore.stages.corrections import Correction

app = typer.Typer(add_completion=False, rich_markup_mode=None)

SHOWN = 20
DRY_RUN = option(False, "Only say what would change.")
REASON = option(None, "Why; it is kept with the change.", metavar="TEXT")
NEEDED_REASON: Any = typer.Option("--reason", metavar="TEXT", help="Why; it is kept.")
KindArgument = Annotated[
    Level, typer.Argument(metavar="KIND", help="plate, well, image or cell.", show_choices=False)
]
NamesArgument = Annotated[
    list[str],
    typer.Argument(metavar="NAME", help="As in audit: PLATE, PLATE/A01, PLATE/A01/1, a cell id."),
]


def _show(done: Correction) -> None:
    _show_changes(done)
    output.pairs([("concerns", _concerns(done))])


def _show_changes(done: Correction) -> None:
    rows = [
        (change["name"], what, _shown(change["old"], what), _shown(change["new"], what))
        for change in done.changes[:SHOWN]
        for what in {**(change["old"] or {}), **(change["new"] or {})}
    ]
    if rows:
        output.table(("of", "what", "before", "after"), rows)
    output.say_more(len(done.changes) - SHOWN)


def _concerns(done: Correction) -> str:
    names = ("image", "cell", "prediction")
    return ", ".join(output.count(getattr(done, f"{name}s"), name) for name in names)


def _shown(values: dict[str, Any] | None, what: str) -> Any:
    value = (values or {}).get(what)
    if isinstance(value, dict):  # metadata
        return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items()) or "-"
    return "-" if value is None else value


@command(app, "rename", _show, then=True)
def rename(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="plate or channel.")],
    old: Annotated[str, typer.Argument(metavar="OLD", help="The name that it has.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name that it gets.")],
    store: Store,
    plate: str | None = option(None, "Rename the channel on this plate only.", metavar="PLATE"),
    reason: str | None = REASON,
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Give a plate or a channel another name. To undo it, rename it back.

    Tables that name a plate by its old name still find it.

    \b
    Example:
      cellstore rename plate "Plate 1" BR00116991
      cellstore rename channel ch1 DNA
    """
    return store.rename(kind, old, new, plate=plate, reason=reason, dry_run=dry_run)


@command(app, "relabel", _show, then=True)
def relabel(
    well: Annotated[str, typer.Argument(metavar="WELL", help="PLATE/A01.")],
    store: Store,
    reason: Annotated[str, NEEDED_REASON],
    treatment: str | None = option(
        None, "What the well got; none: it is not known.", metavar="NAME"
    ),
    dose: str | None = option(None, 'Its dose with unit, as in "5 uM".', metavar="DOSE"),
    control: str | None = option(
        None,
        "Its role. Default: that of the other wells of the treatment.",
        choices=(*(item.value for item in Control), "none"),
    ),
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Correct what a well got. To undo it, relabel it back; audit shows what it had.

    Labels that a split has frozen stay as they are. A table that was read before
    does not undo this when it is read again.

    \b
    Example:
      cellstore relabel BR00116991/A05 --treatment DMSO --reason "map was shifted"
      cellstore relabel BR00116991/A06 --treatment taxol --dose "5 uM" --reason "page 12"
    """
    return store.relabel(
        well, treatment=treatment, dose=dose, control=control, reason=reason, dry_run=dry_run
    )


@command(app, "annotate", _show_changes, then=True)
def annotate(
    store: Store,
    kind: KindArgument,
    name: NamesArgument,
    label: str | None = option(None, "What it is.", metavar="TEXT"),
    field: str = option(ANNOTATION, "What the label is about.", metavar="NAME"),
    user: str | None = option(None, "Whose label it is. Default: your login.", metavar="NAME"),
    reason: str | None = REASON,
    undo: bool = option(False, "Take your last label of it back."),
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Give a label to plates, wells, images or cells. To undo it: --undo.

    Several names may be given at once. Each person has a label of their own for the same thing; the
    last one counts. All of them are in annotation_table: cellstore ask annotations, and how far
    people agree: cellstore ask agreement. Labels of images or wells can be what a split is made of:
    cellstore split create --field. A name after --user is written down as it is typed: it proves
    nothing.

    \b
    Example:
      cellstore annotate cell 4711 4712 --label mitotic
      cellstore annotate image BR00116991/A05/1 --field focus --label blurred
      cellstore annotate cell 4711 --undo
    """
    if bool(label) == undo:
        raise UserInputError("Say what it is: --label TEXT; or take your label back: --undo.")
    more: dict[str, Any] = {"field": field, "user": user, "reason": reason}
    return store.annotate(kind.value, name, label, **more, dry_run=dry_run)


@command(app, "exclude", _show, then=True)
def exclude(
    kind: KindArgument,
    name: NamesArgument,
    store: Store,
    reason: Annotated[str, NEEDED_REASON],
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Exclude a plate, well, image or cell: it no longer counts, but stays visible.

    Trainings, splits, votes, reports, profiles and cell counts leave it out from now on, and
    audit shows the reason. To undo it: cellstore include.

    \b
    Example:
      cellstore exclude well BR00116991/A05 --reason "debris"
      cellstore exclude cell 4711 --reason "two nuclei"
    """
    return store.exclude(kind.value, " ".join(name), reason=reason, dry_run=dry_run)


@command(app, "include", _show, then=True)
def include(
    kind: KindArgument,
    name: NamesArgument,
    store: Store,
    reason: str | None = REASON,
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Include a plate, well, image or cell again that was excluded.

    \b
    Example:
      cellstore include well BR00116991/A05
    """
    return store.include(kind.value, " ".join(name), reason=reason, dry_run=dry_run)


@command(app, "undo", _show, then=True)
def undo(
    run: Annotated[str, typer.Argument(metavar="RUN", help="An ingest run, by its number.")],
    store: Store,
    reason: str | None = REASON,
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Take back what an ingest run brought or changed. To undo that, ingest again.

    Nothing is changed if later work relies on it; what does is named. Predictions are never
    deleted.

    \b
    Example:
      cellstore undo 12 --dry-run
      cellstore undo 12 --reason "wrong map"
    """
    return store.undo(run, reason=reason, dry_run=dry_run)


@command(app, "delete", _show, then=True)
def delete(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="plate. For splits: cellstore split delete.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The plate.")],
    store: Store,
    reason: str | None = REASON,
    yes: bool = option(False, "Do not ask."),
    dry_run: bool = DRY_RUN,
) -> Correction:
    """Delete a plate with all that was made of it. To undo it, ingest it again.

    A plate that predictions or splits rely on stays; they are named. Image files stay where
    they are.

    \b
    Example:
      cellstore delete plate BR00116991 --dry-run
      cellstore delete plate BR00116991 --reason "test plate" --yes
    """
    if kind != "plate":
        raise UnknownNameError.of("thing to delete", kind, ["plate"])
    if not (yes or dry_run):
        plan = store.delete_plate(name, reason=reason, dry_run=True)
        confirm(f"Delete plate {name} ({_concerns(plan)})?")
    return store.delete_plate(name, reason=reason, dry_run=dry_run)
