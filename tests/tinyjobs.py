"""Jobs without pixels: a stage that computes with a function, and the whole way around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factories import Factory, sha
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cellstore.config import THIS_PROCESS, Resources
from cellstore.enums import TARGET, Stage, Status
from cellstore.errors import CellstoreError
from cellstore.jobs.execute import ImageStage, RunCounter, run_jobs
from cellstore.jobs.queue import JobScope, Task, count_images
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Job, Label

SPEC = RecipeSpec(Stage.SEGMENT, 1, {"test": True})

Compute = Callable[[Task], str]


Insert = Callable[[Session, Task, str], None]


def name_of(task: Task) -> str:
    return task.name


def write_label(session: Session, task: Task, result: str) -> None:
    # Any row does: what matters is that it comes and goes with the job.
    session.add(Label(field=TARGET, value=result))


@dataclass(frozen=True)
class Tiny(ImageStage[Task, str]):
    """A stage that computes with a function; pickles if the functions do."""

    label = "test"

    function: Compute = name_of
    write_row: Insert = write_label
    images_per_file: int = 1

    def fetch(self, session: Session, tasks: Sequence[Task]) -> Mapping[int, Task | CellstoreError]:
        return {task.image_id: task for task in tasks}

    def read(self, task_input: Task) -> Task:
        return task_input

    def compute(self, loaded: Task) -> str:
        return self.function(loaded)

    def insert(
        self, session: Session, run: RunCounter, done: Sequence[tuple[Task, str]], files: Any
    ) -> int:
        for task, result in done:
            self.write_row(session, task, result)
        return len(done)

    def digest(self, recipe_id: int, output: str) -> str:
        return sha(f"{recipe_id} {output}")


def fill(workspace: Workspace, number: int = 3) -> list[Image]:
    make = Factory(workspace)
    plate = make.plate("P1")
    return [make.image(make.well(plate, 1, column)) for column in range(1, number + 1)]


def labels(workspace: Workspace) -> list[str]:
    with workspace.database.read() as session:
        return sorted(session.scalars(select(Label.value)))


def statuses(workspace: Workspace) -> Counter[Status]:
    with workspace.database.read() as session:
        return Counter(session.scalars(select(Job.status)))


def go(
    workspace: Workspace,
    compute: Compute = name_of,
    write: Insert = write_label,
    resources: Resources = THIS_PROCESS,
    stage: type[Tiny] = Tiny,
    **more: Any,
) -> RunCounter:
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    with running(workspace.database, recipe) as run:
        scope = JobScope({recipe.id: run.id}, select(Image.id))
        done = run_jobs(workspace, stage(compute, write, **more), scope, resources)
        return done[recipe.id]


def left(workspace: Workspace) -> int:
    with workspace.database.begin() as session:
        return count_images(session, register(session, SPEC).id, select(Image.id)).todo


def change(workspace: Workspace, image: Image, content: str) -> None:
    """Give an image other bytes."""
    with workspace.database.begin() as session:
        session.execute(
            update(Image).where(Image.id == image.id).values(content_sha256=sha(content))
        )
