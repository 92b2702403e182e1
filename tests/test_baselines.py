"""Baselines: what they say is what scikit-learn says, and what they can express."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.learn import baselines
from cellstore.learn.normalising import Scaler
from cellstore.learn.trained_models import ModelRecord, load_model, save_estimator

linear_model = pytest.importorskip("sklearn.linear_model")
ensemble = pytest.importorskip("sklearn.ensemble")


def some_cells(n_classes: int, n: int = 300) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    random = np.random.default_rng(n_classes)
    classes = np.arange(n) % n_classes
    rows = random.normal(size=(n, 5)) + classes[:, None] * np.array([1, 0, 0.5, 0, 0])
    return rows.astype(np.float32), classes


def meta(model: str, labels: int, columns: int) -> ModelRecord:
    names = tuple(f"f{i}" for i in range(columns))
    scaler = Scaler(names, (0.0,) * columns, (1.0,) * columns)
    values = tuple(f"label {i}" for i in range(labels))
    return ModelRecord(model, values, "perturbation", scaler, {"train": "0" * 64}, "basic")


def reopened(kind: str, model: Any, labels: int, columns: int) -> Any:
    record = json.loads(json.dumps(meta(kind, labels, columns).to_json()))
    found, read = load_model(save_estimator(model), record)
    assert read == meta(kind, labels, columns)
    return found


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_stored_logistic_model_says_what_scikit_learn_says(n_classes: int) -> None:
    rows, classes = some_cells(n_classes)
    theirs = linear_model.LogisticRegression(max_iter=1000).fit(rows.astype(float), classes)
    model, converged = baselines.fit_logistic(rows, classes)
    assert converged
    ours = reopened("logistic", model, n_classes, 5).predict_proba(rows)
    np.testing.assert_allclose(ours, theirs.predict_proba(rows.astype(float)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 7])
def test_a_stored_forest_says_what_scikit_learn_says(n_classes: int) -> None:
    rows, classes = some_cells(n_classes)
    theirs = ensemble.RandomForestClassifier(
        n_estimators=20, max_depth=16, min_samples_leaf=5, random_state=3
    ).fit(rows, classes)
    model = baselines.fit_forest(rows, classes, 3, trees=20)
    ours = reopened("forest", model, n_classes, 5).predict_proba(rows)
    np.testing.assert_allclose(ours, theirs.predict_proba(rows), rtol=0, atol=1e-12)


def test_stored_neighbours_vote_by_how_near_they_are() -> None:
    rows, classes = some_cells(3, 40)
    model = reopened("knn", baselines.fit_knn(rows, classes, neighbours=5), 3, 5)
    asked = some_cells(4, 6)[0]
    unit, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, asked))
    far = 1 - other @ unit.T
    for said, distances in zip(model.predict_proba(asked), far, strict=True):
        nearest = distances.argsort()[:5]
        votes = [sum(1 / distances[i] for i in nearest if classes[i] == k) for k in range(3)]
        np.testing.assert_allclose(said, np.array(votes) / sum(votes), atol=1e-3)
    # A cell that it has learned from is its own nearest, how long the row is says nothing, and
    # of fewer cells than neighbours all vote.
    assert model.predict_proba(7 * rows).argmax(axis=1).tolist() == classes.tolist()
    assert baselines.fit_knn(rows[:4], classes[:4]).predict_proba(asked).shape == (6, 3)


def test_a_logistic_model_that_did_not_converge_says_so() -> None:
    rows, classes = some_cells(3)
    assert not baselines.fit_logistic(rows, classes, steps=1)[1]


def test_the_majority_is_a_share_for_each_class() -> None:
    model = reopened("majority", baselines.fit_majority(np.repeat([0, 1, 2], [6, 3, 1])), 3, 0)
    said = model.predict_proba(np.empty((2, 0)))
    np.testing.assert_allclose(said, [[0.6, 0.3, 0.1]] * 2)


def test_a_class_may_have_neither_many_cells_nor_few() -> None:
    cells = np.array([[10, 11, 12], [50, 55, 60], [250, 260, 300]]).ravel()
    classes = np.repeat([0, 1, 2], 3)
    rows = baselines.count_rows(cells)
    scaler = Scaler.fit(baselines.COUNT_COLUMNS, [rows])
    model, _ = baselines.fit_logistic(scaler.transform(rows), classes, strength=0.01)
    said = model.predict_proba(scaler.transform(baselines.count_rows([9, 57, 400])))
    assert said.argmax(axis=1).tolist() == [0, 1, 2]


def test_positions_are_learned_by_heart_and_guessed_from_their_neighbours() -> None:
    rows, columns = (grid.ravel() for grid in np.meshgrid(np.arange(1, 9), np.arange(1, 13)))
    places = np.stack([rows, columns], axis=1)
    scattered = np.random.default_rng(0).permutation(96) % 24  # 24 treatments, 4 wells each
    by_heart = baselines.fit_forest(places, scattered, 0, 100, None, 1, all_columns=True)
    assert np.mean(by_heart.predict_proba(places).argmax(axis=1) == scattered) > 0.95
    halves = (columns > 6).astype(np.int64)  # a treatment on each half of the plate
    known = (rows + columns) % 2 == 0
    by_place = baselines.fit_forest(places[known], halves[known], 0, 100, None, 1, all_columns=True)
    assert np.mean(by_place.predict_proba(places[~known]).argmax(axis=1) == halves[~known]) > 0.9


def test_names_are_chosen_alone_or_as_a_group() -> None:
    assert baselines.choose(["logistic", "null"]) == (*baselines.NULLS, "logistic")
    assert baselines.choose(["all"]) == baselines.BASELINES
    assert baselines.choose(["probe"]) == ("logistic", "knn")
    with pytest.raises(UnknownNameError, match=r"Unknown baseline 'forrest'.*forest"):
        baselines.choose(["forrest"])
    with pytest.raises(UserInputError, match="Name a baseline"):
        baselines.choose([])


def test_a_damaged_checkpoint_is_one_sentence() -> None:
    rows, classes = some_cells(3)
    forest = baselines.fit_forest(rows, classes, 0, trees=2)
    record = meta("forest", 3, 5).to_json()
    with pytest.raises(StorageError, match="damaged"):
        load_model(save_estimator(forest)[:-9], record)
    with pytest.raises(StorageError, match="classes are not those"):
        load_model(save_estimator(forest), meta("forest", 4, 5).to_json())
    for name, value, message in (
        ("children_left", 0, "leads back"),
        ("children_right", 99_999, "out of it"),
        ("feature", 5, "a column that is not there"),
    ):
        broken = baselines.fit_forest(rows, classes, 0, trees=2)
        getattr(broken.estimators_[1].tree_, name)[0] = value
        with pytest.raises(StorageError, match=message):
            load_model(save_estimator(broken), record)
    with pytest.raises(UserInputError, match="does not describe a model"):
        load_model(save_estimator(forest), {"model": "forest"})
    with pytest.raises(UserInputError, match="'pickle', which this cellstore does not know"):
        load_model(b"", record | {"model": "pickle"})


def test_a_file_that_holds_anything_else_is_not_opened() -> None:
    skops = pytest.importorskip("skops.io")
    strange = skops.dumps(print)
    with pytest.raises(StorageError, match="damaged or of another model"):
        load_model(strange, meta("logistic", 3, 5).to_json())


def test_the_same_model_is_the_same_file() -> None:
    rows, classes = some_cells(3)
    one, other = (baselines.fit_forest(rows, classes, 0, trees=3) for _ in range(2))
    assert save_estimator(one) == save_estimator(other)
    assert save_estimator(one) != save_estimator(baselines.fit_forest(rows, classes, 1, trees=3))
