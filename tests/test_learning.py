"""The whole pipeline learns what is there, and only that: on plates rendered for the purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cellstore import demo
from cellstore.analysis.rendering import TREATMENTS, PlateDesign
from cellstore.config import BaselineParams, IngestParams, MeasureParams, SplitParams, TrainParams
from cellstore.enums import GroupLevel
from cellstore.jobs.workspace import Workspace
from cellstore.learn.baselines import NULLS
from cellstore.report.scoring import Score, report
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.measure import measure
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train import train
from cellstore.stages.train_baselines import train_baselines

CHANCE = 1 / len(TREATMENTS)
PLATES = PlateDesign(
    plates=("P1", "P2", "P3", "P4"),
    treatments=TREATMENTS,
    control_wells=1,
    treated_wells=1,
    n_channels=3,
)
NETWORK = TrainParams.of(
    "published", branches=("tabular",), epochs=60, patience=20, batch_size=256, learning_rate=6e-3
)


def fill(workspace: Workspace, folder: Path, **changes: Any) -> TrainParams:
    """Four plates of twelve treatments with their true masks, measured; how to learn from them."""
    plates = demo.render_plates(folder, design=replace(PLATES, **changes))
    ingest(workspace, plates.metadata, IngestParams(images=plates.images))
    ingest(workspace, plates.truth, IngestParams(kind="masks"))
    measured = measure(workspace, MeasureParams(features=("intensity", "basic")))
    return replace(NETWORK, features=measured.feature_set)


def split(workspace: Workspace, level: GroupLevel) -> str:
    sizes = {"test_size": 0.25, "validation_size": 0.25}
    return create_split(workspace, level.value, SplitParams(group_level=level, **sizes)).name


def image_score(workspace: Workspace, run_id: int) -> Score:
    predicted = predict(workspace, run=str(run_id), device="cpu")
    return report(workspace, str(predicted.run_id)).score("image", "soft")


def interval(workspace: Workspace, params: TrainParams, level: GroupLevel) -> tuple[float, float]:
    trained = train(workspace, params, split=split(workspace, level), device="cpu")
    score = image_score(workspace, trained.run_id)
    assert score.low is not None
    assert score.high is not None
    return score.low, score.high


@pytest.mark.heavy
def test_treatments_are_told_apart_on_plates_never_seen(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    params = fill(sqlite_workspace, tmp_path / "set", size=160)
    by_plate = split(sqlite_workspace, GroupLevel.PLATE)
    trained = train(sqlite_workspace, params, split=by_plate, device="cpu")
    score = image_score(sqlite_workspace, trained.run_id)
    assert score.accuracy >= 0.8
    baselines = train_baselines(sqlite_workspace, NULLS, split=by_plate)
    found = {item.baseline: image_score(sqlite_workspace, item.run_id) for item in baselines}
    assert found.keys() == {"majority", "shuffled", "cellcount", "position"}
    # Some treatments kill cells, and their number alone tells a part.
    assert found["cellcount"].accuracy > 2 * CHANCE
    assert score.low is not None
    assert score.low > max(item.accuracy for item in found.values())


@pytest.mark.heavy
def test_without_an_effect_nothing_is_learned(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    params = fill(sqlite_workspace, tmp_path / "set", effect=0.0, size=112, sites=1)
    for level in (GroupLevel.WELL, GroupLevel.PLATE):
        low, high = interval(sqlite_workspace, params, level)
        assert low <= CHANCE <= high, level


@pytest.mark.heavy
def test_a_split_by_image_scores_the_wells_it_has_seen(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    """Wells differ, treatments do not: only who has seen a well knows what it got."""
    changes = {"effect": 0.0, "well_effect": 6.0, "sites": 3, "size": 128}
    network = fill(sqlite_workspace, tmp_path / "set", plates=PLATES.plates[:3], **changes)
    # A forest knows by heart what it has seen, with as few wells as there are.
    params = BaselineParams(features=network.features)
    found = {}
    for level in (GroupLevel.IMAGE, GroupLevel.WELL):
        name = split(sqlite_workspace, level)
        forest = train_baselines(sqlite_workspace, ["forest"], params, split=name)[0]
        found[level] = image_score(sqlite_workspace, forest.run_id)
    by_image, by_well = found.values()
    assert by_image.low is not None
    assert by_image.low > 3 * CHANCE
    assert by_well.low is not None
    assert by_well.high is not None
    assert by_well.low <= CHANCE <= by_well.high
