"""Commands that say where a label comes from, who did what, and redo a run: audit, log, repro."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import option
from cellstore.errors import UserInputError
from cellstore.store import Store

from . import output
from .app import DEVICE, HTML, Common, command
from .output import say

if TYPE_CHECKING:
    from cellstore.report.audit import Audit
    from cellstore.report.event_log import EventLog
    from cellstore.report.redo import Check
    from cellstore.report.repro import Repro

app = typer.Typer(add_completion=False, rich_markup_mode=None)
KINDS = ("plate", "well", "image", "cell", "run", "artifact")
SHOWN = 20
"""Records of a list."""
WRAPPED = 20
"""Columns of its table are made as narrow as this."""


@command(app, "audit")
def audit(
    store: Store,
    common: Common,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="What to audit. Where several things have the name, put the kind before it.",
        ),
    ],
    html: Path | None = HTML,
) -> None:
    """Show where a label comes from, and what came of a file.

    \b
    KIND      NAME
    plate     its barcode
    image     PLATE/A01/1 (plate, well, site), r01c01f01, PLATE/r01c01f01,
              a file name, an id, or the start of a sha256
    well      PLATE/A01; A01 where there is one plate
    cell      the id in table cells
    run       its number, latest (the default), or "latest predict"
    artifact  any file that the store wrote or read: the start of its sha256
              (6 digits or more), its path or name, or a file on this machine

    Of an image: every run that labelled it, by whom, with which code and network, whether its
    well was used in training, the segmentation, the votes, the winner and the truth. Of a well:
    its treatment and every correction of it. Of a run: what it was made from and what it made.
    Of a file: who made it, and everything that was made from it.

    \b
    Example:
      cellstore audit BR00116991/F15/8 --html f15.html
      cellstore audit image r06c15f08
      cellstore audit cell 4711
      cellstore audit run "latest train"
      cellstore audit artifact ~/Downloads/model.safetensors
    """
    kind = what[0] if what[0] in KINDS else None
    name = " ".join(what[1:] if kind else what)
    if kind and not name:
        if kind != "run":
            raise UserInputError(f"Name the {kind}: cellstore audit {kind} NAME.")
        name = "latest"
    result = store.audit(name, kind)
    page = None
    if html is not None:
        from cellstore.report.lineage_page import write_lineage

        page = write_lineage(store.workspace, result, html)
        store.wrote(page)
    if common.as_json:
        output.print_json(result.record)
        return
    show_audit(result)
    if page is not None:
        typer.echo(f"\nlineage: {page}")


def show_audit(result: Audit) -> None:
    """Print an audit in lines of 80 characters at most, where names allow it."""
    typer.echo(output.cell(result.title))
    _show_record({name: value for name, value in result.record.items() if name != "notes"})
    for note in result.record.get("notes", ()):
        typer.echo()
        output.wrapped(note)


def _show_record(record: Mapping[str, Any], margin: str = "") -> None:
    """Print the values of a record, then its parts, each below its name.

    The records of a list are a table if that fits, else one below the other, without what is
    unknown.
    """
    from cellstore.report.audit import is_part, shown

    parts = {name: value for name, value in record.items() if is_part(value)}
    values = {k: v for k, v in record.items() if k not in parts and v not in ([], {})}
    output.pairs([(k.replace("_", " "), shown(k, v)) for k, v in values.items()], margin)
    for name, part in parts.items():
        if not part:
            continue
        typer.echo(f"\n{margin}{name.replace('_', ' ')}")
        below = margin + output.GAP
        if isinstance(part, Mapping):
            _show_record(part, below)
            continue
        some = part[:SHOWN]
        heads = [key.replace("_", " ") for key in some[0]]
        rows = [[shown(key, value) for key, value in row.items()] for row in some]
        columns = list(zip(heads, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        words = [max(len(w) for text in column for w in ["", *text.split()]) for column in columns]
        # What a column needs, so that no word is cut and no text goes on for long.
        least = [
            min(width, max(WRAPPED, word, width // 3))
            for width, word in zip(widths, words, strict=True)
        ]
        nested = any(isinstance(value, list) and is_part(value) for value in some[0].values())
        fitting = output.narrowed(widths, output.WIDTH - len(below), least)
        if fitting and not nested:
            output.table(heads, rows, margin=below, widths=fitting)
        else:
            for number, row in enumerate(some):
                known = {k: v for k, v in row.items() if v is not None}
                known = {k: shown(k, v) if isinstance(v, Mapping) else v for k, v in known.items()}
                typer.echo("\n" if number else "", nl=False)
                _show_record(known, below)
        if len(part) > SHOWN:
            typer.echo(f"{below}and {len(part) - SHOWN:,} more (all with --json)")


def _show_log(result: EventLog) -> None:
    for entry in result.entries:
        role = f" (database role {entry['role']})" if entry["role"] else ""
        run = "" if entry["run_id"] is None else f", {entry['stage']} run {entry['run_id']}"
        when = entry["at"][:16].replace("T", " ")
        typer.echo(output.cell(f"{when}  {entry['by']}@{entry['host']}{role}{run}"))
        lines = [entry["command"], *entry["changes"]]
        if (number := sum(entry["rows"].values())) > len(entry["changes"]):
            lines.append(f"and {number - len(entry['changes']):,} more changes")
        lines += [f"why: {entry['reason']}"] if entry["reason"] else []
        for line in lines:
            output.wrapped(line, output.GAP)
    if not result.entries:
        say("The log has no such command.")
    if result.more:
        say("There are older ones. To see more: --limit N")


@command(app, "log", _show_log)
def log(
    store: Store,
    plate: str | None = option(None, "Only what was done to this plate.", metavar="PLATE"),
    run: str | None = option(None, "Only what this run did, and what became of it.", metavar="RUN"),
    limit: int = option(20, "Show at most this many.", metavar="N", min=1),
) -> EventLog:
    """Show which commands changed the store: who gave them, when, where and why.

    The newest come first. Files that were written for people (exports, reports, backups) are
    named as well.

    \b
    Example:
      cellstore log
      cellstore log --plate BR00116991 --limit 100
    """
    return store.log(plate=plate, run=run, limit=limit)


CANNOT, SAME = "cannot be redone", "identical"
EXIT_CODES = {"different": 1, CANNOT: 2}


def _show_check(result: Check) -> None:
    rows = {"run": f"{result.run_id}: {result.stage}", "result": result.outcome}
    if result.outcome != CANNOT:
        rows["result"] += ", bit for bit" if result.outcome == SAME else ""
        rows["compared"] = f"{result.compared:,} {result.what}"
        rows["different"] = f"{result.differ:,}"
        if result.largest:
            rows["largest gap"] = f"{result.largest:.3g} (allowed: {result.tolerance:.3g})"
        rows["recipe"] = "the same" if result.same_recipe else "another"
        rows["took"] = f"{result.seconds:,.1f} s"
    output.pairs(rows)
    for line in result.differences:
        typer.echo(f"  {output.cell(line)}")
    lead = "because" if result.outcome == CANNOT else "note"
    for reason in result.reasons:
        typer.echo(f"{lead}: {output.cell(reason)}")


@command(app, "repro", _show_check, lambda found: EXIT_CODES.get(found.outcome, 0))
def repro(
    store: Store,
    common: Common,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The run, by number, or 'latest', or 'latest predict'."),
    ] = "latest",
    out: Path | None = option(
        None, "Write the script here instead of printing it.", name="--output"
    ),
    check: bool = option(False, "Do the run again in a store of its own, now, and compare."),
    images: int | None = option(
        None,
        "With --check: redo only this many images. Default: 5 of segment and measure "
        "runs, all of others.",
        min=1,
    ),
    device: str = DEVICE,
) -> Check | None:
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
        raise UserInputError("--check writes no script: remove --output.")
    if not check and images is not None:
        raise UserInputError("--images needs --check: add it.")
    if not check:
        _show_script(store.repro(run), out, common)
        store.wrote(out)
        return None
    return store.check_run(run, images=images, device=device)


def _show_script(result: Repro, out: Path | None, common: Common) -> None:
    if out is not None:
        from cellstore.artifacts import open_atomically
        from cellstore.settings import check_not_of_a_store

        check_not_of_a_store(out)
        with open_atomically(out.resolve()) as file:
            file.write(result.script.encode("utf-8", "replace"))
    if common.as_json:
        output.print_json(result)
    elif out is None:
        typer.echo(result.script, nl=False)
    else:
        say(f"Wrote {out}: {output.count(len(result.steps), 'step')}. Run it: bash {out}")
