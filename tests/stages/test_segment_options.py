"""Segment: two planes, and a preview that keeps nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select
from test_ingest import loaddata, write_table
from threshold import ThresholdSegmenter, use_threshold

from cellstore.config import IngestParams, SegmentParams, Selection
from cellstore.errors import UnknownNameError
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Job, Recipe, Run, Segmentation
from cellstore.report.drawing import OUTLINE_COLOUR
from cellstore.report.segment_preview import CAPTION_HEIGHT, preview, spread
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.segment import segment

pytestmark = pytest.mark.one_database

SHAPE = (40, 50)
PLATES = ("P1", "P2")
SITES = (1, 2, 3)


def plane(seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """A bright square whose place tells the image."""
    pixels = np.random.default_rng(seed).integers(0, 50, SHAPE)
    pixels[seed : seed + 12, 6:20] = 200
    return pixels.astype(np.uint16)


class Screen:
    """Two plates of three images of two channels, and the stand-in network."""

    def __init__(self, workspace: Workspace, folder: Path, model: str) -> None:
        self.workspace = workspace
        self.params = SegmentParams.of("published", model=model)
        self.images = folder / "images"
        self.folder = folder
        for number, plate in enumerate(PLATES):
            self._ingest(plate, 10 * number)

    def _ingest(self, plate: str, seed: int) -> None:
        # A folder for each plate: the names of their files are the same.
        folder = self.images / plate
        folder.mkdir(parents=True)
        table = write_table(
            self.folder / f"{plate}.csv", [loaddata(site, plate=plate) for site in SITES]
        )
        for site in SITES:
            for channel in (1, 2):
                name = f"r01c02f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"
                (folder / name).write_bytes(encode_tiff(plane(seed + site)))
        ingest(self.workspace, table, IngestParams(images=folder))

    def count(self, table: type) -> int:
        with self.workspace.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ThresholdSegmenter:
    return use_threshold(monkeypatch, tmp_path)[1]


@pytest.fixture
def screen(workspace: Workspace, tmp_path: Path, network: ThresholdSegmenter) -> Screen:
    return Screen(workspace, tmp_path, str(tmp_path / "threshold.pt"))


# --- two planes --------------------------------------------------------------------------------


def test_cells_and_nuclei_go_to_the_network_together(
    screen: Screen, network: ThresholdSegmenter
) -> None:
    both = replace(screen.params, channels=("RNA",), nuclei=("DNA",))
    assert segment(screen.workspace, both).done == 6
    assert network.planes == 3
    assert segment(screen.workspace, both).run_id is None
    assert segment(screen.workspace, replace(both, nuclei=())).done == 6
    assert network.planes == 2


def test_a_channel_of_nuclei_that_is_not_there_is_refused(screen: Screen) -> None:
    with pytest.raises(UnknownNameError, match="DNA"):
        segment(screen.workspace, replace(screen.params, nuclei=("DAPI",)))


# --- preview -----------------------------------------------------------------------------------


def picture(path: str) -> np.ndarray[Any, Any]:
    return np.asarray(imagecodecs.png_decode(Path(path).read_bytes()))


@pytest.mark.each_database
def test_a_preview_draws_what_it_finds_and_keeps_nothing(screen: Screen, tmp_path: Path) -> None:
    before = [screen.count(table) for table in (Run, Recipe, Job, Segmentation, Artifact)]
    folder = tmp_path / "pictures"
    result = preview(screen.workspace, screen.params, count=2, folder=folder)
    assert [(item.name, item.cells, item.diameter) for item in result.images] == [
        ("P1/r01c02f02", 1, 30.0),
        ("P2/r01c02f02", 1, 30.0),
    ]
    assert result.available == 6
    shown = picture(result.images[0].file or "")
    assert shown.shape == (SHAPE[0] + CAPTION_HEIGHT, SHAPE[1], 3)
    outline = (shown[CAPTION_HEIGHT:] == OUTLINE_COLOUR).all(axis=-1)
    assert outline[2, 6:20].all()  # the upper edge of the square of seed 2
    assert not outline[4:12, 8:18].any()
    after = [screen.count(table) for table in (Run, Recipe, Job, Segmentation, Artifact)]
    assert after == before


def test_the_same_preview_shows_the_same_images(screen: Screen, tmp_path: Path) -> None:
    first = preview(screen.workspace, screen.params, count=4, folder=tmp_path / "a")
    files = {path.name for path in (tmp_path / "a").iterdir()}
    again = preview(screen.workspace, screen.params, count=4, folder=tmp_path / "a")
    assert [item.name for item in first.images] == [item.name for item in again.images]
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert len(files) == 4


def test_a_preview_of_more_images_than_there_are(screen: Screen, tmp_path: Path) -> None:
    only = Selection(plates=("P2",))
    result = preview(screen.workspace, screen.params, only, count=9, folder=tmp_path / "a")
    assert [item.name for item in result.images] == [f"P2/r01c02f{n:02d}" for n in SITES]


def test_an_image_that_cannot_be_read_does_not_stop_the_others(
    screen: Screen, tmp_path: Path
) -> None:
    (screen.images / "P1" / "r01c02f02p01-ch1sk1fk1fl1.tiff").unlink()
    result = preview(screen.workspace, screen.params, count=2, folder=tmp_path / "a")
    bad, good = result.images
    assert (bad.file, bad.cells) == (None, None)
    assert "gone from" in (bad.problem or "")
    assert (good.cells, good.problem) == (1, None)


def test_a_preview_of_nothing(workspace: Workspace, tmp_path: Path, network: Any) -> None:
    params = SegmentParams.of("published", model=str(tmp_path / "threshold.pt"))
    result = preview(workspace, params, folder=tmp_path / "a")
    assert (result.images, result.available) == ((), 0)
    assert not (tmp_path / "a").exists()


@given(length=st.integers(1, 500), count=st.integers(1, 60))
def test_places_are_spread(length: int, count: int) -> None:
    places = spread(length, count)
    assert len(set(places)) == len(places) == min(length, count)
    assert places[0] >= 0
    assert places[-1] < length
    gaps = np.diff(places)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
