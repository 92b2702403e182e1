"""Jobs: each image once, one failure alone, and what is tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from factories import Factory, sha
from sqlalchemy import event, select
from sqlalchemy.orm import Session
from tinyjobs import (
    Tiny,
    change,
    fill,
    go,
    labels,
    left,
    statuses,
    write_label,
)

from cellstore.enums import Stage, Status
from cellstore.errors import CellstoreError, ImageError
from cellstore.jobs import execute, queue
from cellstore.jobs.execute import RunCounter, run_jobs
from cellstore.jobs.queue import JobScope, Task, count_images
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Job
from cellstore.stages.manage_jobs import list_jobs, retry

pytestmark = pytest.mark.one_database


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(queue, "FIRST_WAIT", 0.01)


@pytest.mark.each_database
def test_each_image_is_done_once(workspace: Workspace):
    fill(workspace)
    assert left(workspace) == 3
    assert go(workspace).images == 3
    assert labels(workspace) == ["P1/r01c01f01", "P1/r01c02f01", "P1/r01c03f01"]
    with workspace.database.read() as session:
        jobs = session.execute(select(Job.digest, Job.recipe_id).order_by(Job.id)).all()
    names = labels(workspace)
    assert [job.digest for job in jobs] == [
        sha(f"{job.recipe_id} {name}") for job, name in zip(jobs, names, strict=True)
    ]
    assert (left(workspace), go(workspace).images) == (0, 0)


def test_an_image_without_its_files_waits(workspace: Workspace):
    make = Factory(workspace)
    make.image(make.well(make.plate("P1"), 1, 1), missing=True)
    assert (left(workspace), go(workspace).images) == (0, 0)


@pytest.mark.each_database
def test_a_failing_image_fails_alone_and_waits_for_retry(workspace: Workspace):
    fill(workspace)

    def compute(task: Task) -> str:
        if task.name.endswith("c02f01"):
            raise ImageError("The file is truncated.")
        return task.name

    first = go(workspace, compute)
    assert (first.images, first.failures) == (2, [("P1/r01c02f01", "The file is truncated.")])
    (failed,) = list_jobs(workspace, status="failed").jobs
    assert (failed["error"], failed["attempts"]) == ("The file is truncated.", 1)
    assert (left(workspace), go(workspace).images) == (0, 0)  # until somebody says so
    assert list_jobs(workspace, status="failed", image="P1/A02").jobs == (failed,)
    assert list_jobs(workspace, status="failed", image="P1/A01/1").jobs == ()
    assert retry(workspace, image="P1/A01").jobs == 0
    assert retry(workspace, image="P1/A02").jobs == 1
    second = go(workspace)
    assert (second.images, second.failures) == (1, [])
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


def test_an_image_too_large_for_the_memory_fails_alone_with_a_sentence(workspace: Workspace):
    fill(workspace, 3)

    def compute(task: Task) -> str:
        if task.name.endswith("c02f01"):
            np.empty(1 << 55)
        return task.name

    done = go(workspace, compute)
    assert (done.images, [name for name, _ in done.failures]) == (2, ["P1/r01c02f01"])
    (failed,) = list_jobs(workspace, status="failed").jobs
    assert failed["error"] == failed["reason"] == done.failures[0][1]
    assert "too little memory" in (failed["reason"] or "")


@pytest.mark.each_database
def test_rows_of_a_failing_write_are_undone(workspace: Workspace):
    fill(workspace, 1)

    def write(session: Session, task: Task, result: str) -> None:
        write_label(session, task, result)
        session.flush()
        raise ImageError("after the row")

    assert len(go(workspace, write=write).failures) == 1
    assert labels(workspace) == []
    assert statuses(workspace) == {Status.FAILED: 1}


def test_an_error_that_may_pass_is_tried_again_by_itself(workspace: Workspace):
    fill(workspace, 2)
    tries: Counter[str] = Counter()

    def compute(task: Task) -> str:
        tries[task.name] += 1
        if task.name.endswith("c01f01") and tries[task.name] < queue.MOST_FAILURES:
            raise ImageError("It cannot be opened.") from ConnectionError("the share is away")
        return task.name

    outcome = go(workspace, compute)
    assert (outcome.images, outcome.failures) == (2, [])
    assert tries == {"P1/r01c01f01": 3, "P1/r01c02f01": 1}


def test_an_error_that_does_not_pass_has_failed_in_the_end(workspace: Workspace):
    fill(workspace, 1)
    tries = []

    def compute(task: Task) -> str:
        tries.append(task.tries)
        raise OSError("the disk is away")

    assert go(workspace, compute).failures == [("P1/r01c01f01", "the disk is away")]
    assert tries == [1, 2, 3]


PACKS: list[list[str]] = []


@dataclass(frozen=True)
class Packing(Tiny):
    """A stage that writes files of two images, and keeps in mind which were together."""

    images_per_file: int = 2

    def write_together(self, run: RunCounter, done: Sequence[tuple[Task, str]]) -> None:
        PACKS.append([task.name for task, _ in done])


def test_results_are_written_together_before_the_transaction(workspace: Workspace):
    fill(workspace, 5)
    PACKS.clear()
    assert go(workspace, stage=Packing).images == 5
    assert [len(pack) for pack in PACKS] == [2, 2, 1]


@pytest.mark.each_database
def test_what_was_written_with_a_lost_job_is_written_anew_without_it(workspace: Workspace):
    images = fill(workspace, 2)
    PACKS.clear()

    @dataclass(frozen=True)
    class Disturbed(Packing):
        def write_together(self, run: RunCounter, done: Sequence[tuple[Task, str]]) -> None:
            super().write_together(run, done)
            if len(PACKS) == 1:
                change(workspace, images[0], "new bytes")

    go(workspace, stage=Disturbed)
    assert PACKS[:2] == [["P1/r01c01f01", "P1/r01c02f01"], ["P1/r01c02f01"]]
    assert labels(workspace) == ["P1/r01c02f01"]
    assert statuses(workspace)[Status.RUNNING] == 0
    assert go(workspace).images == 1  # of the new bytes


@dataclass(frozen=True)
class WithoutChannel(Tiny):
    """A stage whose first image lacks a channel."""

    def fetch(self, session: Session, tasks: Sequence[Task]) -> dict[int, Task | CellstoreError]:
        return {
            task.image_id: ImageError("No such channel.") if "c01" in task.name else task
            for task in tasks
        }


def test_an_image_without_an_input_fails_alone(workspace: Workspace):
    fill(workspace, 2)
    outcome = go(workspace, stage=WithoutChannel)
    assert (outcome.images, outcome.failures) == (1, [("P1/r01c01f01", "No such channel.")])


@dataclass(frozen=True)
class TwoRecipes(Tiny):
    """A stage that says of each row by which recipe it was made."""

    def insert(
        self, session: Session, run: RunCounter, done: Sequence[tuple[Task, str]], files: Any
    ) -> int:
        for task, result in done:
            write_label(session, task, f"{run.recipe_id} {result}")
        return len(done)


@pytest.mark.each_database
def test_two_recipes_are_done_in_one_pass(workspace: Workspace):
    fill(workspace, 3)
    seen: Counter[str] = Counter()

    def compute(task: Task) -> str:
        seen[task.name] += 1
        return task.name

    with workspace.database.begin() as session:
        specs = [RecipeSpec(Stage.SEGMENT, 1, {"recipe": number}) for number in (1, 2)]
        one, two = (register(session, spec) for spec in specs)
    with running(workspace.database, two) as run:
        first = select(Image.id).order_by(Image.id).limit(1).scalar_subquery()
        scope = JobScope({two.id: run.id}, select(Image.id).where(Image.id == first))
        run_jobs(workspace, TwoRecipes(compute), scope)
    with running(workspace.database, one) as run, running(workspace.database, two) as other:
        scope = JobScope({one.id: run.id, two.id: other.id}, select(Image.id))
        done = run_jobs(workspace, TwoRecipes(compute), scope)
    assert (done[one.id].images, done[two.id].images) == (3, 2)
    assert sorted(seen.values()) == [1, 1, 2]
    assert len(labels(workspace)) == 6
    assert statuses(workspace) == {Status.DONE: 6}
    with workspace.database.read() as session:
        runs = session.execute(select(Job.recipe_id, Job.run_id).distinct()).all()
    assert len(runs) == 3


def test_an_image_whose_bytes_change_is_open_again(workspace: Workspace):
    image = fill(workspace, 2)[0]
    go(workspace)
    change(workspace, image, "new bytes")
    assert left(workspace) == 1
    assert go(workspace, lambda task: f"again {task.name}").images == 1
    assert statuses(workspace) == {Status.DONE: 3}
    change(workspace, image, "image of nobody")
    assert left(workspace) == 1


@pytest.mark.each_database
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
        assert count_images(session, other.id, select(Image.id)).todo == 1


@pytest.mark.each_database
def test_jobs_are_found_by_index_and_never_by_walking_all_of_them(workspace: Workspace):
    fill(workspace, 5)
    asked: list[tuple[str, Any]] = []

    def listen(_connection, _cursor, statement, parameters, _context, executemany) -> None:
        if "jobs" in statement and not executemany and not statement.startswith("INSERT"):
            asked.append((statement, parameters))

    event.listen(workspace.database.engine, "before_cursor_execute", listen)
    go(workspace)
    list_jobs(workspace, stage="segment", status="failed")
    retry(workspace)
    event.remove(workspace.database.engine, "before_cursor_execute", listen)
    assert len(asked) > 8
    scans = [plan for question in asked if (plan := walk_of_all_jobs(workspace, *question))]
    assert scans == []


def walk_of_all_jobs(workspace: Workspace, statement: str, parameters: Any) -> str | None:
    """The step of the plan of a statement that walks through the whole table, if there is one."""
    with workspace.database.engine.connect() as connection:
        if workspace.database.is_sqlite:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            steps = [row[-1] for row in rows]
            walks = [step for step in steps if step.startswith("SCAN jobs")]
        else:
            connection.exec_driver_sql("SET enable_seqscan = off")  # the tables are tiny
            steps = [
                row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            ]
            walks = [step for step in steps if "Seq Scan on jobs" in step]
        connection.rollback()
    return f"{walks}: {statement}" if walks else None
