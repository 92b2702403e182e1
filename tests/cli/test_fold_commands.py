"""Trainings on a cross-validation: every fold one after the other, reported as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_screen
from foreign_cells import add_foreign_cells, by_id

from cellstore.config import IngestParams
from cellstore.store import Store
from cellstore_cli.output import Notes

pytest.importorskip("torch")

QUICK = ("--features", "cp", "--epochs", 2, "--batch-size", 4, "--device", "cpu")
IN = ("--store", "store")


@pytest.fixture
def cv(cellstore, tmp_path: Path) -> str:
    """A screen of eight wells of two treatments with 3 cells in each image, in two folds."""
    table = write_screen(tmp_path / "screen", ["DMSO", "taxol"] * 4, sites=1)
    with Store.create(tmp_path / "store") as made:
        made.ingest(table, IngestParams(images=table.parent / "images"))
    add_foreign_cells(Path("store"), 3, by_id)
    cellstore("split", "create", "cv", "--folds", 2, "--validation-size", 0, *IN)
    return "cv"


def test_baselines_of_all_folds_are_one_report(cellstore, cv: str) -> None:
    said = cellstore("train", "--split", cv, "--baseline", "majority,logistic", *QUICK[:2], *IN)
    assert "All folds as one: cellstore report --run cv:majority" in said.err
    made = cellstore(
        "train", "--split", cv, "--baseline", "majority,logistic", *QUICK[:2], *IN, "--json"
    ).json
    assert [(item["split"], item["baseline"]) for item in made] == [
        (fold, kind) for fold in ("cv-1", "cv-2") for kind in ("majority", "logistic")
    ]
    assert all(item["already_done"] for item in made)
    found = cellstore("report", "--run", "cv:logistic", *IN, "--json").json
    folds = [item["predict_run_id"] for item in made if item["baseline"] == "logistic"]
    assert (found["folds"], found["images"], found["wells"]) == (folds, 8, 8)
    each = [cellstore("report", "--run", run, *IN, "--json").json for run in folds]
    for score in found["scores"]:
        own = [s for one in each for s in one["scores"]
               if (s["level"], s["vote"]) == (score["level"], score["vote"])]  # fmt: skip
        assert score["n"] == sum(s["n"] for s in own)
        assert score["correct"] == sum(s["correct"] for s in own)
    assert found["scores"][0]["low"] is not None  # 8 wells, though 4 in each fold
    assert [(i["baseline"], i["n"]) for i in found["baselines"] if i["level"] == "image"] == [
        ("majority", 8)
    ]
    text = cellstore("compare", "cv:logistic", "cv:majority", *IN).out
    assert "8 images of 8 wells that both have labelled" in text
    page = cellstore("report", "--run", "cv:logistic", "--html", "page.html", *IN)
    assert max(map(len, page.out.splitlines())) <= 80
    assert "How good are the labels of run cv:logistic?" in Path("page.html").read_text("utf-8")
