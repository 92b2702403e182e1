"""A stage that goes image by image, and one run of it, from its recipes to its results.

A stage is told apart from its neighbours by four things: which images it selects and by which
recipe (the function that is named like the stage), what it fetches of an image from the database,
what it computes, and what it inserts. Between them travel a task, its input and its output. The
rest is the same for all, and here.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..config import THIS_PROCESS, Resources
from ..db.session import Database
from ..enums import Status
from ..errors import CellstoreError, ConflictError, DatabaseError, RunCancelledError, StorageError
from ..models import Job, Recipe
from . import queue
from .executors import Answers, Crash, Failure, Success, Workers, open_workers
from .queue import JobScope, Owner, Task, count_images, lease_seconds
from .runs import RecipeSpec, known_recipe, running
from .workspace import Workspace

Input = TypeVar("Input")
Output = TypeVar("Output")

WAIT_SECONDS = 0.5
CHUNK_SECONDS = 2.0
"""How long a worker should be busy with one chunk: long enough to hide the way there and back."""
LARGEST_CHUNK = 64
MOST_CONFLICTS = 5
"""How often rows are written again because another transaction stood in the way."""
MOST_WRITTEN = 64
"""Images whose rows are written in one transaction at most, when they come in that fast."""


@dataclass
class RunCounter:
    """The run in whose name the jobs of a recipe are done, and how much of it is done."""

    run_id: int
    recipe_id: int
    images: int = 0
    cells: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


class ImageStage(Generic[Input, Output]):
    """A stage that goes image by image; see ``Segment`` in ``stages/segment.py`` for one.

    ``load``, ``read``, ``compute`` and ``write`` run in a worker, outside any transaction: in a
    thread of this process, or in other processes, to which a copy of the stage is sent. So a stage
    is a frozen dataclass that pickles. The other methods run where the database is.
    """

    label: ClassVar[str]

    batch: int = 1
    """Images that ``compute`` is given at once."""

    images_per_file: int = 1
    """Images whose results wait for each other, to be written in one file by ``write_together``."""

    def load(self) -> None:
        """Load what the work needs, a network for example; once in each worker."""

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, Input | CellstoreError]:
        """Return by image id what a worker needs, or the error that makes the image fail."""
        raise NotImplementedError

    def read(self, task_input: Input) -> Any:
        """Open the files of one image."""
        raise NotImplementedError

    def compute(self, loaded: Sequence[Any]) -> Sequence[Any]:
        """Work on the images of a batch; a result for each, in their order."""
        raise NotImplementedError

    def write(self, result: Any) -> Output:
        """Write the files of one image; return all that its rows need."""
        output: Output = result
        return output

    def write_together(self, run: RunCounter, done: Sequence[tuple[Task, Output]]) -> Any:
        """Write the files that hold many images; return what ``insert`` needs to know of them."""

    def insert(
        self, session: Session, run: RunCounter, done: Sequence[tuple[Task, Output]], files: Any
    ) -> int:
        """Write the rows of some images and one recipe; return how many cells they are of.

        The transaction also closes the jobs of these images, whose files are written. ``files`` is
        what ``write_together`` returned.
        """
        raise NotImplementedError

    def digest(self, recipe_id: int, output: Output) -> str:
        """Return the sha256 of the rows that ``insert`` writes of one image, kept with its job."""
        raise NotImplementedError

    def requeue_lost(self, session: Session, recipe_id: int, images: Select[int]) -> int:
        """Open those jobs again whose rows are there but whose files are gone; return how many.

        A job is believed to be done of its files as well as of its rows.
        """
        return 0


@dataclass(frozen=True)
class Forecast:
    """What a run would do. ``seconds``: until its end, by what past jobs took; None: no idea.

    ``per_image`` is in seconds of one worker, from the last jobs of ``basis``: this recipe, or
    this stage with other options.
    """

    images: int
    workers: int
    per_image: float | None
    seconds: float | None
    basis: str | None


@dataclass(frozen=True)
class JobsResult:
    """What a stage that goes image by image did.

    ``run_id`` is None when nothing was done. ``selected`` counts the images that the selection
    names, ``waiting`` those of them whose files are still missing, ``failed_before`` those that
    failed in earlier runs and were left alone, ``cells`` what was written by this run.
    ``forecast``: of a dry run, which does nothing.
    """

    run_id: int | None
    recipe_id: int | None
    selected: int
    waiting: int
    done: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    cells: int = 0
    failed_before: int = 0
    forecast: Forecast | None = None


def execute(
    workspace: Workspace,
    stage: ImageStage[Any, Any],
    recipes: Sequence[Recipe],
    images: Select[int],
    resources: Resources,
    parent_id: int | None = None,
) -> list[JobsResult]:
    """Do what ``recipes`` have not done of some images, in a run for each, in one pass.

    ``parent_id``: the run whose result these rely on.

    Raises:
        StorageError, KeyboardInterrupt, RunCancelledError: see :func:`run_jobs`.
    """
    with workspace.database.begin() as session:
        for recipe in recipes:
            stage.requeue_lost(session, recipe.id, images)
        counts = [count_images(session, recipe.id, images) for recipe in recipes]
    counters: dict[int, RunCounter] = {}
    with ExitStack() as stack:
        runs = {
            recipe.id: stack.enter_context(running(workspace.database, recipe, parent_id=parent_id))
            for recipe, counted in zip(recipes, counts, strict=True)
            if counted.todo
        }
        if runs:
            scope = JobScope({recipe_id: run.id for recipe_id, run in runs.items()}, images)
            counters = run_jobs(workspace, stage, scope, resources)
        for recipe_id, counter in counters.items():
            failed = len(counter.failures)
            done = {"images": counter.images, "failed": failed, "cells": counter.cells}
            runs[recipe_id].result = done
            if failed and not counter.images:  # so that it is never taken for the latest result
                runs[recipe_id].error = f"None of the {failed} images could be done."
    results = []
    for recipe, counted in zip(recipes, counts, strict=True):
        did = counters.get(recipe.id)
        results.append(
            JobsResult(
                run_id=did.run_id if did else None,
                recipe_id=recipe.id,
                selected=counted.selected,
                waiting=counted.waiting,
                done=did.images if did else 0,
                failures=tuple(did.failures) if did else (),
                cells=did.cells if did else 0,
                failed_before=counted.failed,
            )
        )
    return results


def forecast(
    workspace: Workspace,
    stage: ImageStage[Any, Any],
    spec: RecipeSpec,
    images: Select[int],
    resources: Resources,
) -> JobsResult:
    """Return what :func:`execute` would do, by what past jobs of the recipe or the stage took."""
    with workspace.database.begin() as session:
        recipe, basis = known_recipe(session, spec), "this recipe"
        recipe_id = 0 if recipe is None else recipe.id  # 0: has done nothing
        stage.requeue_lost(session, recipe_id, images)
        counted = count_images(session, recipe_id, images)
        per_image = _mean_seconds(session, recipe_id)
        if per_image is None:
            query = (
                select(Job.recipe_id)
                .join(Recipe, Recipe.id == Job.recipe_id)
                .where(Recipe.stage == spec.stage, Job.status == Status.DONE)
                .order_by(Job.id.desc())
            )
            if (other := session.scalar(query.limit(1))) is not None:
                per_image, basis = _mean_seconds(session, other), f"recipe {other}"
        session.rollback()  # nothing is changed
    workers = max(1, resources.workers)
    seconds = None if per_image is None else per_image * counted.todo / workers
    return JobsResult(
        None,
        None,
        counted.selected,
        counted.waiting,
        failed_before=counted.failed,
        forecast=Forecast(
            counted.todo, workers, per_image, seconds, None if per_image is None else basis
        ),
    )


def _mean_seconds(session: Session, recipe_id: int) -> float | None:
    done = (Job.recipe_id == recipe_id, Job.status == Status.DONE)
    last = select(Job.seconds).where(*done).order_by(Job.id.desc()).limit(1000).subquery()
    return session.scalar(select(func.avg(last.c.seconds)))


def run_jobs(
    workspace: Workspace,
    stage: ImageStage[Any, Any],
    scope: JobScope,
    resources: Resources = THIS_PROCESS,
) -> dict[int, RunCounter]:
    """Do every open job of a scope; one failing image fails alone. Return what each recipe did.

    Ctrl-C (or SIGTERM) ends it when the images in hand are done, a second one at once; either
    way no job is lost.

    Raises:
        StorageError: the disk is full or read-only; the jobs in hand are given back.
        KeyboardInterrupt: it was stopped.
        RunCancelledError: somebody cancelled the run.
    """
    lease = lease_seconds()
    with workspace.database.begin() as session:
        queue.reclaim_expired(session, scope)
        todo = max(
            count_images(session, recipe_id, scope.images, unseen=scope.unseen).todo
            for recipe_id in scope.runs
        )
    workers = open_workers(stage, resources)
    owner = Owner.of_this_process(computes=workers.computes_here)
    loop = _Loop(workspace, stage, scope, workers, owner, lease, todo)
    workspace.progress.start(stage.label, todo)
    finished = False
    try:
        with _heartbeat(workspace.database, scope, owner, lease) as cancelled:
            loop.run(cancelled)
        finished = True
    finally:
        workspace.progress.finish()
        workers.close(drop=not finished)
        # What is in hand is given back. If that fails, the leases will run out by themselves.
        with suppress(CellstoreError), workspace.database.begin() as session:
            queue.release(session, scope, owner)
    return loop.counters


@contextmanager
def _heartbeat(
    database: Database, scope: JobScope, owner: Owner, lease: float
) -> Iterator[threading.Event]:
    """Renew leases while the block runs; yield an event that ``cellstore cancel`` sets."""
    over, cancelled = threading.Event(), threading.Event()

    def beat() -> None:
        while not over.wait(min(5.0, lease / 4)):
            # A beat that fails is tried again; if all fail, closing the job finds out.
            with suppress(CellstoreError, SQLAlchemyError), database.begin() as session:
                if queue.renew(session, scope, owner, lease):
                    cancelled.set()

    thread = threading.Thread(target=beat, daemon=True, name="cellstore-heartbeat")
    thread.start()
    try:
        yield cancelled
    finally:
        over.set()
        thread.join()


@contextmanager
def _stop_signals(say: Callable[[], None]) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; the second one is KeyboardInterrupt."""
    stopped = threading.Event()

    def stop(_number: int, _frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        say()

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread hears of signals
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _LostError(Exception):
    """Some jobs are another worker's now, or their image has changed; ``ours`` are the others."""

    def __init__(self, ours: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.ours = ours


class _Loop:
    """Reserve, submit, take in, write: until nothing is left, here or in other hands."""

    def __init__(
        self,
        workspace: Workspace,
        stage: ImageStage[Any, Any],
        scope: JobScope,
        workers: Workers,
        owner: Owner,
        lease: float,
        left: int,
    ) -> None:
        self.database, self.progress = workspace.database, workspace.progress
        self.stage, self.scope, self.workers = stage, scope, workers
        self.owner, self.lease, self.left = owner, lease, left
        self.counters = {recipe: RunCounter(run, recipe) for recipe, run in scope.runs.items()}
        self.ready: list[tuple[Task, Success]] = []
        self.enqueued_to: int | None = 0
        self.seconds: float | None = None
        self.stopping = False

    def run(self, cancelled: threading.Event) -> None:
        """Work until nothing is left, or somebody stops it."""
        with _stop_signals(self._say_stopping) as stopped:
            while not (stopped.is_set() or cancelled.is_set()):
                room = self.workers.room()
                if room > 0:
                    self._submit(room)
                if room <= 0 or self.workers.in_flight():
                    self._take_in([stopped, cancelled], briefly=room > 0)
                elif self.ready:
                    self._write(everything=True)
                elif self._nothing_left():
                    return
                else:
                    stopped.wait(WAIT_SECONDS)
            while self.workers.in_flight():
                self._take_in([], briefly=False)
            self._write(everything=True)
        if cancelled.is_set():
            runs = ", ".join(str(run) for run in sorted(set(self.scope.runs.values())))
            raise RunCancelledError(f"Run {runs} was cancelled; what is done is kept.")
        raise KeyboardInterrupt

    def _say_stopping(self) -> None:
        self.stopping = True
        count = sum(len(tasks) for tasks in self.workers.in_flight())
        images = "1 image" if count == 1 else f"{count} images"
        self.progress.note(f"Stopping when {images} in hand are done; Ctrl-C again drops them.")

    def _submit(self, room: int) -> None:
        """Keep the workers busy: reserve jobs and submit them, a chunk for each that has room."""
        batch, size = self.stage.batch, self.stage.batch
        if self.seconds is not None:
            wanted = int(CHUNK_SECONDS / max(self.seconds, 1e-6))
            # Smaller towards the end, so that all workers end at the same time.
            slots = 2 * max(1, room + len(self.workers.in_flight()))
            fair = self.left if self.workers.computes_here else self.left // slots
            size = max(1, min(LARGEST_CHUNK, wanted, fair) // batch) * batch
        tasks = self._reserve(room * size)
        if not tasks:
            return
        self.left -= len(tasks)
        with self.database.read() as session:
            inputs = self.stage.fetch(session, tasks)
        good = []
        for task in tasks:
            if isinstance(error := inputs[task.image_id], CellstoreError):
                self._fail(task, Failure.of(error))
            else:
                good.append(task)
        # An image over which a worker died is alone, so that it dies alone.
        chunks = [[task] for task in good if task.deaths]
        others = [task for task in good if not task.deaths]
        size = -(-len(tasks) // (room * batch)) * batch
        chunks += [others[start : start + size] for start in range(0, len(others), size)]
        for chunk in chunks:
            self.workers.submit(chunk, [inputs[task.image_id] for task in chunk])

    def _reserve(self, number: int) -> list[Task]:
        """Reserve jobs, making those of the next images where none is open."""
        while True:
            with self.database.begin() as session:
                found = queue.reserve(session, self.scope, self.owner, self.lease, number)
            if found or self.enqueued_to is None:
                return found
            with self.database.begin() as session:
                self.enqueued_to = queue.enqueue(session, self.scope, self.enqueued_to)

    def _take_in(self, stops: Sequence[threading.Event], *, briefly: bool) -> None:
        """Wait for a chunk, or for one of ``stops``, and write what has come."""
        for tasks, answers in self.workers.finished(stops, briefly=briefly):
            if isinstance(answers, Crash):
                self._record_crash(tasks, answers)
            else:
                self._sort(tasks, answers)
        self._write(everything=False)

    def _sort(self, tasks: Sequence[Task], answers: Answers) -> None:
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, Success):
                self.ready.append((task, answer))
                known = answer.seconds if self.seconds is None else self.seconds
                self.seconds = 0.8 * known + 0.2 * answer.seconds
            elif answer.stops is None:
                self._fail(task, answer)
        for answer in answers:
            if isinstance(answer, Failure) and answer.stops is not None:
                self._write(everything=True)  # what is done is not lost
                raise answer.stops

    def _record_crash(self, tasks: Sequence[Task], crash: Crash) -> None:
        """The chunk in the hands of a dead worker counts as tried, one that waited does not."""
        with self.database.begin() as session:
            if not crash.suspect or self.stopping:
                queue.release(session, self.scope, self.owner, tasks)
                return
            given_up = [t for t in tasks if not queue.record_crash(session, self.owner, t)]
        for task in given_up:
            self._note_failure(task, "Its worker died again and again.")

    def _fail(self, task: Task, failure: Failure) -> None:
        with self.database.begin() as session:
            again = queue.fail(session, self.owner, task, failure.detail, may_pass=failure.may_pass)
        if again:
            self.progress.note(f"{task.name}: {failure.sentence} It is tried again.")
        else:
            self._note_failure(task, failure.sentence)

    def _note_failure(self, task: Task, sentence: str) -> None:
        for recipe_id in task.jobs:
            self.counters[recipe_id].failures.append((task.name, sentence))
        self.progress.note(f"{task.name}: {sentence}")
        self.progress.advance()

    def _write(self, *, everything: bool) -> None:
        together = self.stage.images_per_file
        size = together if together > 1 else MOST_WRITTEN
        while self.ready and (everything or len(self.ready) >= together):
            piece, self.ready = self.ready[:size], self.ready[size:]
            self._write_together(piece)

    def _write_together(self, ready: list[tuple[Task, Success]]) -> None:
        """Write files, then rows, closing the jobs; leave those that are no longer ours."""
        conflicts, number = 0, len(ready)
        while ready:
            try:
                self._write_now(ready)
                break
            except _LostError as lost:
                ready = [
                    (replace(task, jobs={recipe: task.jobs[recipe] for recipe in ours}), answer)
                    for task, answer in ready
                    if (ours := lost.ours.get(task.image_id))
                ]
            except ConflictError:
                conflicts += 1
                if conflicts >= MOST_CONFLICTS:
                    raise
            except (StorageError, DatabaseError):
                raise
            except Exception as error:
                if len(ready) == 1:
                    self._fail(ready[0][0], Failure.of(error))
                    return
                for one in ready:  # rows of one of them cannot be written: the others can
                    self._write_together([one])
                return
        self.progress.advance(number)

    def _write_now(self, ready: Sequence[tuple[Task, Success]]) -> None:
        """Files first, then the rows of all recipes in one transaction, which closes the jobs."""
        written = []
        for run in self.counters.values():
            done = [(t, answer.output) for t, answer in ready if run.recipe_id in t.jobs]
            if done:
                written.append((run, done, self.stage.write_together(run, done)))
        seconds = sum(answer.seconds for _, answer in ready) / len(ready)
        digests = {
            task.jobs[run.recipe_id]: self.stage.digest(run.recipe_id, output)
            for run, done, _ in written
            for task, output in done
        }
        with self.database.begin() as session:
            ours = queue.close(session, self.owner, digests, seconds)
            if sum(map(len, ours.values())) < sum(len(task.jobs) for task, _ in ready):
                raise _LostError(ours)
            cells = [self.stage.insert(session, *each) for each in written]
        for (run, done, _), number in zip(written, cells, strict=True):
            run.images += len(done)
            run.cells += number

    def _nothing_left(self) -> bool:
        """Whether nobody else has jobs of ours that may come back; frees those of the dead."""
        with self.database.begin() as session:
            queue.reclaim_expired(session, self.scope)
            return not queue.held_by_others(session, self.scope, self.owner)
