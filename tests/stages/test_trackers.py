"""Trackers: what they are told, who resumes their run, and that none of them ends a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from killed_training import PARAMS
from small_training import Opener, StopsAfter
from sqlalchemy import select

from cellstore import Store
from cellstore.config import TrainSetup
from cellstore.enums import Stage
from cellstore.errors import MissingExtraError, UnknownNameError
from cellstore.learn import trackers
from cellstore.models import Run
from cellstore.stages.train import train


def test_a_tracker_that_is_not_installed_is_named_before_the_training(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    for kind in ("mlflow", "wandb"):
        with pytest.raises(MissingExtraError, match=f"pip install {kind}"):
            train(workspace, PARAMS, device="cpu", setup=TrainSetup(logs=(kind,)))
    with pytest.raises(UnknownNameError, match="Unknown name for --log 'csv'"):
        TrainSetup(logs=("csv",))
    with workspace.database.read() as session:
        assert session.scalars(select(Run.id).where(Run.stage == Stage.TRAIN)).all() == []


@pytest.mark.parametrize("fails_at", ["__init__", "write", "keep", "end"])
def test_a_tracker_that_fails_does_not_end_the_training(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Away:
        last, about = 0, {"run": "r1"}

        def __init__(self, *_: object) -> None:
            self.act("__init__")

        def act(self, name: str) -> None:
            if name == fails_at:
                raise ConnectionError("http://me:secret@server is away")

        write = lambda self, *_: self.act("write")  # noqa: E731
        keep = lambda self, *_: self.act("keep")  # noqa: E731
        end = lambda self, **_: self.act("end")  # noqa: E731

    monkeypatch.setattr(trackers, "_KINDS", {"mlflow": Away})
    run = trackers.TrackedRun(7, tmp_path, {}, {})
    with trackers.Trackers(("mlflow",), run, {}, told.append) as found:
        for epoch in (1, 2):
            found.write(epoch, {"train_loss": 1.0})
        found.keep([], {})
    assert told == ["The log for mlflow has ended: http://me:***@server is away"]
    assert found.ids == ({} if fails_at == "__init__" else {"mlflow": {"run": "r1"}})


@pytest.mark.filterwarnings("ignore")  # those of MLflow
def test_mlflow_is_told_all_and_a_resumed_training_goes_on_with_its_run(
    built: Path, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = opened(built)
    params, setup = (
        replace(PARAMS, epochs=3, branches=("tabular",)),
        TrainSetup(logs=("mlflow",), log_dir=tmp_path / "logs"),
    )
    with pytest.raises(KeyboardInterrupt):
        train(replace(workspace, progress=StopsAfter(2)), params, device="cpu", setup=setup)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "cellstore"]
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "FAILED"

    result = train(workspace, params, device="cpu", setup=setup)
    assert result.resumed_after == 2
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (stopped.info.run_id, "FINISHED")
    assert run.info.run_name == f"run {result.run_id}"
    for name in ("train_loss", "validation_accuracy", "waited"):
        history = client.get_metric_history(run.info.run_id, name)
        values = [(item.step, item.value) for item in history]
        assert values == [(row["epoch"], row[name]) for row in result.metrics]
    with workspace.database.read() as session:
        recipe = session.get_one(Run, result.run_id).recipe
        asked = {key: value for key, value in recipe.parameters.items() if key != "exclude_flagged"}
        told = run.data.params
        assert told.keys() == asked.keys()
        assert (told["backbone"], told["epochs"], told["augment"]) == (PARAMS.backbone, "3", "[]")
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("cellstore.")}
        assert tags["cellstore.recipe"] == recipe.fingerprint
    assert (tags["cellstore.run"], tags["cellstore.split"]) == (str(result.run_id), "by-well")
    assert (tags["cellstore.store"], tags["cellstore.database"]) == ("copy-0", "sqlite")
    best = result.metrics[result.best_epoch - 1]
    assert run.data.metrics["best_validation_loss"] == best["validation_loss"]
    files = [item.path for item in client.list_artifacts(run.info.run_id, "model")]
    assert f"model/{result.checkpoint_sha256}.safetensors" in files
    assert len(files) == 2
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == [
        "model",
        "recipe.json",
    ]

    assert result.trackers["mlflow"]["run"] == run.info.run_id
    audited = Store(workspace).audit(str(result.run_id), "run").record["result"]
    assert audited["trackers"] == result.trackers
    assert "link" not in result.trackers["mlflow"]


def test_weights_and_biases_is_told_without_a_network(
    built: Path, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path))
    setup = TrainSetup(logs=("wandb",), log_dir=tmp_path / "logs")
    params = replace(PARAMS, epochs=1, branches=("tabular",))
    result = train(opened(built), params, device="cpu", setup=setup)
    name = result.trackers["wandb"]["run"]
    (file,) = (tmp_path / "logs").rglob(f"offline-run-*/run-{name}.wandb")
    told = file.read_bytes()
    wanted = ("validation_loss", "backbone", "cellstore.recipe", "best_epoch")
    assert [word for word in wanted if word.encode() not in told] == []
    assert result.checkpoint_sha256.encode() in told
