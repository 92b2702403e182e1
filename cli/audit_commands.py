"""Commands that say where a label comes from, and redo a run: audit, repro."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cellstore.errors import UserInputError

from . import output
from .options import Common, Device, DeviceOption, HtmlOption, command
from .output import moment, say

if TYPE_CHECKING:
    from cellstore.report.audit import (
        ArtifactAudit,
        Came,
        CellAudit,
        FlagFact,
        FrozenLabel,
        ImageAudit,
        KnownFile,
        Labelling,
        RunAudit,
        SegmentationFact,
        TreatmentChange,
        TreatmentFact,
        WellAudit,
    )
    from cellstore.report.repro import Check, Repro
    from cellstore.store import Store

ANYTHING = "anything"
SHORT = 12
SHOWN_VOTES = 5
SHOWN_NAMES = 6


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


def _audit(common: Common, html: Path | None, find: Callable[[Store], Any]) -> None:
    with common.open(quiet=True) as store:
        result = find(store)
        page = None if html is None else store.lineage_page(result, html)
    if common.as_json:
        output.print_json(result)
        return
    show_audit(result)
    if page is not None:
        typer.echo(f"\nlineage: {page}")


def show_audit(result: Any) -> None:
    """Print an audit, whatever of."""
    show: dict[str, Callable[[Any], None]] = {
        "ImageAudit": _image,
        "WellAudit": _well,
        "CellAudit": _cell,
        "RunAudit": _run,
        "ArtifactAudit": _artifact,
    }
    show[type(result).__name__](result)


def _artifact(result: ArtifactAudit) -> None:
    """Tell what a file is, who made it, and what came of it."""
    output.pairs([("sha256", result.sha256), *([("file", result.hashed)] if result.hashed else [])])
    for known in result.known:
        typer.echo("")
        _known(known)


def _known(file: KnownFile) -> None:
    size = "unknown" if file.size_bytes is None else f"{file.size_bytes:,} bytes"
    runs = ", ".join(f"{run.id} ({run.stage}, {run.started_at[:10]})" for run in file.runs)
    output.pairs(
        [
            ("known as", file.kind),
            ("name", file.name),
            ("where", file.place),
            ("size", size),
            *(("", line) for line in file.about),
            ("runs", runs or "-"),
        ],
        wrap=True,
    )
    _came(file.came)


def _came(found: Sequence[Came]) -> None:
    """Tell what came of something."""
    if not found:
        typer.echo("\nNothing has come of it yet.")
        return
    typer.echo("\nwhat came of it")
    output.pairs((f"  {item.what}", _counted(item)) for item in found)


def _counted(item: Came) -> str:
    names = ", ".join(item.names[:SHOWN_NAMES]) or ", ".join(map(str, item.runs[:SHOWN_NAMES]))
    more = len(item.names or item.runs) - SHOWN_NAMES
    by = "" if item.names or not names else "run " if len(item.runs) == 1 else "runs "
    extra = f", and {more} more" if more > 0 else ""
    return f"{item.count:,}" + (f" ({by}{names}{extra})" if names else "")


def _image(result: ImageAudit) -> None:
    """Tell who labelled an image, and from what."""
    treatment = result.treatment or "unknown"
    target = f", target {result.target}" if result.target else ""
    role = f" ({result.control})" if result.control else ""
    files = output.count(len(result.files), "file")
    missing = f", {result.missing_files} missing" if result.missing_files else ""
    output.pairs(
        [
            ("image", f"{result.plate}/{result.well}/{result.site} {result.core_name}"),
            ("id", result.image_id),
            ("treatment", f"{treatment}{target}{role}"),
            ("files", f"{files}{missing}"),
            ("content", _short(result.content_sha256)),
        ],
        wrap=True,
    )
    _history(result.treatment_history, result.frozen_labels)
    _flags(result.flags)
    for found in result.segmentations:
        _segmentation(found)
    if not result.labellings:
        typer.echo("\nNo run has labelled this image yet.")
    for labelling in result.labellings:
        _labelling(labelling)
    _came(result.came)


def _well(result: WellAudit) -> None:
    """Tell what a well has, what it had, and since when."""
    output.pairs(
        [
            ("well", f"{result.plate}/{result.well}"),
            ("id", result.well_id),
            ("treatment", _treatment(result.treatment)),
            ("images", len(result.images)),
        ],
        wrap=True,
    )
    _history(result.history, result.frozen_labels)
    _came(result.came)


def _history(changes: Sequence[TreatmentChange], labels: Sequence[FrozenLabel]) -> None:
    """Tell how a treatment changed, and where a split keeps another label than the well has."""
    if changes:
        typer.echo("\ntreatment history")
        rows = [
            (
                *(moment(item.changed_at), item.run_id, _place(item)),
                *(_treatment(item.old), _treatment(item.new)),
            )
            for item in changes
        ]
        output.table(("when", "run", "file", "before", "after"), rows)
    for label in labels:
        if label.differs:
            typer.echo(_frozen(label))


def _frozen(label: FrozenLabel) -> str:
    text = f"label in split {label.split}: {label.label}; the well now has: {label.now or 'none'}"
    since = label.since
    return text if since is None else f"{text}, since run {since.run_id} ({_place(since)})"


def _flags(flags: Sequence[FlagFact]) -> None:
    """Tell what the last quality control that found something odd said of it."""
    for flag in [item for item in flags if item.run_id == flags[-1].run_id]:
        channel = f" in {flag.channel}" if flag.channel else ""
        text = f"flagged by qc run {flag.run_id}: {flag.reason}{channel}"
        if flag.value is not None:
            text += f", {output.cell(flag.value)}"
        if flag.low is not None or flag.high is not None:
            text += f" (usual is {output.span(flag.low, flag.high)})"
        typer.echo(output.cell(text))


def _place(change: TreatmentChange) -> str:
    return change.file if change.line is None else f"{change.file}, line {change.line}"


def _treatment(found: TreatmentFact | None) -> str:
    if found is None:
        return "none"
    parts = [found.name]
    parts += [f"target {found.target}"] if found.target else []
    parts += [found.identifier] if found.identifier else []
    return ", ".join(parts) + (f" ({found.control})" if found.control else "")


def _segmentation(found: SegmentationFact) -> None:
    typer.echo(
        f"\nsegmentation {found.id} by run {found.run_id}{'' if found.current else ' (stale)'}"
    )
    network = f"{found.parameters.get('model', '-')} ({_short(found.weights_sha256)})"
    diameter = "unknown" if found.diameter is None else f"{found.diameter:.1f} pixels"
    output.pairs(
        [
            ("  cells", f"{found.n_cells:,}"),
            ("  when", moment(found.made_at)),
            ("  recipe", f"{found.recipe_id} ({_short(found.fingerprint)})"),
            ("  found by", found.imported) if found.imported else ("  network", network),
            ("  masks", "known" if found.has_masks else "unknown"),
            ("  diameter", diameter),
        ],
        wrap=True,
    )


def _labelling(found: Labelling) -> None:
    typer.echo(f"\nlabelled by run {found.run_id}")
    seen = "was in training" if found.well_in_training else "was not in training"
    verdict = {True: "right", False: "wrong", None: "cannot be judged"}[found.correct]
    output.pairs(
        [
            ("  when", moment(found.started_at)),
            ("  by", f"{found.user} on {found.host}, cellstore {found.code_version}"),
            ("  network", f"run {found.train_run_id}, {_shorts(found.checkpoints)}"),
            ("  split", f"{found.split} ({found.protocol}): this image is {found.side}"),
            ("  its well", seen),
            ("  segmentation", ", ".join(map(str, found.segmentation_ids))),
            ("  cells", f"{found.n_cells:,}"),
            ("  votes", _votes(found)),
            ("  winner", f"{found.winner}{' (a tie)' if found.tie else ''}"),
            ("  by probability", found.soft_winner),
            ("  truth", f"{found.truth or 'unknown'}: {verdict}"),
        ],
        wrap=True,
    )


def _votes(found: Labelling) -> str:
    shown = [f"{vote.label} {vote.cells}" for vote in found.votes[:SHOWN_VOTES]]
    more = len(found.votes) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def _cell(result: CellAudit) -> None:
    """Tell where a cell comes from, what was measured, and what was predicted."""
    box, centre = result.box, result.centroid
    output.pairs(
        [
            ("cell", f"{result.cell_id}, label {result.label} of {result.image}"),
            (
                "box",
                f"rows {box[0]} to {box[2]}, columns {box[1]} to {box[3]}" if box else "unknown",
            ),
            ("centre", f"row {centre[0]:.1f}, column {centre[1]:.1f}" if centre else "unknown"),
            ("excluded", result.excluded or "no"),
        ],
        wrap=True,
    )
    _flags(result.flags)
    _segmentation(result.segmentation)
    for recipe, values in result.features.items():
        typer.echo(f"\nmeasured by {recipe}")
        output.pairs((f"  {name.replace('_', ' ')}", value) for name, value in values.items())
    if not result.choices:
        typer.echo("\nNo run has labelled this cell yet.")
        return
    typer.echo("")
    rows = [(item.run_id, item.rank, item.label, item.probability) for item in result.choices]
    output.table(("run", "rank", "label", "probability"), rows)


def _run(result: RunAudit) -> None:
    """Tell what a run was made from, and what it made."""
    recipe = result.recipe
    output.pairs(
        [
            ("run", f"{result.run.id}: {result.run.stage}, {result.run.status}"),
            ("when", f"{moment(result.run.started_at)} to {moment(result.ended_at)}"),
            ("by", f"{result.user} on {result.host}"),
            ("command", result.command),
            ("code", result.code_version),
            ("seed", result.seed),
            ("error", result.error),
            ("recipe", f"{recipe.id} ({_short(recipe.fingerprint)})"),
            ("weights", _short(recipe.weights_sha256)),
            ("split", _split(result)),
            ("parents", _runs(result.parents)),
            ("children", _runs(result.children)),
            ("jobs", ", ".join(f"{n} {status}" for status, n in result.jobs.items()) or "-"),
        ],
        wrap=True,
    )
    for title, values in (("parameters", recipe.parameters), ("result", result.result or {})):
        typer.echo(f"{title}:")
        output.tree(output.plain(values), indent=1)
    for source in result.inputs:
        typer.echo(f"reads: {source.stage} recipe {source.id} ({_short(source.fingerprint)})")
    _ingested(result)
    if result.came:
        _came(result.came)
    if result.artifacts:
        rows = [(a.kind, _short(a.sha256), a.size_bytes, a.path) for a in result.artifacts[:20]]
        output.table(("file", "sha256", "bytes", "path"), rows)
        if len(result.artifacts) > len(rows):
            say(f"and {len(result.artifacts) - len(rows)} more files (all with --json)")


def _ingested(result: RunAudit) -> None:
    """Tell which files an ingest read, and what became of their rows."""
    if not result.ingested:
        return
    headers = ("read", "as", "sha256", "rows", "created", "updated", "unchanged", "refused")
    rows = [
        (
            *(file.name, file.layout, _short(file.sha256), file.rows),
            *(file.created, file.updated, file.unchanged, file.refused),
        )
        for file in result.ingested
    ]
    output.table(headers, rows)
    if result.changed_wells:
        typer.echo(f"{output.count(result.changed_wells, 'well')} got another treatment")


def _split(result: RunAudit) -> str:
    if result.split is None:
        return "-"
    counts = ", ".join(f"{number} {side}" for side, number in result.split_counts.items())
    return f"{result.split} ({counts})"


def _runs(runs: Any) -> str:
    return ", ".join(f"{run.id} ({run.stage})" for run in runs) or "-"


def _short(digest: str | None) -> str:
    """Return the start of a sha256, enough to know it by."""
    return digest[:SHORT] if digest else "-"


def _shorts(digests: tuple[str, ...]) -> str:
    return ", ".join(map(_short, digests)) or "-"


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
