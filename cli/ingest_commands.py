"""Commands that bring the outside world in: ingest, refresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstore.config import IngestParams, Selection, option
from cellstore.enums import Look, Severity
from cellstore.errors import UserInputError
from cellstore.store import Store

from . import output
from .app import Common, command
from .output import say

if TYPE_CHECKING:
    from cellstore.stages.ingest.account import Issue
    from cellstore.stages.ingest.ingest import RefreshResult, RelocateResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)

KINDS = ("images", "treatments", "features", "masks")
SHOWN_ROWS = 20
_TITLES = {
    Severity.REFUSED: "Rows that were refused:",
    Severity.PROBLEM: "What could not be used:",
    Severity.SUSPICIOUS: "What looks wrong:",
}


@command(app, "ingest", then=True)
def ingest(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND] SOURCE",
            help="The table, index, database or folder. Before it you may write what it holds: "
            "images, treatments, features or masks.",
            show_default=False,
        ),
    ] = None,
    *,
    params: IngestParams,
    common: Common,
    dry_run: bool = option(False, "Only show what each file, well or table would become."),
    template: Path | None = option(
        None, "Write an empty plate map to this file (.xlsx) for you to fill in."
    ),
) -> None:
    """Ingest images, treatments, features or masks, however they were exported.

    \b
    images      LoadData CSV of CellProfiler and JUMP, the published table, Harmony's
                Index.idx.xml, bare folders (Phenix, Cellomics, any with --pattern)
    treatments  plate maps with compound, ORF or CRISPR tables, JUMP's dataset tables
    features    CellProfiler CSV folders and SQLite, CytoTable and pycytominer Parquet
    masks       label images of any tool, matched to images by name

    Rows that cannot be used are listed with their line numbers, kept in the table
    ingest_issues, and the command then ends with 1; the others are stored. It also ends with 1
    where no image file was found at all (--look nowhere: none is looked for). A second ingest
    changes nothing, except what was missing or has been corrected.

    \b
    Example:
      cellstore ingest load_data.csv --images /data/plate1 --platemap map.txt \\
          --compounds compounds.tsv
      cellstore ingest measurements.sqlite --name cellprofiler
      cellstore ingest masks outlines/
      cellstore ingest /data/plate1 --dry-run
    """
    if template is not None:
        from cellstore.io.map_shapes import write_template

        write_template(template)
        if common.as_json:
            output.print_json({"template": str(template)})
        else:
            typer.echo(f"Fill in {template}, then: cellstore ingest {template} --plate BARCODE")
        raise typer.Exit
    if not words:
        raise UserInputError("Name what to ingest: cellstore ingest SOURCE")
    *kinds, source = words
    if len(words) > 2 or (kinds and kinds[0] not in KINDS):
        raise UserInputError(
            f"Give one source; before it you may write {', '.join(KINDS[:-1])} or {KINDS[-1]}. "
            f"You gave {len(words)} words: {' '.join(words)}"
        )
    params = replace(params, kind=kinds[0] if kinds else None)
    with common.open() as store:
        result = store.ingest(source, params, dry_run=dry_run)
    if common.as_json:
        output.print_json(result)
    else:
        say(*map(output.filled, result.notes))
        names = ("rows", "created", "updated", "unchanged", "refused")
        shown = {"read as": result.layout, **{name: getattr(result, name) for name in names}}
        if result.cells:
            shown["cells"] = result.cells
        if result.feature_set:
            shown["feature set"] = result.feature_set
        rows = [*shown.items(), *(("segmentation", recipe) for recipe in result.segmentations)]
        if result.plates:
            wells = f"{output.count(result.plates, 'plate')}, {output.count(result.wells, 'well')}"
            images = output.count(result.images, "image")
            missing = f"({result.missing_images:,} without files)"
            have = "its plates now have" if result.run_id else "its plates would have"
            rows.append((have, f"{wells}, {images} {missing}"))
        if result.run_id:
            rows.append(("run", result.run_id))
        output.pairs(rows)
        if result.unchanged == result.rows and not result.notes and not result.reasons:
            typer.echo("Nothing has changed: all of this was in the store already.")
        if result.preview:
            cells = [list(row.values()) for row in result.preview[:SHOWN_ROWS]]
            output.table(list(result.preview[0]), cells)
            output.say_more(len(result.preview) - SHOWN_ROWS, " rows", "more with --json")
        _show_issues(result.issues)
        if result.reasons and result.run_id:
            question = f"FROM ingest_issues WHERE run_id = {result.run_id}"
            say(f'To list all: cellstore sql "{question}"')
    if dry_run:
        say("Nothing was written: this was a dry run.")
        raise typer.Exit(result.refused > 0)
    if result.rows and result.refused == result.rows:
        say("Error: No row could be used; the reasons are above.")
        raise typer.Exit(2)
    from cellstore.io.layouts import Layout, SourceKind

    without = result.images > 0 and result.missing_images == result.images
    of_images = Layout(result.layout).kind is SourceKind.IMAGES
    if without and of_images and params.look is not Look.NOWHERE:
        say(
            f"Error: No image file was found ({output.count(result.images, 'image')}). The rows "
            "are stored. Name the folder of the images with --images FOLDER, or what its path is "
            "here with --map OLD=NEW."
        )
        raise typer.Exit(1)
    if any(severity is not Severity.SUSPICIOUS for severity, _, _ in result.reasons):
        raise typer.Exit(1)


def _show_issues(issues: Sequence[Issue]) -> None:
    for severity, title in _TITLES.items():
        found = [
            (item.file if item.line is None else f"{item.file}, line {item.line}", item)
            for item in issues
            if item.severity is severity
        ]
        if found:
            typer.echo(title)
            output.grouped([(where, item.reason, item.detail) for where, item in found])


def _show_refresh(result: RefreshResult) -> None:
    output.pairs(
        {
            "run": result.run_id,
            "images looked at": result.images,
            "changed": result.changed,
            "problems": result.n_problems,
        }
    )
    _show_issues(result.problems)
    if result.changed:
        say("See what is out of date with: cellstore status")


@command(app, "refresh", _show_refresh, lambda result: result.n_problems > 0, then=True)
def refresh(selection: Selection, store: Store) -> RefreshResult:
    """Look again at the image files that the store knows, and find which have changed.

    Files whose size or time has changed are read again. What was made from a file that has
    changed is out of date from now on: 'cellstore status' counts it, and the next run of each
    stage makes just that again. Ends with 1 if a file cannot be read.

    \b
    Example:
      cellstore refresh
      cellstore refresh --plate BR00116991
    """
    return store.refresh(selection)


def _show_relocate(result: RelocateResult) -> None:
    verb = "would be read" if result.dry_run else "are now read"
    for before, after, files in result.folders[:SHOWN_ROWS]:
        typer.echo(f"{output.count(files, 'file')} {verb} from {after}, no longer from {before}")
    output.say_more(len(result.folders) - SHOWN_ROWS, " folders")
    if result.missing:
        say(f"{output.count(result.missing, 'file is', 'files are')} in neither folder.")


@command(app, "relocate", _show_relocate, then=True)
def relocate(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The folder where the files were.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The folder where they are now.")],
    store: Store,
    reason: str | None = option(None, "Why; it is kept with the change.", metavar="TEXT"),
    dry_run: bool = option(False, "Only look whether the files are there."),
) -> RelocateResult:
    """Tell the store that image files were moved or copied to another folder.

    All folders whose names begin with OLD begin with NEW from now on. Each file must be there: of
    the same size and time, or else of the same content. To undo it, relocate back.

    \b
    Example:
      cellstore relocate /data/plate1 /archive/plate1
      cellstore relocate /mnt/old /mnt/new --dry-run
    """
    return store.relocate(old, new, dry_run=dry_run, reason=reason)
