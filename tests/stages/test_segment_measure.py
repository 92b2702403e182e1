"""Segment and measure: each image once, one failure alone, nothing half-written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.measure import regionprops
from sqlalchemy import func, select
from test_ingest import loaddata, write_table
from threshold import ThresholdSegmenter, use_threshold

from cellstore import artifacts
from cellstore.analysis.features import BASIC_GROUP, FEATURE_NAMES
from cellstore.config import IngestParams, MeasureParams, SegmentParams
from cellstore.enums import Projection, Stage, Status
from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.io.image_files import decode_tiff, encode_tiff
from cellstore.jobs import queue
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Cell, CellFeatures, Job, Recipe, Run, Segmentation
from cellstore.query.cells import choose_recipes
from cellstore.query.engine import open_questions
from cellstore.stages.ingest.ingest import ingest, refresh
from cellstore.stages.manage_jobs import retry
from cellstore.stages.measure import measure
from cellstore.stages.segment import segment
from cellstore.stages.status import status
from cellstore.stages.verify import verify

pytestmark = pytest.mark.one_database

SHAPE = (40, 50)


def field(seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Two bright blocks on noise, and one bright pixel whose outline has no length."""
    rng = np.random.default_rng(seed)
    plane = rng.integers(0, 50, SHAPE)
    left = 5 + seed // 10 - 1
    plane[4:14, left : left + 15] = rng.integers(150, 200, (10, 15))
    plane[20:32, 8:18] = rng.integers(150, 220, (12, 10))
    plane[36, 40] = 180
    return plane.astype(np.uint16)


@dataclass
class Bench:
    """A store of three images of two channels, and the stand-in network."""

    workspace: Workspace
    images: Path
    table: Path
    params: SegmentParams
    network: ThresholdSegmenter

    def file(self, site: int, channel: int) -> Path:
        return self.images / f"r01c02f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"

    def ingest(self) -> None:
        ingest(self.workspace, self.table, IngestParams(images=self.images))

    def count(self, table: type, *where: Any) -> int:
        with self.workspace.database.read() as session:
            query = select(func.count()).select_from(table).where(*where)
            return session.scalar(query) or 0


@pytest.fixture
def bench(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    model, network = use_threshold(monkeypatch, tmp_path)
    table = write_table(tmp_path / "t.csv", [loaddata(site) for site in (1, 2, 3)])
    made = Bench(
        workspace, tmp_path / "images", table, SegmentParams.of("published", model=model), network
    )
    made.images.mkdir()
    for site in (1, 2, 3):
        for channel in (1, 2):
            made.file(site, channel).write_bytes(encode_tiff(field(10 * site + channel)))
    made.ingest()
    return made


@pytest.mark.each_database
def test_cells_become_rows_and_masks_become_files(bench: Bench) -> None:
    result = segment(bench.workspace, bench.params)
    assert (result.done, result.failures, result.cells) == (3, (), 9)
    with bench.workspace.database.read() as session:
        found = session.scalars(select(Segmentation)).first()
        assert found is not None
        mask = session.get_one(Artifact, found.mask_artifact_id)
        masks = decode_tiff(bench.workspace.artifacts.read(mask.path, mask.sha256))
        cells = session.scalars(
            select(Cell).where(Cell.segmentation_id == found.id).order_by(Cell.object_number)
        ).all()
    assert masks.max() == len(cells) == 3
    assert [cell.excluded for cell in cells] == [None, None, "perimeter is 0"]
    first = cells[0]
    assert (first.min_row, first.min_col, first.max_row, first.max_col) == (4, 5, 14, 20)


def test_the_same_recipe_does_an_image_once_and_another_goes_beside(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    again = segment(bench.workspace, bench.params)
    assert (again.run_id, again.done, bench.network.seen) == (None, 0, 3)
    other = SegmentParams.of("published", model=bench.params.model, diameter=20.0)
    assert segment(bench.workspace, other).done == 3
    assert bench.count(Segmentation) == 6
    assert bench.count(Job, Job.attempts != 1) == 0


@pytest.mark.parametrize("column", [Segmentation.mask_artifact_id, Segmentation.flow_artifact_id])
def test_masks_and_flows_that_are_gone_are_made_again(
    bench: Bench, column: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "FIRST_WAIT", 0.01)
    segment(bench.workspace, bench.params)
    measure(bench.workspace)
    with bench.workspace.database.read() as session:
        path = session.scalars(
            select(Artifact.path)
            .join(Segmentation, column == Artifact.id)
            .order_by(Segmentation.id)
        ).first()
    assert path is not None
    lost = bench.workspace.artifacts.locate(path)
    data = lost.read_bytes()
    sharing = 3 if column is Segmentation.flow_artifact_id else 1
    if sharing == 3:
        lost.unlink()
    else:  # somebody changed it: only the sha256 tells, and what is changed is as good as gone
        lost.write_bytes(data[:-1] + b"?")
        assert verify(bench.workspace).commands == ()
        found = verify(bench.workspace, fix=True)
        assert ([problem.path for problem in found.problems], found.removed) == ([path], 0)
        assert len(found.commands) == 1
        assert not lost.exists()
    texture = MeasureParams(features=("texture",))
    assert measure(bench.workspace, texture).done == (3 if sharing == 3 else 2)
    with bench.workspace.database.read() as session:
        command = session.scalars(select(Run.command).where(Run.stage == Stage.SEGMENT)).one()
    found = retry(bench.workspace)
    assert (found.lost_files, found.commands[0]) == (1, command)
    assert verify(bench.workspace).commands == (command,)
    again = segment(bench.workspace, bench.params)
    assert again.failures == ()
    assert 1 <= again.done <= sharing
    assert lost.read_bytes() == data
    assert (bench.count(Segmentation), bench.count(Cell), bench.count(CellFeatures)) == (3, 9, 9)
    assert segment(bench.workspace, bench.params).run_id is None
    assert measure(bench.workspace).run_id is None
    assert measure(bench.workspace, texture).failed_before == 0
    assert verify(bench.workspace).ok


def test_masks_that_come_out_differently_do_not_take_the_place_of_lost_ones(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    for path in bench.workspace.artifacts.root.glob("mask/*/*"):
        path.unlink()
    bench.network.level = 170.0
    again = segment(bench.workspace, bench.params)
    assert again.done == 0
    assert "the new ones differ" in again.failures[0][1]
    assert (bench.count(Segmentation), bench.count(Cell)) == (3, 9)


def defaults(bench: Bench) -> tuple[int, int]:
    """The recipes whose cells and features commands take where none is named."""
    with bench.workspace.database.read() as session:
        segmentation, measurement = choose_recipes(session, None, None)
    return segmentation.id, measurement.id


def test_a_run_that_made_nothing_is_never_the_default(bench: Bench) -> None:
    made = segment(bench.workspace, bench.params)
    measured = measure(bench.workspace)
    for site in (1, 2, 3):
        bench.file(site, 1).write_bytes(b"changed since")
    nothing = segment(bench.workspace, replace(bench.params, diameter=20.0))
    assert (nothing.done, len(nothing.failures)) == (0, 3)
    assert bench.count(Run, Run.id == nothing.run_id, Run.status == Status.FAILED) == 1
    assert defaults(bench) == (made.recipe_id, measured.recipe_id)
    assert measure(bench.workspace).selected == 3
    for site in (1, 2, 3):
        bench.file(site, 1).write_bytes(encode_tiff(field(10 * site + 1)))
    bench.ingest()
    bench.network.level = 1000.0
    empty = segment(bench.workspace, replace(bench.params, diameter=30.0))
    assert (empty.done, empty.cells) == (3, 0)
    replaced = [
        (made.recipe_id, None),
        (nothing.recipe_id, None),
        (empty.recipe_id, made.recipe_id),
    ]
    by_recipe = {r["recipe_id"]: r["replaced_by"] for r in status(bench.workspace).recipes}
    assert [(number, by_recipe[number]) for number, _ in replaced] == replaced
    assert defaults(bench) == (made.recipe_id, measured.recipe_id)


def test_where_the_network_lies_does_not_change_the_recipe(bench: Bench, tmp_path: Path) -> None:
    segment(bench.workspace, bench.params)
    moved = tmp_path / "elsewhere" / "threshold.pt"
    moved.parent.mkdir()
    moved.write_bytes(Path(bench.params.model).read_bytes())
    assert segment(bench.workspace, SegmentParams.of("published", model=str(moved))).run_id is None
    moved.write_bytes(b"other weights")
    assert segment(bench.workspace, SegmentParams.of("published", model=str(moved))).done == 3


@pytest.mark.each_database
def test_a_truncated_image_fails_alone_and_is_tried_again(bench: Bench) -> None:
    path = bench.file(2, 1)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-len(whole) // 3 :] = bytes(len(whole) // 3)
    path.write_bytes(damaged)
    bench.ingest()
    result = segment(bench.workspace, bench.params)
    assert result.done == 2
    [(name, reason)] = result.failures
    assert name == "P1/r01c02f02"
    assert path.name in reason
    assert bench.count(Job, Job.status == Status.FAILED) == 1
    path.write_bytes(whole)
    bench.ingest()
    assert segment(bench.workspace, bench.params).done == 1
    assert bench.count(Segmentation) == 3


def test_channels_of_different_shapes_fail_with_both_shapes(bench: Bench) -> None:
    bench.file(1, 2).write_bytes(encode_tiff(field(1)[:-1]))
    bench.ingest()
    result = segment(bench.workspace, bench.params)
    assert result.done == 2
    assert "40x50" in result.failures[0][1]
    assert "39x50" in result.failures[0][1]


@pytest.mark.each_database
def test_changed_bytes_make_the_image_open_again_and_keep_the_old_cells(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    bench.file(3, 1).write_bytes(encode_tiff(field(37)))
    with_old_bytes = segment(bench.workspace, bench.params)
    assert with_old_bytes.run_id is None
    bench.ingest()
    assert segment(bench.workspace, bench.params).done == 1
    assert (bench.count(Segmentation), bench.count(Cell)) == (4, 12)


def standing_of(bench: Bench) -> list[tuple[object, ...]]:
    """How far each recipe has come."""
    names = ("stage", "done", "stale", "todo")
    return [tuple(row[name] for name in names) for row in status(bench.workspace).recipes]


def test_what_changed_is_out_of_date_and_is_all_that_is_made_anew(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    measure(bench.workspace)
    bench.file(3, 1).write_bytes(encode_tiff(field(37)))
    assert [recipe["stale"] for recipe in status(bench.workspace).recipes] == [0, 0]
    looked = refresh(bench.workspace)
    assert (looked.images, looked.changed, looked.n_problems) == (3, 1, 0)
    standing = standing_of(bench)
    assert standing == [("segment", 2, 1, 1), ("measure", 2, 1, 0)]
    assert segment(bench.workspace, bench.params).done == 1
    assert [recipe["todo"] for recipe in status(bench.workspace).recipes] == [0, 1]
    assert measure(bench.workspace).done == 1
    standing = standing_of(bench)
    assert standing == [("segment", 3, 1, 0), ("measure", 3, 1, 0)]
    assert refresh(bench.workspace).changed == 0


def test_a_recipe_that_was_replaced_says_so_and_its_cells_stay(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    measure(bench.workspace)
    segment(bench.workspace, replace(bench.params, diameter=20.0))
    old, measured, new = status(bench.workspace).recipes
    assert (old["replaced_by"], new["replaced_by"]) == (new["recipe_id"], None)
    assert (measured["reads"], measured["todo"]) == (old["recipe_id"], 0)
    assert measure(bench.workspace).done == 3  # of the new cells
    assert status(bench.workspace).recipes[-1]["reads"] == new["recipe_id"]


def test_a_file_that_is_gone_is_told_by_refresh(bench: Bench) -> None:
    bench.file(2, 1).unlink()
    looked = refresh(bench.workspace)
    assert (looked.changed, looked.n_problems) == (0, 1)
    assert bench.file(2, 1).name in looked.problems[0].detail


def test_a_file_that_changed_after_the_ingest_is_not_used(bench: Bench) -> None:
    bench.file(3, 1).write_bytes(encode_tiff(field(37)[:30]))
    result = segment(bench.workspace, bench.params)
    assert [name for name, _ in result.failures] == ["P1/r01c02f03"]
    assert "has changed since it was ingested" in result.failures[0][1]


def test_missing_images_wait(bench: Bench) -> None:
    rows = [loaddata(site) for site in (1, 2, 3, 4)]
    ingest(bench.workspace, write_table(bench.table, rows), IngestParams(images=bench.images))
    result = segment(bench.workspace, bench.params)
    assert (result.selected, result.waiting, result.done) == (4, 1, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_breaks_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        _refuse_after(patch, 3, number)
        with pytest.raises(StorageError, match="then run the same command again"):
            segment(bench.workspace, bench.params)
    assert bench.count(Segmentation) == 1
    assert bench.count(Cell) == 3
    assert bench.count(Run, Run.status == Status.FAILED) == 1
    assert bench.count(Job, Job.status == Status.RUNNING) == 0
    assert segment(bench.workspace, bench.params).done == 2
    assert bench.count(Cell) == 9


def _refuse_after(patch: pytest.MonkeyPatch, allowed: int, number: int) -> None:
    whole: Callable[[int], None] = artifacts.os.fsync
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * allowed:  # each file is followed by its folder
            raise OSError(number, "no")
        whole(handle)

    patch.setattr(artifacts.os, "fsync", fsync)


@pytest.mark.each_database
def test_an_interrupted_run_gives_its_job_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def interrupt(_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(bench.network, "segment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            segment(bench.workspace, bench.params)
    assert bench.count(Job, Job.status == Status.PENDING) == 3
    assert segment(bench.workspace, bench.params).done == 3


def test_unknown_names_are_refused_before_any_row(bench: Bench) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "cyto": {"model": "cyto9"},
        "DNA, RNA": {"channels": ("Mito",)},
    }
    for words, change in wrong.items():
        with pytest.raises(UserInputError, match=words):
            segment(bench.workspace, replace(bench.params, **change))
    assert bench.count(Recipe, Recipe.stage == Stage.SEGMENT) == 0


def test_features_equal_regionprops_on_the_segmented_plane(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    result = measure(bench.workspace)
    assert (result.done, result.cells) == (3, 9)
    planes = [decode_tiff(bench.file(1, channel)) for channel in (1, 2)]
    plane = np.median(np.stack(planes), axis=0).astype(np.float32)
    masks = ThresholdSegmenter().segment(plane).masks
    with bench.workspace.database.read() as session:
        query = select(CellFeatures, Cell.object_number).join(Cell).join(Segmentation)
        rows = session.execute(query.where(Segmentation.image_id == 1)).all()
    assert len(rows) == 3
    for row, label in rows:
        region = regionprops(masks, intensity_image=plane)[label - 1]
        for feature in BASIC_GROUP.features:
            name = feature.source.rsplit(" ", 1)[1]
            part = name.split("-")
            value = getattr(region, part[0])
            expected = value[int(part[1])] if len(part) == 2 else value
            assert getattr(row, feature.name) == pytest.approx(float(expected)), feature.name


def test_a_cell_has_one_centroid_wherever_it_is_read(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    made = measure(bench.workspace)
    with bench.workspace.database.read() as session:
        query = select(Cell.id, Cell.centroid_row, Cell.centroid_col).order_by(Cell.id)
        expected = [tuple(row) for row in session.execute(query)]
        measured = session.scalars(select(CellFeatures).order_by(CellFeatures.cell_id))
        assert [(row.cell_id, row.centroid_y, row.centroid_x) for row in measured] == expected
    assert len(expected) == 9
    with open_questions(bench.workspace) as questions:
        for relation in ("features", made.feature_set, "cell_table"):
            read = f"SELECT cell_id, centroid_y, centroid_x FROM {relation} ORDER BY 1"
            assert list(questions.ask(read).rows()) == expected
        columns = [name for name, _ in questions.columns(made.feature_set)]
        assert columns == ["cell_id", *FEATURE_NAMES]
        columns = [name for name, _ in questions.columns("features")]
        assert columns == ["cell_id", "recipe_id", "run_id", *FEATURE_NAMES]


def test_measuring_again_does_nothing_and_another_plane_goes_beside(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    measure(bench.workspace)
    assert measure(bench.workspace).run_id is None
    dna = MeasureParams(channels=("DNA",), projection=Projection.MEAN)
    assert measure(bench.workspace, dna).cells == 9
    assert bench.count(CellFeatures) == 18


def test_measure_before_segment_says_what_to_run(bench: Bench) -> None:
    with pytest.raises(UnknownNameError, match="cellstore segment"):
        measure(bench.workspace)


@pytest.mark.each_database
def test_verify_compares_rows_with_what_their_jobs_wrote(bench: Bench) -> None:
    segment(bench.workspace, bench.params)
    measure(bench.workspace)
    found = verify(bench.workspace)
    assert (found.problems, found.jobs) == ((), 6)
    with bench.workspace.database.begin() as session:
        cells = session.scalars(select(Cell).order_by(Cell.id)).all()
        cells[0].max_row = 15
        measured = session.scalars(select(CellFeatures).where(CellFeatures.cell_id == cells[-1].id))
        measured.one().mean_intensity = 0.0
    problems = verify(bench.workspace).problems
    assert [problem.reason.split(" recipe")[0] for problem in problems] == [
        "rows of segment",
        "rows of measure",
    ]
    assert problems[0].path != problems[1].path
