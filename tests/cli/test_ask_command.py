"""ask, schema, and what else sql can do: files, parameters, large answers."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow.parquet
import pytest
from factories import Factory
from typer.testing import CliRunner

from cellstore.store import Store
from cellstore_cli.app import app

EVIL = ["=cmd()", "+1", "-1", "@x", "\tx", "<script>alert(1)</script>", "a\"b'c", "\x1b[31mred"]


def test_the_list_has_words_and_own_questions(cellstore, store):
    out = cellstore("ask", "--store", store).out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "accuracy" in out
    text = cellstore("ask", "plates", "--sql", "--store", store).out
    (store / "questions").mkdir()
    for name in ("mine", "plates"):
        (store / "questions" / f"{name}.sql").write_text(text)
    out = cellstore("ask", "--store", store).out
    assert "(yours)" in out
    names = {item["name"] for item in cellstore("ask", "--json", "--store", store).json}
    assert {"mine", "accuracy", "stale"} <= names


def test_a_saved_question_takes_values_in_any_order(cellstore, store):
    wanted = cellstore("ask", "few-cells", "--fewer-than", 5, "--json", "--store", store).json
    assert wanted == []
    for words in (("--fewer-than=5", "few-cells"), ("--fewer_than", "5", "few-cells")):
        assert cellstore("ask", *words, "--json", "--store", store).json == wanted
    rows = cellstore("ask", "plates", "--json", "--store", store).json
    assert rows == [
        {
            "plate": "P1",
            "batch": None,
            "wells": 6,
            "treatments": 3,
            "images": 12,
            "cells": 0,
            "excluded_images": 0,
            "excluded_cells": 0,
        }
    ]


def test_the_question_behind_a_name_can_be_read(cellstore, store):
    out = cellstore("ask", "accuracy", "--sql", "--store", store).out
    assert out.startswith("-- How often a predict run is right")
    assert "FROM accuracy" in out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("acuracy",), "accuracy"),
        (("accuracy", "votes"), "One question at a time"),
        (("--run", "3"), "of which question"),
        (("plates", "--for-spreadsheet"), "--format csv"),
    ],
)
def test_mistakes_are_sentences(cellstore, store, words, hint):
    said = cellstore("ask", *words, "--store", store, code=2)
    assert said.err.startswith("Error: ")
    assert hint in said.err


def test_schema_says_what_tables_and_columns_are(cellstore, store):
    out = cellstore("schema", "--store", store).out
    assert all(len(line) <= 80 for line in out.splitlines())
    out = cellstore("schema", "cells", "--store", store).out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "refers to" in out
    assert "Referred to by:" in out
    assert cellstore("schema", "cels", "--store", store, code=2).err.startswith("Error: Unknown")
    (cells,) = cellstore("schema", "cells", "--json", "--store", store).json
    assert cells["columns"][0]["name"] == "id"


def test_a_question_from_a_file_with_values(cellstore, store, tmp_path):
    file = tmp_path / "q.sql"
    file.write_text("-- Wells.\nSELECT name FROM wells WHERE name = $well AND 1 = $one ORDER BY 1")
    words = ("--file", file, "--param", "well=A02", "--param", "one=1", "--json")
    assert cellstore("sql", *words, "--store", store).json == [{"name": "A02"}]
    assert "one question" in cellstore("sql", "SELECT 1", *words, "--store", store, code=2).err
    assert "Example: cellstore sql" in cellstore("sql", "--store", store, code=2).err
    gone = cellstore("sql", "--file", tmp_path / "no.sql", "--store", store, code=2)
    assert "cannot be read" in gone.err


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("3", "INTEGER"), ("2.5", "DOUBLE"), ("true", "BOOLEAN"), ("A02", "VARCHAR"),
        ('"3"', "VARCHAR"), ("", "VARCHAR"), ("NaN", "VARCHAR"), ("[1,2]", "INTEGER[]"),
    ],
)  # fmt: skip
def test_values_have_the_type_that_they_look_like(cellstore, store, text, kind):
    query = "SELECT typeof($x) AS kind"
    said = cellstore("sql", query, "--param", f"x={text}", "--json", "--store", store)
    assert said.json == [{"kind": kind}]


def test_a_table_has_all_letters_whatever_the_terminal_knows(store):
    words = ["sql", "SELECT 'Δ µ' AS name", "--store", str(store)]
    result = CliRunner(charset="latin-1").invoke(app, words)
    assert result.exit_code == 0
    assert "Δ µ" in result.stdout_bytes.decode("utf-8")


def test_a_table_on_the_screen_ends_after_a_thousand_rows(cellstore, store):
    query = "SELECT range AS r FROM range(20000)"
    said = cellstore("sql", query, "--store", store)
    assert len(said.out.splitlines()) == 1002
    assert "first 1,000 rows" in said.err
    assert len(cellstore("sql", query, "--limit", 5, "--store", store).out.splitlines()) == 7
    said = cellstore("sql", query, "--format", "csv", "--store", store)
    assert len(said.out.splitlines()) == 20_001
    assert said.err == ""
    assert len(cellstore("sql", query, "--json", "--store", store).json) == 20_000


def test_an_answer_larger_than_memory_allows_is_written_as_it_comes(cellstore, store, tmp_path):
    target = tmp_path / "big.parquet"
    query = "SELECT range AS r, repeat('x', 100) AS t FROM range(3000000)"
    words = ("--format", "parquet", "--output", target, "--memory", 100)
    cellstore("sql", query, *words, "--store", store)
    assert pyarrow.parquet.read_metadata(target).num_rows == 3_000_000


def test_values_that_csv_does_not_know_are_json(cellstore, store):
    query = "SELECT [1, 2] AS a, {'x': 'é'} AS b, NULL AS c, 'ab'::BLOB AS d"
    out = cellstore("sql", query, "--format", "csv", "--store", store).out
    assert list(csv.reader(io.StringIO(out)))[1] == ["[1, 2]", '{"x": "é"}', "", "6162"]


def evil_names(store: Path) -> None:
    with Store.open(store) as opened:
        make = Factory(opened.workspace)
        plate = make.plate("EVIL")
        for column, name in enumerate(EVIL, start=1):
            make.image(make.well(plate, 1, column, make.treatment(name, target=name)))


def test_names_are_data_in_every_format(cellstore, store):
    evil_names(store)
    query = "SELECT name AS perturbation, target FROM treatments ORDER BY id"
    for words in (("sql", query), ("ask", "treatments")):
        column = "perturbation" if words[0] == "sql" else "name_with_dose"
        rows = cellstore(*words, "--json", "--store", store).json
        assert {row[column] for row in rows} >= set(EVIL)
        text = cellstore(*words, "--format", "csv", "--store", store).out
        read = list(csv.DictReader(io.StringIO(text, newline="")))
        assert {row[column] for row in read} >= set(EVIL)
        shown = cellstore(*words, "--store", store).out
        assert "\x1b" not in shown
        assert "\t" not in shown
        safe = cellstore(*words, "--format", "csv", "--for-spreadsheet", "--store", store).out
        for row in csv.DictReader(io.StringIO(safe, newline="")):
            assert not row[column].startswith(("=", "+", "-", "@", "\t"))


def test_a_column_cannot_be_named_into_the_terminal(cellstore, store):
    said = cellstore("sql", 'SELECT 1 AS "\x1b[31m"', "--store", store)
    assert "\x1b" not in said.out
    said = cellstore("sql", 'SELECT "\x1b[31m" FROM plates', "--store", store, code=2)
    assert "\x1b" not in said.err
