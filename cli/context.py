"""From the words of a command to an open store, and from errors to sentences."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import typer

from cellstore.errors import CellstoreError
from cellstore.progress import Silent

if TYPE_CHECKING:
    from cellstore.progress import Progress
    from cellstore.store import Store

ENV_DEBUG = "CELLSTORE_DEBUG"
STOPPED = 130
UNEXPECTED = 70

P = ParamSpec("P")


def say(text: str) -> None:
    """Tell a person something, beside the data on stdout."""
    typer.echo(text, err=True)


def chosen_store(ctx: typer.Context, given: Path | None) -> Path | None:
    """Return the folder of ``--store``: from after the command, else the nearest before it."""
    here: Any = ctx
    while given is None and here is not None:
        given, here = here.params.get("store"), here.parent
    return given


@contextmanager
def open_store(ctx: typer.Context, given: Path | None, *, quiet: bool = False) -> Iterator[Store]:
    """Open the store that a command is about, with a progress bar unless ``quiet``."""
    from cellstore.store import Store

    with Store.open(chosen_store(ctx, given), progress=listener(quiet=quiet)) as store:
        yield store


def listener(*, quiet: bool) -> Progress:
    """Return what shows progress: a bar on a terminal, elsewhere only what is worth a line."""
    if quiet:
        return Silent()
    if not sys.stderr.isatty():
        return _Notes()
    from .progress import Bar

    return Bar()


class _Notes(Silent):
    """Writes the notes to stderr, for logs and pipes, and draws no bar."""

    def note(self, text: str) -> None:
        """Write one line."""
        say(text)


def sentences(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors of a command into one sentence and an exit code."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _end("Stopped. What is done is kept; run the same command again to go on.", STOPPED)
        except CellstoreError as error:
            _end(f"Error: {error}", error.exit_code)
        except Exception as error:
            _end_unexpected(error)

    return wrapped


def _end_unexpected(error: Exception) -> NoReturn:
    if isinstance(error, typer.Exit | typer.Abort | BrokenPipeError) or _of_typer(error):
        raise error
    if _is_of_database(error):
        _end(f"Error: The database failed: {_first_line(error)}.", 2)
    _end(
        f"Error: Something unexpected happened ({type(error).__name__}: {_first_line(error)}). "
        f"Set {ENV_DEBUG}=1 and run the same command again to see where, then please report it.",
        UNEXPECTED,
    )


def _of_typer(error: Exception) -> bool:
    return hasattr(error, "format_message")


def _is_of_database(error: Exception) -> bool:
    module = sys.modules.get("sqlalchemy.exc")
    return module is not None and isinstance(error, module.OperationalError)


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no reason given"


def _end(text: str, code: int) -> NoReturn:
    if os.environ.get(ENV_DEBUG):
        traceback.print_exc()
    say(text)
    raise typer.Exit(code)
