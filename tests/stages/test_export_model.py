"""A model in a folder: it labels cells without the store and without cellstore."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import PLAIN, awake, craft
from small_training import Opener, said
from sqlalchemy import select, update

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import BaselineParams, PredictParams
from cellstore.enums import Control
from cellstore.errors import StorageError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn.branches import TABULAR
from cellstore.learn.exported_classifier import Classifier, Network
from cellstore.learn.networks import NetShape, build_net
from cellstore.learn.normalising import Scale
from cellstore.models import ImageFile, Run, Well
from cellstore.stages.export_model import export_model
from cellstore.stages.predict import predict
from cellstore.stages.train_baselines import train_baselines

FILES = (
    "model.safetensors",
    "model.json",
    "classifier.py",
    "cells.safetensors",
    "example.py",
    "README.md",
)

NO_CELLSTORE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cellstore", "cellstore_cli", "cellpose"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[1] + "/example.py", run_name="__main__")
"""


def run_example(folder: Path) -> dict[int, dict[str, float]]:
    """What example.py prints, in a process that cannot import cellstore, from another folder."""
    command = [sys.executable, "-c", NO_CELLSTORE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        cell, words = re.fullmatch(r"cell (\d+): (.*)", line).groups()  # type: ignore[union-attr]
        pairs = (part.rsplit(" ", 1) for part in words.split(", "))
        found[int(cell)] = {label: float(number) for label, number in pairs}
    return found


def said_by(folder: Path) -> dict[int, dict[str, float]]:
    """The same without a process of its own."""
    classifier, cells = Classifier(folder), load_file(folder / "cells.safetensors")
    crops = {name[6:]: values for name, values in cells.items() if name.startswith("crops.")}
    chances = classifier(crops, cells["features"], classifier.record["example"]["plate"])
    return {
        cell: dict(zip(classifier.labels, row, strict=True))
        for cell, row in zip(cells["cell_ids"].tolist(), chances.tolist(), strict=True)
    }


def rows_of(workspace: Workspace, run: str) -> dict[int, dict[str, float]]:
    result = predict(workspace, PredictParams(subset=None), run=run, device="cpu")
    found: dict[int, dict[str, float]] = {}
    for cell, _, label, probability in said(workspace, result.run_id):
        found.setdefault(cell, {})[label] = probability
    return found


@pytest.mark.heavy
def test_the_example_says_what_predict_says_when_the_store_is_gone(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    run = str(craft(workspace, branches=("mask", "flow", TABULAR)))
    expected = rows_of(workspace, run)
    assert min(min(labels.values()) for labels in expected.values()) > 1e-3
    result = export_model(workspace, run, tmp_path / "model")
    assert (result.files, result.cells, result.model) == (FILES, 3, "network")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(FILES)
    workspace.database.close()
    shutil.rmtree(workspace.settings.root)
    found = run_example(tmp_path / "model")
    assert len(found) == 3
    for cell, labels in found.items():  # three cells are another batch than all of the image
        assert labels == pytest.approx(expected[cell], abs=5e-5)


@pytest.mark.parametrize("kind", ["logistic", "forest", "knn"])
def test_baselines_on_features_can_be_taken_elsewhere(
    built: Path, opened: Opener, tmp_path: Path, kind: str
) -> None:
    workspace = opened(built)
    run = str(train_baselines(workspace, [kind], BaselineParams(trees=3))[0].run_id)
    expected = rows_of(workspace, run)
    result = export_model(workspace, run, tmp_path / "model")
    files = ("model.skops", *FILES[1:])
    assert (result.files, result.cells, result.model) == (files, 3, kind)
    if kind == "forest":
        assert len(run_example(tmp_path / "model")) == 3
    for cell, labels in said_by(tmp_path / "model").items():
        assert labels == pytest.approx(expected[cell], abs=1e-6)


def test_the_record_says_where_the_model_comes_from(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    run = craft(workspace, branches=("mask", TABULAR))
    export_model(workspace, str(run), tmp_path / "model")
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["labels"] == ["DMSO", "drug"]
    assert [item["name"] for item in record["columns"]] == list(FEATURE_NAMES)
    assert all({"unit", "source"} <= item.keys() for item in record["columns"])
    assert list(record["crops"]["channels"]) == ["mask"]
    lineage = record["lineage"]
    assert (lineage["train_run"], lineage["split"]["name"]) == (run, "by-well")
    stages = {item["stage"] for item in lineage["recipes"]}
    assert stages == {"train", "split", "segment", "measure"}
    with workspace.database.read() as session:
        row = session.get_one(Run, run)
        assert lineage["code_version"] == row.code_version
    words = (tmp_path / "model" / "README.md").read_text()
    assert "(N, 14)" in words
    assert str(workspace.settings.root) not in words + json.dumps(record)


def test_a_model_of_plates_knows_the_plate_of_its_example(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    n = len(FEATURE_NAMES)
    known = replace(PLAIN, plates={"elsewhere": Scale((1.0,) * n, (2.0,) * n, 9)})
    with workspace.database.begin() as session:
        session.execute(
            update(Well).where(Well.treatment.has(name="DMSO")).values(control=Control.NEGATIVE)
        )
    run = str(craft(workspace, known))
    expected = rows_of(workspace, run)
    export_model(workspace, run, tmp_path / "model")
    found = said_by(tmp_path / "model")
    assert len(found) == 3
    for cell, labels in found.items():
        assert labels == pytest.approx(expected[cell], abs=1e-5)
    classifier = Classifier(tmp_path / "model")
    with pytest.raises(ValueError, match="no control cells of plate 'P9'"):
        classifier({}, torch.zeros(1, n), "P9")


def test_without_images_the_example_has_no_cells_and_says_so(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    run = str(craft(workspace, branches=("mask", TABULAR)))
    with workspace.database.begin() as session:
        session.execute(update(ImageFile).values(sha256=None))
    (note,) = export_model(workspace, run, tmp_path / "model").notes
    assert note == "No image with measured cells could be read, so the example has no cells."
    assert said_by(tmp_path / "model") == {}
    with safe_open(tmp_path / "model" / "cells.safetensors", "pt") as file:
        assert file.get_tensor("crops.mask").shape == (0, 4, 32, 32)


def test_nothing_is_written_over_and_nothing_half(
    built: Path, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    run = str(craft(workspace))
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    with pytest.raises(UserInputError, match=r"not empty\. Name a new folder"):
        export_model(workspace, run, target)
    with pytest.raises(UserInputError, match="not empty"):
        export_model(workspace, run, target / "mine.txt")
    (target / "mine.txt").unlink()

    def full(_path: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match="No space left"):
            export_model(workspace, run, target)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part")] == []
    assert export_model(workspace, run, target).path == str(target)
    monkeypatch.chdir(tmp_path)
    assert export_model(workspace).path == str(tmp_path / f"model-{run}")


def test_a_null_baseline_is_of_no_use_elsewhere(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    run = train_baselines(workspace, ["majority"])[0].run_id
    with pytest.raises(UserInputError, match="null baseline 'majority'"):
        export_model(workspace, str(run), tmp_path / "model")
    with workspace.database.read() as session:
        assert session.scalars(select(Run.id).order_by(Run.id.desc())).first() == run


@pytest.mark.parametrize("backbone", ["efficientnet_b0", "resnet18", "timm:test_vit"])
def test_the_network_of_the_folder_is_that_of_cellstore(backbone: str) -> None:
    branches = ("mask", "image", TABULAR)
    shape = NetShape(3, 2, backbone=backbone, branches=branches, plane_channels=2)
    ours = awake(build_net(shape, seed=3), 64)
    theirs = Network(asdict(shape)).eval()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    crops = {
        name: torch.rand((2, channels, 64, 64), generator=generator)
        for name, channels in (("mask", 4), ("image", 2))
    }
    features = torch.rand((2, 2), generator=generator)
    with torch.no_grad():
        said_of = ours(crops, features)
        np.testing.assert_array_equal(theirs(crops, features), said_of)
        darker = {**crops, "image": -crops["image"]}
        assert not np.allclose(ours(darker, features), said_of, atol=1e-6)
