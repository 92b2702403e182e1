"""Commands that say where a label comes from, and redo a run: audit, repro."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cellstore.errors import UserInputError

from . import output
from .options import Common, Device, DeviceOption, HtmlOption, command
from .output import say

if TYPE_CHECKING:
    from cellstore.report.audit import Audit
    from cellstore.report.repro import Check, Repro
    from cellstore.store import Store

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


app = typer.Typer(add_completion=False, rich_markup_mode=None)
audit = typer.Typer(
    cls=Guessing,
    help="Show where a label comes from, and what came of a file: for an image, a well, a cell, "
    "a run, or any file that the store knows.\n\n"
    "Without a kind, a name is that of whatever has it: cellstore audit BR00116991/F15/8",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(audit, name="audit")


@audit.callback()
def root(
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="The store.", show_default=False),
    ] = None,
) -> None:
    """Take what stands before the kind."""


@command(audit, "image")
def audit_image(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="PLATE/A01/1, r01c01f01, PLATE/r01c01f01, a file name, an id, or the start of a "
            "sha256.",
        ),
    ],
    common: Common,
    html: HtmlOption = None,
) -> None:
    """Show every run that labelled an image, and from what.

    When, by whom, by which code and network, whether its well was in training, which
    segmentation, how many cells, the votes, the winner, the truth; and what came of the image.

    \b
    Example:
      cellstore audit image r06c15f08
      cellstore audit image BR00116991/F15/8 --html f15.html
    """
    _audit(common, html, lambda store: store.audit_image(image))


@command(audit, "well")
def audit_well(
    well: Annotated[
        str, typer.Argument(metavar="WELL", help="PLATE/A01; A01 where there is one plate.")
    ],
    common: Common,
    html: HtmlOption = None,
) -> None:
    """Show what was done to a well, when that was corrected, and what its images show.

    \b
    Example:
      cellstore audit well BR00116991/D14
    """
    _audit(common, html, lambda store: store.audit_well(well))


@command(audit, "cell")
def audit_cell(
    cell: Annotated[
        int, typer.Argument(metavar="CELL", min=1, max=2**63 - 1, help="The id in the table cells.")
    ],
    common: Common,
    html: HtmlOption = None,
) -> None:
    """Show where a cell comes from and what was predicted.

    \b
    Example:
      cellstore audit cell 4711
    """
    _audit(common, html, lambda store: store.audit_cell(cell))


@command(audit, "run")
def audit_run(
    common: Common,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run, by number, or 'latest', or 'latest predict'."),
    ] = "latest",
    html: HtmlOption = None,
) -> None:
    """Show what a run was made from, and what it made.

    \b
    Example:
      cellstore audit run 3
      cellstore audit run "latest train"
    """
    _audit(common, html, lambda store: store.audit_run(run))


@command(audit, "artifact")
def audit_artifact(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The start of a sha256 (6 digits or more), a path or name, the id of an artifact, "
            "or a file on this machine, which is looked up by its bytes.",
        ),
    ],
    common: Common,
    html: HtmlOption = None,
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
    _audit(common, html, lambda store: store.audit_artifact(file))


@command(audit, ANYTHING, hidden=True)
def audit_anything(
    name: Annotated[list[str], typer.Argument(metavar="NAME", help="What is audited.")],
    common: Common,
    html: HtmlOption = None,
) -> None:
    """Show where something comes from, and what came of it, whatever it is."""
    _audit(common, html, lambda store: store.audit(" ".join(name)))


def _audit(common: Common, html: Path | None, find: Callable[[Store], Audit]) -> None:
    from cellstore.report.audit_text import audit_text

    with common.open(quiet=True) as store:
        result = find(store)
        page = None if html is None else store.lineage_page(result, html)
    if common.as_json:
        output.print_json(result.record)
        return
    typer.echo(audit_text(result), nl=False)
    if page is not None:
        typer.echo(f"\nlineage: {page}")


CANNOT, SAME = "cannot be redone", "identical"
EXIT_CODES = {"different": 1, CANNOT: 2}


@command(app, "repro")
def repro(
    common: Common,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run, by number, or 'latest', or 'latest predict'."),
    ] = "latest",
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write the script here instead of printing it.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Redo the run beside the store, now, and compare."),
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --check: redo only this many images. Default: 5 of segment and measure "
            "runs, all of others.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --check: the file of weights that the run began from, where the store does "
            "not hold it.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Print the commands and versions that redo a run, or redo it and compare.

    The script holds every step that the run relies on, from the ingested files (with their
    sha256) to the run itself, with all options. With --check the run is done again in a store
    of its own, which is thrown away: nothing is written to this one. Ends with 0 if the result is
    the same (bit for bit, or within the tolerance that is shown), 1 if it is different, 2 if the
    run cannot be redone.

    \b
    Example:
      cellstore repro 7 --output redo-7.sh
      cellstore repro latest --check
      cellstore repro "latest segment" --check --images 20
    """
    if check and out is not None:
        raise UserInputError("--output is where the script goes: leave it out with --check.")
    if not check and (images is not None or weights is not None):
        raise UserInputError("--images and --weights are options of --check: add it.")
    with common.open(quiet=not check) as store:
        if check:
            found = store.check_run(run, images=images, device=device.value, weights=weights)
        else:
            script = store.repro(run)
    if check:
        _show_check(found, common)
    else:
        _show_script(script, out, common)


def _show_script(result: Repro, out: Path | None, common: Common) -> None:
    if out is not None:
        from cellstore.artifacts import write_atomically
        from cellstore.settings import check_not_of_a_store

        check_not_of_a_store(out)
        write_atomically(out.resolve(), result.script.encode("utf-8", "replace"))
    if common.as_json:
        output.print_json(result)
    elif out is None:
        typer.echo(result.script, nl=False)
    else:
        say(f"Wrote {out}: {output.count(len(result.steps), 'step')}.")


def _show_check(result: Check, common: Common) -> None:
    if common.as_json:
        output.print_json(result)
    else:
        rows = {"run": f"{result.run_id}: {result.stage}", "result": result.verdict}
        if result.verdict != CANNOT:
            rows["result"] += ", bit for bit" if result.verdict == SAME else ""
            rows |= {
                "compared": f"{result.compared:,} {result.what}",
                "different": f"{result.differ:,}",
            }
            if result.largest:
                allowed = f"(allowed: {result.tolerance:.3g})"
                rows["largest gap"] = f"{result.largest:.3g} {allowed}"
            rows["recipe"] = "the same" if result.same_recipe else "another"
            rows["took"] = f"{result.seconds:,.1f} s"
        output.pairs(rows)
        for line in result.differences:
            typer.echo(f"  {output.cell(line)}")
        lead = "because" if result.verdict == CANNOT else "note"
        for reason in result.reasons:
            typer.echo(f"{lead}: {output.cell(reason)}")
    code = EXIT_CODES.get(result.verdict, 0)
    if code:
        raise typer.Exit(code)
