"""Jobs: each image once, one failure alone, and nothing lost when a worker dies."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter

import pytest
from factories import Factory, sha
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cellstore.config import StoreSettings
from cellstore.db.models import Image, Job, Label, Run
from cellstore.errors import ImageError, StorageError
from cellstore.progress import Silent
from cellstore.runs import (
    Outcome,
    RecipeSpec,
    Task,
    Workspace,
    jobs,
    open_workspace,
    register,
    running,
    todo_count,
    work_through,
)
from cellstore.terms import LabelField, Stage, Status

SPEC = RecipeSpec(Stage.SEGMENT, 1, {"test": True})


def fill(workspace: Workspace, number: int = 3) -> list[Image]:
    make = Factory(workspace)
    plate = make.plate("P1")
    return [make.image(make.well(plate, 1, column)) for column in range(1, number + 1)]


def write_label(session: Session, task: Task, result: str) -> None:
    # Any row does: what matters is that it comes and goes with the job.
    session.add(Label(field=LabelField.TARGET, value=result))


def labels(workspace: Workspace) -> list[str]:
    with workspace.database.read() as session:
        return sorted(session.scalars(select(Label.value)))


def statuses(workspace: Workspace) -> Counter[Status]:
    with workspace.database.read() as session:
        return Counter(session.scalars(select(Job.status)))


def go(workspace: Workspace, compute=lambda task: task.name, write=write_label) -> Outcome:
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    with running(workspace.database, recipe) as run:
        return work_through(
            workspace.database,
            Silent(),
            "test",
            run.id,
            recipe.id,
            select(Image.id),
            compute,
            write,
        )


def left(workspace: Workspace) -> int:
    with workspace.database.begin() as session:
        return todo_count(session, register(session, SPEC).id, select(Image.id))


def test_each_image_is_done_once(workspace: Workspace):
    fill(workspace)
    assert left(workspace) == 3
    assert go(workspace).done == 3
    assert labels(workspace) == ["P1/r01c01f01", "P1/r01c02f01", "P1/r01c03f01"]
    assert (left(workspace), go(workspace).done) == (0, 0)


def test_an_image_without_its_files_waits(workspace: Workspace):
    make = Factory(workspace)
    make.image(make.well(make.plate("P1"), 1, 1), missing=True)
    assert (left(workspace), go(workspace).done) == (0, 0)


def test_a_failing_image_fails_alone_and_is_tried_again(workspace: Workspace):
    fill(workspace)

    def compute(task: Task) -> str:
        if task.name.endswith("c02f01"):
            raise ImageError("The file is truncated.")
        return task.name

    first = go(workspace, compute)
    assert (first.done, first.failures) == (2, [("P1/r01c02f01", "The file is truncated.")])
    with workspace.database.read() as session:
        failed = session.scalars(select(Job).where(Job.status == Status.FAILED)).one()
    assert (failed.error, failed.attempts) == ("The file is truncated.", 1)
    assert left(workspace) == 1
    second = go(workspace)
    assert (second.done, second.failures) == (1, [])
    assert statuses(workspace) == {Status.DONE: 3}


def test_an_unexpected_error_is_kept_with_its_place(sqlite_workspace: Workspace):
    fill(sqlite_workspace, 1)

    def compute(task: Task) -> str:
        raise ZeroDivisionError("at the bottom")

    assert go(sqlite_workspace, compute).failures == [("P1/r01c01f01", "at the bottom")]
    with sqlite_workspace.database.read() as session:
        error = session.scalars(select(Job.error)).one()
    assert "Traceback" in error
    assert "test_jobs.py" in error


def test_rows_of_a_failing_write_are_undone(workspace: Workspace):
    fill(workspace, 1)

    def write(session: Session, task: Task, result: str) -> None:
        write_label(session, task, result)
        session.flush()
        raise ImageError("after the row")

    assert go(workspace, write=write).failed == 1
    assert labels(workspace) == []
    assert statuses(workspace) == {Status.FAILED: 1}


def test_a_stop_between_compute_and_write_leaves_the_job_open(workspace: Workspace):
    fill(workspace, 2)

    def write(session: Session, task: Task, result: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(workspace, write=write)
    assert labels(workspace) == []
    assert statuses(workspace) == {Status.PENDING: 2}
    with workspace.database.read() as session:
        run = session.scalars(select(Run)).one()
    assert (run.status, run.error) == (Status.FAILED, "KeyboardInterrupt")
    assert go(workspace).done == 2


def test_a_full_disk_ends_the_run_and_gives_the_job_back(workspace: Workspace):
    fill(workspace, 2)

    def compute(task: Task) -> str:
        raise StorageError("No space left on device.")

    with pytest.raises(StorageError):
        go(workspace, compute)
    assert statuses(workspace) == {Status.PENDING: 2}
    assert go(workspace).done == 2


def test_the_job_of_a_killed_worker_comes_back(workspace: Workspace):
    images = fill(workspace, 1)
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    job = Factory(workspace).job(
        dead, images[0], Status.RUNNING, worker="dead", lease_until=time.time() - 1, attempts=1
    )
    assert go(workspace).done == 1
    with workspace.database.read() as session:
        again = session.get_one(Job, job.id)
    assert (again.status, again.attempts, again.lease_until) == (Status.DONE, 2, None)
    assert again.run_id != dead.id


def test_a_job_in_other_hands_is_waited_for(sqlite_workspace: Workspace, monkeypatch):
    workspace = sqlite_workspace
    monkeypatch.setattr(jobs, "WAIT_SECONDS", 0.05)
    image = fill(workspace, 1)[0]
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    other = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    Factory(workspace).job(
        other, image, Status.RUNNING, worker="other", lease_until=time.time() + 0.4, attempts=1
    )
    started = time.monotonic()
    assert go(workspace).done == 1
    assert time.monotonic() - started > 0.3


def test_the_lease_is_renewed_while_the_work_runs(sqlite_workspace: Workspace, monkeypatch):
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.05)
    fill(sqlite_workspace, 1)
    leases = []

    def compute(task: Task) -> str:
        for _ in range(2):
            with sqlite_workspace.database.read() as session:
                leases.append(session.get_one(Job, task.job_id).lease_until)
            time.sleep(0.4)
        return task.name

    assert go(sqlite_workspace, compute).done == 1
    assert leases[1] > leases[0]


def test_an_image_whose_bytes_change_is_open_again(workspace: Workspace):
    image = fill(workspace, 2)[0]
    go(workspace)
    change(workspace, image, "new bytes")
    assert left(workspace) == 1
    assert go(workspace, lambda task: f"again {task.name}").done == 1
    assert statuses(workspace) == {Status.DONE: 3}
    change(workspace, image, "image of nobody")
    assert left(workspace) == 1


def change(workspace: Workspace, image: Image, content: str) -> None:
    with workspace.database.begin() as session:
        session.execute(
            update(Image).where(Image.id == image.id).values(content_sha256=sha(content))
        )


def test_a_result_of_old_bytes_is_dropped(workspace: Workspace):
    image = fill(workspace, 1)[0]

    def compute(task: Task) -> str:
        if task.content_sha256 != sha("new bytes"):
            change(workspace, image, "new bytes")  # while we look at the old ones
            return "of the old bytes"
        return "of the new bytes"

    go(workspace, compute)
    go(workspace, compute)
    assert labels(workspace) == ["of the new bytes"]


def test_another_recipe_starts_anew(workspace: Workspace):
    fill(workspace, 1)
    go(workspace)
    with workspace.database.begin() as session:
        other = register(session, RecipeSpec(Stage.SEGMENT, 1, {"test": False}))
        assert todo_count(session, other.id, select(Image.id)) == 1


def test_two_threads_share_the_work(workspace: Workspace, monkeypatch):
    monkeypatch.setattr(jobs, "WAIT_SECONDS", 0.05)
    fill(workspace, 12)
    outcomes: list[Outcome] = []

    def slow(task: Task) -> str:
        time.sleep(0.02)
        return f"{threading.get_ident()} {task.name}"

    threads = [threading.Thread(target=lambda: outcomes.append(go(workspace, slow))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.done for outcome in outcomes) == 12
    done = [value.split(" ")[1] for value in labels(workspace)]
    assert sorted(done) == sorted(set(done))
    assert len(done) == 12


def work_in_a_process(settings: StoreSettings, results: multiprocessing.Queue[int]) -> None:
    """What another process does: open the store and work until nothing is left."""
    workspace = open_workspace(settings)
    results.put(go(workspace).done)
    workspace.database.close()


@pytest.mark.heavy
def test_two_processes_share_the_work(workspace: Workspace):
    fill(workspace, 12)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    others = [
        context.Process(target=work_in_a_process, args=(workspace.settings, results))
        for _ in range(2)
    ]
    for process in others:
        process.start()
    done = sum(results.get(timeout=120) for _ in others)
    for process in others:
        process.join()
    assert (done, len(labels(workspace))) == (12, 12)
    assert statuses(workspace) == {Status.DONE: 12}
