"""The command line: ``cellstore COMMAND``. Each command parses, makes one call, and prints.

Here are the commands, what becomes of their errors, and their options, which are made from the
fields of dataclasses; see :mod:`cellstore.config`.
"""

# No "from __future__ import annotations": the types of the fields are read.

import dataclasses
import gc
import inspect
import os
import re
import shlex
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from cellstore.config import (
    METAVARS,
    PRESETS,
    Field,
    Params,
    Sources,
    flag,
    option,
    option_of,
    options_of,
    type_of,
    typed_value,
)
from cellstore.errors import CellstoreError, StoreNotFoundError, UserInputError
from cellstore.settings import Progress
from cellstore.store import Store

from .output import Bar, Notes, filled, print_json, say

T = TypeVar("T")

MODULES = {
    name: module
    for module, names in (
        ("setup_commands", "demo init"),
        ("ingest_commands", "ingest refresh relocate"),
        ("image_commands", "segment finetune napari measure qc"),
        ("hit_commands", "profile hits"),
        ("split_commands", "split"),
        ("train_commands", "train predict predictions embeddings apply embed export-model"),
        ("answer_commands", "votes report runs compare"),
        ("audit_commands", "audit log repro"),
        ("correction_commands", "rename relabel annotate exclude include undo delete"),
        ("question_commands", "explore ask sql schema export"),
        ("job_commands", "status jobs retry cancel verify seal doctor"),
        ("setup_commands", "backup restore db"),
    )
    for name in names.split()
}
"""Where each command is, in the order in which a screen needs them."""

ONLY_SHOWN = {"dry_run", "preview", "listed"}
"""Options by which a command changes nothing."""

STORE_HELP = "The folder of the store. Default: $CELLSTORE_STORE, else this folder or one above it."
ENV_DEBUG = "CELLSTORE_DEBUG"
STOPPED = 130


class Commands(TyperGroup):
    """Loads the module of a command when the command is needed; its errors become sentences."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(MODULES)  # names only, in this order

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
            Path.cwd()
        except OSError:
            _end("Error: The folder that you are in was deleted. Go to another one: cd", 2)
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
                _suggest(error)
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
                70,
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
    store: Annotated[Path | None, typer.Option("--store", metavar="DIR", help=STORE_HELP)] = None,
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
    finally:
        gc.freeze()  # Python looks through them once more when it ends: 0.1 s


@dataclass(frozen=True)
class Common:
    """The options of every command. ``typed``: the names of all options that were typed."""

    store: Path | None = option(None, STORE_HELP, metavar="DIR")
    as_json: bool = option(
        False, "Print JSON for programs instead of text for people.", name="--json"
    )
    typed: frozenset[str] = frozenset()

    def open(self) -> Store:
        """Open the store, with a progress bar unless JSON is wanted."""
        shown = Bar() if sys.stderr.isatty() else Notes()
        store = Store.open(self.store, progress=Progress() if self.as_json else shown)
        if store.workspace.settings.root.stat().st_mode & stat.S_IWGRP:
            # People share it: what this command writes is for the others of the group, too.
            os.umask(os.umask(0o077) & ~0o070)
        return store

    def show(self, result: T, as_text: Callable[[T], None]) -> None:
        """Print a result: as JSON, if that is wanted, else by ``as_text``, and its notes."""
        if self.as_json:
            print_json(result)
            return
        as_text(result)
        say(*map(filled, getattr(result, "notes", ())))
        if getattr(result, "dry_run", False):
            say("Nothing was written: this was a dry run.")


def _suggest(error: Any) -> None:
    """Add the choice that was meant to the error about a value that is none of the choices."""
    choices = getattr(getattr(getattr(error, "param", None), "type", None), "choices", ())
    typed = re.match(r"'(.*)' is not one of", getattr(error, "message", ""))
    if choices and typed and (near := get_close_matches(typed[1].lower(), choices, 1)):
        error.message += f" Did you mean {near[0]}?"


def confirm(question: str) -> None:
    """Ask before something is deleted; the command ends with 1 at a no."""
    if not typer.confirm(question, err=True):
        say("Nothing was deleted.")
        raise typer.Exit(1)


def say_next(steps: Sequence[str], common: Common) -> None:
    """Say what the next useful command is, with the store that was named."""
    named = "" if common.store is None else f" --store {shlex.quote(str(common.store))}"
    for start, step in zip(("Next: ", "  or: "), steps, strict=False):
        typed, hint, why = step.partition("  (")
        # As one line: two would be two commands to who pastes them.
        typer.echo(start + typed.replace("cellstore", f"cellstore{named}", 1), err=True)
        if hint:
            say(filled(f"({why}", " " * len(start)))


def _say_next_of_store(common: Common, done: str) -> None:
    """Name the next useful steps of the store, but for the command that is ``done``."""
    from cellstore.stages.status import next_step

    try:
        with common.open() as store, store.workspace.database.read() as session:
            steps = next_step(session)
    except StoreNotFoundError:  # of doctor, which needs none
        steps = "cellstore init DIR", "cellstore demo"
    say_next([step for step in steps if step.partition("  (")[0] != done], common)


def command(
    app: typer.Typer,
    name: str,
    show: Callable[[T], None] | None = None,
    failed: Callable[[T], int] | None = None,
    *,
    then: bool | Callable[[T], Sequence[str]] = False,
    **more: Any,
) -> Callable[[Callable[..., T | None]], Callable[..., T | None]]:
    """Register a function as a command; ``show`` prints what it returns, if JSON is not wanted.

    ``failed`` returns the exit code for it; 0: all is well.

    A parameter whose type is a dataclass becomes an option for each of its fields, and the
    function gets the filled object. One whose default is an ``option`` becomes that option.
    Options that were not typed are filled in by ``--preset``, if the command has that, else by the
    defaults of the dataclass. A parameter of type ``Store`` gets the open store, and every command
    has the options of :class:`Common`. ``then``: it ends with the next useful step of the store, or
    those that this function returns for the result.
    """

    def register(function: Callable[..., T | None]) -> Callable[..., T | None]:
        app.command(name, cls=Sectioned, **more)(_with_options(function, show, failed, then=then))
        return function

    return register


def _with_options(
    function: Callable[..., T | None],
    show: Callable[[T], None] | None,
    failed: Callable[[T], int] | None,
    *,
    then: bool | Callable[[T], Sequence[str]],
) -> Callable[..., None]:
    function.__annotations__.pop("return", None)  # often not imported, but for mypy
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    alone: dict[str, Field] = {}
    shown: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if isinstance(parameter.default, dataclasses.Field):
            item = copy(parameter.default)
            item.name, item.type = parameter.name, kind
            alone[parameter.name] = item
            shown[parameter.name] = _parameter(item)
        elif kind in (typer.Context, Common, Store):
            continue
        elif is_dataclass(kind):
            groups[parameter.name] = kind
            for item in options_of(kind):
                shown.setdefault(item.name, _parameter(item))
        else:
            for setting in getattr(kind, "__metadata__", ()):
                if parameter.default in (None, parameter.empty):
                    setting.show_default = False
            shown[parameter.name] = parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY)
    shown |= {item.name: _parameter(item) for item in options_of(Common)}  # last in the help

    @wraps(function)
    def run_command(context: typer.Context, **values: Any) -> None:
        typed = set()
        for name in values:
            source = context.get_parameter_source(name)
            if source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
                typed.add(name)
        arguments = {name: value for name, value in values.items() if name in hints}
        folder = values["store"] if "store" in typed else context.find_root().params.get("store")
        # Typer leaves the option before a command as it was typed.
        common = Common(
            None if folder is None else Path(folder), values["as_json"], frozenset(typed)
        )
        for name, item in alone.items():
            arguments[name] = typed_value(item, values[name]) if name in typed else item.default
        for name, kind in groups.items():
            mine = [item for item in options_of(kind) if item.name in typed]
            given = {item.name: typed_value(item, values[item.name]) for item in mine}
            if issubclass(kind, Params):
                params = kind.of(values.get("preset"), **given)
                open_options = options_of(params)
                settled = [flag(item) for item in mine if item not in open_options]
                if settled:
                    raise UserInputError(
                        f"The other options decide this already: remove {' and '.join(settled)}."
                    )
                arguments[name] = params
            else:
                arguments[name] = kind(**given)
        with ExitStack() as stack:
            for name, kind in hints.items():
                if kind is typer.Context:
                    arguments[name] = context
                elif kind is Common:
                    arguments[name] = common
                elif kind is Store:
                    arguments[name] = stack.enter_context(common.open())
            result = function(**arguments)
            if result is not None and show is not None:
                common.show(result, show)
        if result is not None and failed is not None and (code := failed(result)):
            raise typer.Exit(int(code))
        if callable(then):
            if result is not None and not common.as_json:
                say_next(then(result), common)
        elif then and not common.as_json and not typed & ONLY_SHOWN:
            _say_next_of_store(common, f"cellstore {context.info_name}")

    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    every = [context, *sorted(shown.values(), key=lambda item: item.name != "preset")]
    run_command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run_command.__annotations__ = {item.name: item.annotation for item in every}
    return run_command


def _parameter(item: Field) -> inspect.Parameter:
    kind, known = type_of(item), item.metadata
    default: Any = item.default
    names, metavar = [flag(item)], known["metavar"]
    if metavar is None and not (kind is str and known["choices"]):
        metavar = METAVARS.get(kind)
    if known["negatable"]:
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    if get_origin(kind) is tuple:
        kind, default = list[str], list(default or ()) or None
    elif known["nothing"]:
        kind = Literal.__getitem__((*(word.value for word in kind), known["nothing"]))
        default = known["nothing"] if default is None else default.value
    elif known["choices"]:
        kind = Literal.__getitem__(tuple(known["choices"]))
    # Typer knows no ranges whose ends do not belong to them, so that the help has to say it.
    bounds = [f"{name} {known[name]:g}" for name in ("above", "below") if known[name] is not None]
    text = f"{known['help']} {' and '.join(bounds).capitalize()}." if bounds else known["help"]
    setting = typer.Option(
        *names,
        help=text,
        metavar=metavar,
        min=known["min"],
        max=known["max"],
        rich_help_panel=known["section"],
        show_default=default is not None,
    )
    optional: Any = kind if default is not None else kind | None
    annotation: Any = Annotated[optional, setting]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


class Sectioned(TyperCommand):
    """A command whose help lists its options by section, those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        params = self.get_params(ctx)
        sections = {getattr(p, "rich_help_panel", None) for p in params} - {None}
        parts: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for param in params:
            title = getattr(param, "rich_help_panel", None) if len(sections) > 1 else None
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            parts.setdefault(title or kind, []).append(param)
        for title, members in parts.items():
            records = [record for p in members if (record := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


# Options of several commands.
DEVICE = option(
    "auto",
    "Where the network runs; auto takes a GPU if it can.",
    choices=("auto", "cpu", "cuda"),
)
SEGMENTATION = option_of(Sources, "segmentation")
MEASUREMENT = option_of(Sources, "measurement")
PRESET = option(
    None,
    "published: all values as in the published study. Other options then change single values.",
    metavar="|".join(PRESETS),
)
HTML = option(None, "Also write a page with pictures: one file that needs nothing else.")
