"""What predict can be asked for: any images, all classes, embeddings, plates nobody has seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import Factory
from small_models import PLAIN, WIDTH, craft
from small_training import TINY, Opener, build, fail_at, pixels, run_of, said
from sqlalchemy import func, select, update
from unguarded import unguarded

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import PredictParams, SplitParams
from cellstore.enums import Control, ImageFlagReason, Stage, Status, Subset
from cellstore.errors import CellstoreError, StorageError, UnknownNameError, UserInputError
from cellstore.jobs.runs import running
from cellstore.jobs.workspace import Workspace
from cellstore.learn import trained_models as models
from cellstore.learn.normalising import Scale
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Prediction,
    Recipe,
    Run,
    RunArtifact,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from cellstore.query import feature_files
from cellstore.query.feature_files import SetReader, open_set
from cellstore.report.scoring import report
from cellstore.stages import predict as predict_module
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train import train
from cellstore.stages.verify import verify
from cellstore.store import Store

EVERYTHING = PredictParams(subset=None)


def labelled(workspace: Workspace, run_id: int) -> set[str]:
    """The wells of the images whose cells a run has labelled."""
    query = (
        select(Image.core_name)
        .join(Segmentation, Segmentation.image_id == Image.id)
        .join(Cell, Cell.segmentation_id == Segmentation.id)
        .join(Prediction, Prediction.cell_id == Cell.id)
        .where(Prediction.run_id == run_id)
    )
    with workspace.database.read() as session:
        return {f"A{name[4:6]}" for name in session.scalars(query)}


def side(workspace: Workspace, split: str, *subsets: Subset) -> set[str]:
    query = select(Image.core_name).join(SplitMember, SplitMember.image_id == Image.id)
    query = query.join(Split, Split.id == SplitMember.split_id)
    query = query.where(Split.name == split, SplitMember.subset.in_(subsets))
    with workspace.database.read() as session:
        return {f"A{name[4:6]}" for name in session.scalars(query)}


def test_any_images_can_be_labelled(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    run = str(craft(workspace))
    create_split(workspace, "other", SplitParams(seed=5, test_size=0.3))

    def wells(**params: object) -> set[str]:
        result = predict(workspace, PredictParams(**params), run=run, device="cpu")  # type: ignore[arg-type]
        assert run_of(workspace, result.run_id).query is not None
        return labelled(workspace, result.run_id)

    everything = {f"A{column:02d}" for column in range(1, 7)}
    assert wells(subset=None) == everything
    assert wells() == side(workspace, "by-well", Subset.TEST)
    assert wells(split="other") == side(workspace, "other", Subset.TEST)
    assert wells(split="other", subset=None) == side(workspace, "other", *Subset)
    assert wells(subset=None, wells=("A02", "A05")) == {"A02", "A05"}
    assert wells(subset=None, where="perturbation = 'drug'") == {"A02", "A04", "A06"}
    assert wells(subset=None, where="well_column > 2", limit=2) == {"A03", "A04"}
    # The limit counts images of the side, not the first images of the store.
    assert len(wells(limit=1)) == 1
    with pytest.raises(UserInputError, match="Of the 0 images that meet every condition"):
        wells(wells=("A02",), where="well_column = 3")


def test_the_query_of_a_run_names_its_cells(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    craft(workspace)
    some = ("A03", "A05", "A06")
    params = PredictParams(subset=None, where="well_column > 2", limit=2, wells=some)
    result = predict(workspace, params, device="cpu")
    with workspace.database.read() as session:
        query = run_of(workspace, result.run_id).query or ""
        found = {row[1] for row in session.connection().exec_driver_sql(query)}
    assert found == {row[0] for row in said(workspace, result.run_id)}


def test_every_probability_is_kept_if_asked_for(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    craft(workspace, labels=("DMSO", "drug"))
    best = predict(workspace, PredictParams(top_k=1), device="cpu")
    whole = predict(workspace, PredictParams(top_k=1, all_probabilities=True), device="cpu")
    again = predict(workspace, PredictParams(top_k=9, all_probabilities=True), device="cpu")
    assert again.run_id == whole.run_id != best.run_id
    kept = said(workspace, whole.run_id)
    assert len(kept) == 2 * len(said(workspace, best.run_id))
    assert [row for row in kept if row[1] == 1] == said(workspace, best.run_id)
    sums: dict[int, float] = {}
    for cell, _, _, probability in kept:
        sums[cell] = sums.get(cell, 0.0) + probability
    assert list(sums.values()) == pytest.approx([1.0] * len(sums))


def test_the_same_cells_get_the_same_rows_in_any_company(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CELLS_PER_STEP", 3)  # so that an image makes two batches
    first, second = opened(built), opened(built)
    for workspace in (first, second):
        craft(workspace, branches=("mask", "tabular"))
    one = said(first, predict(first, EVERYTHING, device="cpu").run_id)
    predict(second, PredictParams(subset=None, wells=("A03",)), device="cpu")
    assert said(second, predict(second, EVERYTHING, device="cpu").run_id) == one
    alone = said(second, predict(second, PredictParams(wells=("A03",), subset=None)).run_id)
    assert alone == [row for row in one if row[0] in {mine[0] for mine in alone}]


def test_what_the_model_has_met_is_said(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    run = craft(workspace)
    result = predict(workspace, EVERYTHING, device="cpu")
    end = "Accuracy on them tells little about new wells."
    assert result.notes == (
        f"2 of the 6 images were used to train run {run}. {end}",
        f"2 of the 6 images decided when the training of run {run} stopped. {end}",
    )
    assert (run_of(workspace, result.run_id).result or {})["notes"] == list(result.notes)
    with unguarded(workspace) as session:
        test = select(SplitMember.image_id).where(SplitMember.subset == Subset.TEST)
        train_side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TRAIN)
        well = session.scalars(select(Image.well_id).where(Image.id.in_(train_side))).first()
        tested = session.scalars(select(Image).where(Image.id.in_(test))).first()
        assert tested is not None
        tested.well_id, tested.site = well, 2  # type: ignore[assignment]
    (note,) = predict(workspace, PredictParams(top_k=2), device="cpu").notes
    assert note.startswith(f"1 of the 2 images are from wells that run {run} was trained on")


def vectors_of(workspace: Workspace, name: str) -> dict[int, list[float]]:
    with workspace.database.read() as session:
        recipe = select(FeatureSet.recipe_id).where(FeatureSet.name == name)
        found = open_set(session, workspace.artifacts, session.scalars(recipe).one())
        ids = np.array(session.scalars(select(Cell.id).order_by(Cell.id)).all())
        there, values = SetReader(found.files)(session, ids, found.columns)
    return dict(zip(ids[there].tolist(), values[there].tolist(), strict=True))


def expected_vectors(workspace: Workspace, run_id: int) -> dict[int, list[float]]:
    """What the layers before the classifier make of the features in the table."""
    query = select(Artifact).join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
    with workspace.database.read() as session:
        files = {
            item.path.rpartition(".")[2]: workspace.artifacts.read(item.path, item.sha256)
            for item in session.scalars(query.where(RunArtifact.run_id == run_id))
        }
        columns = [getattr(CellFeatures, name) for name in FEATURE_NAMES]
        cells = select(CellFeatures.cell_id, *columns).join(Cell, Cell.id == CellFeatures.cell_id)
        found = session.execute(cells.where(Cell.excluded.is_(None))).all()
    net, meta = models.load_model(files["safetensors"], json.loads(files["json"]))
    features = torch.from_numpy(meta.scaler.transform(np.array([row[1:] for row in found], float)))
    with torch.no_grad():
        fused = net.get_submodule("tabular_branch")(features)
        vectors = net.projection(fused * net.attention(fused))
    return dict(zip([row[0] for row in found], vectors.tolist(), strict=True))


def same(found: dict[int, list[float]], expected: dict[int, list[float]]) -> bool:
    return found.keys() == expected.keys() and all(
        np.allclose(found[cell], expected[cell], atol=1e-5) for cell in found
    )


@pytest.mark.heavy
def test_embeddings_are_a_feature_set_like_any_other(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    build(workspace, tmp_path / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    run_id = craft(workspace)
    some = PredictParams(embedding="seen")
    first = predict(workspace, some, device="cpu")
    assert (first.feature_set, first.cells) == ("seen", 8)
    # The other images are added, those that are there are not embedded again.
    second = predict(workspace, replace(some, subset=None), device="cpu")
    assert (second.done, second.cells) == (6, 24)
    expected = expected_vectors(workspace, run_id)
    assert same(vectors_of(workspace, "seen"), expected)
    assert len(expected) == 24
    counts = select(FeatureFile.run_id, func.sum(FeatureFile.n_rows)).order_by(FeatureFile.run_id)
    with workspace.database.read() as session:
        of_runs = session.execute(counts.group_by(FeatureFile.run_id)).all()
    assert of_runs == [(first.run_id, 8), (second.run_id, 16)]
    assert verify(workspace).problems == ()
    store = Store(workspace)
    asked = store.sql("SELECT count(*) AS n, count(embedding_004) AS known FROM seen")
    assert asked.to_pylist() == [{"n": 24, "known": 24}]
    written = store.export(tmp_path / "cells.parquet", format="parquet", features="seen")
    assert (written.features, written.feature_sets) == (WIDTH, ("seen",))
    trained = train(
        workspace, replace(TINY, features="seen", branches=("tabular",), epochs=1), device="cpu"
    )
    assert (trained.feature_set, trained.cells["train"]) == ("seen", 8)


@pytest.mark.one_database
@pytest.mark.heavy
def test_an_embedding_that_knows_the_wells_of_a_test_side_is_said_to_leak(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    build(workspace, tmp_path / "images")
    create_split(workspace, "first", SplitParams(test_size=0.3, validation_size=0.3))
    craft(workspace)
    predict(workspace, PredictParams(embedding="seen", subset=None), device="cpu")
    params = replace(TINY, features="seen", branches=("tabular",), epochs=1)
    words = "an embedding by training run"
    honest = train(workspace, params, split="first", device="cpu")
    assert not any(words in note for note in honest.notes)
    create_split(workspace, "second", SplitParams(test_size=0.3, validation_size=0.3, seed=5))
    leaking = train(workspace, params, split="second", device="cpu")
    assert any(words in note for note in leaking.notes)
    labelled = predict(workspace, run=str(leaking.run_id), device="cpu")
    assert any(words in note for note in report(workspace, str(labelled.run_id)).notes)
    # Nor does an embedding of the embedding forget what the first network was taught.
    again = PredictParams(embedding="again", subset=None)
    predict(workspace, again, run=str(leaking.run_id), device="cpu")
    third = train(workspace, replace(params, features="again"), split="second", device="cpu")
    assert any(words in note for note in third.notes)


@pytest.mark.parametrize("moment", ["compute", "rows"])
def test_a_killed_run_leaves_no_half_embedding(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    workspace = opened(built)
    run_id = craft(workspace)
    params = replace(EVERYTHING, embedding="seen")
    monkeypatch.setattr(feature_files, "MOST_IMAGES", 2)
    with monkeypatch.context() as patch:
        if moment == "compute":
            fail_at(patch, 4, KeyboardInterrupt())
        else:
            patch.setattr(predict_module, "register_files", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict(workspace, params, device="cpu")
    with workspace.database.read() as session:
        before = session.scalar(select(func.count()).where(Prediction.rank == 1))
        cells = session.scalar(select(func.coalesce(func.sum(FeatureFile.n_rows), 0)))
        jobs = select(func.count()).select_from(Job)
        of_set = jobs.join(FeatureSet, FeatureSet.recipe_id == Job.recipe_id)
        of_set = of_set.where(Job.status == Status.DONE)
        embedded = session.scalar(of_set.where(FeatureSet.name == "seen"))
    assert before == cells == 4 * (embedded or 0) < 24
    result = predict(workspace, params, device="cpu")
    assert (result.done, result.earlier) == (6 - (embedded or 0), embedded)
    assert same(vectors_of(workspace, "seen"), expected_vectors(workspace, run_id))
    assert len(said(workspace, result.run_id)) == 48


def test_an_embedding_whose_file_is_gone_is_made_again(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    run_id = craft(workspace)
    params = replace(EVERYTHING, embedding="seen")
    monkeypatch.setattr(feature_files, "MOST_IMAGES", 2)
    first = predict(workspace, params, device="cpu")
    before = said(workspace, first.run_id)
    with workspace.database.read() as session:
        query = select(Artifact.path).join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        paths = list(session.scalars(query.order_by(Artifact.id)))
    workspace.artifacts.locate(paths[0]).unlink()
    again = predict(workspace, params, device="cpu")
    assert again.run_id == first.run_id
    assert any("embeddings of 2 images were made again" in note for note in again.notes)
    assert same(vectors_of(workspace, "seen"), expected_vectors(workspace, run_id))
    assert said(workspace, again.run_id) == before
    assert verify(workspace).problems == ()
    assert run_of(workspace, first.run_id).status is Status.DONE
    assert predict(workspace, params, device="cpu").notes == first.notes


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_embedding_keeps_its_name_and_takes_no_other(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    runs = [str(craft(workspace, seed=seed)) for seed in (1, 2)]
    predict(workspace, PredictParams(embedding="seen"), run=runs[0], device="cpu")
    for run, name, words in (
        (runs[0], "other", "kept as feature set 'seen' already: give --embedding seen"),
        (runs[1], "seen", "is not the embedding of training run"),
        (runs[1], "Bad name", "cannot name a feature set"),
        (runs[1], "cells", "is the name of a table. Give another --embedding"),
    ):
        with pytest.raises(UserInputError, match=words):
            predict(workspace, PredictParams(embedding=name), run=run, device="cpu")
    with workspace.database.read() as session:
        (found,) = session.scalars(
            select(FeatureSet).where(FeatureSet.name.not_like("basic%"))
        ).all()
    assert (found.name, len(found.columns)) == ("seen", WIDTH)


def test_a_plate_that_training_has_not_seen_has_its_own_controls(
    built: Path, opened: Opener
) -> None:
    n = len(FEATURE_NAMES)
    elsewhere = Scale((1.0,) * n, (2.0,) * n, 9)
    workspace = opened(built)
    run = craft(workspace, replace(PLAIN, plates={"elsewhere": elsewhere}))
    with pytest.raises(UserInputError, match="'P1' has 0 measured cells of negative controls"):
        predict(workspace, device="cpu")
    with workspace.database.begin() as session:
        session.execute(
            update(Well).where(Well.treatment.has(name="DMSO")).values(control=Control.NEGATIVE)
        )
    result = predict(workspace, EVERYTHING, device="cpu")
    assert result.notes[-1].endswith("normalised against their own negative controls: P1.")

    columns = [getattr(CellFeatures, name) for name in FEATURE_NAMES]
    query = (
        select(CellFeatures.cell_id, Image.core_name, *columns)
        .join(Cell, Cell.id == CellFeatures.cell_id)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .join(Image, Image.id == Segmentation.image_id)
        .where(Cell.excluded.is_(None))
    )
    with workspace.database.read() as session:
        found = session.execute(query).all()
        kept = session.scalars(
            select(Artifact)
            .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
            .where(RunArtifact.run_id == result.run_id)
        ).one()
    table = np.array([row[2:] for row in found], float)
    controls = table[[int(row[1][4:6]) % 2 == 1 for row in found]]
    mean, scale = controls.mean(axis=0), controls.std(axis=0)
    scale[scale < 1e-9] = 1
    record = json.loads(workspace.artifacts.read(kept.path, kept.sha256))["controls"]["P1"]
    assert record["mean"] == pytest.approx(mean.tolist())
    assert record["scale"] == pytest.approx(scale.tolist())
    assert record["cells"] == 12
    # The same as a network whose scaler knows this plate.
    known = Scale(tuple(record["mean"]), tuple(record["scale"]), 12)
    craft(workspace, replace(PLAIN, plates={"P1": known}))
    other = predict(workspace, EVERYTHING, device="cpu")
    assert other.train_run_id != run
    assert said(workspace, other.run_id) == said(workspace, result.run_id)
    assert not [note for note in other.notes if "own negative controls" in note]


def test_what_a_training_left_out_as_flagged_says_nothing_of_a_plate_either(
    built: Path, opened: Opener
) -> None:
    n = len(FEATURE_NAMES)
    workspace = opened(built)
    run = craft(workspace, replace(PLAIN, plates={"no": Scale((1.0,) * n, (2.0,) * n, 9)}))
    make = Factory(workspace)
    qc = make.run(Stage.QC)
    with workspace.database.begin() as session:
        session.execute(update(Well).values(control=Control.NEGATIVE))
        image = session.scalars(select(Image)).first()
        recipe = session.get_one(Recipe, run_of(workspace, run).recipe_id)
        recipe.parameters = {**recipe.parameters, "exclude_flagged": qc.id}
    assert image is not None
    make.flag_image(qc, image, ImageFlagReason.OUT_OF_FOCUS)
    result = predict(workspace, EVERYTHING, device="cpu")
    assert (result.done, result.cells) == (6, 24)  # labelled it is all the same
    with workspace.database.read() as session:
        (kept,) = session.scalars(
            select(Artifact)
            .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
            .where(RunArtifact.run_id == result.run_id)
        )
        found = json.loads(workspace.artifacts.read(kept.path, kept.sha256))
    assert found["controls"]["P1"]["cells"] == 20  # four of 24 are in the flagged image


def test_a_plate_that_training_has_not_seen_has_its_own_white(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    scales = [float(np.percentile(pixels(index), 99.9)) for index in range(6)]
    given: dict[str, dict[str, tuple[float, ...]] | None] = {
        "of each image": None,
        "unseen": {"elsewhere": (1.0,)},
        "known": {"P1": (float(np.median(scales)),)},
        "twice as bright": {"P1": (2 * float(np.median(scales)),)},
    }
    found, notes = {}, {}
    for seed, (name, levels) in enumerate(given.items()):
        scaler = replace(PLAIN, intensities=levels)
        run = craft(workspace, scaler, number=seed, branches=("mask", "tabular"))
        result = predict(workspace, EVERYTHING, run=str(run), device="cpu")
        found[name] = said(workspace, result.run_id)
        notes[name] = [note for note in result.notes if "intensity scale of their own" in note]
    assert found["unseen"] == found["known"]
    assert [name for name, said_of in notes.items() if said_of] == ["unseen"]
    assert notes["unseen"][0].endswith("images: P1.")
    assert len({str(rows) for rows in found.values()}) == 3


def unfinished(workspace: Workspace) -> None:
    with workspace.database.read() as session:
        recipe = session.scalars(select(Recipe).order_by(Recipe.id.desc())).first()
    assert recipe is not None
    with pytest.raises(ValueError, match="ended"), running(workspace.database, recipe, split_id=1):
        raise ValueError("ended")


def set_is_another(workspace: Workspace) -> None:
    """A set with the name that the network's record has, of another recipe."""
    with workspace.database.begin() as session:
        known = session.scalars(select(FeatureSet)).first()
        recipe = session.scalars(select(Recipe.id).order_by(Recipe.id.desc())).first()
        assert known is not None
        assert recipe is not None
        known.recipe_id = recipe


Spoil = Callable[[Workspace], None]


@pytest.mark.parametrize(
    ("made", "spoil", "error", "words"),
    [
        ({}, unfinished, UserInputError, "is failed and has no checkpoint. Train again, or"),
        ({"record": {"model_sha256": "0" * 64}}, None, StorageError, "do not belong together"),
        ({"record": {"shape": None}}, None, UserInputError, "does not describe"),
        ({"record": {"model": "oracle"}}, None, UserInputError, "of kind 'oracle', which this"),
        ({"labels": ("DMSO", "nope")}, None, UnknownNameError, "Unknown label 'nope'"),
        ({"channels": ("RNA",)}, None, UnknownNameError, "Unknown channel 'RNA'"),
        ({"feature_set": "gone"}, None, UnknownNameError, "Unknown feature set 'gone'"),
        ({"feature_set": "SET"}, set_is_another, UserInputError, "is another one since training"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_sentence(
    built: Path,
    opened: Opener,
    made: dict[str, object],
    spoil: Spoil | None,
    error: type[CellstoreError],
    words: str,
) -> None:
    workspace = opened(built)
    with workspace.database.read() as session:
        name = session.scalars(select(FeatureSet.name)).one()
    made = {key: name if value == "SET" else value for key, value in made.items()}
    craft(workspace, **made)  # type: ignore[arg-type]
    if spoil is not None:
        spoil(workspace)
    with workspace.database.read() as session:
        last = session.scalar(select(func.max(Run.id)))
    with pytest.raises(error, match=words) as raised:
        predict(workspace, run=str(last), device="cpu")
    assert "\n" not in str(raised.value)
    with workspace.database.read() as session:
        assert session.scalar(select(func.max(Run.id))) == last


def test_cells_that_are_not_measured_name_the_commands(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    craft(workspace)
    with workspace.database.begin() as session:
        session.execute(update(Job).values(status=Status.PENDING))
    with pytest.raises(UserInputError, match="Run: cellstore segment, then: cellstore measure"):
        predict(workspace, device="cpu")
