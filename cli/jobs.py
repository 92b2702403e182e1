"""Commands about jobs: jobs, retry, cancel."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .context import open_store, say, sentences
from .options import JsonOption, StoreOption

if TYPE_CHECKING:
    from cellstore.stages.manage_jobs import JobRow, JobsList


class JobStage(StrEnum):
    """The stages that go image by image."""

    SEGMENT = "segment"
    MEASURE = "measure"
    QC = "qc"
    PREDICT = "predict"


StageOption = Annotated[
    JobStage | None, typer.Option("--stage", help="Only jobs of this stage.", show_default=False)
]


@sentences
def jobs(
    ctx: typer.Context,
    failed: Annotated[
        bool, typer.Option("--failed", help="List the images that failed, and why.")
    ] = False,
    running: Annotated[
        bool, typer.Option("--running", help="List what is being worked on, and by whom.")
    ] = False,
    pending: Annotated[bool, typer.Option("--pending", help="List what is open.")] = False,
    stage: StageOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Only jobs of this recipe: number or start of the fingerprint.",
            show_default=False,
        ),
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show all that is known of an error.")
    ] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="List at most N jobs.")] = 100,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how the work stands, image by image.

    A job is one image's share of a recipe. It is pending, running, done, or failed. Without
    options: how many of each there are. A failed job is left alone until 'cellstore retry'.

    \b
    Example:
      cellstore jobs
      cellstore jobs --failed --traceback
      cellstore jobs --running --stage segment
    """
    chosen = [
        name for name, on in (("failed", failed), ("running", running), ("pending", pending)) if on
    ]
    if len(chosen) > 1:
        raise typer.BadParameter("Choose one of --failed, --running and --pending.")
    status = chosen[0] if chosen else None
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.jobs(
            stage=stage.value if stage else None,
            status=status,
            recipe=recipe,
            limit=limit if status or as_json else 0,
        )
    if as_json:
        render.as_json(result)
    elif status is None:
        _show_counts(result)
    else:
        _show_jobs(result, status, traceback=traceback)


def _show_counts(result: JobsList) -> None:
    if not result.counts:
        typer.echo("No image has been worked on yet. Begin with: cellstore segment")
        return
    headers = ("recipe", "stage", "pending", "running", "done", "failed", "s/image")
    render.table(
        headers,
        [
            (c.recipe_id, c.stage, c.pending, c.running, c.done, c.failed, c.seconds)
            for c in result.counts
        ],
    )
    if any(count.failed for count in result.counts):
        say("See why with: cellstore jobs --failed. Try again with: cellstore retry")


def _show_jobs(result: JobsList, status: str, *, traceback: bool) -> None:
    if not result.jobs:
        typer.echo(f"No job is {status}." if status != "failed" else "No image has failed.")
        return
    if status == "failed":
        for job in result.jobs:
            _show_failed(job, traceback=traceback)
        say("Try them again with: cellstore retry")
    elif status == "running":
        render.table(
            ("job", "stage", "image", "worker", "tries", "lease s"),
            [(j.job_id, j.stage, j.image, j.worker, j.attempts, j.lease) for j in result.jobs],
        )
    else:
        render.table(
            ("job", "stage", "image", "tries", "next try in s", "last error"),
            [(j.job_id, j.stage, j.image, j.attempts, j.wait, j.reason) for j in result.jobs],
        )
    if result.more:
        typer.echo(f"and {result.more:,} more (see --limit)")


def _show_failed(job: JobRow, *, traceback: bool) -> None:
    tries = render.count(job.attempts, "try", "tries")
    typer.echo(f"{job.stage} (recipe {job.recipe_id}) {render.cell(job.image)}, {tries}:")
    lines = (job.error or "").splitlines() if traceback else [job.reason or "no reason was kept"]
    for line in lines:
        typer.echo(f"  {render.cell(line)}")


@sentences
def retry(
    ctx: typer.Context,
    stage: StageOption = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Only what failed in this run.", show_default=False),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="Only this image: core file name, PLATE/WELL/SITE, file name or id.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give images that failed another try.

    Opens their jobs again; the command of the stage then does them. Its words are shown.

    \b
    Example:
      cellstore retry
      cellstore retry --stage segment --image P1/A01/2
    """
    with open_store(ctx, store, quiet=True) as opened:
        result = opened.retry(stage=stage.value if stage else None, run=run, image=image)
    if as_json:
        render.as_json(result)
        return
    if not result.jobs:
        typer.echo("No image has failed.")
        return
    typer.echo(f"{render.count(result.jobs, 'job is', 'jobs are')} open again. Now run:")
    for command in result.commands:
        typer.echo(f"  {render.cell(command)}")


@sentences
def cancel(
    ctx: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", help="The run. Default: all that are running.", show_default=False
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask running commands to end, here or on other machines.

    They finish the images in hand, within seconds begin no new ones, and end. A training ends
    at once, and keeps its last whole epoch. What is done is kept; the same command goes on later.

    \b
    Example:
      cellstore cancel
      cellstore cancel 12
    """
    with open_store(ctx, store, quiet=True) as opened:
        runs = opened.cancel(run)
    if as_json:
        render.as_json({"cancelled": runs})
    elif runs:
        typer.echo(f"Cancelled: run {', '.join(map(str, runs))}")
    else:
        typer.echo("Nothing is running.")
