"""The Python API takes what people type in notebooks, and refuses the rest in sentences."""

from __future__ import annotations

import ast
import inspect
import io
import multiprocessing
import pickle
import re
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
import tifffile
from factories import Factory
from screens import SmallScreen, small_screen

import cellstore
from cellstore import (
    IngestParams,
    PredictParams,
    SegmentParams,
    Selection,
    SplitParams,
    Store,
    TrainParams,
    VoteOptions,
)
from cellstore.config import ImageInput
from cellstore.enums import GroupLevel, Projection
from cellstore.errors import CellstoreError, UnknownNameError, UserInputError
from cellstore.io.image_files import probe, read_plane
from cellstore.io.uris import FETCHED
from cellstore.jobs.planes import read_image
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.learn.datasets import CellDataset
from cellstore.models import ImageFile
from cellstore.settings import StoreSettings

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainParams(epochs="3"), "--epochs must be a whole number, not '3'."),  # type: ignore[arg-type]
        (lambda: TrainParams(epochs=2.5), "--epochs must be a whole number, not 2.5."),  # type: ignore[arg-type]
        (lambda: TrainParams(epochs=True), "--epochs must be a whole number, not True."),  # type: ignore[arg-type]
        (lambda: TrainParams(epochs=None), "--epochs must be a whole number, not None."),  # type: ignore[arg-type]
        (lambda: TrainParams(epochs=0), "--epochs must be at least 1, not 0."),
        (lambda: TrainParams.of("published", epochs="x"), "whole number, not 'x'"),
        (lambda: TrainParams(dropout="half"), "--dropout must be a number, not 'half'."),  # type: ignore[arg-type]
        (lambda: TrainParams(class_weights=1), "--class-weights must be True or False, not 1."),  # type: ignore[arg-type]
        (lambda: TrainParams(loss="focl"), "Unknown loss 'focl'. .* Did you mean focal?"),
        (lambda: TrainParams(epoch=3), "Unknown option of TrainParams 'epoch'.*mean epochs?"),  # type: ignore[call-arg]
        (lambda: SegmentParams(channels={"DNA", "ER"}), "--channels must be a list, not a set."),  # type: ignore[arg-type]
        (lambda: SegmentParams(projection="mode"), "Unknown projection 'mode'. Known: "),  # type: ignore[arg-type]
        (lambda: Selection(plates=3.5), "--plate must be a list, not 3.5."),  # type: ignore[arg-type]
        (lambda: Selection(plates=[1.5]), "--plate must be a text, not 1.5."),  # type: ignore[arg-type,list-item]
        (lambda: IngestParams(controls=["DMSO"]), "--control must be a pair, not 'DMSO'."),  # type: ignore[arg-type]
        (lambda: VoteOptions(min_margin=float("nan")), "--min-margin must be a number, not nan."),
    ],
)
def test_wrong_parameters_are_refused_in_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserInputError, match=sentence.replace("?", r"\?")):
        make()


def test_parameters_take_what_notebooks_have(tmp_path: Path) -> None:
    plain = TrainParams(
        epochs=3, learning_rate=1.0, precision="16", exclude_flagged="5", channels=("a",),
        branches=("image",), warmup_epochs=0,
    )  # fmt: skip
    given: dict[str, Any] = {
        "epochs": np.int64(3),
        "learning_rate": np.float32(1),
        "precision": 16,
        "exclude_flagged": np.int32(5),
        "channels": pd.Series(["a"]),
        "branches": "image",
        "warmup_epochs": 0.0,
    }
    made = TrainParams(**given)
    assert made == plain
    assert {type(value) for value in asdict(made).values()} <= {
        *(int, float, str, tuple, bool, type(None)),
    }
    assert type(made.learning_rate) is float
    kept: Any = {"controls": {"DMSO": "negative"}, "platemap": str(tmp_path), "plate": 1234}
    params = IngestParams(**kept)
    assert params.controls == (("DMSO", "negative"),)
    assert params.platemap == tmp_path
    assert params.plate == ("1234",)
    several: Any = [["DMSO", "negative"]]
    assert IngestParams(controls=several) == IngestParams(controls=params.controls)
    words: Any = {"group_level": "plate", "test_plates": ["A"]}
    assert SplitParams(**words).group_level is GroupLevel.PLATE
    assert SplitParams.from_recipe(asdict(SplitParams(**words))) == SplitParams(**words)
    assert PredictParams(subset=None).subset is None


def test_the_package_has_all_parameters() -> None:
    for name in cellstore.__all__:
        assert getattr(cellstore, name) is not None
    assert cellstore.TrainParams is TrainParams


RUNS: dict[str, Callable[[Store, Any], Any]] = {
    "report": lambda store, run: store.report(run).scores,
    "compare": lambda store, run: store.compare(run, run),
    "compared": lambda store, run: store.report(run, compare=run),
    "votes": lambda store, run: store.votes(run).table,
    "predict": lambda store, run: store.predict(run=run, device="cpu"),
    "audit": lambda store, run: store.audit(run, "run").record["stage"],
    "audit alone": lambda store, run: store.audit(run),
    "log": lambda store, run: store.log(run=run).entries,
    "repro": lambda store, run: store.repro(run).script,
    "check_run": lambda store, run: store.check_run(run).outcome,
    "cancel": lambda store, run: store.cancel(run),
    "retry": lambda store, run: store.retry(run=run),
    "export_model": lambda store, run: store.export_model(run),
    "undo": lambda store, run: store.undo(run, reason="a try"),
    "withdraw": lambda store, run: store.withdraw_predictions(run, reason="a try"),
    "qc": lambda store, run: store.report(vote_options=VoteOptions(exclude_flagged=run)),
    "cells": lambda store, run: store.cells(features=False, exclude_flagged=run),
}


def test_a_run_is_named_by_its_number(sqlite_workspace: Workspace) -> None:
    store, number = Store(sqlite_workspace), small_screen(sqlite_workspace).predict_run.id

    def answer(ask: Callable[[Store, Any], Any], run: Any) -> Any:
        try:
            return ask(store, run)
        except CellstoreError as error:
            return str(error)

    for name, ask in RUNS.items():
        assert answer(ask, np.int64(number)) == answer(ask, str(number)), name
        assert "1000000" in answer(ask, 10**6), name
        assert re.search("must be a text( or a whole number)?, not 1.5", answer(ask, 1.5)), name


def test_wrong_arguments_of_methods_are_refused_in_a_sentence(sqlite_workspace: Workspace) -> None:
    store: Any = Store(sqlite_workspace)
    for call, sentence in (
        (lambda: store.train(SegmentParams()), "params must be TrainParams.*not a SegmentParams"),
        (lambda: store.segment({"limit": 1}), "params must be SegmentParams.*not a dict"),
        (lambda: store.segment(SegmentParams(), ["P1"]), "selection must be Selection.*not a list"),
        (lambda: store.train(epochs=3), r"Write: train\(TrainParams\(epochs=...\), ...\)"),
        (lambda: store.predict(rn=3), "Unknown argument of predict 'rn'.*Did you mean run"),
        (lambda: store.export("x.parquet", plates={"P1"}), "plates must be a list, not a set"),
        (lambda: store.train_baselines({"null"}), "kinds must be a list, not a set"),
        (lambda: store.report(html=3), "html must be a text or the path of a file, not 3"),
        (lambda: store.report(force="yes"), "force must be True or False, not 'yes'"),
        (lambda: store.log(limit="all"), "limit must be a whole number, not 'all'"),
        (lambda: store.import_split("s", ["t.csv"], group_level="x"), "Unknown group level 'x'"),
        (lambda: store.train_baselines("nul"), "Unknown baseline 'nul'"),
        (lambda: store.export("x.parquet", plates=np.array("P1")), "plates must be a list"),
        (lambda: store.report(-5), "A run is named by its number.*, not '-5'"),
    ):
        with pytest.raises(UserInputError, match=sentence):
            call()
    with pytest.raises(TypeError, match="missing"):
        store.audit()


def test_a_store_goes_to_workers(read_screen: SmallScreen) -> None:
    store = Store(read_screen.workspace)
    again = pickle.loads(pickle.dumps(store))
    with again:
        assert again.root == store.root
        assert again.status().images == store.status().images > 0
        assert again.workspace.database.shown == store.workspace.database.shown
    table = pickle.loads(pickle.dumps(store.cells(features=False)))
    assert table.to_arrow() == store.cells(features=False).to_arrow()
    table.workspace.database.close()


@pytest.mark.heavy
def test_a_store_goes_to_another_process(sqlite_workspace: Workspace) -> None:
    factory = Factory(sqlite_workspace)
    factory.image(factory.well(factory.plate(), 1, 1))
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        # A function of the package: a process that imports this module would import all of it.
        assert pool.submit(Store.status, Store(sqlite_workspace)).result().images == 1


@pytest.mark.postgres
def test_a_password_does_not_travel(
    tmp_path: Path, postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_server.migrated_database()
    workspace, _ = create_workspace(tmp_path / "store", url)
    secret = url.replace("postgres:@", "postgres:s3cret@")
    assert secret != url
    opened = replace(workspace, settings=StoreSettings(tmp_path / "store", secret))
    sent = pickle.dumps(Store(opened))
    assert b"s3cret" not in sent
    items: Any = CellDataset(opened, *[None] * 12)  # type: ignore[arg-type]
    assert b"s3cret" not in pickle.dumps(items)
    assert "s3cret" not in repr(items)
    with pickle.loads(sent) as without:
        assert "s3cret" not in str(without.workspace.settings.database)
    monkeypatch.setenv("CELLSTORE_DATABASE_URL", secret)
    with pickle.loads(sent) as again:
        assert again.workspace.settings.database == secret
    workspace.database.close()


def test_a_remote_file_is_fetched_once_in_a_run(
    sqlite_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    fetched: list[str] = []
    cat = type(files).cat_file
    monkeypatch.setattr(
        type(files), "cat_file", lambda self, path, **more: fetched.append(path) or cat(self, path)
    )
    plane = np.arange(12, dtype=np.uint16).reshape(3, 4)
    folder = "memory://once/P1"
    stack = io.BytesIO()
    tifffile.imwrite(stack, np.stack([plane, plane + 1]), photometric="minisblack")
    files.pipe("/once/P1/a.tif", stack.getvalue())
    factory = Factory(sqlite_workspace)
    image = factory.image(factory.well(factory.plate(), 1, 1), missing=True)
    for page in (1, 2):
        name = f"a.tif#page={page}"
        info = probe(f"{folder}/{name}")
        row = {"sha256": info.sha256, "size_bytes": info.size_bytes}
        place = {"name": name, "folder_id": factory.folder(folder).id, "position": page + 1}
        factory.add(ImageFile(image_id=image.id, channel=f"C{page}", **row, **place))
    FETCHED.clear()
    fetched.clear()
    both = ImageInput(("C1", "C2"), Projection.MAX)
    for _ in range(3):
        found = read_image(sqlite_workspace.database, image.id, both)
        np.testing.assert_array_equal(found, plane + 1)
    assert len(fetched) == 1
    monkeypatch.setattr("cellstore.io.image_files.KEPT_BYTES", 10)
    FETCHED.clear()
    sha256 = probe(f"{folder}/a.tif#page=1").sha256
    for _ in range(2):
        np.testing.assert_array_equal(read_plane(f"{folder}/a.tif#page=1", sha256), plane)
    assert not FETCHED
    files.store.clear()


def test_all_files_of_the_packages_are_installed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data: dict[str, list[str]] = setup["package-data"]
    assert "py.typed" in data["cellstore"]
    for package in setup["packages"]:
        first, _, rest = package.partition(".")
        folder = ROOT / setup["package-dir"].get(package, setup["package-dir"][first])
        if package not in setup["package-dir"]:
            folder = folder.joinpath(*rest.split(".")) if rest else folder
        if package.startswith("cellstore.migrations."):
            folder = ROOT / "migrations" / "versions"
        for file in folder.iterdir():
            if file.is_dir() or file.suffix in (".py", ".pyc"):
                continue
            names = ((whole, file.relative_to(folder).as_posix()) for whole in (package,))
            listed = any(
                fnmatch(name, pattern) for whole, name in names for pattern in data.get(whole, ())
            )
            above, _, part = package.rpartition(".")
            listed |= any(fnmatch(f"{part}/{file.name}", one) for one in data.get(above, ()))
            assert listed, file


def test_the_methods_of_a_store_are_explained_in_themselves() -> None:
    examples = 0
    for name, method in inspect.getmembers(Store, inspect.isroutine):
        if name.startswith("_"):
            continue
        words = inspect.getdoc(method) or ""
        assert not re.search(r"``(stages|report|query|corrections)\.", words), name
        code = "\n".join(re.findall(r"^(?:>>>|\.\.\.) (.*)$", words, re.M))
        for call in ast.walk(ast.parse(code)):
            if not isinstance(call, ast.Call):
                continue
            called = ast.unparse(call.func)
            if called in cellstore.__all__:  # its names and types are checked when it is made
                made = SimpleNamespace(model="run:1")
                eval(ast.unparse(call), vars(cellstore.config) | {"Path": Path, "made": made})
            elif re.fullmatch(r"store\.\w+", called):
                function = getattr(Store, called.removeprefix("store."))
                given = {item.arg: None for item in call.keywords}
                bound = inspect.signature(function).bind(None, *call.args, **given)
                examples += "options" not in bound.arguments or function is Store.apply
    assert examples > 40


def test_an_unknown_word_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError):
        TrainParams(optimizer="adam")  # type: ignore[call-arg]
