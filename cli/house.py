"""Commands that look after a store: status, verify, doctor, demo."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .context import chosen_store, listener, open_store, say, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.settings import StoreSettings
    from cellstore.stages.status import RecipeStatus, StatusResult
    from cellstore.stages.verify import VerifyResult


@sentences
def status(
    ctx: typer.Context,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in the store, what is done, what is out of date, and what failed.

    \b
    Example:
      cellstore status
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.status()
    if as_json:
        render.as_json(result)
    else:
        _show_status(result)


def _flagged(result: StatusResult) -> list[tuple[str, str]]:
    if result.qc_run_id is None:
        return []
    return [("  flagged", f"{result.flagged_images:,} (by qc run {result.qc_run_id})")]


def _show_status(result: StatusResult) -> None:
    excluded = f"{result.cells:,} ({result.excluded:,} excluded)"
    render.facts(
        [
            ("store", result.store),
            ("database", result.database),
            ("plates", f"{result.plates:,}"),
            ("wells", f"{result.wells:,}"),
            ("treatments", f"{result.treatments:,}"),
            ("images", f"{result.images:,} ({result.missing_images:,} miss files)"),
            ("  segmented", f"{result.segmented:,}"),
            ("  measured", f"{result.measured:,}"),
            *_flagged(result),
            ("cells", excluded),
            ("measurements", f"{result.features:,}"),
            ("splits", f"{result.splits:,}"),
            ("runs", f"{result.runs:,}"),
            ("predictions", f"{result.predictions:,}"),
        ]
    )
    if result.recipes:
        typer.echo("")
        headers = ("recipe", "stage", "fingerprint", "done", "to do", "failed", "stale", "")
        render.table(
            headers,
            [
                (
                    r.recipe_id,
                    r.stage,
                    r.fingerprint[:12],
                    r.done,
                    r.todo,
                    r.failed,
                    r.stale,
                    _relations(r),
                )
                for r in result.recipes
            ],
        )
    if result.feature_sets:
        typer.echo("")
        sets = [(s.name, s.storage, s.columns, s.cells) for s in result.feature_sets]
        render.table(("feature set", "kept in", "features", "cells"), sets)
    for broken in result.broken_off:
        say(
            f"Training run {broken.run_id} was broken off after "
            f"{render.count(broken.epochs, 'epoch')}. "
            f"Go on with it: cellstore train --resume {broken.run_id}"
        )
    if any(recipe.failed for recipe in result.recipes):
        say("Some images failed. See why with: cellstore jobs --failed")


def _relations(recipe: RecipeStatus) -> str:
    said = []
    if recipe.reads is not None:
        said.append(f"of {recipe.reads}")
    if recipe.replaced_by is not None:
        said.append(f"replaced by {recipe.replaced_by}")
    return ", ".join(said)


@sentences
def verify(
    ctx: typer.Context,
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove files that the database does not know.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="MINUTES",
            help="Unknown files younger than this may belong to a running command: left alone.",
        ),
    ] = 10.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare all files of the store with the database.

    Every file is read and compared with its sha256, every mask with the cells found in it.
    Files that the database does not know are left by a crash. Ends with 1 if something is wrong.

    \b
    Example:
      cellstore verify
      cellstore verify --fix
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.verify(fix=fix, minutes=older_than)
    if as_json:
        render.as_json({"ok": result.ok, **render.plain(result)})
    else:
        _show_verify(result)
    if not result.ok:
        raise typer.Exit(1)


def _show_verify(result: VerifyResult) -> None:
    render.facts(
        [
            ("files checked", f"{result.files:,}"),
            ("masks checked", f"{result.segmentations:,}"),
            ("problems", f"{len(result.problems):,}"),
            ("unknown files", f"{len(result.orphans):,} ({result.removed:,} removed)"),
        ]
    )
    for problem in result.problems:
        typer.echo(f"{problem.path}\n  {render.cell(problem.reason)}")
    for path in result.orphans:
        typer.echo(f"{'removed' if result.removed else 'unknown'}: {render.cell(path)}")
    if result.young:
        say(
            f"{render.count(result.young, 'unknown file')} left alone: too young "
            "to tell from the work of a running command."
        )
    if result.orphans and not result.removed:
        say("Remove the unknown files with: cellstore verify --fix")
    if result.problems:
        say("Put the files back from a backup; what is derived can be made again.")


@sentences
def doctor(ctx: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check the installation, and the store if there is one.

    Packages (each is imported for real), device, networks, and whether the database answers.

    Ends with 1 if something is broken. Optional parts that are absent are not.

    \b
    Example:
      cellstore doctor
    """
    from cellstore.stages.doctor import doctor as examine

    result = examine(_settings(ctx, store))
    if as_json:
        render.as_json({"ok": result.ok, **render.plain(result)})
    else:
        rows = [(f.state, f.topic, f.name, f.detail) for f in result.findings]
        for state, topic, name, detail in rows:
            typer.echo(f"{state:<7} {topic}: {render.cell(name)}  {render.cell(detail)}")
        broken = sum(finding.state == "broken" for finding in result.findings)
        say(f"{render.count(broken, 'thing is', 'things are')} broken." if broken else "All well.")
    if not result.ok:
        raise typer.Exit(1)


def _settings(ctx: typer.Context, given: Path | None) -> StoreSettings | None:
    from cellstore.errors import StoreNotFoundError
    from cellstore.settings import find_store

    named = chosen_store(ctx, given)
    try:
        return find_store(named)
    except StoreNotFoundError:
        if named is not None:
            raise
        return None


@sentences
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the demo goes; a new folder.")
    ] = Path("cellstore-demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same plates.")] = 1,
) -> None:
    """Render a small screen and run every stage on it.

    Plates of drawn cells under six treatments are segmented, measured, split, learned and
    predicted; each command is shown before it runs. Takes under 5 minutes on 2 cores, and ends
    with the path of a report.

    \b
    Example:
      cellstore demo
    """
    from cellstore.demo import audit_command, commands, render_plates

    say(f"Rendering the plates into {folder}")
    plates = render_plates(folder, seed=seed, progress=listener(quiet=False))
    for words in commands(plates):
        _as_typed(words)
    _as_typed(audit_command(plates))
    say("\nThe demo is done. Open its report in a browser:")
    typer.echo(plates.report)
    say(f"Ask it more, for example: cellstore sql 'FROM accuracy' --store {plates.store}")


def _as_typed(words: list[str]) -> None:
    from .main import app

    say(f"\n$ cellstore {shlex.join(words)}")
    code = app(words, standalone_mode=False)
    if code and words[:2] != ["split", "check"]:  # whose 1 is an answer, not a failure
        raise typer.Exit(code)
