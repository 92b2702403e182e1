"""Published networks embed the cells of a store: a feature set like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_training import TINY, Opener
from tiny_vit import save_dinov2
from typer.testing import CliRunner

from cellstore import Store
from cellstore.artifacts import sha256_of
from cellstore.config import BaselineParams
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.models import FeatureSet, Recipe, Run
from cellstore_cli.app import app

transformers = pytest.importorskip("transformers")


@pytest.fixture
def store(built: Path, opened: Opener) -> Store:
    return Store(opened(built))


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    save_dinov2(tmp_path / "Tiny-ViT")
    return tmp_path / "Tiny-ViT"


def test_cells_are_embedded_and_a_probe_says_what_it_is_worth(store: Store, vit: Path) -> None:
    given = {"channels": ["DNA"], "intensity": "image", "device": "cpu"}
    first = store.embed(vit, **given, limit=2)
    assert (first.done, first.cells, first.columns) == (2, 8, 16)
    assert (first.feature_set, first.function) == ("tiny_vit", "folder Tiny-ViT")
    rest = store.embed(vit, **given)
    assert (rest.done, rest.earlier) == (4, 2)
    again = store.embed(vit, **given)
    assert (again.run_id, again.done, again.earlier) == (None, 0, 6)

    # What the network makes of the crops that a data set gives.
    found = store.cells("by-well", "train", features="tiny_vit").to_pandas().set_index("cell_id")
    items = list(store.dataset("by-well", "train", channels=["DNA"], crop=28, intensity="image"))
    net = save_dinov2(vit.parent / "same")
    grey = torch.stack([item["image"] for item in items]).expand(-1, 3, -1, -1) / 2 + 0.5
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    with torch.inference_mode():
        expected = net(pixel_values=(grey.clamp(0, 1) - mean) / std).last_hidden_state[:, 0]
    rows = found.loc[[item["cell_id"] for item in items]].filter(like="embedding_")
    np.testing.assert_allclose(rows.to_numpy(), expected.numpy(), atol=1e-4)

    # Which network it was stands in the recipe.
    with store.session() as session:
        made = session.query(FeatureSet).filter_by(name="tiny_vit").one()
        identity = session.get_one(Recipe, made.recipe_id).parameters["function"]["identity"]
    assert identity["sha256"] == sha256_of(vit / "model.safetensors")
    assert (identity["mode"], identity["input_size"]) == ("channels", 28)
    assert identity["licence"] == "not known"

    probes = store.train_baselines(["probe"], BaselineParams(features="tiny_vit"))
    assert [item.baseline for item in probes] == ["logistic", "knn"]
    report = store.report(str(probes[0].run_id))
    assert {item.name for item in report.baselines} == {"knn (tiny_vit)"}
    assert not store.verify().problems


def test_another_network_or_another_preprocessing_is_another_feature_set(
    store: Store, vit: Path
) -> None:
    store.embed(vit, "mine", channels=["DNA"], device="cpu", limit=1)
    for change in ({"crop": 42}, {"intensity": "image"}):
        with pytest.raises(UserInputError, match=r"'mine' is there already.*another --name"):
            store.embed(vit, "mine", channels=["DNA"], device="cpu", **change)
    save_dinov2(vit, seed=2)
    with pytest.raises(UserInputError, match="'mine' is there already"):
        store.embed(vit, "mine", channels=["DNA"], device="cpu")
    # Nothing is written where the channels are not those that it reads.
    with pytest.raises(UserInputError, match=r"reads 3 channels with --mode rgb, and these are 1"):
        store.embed(vit, "colours", mode="rgb", channels=["DNA"], device="cpu")
    with pytest.raises(UnknownNameError, match="Did you mean dinov2-small"):
        store.embed("dinov2-smal")
    with store.session() as session:
        assert session.query(FeatureSet).filter_by(name="colours").count() == 0


def test_a_training_from_weights_of_timm_names_their_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--timm--test_vit.r160_in1k"
    folder = repository / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    params = replace(TINY, backbone="timm:test_vit", weights="imagenet", branches=("mask",))
    params = replace(params, epochs=1)
    made = store.train(params, split="by-well", device="cpu")
    with store.session() as session:
        recipe = session.get_one(Run, made.run_id).recipe
        assert recipe.weights_sha256 == sha256_of(folder / "model.safetensors")
        assert recipe.parameters["backbone"] == "timm:test_vit"
    assert store.train(params, split="by-well", device="cpu").already_done
    labelled = store.predict(run=str(made.run_id), device="cpu")
    assert labelled.cells == 8


def test_the_command_prints_licences_and_says_how_to_go_on(store: Store, vit: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["embed", *words, "--store", str(store.root)])
        return done.exit_code, done.output

    listed = json.loads(run("--list", "--json")[1])
    assert {"dinov2-small", "openphenom", "subcell", "cell-dino"} <= {x["name"] for x in listed}
    text = run("--list")[1]
    assert max(map(len, text.splitlines())) <= 80
    assert "no commercial use" in text
    code, said = run("--model", str(vit), "--channels", "DNA", "--device", "cpu", "--limit", "1")
    assert code == 0, said
    assert said.startswith(f"Licence of {vit}: not known.")
    assert "feature set  tiny_vit" in said
    assert said.endswith(" train --baseline probe --features tiny_vit\n")
    code, said = run()
    assert (code, "Name a network: --model MODEL" in said) == (2, True)
    code, said = run("--model", str(vit), "--weights", "x.pth")
    assert (code, "A file of weights alone" in said) == (2, True)
