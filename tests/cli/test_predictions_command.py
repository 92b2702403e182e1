"""predict and export-model: what is asked, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_cells import add_foreign_cells, by_id

STORE = ("--store", "store")


@pytest.fixture
def trained(cellstore, store: Path) -> Path:
    """The small screen with cells of another tool, and a baseline that was trained on them."""
    pytest.importorskip("torch")
    add_foreign_cells(store, 2, by_id)
    cellstore("split", "create", "main", "--test-size", "0.5", "--validation-size", 0, *STORE)
    words = ("--baseline", "logistic", "--features", "cp", "--no-predict")
    cellstore("train", *words, *STORE)
    return store


def test_predict_says_what_it_did_and_what_the_model_has_met(cellstore, trained: Path):
    said = cellstore("predict", "--subset", "all", "--well", "A01", "--limit", 1, *STORE)
    facts = dict(line.split("  ", 1) for line in said.out.splitlines() if "  " in line)
    assert facts["images labelled"].strip() == "1"
    assert facts["cells labelled"].strip() == "2"
    words = ("--subset", "all", "--all-probabilities", "--where", "perturbation = 'taxol'")
    result = cellstore("predict", *words, "--json", *STORE).json
    assert (result["done"], result["cells"]) == (4, 8)
    assert [note for note in result["notes"] if "were used to train run" in note]
    count = cellstore("sql", "SELECT count(*) AS n FROM predictions", "--json", *STORE)
    assert count.json[0]["n"] == 2 * 3 + 8 * 3
    verified = cellstore("verify", "--json", *STORE, code=None).json
    # Of the cells of another tool, which the test wrote itself, without the triggers.
    made_by_hand = ("run ", "recipe ", "sqlite")
    wrong = [item for item in verified["problems"] if not item["path"].startswith(made_by_hand)]
    assert (wrong, verified["jobs"]) == ([], 5)


def test_embeddings_are_added_from_a_file(cellstore, trained: Path, tmp_path: Path):
    cellstore("export", "cells.csv", *STORE)
    header, *rows = Path("cells.csv").read_text(encoding="utf-8").splitlines()
    lines = [f"{row},{number / 4}" for number, row in enumerate(rows)]
    Path("more.csv").write_text("\n".join([f"{header},e0", *lines]), encoding="utf-8")
    words = ("embeddings", "add", "more.csv", "--name", "mine", *STORE)
    said = cellstore(*words)
    assert said.err.endswith("train --baseline probe --features mine\n")
    infinite = "\n".join([f"{header},e0", *lines[:2], f"{rows[2]},inf"])
    Path("odd.csv").write_text(infinite, encoding="utf-8")
    said_of_it = cellstore("embeddings", "add", "odd.csv", "--name", "odd", *STORE, code=2)
    assert "1 row of odd.csv cannot be used.\n  line 4: no number (" in said_of_it.err
    assert said_of_it.err.endswith(", e0 inf)\n")
    count = cellstore("sql", "SELECT count(e0) AS n FROM mine", "--json", *STORE)
    assert count.json[0]["n"] == len(rows)
    assert cellstore(*words).out.startswith("Nothing to do")
    said = cellstore("ingest", "more.csv", *STORE, code=2)
    assert "cellstore embeddings add more.csv --name NAME" in said.err


def test_a_table_of_predictions_is_added_or_its_lines_are_named(cellstore, trained: Path):
    asked = (
        "SELECT c.cell_id FROM cell_table AS c JOIN split_members AS m ON m.image_id = c.image_id "
        "WHERE m.subset = 'test' ORDER BY 1 LIMIT 2"
    )
    cells = cellstore("sql", asked, "--json", *STORE).json
    asked = "SELECT DISTINCT l.value AS label FROM split_members AS m JOIN labels AS l ON "
    asked += "l.id = m.label_id ORDER BY 1"
    names = [row["label"] for row in cellstore("sql", asked, "--json", *STORE).json]
    keys = [row["cell_id"] for row in cells]

    def table(file: str, columns: str, values: str) -> tuple[str, ...]:
        lines = [f"cell_id,{columns}", *(f"{key},{values}" for key in keys)]
        Path(file).write_text("\n".join(lines), encoding="utf-8")
        return ("predictions", "add", file, "--name", "mine", *STORE)

    said = cellstore(*table("other.csv", "label", "Taxxol"), code=2)
    assert "line 2: a class that is not in the split" in said.err
    assert said.err.endswith(f"The classes of the split: {', '.join(names)}\n")
    # A line with a column for each class is one row that cannot be used.
    wide = table("wide.csv", ",".join(names), ",".join(["0.9"] * len(names)))
    assert "Nothing was added: 2 rows of wide.csv" in cellstore(*wide, code=2).err
    said = cellstore(*table("good.csv", "label", names[0]))
    run = said.out.split()[1]
    assert said.err.splitlines()[-2:] == [
        f"Next: cellstore --store store report --run {run}",
        "  or: cellstore --store store runs --split main",
    ]


def test_mistakes_are_sentences(cellstore, trained: Path):
    said = cellstore("predict", "--embedding", "seen", *STORE, code=2)
    assert "is a baseline and has no embedding" in said.err
    said = cellstore("predict", "--top-k", 3, "--all-probabilities", *STORE, code=2)
    assert "remove --top-k" in said.err
    said = cellstore("predict", "--split", "nope", *STORE, code=2)
    assert "Unknown split 'nope'. Known: main" in said.err
    said = cellstore("predict", "--where", "colour = 1", *STORE, code=2)
    assert "colour" in said.err


def test_export_model_names_its_files(cellstore, trained: Path, tmp_path: Path):
    result = cellstore("export-model", "--output", "mine", "--json", *STORE).json
    assert result["model"] == "logistic"
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(result["files"])
    said = cellstore("export-model", "--output", "mine", *STORE, code=2)
    assert "mine is there already and not empty" in said.err
    assert "model.json" in cellstore("export-model", "--output", "other", *STORE).out
