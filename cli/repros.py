"""The command that redoes a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.errors import UserInputError

from . import render
from .context import open_store, say, sentences
from .options import Device, DeviceOption, JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.report.repro import Check, Repro

CANNOT, SAME = "cannot be redone", "identical"
EXIT_CODES = {"different": 1, CANNOT: 2}


@sentences
def repro(
    ctx: typer.Context,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run, by number, or 'latest', or 'latest predict'."),
    ] = "latest",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the script here instead of printing it.", show_default=False
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
            help="With --check: redo so many images alone. Default: 5 of segment and measure "
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
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the commands and versions that redo a run, or redo it and compare.

    The script holds every step that the run relies on, from the ingested files (with their
    sha256) to the run itself, each option spelled. With --check the run is done again in a store
    of its own, which is thrown away: nothing is written to this one. Ends with 0 if the result is
    the same (bit for bit, or within the tolerance that is told), 1 if it is different, 2 if the
    run cannot be redone.

    \b
    Example:
      cellstore repro 7 --output redo-7.sh
      cellstore repro latest --check
      cellstore repro "latest segment" --check --images 20
    """
    if check and output is not None:
        raise UserInputError("--output is where the script goes: leave it away with --check.")
    if not check and (images is not None or weights is not None):
        raise UserInputError("--images and --weights are options of --check: give it, too.")
    with open_store(ctx, store, quiet=as_json or not check) as opened:
        if check:
            _show_check(
                opened.check_run(run, images=images, device=device.value, weights=weights),
                as_json=as_json,
            )
        else:
            _show_script(opened.repro(run), output, as_json=as_json)


def _show_script(result: Repro, output: Path | None, *, as_json: bool) -> None:
    if output is not None:
        from cellstore.artifacts import write_atomically
        from cellstore.settings import check_not_of_a_store

        check_not_of_a_store(output)
        write_atomically(output.resolve(), result.script.encode("utf-8", "replace"))
    if as_json:
        render.as_json(result)
    elif output is None:
        typer.echo(result.script, nl=False)
    else:
        say(f"Wrote {output}: {render.count(len(result.steps), 'step')}.")


def _show_check(result: Check, *, as_json: bool) -> None:
    if as_json:
        render.as_json(result)
    else:
        _tell(result)
    code = EXIT_CODES.get(result.verdict, 0)
    if code:
        raise typer.Exit(code)


def _tell(result: Check) -> None:
    within = f"{result.largest:.3g} (allowed: {result.tolerance:.3g})"
    render.facts(
        [
            ("run", f"{result.run_id}: {result.stage}"),
            ("result", result.verdict + (", bit for bit" if result.verdict == SAME else "")),
            ("compared", f"{result.compared:,} {result.what}"),
            ("different", f"{result.differ:,}"),
            *([("largest gap", within)] if result.largest else []),
            ("recipe", "the same" if result.same_recipe else "another"),
            ("took", f"{result.seconds:,.1f} s"),
        ]
        if result.verdict != CANNOT
        else [("run", f"{result.run_id}: {result.stage}"), ("result", result.verdict)]
    )
    for line in result.differences:
        typer.echo(f"  {render.cell(line)}")
    lead = "because" if result.verdict == CANNOT else "mind"
    for reason in result.reasons:
        typer.echo(f"{lead}: {render.cell(reason)}")
