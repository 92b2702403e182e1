"""Functions and models of one's own that look at the cells of a store."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_training import Opener, build
from sqlalchemy import func, select
from torch import nn
from typer.testing import CliRunner

from cellstore import Store
from cellstore.config import Resources, SplitParams
from cellstore.enums import Origin, Stage, Status
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import FeatureSet, Job, Prediction, Recipe, Run
from cellstore.stages.split import create_split
from cellstore_cli.app import app

COLUMNS = ["area", "eccentricity", "mean_intensity"]


@pytest.fixture
def store(built: Path, opened: Opener) -> Store:
    return Store(opened(built))


def light(batch: dict[str, Any]) -> Any:
    image = batch["image"]
    return np.stack([image.mean(axis=(1, 2, 3)), image.max(axis=(1, 2, 3))], axis=1)


def runs(store: Store) -> int:
    with store.session() as session:
        return session.query(Run).count()


def rows_of(store: Store, run_id: int) -> list[tuple[Any, ...]]:
    with store.session() as session:
        query = select(Prediction).where(Prediction.run_id == run_id)
        found = session.scalars(query).all()
        return sorted((p.cell_id, p.rank, p.label_id, p.probability) for p in found)


def test_an_embedding_is_a_feature_set_of_the_cells(store: Store) -> None:
    first = store.apply(light, "light", crop=8, limit=2)
    assert (first.done, first.cells, first.columns, first.failures) == (2, 8, 2, ())
    rest = store.apply(light, "light", crop=8)
    assert (rest.done, rest.earlier, rest.cells) == (4, 2, 16)
    again = store.apply(light, "light", crop=8, batch_size=3)
    assert (again.run_id, again.done, again.earlier, again.cells) == (None, 0, 6, 0)
    # What a data set gives, item by item.
    store.apply(light, "by_image", crop=8, intensity="image")
    for name, scale in (("light", "plate"), ("by_image", "image")):
        found = store.cells("by-well", "train", features=name).to_pandas().set_index("cell_id")
        items = list(store.dataset("by-well", "train", crop=8, intensity=scale))
        assert len(items) == len(found) == 8
        if scale == "plate":  # without a split the scale is that of all images of the plate
            assert (found.embedding_000 > 0).all()
            continue
        for item in items:
            row = found.loc[item["cell_id"], ["embedding_000", "embedding_001"]].to_numpy(float)
            wanted = [float(item["image"].mean()), float(item["image"].max())]
            np.testing.assert_allclose(row, wanted, rtol=1e-5)
    with_split = store.apply(light, "as_trained", crop=8, split="by-well", subset="train")
    assert (with_split.selected, with_split.done) == (2, 2)
    found = store.cells("by-well", "train", features="as_trained").to_pandas()
    items = {item["cell_id"]: item for item in store.dataset("by-well", "train", crop=8)}
    wanted = [float(items[i]["image"].mean()) for i in found.cell_id]
    np.testing.assert_allclose(found.embedding_000, wanted, rtol=1e-5)
    with pytest.raises(UserInputError, match=r"'light' is there already.*other crop"):
        store.apply(light, "light", crop=9)
    for file in (store.root / "artifacts" / "features").rglob("*.parquet"):
        file.unlink()
    before = store.apply(light, "light", crop=8)
    assert (before.done, before.columns) == (6, 2)
    store.apply(light, "by_image", crop=8, intensity="image")
    store.apply(light, "as_trained", crop=8, split="by-well", subset="train")
    assert not store.verify().problems


class Small(nn.Module):
    """Sees crops and masks; in training it answers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.drop = nn.Dropout(0.9)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = torch.stack([(image * mask).mean((1, 2, 3)), mask.mean((1, 2, 3))], 1)
        return self.drop(self.layer(seen))


def test_a_network_works_as_it_is(store: Store) -> None:
    torch.manual_seed(0)
    net = Small().train()
    net.drop.eval()
    made = store.apply(net, "small", crop=8, mask=True, device="cpu", channels=["DNA"])
    assert (made.cells, made.columns) == (24, 3)
    assert (net.training, net.layer.training, net.drop.training) == (True, True, False)
    net.drop.train()
    assert store.apply(net, "small", crop=8, mask=True, device="cpu").done == 0
    with torch.no_grad():
        net.layer.bias += 1
    with pytest.raises(UserInputError, match="other function"):
        store.apply(net, "small", crop=8, mask=True, device="cpu")
    with pytest.raises(UserInputError, match=r"Small ended with TypeError: .*forward"):
        store.apply(net, "no_mask", crop=8, device="cpu")
    net.identity = {"model": "small", "revision": "1"}  # type: ignore[assignment]
    store.apply(net, "named", crop=8, mask=True, device="cpu")
    with torch.no_grad():
        net.layer.bias += 1
    assert store.apply(net, "named", crop=8, mask=True, device="cpu").done == 0
    with store.session() as session:
        found = session.query(FeatureSet).filter(FeatureSet.name == "named").one()
        assert found.recipe.parameters["function"]["identity"] == net.identity


def test_logits_are_refused_or_made_probabilities(store: Store) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    before = runs(store)
    with pytest.raises(UserInputError, match=r"not probabilities.* add --softmax"):
        store.apply(net, "net", gives="probabilities", crop=8)
    assert runs(store) == before
    made = store.apply(
        net, "net", gives="probabilities", crop=8, softmax=True, trained_on=["train"]
    )
    assert made.split == "by-well"
    rows = rows_of(store, made.run_id)
    assert len(rows) == 2 * made.cells == 16
    assert sum(row[3] for row in rows) == pytest.approx(made.cells)


def test_a_forest_is_applied_as_its_table_would_be_added(store: Store) -> None:
    from sklearn.ensemble import RandomForestClassifier

    train = store.cells("by-well", "train").to_pandas()
    classes = sorted(set(train.label))
    forest = RandomForestClassifier(5, random_state=0).fit(train[COLUMNS], train.label)
    test = store.cells("by-well", "test").to_pandas()
    table = pd.DataFrame(forest.predict_proba(test[COLUMNS]), columns=classes)
    added = store.add_predictions(
        table.assign(cell_id=test.cell_id), "table", split="by-well", trained_on=["train"]
    )
    made = store.apply(forest, "forest", gives="probabilities", trained_on=["train"])
    assert (made.done, made.cells, made.notes) == (2, 8, ())
    assert rows_of(store, made.run_id) == rows_of(store, added.run_id)
    again = store.apply(forest, "forest", gives="probabilities", trained_on=["train"])
    assert (again.run_id, again.done, again.earlier) == (made.run_id, 0, 2)
    others = RandomForestClassifier(5, random_state=1).fit(train[COLUMNS], train.label)
    changed = store.apply(others, "forest", gives="probabilities", trained_on=["train"])
    assert changed.train_run_id != made.train_run_id
    mine, theirs = store.report(str(made.run_id)), store.report(str(added.run_id))
    assert (mine.scores, mine.by_well) == (theirs.scores, theirs.by_well)
    assert "declared of forest" in mine.leak
    with store.session() as session:
        run = session.get_one(Run, made.run_id)
        assert (run.origin, run.parent.origin) == (Origin.OBSERVED, Origin.DECLARED)
        assert "scikit-learn" in run.environment
    assert not store.verify().problems
    script = store.repro(str(made.run_id)).script
    assert "it was begun by" in script
    forest.classes_ = np.array(["DMSO", "aspirin"])
    with pytest.raises(UserInputError, match="classes that split 'by-well' does not have: aspirin"):
        store.apply(forest, "wrong", gives="probabilities")
    store.withdraw_predictions(made.run_id, reason="mixed up")


def test_what_nobody_declared_is_not_known(store: Store) -> None:
    def guess(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "drug": np.full(len(batch["cell_id"]), 0.75),
            "DMSO": [0.25] * len(batch["cell_id"]),
        }

    made = store.apply(guess, "guess", gives="probabilities", image=False, note="a try")
    assert any("--trained-on" in note for note in made.notes)
    assert "It is not known which wells guess has seen" in store.report(str(made.run_id)).leak
    image = store.votes(str(made.run_id)).table.to_pylist()[0]
    name = f"{image['plate']}/{image['well']}/{image['site']}"
    last = store.audit(name, "image").record["labellings"][-1]
    assert (last["model"], last["well_in_training"], last["winner"]) == ("guess", None, "drug")


def test_of_two_commands_at_once_one_makes_the_run(store: Store) -> None:
    options = {"gives": "probabilities", "image": False}
    others: list[Any] = []

    def guess(batch: dict[str, Any]) -> Any:
        if not others:  # the other command begins while this one tries the function
            others.append(None)
            others.append(store.apply(guess, "guess", **options))
        return np.full((len(batch["cell_id"]), 2), 0.5)

    guess.identity = {"version": 1}  # type: ignore[attr-defined]
    with pytest.raises(UserInputError, match="Another command began the same at the same time"):
        store.apply(guess, "guess", **options)
    again = store.apply(guess, "guess", **options)
    assert (again.run_id, again.done, again.earlier) == (others[1].run_id, 0, 2)
    assert len(rows_of(store, again.run_id)) == 16


def test_features_have_names_and_may_have_gaps(store: Store) -> None:
    def ratio(batch: dict[str, Any]) -> pd.DataFrame:
        area = batch["features"][:, 0]
        batch["cell_id"] -= 1  # whatever it does to it, its answer is of these cells
        return pd.DataFrame({"area": area, "odd": np.where(area < 60, np.nan, area / 2)})

    made = store.apply(ratio, "ratio", gives="features", image=False)
    assert made.columns == 2
    found = store.cells("by-well", "train", features="ratio").to_pandas()
    basic = store.cells("by-well", "train").to_pandas()
    np.testing.assert_array_equal(found.area, basic.area)
    assert found.odd.isna().tolist() == (basic.area < 60).tolist()
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(basic[COLUMNS])
    store.apply(pca, "pca", features="basic")
    wanted = pca.transform(basic[COLUMNS])
    found = store.cells("by-well", "train", features="pca").to_pandas()
    np.testing.assert_allclose(found[["embedding_000", "embedding_001"]], wanted, rtol=1e-4)
    scaled: list[Any] = []

    def keep(batch: dict[str, Any]) -> Any:
        scaled.append(batch["features"])
        return batch["features"]

    store.apply(keep, "scaled", image=False, scaled=True, subset="train", limit=1)
    items = {i["cell_id"]: i for i in store.dataset("by-well", "train", features=True, crop=4)}
    first = store.cells("by-well", "train", features="scaled").to_pandas()
    np.testing.assert_allclose(scaled[-1][0], items[first.cell_id[0]]["features"], rtol=1e-5)


def second_image_fails(batch: dict[str, Any]) -> Any:
    if batch["image"].mean() > LIMIT:
        raise ValueError("too bright for me")
    return light(batch)


LIMIT = 1000.0


def test_an_image_on_which_it_fails_fails_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = store.apply(light, "light", crop=8, intensity="image")
    table = store.cells(features="light").to_pandas()
    means = table.groupby(["well"]).embedding_000.mean()
    assert seen.done == len(means) == 6
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", float(means.max()) - 1e-6)
    made = store.apply(second_image_fails, "some", crop=8, intensity="image")
    assert (made.done, len(made.failures)) == (5, 1)
    sentence = "second_image_fails ended with ValueError: too bright for me (test_apply.py, line"
    assert sentence in made.failures[0][1]
    (job,) = store.jobs(status="failed").jobs
    assert sentence in job["error"]
    again = store.apply(second_image_fails, "some", crop=8, intensity="image")
    assert (again.done, again.earlier, again.failed_before) == (0, 5, 1)
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 2.0)  # it would say something else now
    with pytest.raises(UserInputError, match=r"'some' is there already.*other function"):
        store.apply(second_image_fails, "some", crop=8, intensity="image")


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "vector": (lambda b: b["image"].mean(axis=(1, 2, 3)), r"shape \(4,\) for 4 cells"),
    "too few rows": (lambda b: light(b)[:-1], r"shape \(3, 2\) for 4 cells"),
    "not finite": (lambda b: light(b) / 0, "infinite or none at all"),
    "too large": (lambda b: np.full((len(b["image"]), 1), 1e300), "more than an embedding holds"),
    "ragged": (lambda b: [[1], [1, 2], [1], [1]], "returned list. It should return an array"),
    "no memory": (lambda b: bytearray(1 << 60), "too little memory"),
    "text": (lambda b: np.full((len(b["image"]), 2), "x"), "returned text"),
    "nothing": (lambda b: None, "returned NoneType"),
    "columns": (lambda b: {"a": light(b)}, r"columns of shape \(4, 2\)"),
    "two names": (lambda b: {"a": [1] * 4, "A": [1] * 4}, "a name of its own"),
    "end": (lambda b: sys.exit(3), "ended with SystemExit: 3"),
    "key": (lambda b: b["mask"], "ended with KeyError: 'mask'"),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_is_no_row_of_numbers_for_each_cell_is_refused(store: Store) -> None:
    before = runs(store)
    for function, sentence in HOSTILE.values():
        with pytest.raises(UserInputError, match=f"nothing was begun.*{sentence}"):
            store.apply(function, "bad", crop=4)
    for function, sentence in (
        (lambda b: np.full((len(b["image"]), 3), 1 / 3), "3 numbers for each cell, and the split"),
        (lambda b: np.full((len(b["image"]), 2), 0.7), "add up to 1.4"),
        (lambda b: {"aspirin": np.ones(len(b["image"]))}, "does not have: aspirin"),
    ):
        with pytest.raises(UserInputError, match=sentence):
            store.apply(function, "bad", gives="probabilities", crop=4)
    assert runs(store) == before
    for given, sentence in (
        (3, "has the type int cannot be applied"),
        (Small, "Small is a class"),
        (torch.nn.LazyLinear(2), "cannot be found out whether .*LazyLinear"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("json:nothing", "Module 'json' has no 'nothing'"),
        ("json", "does not name a function"),
        ("model.pkl", r"is not opened.*skops.io.load"),
        ("net.pt", "weights_only=True"),
        ("model.onnx", "There is no file"),
    ):
        with pytest.raises(UserInputError, match=sentence):
            store.apply(given, "bad")
    with pytest.raises(UserInputError, match="--softmax is about probabilities"):
        store.apply(light, "bad", softmax=True)
    with pytest.raises(UserInputError, match="is given no crops: leave --channels out"):
        store.apply(light, "bad", image=False, channels=["DNA"])
    with pytest.raises(UserInputError, match="leave --intensity out"):
        store.apply(light, "bad", image=False, intensity="image")
    with pytest.raises(UserInputError, match="'texture' is a group of cellstore's features"):
        store.apply(light, "texture")
    with pytest.raises(UnknownNameError, match="channel"):
        store.apply(light, "bad", channels=["Infrared"])


def test_a_batch_is_halved_that_a_gpu_cannot_hold(store: Store) -> None:
    sizes: list[int] = []

    def needs_room(batch: dict[str, Any]) -> Any:
        sizes.append(len(batch["cell_id"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch["cell_id"][:, None]

    made = store.apply(needs_room, "halved", gives="features", image=False, limit=2)
    assert (made.cells, set(sizes), sizes.count(4)) == (8, {4, 2}, 1)
    table = store.sql("SELECT cell_id, feature_000 FROM halved").to_pylist()
    assert all(row["cell_id"] == row["feature_000"] for row in table)
    with pytest.raises(UserInputError, match="cropp"):
        store.apply(needs_room, "halved", cropp=3)


def widths(batch: dict[str, Any]) -> Any:
    return np.zeros((len(batch["cell_id"]), 2 + (batch["cell_id"].min() > 10)))


def test_other_widths_than_before_fail(store: Store) -> None:
    made = store.apply(widths, "widths", image=False)
    assert made.done < 6
    assert all("3 columns" in reason for _, reason in made.failures)


MODULE = """
import os, time
import numpy as np

def embed(batch):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return batch["image"].reshape(len(batch["image"]), -1)[:, :3].astype("float32")

def label(batch):
    first = np.clip((embed(batch)[:, 0] + 1) / 2, 0, 1)
    return np.stack([first, 1 - first], axis=1)
"""


WORDS = ("--crop", "6", "--name")


def command(*words: str, code: int = 0) -> Any:
    """Give the command in this process."""
    result = CliRunner().invoke(app, ["apply", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module; one of an earlier test is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def test_by_command(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLSTORE_STORE", str(store.root))
    (folder / "broken.py").write_text("import nothing_like_this\n")
    (folder / "model.onnx").write_bytes(base64.b64decode(ONNX))
    said = command("mine:embed", *WORDS, "mine")
    assert re.search(r"feature set +mine\ncolumns +3\nimages done +6\n", said.stdout)
    said = command("mine:embed", *WORDS, "mine")
    assert "Nothing to do: mine has what mine:embed makes already." in said.stdout
    assert "No module named 'nothing_like_this'" in command("broken:f", *WORDS, "x", code=2).output
    assert "no 'f'. It has embed, label" in command("mine:f", *WORDS, "x", code=2).output
    local = store.apply(lambda b: light(b), "local", resources=Resources(workers=2), crop=8)
    assert "is known in this process only" in local.notes[0]
    pytest.importorskip("onnxruntime")
    said = command("model.onnx", "--crop", "8", "--name", "onnx", "--device", "cpu")
    assert re.search(r"columns +1\nimages done +6\n", said.stdout)
    found = store.cells("by-well", "train", features="onnx").to_pandas()
    mine = store.cells("by-well", "train", features="local").to_pandas()
    np.testing.assert_allclose(found.embedding_000, mine.embedding_000, rtol=1e-5)
    said = command("model.onnx", *WORDS, "small", code=2)
    assert "reads x of shape ('n', 1, 8, 8), and is given (4, 1, 6, 6)" in said.output
    (folder / "model.onnx").write_bytes(b"no model")
    assert "cannot be opened as ONNX" in command("model.onnx", *WORDS, "x", code=2).output


def test_killed_and_given_again_the_rows_are_the_same(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities on PostgreSQL, where rows are written one by one; a file on SQLite."""
    (folder / "images").mkdir()
    build(workspace, folder / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    store, labels = Store(workspace), not workspace.database.is_sqlite
    monkeypatch.setenv("CELLSTORE_STORE", str(store.root))
    if workspace.settings.database:
        monkeypatch.setenv("CELLSTORE_DATABASE_URL", workspace.settings.database)
    words = ["mine:label" if labels else "mine:embed", *WORDS, "killed"]
    more = ["--gives", "probabilities", "--subset", "all"] if labels else []
    program = [sys.executable, "-c", "from cellstore_cli.app import run; run()", "apply"]
    environment = {**os.environ, "SLOW": "0.5"}
    process = subprocess.Popen(
        [*program, *words, *more], env=environment, start_new_session=True, cwd=folder
    )
    wanted = Job.status == Status.DONE if labels else Job.worker.is_not(None)
    stage = Stage.PREDICT if labels else Stage.MEASURE
    jobs = select(func.count()).join(Recipe, Recipe.id == Job.recipe_id)
    jobs = jobs.where(
        wanted, Recipe.stage == stage, Recipe.parameters["declared"].as_string() == "killed"
    )
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with store.session() as session:
            if session.scalar(jobs.select_from(Job)):
                break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = json.loads(command(*words, *more, "--json").stdout)
    assert made["done"] + made["earlier"] == 6
    assert (made["earlier"] > 0) == labels
    calm = json.loads(command(*words[:-1], "calm", *more, "--json").stdout)
    if labels:
        assert rows_of(store, made["run_id"]) == rows_of(store, calm["run_id"])
        assert len(rows_of(store, calm["run_id"])) == 48
    else:
        found = [store.sql(f"SELECT * FROM {n} ORDER BY cell_id") for n in ("killed", "calm")]
        assert found[0].to_pylist() == found[1].to_pylist()
        assert found[0].num_rows == 24
    assert not store.verify(fix=True, minutes=0).problems
    if labels:  # begun by the command that was killed
        script = store.repro(str(made["run_id"])).script
        assert "apply mine:label --crop 6" in script


ONNX = (
    "CAgSADprCjIKAXgSAXkiClJlZHVjZU1lYW4qDQoEYXhlc0ACQAOgAQcqDwoIa2VlcGRpbXMYAKABAhIBZ1ocCgF4EhcK"
    "FQgBEhEKAxIBbgoCCAEKAggICgIICGIUCgF5Eg8KDQgBEgkKAxIBbgoCCAFCBAoAEA0="
)
"""The mean of crops (N, 1, 8, 8) over rows and columns: (N, 1)."""
