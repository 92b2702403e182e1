"""Commands that look after a store and its work: status, jobs, retry, cancel, verify, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstore.config import option
from cellstore.store import Store

from . import output
from .app import Common, command, say_next
from .output import say

if TYPE_CHECKING:
    from cellstore.stages.doctor import DoctorResult
    from cellstore.stages.manage_jobs import JobsList, RetryResult
    from cellstore.stages.status import StatusResult
    from cellstore.stages.verify import VerifyResult

app = typer.Typer(add_completion=False, rich_markup_mode=None)


STAGE = option(None, "Only jobs of this stage.", choices=("segment", "measure", "qc", "predict"))
IMAGE = option(
    None,
    "Only this image: PLATE/A01/1, core file name, file name or id; or all of the well PLATE/A01.",
    metavar="IMAGE",
)


@command(app, "status")
def status(store: Store, common: Common) -> None:
    """Show what is in the store, what is done, what is out of date, and what failed.

    \b
    Example:
      cellstore status
    """
    common.show(store.status(), lambda found: _show_status(found, common))


def _show_status(result: StatusResult, common: Common) -> None:
    flagged = f"{result.flagged_images:,} (by qc run {result.qc_run_id})"
    untreated = ""
    if result.untreated_wells:
        untreated = f" ({result.untreated_wells:,} with images have no treatment)"
    output.pairs(
        {
            "store": result.store,
            "database": result.database,
            "plates": result.plates,
            "wells": f"{result.wells:,}{untreated}",
            "treatments": result.treatments,
            "images": f"{result.images:,} ({result.missing_images:,} without their files)",
            "  segmented": result.segmented,
            "  measured": result.measured,
            **({"  excluded": result.excluded_images} if result.excluded_images else {}),
            **({} if result.qc_run_id is None else {"  flagged": flagged}),
            "cells": f"{result.cells:,} ({result.excluded:,} excluded)",
            "measurements": result.features,
            "splits": result.splits,
            "runs": result.runs,
            "predictions": result.predictions,
        }
    )
    if result.recipes:
        columns = ("recipe_id", "stage", "fingerprint", "done", "todo", "failed", "stale")
        short = [{**row, "fingerprint": row["fingerprint"][:12]} for row in result.recipes]
        typer.echo("")
        output.table(
            ("recipe", "stage", "fingerprint", "done", "to do", "failed", "stale", ""),
            [[*(row[name] for name in columns), _relations(row)] for row in short],
        )
    if result.feature_sets:
        typer.echo("")
        names = ("name", "storage", "columns", "cells")
        sets = [[found[name] for name in names] for found in result.feature_sets]
        output.table(("feature set", "kept in", "features", "cells"), sets)
    for item in result.gone:
        say(item.sentence)
    if any(recipe["failed"] for recipe in result.recipes):
        say("Some images failed. See why with: cellstore jobs --failed")
    say_next(result.next, common)


def _relations(recipe: dict[str, Any]) -> str:
    parts = [] if recipe["reads"] is None else [f"of {recipe['reads']}"]
    if recipe["replaced_by"] is not None:
        parts.append(f"replaced by {recipe['replaced_by']}")
    return ", ".join(parts)


@command(app, "jobs")
def jobs(
    store: Store,
    common: Common,
    failed: bool = option(False, "List the images that failed, and why."),
    running: bool = option(False, "List what is being worked on, and by whom."),
    pending: bool = option(False, "List what is open."),
    stage: str | None = STAGE,
    image: str | None = IMAGE,
    traceback: bool = option(False, "Show all that is known of an error."),
    limit: int = option(100, "List at most N jobs.", min=1),
) -> None:
    """Show the state of the work, image by image.

    A job is one image's share of a recipe. It is pending, running, done, or failed. Without
    options: how many of each there are. A failed job is left alone until 'cellstore retry'.

    \b
    Example:
      cellstore jobs
      cellstore jobs --failed --traceback
      cellstore jobs --running --stage segment
      cellstore jobs --failed --image P1/A01
    """
    wanted = {"failed": failed, "running": running, "pending": pending}
    chosen = [name for name, on in wanted.items() if on]
    if len(chosen) > 1:
        raise typer.BadParameter("Choose one of --failed, --running and --pending.")
    state = chosen[0] if chosen else None
    shown = limit if state or common.as_json else 0
    result = store.jobs(stage=stage, status=state, image=image, limit=shown)
    if common.as_json:
        output.print_json(result)
    elif state is None:
        _show_counts(result)
    else:
        _show_jobs(result, state, traceback=traceback)


def _show_counts(result: JobsList) -> None:
    if not result.counts:
        typer.echo("No image has been worked on yet. Begin with: cellstore segment")
        return
    names = ("recipe_id", "stage", "pending", "running", "done", "failed", "seconds")
    output.table(
        ("recipe", "stage", "pending", "running", "done", "failed", "s/image"),
        [[count[name] for name in names] for count in result.counts],
    )
    if any(count["failed"] for count in result.counts):
        say("See why with: cellstore jobs --failed. Try again with: cellstore retry")


def _show_jobs(result: JobsList, state: str, *, traceback: bool) -> None:
    if not result.jobs:
        typer.echo(f"No job is {state}." if state != "failed" else "No image has failed.")
        return
    if state == "failed":
        for job in result.jobs:
            tries = output.count(job["attempts"], "try", "tries")
            image = output.cell(job["image"])
            typer.echo(f"{job['stage']} (recipe {job['recipe_id']}) {image}, {tries}:")
            lines = (job["error"] or "").splitlines() if traceback else [job["reason"] or "unknown"]
            for line in lines:
                typer.echo(f"  {output.cell(line)}")
        say("Try them again with: cellstore retry")
    else:
        names = ("job_id", "stage", "image", "worker", "attempts", "lease", "wait", "reason")
        titles = ("job", "stage", "image", "worker", "tries", "lease s", "wait s", "last error")
        output.table(titles, [[job[name] for name in names] for job in result.jobs])
    output.say_more(result.more, how="see --limit")


def _show_retry(result: RetryResult) -> None:
    if not result.jobs and not result.lost_files:
        typer.echo("No image has failed.")
        return
    lost = output.count(result.lost_files, "file is gone.", "files are gone.")
    opened = output.count(result.jobs, "job is open again.", "jobs are open again.")
    found = [lost] * bool(result.lost_files) + [opened] * bool(result.jobs)
    typer.echo(f"{' '.join(found)} Now run:")
    for words in result.commands:
        typer.echo(f"  {output.cell(words)}")


@command(app, "retry", _show_retry)
def retry(
    store: Store,
    stage: str | None = STAGE,
    run: str | None = option(None, "Only what failed in this run.", metavar="RUN"),
    image: str | None = IMAGE,
) -> RetryResult:
    """Try images again that failed.

    It opens their jobs again, also those of masks and feature files that are gone, and shows the
    command that does them.

    \b
    Example:
      cellstore retry
      cellstore retry --stage segment --image P1/A01/2
    """
    return store.retry(stage=stage, run=run, image=image)


def _show_cancelled(done: dict[str, Any]) -> None:
    runs = ", ".join(map(str, done["cancelled"]))
    typer.echo(f"Cancelled: run {runs}" if runs else "Nothing is running.")


@command(app, "cancel", _show_cancelled, then=True)
def cancel(
    store: Store,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run. Default: all that are running.")
    ] = None,
) -> dict[str, Any]:
    """Ask running commands to end, here or on other machines.

    They finish their present images, begin no new ones, and end. A training ends
    at once, and keeps its last whole epoch. What is done is kept; the same command goes on later.

    \b
    Example:
      cellstore cancel
      cellstore cancel 12
    """
    return {"cancelled": store.cancel(run)}


def _show_verify(result: VerifyResult) -> None:
    output.pairs(
        {
            "files checked": result.files,
            "masks checked": result.segmentations,
            "jobs checked": result.jobs,
            "problems": len(result.problems),
            "unknown files": f"{len(result.orphans):,} ({result.removed:,} removed)",
        }
    )
    for problem in result.problems:
        typer.echo(f"{problem.path}\n  {output.cell(problem.reason)}")
    for item in result.gone:
        typer.echo(item.sentence)
    for path in result.orphans:
        typer.echo(f"{'removed' if result.removed else 'unknown'}: {output.cell(path)}")
    if result.young:
        say(
            f"{output.count(result.young, 'unknown file')} left alone: so new that a running "
            "command may be writing them."
        )
    if result.orphans and not result.removed:
        say("Remove the unknown files with: cellstore verify --fix")
    if result.problems:
        say(
            "Put what is damaged back from a backup. Masks and features can be made again: "
            "cellstore verify --fix removes changed ones and names the commands."
        )
    if result.commands:
        typer.echo("Files that are gone or removed are made again by:")
        for words in result.commands:
            typer.echo(f"  {output.cell(words)}")


@command(app, "verify", _show_verify, lambda result: not result.ok, then=True)
def verify(
    store: Store,
    fix: bool = option(
        False,
        "Remove files that the database does not know, and masks and features that were changed, "
        "so that their commands make them again.",
    ),
    older_than: float = option(
        10.0,
        "Keep unknown files that are younger than this: a running command may be writing them.",
        metavar="MINUTES",
        min=0.0,
    ),
    against: Path | None = option(
        None,
        "A file of cellstore seal: what was done before it was written must be as it was.",
        metavar="FILE",
    ),
) -> VerifyResult:
    """Look for damage in the store: its database, and all files that it knows.

    Every file is read and compared with its sha256, every mask with the cells found in it, the
    rows of every job with what it wrote, and runs, splits, recipes and treatments with the ledger
    of events, each of which names the one before it. See docs/provenance.md for what this proves.
    Files that the database does not know are left by a crash. Ends with 1 if something is wrong.

    \b
    Example:
      cellstore verify
      cellstore verify --fix
      cellstore verify --against seal.json
    """
    return store.verify(fix=fix, minutes=older_than, against=against)


def _show_seal(head: dict[str, Any]) -> None:
    output.pairs({"sealed": head["sha256"], "event": head["event"], "runs": head["runs"]})
    say("Keep the file where nobody can change it, then: cellstore verify --against FILE")


@command(app, "seal", _show_seal)
def seal(
    store: Store,
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
) -> dict[str, Any]:
    """Write the end of the ledger to a file, which you keep where nobody else can change it.

    The owner of a database can change everything in it, the ledger too. A seal that is kept
    elsewhere shows such a change: verify --against FILE compares all that was done before it.

    \b
    Example:
      cellstore seal seal.json
      cellstore verify --against seal.json
    """
    return store.seal(file)


def _show_doctor(result: DoctorResult) -> None:
    for found in result.findings:
        line = output.cell(f"{found.topic}: {found.name}  {found.detail}")
        typer.echo(output.filled(line, " " * 8, f"{found.state:<8}"))
    broken = sum(found.state == "broken" for found in result.findings)
    words = f"{output.count(broken, 'thing is', 'things are')} broken."
    say(words if broken else "Everything works.")


@command(app, "doctor", _show_doctor, lambda result: not result.ok, then=True)
def doctor(common: Common) -> DoctorResult:
    """Check the installation, and the store if there is one.

    Packages (each is really imported), device, networks, and whether the database answers.

    Ends with 1 if something is broken. An optional part that is absent is not broken.

    \b
    Example:
      cellstore doctor
    """
    from cellstore.errors import StoreNotFoundError
    from cellstore.settings import find_store
    from cellstore.stages.doctor import doctor as examine

    settings: Any = None
    try:
        settings = find_store(common.store)
    except StoreNotFoundError:
        if common.store is not None:
            raise
    return examine(settings)
