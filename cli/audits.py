"""Commands that say where a label comes from: audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cellstore.store import Store

from . import render
from .context import open_store, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.report.audit import Audit

ANYTHING = "anything"


class Guessing(TyperGroup):
    """Takes a name without a kind for that of whatever has it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the kinds; what guesses is no name to type."""
        return [name for name in super().list_commands(ctx) if name != ANYTHING]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command: the one that is named, else the one that guesses."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [ANYTHING, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Guessing,
    help="Show where a label comes from, and what came of a file: for an image, a well, a cell, "
    "a run, or any file that the store knows.\n\n"
    "Without a kind, a name is that of whatever has it: cellstore audit BR00116991/F15/8",
    no_args_is_help=True,
    rich_markup_mode=None,
)

HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Also write a page with a picture of the lineage; it opens without a network.",
        show_default=False,
    ),
]


@app.callback()
def root(store: StoreOption = None) -> None:
    """Take what stands before the kind."""


@app.command("image")
@sentences
def audit_image(
    ctx: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="PLATE/A01/1, r01c01f01, PLATE/r01c01f01, a file name, an id, or the start of a "
            "sha256.",
        ),
    ],
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every run that labelled an image, and from what.

    When, by whom, by which code and network, whether its well was in training, which
    segmentation, how many cells, the votes, the winner, the truth; and what came of the image.

    \b
    Example:
      cellstore audit image r06c15f08
      cellstore audit image BR00116991/F15/8 --html f15.html
    """
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit_image(image), html, as_json=as_json)


@app.command("well")
@sentences
def audit_well(
    ctx: typer.Context,
    well: Annotated[
        str, typer.Argument(metavar="WELL", help="PLATE/A01; A01 where there is one plate.")
    ],
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was done to a well, when that was corrected, and what its images show.

    \b
    Example:
      cellstore audit well BR00116991/D14
    """
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit_well(well), html, as_json=as_json)


@app.command("cell")
@sentences
def audit_cell(
    ctx: typer.Context,
    cell: Annotated[
        int, typer.Argument(metavar="CELL", min=1, max=2**63 - 1, help="The id in the table cells.")
    ],
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a cell comes from and what was predicted.

    \b
    Example:
      cellstore audit cell 4711
    """
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit_cell(cell), html, as_json=as_json)


@app.command("run")
@sentences
def audit_run(
    ctx: typer.Context,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run, by number, or 'latest', or 'latest predict'."),
    ] = "latest",
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run was made from, and what it made.

    \b
    Example:
      cellstore audit run 3
      cellstore audit run "latest train"
    """
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit_run(run), html, as_json=as_json)


@app.command("artifact")
@sentences
def audit_artifact(
    ctx: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The start of a sha256 (6 digits or more), a path or name, the id of an artifact, "
            "or a file on this machine, which is looked up by its bytes.",
        ),
    ],
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a file is to the store, who made it, and all that came of it.

    Masks, flows, checkpoints and feature files, image files, ingested tables, and weights of
    networks: any file that the store wrote or read.

    \b
    Example:
      cellstore audit artifact 3f9a1c
      cellstore audit artifact BR00116991.csv
      cellstore audit artifact ~/Downloads/model.safetensors
    """
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit_artifact(file), html, as_json=as_json)


@app.command(ANYTHING, hidden=True)
@sentences
def audit_anything(
    ctx: typer.Context,
    name: Annotated[list[str], typer.Argument(metavar="NAME", help="What is audited.")],
    html: HtmlOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where something comes from, and what came of it, whatever it is."""
    with open_store(ctx, store, quiet=True) as opened:
        _show(opened, opened.audit(" ".join(name)), html, as_json=as_json)


def _show(opened: Store, result: Audit, html: Path | None, *, as_json: bool) -> None:
    from cellstore.report.audit_text import audit_text

    page = None if html is None else opened.lineage_page(result, html)
    if as_json:
        render.as_json(result.record)
        return
    typer.echo(audit_text(result), nl=False)
    if page is not None:
        typer.echo(f"\nlineage: {page}")
