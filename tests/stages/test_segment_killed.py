"""Segment survives: killed processes, several at once, full disks, a Dask cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import killing
import pytest
from sqlalchemy import select

from cellstore.config import Resources
from cellstore.enums import Status
from cellstore.errors import StorageError, StoreError, UserInputError
from cellstore.jobs import execute
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import Job
from cellstore.stages.verify import verify

pytestmark = pytest.mark.heavy


MOST = 24
"""Images of the largest test; the others have the first of them."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> killing.Rows:
    """The rows of a store with these images that was segmented in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    workspace, _ = create_workspace(folder / "store")
    killing.fill(workspace, folder / "images", MOST)
    killing.segment_slowly(workspace)
    rows = killing.rows_of(workspace)
    workspace.database.close()
    return rows


def check_equal(workspace: Workspace, undisturbed: killing.Rows, images: int) -> None:
    """Each image once, the rows of an undisturbed run, and files that are what the rows say."""
    names = sorted({row[0] for row in undisturbed}, key=killing.number_of)[:images]
    wanted = [row for row in undisturbed if row[0] in names]
    assert killing.rows_of(workspace) == wanted
    files = {row[3] for row in wanted} | {row[4] for row in wanted}
    assert killing.counts_of(workspace) == (images, images, len(files))
    verify(workspace, fix=True, minutes=0.0)  # a kill may leave a file that no row names
    found = verify(workspace, minutes=0.0)
    assert (found.ok, found.problems, found.orphans) == (True, (), ())


def test_killed_at_random_moments_and_gone_on_with(
    workspace: Workspace, tmp_path: Path, undisturbed: killing.Rows
):
    killing.fill(workspace, tmp_path / "images", MOST)
    root = workspace.settings.root
    killed, _ = killing.kill_often(root, 0.15, 4, (0.5, 1.7), seed=1)
    assert killed > 2
    killing.segment_slowly(workspace, 0.0)
    check_equal(workspace, undisturbed, MOST)


def test_a_cluster_that_ends_a_job_lets_the_images_in_hand_be_written(
    sqlite_workspace: Workspace, tmp_path: Path
):
    """SIGTERM reaches every process of the job."""
    killing.fill(sqlite_workspace, tmp_path / "images", MOST)
    process = killing.start(sqlite_workspace.settings.root, 0.5)
    while not (before := killing.counts_of(sqlite_workspace)[0]):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert before < killing.counts_of(sqlite_workspace)[0] < MOST


@pytest.mark.postgres
def test_four_processes_with_the_same_command_do_each_image_once(
    postgres_workspace: Workspace, tmp_path: Path, undisturbed: killing.Rows
):
    several_at_once(postgres_workspace, tmp_path, undisturbed, 4)


def test_two_processes_share_one_sqlite_store(
    sqlite_workspace: Workspace, tmp_path: Path, undisturbed: killing.Rows
):
    several_at_once(sqlite_workspace, tmp_path, undisturbed, 2)


def several_at_once(
    workspace: Workspace, folder: Path, undisturbed: killing.Rows, number: int
) -> None:
    killing.fill(workspace, folder / "images", MOST)
    root = workspace.settings.root
    processes = [killing.start(root, 0.2, workers=1, stderr=subprocess.PIPE) for _ in range(number)]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert (process.returncode, said) == (0, b"")
    with workspace.database.read() as session:
        jobs = session.execute(select(Job.status, Job.attempts, Job.worker)).all()
    assert {(status, attempts) for status, attempts, _ in jobs} == {(Status.DONE, 1)}
    assert len({worker for _, _, worker in jobs}) > 1
    check_equal(workspace, undisturbed, MOST)


@pytest.mark.one_database
def test_a_dask_cluster_gives_the_same_rows(
    workspace: Workspace, tmp_path: Path, undisturbed: killing.Rows
):
    distributed = pytest.importorskip("distributed")
    killing.fill(workspace, tmp_path / "images", 20)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options, local_directory=str(tmp_path)) as cluster:
        resources = Resources(scheduler=cluster.scheduler_address)
        assert killing.segment_slowly(workspace, resources=resources).done == 20
    check_equal(workspace, undisturbed, 20)


def test_a_scheduler_that_is_not_there_is_one_sentence(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(execute, "CONNECT_SECONDS", 1)
    killing.fill(sqlite_workspace, tmp_path / "images", 2)
    with pytest.raises(StoreError, match="does not answer"):
        killing.segment_slowly(sqlite_workspace, resources=Resources(scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(UserInputError, match="--workers must be at least 1"):
        killing.segment_slowly(sqlite_workspace, resources=Resources(workers=0))
    assert killing.segment_slowly(sqlite_workspace).done == 2


@pytest.mark.one_database
def test_a_folder_that_workers_cannot_write_stops_the_run_and_breaks_nothing(
    workspace: Workspace, tmp_path: Path, undisturbed: killing.Rows
):
    killing.fill(workspace, tmp_path / "images", 8)
    masks = workspace.artifacts.root / "mask"
    masks.parent.mkdir(exist_ok=True)
    masks.write_bytes(b"in the way of the folder")
    with pytest.raises(StorageError, match="then run the same command again"):
        killing.segment_slowly(workspace, resources=Resources(workers=2))
    assert killing.counts_of(workspace)[0] == 0
    with workspace.database.read() as session:
        jobs = session.execute(select(Job.status, Job.attempts)).all()
    assert {tuple(job) for job in jobs} == {(Status.PENDING, 0)}
    masks.unlink()
    assert killing.segment_slowly(workspace, resources=Resources(workers=2)).done == 8
    check_equal(workspace, undisturbed, 8)
