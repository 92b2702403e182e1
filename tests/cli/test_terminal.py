"""Tables on a terminal of 80 columns: no line is longer, and plates can be told apart."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from itertools import pairwise

import pytest
from screens import small_screen
from typer.main import get_command

from cellstore.jobs.workspace import Workspace
from cellstore_cli.app import app

pty = pytest.importorskip("pty", reason="pseudo terminals are a matter of Unix")

LONG = ("BR00116991-repeat-1", "BR00116991-repeat-2")
COMMANDS = """
status
ask
ask accuracy
ask plates
ask splits
ask treatments
ask votes
sql FROM\tcell_table
sql FROM\tprediction_table
sql FROM\timage_table
schema
schema prediction_table
audit image BR1/B01/1
audit well BR1/B01
audit cell 3
audit run
votes
votes --level well
report
runs
jobs
split list
split show main
split check main
measure --list
"""


def on_terminal(words: list[str]) -> tuple[int, list[str]]:
    """Run a command with a pseudo terminal as its stdout; its exit code and its lines."""
    reader, writer = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux ends a terminal
            while chunk := os.read(reader, 65536):
                chunks.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    code: object = 0
    with (
        os.fdopen(writer, "w", encoding="utf-8") as screen,
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            get_command(app).main(words, prog_name="cellstore")
        except SystemExit as end:
            code = end.code
    thread.join()
    os.close(reader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
    return int(str(code or 0)), re.split(r"[\r\n]+", text)


@pytest.fixture
def root(sqlite_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with every kind of row, and two plates with long barcodes."""
    screen = small_screen(sqlite_workspace)
    for barcode in LONG:
        well = screen.factory.well(screen.factory.plate(barcode), 2, 2)
        screen.factory.image(well)
    monkeypatch.setenv("COLUMNS", "80")
    return str(sqlite_workspace.settings.root)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
def test_no_line_is_longer_than_the_terminal(root: str) -> None:
    for line in COMMANDS.strip().splitlines():
        words = [word.replace("\t", " ") for word in line.split(" ")]
        code, lines = on_terminal(["--store", root, *words])
        assert code in (0, 1), (line, lines)
        assert any(lines), line
        long = [text for text in lines if len(text) > 80 and root not in text]
        assert not long, (line, long)  # but for the folder of the store, which is no table


def test_columns_are_dropped_before_names_become_the_same(root: str) -> None:
    query = "SELECT p.barcode, r.* FROM plates AS p CROSS JOIN runs AS r ORDER BY r.id, p.id"
    _, lines = on_terminal(["--store", root, "sql", query])
    assert any(line.startswith("Columns not shown: ") for line in lines)
    ways = pairwise(lines)
    shown = {a.split()[0] + b.split()[0] for a, b in ways if a.startswith("BR0")}
    assert shown == set(LONG)
