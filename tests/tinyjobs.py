"""Jobs without pixels: a step that computes with a function, and the whole way around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from factories import Factory, sha
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cellstore.config import Resources
from cellstore.enums import TARGET, Stage, Status
from cellstore.jobs.execute import Share, Work, work_through
from cellstore.jobs.queue import Outcome, Task, progressed
from cellstore.jobs.recipes import RecipeSpec, register
from cellstore.jobs.runs import running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Job, Label
from cellstore.progress import Silent

SPEC = RecipeSpec(Stage.SEGMENT, 1, {"test": True})

Compute = Callable[[Task], str]


@dataclass(frozen=True)
class Steps:
    """A step that computes with a function; pickles if the function does."""

    function: Compute

    def __call__(self) -> Steps:
        return self

    def read(self, order: Task) -> Task:
        return order

    def compute(self, loaded: Sequence[Task]) -> list[str]:
        return [self.function(task) for task in loaded]

    def keep(self, made: str) -> str:
        return made


def fill(workspace: Workspace, number: int = 3) -> list[Image]:
    make = Factory(workspace)
    plate = make.plate("P1")
    return [make.image(make.well(plate, 1, column)) for column in range(1, number + 1)]


def name_of(task: Task) -> str:
    return task.name


def write_label(session: Session, task: Task, result: str) -> None:
    # Any row does: what matters is that it comes and goes with the job.
    session.add(Label(field=TARGET, value=result))


def labels(workspace: Workspace) -> list[str]:
    with workspace.database.read() as session:
        return sorted(session.scalars(select(Label.value)))


def statuses(workspace: Workspace) -> Counter[Status]:
    with workspace.database.read() as session:
        return Counter(session.scalars(select(Job.status)))


def work_of(
    compute: Compute = name_of,
    write: Callable[[Session, Task, str], None] = write_label,
    steps: type[Steps] = Steps,
    **more: Any,
) -> Work[Task, str]:
    def insert(session: Session, pairs: Sequence[tuple[Task, str]]) -> None:
        for task, result in pairs:
            write(session, task, result)

    def fetch(_session: Session, tasks: Sequence[Task]) -> dict[int, Task]:
        return {task.job_id: task for task in tasks}

    return Work("test", steps(compute), fetch, insert, **more)


def go(
    workspace: Workspace,
    compute: Compute = name_of,
    write: Callable[[Session, Task, str], None] = write_label,
    resources: Resources | None = None,
    **more: Any,
) -> Outcome:
    with workspace.database.begin() as session:
        recipe = register(session, SPEC)
    with running(workspace.database, recipe) as run:
        return work_through(
            workspace.database,
            Silent(),
            work_of(compute, write, **more),
            Share(run.id, recipe.id, select(Image.id)),
            resources,
        )


def left(workspace: Workspace) -> int:
    with workspace.database.begin() as session:
        return progressed(session, register(session, SPEC).id, select(Image.id)).todo


def change(workspace: Workspace, image: Image, content: str) -> None:
    """Give an image other bytes."""
    with workspace.database.begin() as session:
        session.execute(
            update(Image).where(Image.id == image.id).values(content_sha256=sha(content))
        )
