"""The command line: ``cellstore COMMAND``. Each command parses, makes one call, and prints."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cellstore.errors import CellstoreError

from .output import say

MODULES = {
    "demo": "setup_commands",
    "init": "setup_commands",
    "ingest": "ingest_commands",
    "refresh": "ingest_commands",
    "segment": "image_commands",
    "finetune": "image_commands",
    "measure": "image_commands",
    "qc": "image_commands",
    "contrast": "train_commands",
    "split": "split_commands",
    "train": "train_commands",
    "predict": "train_commands",
    "export-model": "train_commands",
    "votes": "answer_commands",
    "report": "answer_commands",
    "compare": "answer_commands",
    "audit": "audit_commands",
    "repro": "audit_commands",
    "ask": "question_commands",
    "sql": "question_commands",
    "schema": "question_commands",
    "export": "question_commands",
    "status": "job_commands",
    "jobs": "job_commands",
    "retry": "job_commands",
    "cancel": "job_commands",
    "verify": "job_commands",
    "doctor": "job_commands",
    "db": "setup_commands",
}
"""Where each command is, in the order in which a screen needs them."""

ENV_DEBUG = "CELLSTORE_DEBUG"
STOPPED = 130
UNEXPECTED = 70


class Commands(TyperGroup):
    """Loads the module of a command when the command is needed; its errors become sentences."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(MODULES)  # names only; for suggestions

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; ``None``: there is none of that name."""
        if cmd_name not in MODULES:
            return None
        module = import_module(f".{MODULES[cmd_name]}", __package__)
        group: Any = typer.main.get_command(module.app)
        return group.commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an error becomes one sentence and an exit code."""
        if ctx.params["version"]:
            from cellstore import __version__

            typer.echo(f"cellstore {__version__}")
            raise typer.Exit
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _end("Stopped. What is done is kept; run the same command again to go on.", STOPPED)
        except CellstoreError as error:
            _end(f"Error: {error}", error.exit_code)
        except Exception as error:
            of_typer = isinstance(error, typer.Exit | typer.Abort)
            of_typer = of_typer or hasattr(error, "format_message")
            if of_typer or isinstance(error, BrokenPipeError):
                raise
            lines = str(getattr(error, "orig", None) or error).strip().splitlines()
            reason = lines[0].rstrip(".") if lines else "no reason given"
            database = sys.modules.get("sqlalchemy.exc")
            if database is not None and isinstance(error, database.OperationalError):
                _end(f"Error: The database failed: {reason}.", 2)
            _end(
                f"Error: Something unexpected happened ({type(error).__name__}: {reason}). "
                f"Set {ENV_DEBUG}=1 and run the same command again to see where, then please "
                "report it.",
                UNEXPECTED,
            )


app = typer.Typer(
    name="cellstore",
    cls=Commands,
    help="The experiment store of an image-based drug screen.\n\n"
    "Every stage of the screen in one database: plates and images, the cells found in them, "
    "their measurements, splits, trained networks, and the label of every cell by each network.",
    epilog="First steps: cellstore demo. Help on a command: cellstore COMMAND --help",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)


@app.callback()
def root(
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="DIR",
            help="The store. Default: $CELLSTORE_STORE, else the nearest folder upwards that is "
            "one.",
            show_default=False,
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Take what stands before the command."""


def _end(text: str, code: int) -> NoReturn:
    if os.environ.get(ENV_DEBUG):
        traceback.print_exc()
    say(text)
    raise typer.Exit(code)


def run() -> None:
    """Run the command line; the console script ``cellstore``."""
    # Modules make some hundred thousand objects that stay: looking through them again and again for
    # what can be dropped takes a tenth of the time of a small command.
    gc.set_threshold(50_000, 20, 20)
    try:
        app()
    except SystemExit as end:
        if end.code == STOPPED:
            # At once: what was dropped may still be at work in a thread.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)
        raise
