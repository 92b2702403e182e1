"""Jobs in several hands: stops, deaths, and workers that share the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from factories import Factory
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session
from tinyjobs import (
    SPEC,
    Tiny,
    fill,
    go,
    labels,
    statuses,
    write_label,
)

from cellstore.config import Resources
from cellstore.enums import Stage, Status
from cellstore.errors import RunCancelledError, StorageError, StoreError, UserInputError
from cellstore.jobs import execute, queue
from cellstore.jobs.execute import RunCounter
from cellstore.jobs.queue import Task, is_alive, new_owner
from cellstore.jobs.runs import register
from cellstore.jobs.workspace import Workspace, open_workspace
from cellstore.models import Job, Run
from cellstore.settings import StoreSettings
from cellstore.stages.manage_jobs import cancel, list_jobs


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(queue, "FIRST_WAIT", 0.01)


def process_that_began(when: str, pid: int) -> str:
    """The name of a process of this machine that began at another moment."""
    host, _, machine, _, mark = new_owner().split("|")
    return "|".join((host, str(pid), machine, when, mark))


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


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
        assert set(session.scalars(select(Job.attempts))) == {0}
    assert (run.status, run.error) == (Status.CANCELLED, "Stopped by Ctrl-C.")
    assert go(workspace).images == 2


def test_ctrl_c_finishes_what_is_in_hand_and_begins_nothing(sqlite_workspace: Workspace):
    fill(sqlite_workspace, 9)

    pressed = []

    def compute(task: Task) -> str:
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # until the main thread has heard of it
        return task.name

    with pytest.raises(KeyboardInterrupt):
        go(sqlite_workspace, compute)
    done = len(labels(sqlite_workspace))
    assert 1 <= done <= 2  # the one at work, and the one that waited behind it
    assert statuses(sqlite_workspace)[Status.DONE] == done
    assert statuses(sqlite_workspace)[Status.RUNNING] == 0
    assert go(sqlite_workspace).images == 9 - done


def test_a_run_that_is_cancelled_ends_and_goes_on_later(workspace: Workspace, monkeypatch):
    monkeypatch.setenv(queue.ENV_LEASE, "1")  # beats four times a second
    fill(workspace, 4)

    def compute(task: Task) -> str:
        if cancel(workspace):
            time.sleep(0.6)
        return task.name

    with pytest.raises(RunCancelledError, match="cancelled"):
        go(workspace, compute)
    with workspace.database.read() as session:
        assert session.scalars(select(Run.status)).one() == Status.CANCELLED
    done = len(labels(workspace))
    assert 1 <= done < 4
    assert go(workspace).images == 4 - done


def test_a_stop_does_not_wait_for_a_worker_that_is_loading(
    sqlite_workspace: Workspace, monkeypatch
):
    monkeypatch.setenv(queue.ENV_LEASE, "1")
    fill(sqlite_workspace, 1)
    loaded = threading.Event()

    class Loading(Tiny):
        def load(self) -> None:
            cancel(sqlite_workspace)
            assert loaded.wait(20)

    started = time.monotonic()
    try:
        with pytest.raises(RunCancelledError, match="cancelled"):
            go(sqlite_workspace, stage=Loading)
    finally:
        loaded.set()
    assert time.monotonic() - started < 10
    assert go(sqlite_workspace).images == 1


def test_what_is_over_cannot_be_cancelled(sqlite_workspace: Workspace):
    fill(sqlite_workspace, 1)
    go(sqlite_workspace)
    assert cancel(sqlite_workspace) == ()
    with pytest.raises(UserInputError, match="Run 1 is done"):
        cancel(sqlite_workspace, "1")


@dataclass(frozen=True)
class FullDisk(Tiny):
    """A stage whose files cannot be written."""

    def write(self, result: str) -> str:
        if result.endswith("c02f01"):
            raise StorageError("No space left on device.")
        return result


def test_a_full_disk_ends_the_run_and_gives_the_jobs_back(workspace: Workspace):
    fill(workspace, 3)
    with pytest.raises(StorageError):
        go(workspace, stage=FullDisk)
    assert labels(workspace) == ["P1/r01c01f01"]  # what was done is not lost
    assert statuses(workspace) == {Status.DONE: 1, Status.PENDING: 2}
    assert go(workspace).images == 2


def test_a_stored_file_that_cannot_be_read_fails_its_image_alone(workspace: Workspace):
    fill(workspace, 3)

    def compute(task: Task) -> str:
        if task.name.endswith("c02f01"):
            raise StorageError("The stored file is not what was written.")
        return task.name

    outcome = go(workspace, compute)
    assert (outcome.images, [name for name, _ in outcome.failures]) == (2, ["P1/r01c02f01"])


def test_a_run_whose_process_died_is_closed_by_the_next(workspace: Workspace):
    fill(workspace, 1)
    here = new_owner()
    gone = process_that_began("1", os.getpid())
    dead = Factory(workspace).run(Stage.TRAIN, status=Status.RUNNING, process=gone)
    alive = Factory(workspace).run(Stage.TRAIN, status=Status.RUNNING, process=here)
    go(workspace)
    with workspace.database.read() as session:
        closed, still = session.get_one(Run, dead.id), session.get_one(Run, alive.id)
    assert (closed.status, closed.error) == (Status.FAILED, "Its process died.")
    assert still.status == Status.RUNNING


def test_the_job_of_a_killed_worker_comes_back(workspace: Workspace):
    images = fill(workspace, 1)
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    job = Factory(workspace).job(
        dead, images[0], Status.RUNNING, worker="dead", lease_until=soon(-1), attempts=1
    )
    assert go(workspace).images == 1
    with workspace.database.read() as session:
        again = session.get_one(Job, job.id)
        dead = session.get_one(Run, dead.id)
    assert (again.status, again.attempts, again.lease_until) == (Status.DONE, 2, None)
    assert (again.deaths, again.run_id != dead.id) == (1, True)
    assert (dead.status, dead.error) == (Status.FAILED, "Its process died.")


def test_the_job_of_a_process_that_is_gone_comes_back_at_once(workspace: Workspace):
    image = fill(workspace, 1)[0]
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=int)
    process.start()
    gone = process_that_began("1", process.pid or 0)
    process.join()
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    far = soon(1000)
    Factory(workspace).job(dead, image, Status.RUNNING, worker=gone, lease_until=far)
    assert go(workspace).images == 1


def test_who_was_taken_for_dead_ends_and_fails_no_image(workspace: Workspace):
    fill(workspace, 4)

    def compute(task: Task) -> str:
        with workspace.database.begin() as session:  # as another does when a lease has run out
            over = {"status": Status.FAILED, "ended_at": datetime.now(UTC)}
            session.execute(update(Run).values(**over))
            session.execute(update(Job).values(status=Status.PENDING, worker=None))
        return task.name

    with pytest.raises(StoreError, match="run the same command again"):
        go(workspace, compute)
    assert (labels(workspace), statuses(workspace)) == ([], {Status.PENDING: 4})
    assert go(workspace).images == 4


def test_what_is_computed_for_a_run_that_was_ended_meanwhile_is_not_written(workspace: Workspace):
    """Between the reserve of a worker and its write another command ends the run."""
    fill(workspace, 2)
    first = []

    def compute(task: Task) -> str:
        if not first:  # the second image may be computed when the next run has begun
            first.append(task)
            with workspace.database.begin() as session:
                values = {"status": Status.FAILED, "ended_at": datetime.now(UTC)}
                session.execute(update(Run).where(Run.ended_at.is_(None)).values(**values))
        return task.name

    with pytest.raises(StoreError, match=r"was ended by another command.*run the same command"):
        go(workspace, compute)
    assert labels(workspace) == []
    assert statuses(workspace) == {Status.PENDING: 2}
    with workspace.database.read() as session:
        assert set(session.scalars(select(Job.attempts))) == {0}
    assert go(workspace).images == 2


def test_a_living_owner_and_one_elsewhere_are_not_taken_for_dead():
    assert is_alive(new_owner()) is True
    assert is_alive("elsewhere|1|another machine|1|x") is None
    assert is_alive("somebody") is None


def test_a_process_that_had_others_compute_does_not_blame_the_image(workspace: Workspace):
    image = fill(workspace, 1)[0]
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    leader = "elsewhere|1|another machine|1|workers-1"
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    late = soon(-1)
    job = Factory(workspace).job(
        dead, image, Status.RUNNING, worker=leader, lease_until=late, attempts=1
    )
    assert go(workspace).images == 1
    with workspace.database.read() as session:
        again = session.get_one(Job, job.id)
    assert (again.status, again.attempts, again.deaths) == (Status.DONE, 1, 0)


def test_a_job_over_which_workers_die_alone_has_failed_in_the_end(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """Not before: in the first death the image may have only waited in line."""
    images = fill(workspace, 2)
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    for image, alone in zip(images, (queue.MOST_DEATHS - 1, queue.MOST_DEATHS - 2), strict=True):
        Factory(workspace).job(
            dead,
            image,
            Status.RUNNING,
            worker="dead",
            lease_until=soon(-1),
            attempts=alone + 2,
            deaths=alone + 1,
        )
    monkeypatch.setattr(queue, "FIRST_WAIT", 0.01)
    assert go(workspace).images == 1
    (failed,) = list_jobs(workspace, status="failed").jobs
    assert (failed["image"], failed["deaths"]) == ("P1/r01c01f01", queue.MOST_DEATHS + 1)
    assert "died 4 times with this image alone" in (failed["reason"] or "")


@pytest.mark.one_database
@pytest.mark.parametrize("images_per_file", [1, 3])
def test_after_a_death_each_image_comes_last_and_is_in_hand_alone(
    workspace: Workspace, images_per_file: int
):
    images = fill(workspace, 5)
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    dead = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    late = soon(-1)
    for image in images[:3]:
        Factory(workspace).job(dead, image, Status.RUNNING, worker="dead", lease_until=late)
    seen = []

    def compute(task: Task) -> str:
        with workspace.database.read() as session:
            query = select(func.count()).where(Job.status == Status.RUNNING)
            seen.append((task.name[-6:], task.deaths, session.scalar(query)))
        return task.name

    assert go(workspace, compute, images_per_file=images_per_file).images == 5
    assert [name for name, *_ in seen[:2]] == ["c04f01", "c05f01"]
    assert seen[2:] == [(f"c0{column}f01", 1, 1) for column in (1, 2, 3)]


def test_a_job_in_other_hands_is_waited_for(sqlite_workspace: Workspace):
    workspace = sqlite_workspace
    image = fill(workspace, 1)[0]
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    other = Factory(workspace).run(Stage.SEGMENT, recipe, status=Status.RUNNING)
    Factory(workspace).job(
        other, image, Status.RUNNING, worker="other", lease_until=soon(0.4), attempts=1
    )
    started = time.monotonic()
    assert go(workspace).images == 1
    assert time.monotonic() - started > 0.3


def test_the_lease_is_renewed_while_the_work_runs(sqlite_workspace: Workspace, monkeypatch):
    monkeypatch.setenv(queue.ENV_LEASE, "1")  # beats four times a second
    fill(sqlite_workspace, 1)
    leases = []

    def compute(task: Task) -> str:
        for _ in range(2):
            with sqlite_workspace.database.read() as session:
                [job_id] = task.jobs.values()
                leases.append(session.get_one(Job, job_id).lease_until)
            time.sleep(0.4)
        return task.name

    assert go(sqlite_workspace, compute).images == 1
    assert leases[1] > leases[0]


def test_two_threads_share_the_work(workspace: Workspace):
    fill(workspace, 12)
    outcomes: list[RunCounter] = []

    def slow(task: Task) -> str:
        time.sleep(0.02)
        return f"{threading.get_ident()} {task.name}"

    threads = [threading.Thread(target=lambda: outcomes.append(go(workspace, slow))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.images for outcome in outcomes) == 12
    done = [value.split(" ")[1] for value in labels(workspace)]
    assert sorted(done) == sorted(set(done))
    assert len(done) == 12


def work_in_a_process(settings: StoreSettings, results: multiprocessing.Queue[int]) -> None:
    """What another process does: open the store and work until nothing is left."""
    workspace = open_workspace(settings)
    results.put(go(workspace).images)
    workspace.database.close()


def die_over_the_second(task: Task) -> str:
    if task.name.endswith("c02f01"):
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


@pytest.mark.one_database
@pytest.mark.heavy
def test_an_image_that_kills_its_worker_fails_alone(workspace: Workspace, monkeypatch):
    monkeypatch.setattr(queue, "MOST_DEATHS", 1)
    fill(workspace, 6)
    outcome = go(workspace, die_over_the_second, resources=Resources(workers=2))
    assert (outcome.images, [name for name, _ in outcome.failures]) == (5, ["P1/r01c02f01"])
    (failed,) = list_jobs(workspace, status="failed").jobs
    assert (failed["image"], failed["deaths"]) == ("P1/r01c02f01", 2)
    assert "died 1 times" in (failed["reason"] or "")


@pytest.mark.heavy
def test_processes_of_this_machine_do_what_this_process_does(workspace: Workspace):
    fill(workspace, 12)
    assert go(workspace, resources=Resources(workers=2)).images == 12
    assert labels(workspace) == [f"P1/r01c{column:02d}f01" for column in range(1, 13)]
    with workspace.database.read() as session:
        assert set(session.scalars(select(Job.attempts))) == {1}


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


@pytest.mark.postgres
def test_a_transaction_that_stood_in_anothers_way_is_done_again(postgres_workspace: Workspace):
    fill(postgres_workspace, 2)
    tries = []

    def write(session: Session, task: Task, result: str) -> None:
        tries.append(task.name)
        if len(tries) == 1:
            session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))
        write_label(session, task, result)

    assert go(postgres_workspace, write=write).images == 2
    assert labels(postgres_workspace) == ["P1/r01c01f01", "P1/r01c02f01"]
    assert len(tries) > 2
