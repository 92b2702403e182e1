"""What is odd on a plate: flags as rows, worked out by hand, on both databases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from factories import Factory
from sqlalchemy import select, update

from cellstore.config import QcParams
from cellstore.enums import EXCLUDED_NO_PERIMETER, Stage, Status
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    CellFlag,
    Image,
    ImageFile,
    ImageFlag,
    Plate,
    Run,
    Segmentation,
)
from cellstore.stages.qc import Flagging, flag_plate

pytestmark = pytest.mark.one_database

PARAMS = QcParams(min_images=5)


class Bench:
    """A plate of one well with so many sites, and a quality-control run to flag them."""

    def __init__(self, workspace: Workspace, sites: int = 9) -> None:
        self.workspace = workspace
        self.make = Factory(workspace)
        self.plate = self.make.plate()
        self.well = self.make.well(self.plate, 1, 1)
        self.images = [self.make.image(self.well, site) for site in range(1, sites + 1)]
        self.segment = self.make.run(Stage.SEGMENT)
        self.measure = self.make.run(Stage.MEASURE)
        self.run = self.make.run(Stage.QC, status=Status.RUNNING)

    def flag(self, params: QcParams = PARAMS, plate: Plate | None = None, **more: Any) -> Run:
        run = self.make.run(Stage.QC, status=Status.RUNNING)
        ids = {"quality_id": self.run.recipe_id, "segment_id": self.segment.recipe_id}
        ids |= {"measure_id": self.measure.recipe_id} | more
        with self.workspace.database.begin() as session:
            flag_plate(session, Flagging(run.id, params, **ids), (plate or self.plate).id)
        return run

    def of_images(self, run: Run) -> list[tuple[Any, ...]]:
        columns = (ImageFlag.reason, ImageFlag.channel, ImageFlag.value)
        query = select(Image.site, *columns).join(Image, Image.id == ImageFlag.image_id)
        query = query.where(ImageFlag.run_id == run.id)
        with self.workspace.database.read() as session:
            rows = session.execute(query).all()
        return sorted((row.site, row.reason.value, row.channel, row.value) for row in rows)

    def of_cells(self, run: Run) -> list[tuple[Any, ...]]:
        query = select(Segmentation.image_id, Cell.object_number, CellFlag.reason, CellFlag.value)
        query = query.join(Cell, Cell.segmentation_id == Segmentation.id).join(CellFlag)
        with self.workspace.database.read() as session:
            rows = session.execute(query.where(CellFlag.run_id == run.id)).all()
        return sorted(
            (row.image_id, row.object_number, row.reason.value, row.value) for row in rows
        )

    def cells(self, counts: Sequence[int], areas: Sequence[float] | None = None) -> None:
        """So many cells in each image, of areas that go round."""
        numbers = iter(range(10**6))
        for image, count in zip(self.images, counts, strict=False):
            found = self.make.segmentation(image, self.segment, count)
            for cell in self.make.cells_of(found) if areas else ():
                area = areas[next(numbers) % len(areas)] if areas else 0
                self.make.features([cell], self.measure, area=float(area))


@pytest.mark.each_database
def test_blurred_bright_and_saturated_images_are_flagged_by_channel(workspace: Workspace) -> None:
    bench = Bench(workspace)
    odd: list[dict[str, float]] = [
        {"power_log_log_slope": -4.0},
        {"power_log_log_slope": -1.0},  # sharper than the others is not odd
        {"background": 900.0},
        {"background": 10.0},
        {"saturated": 0.0101},
        {"saturated": 0.01},
        *({}, {}, {}),
    ]
    for number, (image, values) in enumerate(zip(bench.images, odd, strict=True)):
        usual = {"power_log_log_slope": -2.0 - 0.01 * (number % 3), "background": 400.0 + number}
        bench.make.quality(image, bench.run, "DNA", **{**usual, **values})
        bench.make.quality(image, bench.run, "RNA")
    assert bench.of_images(bench.flag(segment_id=None)) == [
        (1, "out of focus", "DNA", -4.0),
        (3, "background", "DNA", 900.0),
        (4, "background", "DNA", 10.0),
        (5, "saturated", "DNA", 0.0101),
    ]


def test_an_image_whose_channels_are_all_noise_has_no_signal(workspace: Workspace) -> None:
    bench = Bench(workspace, sites=12)
    noise = {"power_log_log_slope": 0.9, "std": 5.0}
    flat = {"power_log_log_slope": None, "std": 0.0}
    small = {"power_log_log_slope": None, "std": 5.0}  # too small to tell
    spots = {"power_log_log_slope": 0.9}  # as strong as the others
    dim = {"std": 5.0}
    odd = [(noise, {}), (noise, flat), (flat, flat), (small, noise), (noise, spots), (noise, dim)]
    pairs: Any = [*odd, *[({}, {})] * 6]
    for image, (dna, rna) in zip(bench.images, pairs, strict=True):
        usual = {"std": 500.0 + image.site}
        bench.make.quality(image, bench.run, "DNA", **{**usual, **dna})
        bench.make.quality(image, bench.run, "RNA", **{**usual, **rna})
    found = [row for row in bench.of_images(bench.flag()) if row[1] == "no signal"]
    assert found == [(2, "no signal", "", 0.9), (3, "no signal", "", 1.0)]


def test_a_flag_keeps_the_limits_that_it_broke(workspace: Workspace) -> None:
    bench = Bench(workspace, sites=5)
    for image, slope in zip(bench.images, (-2.2, -2.1, -2.0, -1.9, -9.0), strict=True):
        bench.make.quality(image, bench.run, power_log_log_slope=slope)
    run = bench.flag()
    with workspace.database.read() as session:
        flag = session.scalars(select(ImageFlag).where(ImageFlag.run_id == run.id)).one()
    # Median -2.1, deviations 0.1 0 0.1 0.2 6.9, their median 0.1.
    assert flag.low == pytest.approx(-2.1 - 5 * 1.4826 * 0.1)
    assert (flag.high, flag.value) == (None, -9.0)


def test_too_few_images_say_nothing_of_what_is_usual(workspace: Workspace) -> None:
    bench = Bench(workspace, sites=4)
    for image, slope in zip(bench.images, (-2.0, -2.0, -2.0, -9.0), strict=True):
        bench.make.quality(image, bench.run, power_log_log_slope=slope, saturated=0.5)
    bench.cells([10, 10, 10, 0])
    reasons = {reason for _, reason, _, _ in bench.of_images(bench.flag())}
    assert reasons == {"saturated", "no cells"}


def test_a_plate_is_compared_with_itself_alone(workspace: Workspace) -> None:
    bench, other = Bench(workspace), Bench(workspace)
    for image in bench.images:
        bench.make.quality(image, bench.run, background=100.0)
    for image in other.images:
        other.make.quality(image, other.run, recipe=None, background=5_000.0)
    assert bench.of_images(bench.flag()) == []


def test_pixels_that_have_changed_since_do_not_count(workspace: Workspace) -> None:
    bench = Bench(workspace)
    for number, image in enumerate(bench.images):
        bench.make.quality(image, bench.run, saturated=float(number == 0))
    with workspace.database.begin() as session:
        session.get_one(Image, bench.images[0].id).content_sha256 = "f" * 64
    assert bench.of_images(bench.flag()) == []


def test_empty_crowded_and_sparse_fields(workspace: Workspace) -> None:
    bench = Bench(workspace)
    bench.cells([20, 22, 18, 21, 19, 20, 0, 90, 2])
    with workspace.database.begin() as session:  # cells that do not count are no cells
        found = session.scalars(select(Segmentation).order_by(Segmentation.id)).all()
        counted = Cell.segmentation_id == found[0].id
        session.execute(update(Cell).where(counted).values(excluded=EXCLUDED_NO_PERIMETER))
    assert bench.of_images(bench.flag(measure_id=None)) == [
        (1, "no cells", "", 0.0),
        (7, "no cells", "", 0.0),
        (8, "cell count", "", 90.0),
        (9, "cell count", "", 2.0),
    ]


@pytest.mark.each_database
def test_cells_and_fields_of_an_odd_area(workspace: Workspace) -> None:
    bench = Bench(workspace)
    bench.cells([8] * 9, areas=[90.0, 100.0, 110.0])
    with workspace.database.begin() as session:
        ids = session.scalars(select(Cell.id).order_by(Cell.id)).all()
        huge = update(CellFeatures).where(CellFeatures.cell_id.in_(ids[:8]))  # all of site 1
        session.execute(huge.values(area=5_000.0))
    run = bench.flag()
    assert bench.of_images(run) == [(1, "cell area", "", 5_000.0)]
    areas = [row for row in bench.of_cells(run) if row[2] == "area"]
    first = bench.images[0].id
    assert areas == [(first, label, "area", 5_000.0) for label in range(1, 9)]


def test_cells_at_the_border_are_flagged_unless_that_is_not_wanted(workspace: Workspace) -> None:
    bench = Bench(workspace, sites=1)
    bench.cells([12])
    with workspace.database.begin() as session:
        session.execute(update(ImageFile).values(height=28, width=58))
    # The factory puts label n at row 10 * (n // 6), column 10 * (n % 6), 8 pixels a side: labels
    # 1 to 5 are on the first row, 6 and 12 in the first column, 11 ends at column 58, 12 at row 28.
    at_border = bench.of_cells(bench.flag())
    assert [label for _, label, _, _ in at_border] == [1, 2, 3, 4, 5, 6, 11, 12]
    assert {(reason, value) for _, _, reason, value in at_border} == {("touches the border", None)}
    assert bench.of_cells(bench.flag(QcParams(border=False))) == []


def test_a_box_or_a_size_that_is_unknown_is_not_at_the_border(workspace: Workspace) -> None:
    bench = Bench(workspace, sites=2)
    bench.cells([3, 3])
    first, second = (image.id for image in bench.images)
    with workspace.database.begin() as session:
        session.execute(update(ImageFile).values(height=None, width=None))
        unknown = dict.fromkeys(("min_row", "min_col", "max_row", "max_col"))
        of_second = select(Segmentation.id).where(Segmentation.image_id == second)
        session.execute(update(Cell).where(Cell.segmentation_id.in_(of_second)).values(**unknown))
    # Label 1 begins in row 0 whatever the size is.
    assert [row[:2] for row in bench.of_cells(bench.flag())] == [(first, n) for n in (1, 2, 3)]


def test_runs_flag_beside_each_other(workspace: Workspace) -> None:
    bench = Bench(workspace)
    for number, image in enumerate(bench.images):
        bench.make.quality(image, bench.run, saturated=0.02 * (number == 0))
    strict = bench.flag()
    loose = bench.flag(QcParams(saturated=0.05))
    assert (len(bench.of_images(strict)), len(bench.of_images(loose))) == (1, 0)
    assert len(bench.of_images(strict)) == 1
