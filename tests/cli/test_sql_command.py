"""sql: questions in, answers out, in four shapes, and nothing else."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
import python_calamine

COUNT = (
    "SELECT t.name AS treatment, count(*) AS wells FROM wells "
    "JOIN treatments t ON t.id = treatment_id GROUP BY 1 ORDER BY 1"
)
ROWS = [("DMSO", 2), ("aspirin", 2), ("taxol", 2)]


def test_a_table_for_people(cellstore, store):
    lines = cellstore("sql", COUNT, "--store", store).out.splitlines()
    assert lines == [
        "treatment  wells",
        "---------  -----",
        *(f"{name:<9}  {number:>5}" for name, number in ROWS),
    ]


def test_json_and_csv_for_programs(cellstore, store):
    wanted = [{"treatment": name, "wells": number} for name, number in ROWS]
    assert cellstore("sql", COUNT, "--json", "--store", store).json == wanted
    assert cellstore("sql", COUNT, "--format", "json", "--store", store).json == wanted
    text = cellstore("sql", COUNT, "--format", "csv", "--store", store).out
    assert [tuple(row.values()) for row in csv.DictReader(io.StringIO(text))] == [
        (name, str(number)) for name, number in ROWS
    ]


def test_parquet_goes_to_a_file(cellstore, store, tmp_path):
    said = cellstore("sql", COUNT, "--format", "parquet", "--store", store, code=2)
    assert "--output" in said.err
    target = tmp_path / "answer.parquet"
    cellstore("sql", COUNT, "--format", "parquet", "--output", target, "--store", store)
    (entry,) = cellstore("log", "--limit", "1", "--store", store, "--json").json["entries"]
    assert entry["changes"] == [f"wrote {target.resolve()}"]
    assert pyarrow.parquet.read_table(target).num_rows == 3


def test_excel_goes_to_a_file_that_reads_back(cellstore, store, tmp_path):
    folder, at = tmp_path / "answers", ("--store", store)
    folder.mkdir()
    odd = (
        f"SELECT '=1+1' AS formula, 1.5 AS x, {1 << 60} AS large, [1, 2] AS a, NULL AS n, true AS t"
    )
    said = cellstore("sql", odd, "--output", folder / "a.xlsx", *at)
    assert "1 row written" in said.err
    sheet = python_calamine.load_workbook(folder / "a.xlsx").get_sheet_by_name("answer")
    assert sheet.to_python() == [
        ["formula", "x", "large", "a", "n", "t"],
        ["=1+1", 1.5, str(1 << 60), "[1, 2]", "", True],
    ]
    # The ending says the format where none is asked for.
    cellstore("sql", COUNT, "--output", folder / "a.csv", *at)
    assert (folder / "a.csv").read_text().startswith('"treatment","wells"\n')
    assert "--output" in cellstore("sql", COUNT, "--format", "xlsx", *at, code=2).err
    wide = f"SELECT {', '.join(map(str, range(16_385)))}"
    for large in ("SELECT repeat('x', 40000) AS x", wide):
        said = cellstore("sql", large, "--output", folder / "b.xlsx", *at, code=2)
        assert "--format csv or parquet" in said.err
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "a.xlsx"]


def test_the_question_can_come_from_stdin(cellstore, store):
    assert cellstore("sql", "-", "--json", "--store", store, stdin="SELECT 1 AS one").json == [
        {"one": 1}
    ]


def test_odd_values_are_json(cellstore, store):
    query = "SELECT 'nan'::DOUBLE AS a, DATE '2026-01-02' AS b, 1.5::DECIMAL(3,1) AS c, NULL AS d"
    assert cellstore("sql", query, "--json", "--store", store).json == [
        {"a": None, "b": "2026-01-02", "c": 1.5, "d": None}
    ]


def test_two_columns_of_one_name_are_two(cellstore, store):
    out = cellstore("sql", "SELECT 1 AS x, 2 AS x", "--format", "csv", "--store", store).out
    assert out.splitlines()[1] == "1,2"


@pytest.mark.parametrize(
    "query",
    ["DELETE FROM wells", "COPY wells TO 'out.csv'", "SELEC 1", "SELECT * FROM nowhere", ""],
)
def test_what_is_no_question_is_refused_in_one_sentence(cellstore, store, tmp_path, query):
    said = cellstore("sql", query, "--store", store, code=2)
    assert said.err.startswith("Error: ")
    assert said.out == ""
    assert not (tmp_path / "out.csv").exists()
    assert cellstore("sql", "SELECT count(*) AS n FROM wells", "--json", "--store", store).json == [
        {"n": 6}
    ]


def test_control_characters_do_not_reach_the_terminal(cellstore, store):
    said = cellstore("sql", "SELECT chr(27) || '[31mred' AS text", "--store", store)
    assert "\x1b" not in said.out


SIGNALLED = """
import signal, threading, time
from cellstore_cli.app import run

def tell():
    for _ in range(60):
        before = set(threading.enumerate())
        time.sleep(0.5)
        still = before & set(threading.enumerate())
        if any(t.name.startswith("cellstore-question") for t in still):
            break
    print("asking", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the parent ignores it
threading.Thread(target=tell, daemon=True).start()
run()
"""
"""The command line, which says when a question has been going on for half a second."""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a single process")
def test_ctrl_c_ends_a_question(store):
    query = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"
    words = [sys.executable, "-c", SIGNALLED, "sql", query, "--store", str(store)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "asking\n"
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert time.monotonic() - began < 10
    assert said.startswith("Stopped.")
    assert "Traceback" not in said
    assert list(store.glob("cache/spill/*")) == []


def test_a_file_that_is_there_stays_and_folders_are_not_made(cellstore, store, tmp_path):
    target = tmp_path / "kept.csv"
    target.write_text("mine")
    words = ("sql", COUNT, "--format", "csv", "--store", store, "--output")
    assert "is there already" in cellstore(*words, target, code=2).err
    assert target.read_text() == "mine"
    cellstore(*words, target, "--replace")
    assert target.read_text() != "mine"
    assert "There is no folder" in cellstore(*words, tmp_path / "typo" / "x.csv", code=2).err
    assert not (tmp_path / "typo").exists()
    assert "is a folder" in cellstore(*words, tmp_path, code=2).err


@pytest.mark.parametrize("name", ["cellstore.toml", "cellstore.db", "artifacts/x", "cache/x"])
def test_no_answer_takes_the_place_of_a_part_of_the_store(cellstore, store, name):
    words = ("--format", "csv", "--store", store, "--replace", "--output", store / name)
    said = cellstore("sql", COUNT, *words, code=2)
    assert "is part of the store" in said.err
    cellstore("sql", COUNT, "--store", store)
