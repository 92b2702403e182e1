"""Write docs/commands.md from the commands' own help: python docs/make_commands.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from cellstore_cli.app import app

TARGET = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Made from `cellstore COMMAND --help` by `make docs`; a test compares the two.

"""


def paths() -> Iterator[tuple[str, ...]]:
    """Yield every command as the words that call it, groups before what is in them."""
    yield from _below(typer.main.get_command(app), ())


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from _below(command.get_command(None, name), (*words, name))


def page() -> str:
    """Return the whole page."""
    return HEAD + "\n".join(_section(words) for words in paths())


def _section(words: tuple[str, ...]) -> str:
    title = " ".join(("cellstore", *words))
    environment = {name: "" for name in os.environ if name.startswith("CELLSTORE_")}
    wide = {**environment, "COLUMNS": "88", "TERMINAL_WIDTH": "88", "_TYPER_STANDARD_TRACEBACK": ""}
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="cellstore", env=wide)
    return f"## {title}\n\n```text\n{result.stdout.strip()}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
