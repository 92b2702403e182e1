"""The command line: ``cellstore COMMAND``. Each command is parse, one call, render."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import (
    answers,
    asks,
    audits,
    baselines,
    compare,
    exports,
    finetune,
    house,
    images,
    ingest,
    jobs,
    measuring,
    networks,
    predictions,
    quality,
    questions,
    repros,
    setup,
    splits,
    votes,
)
from .context import STOPPED
from .options import StoreOption
from .train_options import Sectioned

ORDER = (
    *("demo", "init", "ingest", "refresh", "segment", "finetune", "measure", "qc", "contrast"),
    *(
        "split",
        "train",
        "predict",
        "export-model",
        "votes",
        "report",
        "compare",
        "audit",
        "repro",
        "ask",
        "sql",
        "schema",
        "export",
        "status",
    ),
    *("jobs", "retry", "cancel", "verify", "doctor", "db"),
)


class Commands(TyperGroup):
    """Lists the commands in the order in which a screen needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, those not in ``ORDER`` last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="cellstore",
    cls=Commands,
    help="The experiment store of an image-based drug screen.\n\n"
    "Every stage of the screen in one database: plates and images, the cells found in them, "
    "their measurements, splits, trained networks, and what each network said about every cell.",
    epilog="First steps: cellstore demo. Help on a command: cellstore COMMAND --help",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from cellstore import __version__

        typer.echo(f"cellstore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    store: StoreOption = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Take what stands before the command."""


app.command("init")(setup.init)
app.command("ingest")(ingest.ingest)
app.command("refresh")(ingest.refresh)
app.command("segment")(images.segment)
app.command("measure")(measuring.measure)
app.command("qc")(quality.qc)
app.add_typer(splits.app, name="split")
app.command("contrast")(baselines.contrast)
app.command("train", cls=Sectioned)(networks.train)
app.command("predict")(predictions.predict)
app.command("export-model")(predictions.export_model)
app.command("finetune")(finetune.finetune)
app.command("votes")(votes.votes)
app.command("report")(answers.report)
app.command("compare")(compare.compare)
app.add_typer(audits.app, name="audit")
app.command("repro")(repros.repro)
app.command("ask", context_settings=asks.OWN)(asks.ask)
app.command("sql")(questions.sql)
app.command("schema")(questions.schema)
app.command("export")(exports.export)
app.command("status")(house.status)
app.command("jobs")(jobs.jobs)
app.command("retry")(jobs.retry)
app.command("cancel")(jobs.cancel)
app.command("verify")(house.verify)
app.command("doctor")(house.doctor)
app.command("demo")(house.demo)
app.add_typer(setup.db, name="db")


def run() -> None:
    """Run the command line; the console script ``cellstore``."""
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:
            _leave_at_once()
        raise


def _leave_at_once() -> None:
    """End a command that was stopped: what it dropped may still be at work in a thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED)
