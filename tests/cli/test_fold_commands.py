"""Trainings on a cross-validation: every fold one after the other, reported as one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cellstore_cli.output import Notes

pytest.importorskip("torch")

QUICK = ("--features", "cp", "--epochs", 2, "--batch-size", 4, "--device", "cpu")
IN = ("--store", "store")


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
    listed = cellstore("runs", *IN)
    assert max(map(len, listed.out.splitlines())) <= 80
    models = {row["model"]: row for row in cellstore("runs", *IN, "--json").json["runs"]}
    first = next(iter(models.values()))["name"]
    assert listed.err.startswith(f"Next: cellstore --store store report --run {first}\n")
    assert models.keys() == {"logistic", "majority"}
    best = found["scores"][0]
    assert {name: models["logistic"][name] for name in ("accuracy", "low", "high")} == {
        name: best[name] for name in ("accuracy", "low", "high")
    }


def test_networks_of_all_folds_are_trained_labelled_and_scored(
    cellstore, cv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped in the second fold; the same command goes on.
    told: list[str] = []

    def stop(_: Notes, text: str) -> None:
        told.append(text)
        if sum(item.startswith("epoch ") for item in told) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Notes, "note", stop)
        cellstore("train", "--split", cv, *QUICK, *IN, code=130)
    assert told[0] == "fold 1 of 2: cv-1"
    assert told[1].startswith("epoch 1: loss ")
    assert "validation" not in told[1]
    assert any(item.startswith("fold 2 of 2: cv-2") for item in told)  # and how long it may take
    found = cellstore("train", *QUICK, *IN, "--json").json  # the latest split: all its folds
    first, second = found["folds"]
    assert (first["already_done"], first["split"], second["split"]) == (True, "cv-1", "cv-2")
    assert (second["resumed_after"], found["split"]) == (1, "cv")
    assert found["report"]["folds"] == [first["predict_run_id"], second["predict_run_id"]]
    assert (found["report"]["images"], found["report"]["wells_seen"]) == (8, 0)

    # No image validates: the epochs were given, and the last is kept.
    assert (first["validation_subset"], first["epochs"], first["best_epoch"]) == (None, 2, 2)
    assert "validation" not in first["images"]
    assert all("validation_loss" not in epoch for epoch in first["metrics"])
    sentence = "No image validates, so nothing stopped the training: its 2 epochs were given"
    assert any(note.startswith(sentence) for note in found["notes"])
    assert not any("Patience" in note for note in found["notes"])
    note = "nothing stopped its training, and the number of epochs (2) was given."
    assert any(item.endswith(note) for item in found["report"]["notes"])

    again = cellstore("train", "--split", cv, *QUICK, *IN)
    assert "Nothing to do: all folds were trained" in again.out
    assert max(map(len, again.out.splitlines())) <= 80
    assert "Out of fold: each image is scored once" in again.err
    page = ("--html", "page.html", *IN)
    cellstore("report", "--run", cv, *page)
    text = Path("page.html").read_text("utf-8")
    assert note in text
    assert "the last of the folds" in text
    assert "Run cv: image accuracy" in text
    assert "cellstore train --split=cv-2" in text
    several = cellstore("train", "--split", cv, *QUICK, "--devices", 2, *IN, code=2)
    assert "Train each with several: --split cv-1" in several.err
    patient = cellstore("train", "--split", "cv-1", *QUICK, "--patience", 3, *IN)
    assert "kept epoch" in patient.out

    # A sweep is a table: what docs/training.md asks.
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    (question,) = re.findall(r'cellstore sql "(SELECT run_id, parameters.*?)"', guide, re.DOTALL)
    rows = cellstore("sql", question.replace("by-well", "cv-1"), *IN, "--json").json
    assert [(row["run_id"], row["rate"]) for row in rows if row["accuracy"] is not None] == [
        (first["run_id"], "0.0005")
    ]
    assert len(rows) == 2
