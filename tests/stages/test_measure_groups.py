"""Groups of features: a recipe, a run and a feature set each, in one pass over the images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import delete, func, select, update
from test_segment_measure import Bench, bench

from cellstore.analysis.features import GROUPS, measure_channels
from cellstore.config import IngestParams, MeasureParams, Resources, Selection
from cellstore.enums import FeatureStorage, Stage, Status
from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.io.image_files import decode_tiff
from cellstore.jobs.execute import RunCounter
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    ImageFile,
    Job,
    Recipe,
    Run,
    Segmentation,
)
from cellstore.query import feature_files
from cellstore.query.cells import CellSource, choose_recipes, read_cells
from cellstore.query.feature_files import open_set
from cellstore.stages import measure as measure_rows
from cellstore.stages import measure as measure_step
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.measure import Measure, MeasureResult, measure
from cellstore.stages.segment import segment
from cellstore.stages.verify import verify

pytestmark = pytest.mark.one_database

__all__ = ["bench"]

INTENSITY = MeasureParams(features=("intensity",))
ALL = MeasureParams(features=("basic", "intensity", "texture"))
CHANNELS = ("DNA", "RNA")


@pytest.fixture
def cells(bench: Bench) -> Bench:
    """A store of three images of two channels with three cells each."""
    segment(bench.workspace, bench.params)
    return bench


def feature_set(cells: Bench, name: str) -> FeatureSet:
    with cells.workspace.database.read() as session:
        return session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one()


def values_of(cells: Bench, result: MeasureResult, image_id: int) -> dict[str, list[float]]:
    """What the files say of the cells of an image, by column, in the order of cell ids."""
    with cells.workspace.database.read() as session:
        assert result.recipe_id is not None
        found = open_set(session, cells.workspace.artifacts, result.recipe_id)
        segmentation = session.scalars(select(Segmentation.recipe_id)).first()
        assert segmentation is not None
        source = CellSource(segmentation, result.recipe_id, features=found)
        rows = read_cells(session, source, image_id, found.columns)
    return dict(zip(found.columns, rows.features.T.tolist(), strict=True))


def masks_of(cells: Bench, image_id: int) -> np.ndarray[Any, Any]:
    with cells.workspace.database.read() as session:
        query = select(Artifact).join(Segmentation, Segmentation.mask_artifact_id == Artifact.id)
        mask = session.scalars(query.where(Segmentation.image_id == image_id)).one()
        return decode_tiff(cells.workspace.artifacts.read(mask.path, mask.sha256))


def plane_of(cells: Bench, image_id: int, channel: str) -> np.ndarray[Any, Any]:
    with cells.workspace.database.read() as session:
        query = select(ImageFile.name).where(ImageFile.channel == channel)
        name = session.scalars(query.where(ImageFile.image_id == image_id)).one()
    return decode_tiff(cells.images / name)


@pytest.mark.each_database
def test_each_group_is_a_recipe_a_run_and_a_feature_set(cells: Bench) -> None:
    result = measure(cells.workspace, ALL)
    results = (result, *result.others)
    assert [one.group for one in results] == ["basic", "intensity", "texture"]
    assert [(one.done, one.cells, one.failures) for one in results] == [(3, 9, ())] * 3
    assert len({one.run_id for one in results}) == len({one.recipe_id for one in results}) == 3
    with cells.workspace.database.read() as session:
        for one in results:
            run = session.get_one(Run, one.run_id)
            assert (run.stage, run.status, run.recipe_id) == (
                Stage.MEASURE, Status.DONE, one.recipe_id,
            )  # fmt: skip
            assert run.result == {"images": 3, "failed": 0, "cells": 9}
    assert cells.count(CellFeatures) == 9
    assert cells.count(Job, Job.status == Status.DONE, Job.attempts == 1) == 3 + 3 * 3
    assert verify(cells.workspace).ok
    again = measure(cells.workspace, ALL)
    assert [one.run_id for one in (again, *again.others)] == [None] * 3


def test_where_the_basic_group_is_not_measured_the_sets_that_are_there_are_named(
    cells: Bench,
) -> None:
    def refused() -> str:
        with cells.workspace.database.read() as session, pytest.raises(UserInputError) as error:
            choose_recipes(session, None, None)
        return str(error.value)

    assert refused().endswith("Run: cellstore measure")
    found = measure(cells.workspace, INTENSITY).feature_set
    assert refused().endswith(f"name one of its feature sets with --features: {found}")


def test_a_set_says_of_each_column_what_it_is(cells: Bench) -> None:
    found = feature_set(cells, measure(cells.workspace, INTENSITY).feature_set)
    assert found.storage is FeatureStorage.FILES
    expected = GROUPS["intensity"].columns(CHANNELS)
    assert [column["name"] for column in found.columns] == [item.name for item in expected]
    first = found.columns[0]
    assert (first["name"], first["dtype"], first["unit"]) == (
        "mean_intensity_DNA", "float64", "intensity",
    )  # fmt: skip
    assert (first["source"], first["formula"]) == (
        "skimage.measure.regionprops: intensity_mean", "sum(I)/n",
    )  # fmt: skip


@pytest.mark.parametrize("group", ["intensity", "texture"])
def test_files_hold_the_values_of_the_channels(cells: Bench, group: str) -> None:
    result = measure(cells.workspace, MeasureParams(features=(group,)))
    for image_id in (1, 3):
        planes = {name: plane_of(cells, image_id, name) for name in CHANNELS}
        expected = measure_channels(group, masks_of(cells, image_id), planes)
        found = values_of(cells, result, image_id)
        assert list(found) == [name for name in expected if name != "object_number"]
        for name, column in found.items():
            # The third cell is one pixel: excluded, so that no reader gets it.
            assert column == pytest.approx(expected[name][:2].tolist(), rel=1e-12), name


def test_what_a_cell_does_not_have_is_null(cells: Bench) -> None:
    measure(cells.workspace, MeasureParams(features=("texture",)))
    with cells.workspace.database.read() as session:
        path = session.scalars(select(Artifact.path).join(FeatureFile)).one()
    table = pq.read_table(cells.workspace.artifacts.locate(path))
    column = table.column("contrast_d1_DNA")
    assert (table.num_rows, column.null_count) == (9, 3)
    assert not np.isnan(column.drop_null().to_numpy()).any()


def test_many_images_are_in_one_file(cells: Bench) -> None:
    result = measure(cells.workspace, ALL)
    with cells.workspace.database.read() as session:
        files = session.execute(
            select(FeatureSet.name, FeatureFile.n_rows, FeatureFile.run_id)
            .join(FeatureFile, FeatureFile.feature_set_id == FeatureSet.id)
            .order_by(FeatureFile.run_id)
        ).all()
    wide = result.others
    assert [tuple(file) for file in files] == [(one.feature_set, 9, one.run_id) for one in wide]


def test_a_file_ends_when_it_is_full(cells: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_rows, "ROWS_OF_FILE", 6)
    result = measure(cells.workspace, INTENSITY)
    assert result.cells == 9
    with cells.workspace.database.read() as session:
        sizes = session.scalars(select(FeatureFile.n_rows)).all()
    assert sorted(sizes) == [3, 6]
    assert verify(cells.workspace).ok
    assert len(values_of(cells, result, 2)["mean_intensity_DNA"]) == 2


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image file is opened."""
    times: Counter[str] = Counter()
    really = measure_step.open_file

    def counted(file: Any) -> Any:
        times[file.name] += 1
        return really(file)

    monkeypatch.setattr(measure_step, "open_file", counted)
    return times


def test_each_file_is_opened_once_for_all_groups(cells: Bench, opened: Counter[str]) -> None:
    measure(cells.workspace, ALL)
    assert len(opened) == 6
    assert set(opened.values()) == {1}


def test_a_group_that_is_done_is_not_done_again(cells: Bench, opened: Counter[str]) -> None:
    first = measure(cells.workspace, INTENSITY, Selection(limit=1))
    assert (first.done, sum(opened.values())) == (1, 2)
    result = measure(cells.workspace, MeasureParams(features=("basic", "intensity")))
    (intensity,) = result.others
    assert (result.done, intensity.done, intensity.cells) == (3, 2, 6)
    assert sum(opened.values()) == 2 + 6
    with cells.workspace.database.read() as session:
        rows = session.scalar(select(func.sum(FeatureFile.n_rows)))
    assert rows == 9
    assert verify(cells.workspace).ok


def test_what_the_first_group_had_done_is_left_for_the_second(cells: Bench) -> None:
    measure(cells.workspace, selection=Selection(limit=2))
    result = measure(cells.workspace, MeasureParams(features=("basic", "texture")))
    (texture,) = result.others
    assert (result.done, texture.done, texture.cells) == (1, 3, 9)
    assert cells.count(Run, Run.recipe_id == texture.recipe_id) == 1
    assert cells.count(Job, Job.recipe_id == texture.recipe_id, Job.status == Status.DONE) == 3


@pytest.mark.each_database
def test_an_image_that_another_process_measured_meanwhile_is_not_written_twice(
    cells: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between writing the file and closing the jobs, one of them becomes another process's."""
    original = Measure.write_together
    written = []

    def write_together(self: Measure, run: RunCounter, done: Any) -> Any:
        written.append(len(done))
        if len(written) == 2:
            with cells.workspace.database.begin() as session:
                taken = (Job.recipe_id == run.recipe_id, Job.image_id == 1)
                session.execute(
                    update(Job).where(*taken).values(worker="another", status=Status.DONE)
                )
        return original(self, run, done)

    monkeypatch.setattr(Measure, "write_together", write_together)
    result = measure(cells.workspace, MeasureParams(features=("basic", "intensity")))
    (intensity,) = result.others
    assert (result.done, result.cells, intensity.done, intensity.cells) == (3, 9, 2, 6)
    assert written == [3, 3, 3, 2]
    with cells.workspace.database.read() as session:
        assert session.scalar(select(func.sum(FeatureFile.n_rows))) == 6
    assert cells.count(CellFeatures) == 9
    assert verify(cells.workspace).problems == ()


def test_a_file_of_features_that_is_gone_is_made_again(cells: Bench) -> None:
    measure(cells.workspace, INTENSITY, Selection(limit=1))
    whole = measure(cells.workspace, INTENSITY)
    before = [values_of(cells, whole, image) for image in (1, 2, 3)]
    with cells.workspace.database.read() as session:
        files = session.execute(select(Artifact.path, FeatureFile.n_rows).join(FeatureFile)).all()
    (lost,) = [file.path for file in files if file.n_rows == 6]
    cells.workspace.artifacts.locate(lost).unlink()
    again = measure(cells.workspace, INTENSITY)
    assert (again.done, again.cells) == (2, 6)
    assert [values_of(cells, whole, image) for image in (1, 2, 3)] == before
    assert verify(cells.workspace).ok
    assert measure(cells.workspace, INTENSITY).run_id is None


def test_an_image_that_cannot_be_read_fails_alone_for_every_group(cells: Bench) -> None:
    cells.file(2, 1).write_bytes(b"damaged")
    result = measure(cells.workspace, ALL)
    for one in (result, *result.others):
        assert one.done == 2
        assert [name for name, _ in one.failures] == ["P1/r01c02f02"]
    assert cells.count(Job, Job.status == Status.FAILED) == 3
    assert cells.count(CellFeatures) == 6
    assert verify(cells.workspace).ok


def test_channels_are_those_that_are_named(cells: Bench) -> None:
    rna = MeasureParams(("basic", "intensity"), ("rna",))
    result = measure(cells.workspace, rna)
    (intensity,) = result.others
    names = [column["name"] for column in feature_set(cells, intensity.feature_set).columns]
    assert names == [f"{item.name}_RNA" for item in GROUPS["intensity"].features]
    values = values_of(cells, intensity, 1)["mean_intensity_RNA"]
    with cells.workspace.database.read() as session:
        query = select(CellFeatures.mean_intensity).join(Cell).join(Segmentation)
        query = query.where(Segmentation.image_id == 1, Cell.excluded.is_(None))
        basic = session.scalars(query.order_by(Cell.id)).all()
    assert values == pytest.approx(basic)
    assert measure(cells.workspace, INTENSITY).recipe_id != intensity.recipe_id


def test_the_same_channels_by_name_or_by_default_are_one_recipe(cells: Bench) -> None:
    named = MeasureParams(("intensity",), ("dna", "RNA", "DNA"))
    assert (
        measure(cells.workspace, named).recipe_id == measure(cells.workspace, INTENSITY).recipe_id
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            MeasureParams(features=("textures",)),
            "group of features 'textures'. Known: basic, intensity, texture",
        ),
        (MeasureParams(("intensity",), ("DAN",)), "channel 'DAN'. Known: DNA"),
    ],
)
def test_an_unknown_name_is_one_sentence(cells: Bench, params: MeasureParams, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        measure(cells.workspace, params)
    assert cells.count(Recipe, Recipe.stage == Stage.MEASURE) == 0


def test_no_group_at_all_is_refused(cells: Bench) -> None:
    with pytest.raises(UserInputError, match="basic, intensity, texture"):
        measure(cells.workspace, MeasureParams(features=()))


def test_a_selection_of_nothing_has_no_channels(cells: Bench) -> None:
    with pytest.raises(UserInputError, match="--channels"):
        measure(cells.workspace, INTENSITY, Selection(where="site > 99"))


def test_a_disk_that_is_full_breaks_nothing(cells: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **_more: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_files.pq.ParquetWriter, "write_batch", full)
        with pytest.raises(StorageError, match="No space left"):
            measure(cells.workspace, ALL)
    assert cells.count(FeatureFile) == cells.count(CellFeatures) == 0
    assert cells.count(Job, Job.status == Status.RUNNING) == 0
    assert verify(cells.workspace, minutes=0).orphans == ()
    result = measure(cells.workspace, ALL)
    assert [one.done for one in (result, *result.others)] == [3, 3, 3]


@pytest.mark.each_database
def test_new_bytes_are_measured_anew_beside_the_old(cells: Bench) -> None:
    measure(cells.workspace, INTENSITY)
    path = cells.file(1, 1)
    path.write_bytes(cells.file(2, 1).read_bytes())
    ingest(cells.workspace, cells.table, IngestParams(images=cells.images, reread=True))
    segment(cells.workspace, cells.params)
    result = measure(cells.workspace, INTENSITY)
    assert (result.done, result.cells) == (1, 3)
    new = values_of(cells, result, 1)["max_intensity_DNA"]
    masks, plane = masks_of_newest(cells, 1), plane_of(cells, 1, "DNA")
    assert new == [plane[masks == label].max() for label in (1, 2)]


def masks_of_newest(cells: Bench, image_id: int) -> np.ndarray[Any, Any]:
    with cells.workspace.database.read() as session:
        query = select(Artifact).join(Segmentation, Segmentation.mask_artifact_id == Artifact.id)
        query = query.where(Segmentation.image_id == image_id).order_by(Segmentation.id.desc())
        mask = session.scalars(query).first()
        assert mask is not None
        return decode_tiff(cells.workspace.artifacts.read(mask.path, mask.sha256))


@pytest.mark.each_database
@pytest.mark.heavy
def test_workers_in_other_processes_give_the_same(cells: Bench, tmp_path: Path) -> None:
    alone = measure(cells.workspace, ALL)
    expected = [values_of(cells, one, 2) for one in alone.others]
    with cells.workspace.database.begin() as session:
        for table in (CellFeatures, FeatureFile):
            session.execute(delete(table))
        session.execute(delete(Job).where(Job.recipe_id.in_(
            [one.recipe_id for one in (alone, *alone.others)]
        )))  # fmt: skip
    shared = measure(cells.workspace, ALL, resources=Resources(2))
    assert [one.done for one in (shared, *shared.others)] == [3, 3, 3]
    assert [values_of(cells, one, 2) for one in shared.others] == expected
