"""Audits as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from . import render
from .context import say

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

SHORT = 12
SHOWN_VOTES = 5
SHOWN_NAMES = 6
WIDE = 80


def tell(result: Any) -> None:
    """Tell of an audit, whatever of."""
    told: dict[str, Callable[[Any], None]] = {
        "ImageAudit": image,
        "WellAudit": well,
        "CellAudit": cell,
        "RunAudit": run,
        "ArtifactAudit": artifact,
    }
    told[type(result).__name__](result)


def _facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print names and values; what is too long for a line of 80 goes on below."""
    rows = [(name, render.cell(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        lead = f"{name:<{width}}{render.GAP}"
        lines = textwrap.wrap(value, WIDE - len(lead), break_on_hyphens=False) or [""]
        typer.echo(f"{lead}{lines[0]}".rstrip())
        for line in lines[1:]:
            typer.echo(f"{' ' * len(lead)}{line}")


def artifact(result: ArtifactAudit) -> None:
    """Tell what a file is, who made it, and what came of it."""
    _facts([("sha256", result.sha256), *([("file", result.hashed)] if result.hashed else [])])
    for known in result.known:
        typer.echo("")
        _known(known)


def _known(file: KnownFile) -> None:
    size = "unknown" if file.size_bytes is None else f"{file.size_bytes:,} bytes"
    runs = ", ".join(f"{run.id} ({run.stage}, {run.started_at[:10]})" for run in file.runs)
    _facts(
        [
            ("known as", file.kind),
            ("name", file.name),
            ("place", file.place),
            ("size", size),
            *(("", line) for line in file.about),
            ("runs", runs or "-"),
        ]
    )
    _came(file.came)


def _came(found: Sequence[Came]) -> None:
    """Tell what came of something."""
    if not found:
        typer.echo("\nNothing has come of it yet.")
        return
    typer.echo("\nwhat came of it")
    _facts((f"  {item.what}", _counted(item)) for item in found)


def _counted(item: Came) -> str:
    names = ", ".join(item.names[:SHOWN_NAMES]) or ", ".join(map(str, item.runs[:SHOWN_NAMES]))
    more = len(item.names or item.runs) - SHOWN_NAMES
    by = "" if item.names or not names else "run " if len(item.runs) == 1 else "runs "
    extra = f", and {more} more" if more > 0 else ""
    return f"{item.count:,}" + (f" ({by}{names}{extra})" if names else "")


def image(result: ImageAudit) -> None:
    """Tell who labelled an image, and from what."""
    treatment = result.treatment or "unknown"
    target = f", target {result.target}" if result.target else ""
    role = f" ({result.control})" if result.control else ""
    files = render.count(len(result.files), "file")
    missing = f", {result.missing_files} missing" if result.missing_files else ""
    _facts(
        [
            ("image", f"{result.plate}/{result.well}/{result.site} {result.core_name}"),
            ("id", result.image_id),
            ("treatment", f"{treatment}{target}{role}"),
            ("files", f"{files}{missing}"),
            ("content", short(result.content_sha256)),
        ]
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


def well(result: WellAudit) -> None:
    """Tell what a well has, what it had, and since when."""
    _facts(
        [
            ("well", f"{result.plate}/{result.well}"),
            ("id", result.well_id),
            ("treatment", _treatment(result.treatment)),
            ("images", len(result.images)),
        ]
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
        render.table(("when", "run", "file", "before", "after"), rows)
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
            text += f", {render.cell(flag.value)}"
        if flag.low is not None or flag.high is not None:
            text += f" (usual is {render.span(flag.low, flag.high)})"
        typer.echo(render.cell(text))


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
    network = f"{found.parameters.get('model', '-')} ({short(found.weights_sha256)})"
    diameter = "unknown" if found.diameter is None else f"{found.diameter:.1f} pixels"
    _facts(
        [
            ("  cells", f"{found.n_cells:,}"),
            ("  when", moment(found.made_at)),
            ("  recipe", f"{found.recipe_id} ({short(found.fingerprint)})"),
            ("  found by", found.imported) if found.imported else ("  network", network),
            ("  masks", "known" if found.has_masks else "unknown"),
            ("  diameter", diameter),
        ]
    )


def _labelling(found: Labelling) -> None:
    typer.echo(f"\nlabelled by run {found.run_id}")
    seen = "was in training" if found.well_in_training else "was not in training"
    verdict = {True: "right", False: "wrong", None: "cannot be judged"}[found.correct]
    _facts(
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
        ]
    )


def _votes(found: Labelling) -> str:
    shown = [f"{vote.label} {vote.cells}" for vote in found.votes[:SHOWN_VOTES]]
    more = len(found.votes) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def cell(result: CellAudit) -> None:
    """Tell where a cell comes from, what was measured, and what was predicted."""
    box, centre = result.box, result.centroid
    _facts(
        [
            ("cell", f"{result.cell_id}, label {result.label} of {result.image}"),
            (
                "box",
                f"rows {box[0]} to {box[2]}, columns {box[1]} to {box[3]}" if box else "unknown",
            ),
            ("centre", f"row {centre[0]:.1f}, column {centre[1]:.1f}" if centre else "unknown"),
            ("excluded", result.excluded or "no"),
        ]
    )
    _flags(result.flags)
    _segmentation(result.segmentation)
    for recipe, values in result.features.items():
        typer.echo(f"\nmeasured by {recipe}")
        _facts((f"  {name.replace('_', ' ')}", value) for name, value in values.items())
    if not result.choices:
        typer.echo("\nNo run has labelled this cell yet.")
        return
    typer.echo("")
    rows = [(item.run_id, item.rank, item.label, item.probability) for item in result.choices]
    render.table(("run", "rank", "label", "probability"), rows)


def run(result: RunAudit) -> None:
    """Tell what a run was made from, and what it made."""
    recipe = result.recipe
    _facts(
        [
            ("run", f"{result.run.id}: {result.run.stage}, {result.run.status}"),
            ("when", f"{moment(result.run.started_at)} to {moment(result.ended_at)}"),
            ("by", f"{result.user} on {result.host}"),
            ("command", result.command),
            ("code", result.code_version),
            ("seed", result.seed),
            ("error", result.error),
            ("recipe", f"{recipe.id} ({short(recipe.fingerprint)})"),
            ("weights", short(recipe.weights_sha256)),
            ("split", _split(result)),
            ("parents", _runs(result.parents)),
            ("children", _runs(result.children)),
            ("jobs", ", ".join(f"{n} {status}" for status, n in result.jobs.items()) or "-"),
        ]
    )
    for title, values in (("parameters", recipe.parameters), ("result", result.result or {})):
        typer.echo(f"{title}:")
        render.tree(render.plain(values), indent=1)
    for source in result.inputs:
        typer.echo(f"reads: {source.stage} recipe {source.id} ({short(source.fingerprint)})")
    _ingested(result)
    if result.came:
        _came(result.came)
    if result.artifacts:
        rows = [(a.kind, short(a.sha256), a.size_bytes, a.path) for a in result.artifacts[:20]]
        render.table(("file", "sha256", "bytes", "path"), rows)
        if len(result.artifacts) > len(rows):
            say(f"and {len(result.artifacts) - len(rows)} more files (all with --json)")


def _ingested(result: RunAudit) -> None:
    """Tell which files an ingest read, and what became of their rows."""
    if not result.ingested:
        return
    headers = ("read", "as", "sha256", "rows", "created", "updated", "unchanged", "refused")
    rows = [
        (
            *(file.name, file.layout, short(file.sha256), file.rows),
            *(file.created, file.updated, file.unchanged, file.refused),
        )
        for file in result.ingested
    ]
    render.table(headers, rows)
    if result.changed_wells:
        typer.echo(f"{render.count(result.changed_wells, 'well')} got another treatment")


def _split(result: RunAudit) -> str:
    if result.split is None:
        return "-"
    counts = ", ".join(f"{number} {side}" for side, number in result.split_counts.items())
    return f"{result.split} ({counts})"


def _runs(runs: Any) -> str:
    return ", ".join(f"{run.id} ({run.stage})" for run in runs) or "-"


def moment(text: str | None) -> str:
    """Return an ISO moment in UTC to the second."""
    return f"{text[:19].replace('T', ' ')} UTC" if text else "?"


def short(digest: str | None) -> str:
    """Return the start of a sha256, enough to tell it from others."""
    return digest[:SHORT] if digest else "-"


def _shorts(digests: tuple[str, ...]) -> str:
    return ", ".join(map(short, digests)) or "-"
