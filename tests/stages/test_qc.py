"""Quality control end to end: pixels once, flags by run, nothing deleted, a page that is safe."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import Factory
from numpy.typing import NDArray
from sqlalchemy import func, select, update
from test_ingest import loaddata, write_table

from cellstore import settings
from cellstore.config import IngestParams, QcParams, Resources, Selection
from cellstore.enums import Stage, Status
from cellstore.errors import MissingExtraError, UnknownNameError, UserInputError
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    CellFlag,
    Image,
    ImageFile,
    ImageFlag,
    ImageQuality,
    Job,
    Recipe,
    Run,
    Segmentation,
)
from cellstore.query.exclusions import find_qc_run
from cellstore.report.qc_page import write_page
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.qc import QcResult, list_flags, qc

pytestmark = pytest.mark.one_database

SITES = range(1, 11)
HOSTILE = "<script>alert(1)</script>"


def field(seed: int) -> NDArray[np.uint16]:
    """Tiles on noise: sharp edges everywhere, and a background of its own."""
    y, x = np.mgrid[:96, :96]
    noise = np.random.default_rng(seed).integers(0, 60, (96, 96))
    return np.asarray(400 + seed + 900 * ((x // 24 + y // 24) % 2) + noise, dtype=np.uint16)


def blurred(plane: NDArray[np.uint16]) -> NDArray[np.uint16]:
    smooth = plane.astype(float)
    for _ in range(10):
        rolled = [np.roll(smooth, step, axis) for axis in (0, 1) for step in (-1, 1)]
        smooth = (smooth + sum(rolled)) / 5
    return smooth.astype(np.uint16)


@dataclass
class Bench:
    """A store of ten fields of one well, two channels each; see ``field``."""

    workspace: Workspace
    folder: Path
    plate: str = "P1"

    def file(self, site: int, channel: int = 1) -> Path:
        return self.folder / f"r01c02f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"

    def ingest(self) -> None:
        rows = [loaddata(site, plate=self.plate) for site in SITES]
        table = write_table(self.folder.parent / "t.csv", rows)
        ingest(self.workspace, table, IngestParams(images=self.folder))

    def write(self, site: int, plane: NDArray[np.uint16], channel: int = 1) -> None:
        self.file(site, channel).write_bytes(encode_tiff(plane))

    def count(self, table: type, *where: Any) -> int:
        with self.workspace.database.read() as session:
            return session.scalar(select(func.count()).select_from(table).where(*where)) or 0

    def with_cells(self, measured: bool = True) -> Factory:
        """Give every field 12 cells of about 100 pixels; the last one none."""
        make = Factory(self.workspace)
        segment = make.run(Stage.SEGMENT)
        measure_recipe = make.recipe(Stage.MEASURE, inputs=[_recipe(make, segment)])
        measure = make.run(Stage.MEASURE, measure_recipe)
        with self.workspace.database.read() as session:
            images = session.scalars(select(Image).order_by(Image.site)).all()
        for image in images:
            found = make.segmentation(image, segment, 0 if image.site == 10 else 12)
            make.job(segment, image)
            for number, cell in enumerate(make.cells_of(found) if measured else ()):
                make.features([cell], measure, area=90.0 + number)
        return make


def _recipe(make: Factory, run: Run) -> Recipe:
    with make.workspace.database.read() as session:
        return session.get_one(Recipe, run.recipe_id)


def fill(workspace: Workspace, folder: Path, plate: str = "P1") -> Bench:
    bench = Bench(workspace, folder / "images", plate)
    bench.folder.mkdir()
    for site in SITES:
        for channel in (1, 2):
            plane = field(10 * site + channel)
            bench.write(site, blurred(plane) if (site, channel) == (3, 2) else plane, channel)
    bench.ingest()
    return bench


@pytest.fixture
def bench(workspace: Workspace, tmp_path: Path) -> Bench:
    return fill(workspace, tmp_path)


@pytest.fixture
def local(sqlite_workspace: Workspace, tmp_path: Path) -> Bench:
    """As ``bench``, for what does not depend on the database."""
    return fill(sqlite_workspace, tmp_path)


def flags(bench: Bench, result: QcResult) -> list[tuple[int, str, str]]:
    return [(flag.site, flag.reason, flag.channel) for flag in list_flags(bench.workspace, result)]


def test_a_run_that_could_look_at_no_image_is_never_the_latest(bench: Bench) -> None:
    for site in SITES:
        bench.file(site).write_bytes(b"changed since")
    result = qc(bench.workspace)
    assert (result.done, len(result.failures)) == (0, len(SITES))
    assert bench.count(Run, Run.stage == Stage.QC, Run.status == Status.FAILED) == 1
    with (
        bench.workspace.database.read() as session,
        pytest.raises(UnknownNameError, match="No qc run has come to its end"),
    ):
        find_qc_run(session)


@pytest.mark.each_database
def test_a_blurred_field_is_flagged_in_its_channel(bench: Bench) -> None:
    result = qc(bench.workspace)
    assert (result.selected, result.done, result.failures) == (10, 10, ())
    assert flags(bench, result) == [(3, "out of focus", "DNA")]
    [plate] = result.plates
    assert (plate.plate, plate.images, plate.seen, plate.flagged) == ("P1", 10, 10, 1)
    assert plate.by_reason == {"out of focus": 1}
    assert "No cells yet" in result.notes[0]
    assert bench.count(ImageQuality) == 20
    assert bench.count(Image) == 10


def test_what_is_kept_is_what_was_measured(local: Bench) -> None:
    qc(local.workspace)
    plane = field(11)
    with local.workspace.database.read() as session:
        found = session.scalars(select(ImageQuality).join(Image).where(Image.site == 1)).all()
    rna = next(row for row in found if row.channel == "RNA")
    assert rna.mean == pytest.approx(plane.mean())
    assert rna.std == pytest.approx(plane.std())
    assert rna.background == pytest.approx(np.percentile(plane, 1))


def test_doing_it_again_does_nothing(bench: Bench) -> None:
    first = qc(bench.workspace)
    again = qc(bench.workspace)
    assert (again.run_id, again.already_done, again.done) == (first.run_id, True, 0)
    assert again.plates == first.plates
    assert bench.count(Run, Run.stage == Stage.QC) == 1
    assert (bench.count(ImageQuality), bench.count(ImageFlag)) == (20, 1)


def test_other_limits_open_no_image_again(bench: Bench) -> None:
    qc(bench.workspace)
    for site in SITES:
        bench.file(site).unlink()
    loose = qc(bench.workspace, QcParams(outlier=1000.0))
    assert (loose.already_done, loose.done, flags(bench, loose)) == (False, 0, [])
    assert bench.count(ImageQuality) == 20
    assert bench.count(Job, Job.attempts != 1) == 0
    assert bench.count(ImageFlag) == 1  # of the first run: nothing is taken back


@pytest.mark.each_database
def test_new_bytes_are_looked_at_and_the_old_flags_stay(bench: Bench) -> None:
    first = qc(bench.workspace)
    bench.write(3, field(32), channel=2)
    bench.ingest()
    second = qc(bench.workspace)
    assert (second.done, flags(bench, second)) == (1, [])
    assert flags(bench, first) == [(3, "out of focus", "DNA")]
    assert bench.count(ImageQuality) == 22


def test_an_image_that_cannot_be_read_fails_alone(local: Bench) -> None:
    local.file(5).write_bytes(local.file(5).read_bytes()[:-300])
    local.ingest()
    result = qc(local.workspace)
    [(name, reason)] = result.failures
    assert (result.done, name) == (9, "P1/r01c02f05")
    assert "r01c02f05p01-ch1" in reason
    assert result.plates[0].seen == 9
    again = qc(local.workspace)
    assert (again.already_done, again.failed_before) == (True, 1)


@pytest.mark.each_database
def test_cells_are_counted_and_flagged(bench: Bench) -> None:
    bench.with_cells()
    result = qc(bench.workspace)
    assert flags(bench, result) == [(3, "out of focus", "DNA"), (10, "no cells", "")]
    [plate] = result.plates
    assert (plate.cells, plate.excluded) == (9 * 12, 0)
    # Of the factory's cells 1 to 5 touch the upper border, 6 and 12 the left one.
    assert plate.cells_by_reason == {"touches the border": 9 * 7}
    assert plate.cells_flagged == 9 * 7
    assert result.notes == ()


def test_cells_that_come_later_are_another_run(local: Bench) -> None:
    before = qc(local.workspace)
    local.with_cells(measured=False)
    after = qc(local.workspace)
    assert (before.segment_recipe, after.done) == (None, 0)
    assert after.run_id != before.run_id
    assert after.segment_recipe is not None
    assert "not measured" in after.notes[0]
    assert (10, "no cells", "") in flags(local, after)


def test_another_segmentation_can_be_named(local: Bench) -> None:
    local.with_cells()
    first = qc(local.workspace)
    local.with_cells()
    assert qc(local.workspace).segment_recipe != first.segment_recipe
    named = qc(local.workspace, segmentation=str(first.segment_recipe))
    assert (named.segment_recipe, named.already_done) == (first.segment_recipe, True)
    with pytest.raises(UnknownNameError, match="segment recipe"):
        qc(local.workspace, segmentation="77")


def test_a_few_images_are_compared_with_all_that_were_seen(local: Bench) -> None:
    few = qc(local.workspace, selection=Selection(limit=3))
    assert (few.done, flags(local, few)) == (3, [])
    assert "Too few images" in few.notes[0]
    rest = qc(local.workspace, selection=Selection(where="site >= 3"))
    assert (rest.selected, rest.done) == (8, 7)
    assert flags(local, rest) == [(3, "out of focus", "DNA")]
    assert rest.plates[0].seen == 10


def test_nothing_to_look_at_is_no_run(sqlite_workspace: Workspace) -> None:
    result = qc(sqlite_workspace)
    assert (result.run_id, result.plates, list_flags(sqlite_workspace, result)) == (None, (), ())
    make = Factory(sqlite_workspace)
    make.image(make.well(make.plate(), 1, 1), missing=True)
    assert (qc(sqlite_workspace).run_id, qc(sqlite_workspace).waiting) == (None, 1)


def test_limits_out_of_range_are_refused(sqlite_workspace: Workspace) -> None:
    wrong: list[dict[str, Any]] = [{"outlier": 0.0}, {"outlier": float("nan")}]
    wrong += [{"cell_outlier": -1.0}, {"saturated": 1.5}, {"min_images": 0}]
    for params in wrong:
        with pytest.raises(UserInputError):
            qc(sqlite_workspace, QcParams(**params))


def test_a_run_that_is_stopped_is_not_the_one_that_counts(
    local: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellstore.stages import qc as qc_module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qc_module, "flag_plate", stop)
        with pytest.raises(KeyboardInterrupt):
            qc(local.workspace)
    assert local.count(Run, Run.stage == Stage.QC, Run.status == Status.DONE) == 0
    result = qc(local.workspace)
    assert (result.done, result.already_done) == (0, False)
    assert flags(local, result) == [(3, "out of focus", "DNA")]


@pytest.mark.heavy
def test_worker_processes_see_the_same(bench: Bench) -> None:
    result = qc(bench.workspace, resources=Resources(workers=2))
    assert (result.done, flags(bench, result)) == (10, [(3, "out of focus", "DNA")])
    assert bench.count(ImageQuality) == 20


class Page(HTMLParser):
    """What a browser would load or execute, and what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def read_page(bench: Bench, result: QcResult, path: Path) -> tuple[str, Page]:
    assert write_page(bench.workspace, result, path).html == str(path)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_areas_are_in_micrometres_where_the_plate_has_one_pixel_size(
    local: Bench, tmp_path: Path
) -> None:
    local.with_cells()
    result = qc(local.workspace)

    def shown(words: str) -> bool:
        text, _ = read_page(local, result, tmp_path / "qc.html")
        return f"({words} in each" in html.unescape(text)

    assert shown("area in pixels, median of the cells): 1 wells, 95.5")
    with local.workspace.database.begin() as session:
        session.execute(update(Image).values(pixel_size=2.0))
    assert shown("area in \u00b5m\u00b2, median of the cells): 1 wells, 382")


def test_the_page_shows_maps_and_the_odd_field_beside_a_usual_one(
    bench: Bench, tmp_path: Path
) -> None:
    result = qc(bench.workspace)
    text, page = read_page(bench, result, tmp_path / "out" / "qc.html")
    assert page.tags.count("svg") == 4  # focus and background of two channels
    assert sum(link.startswith("data:image/jpeg") for link in page.links) == 2
    shown = " ".join("".join(page.shown).split())
    assert "1 of 10 images are flagged" in shown
    assert "P1 A02, site 3: out of focus in DNA" in shown
    assert len(text) < 5_000_000


def test_a_picture_that_cannot_be_shown_says_why(local: Bench, tmp_path: Path) -> None:
    local.with_cells()
    result = qc(local.workspace)
    _, page = read_page(local, result, tmp_path / "qc.html")
    assert any("cellstore verify" in text for text in page.shown)  # the factory writes no masks
    local.file(3, 2).unlink()
    _, page = read_page(local, result, tmp_path / "qc.html")
    assert any("gone from" in text for text in page.shown)


def test_nothing_in_the_page_executes_or_is_fetched(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: HOSTILE)
    bench = fill(sqlite_workspace, tmp_path, plate=HOSTILE)
    with sqlite_workspace.database.begin() as session:
        for file in session.scalars(select(ImageFile)):
            file.channel = f'"><img src=x onerror=alert(2)>$x${file.channel}'
    text, page = read_page(bench, qc(sqlite_workspace), tmp_path / "qc.html")
    assert not set(page.tags) & {"script", "iframe", "object", "embed", "link", "form"}
    assert page.handlers == []
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import", text)
    shown = "".join(page.shown)
    assert HOSTILE in shown
    assert "onerror=alert(2)" in shown


def test_the_same_run_gives_the_same_page(local: Bench, tmp_path: Path) -> None:
    result = qc(local.workspace)
    pages = [read_page(local, result, tmp_path / name)[0] for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_numbers_need_no_extra_but_the_page_does(
    local: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda _name: None)
    result = qc(local.workspace)
    with pytest.raises(MissingExtraError, match=r"cellstore\[report\]"):
        write_page(local.workspace, result, tmp_path / "qc.html")


def test_nothing_is_deleted(bench: Bench) -> None:
    bench.with_cells()
    before = [bench.count(table) for table in (Image, Segmentation, ImageFile)]
    qc(bench.workspace)
    assert [bench.count(table) for table in (Image, Segmentation, ImageFile)] == before
    assert bench.count(CellFlag) == 9 * 7
