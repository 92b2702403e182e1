"""Runs of real stages are redone: by the printed commands, and beside the store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_training import TINY, Opener
from sqlalchemy import text
from typer.testing import CliRunner

from cellstore.config import HitsParams, MeasureParams, PredictParams, ProfileParams, SplitParams
from cellstore.jobs import execute, queue
from cellstore.jobs.workspace import Workspace
from cellstore.report.redo import Check
from cellstore.report.repro import repro
from cellstore.stages.predict import predict
from cellstore.store import Store
from cellstore_cli.app import app

TABULAR = replace(TINY, branches=("tabular",), epochs=3)


@pytest.fixture(scope="module")
def done(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A store with a run of each stage that can be redone; the tests only read it."""
    import shutil

    root = tmp_path_factory.mktemp("done") / "store"
    shutil.copytree(built, root)
    with Store.open(root) as store:
        store.measure(MeasureParams(features=("intensity",)))
        store.train(TABULAR, device="cpu")
        predict(store.workspace, PredictParams(top_k=2), device="cpu")
        store.train_baselines(["logistic"])
        store.create_folds("folds", SplitParams(folds=3, validation_size=0.0))
        for well in ("P1/A01", "P1/A03", "P1/A05"):
            store.relabel(well, control="negative", reason="DMSO")
        store.profile(ProfileParams(select=(), features="intensity"))
        store.hits(HitsParams(permutations=100))
        yield store.workspace


def contents(workspace: Workspace) -> dict[str, Any]:
    """The bytes of the database as SQL, and the files with their times."""
    raw = workspace.database.engine.raw_connection()
    try:
        rows = list(raw.driver_connection.iterdump())  # type: ignore[union-attr]
    finally:
        raw.close()
    root = workspace.artifacts.root
    files = {path: (root / path).stat().st_mtime_ns for path in workspace.artifacts.walk()}
    return {"rows": rows, "files": files}


def checked(workspace: Workspace, run: str, **more: Any) -> Check:
    return Store(workspace).check_run(run, device="cpu", **more)


@pytest.mark.parametrize(
    ("run", "what"),
    [
        ("2", "measurements"),
        ("3", "members of the split"),
        ("4", "measurements"),  # of a set in files
        ("5", "checkpoints and metrics"),
        ("6", "predictions"),
        ("7", "checkpoints and metrics"),  # of a baseline
        ("8", "predictions"),
        ("9", "members of the split"),  # of each fold
        ("10", "values of profiles"),
        ("11", "scores"),
    ],
)
def test_a_run_comes_out_the_same_and_the_store_is_as_it_was(
    done: Workspace, run: str, what: str
) -> None:
    before = contents(done)
    found = checked(done, run)
    assert (found.outcome, found.differ, found.same_recipe) == ("identical", 0, True), found
    assert (found.what, found.reasons) == (what, [])
    assert found.compared > 0
    assert contents(done) == before


def test_a_part_of_the_images_of_a_run(done: Workspace) -> None:
    whole, part = checked(done, "6"), checked(done, "6", images=1)
    assert (part.outcome, part.reasons) == ("identical", [])
    assert part.compared * 2 == whole.compared


def test_the_printed_commands_find_everything_done(
    done: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of the chain has the recipe that the command's options come to."""
    monkeypatch.setenv("CELLSTORE_STORE", str(done.settings.root))
    before = contents(done)["rows"]
    spoken = {}
    for step in (step for run in ("6", "7", "9", "11") for step in repro(done, run).steps):
        if step.stage == "segment":
            continue  # its masks were made up by hand
        place = 2 if step.stage == "split" else 1
        words = [*step.words[:place], "--json", *step.words[place:]]
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 0, (step.words, said.output)
        spoken[step.run_id] = json.loads(said.stdout)
    assert spoken[2]["run_id"] is None  # nothing to measure
    assert spoken[3]["created"] is False
    assert (spoken[5]["run_id"], spoken[5]["already_done"]) == (5, True)
    assert (spoken[6]["run_id"], spoken[6]["done"]) == (6, 0)
    assert (spoken[7][0]["run_id"], spoken[7][0]["already_done"]) == (7, True)
    assert [split["created"] for split in spoken[9]] == [False] * 3
    assert (spoken[10]["run_id"], spoken[10]["already_done"]) == (10, True)
    assert (spoken[11]["run_id"], spoken[11]["already_done"]) == (11, True)
    assert contents(done)["rows"] == before


def test_the_script_names_the_run_that_it_trains(done: Workspace) -> None:
    script = repro(done, "6").script
    lines = script.replace("\\\n  ", "").splitlines()
    train = next(line for line in lines if line.startswith("run_5=$(cellstore train"))
    assert train.endswith("--json | number)")
    assert 'cellstore predict --run="$run_5" --subset=test --top-k=2' in lines
    for line in lines:
        if line.startswith("cellstore"):
            assert shlex.split(line)[0] == "cellstore"
    script = repro(done, "11").script.replace("\\\n  ", "")
    assert "\nrun_10=$(cellstore profile " in script
    assert '\ncellstore hits --profiles="$run_10" ' in script


def test_files_that_moved_are_the_reason(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(queue, "FIRST_WAIT", 0.01)
    workspace = opened(built)
    with workspace.database.begin() as session:
        session.execute(text("UPDATE folders SET uri = '/gone'"))
    found = checked(workspace, "2", images=1)
    assert found.outcome == "cannot be redone"
    assert any("/gone" in reason for reason in found.reasons)


def test_what_was_changed_by_hand_is_different(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    with workspace.database.begin() as session:
        session.execute(text("UPDATE features SET area = area + 1 WHERE cell_id = 1"))
    found = checked(workspace, "2", images=6)
    assert (found.outcome, found.differ) == ("different", 1)
    assert found.differences[0].startswith("area of cell 1: ")


def test_a_treatment_that_was_corrected_since_makes_another_split(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    with workspace.database.begin() as session:
        session.execute(text("UPDATE wells SET treatment_id = 1 WHERE id = 2"))
    found = checked(workspace, "3")
    assert (found.outcome, found.same_recipe) == ("different", False)
    assert "the images or treatments of the store are others than then" in found.reasons


def test_the_command_and_its_exit_codes(done: Workspace, tmp_path: Path) -> None:
    def said(*words: str) -> Any:
        return CliRunner().invoke(app, ["--store", str(done.settings.root), "repro", *words])

    same = said("3", "--check")
    assert (same.exit_code, "identical, bit for bit" in same.stdout) == (0, True)
    assert json.loads(said("3", "--check", "--json").stdout)["outcome"] == "identical"
    assert said("99", "--check").exit_code == 2
    assert said("3", "--images", "2").exit_code == 2
    path = tmp_path / "redo.sh"
    assert said("latest predict", "--output", str(path)).exit_code == 0
    assert path.read_text().startswith("#!/bin/sh\n")
    assert json.loads(said("6", "--json").stdout)["steps"][-1]["run_id"] == 6
