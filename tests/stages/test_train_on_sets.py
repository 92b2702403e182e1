"""Networks on feature sets of other tools, of fewer branches, and what they say of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import Factory
from safetensors.torch import load
from small_training import TINY, Opener, Trained, checkpoint, said
from sqlalchemy import func, select, update

from cellstore.analysis.features import FEATURE_NAMES, GROUPS
from cellstore.config import MeasureParams, PredictParams, Selection
from cellstore.enums import Stage, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn import batches
from cellstore.models import Cell, FeatureSet, Image, Job, Recipe, Run, Segmentation, SplitMember
from cellstore.stages.measure import measure
from cellstore.stages.predict import predict
from cellstore.stages.train import train

FOUR = 4
"""Cells of each of the six images that another tool found."""


def imported(workspace: Workspace, **known: Any) -> list[Cell]:
    """Cells of another tool in the six images of the store, without pixels unless ``known``."""
    make = Factory(workspace)
    recipe = make.recipe(Stage.SEGMENT, parameters={"imported": "CellProfiler", "name": "cp"})
    run = make.run(Stage.INGEST)
    values = {"content_sha256": None, "mask_artifact_id": None, "flow_artifact_id": None, **known}
    with workspace.database.read() as session:
        images = session.scalars(select(Image).order_by(Image.id)).all()
    made = [make.segmentation(i, run, FOUR, recipe_id=recipe.id, **values) for i in images]
    return [cell for found in made for cell in make.cells_of(found)]


def add_set(workspace: Workspace, cells: list[Cell], **columns: Any) -> FeatureSet:
    """Feature set ``cp``: ``columns``, and one that tells the wells apart by their number."""
    with workspace.database.read() as session:
        recipe_id = session.scalars(
            select(Segmentation.recipe_id).where(Segmentation.id == cells[0].segmentation_id)
        ).one()
        recipe = session.get_one(Recipe, recipe_id)
    columns = {"number": [float(cell.id) for cell in cells], **columns}
    return Factory(workspace).feature_files("cp", cells, columns, recipe, rows_of_file=FOUR)


def side_of(workspace: Workspace, cells: list[Cell], side: Subset) -> list[bool]:
    with workspace.database.read() as session:
        images = set(
            session.scalars(select(SplitMember.image_id).where(SplitMember.subset == side))
        )
        of = dict(session.execute(select(Segmentation.id, Segmentation.image_id)).all())
    return [of[cell.segmentation_id] in images for cell in cells]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_file(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(batches, "open_file", open_file)


@pytest.mark.usefixtures("no_pixels")
def test_features_without_masks_train_a_tabular_network(built: Path, opened: Opener) -> None:
    from cellstore.learn.crops import CellBlock
    from cellstore.learn.trained_models import load_model, predict_batch

    workspace = opened(built)
    cells = imported(workspace)
    gaps = [None if index % 3 == 0 else float(index % 5) for index in range(len(cells))]
    add_set(workspace, cells, gaps=gaps)
    result = train(workspace, replace(TINY, features="cp"), device="cpu")
    assert (result.feature_set, result.branches) == ("cp", ("tabular",))
    assert result.cells == {"train": 2 * FOUR, "validation": 2 * FOUR}
    assert [note for note in result.notes if note.endswith("the network looks at: tabular.")]
    tensors, record = checkpoint(workspace, result.run_id)
    assert record["feature_set"] == "cp"
    assert record["scaler"]["names"] == ["number", "gaps"]
    assert not [name for name in load(tensors) if name.startswith(("mask_", "flow_"))]

    predicted = predict(workspace, device="cpu")
    rows = said(workspace, predicted.run_id)
    there = side_of(workspace, cells, Subset.TEST)
    mine = [cell for cell, wanted in zip(cells, there, strict=True) if wanted]
    assert {row[0] for row in rows} == {cell.id for cell in mine}
    model, meta = load_model(tensors, record)
    values = [[cell.id, np.nan if g is None else g] for cell, g in zip(cells, gaps, strict=True)]
    table = np.array(values, dtype=np.float64)[there]
    ids = torch.tensor([cell.id for cell in mine])
    chances = predict_batch(
        model, CellBlock({}, torch.from_numpy(meta.scaler.transform(table)), ids, ids)
    )
    by_cell = {cell.id: row for cell, row in zip(mine, chances, strict=True)}
    for cell_id, _rank, label, probability in rows:
        assert probability == pytest.approx(by_cell[cell_id][meta.labels.index(label)], abs=1e-4)


def test_a_network_learns_from_a_group_that_was_measured_here(
    trained: Trained, opened: Opener
) -> None:
    workspace, by_default = opened(trained.root), trained.result
    measured = measure(workspace, MeasureParams(features=("intensity",)))
    name = measured.feature_set
    result = train(workspace, replace(TINY, features=name), device="cpu")
    assert result.feature_set == name
    assert set(result.branches) == {"mask", "flow", "tabular"}
    _, record = checkpoint(workspace, result.run_id)
    columns = [feature.name for feature in GROUPS["intensity"].columns(["DNA"])]
    assert record["scaler"]["names"] == columns
    rows = said(workspace, predict(workspace, run=str(result.run_id), device="cpu").run_id)
    assert len({row[0] for row in rows}) == 2 * FOUR
    assert train(workspace, TINY, device="cpu").run_id == by_default.run_id


def test_images_not_measured_by_a_group_are_not_labelled(built: Path, opened: Opener) -> None:
    """Their cells are within the range of cells of the file, and yet not in it."""
    workspace = opened(built)
    with workspace.database.read() as session:
        images = session.scalars(select(Image.id).order_by(Image.id)).all()
        tested = select(SplitMember.image_id).where(SplitMember.subset == Subset.TEST)
        lacking = session.scalars(tested.where(SplitMember.image_id.in_(images[1:-1]))).first()
    others = Selection(where=f"image_id != {lacking}")
    name = measure(workspace, MeasureParams(features=("intensity",)), others).feature_set
    result = train(workspace, replace(TINY, features=name), device="cpu")
    everything = PredictParams(subset=None)
    predict(workspace, everything, run=str(result.run_id), device="cpu")
    with workspace.database.read() as session:
        jobs = select(Job.image_id).join(Recipe).where(Recipe.stage == Stage.PREDICT)
        assert sorted(session.scalars(jobs)) == [image for image in images if image != lacking]


def test_a_side_that_a_group_was_not_measured_on_says_what_to_run(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    first = Selection(limit=1)
    name = measure(workspace, MeasureParams(features=("texture",)), first).feature_set
    with pytest.raises(UserInputError, match="Run: cellstore measure --features texture"):
        train(workspace, replace(TINY, features=name), device="cpu")


def test_the_scaler_of_a_set_knows_the_training_side_only(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    cells = imported(workspace)
    training = side_of(workspace, cells, Subset.TRAIN)
    holes = [float(i) if i % 2 else None for i in range(len(cells))]
    elsewhere = [None if here else 1.0 for here in training]
    texts = ["x"] * len(cells)
    add_set(workspace, cells, holes=holes, elsewhere=elsewhere, texts=texts)
    result = train(workspace, replace(TINY, epochs=1, features="cp"), device="cpu")
    assert result.columns_excluded == ("elsewhere",)
    assert [note for note in result.notes if "1 columns of the feature set have no value" in note]
    _, record = checkpoint(workspace, result.run_id)
    assert record["scaler"]["names"] == ["number", "holes"]
    table = np.array(
        [[c.id, np.nan if h is None else h] for c, h in zip(cells, holes, strict=True)]
    )
    np.testing.assert_allclose(record["scaler"]["mean"], np.nanmean(table[training], axis=0))
    np.testing.assert_allclose(record["scaler"]["scale"], np.nanstd(table[training], axis=0))


@pytest.mark.usefixtures("no_pixels")
def test_images_that_were_never_seen_are_labelled_by_their_features(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    cells = imported(workspace)
    add_set(workspace, cells)
    with workspace.database.begin() as session:
        session.execute(update(Image).values(content_sha256=None))
    result = train(workspace, replace(TINY, features="cp"), device="cpu")
    assert result.branches == ("tabular",)
    first = predict(workspace, device="cpu")
    assert (first.done, first.waiting, first.cells) == (2, 0, 2 * FOUR)
    again = predict(workspace, device="cpu")
    assert (again.run_id, again.done, again.earlier) == (first.run_id, 0, 2)
    params = PredictParams(embedding="seen")
    embedded = predict(workspace, params, device="cpu")
    again = predict(workspace, params, device="cpu")
    assert (again.run_id, again.done, again.notes) == (embedded.run_id, 0, embedded.notes)
    with workspace.database.read() as session:
        assert "resumed" not in session.get_one(Run, embedded.run_id).environment


@pytest.mark.usefixtures("no_pixels")
def test_a_branch_that_nothing_feeds_is_refused(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    add_set(workspace, imported(workspace))
    wanted = replace(TINY, features="cp", branches=("mask", "tabular"))
    with pytest.raises(UserInputError, match=r"masks or the pixels.*Use --branches tabular"):
        train(workspace, wanted, device="cpu")
    with pytest.raises(UnknownNameError, match="'colour'"):
        train(workspace, replace(wanted, branches=("colour",)), device="cpu")
    with pytest.raises(UnknownNameError, match="Unknown feature set 'cq'"):
        train(workspace, replace(wanted, features="cq"), device="cpu")
    with pytest.raises(UserInputError, match="Name the feature set alone"):
        train(workspace, replace(TINY, features="cp"), segmentation="1", device="cpu")


def of_our_masks(workspace: Workspace, **changes: Any) -> list[Cell]:
    """Our own cells, with what is known of them changed."""
    with workspace.database.begin() as session:
        if changes:
            session.execute(update(Segmentation).values(changes))
        query = select(Cell).where(Cell.excluded.is_(None)).order_by(Cell.id)
        return list(session.scalars(query))


@pytest.mark.heavy
def test_masks_without_flows_train_two_branches(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    add_set(workspace, of_our_masks(workspace, flow_artifact_id=None))
    result = train(workspace, replace(TINY, epochs=1, features="cp"), device="cpu")
    assert result.branches == ("mask", "tabular")
    assert [note for note in result.notes if "there are no flows" in note]
    assert predict(workspace, device="cpu").cells == 8


@pytest.mark.heavy
def test_pictures_alone_read_no_features(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    wanted = replace(TINY, epochs=1, branches=("flow", "mask"))
    result = train(workspace, wanted, device="cpu")
    assert result.branches == ("mask", "flow")
    _, record = checkpoint(workspace, result.run_id)
    assert (record["scaler"]["names"], record["shape"]["n_features"]) == ([], 0)
    assert predict(workspace, device="cpu").cells == 8


@pytest.mark.usefixtures("no_pixels")
def test_the_built_in_set_is_named_too(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    with workspace.database.read() as session:
        name = session.scalars(select(FeatureSet.name)).one()
    assert name.startswith("basic_")
    wanted = replace(TINY, epochs=1, features=name, branches=("tabular",))
    result = train(workspace, wanted, device="cpu")
    _, record = checkpoint(workspace, result.run_id)
    assert record["scaler"]["names"] == list(FEATURE_NAMES)
    again = train(workspace, replace(wanted, features=None), device="cpu")
    assert (again.run_id, again.already_done) == (result.run_id, True)


@pytest.mark.usefixtures("no_pixels")
def test_what_became_of_the_set_since_training_is_told(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    cells = imported(workspace)
    late = side_of(workspace, cells, Subset.TEST)
    early = [cell for cell, is_late in zip(cells, late, strict=True) if not is_late]
    found = add_set(workspace, early, extra=[1.0] * len(early))
    trained = train(workspace, replace(TINY, epochs=1, features="cp"), device="cpu")
    everything = PredictParams(subset=None)
    first = predict(workspace, everything, device="cpu")
    assert (first.done, first.waiting, first.cells) == (4, 2, 4 * FOUR)
    assert predict(workspace, everything, device="cpu").run_id == first.run_id
    rest = [cell for cell, is_late in zip(cells, late, strict=True) if is_late]
    add_set(workspace, rest, extra=[2.0] * len(rest))
    second = predict(workspace, everything, device="cpu")
    assert (second.done, second.waiting, second.cells) == (6, 0, 6 * FOUR)
    assert not train(workspace, replace(TINY, epochs=1, features="cp"), device="cpu").already_done

    run = str(trained.run_id)
    with workspace.database.begin() as session:
        row = session.get_one(FeatureSet, found.id)
        row.columns = [item for item in row.columns if item["name"] != "extra"]
    with pytest.raises(UserInputError, match=r"no longer has 1 columns.*extra\. Train again"):
        predict(workspace, everything, run=run, device="cpu")
    other = Factory(workspace).recipe(Stage.MEASURE)
    with workspace.database.begin() as session:
        session.get_one(FeatureSet, found.id).name = "cp_old"
        session.flush()
        session.add(
            FeatureSet(name="cp", recipe_id=other.id, columns=row.columns, storage=row.storage)
        )
    with pytest.raises(UserInputError, match=f"another one since training run {run} read it"):
        predict(workspace, everything, run=run, device="cpu")
    with workspace.database.begin() as session:
        session.delete(session.scalars(select(FeatureSet).where(FeatureSet.name == "cp")).one())
    with pytest.raises(UnknownNameError, match=r"Unknown feature set 'cp'.*cp_old"):
        predict(workspace, everything, run=run, device="cpu")


def test_cells_that_nobody_measured_stop_a_training(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    cells = imported(workspace)
    training = side_of(workspace, cells, Subset.TRAIN)
    add_set(workspace, [cell for cell, here in zip(cells, training, strict=True) if not here])
    with pytest.raises(UserInputError, match=r"None of the 2 images in the training subset .*'cp'"):
        train(workspace, replace(TINY, features="cp"), device="cpu")


def test_masks_of_another_tool_are_measured_like_ours(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    theirs = Factory(workspace).recipe(Stage.SEGMENT, parameters={"imported": "StarDist"})
    with workspace.database.begin() as session:
        session.execute(
            update(Segmentation).values(
                recipe_id=theirs.id, content_sha256=None, flow_artifact_id=None
            )
        )
    result = measure(workspace)
    assert (result.done, result.cells) == (6, 6 * 5)
    with workspace.database.read() as session:
        jobs = session.scalars(select(Job).where(Job.recipe_id == result.recipe_id)).all()
    assert len(jobs) == 6


def test_cells_without_masks_cannot_be_measured(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    cells = imported(workspace)
    with workspace.database.read() as session:
        recipe = session.get_one(Segmentation, cells[0].segmentation_id).recipe_id
    with pytest.raises(UserInputError, match=r"masks are unknown.*cellstore ingest masks"):
        measure(workspace, segmentation=str(recipe))
    with workspace.database.begin() as session:
        mask = session.scalar(select(func.max(Segmentation.mask_artifact_id)))
        row = session.get_one(Segmentation, cells[0].segmentation_id)
        row.mask_artifact_id = mask
    failed = dict(measure(workspace, segmentation=str(recipe)).failures)
    assert sum("masks are unknown" in reason for reason in failed.values()) == 5
