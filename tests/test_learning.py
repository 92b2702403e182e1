"""The whole pipeline learns what is there, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
from rendered import fill

from cellstore.analytics import open_questions
from cellstore.config import PredictParams, SplitParams, TrainParams
from cellstore.runs import Workspace
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train import train

CLASSES = 4
PARAMS = TrainParams(crop_size=32, batch_size=32, epochs=3, learning_rate=1e-3)


def image_accuracy(workspace: Workspace) -> tuple[float, float]:
    """Train and test by well; return image accuracy and the share of the largest test class."""
    create_split(workspace, "by-well", SplitParams(test_size=0.25, validation_size=0.25))
    train(workspace, PARAMS)
    predicted = predict(workspace, PredictParams())
    with open_questions(workspace) as questions:
        answer = questions.ask(
            "SELECT truth, correct FROM verdicts "
            "WHERE run_id = ? AND level = 'image' AND vote = 'soft'",
            [predicted.run_id],
        ).to_pylist()
    truths = [row["truth"] for row in answer]
    assert len(set(truths)) == CLASSES
    right = sum(row["correct"] for row in answer) / len(answer)
    return right, max(truths.count(truth) for truth in truths) / len(truths)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_treatments_are_told_apart_on_wells_never_seen(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sqlite_workspace, tmp_path / "demo", monkeypatch, effect=1.0, classes=CLASSES)
    accuracy, majority = image_accuracy(sqlite_workspace)
    assert accuracy >= majority + 0.4


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_without_an_effect_nothing_is_learned(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sqlite_workspace, tmp_path / "demo", monkeypatch, effect=0.0, classes=CLASSES)
    accuracy, majority = image_accuracy(sqlite_workspace)
    assert accuracy <= majority + 0.25
