"""Text for people: aligned, cut to the terminal, and never in the way of a pipe."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from cellstore.settings import Progress, track
from cellstore_cli import output
from cellstore_cli.output import Bar


def test_columns_are_aligned_numbers_to_the_right(capsys):
    output.table(("name", "n"), [("a", 5), ("bcdef", 10)])
    assert capsys.readouterr().out.splitlines() == [
        "name    n",
        "-----  --",
        "a       5",
        "bcdef  10",
    ]


def test_long_cells_go_on_in_the_next_line_where_there_is_no_room(capsys, monkeypatch):
    rows = [("x" * 100, 1), ("y" * 1000, 2)]
    output.table(("name", "n"), rows)
    assert "x" * 100 in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    output.table(("name", "n"), rows)
    cut = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in cut)
    assert "".join(line.split()[0] for line in cut[2:5]) == "x" * 100
    assert "…" in "".join(cut[5:])
    assert len(cut) == 5 + output.LINES


def test_sentences_and_values_are_wrapped_and_paths_are_not_cut(capsys):
    path = "/" + "long/" * 20
    output.pairs({"path": path, "n": 1234, "words": "word " * 30})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"path   {path}"
    assert "n      1,234" in lines
    assert all(len(line) <= 80 for line in lines if path not in line)


def test_a_table_without_rows_is_its_headers(capsys):
    output.table(("name", "n"), [])
    assert capsys.readouterr().out.splitlines() == ["name  n", "----  -"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.123456, "0.1235"), ("a\nb\x1b[31m", "a b [31m"), (True, "True"), (3, "3")],
)
def test_a_cell_is_one_line_without_control_characters(value, shown):
    assert output.cell(value) == shown


def test_numbers_that_are_none_are_null():
    assert output.json_value({"a": [math.nan, math.inf, 1.5]}) == {"a": [None, None, 1.5]}


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 images"), (1, "1 image"), (1234, "1,234 images")]
)
def test_counts_are_said_as_people_do(number, said):
    assert output.count(number, "image") == said


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    return text


def test_the_bar_shows_what_is_done_and_notes_above_it(screen):
    bar: Progress = Bar()
    assert list(track(bar, "segment", 3, "abc")) == ["a", "b", "c"]
    bar.start("outer", None)
    bar.start("inner", 2)
    bar.advance(2)
    bar.note("P1/r01c01f01: [red]not markup")
    bar.finish()
    bar.finish()
    shown = screen.getvalue()
    assert "segment" in shown
    assert "[red]not markup" in shown


def test_a_bar_that_was_not_started_is_harmless(screen):
    bar = Bar()
    bar.advance()
    bar.finish()
    assert screen.getvalue() == ""


def test_a_mistake_in_many_rows_is_said_once(capsys):
    wells = [(f"map.csv, line {n}", "not a well", f"'A1-{n}' is not a well.") for n in range(2, 50)]
    others = [("map.csv, line 60", "not a well", "the row names no well"), ("a", "dose", "no dose")]
    output.grouped([*wells, *others])
    assert capsys.readouterr().out.splitlines() == [
        "  not a well: 49 rows",
        "    map.csv, line 2: 'A1-2' is not a well. And 47 more like this.",
        "    map.csv, line 60: the row names no well",
        "  dose: 1 row",
        "    a: no dose",
    ]
