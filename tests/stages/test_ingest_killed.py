"""Killed while it ingests, at any moment: a second ingest ends where an undisturbed one does."""

from __future__ import annotations

import multiprocessing
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from random import Random

import pytest
from test_ingest import count, dump, loaddata, write_image, write_table

from cellstore.config import IngestParams
from cellstore.jobs.workspace import Workspace, create_workspace, open_workspace
from cellstore.models import Image, IngestFile
from cellstore.settings import StoreSettings
from cellstore.stages.ingest import ingest_images as images
from cellstore.stages.ingest.ingest import ingest

KILLS = 7
PLATES, SITES = 6, 50


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        loaddata(site, plate=f"P{plate}") for plate in range(PLATES) for site in range(1, SITES + 1)
    ]
    return write_table(tmp_path / "t.csv", rows)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for plate in range(3):
        folder = tmp_path / "images" / f"P{plate}"
        folder.mkdir(parents=True)
        for site in range(1, 10):
            for channel in (1, 2):
                name = f"r01c02f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"
                write_image(folder, name, 100 * plate + site)
    return tmp_path / "images"


def work(settings: StoreSettings, table: Path, pictures: Path, ready: Event) -> None:
    """What the process does that is killed."""
    images.BATCH = 25
    workspace = open_workspace(settings)
    ready.set()
    ingest(workspace, table, IngestParams(images=pictures))


def killed_after(seconds: float, workspace: Workspace, table: Path, pictures: Path) -> bool:
    """Ingest in another process and kill it; whether it had not ended before."""
    # Its server has imported all that is needed once, and forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cellstore.stages.ingest", "psycopg"])
    ready = context.Event()
    process = context.Process(target=work, args=(workspace.settings, table, pictures, ready))
    process.start()
    assert ready.wait(60)
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.heavy
def test_killed_at_random_moments_and_gone_on_with(
    workspace: Workspace, tmp_path: Path, table: Path, pictures: Path
) -> None:
    other, _ = create_workspace(tmp_path / "undisturbed")
    began = time.perf_counter()
    ingest(other, table, IngestParams(images=pictures))
    usual = time.perf_counter() - began
    wanted = dump(other)
    other.database.close()
    random = Random(20)
    killed = 0
    for _ in range(KILLS):
        killed += killed_after(random.uniform(0, usual), workspace, table, pictures)
        # Nothing of the rows, or all of them: a file is one transaction.
        assert count(workspace, Image) in (0, PLATES * SITES)
    assert killed
    result = ingest(workspace, table, IngestParams(images=pictures))
    assert dump(workspace) == wanted
    assert result.rows == result.updated + result.unchanged + result.created
    assert count(workspace, IngestFile) >= 1
