"""The command that brings the outside world in: ingest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import IngestParams
from cellstore.enums import Look, Severity
from cellstore.errors import UserInputError

from . import render
from .context import open_store, say, sentences
from .options import (
    JsonOption,
    LimitOption,
    PlatesOption,
    StoreOption,
    WellsOption,
    WhereOption,
    selection,
)

if TYPE_CHECKING:
    from cellstore.stages.ingest.account import Issue
    from cellstore.stages.ingest.dry_run import Preview
    from cellstore.stages.ingest.ingest import IngestResult
    from cellstore.store import Store

MASKS = "masks"
KINDS = ("images", "treatments", "features", MASKS)
SHOWN_FILES = 20
_PLACE = ("file", "plate", "well", "site", "plane", "time_point")
_TITLES = {
    Severity.REFUSED: "Rows that were refused:",
    Severity.PROBLEM: "What could not be used:",
    Severity.SUSPICIOUS: "What looks wrong:",
}


def _text(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False)


@sentences
def ingest(
    ctx: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] SOURCE",
            help="The table, index, database or folder; before it, if you like, what it holds: "
            "images, treatments, features or masks.",
        ),
    ],
    images: Annotated[
        Path | None,
        _text("--images", "DIR", "Folder in which image files are found by name."),
    ] = None,
    maps: Annotated[
        list[str] | None,
        _text(
            "--map",
            "OLD=NEW",
            "Folders of the source that begin with OLD are at NEW here; may be given several "
            "times. NEW may be s3://... or another object store.",
        ),
    ] = None,
    look: Annotated[
        Look,
        typer.Option(
            "--look",
            help="Which image files to read and hash now: those on this machine, also those in "
            "object stores, or none.",
        ),
    ] = Look.HERE,
    plate: Annotated[
        str | None, _text("--plate", "BARCODE", "The plate, for sources that name none.")
    ] = None,
    channels: Annotated[
        str | None,
        _text("--channels", "1=Mito,...", "What stain each channel (number or name) shows."),
    ] = None,
    platemap: Annotated[
        Path | None,
        _text(
            "--platemap",
            "FILE",
            "Which treatment each well got: a table, or a folder of them with --barcodes.",
        ),
    ] = None,
    compounds: Annotated[
        list[Path] | None,
        _text(
            "--compounds",
            "FILE",
            "What the treatments of the platemap are: names, targets, structures; may be given "
            "several times.",
        ),
    ] = None,
    barcodes: Annotated[
        Path | None, _text("--barcodes", "FILE", "Which platemap each plate has.")
    ] = None,
    alias: Annotated[
        Path | None,
        _text("--alias", "FILE", "Names that are one: a table with the columns alias and name."),
    ] = None,
    name: Annotated[
        str | None, _text("--name", "NAME", "Name of the feature set, or of the masks.")
    ] = None,
    pattern: Annotated[
        str | None,
        _text(
            "--pattern",
            "REGEX",
            "How image files are named, with groups named plate, well (or row and col), site, "
            "channel, plane, time.",
        ),
    ] = None,
    binary_masks: Annotated[
        bool,
        typer.Option("--binary-masks", help="Masks are black and white: each piece is a cell."),
    ] = False,
    layout: Annotated[
        str | None,
        _text("--layout", "NAME", "Force a reader. Default: told from the content, and said."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="One refused row, and nothing of the source is kept.")
    ] = False,
    reread: Annotated[
        bool,
        typer.Option("--reread", help="Read a source anew that was read before, as it is now."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what each file would become.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring images, treatments, features or masks in, however they were exported.

    \b
    images      LoadData CSV of CellProfiler and JUMP, the published table, Harmony's
                Index.idx.xml, bare folders (Phenix, Cellomics, any with --pattern)
    treatments  plate maps with compound, ORF or CRISPR tables, JUMP's dataset tables
    features    CellProfiler CSV folders and SQLite, CytoTable and pycytominer Parquet
    masks       label images of any tool, matched to images by name

    Rows that cannot be used are listed with their line numbers, kept in the table
    ingest_issues, and the command then ends with 1; the others are stored. Doing it again
    changes nothing, but for what was missing or has been corrected.

    \b
    Example:
      cellstore ingest load_data.csv --images /data/plate1 --platemap map.txt \\
          --compounds compounds.tsv
      cellstore ingest measurements.sqlite --name cellprofiler
      cellstore ingest masks outlines/
      cellstore ingest /data/plate1 --dry-run
    """
    kind, source = _split(words)
    params = IngestParams(
        kind=kind,
        layout=layout,
        plate=plate,
        images=images,
        maps=tuple(_pair(text, "--map") for text in maps or ()),
        look=look,
        channels=tuple(_pair(text, "--channels") for text in (channels or "").split(",") if text),
        pattern=pattern,
        platemap=platemap,
        compounds=tuple(compounds or ()),
        barcodes=barcodes,
        aliases=alias,
        name=name,
        binary=binary_masks,
        strict=strict,
        reread=reread,
    )
    if dry_run:
        _preview(ctx, store, source, params, as_json=as_json)
        return
    with open_store(ctx, store, quiet=as_json) as opened:
        result = _ingested(opened, source, params, as_json=as_json)
    if as_json:
        render.as_json(result)
    else:
        _show(result)
    if result.rows and result.refused == result.rows:
        say("Error: No row could be used; the reasons are above.")
        raise typer.Exit(2)
    if any(severity is not Severity.SUSPICIOUS for severity, _, _ in result.reasons):
        raise typer.Exit(1)


def _ingested(store: Store, source: Path, params: IngestParams, *, as_json: bool) -> IngestResult:
    from cellstore.stages.ingest.account import UndoneError

    try:
        return store.ingest(source, params)
    except UndoneError as error:
        if as_json:
            render.as_json({"undone": True, "issues": error.issues})
        else:
            _show_issues(error.issues)
        raise


def _split(words: Sequence[str]) -> tuple[str | None, Path]:
    if len(words) == 1:
        return None, Path(words[0])
    if len(words) == 2 and words[0] in KINDS:
        return words[0], Path(words[1])
    if words[0] in KINDS:
        raise UserInputError(f"Give one source after {words[0]!r}, not {len(words) - 1}.")
    raise UserInputError(
        f"Give one source, or one of {', '.join(KINDS)} before it; {words[0]!r} is neither."
    )


def _pair(text: str, option: str) -> tuple[str, str]:
    old, mark, new = text.partition("=")
    if not (mark and old.strip() and new.strip()):
        raise UserInputError(f"{option} takes OLD=NEW; {text!r} is not of that form.")
    return old.strip(), new.strip()


def _preview(
    ctx: typer.Context, store: Path | None, source: Path, params: IngestParams, *, as_json: bool
) -> None:
    from cellstore.stages.ingest.dry_run import preview

    if MASKS in (params.kind, params.layout):  # only they are looked up in a store
        with open_store(ctx, store, quiet=True) as opened:
            found = preview(source, params, opened.workspace)
    else:
        found = preview(source, params)
    if as_json:
        render.as_json(found)
    else:
        _show_preview(found)
    if found.refused:
        raise typer.Exit(1)


def _show_preview(found: Preview) -> None:
    channels = ", ".join(f"{name} ({number:,})" for name, number in sorted(found.channels.items()))
    least = "at least " if found.at_least else ""
    render.facts(
        [
            ("layout", found.layout),
            ("rows", found.rows),
            ("refused", found.refused),
            ("plates", ", ".join(sorted(found.plates)[:5]) or "none"),
            ("wells", f"{least}{len(found.wells):,}"),
            ("images", f"{least}{found.images:,}"),
            *([] if found.layout == MASKS else [("channels", channels or "none")]),
        ]
    )
    columns = _PLACE + (("objects", "cells") if found.layout == MASKS else ("channel", "treatment"))
    rows = [
        tuple("" if item is None else item for item in (getattr(row, name) for name in columns))
        for row in found.files[:SHOWN_FILES]
    ]
    if rows:
        render.table(columns, rows)
    _show_issues(found.issues)
    say("Nothing was written: this was a dry run.")


def _show(result: IngestResult) -> None:
    for note in result.notes:
        say(note)
    render.facts(
        [
            ("read as", result.layout),
            ("rows", result.rows),
            ("created", result.created),
            ("updated", result.updated),
            ("unchanged", result.unchanged),
            ("refused", result.refused),
            *([("cells", result.cells)] if result.cells else []),
            *([("feature set", result.feature_set)] if result.feature_set else []),
            *[("segmentation", recipe) for recipe in result.segmentations],
            *_plates(result),
            ("run", result.run_id),
        ]
    )
    if result.unchanged == result.rows and not result.notes and not result.reasons:
        typer.echo("Nothing has changed: all of this was in the store already.")
    _show_issues(result.issues)
    if result.reasons:
        question = f"FROM ingest_issues WHERE run_id = {result.run_id}"
        say(f'All of them: cellstore sql "{question}"')


def _plates(result: IngestResult) -> list[tuple[str, str]]:
    if not result.plates:
        return []
    wells = f"{render.count(result.plates, 'plate')}, {render.count(result.wells, 'well')}"
    images = f"{render.count(result.images, 'image')} ({result.missing_images:,} without files)"
    return [("its plates now have", f"{wells}, {images}")]


def _show_issues(issues: Sequence[Issue]) -> None:
    for severity, title in _TITLES.items():
        found = [issue for issue in issues if issue.severity is severity]
        if found:
            typer.echo(title)
            render.grouped([(_place(issue), issue.reason, issue.detail) for issue in found])


def _place(issue: Issue) -> str:
    return issue.file if issue.line is None else f"{issue.file}, line {issue.line}"


@sentences
def refresh(
    ctx: typer.Context,
    plate: PlatesOption = None,
    well: WellsOption = None,
    where: WhereOption = None,
    limit: LimitOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look again at the image files that the store knows, and tell which have changed.

    Files of another size or time are read and hashed. What was derived from bytes that have
    changed is out of date from now on: 'cellstore status' counts it, and the next run of each
    stage makes just that anew. Ends with 1 if a file cannot be read.

    \b
    Example:
      cellstore refresh
      cellstore refresh --plate BR00116991
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.refresh(selection(plate, well, where, limit))
    if as_json:
        render.as_json(result)
    else:
        render.facts(
            [
                ("run", result.run_id),
                ("images looked at", f"{result.images:,}"),
                ("changed", f"{result.changed:,}"),
                ("problems", f"{result.n_problems:,}"),
            ]
        )
        _show_issues(result.problems)
        if result.changed:
            say("See what is out of date with: cellstore status")
    if result.n_problems:
        raise typer.Exit(1)
