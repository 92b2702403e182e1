"""Baselines in a store: runs like any other, which label like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import Factory
from small_training import Opener, cells_of, checkpoint, run_of, said
from sqlalchemy import delete, select, text

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import BaselineParams, SplitParams
from cellstore.enums import Stage, Status, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn.baselines import BASELINES, FOREST, LOGISTIC, NULLS
from cellstore.models import CellFeatures, Image, Label, Recipe, Split, SplitMember
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train_baselines import BaselineResult, train_baselines
from cellstore.store import Store

FEW = BaselineParams(trees=5, smallest_leaf=1)


def one(workspace: Workspace, kind: str, params: BaselineParams = FEW) -> BaselineResult:
    (result,) = train_baselines(workspace, [kind], params)
    return result


def labels(workspace: Workspace, kind: str) -> dict[int, dict[str, float]]:
    """The probabilities of each label by cell of the test side."""
    run_id = predict(workspace, run=str(one(workspace, kind).run_id), device="cpu").run_id
    found: dict[int, dict[str, float]] = {}
    for cell, _, label, probability in said(workspace, run_id):
        found.setdefault(cell, {})[label] = probability
    return found


def test_every_baseline_is_a_run_that_labels(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    results = Store(workspace).train_baselines(["all"], FEW)
    assert tuple(item.baseline for item in results) == BASELINES
    test_cells = set(cells_of(workspace, "by-well", Subset.TEST))
    for item in results:
        run = run_of(workspace, item.run_id)
        assert (run.stage, run.status, run.split_id) == (Stage.TRAIN, Status.DONE, 1)
        assert (item.classes, item.images, item.cells, item.already_done) == (2, 2, 8, False)
        assert item.null == (item.baseline in NULLS)
        record = checkpoint(workspace, item.run_id)[1]
        assert (record["model"], record["labels"]) == (item.baseline, ["DMSO", "drug"])
        with workspace.database.read() as session:
            parameters = session.get_one(Recipe, run.recipe_id).parameters
            assert session.get_one(Split, 1).frozen_at is not None
        assert parameters["baseline"] == item.baseline
        rows = said(workspace, item.predict_run_id or 0)
        assert {row[0] for row in rows} == test_cells
        assert all(sum(r[3] for r in rows if r[0] == c) == pytest.approx(1) for c in test_cells)


def test_what_is_done_is_not_done_again_unless_it_must(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    first = one(workspace, LOGISTIC)
    assert one(workspace, LOGISTIC) == replace(first, already_done=True)
    # what does not matter to a logistic regression makes no other one
    assert one(workspace, LOGISTIC, replace(FEW, trees=7)).run_id == first.run_id
    assert one(workspace, LOGISTIC, replace(FEW, strength=2.0)).run_id != first.run_id
    (again,) = train_baselines(workspace, [LOGISTIC], FEW, force=True)
    assert again.run_id != first.run_id
    assert again.checkpoint_sha256 == first.checkpoint_sha256


def test_the_logistic_baseline_is_that_of_scikit_learn(built: Path, opened: Opener) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    workspace = opened(built)
    training = cells_of(workspace, "by-well", Subset.TRAIN)
    test = cells_of(workspace, "by-well", Subset.TEST)
    rows = np.array(list(training.values()))
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale <= 1e-12 * np.abs(mean)] = 1
    truth = cell_labels(workspace, training)
    model = linear_model.LogisticRegression(max_iter=1000).fit((rows - mean) / scale, truth)
    expected = model.predict_proba((np.array(list(test.values())) - mean) / scale)
    found = labels(workspace, LOGISTIC)
    ours = [[found[cell][label] for label in ("DMSO", "drug")] for cell in test]
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # features are kept in 32 bits


def cell_labels(workspace: Workspace, cells: dict[int, list[float]]) -> list[str]:
    query = text(
        "SELECT c.id, t.name FROM cells c JOIN segmentations g ON g.id = c.segmentation_id "
        "JOIN images i ON i.id = g.image_id JOIN wells w ON w.id = i.well_id "
        "JOIN treatments t ON t.id = w.treatment_id"
    )
    with workspace.database.read() as session:
        truth = dict(session.execute(query).all())
    return [truth[cell] for cell in cells]


def test_all_cells_of_an_image_get_the_same_answer(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    with workspace.database.read() as session:
        areas = dict(session.execute(select(CellFeatures.cell_id, CellFeatures.area)).all())
    for kind in ("cellcount", "position", "majority"):
        found = labels(workspace, kind)
        assert len({areas[cell] for cell in found}) > 1  # cells that differ
        by_image = [list(found.values())[:4], list(found.values())[4:]]  # four cells each
        assert all(len({tuple(x.items()) for x in image}) == 1 for image in by_image)
    # One training image of each class:
    assert set(map(tuple, (x.items() for x in found.values()))) == {(("DMSO", 0.5), ("drug", 0.5))}


def test_only_as_many_cells_are_learned_from_as_may_be(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    found = one(workspace, FOREST, replace(FEW, max_cells=3))
    assert (found.cells, found.rows) == (8, 3)
    record = checkpoint(workspace, found.run_id)[1]
    every = np.array(list(cells_of(workspace, "by-well", Subset.TRAIN).values()))
    area = FEATURE_NAMES.index("area")
    # scaled as the whole training side is, not as the three
    assert record["scaler"]["mean"][area] == pytest.approx(every[:, area].mean())


def test_shuffled_labels_keep_wells_together(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    params = [replace(FEW, seed=seed) for seed in range(6)]
    found = [one(workspace, "shuffled", item) for item in params]
    notes = {item.notes[-1] for item in found}
    # two wells of two classes: both keep their label, or neither does
    assert notes == {
        f"Labels were shuffled between wells; {n} of 2 wells got their own label back by chance."
        for n in (0, 2)
    }
    straight = one(workspace, LOGISTIC)
    swapped = next(item for item in found if "wells; 0 of" in item.notes[-1])
    same = next(item for item in found if "wells; 2 of" in item.notes[-1])
    assert same.checkpoint_sha256 == straight.checkpoint_sha256
    assert swapped.checkpoint_sha256 != straight.checkpoint_sha256


def test_labels_are_shuffled_among_the_wells_that_are_learned_from(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    with workspace.database.read() as session:
        query = select(Image, Label).join(SplitMember, SplitMember.image_id == Image.id)
        rows = session.execute(query.join(Label, Label.id == SplitMember.label_id)).all()
    drug = next(row for row in rows if row.Label.value == "drug")
    training = [row for row in rows if row.Label.value == "DMSO"] + [drug]
    assert len(training) == 4
    members = [(row.Image, Subset.TRAIN, row.Label) for row in training]
    Factory(workspace).split(members, name="uneven")
    # A cell of each class is drawn: of one of three wells, and of the fourth.
    for seed in range(6):
        found = one(workspace, "shuffled", replace(FEW, max_cells=2, seed=seed))
        assert " of 2 wells got" in found.notes[-1]
        assert checkpoint(workspace, found.run_id)[1]["labels"] == ["DMSO", "drug"]


def test_same_baseline_and_cells_give_the_same_rows(built: Path, opened: Opener) -> None:
    said_twice = []
    for _ in range(2):
        workspace = opened(built)
        run = Store(workspace).train_baselines(["forest"], FEW)[0]
        said_twice.append(said(workspace, run.predict_run_id or 0))
    assert said_twice[0] == said_twice[1]


def test_without_a_test_side_nothing_is_labelled(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    store = Store(workspace)
    assert store.train_baselines(["majority"], FEW, predict=False)[0].predict_run_id is None
    create_split(workspace, "no-test", SplitParams(test_size=0.3, validation_size=0.3))
    with workspace.database.begin() as session:
        test_side = delete(SplitMember).where(SplitMember.subset == Subset.TEST)
        session.execute(test_side.where(SplitMember.split_id == 2))
    assert store.train_baselines(["majority"], FEW)[0].predict_run_id is None


def test_what_cannot_be_done_is_said(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    with pytest.raises(UnknownNameError, match="Unknown baseline 'tree'"):
        train_baselines(workspace, ["tree"])
    with pytest.raises(UserInputError, match="above 0"):
        train_baselines(workspace, ["null"], replace(FEW, strength=0.0))
    with pytest.raises(UserInputError, match="1 cells cannot be of all 2 classes"):
        train_baselines(workspace, ["null"], replace(FEW, max_cells=1))
    with pytest.raises(UnknownNameError, match="feature set 'cp'"):
        train_baselines(workspace, ["null"], replace(FEW, features="cp"))
    with workspace.database.begin() as session:
        drug = select(Label.id).where(Label.value == "drug")
        session.execute(delete(SplitMember).where(SplitMember.label_id.in_(drug)))
    with pytest.raises(UserInputError, match="of one class only, DMSO"):
        train_baselines(workspace, ["majority"])
    with workspace.database.begin() as session:
        session.execute(delete(SplitMember))
    with pytest.raises(UserInputError, match="no image in its training subset"):
        train_baselines(workspace, ["majority"])
