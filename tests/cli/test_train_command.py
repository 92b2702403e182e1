"""The command train: presets, going on with a run, and what is said of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cellstore_cli.app import app
from cellstore_cli.output import Notes, say

pytest.importorskip("torch")

QUICK = ("--features", "cp", "--epochs", 3, "--batch-size", 4, "--device", "cpu")
IN = ("--store", "store")


def test_the_help_lists_options_by_section(cellstore) -> None:
    said = cellstore("train", "--help").out
    titles = [line for line in said.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "Options:",
        "Which cells:",
        "The network:",
        "How it learns:",
        "How it is carried out:",
        "Instead of a network:",
    ]
    from typer.main import get_command

    command = get_command(app).get_command(None, "train")
    for option in (name for param in command.params for name in param.opts):
        assert option in said


@pytest.mark.heavy
def test_a_run_that_was_stopped_is_resumed_by_the_same_command(
    cellstore, with_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Notes, text: str) -> None:
        if text.startswith("epoch "):
            raise KeyboardInterrupt
        say(text)

    with monkeypatch.context() as patched:
        patched.setattr(Notes, "note", stop)
        stopped = cellstore("train", *QUICK, *IN, code=130)
    assert "The same command goes on after the last whole epoch." in stopped.err
    trained = cellstore("train", *QUICK, *IN)
    found = re.match(r"Run (\d+) was resumed after epoch 1\.", trained.out)
    assert found is not None
    table = trained.out.splitlines()[-5:]
    assert table[0].split("  ")[0].strip() == "epoch"
    assert [line.split()[0] for line in table[2:]] == ["1", "2", "3"]
    assert max(map(len, table)) <= 80
    assert f"run {found[1]} was trained with these" in cellstore("train", *QUICK, *IN).out
    told = cellstore("train", "--preset", "large", *IN, code=2).err
    assert told == "Error: Unknown preset 'large'. Known: published.\n"
