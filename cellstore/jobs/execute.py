"""A stage that goes image by image, and one run of it, from its recipes to its results.

A stage differs from the others in four things: which images it selects and by which
recipe (the function that is named like the stage), what it fetches of an image from the database,
what it computes, and what it inserts. Between them travel a task, its input and its output. The
rest is the same for all, and here: reserve jobs, have workers compute them, write what comes back.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context, parent_process
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..config import THIS_PROCESS, Resources
from ..db.bulk import in_lists
from ..enums import Status
from ..errors import (
    CellstoreError,
    ConflictError,
    DatabaseError,
    RunCancelledError,
    StorageError,
    StoreError,
    UserInputError,
    first_line,
)
from ..models import Job, Recipe
from . import queue
from .queue import JobScope, Owner, Task, count_images, lease_seconds
from .runs import RecipeSpec, known_recipe, running
from .workspace import Workspace

Input = TypeVar("Input")
Output = TypeVar("Output")

WAIT_SECONDS = 0.5
POLL_SECONDS = 0.5
CHUNK_SECONDS = 2.0
"""How long a worker should be busy with one chunk: long enough to hide the way there and back."""
LARGEST_CHUNK = 64
CHUNKS = 2
"""Chunks that a worker has: one at work, one that waits behind it."""
MOST_CONFLICTS = 5
"""How often rows are written again because another transaction stood in the way."""
MOST_WRITTEN = 64
"""Images whose rows are written in one transaction at most, when they come in that fast."""
MOST_FALSE_STARTS = 10
"""After so many deaths before it could do anything, a worker is not started again."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


# --- what a stage is, and what it returns ---------------------------------------------------------


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

    def find_lost(
        self, session: Session, recipe_id: int, images: Select[int]
    ) -> Collection[int] | None:
        """Return the images whose rows are there but whose files are gone; None: no file is gone.

        A job is believed to be done of its files as well as of its rows.
        """

    def forget_lost(self, session: Session, recipe_id: int) -> None:
        """Delete the rows of files that are gone, when the jobs of their images open again."""


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
    with workspace.database.read() as session:
        lost = {recipe.id: stage.find_lost(session, recipe.id, images) for recipe in recipes}
        counts = [count_images(session, recipe.id, images) for recipe in recipes]
    if any(found is not None for found in lost.values()):
        with workspace.database.begin() as session:
            for recipe_id, found in lost.items():
                jobs = queue.done_jobs(session, recipe_id, found or ())
                for some in in_lists(jobs):
                    queue.requeue(session, Job.id.in_(some), Status.DONE)
                stage.forget_lost(session, recipe_id)
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
    with workspace.database.read() as session:
        recipe = known_recipe(session, spec)
        recipe_id = 0 if recipe is None else recipe.id  # 0: has done nothing
        lost = stage.find_lost(session, recipe_id, images) or ()
        counted = count_images(session, recipe_id, images)
        todo = counted.todo + len(queue.done_jobs(session, recipe_id, lost))
        others = (
            select(Job.recipe_id)
            .join(Recipe, Recipe.id == Job.recipe_id)
            .where(Recipe.stage == spec.stage, Job.status == Status.DONE)
            .order_by(Job.id.desc())
        )
        per_image, basis = None, "this recipe"
        for known in (recipe_id, session.scalar(others.limit(1))):
            if per_image is None and known is not None:
                done = select(Job.seconds).where(Job.recipe_id == known, Job.status == Status.DONE)
                last = done.order_by(Job.id.desc()).limit(1000).subquery()
                per_image = session.scalar(select(func.avg(last.c.seconds)))
                basis = "this recipe" if known == recipe_id else f"recipe {known}"
    workers = max(1, resources.workers)
    seconds = None if per_image is None else per_image * todo / workers
    basis_known = None if per_image is None else basis
    return JobsResult(
        None,
        None,
        counted.selected,
        counted.waiting,
        failed_before=counted.failed,
        forecast=Forecast(todo, workers, per_image, seconds, basis_known),
    )


# --- this process: reserve, submit, write ---------------------------------------------------------


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
        UserInputError: fewer than one worker, or no address of a scheduler.
        MissingExtraError: a Dask scheduler, and Dask is not installed.
        StoreError: the scheduler does not answer.
        StorageError: the disk is full or read-only; the jobs in hand are given back.
        KeyboardInterrupt: it was stopped.
        RunCancelledError: somebody cancelled the run.
    """
    lease = lease_seconds()
    if resources.workers < 1:
        raise UserInputError("There must be at least one worker. Give --workers 1 or more.")
    if resources.scheduler is not None:
        from .dask_cluster import DaskCluster

        workers: Workers = DaskCluster(stage, resources.scheduler)
    else:
        workers = LocalWorkers(stage, resources.workers)
    loop = _Loop(workspace, stage, scope, workers, lease)
    loop.run()
    return loop.counters


class _Loop:
    """Reserve, submit, take in, write: until nothing is left, here or in other hands."""

    def __init__(
        self,
        workspace: Workspace,
        stage: ImageStage[Any, Any],
        scope: JobScope,
        workers: Workers,
        lease: float,
    ) -> None:
        self.database, self.progress = workspace.database, workspace.progress
        self.stage, self.scope, self.workers, self.lease = stage, scope, workers, lease
        self.owner = Owner.of_this_process(computes=workers.computes_here)
        self.counters = {recipe: RunCounter(run, recipe) for recipe, run in scope.runs.items()}
        self.left = 0
        self.chunks = 0
        """Chunks that the workers have."""
        self.ready: list[tuple[Task, Any, float]] = []
        """Outputs whose rows are not written, with the seconds that they took."""
        self.enqueued_to: int | None = 0
        self.seconds: float | None = None
        self.stop, self.over = threading.Event(), threading.Event()
        self.cancelled = False

    def run(self) -> None:
        """Work until nothing is left, or somebody stops it; give back what is in hand."""
        with self.database.begin() as session:
            queue.reclaim_expired(session, self.scope, self.owner)
        with self.database.read() as session:
            images, unseen = self.scope.images, self.scope.unseen
            counts = [count_images(session, r, images, unseen=unseen) for r in self.scope.runs]
        self.left = max(counted.todo for counted in counts)
        self.progress.start(self.stage.label, self.left)
        heartbeat = threading.Thread(target=self._beat, daemon=True, name="cellstore-heartbeat")
        heartbeat.start()
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other hears of signals
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self._on_signal)
        finished = False
        try:
            self._work()
            finished = True
        finally:
            for handled, handler in handlers.items():
                signal.signal(handled, handler)
            self.over.set()
            heartbeat.join()
            self.progress.finish()
            self.workers.close(drop=not finished)
            # If that fails, the leases will run out by themselves.
            with suppress(CellstoreError), self.database.begin() as session:
                queue.release(session, self.scope, self.owner)

    def _beat(self) -> None:
        """Renew the leases until it is over; stop where ``cellstore cancel`` asks for it."""
        while not self.over.wait(min(5.0, self.lease / 4)):
            # A beat that fails is tried again; if all fail, closing the job finds out.
            with suppress(CellstoreError, SQLAlchemyError), self.database.begin() as session:
                if queue.renew(session, self.scope, self.owner, self.lease):
                    self.cancelled = True
                    self.stop.set()

    def _on_signal(self, _number: int, _frame: object) -> None:
        """Stop at the first Ctrl-C or SIGTERM; at the second one drop what is in hand."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()
        self.progress.note("Stopping after the present images. Press Ctrl-C again to stop at once.")

    def _work(self) -> None:
        while not self.stop.is_set():
            room = self.workers.room()
            if room > 0:
                self._submit(room)
            if room <= 0 or self.chunks:
                self._take_in(briefly=room > 0)
            elif self.ready:
                self._write(everything=True)
            else:
                with self.database.begin() as session:
                    left = queue.reclaim_expired(session, self.scope, self.owner)
                if not left:
                    return
                self.stop.wait(WAIT_SECONDS)
        while self.chunks:
            self._take_in(briefly=False)
        self._write(everything=True)
        if self.cancelled:
            runs = ", ".join(str(run) for run in sorted(set(self.scope.runs.values())))
            raise RunCancelledError(f"Run {runs} was cancelled; what is done is kept.")
        raise KeyboardInterrupt

    def _submit(self, room: int) -> None:
        """Keep the workers busy: reserve jobs and submit them, a chunk for each that has room."""
        batch, size = self.stage.batch, self.stage.batch
        if self.seconds is not None:
            wanted = int(CHUNK_SECONDS / max(self.seconds, 1e-6))
            # Smaller towards the end, so that all workers end at the same time.
            slots = 2 * max(1, room + self.chunks)
            fair = self.left if self.workers.computes_here else self.left // slots
            size = max(1, min(LARGEST_CHUNK, wanted, fair) // batch) * batch
        tasks: list[Task] = []
        while not tasks:
            with self.database.begin() as session:
                wanted_images = (self.scope, self.owner, self.lease, room * size)
                tasks = queue.reserve(session, *wanted_images)
                if not tasks:
                    if self.enqueued_to is None:
                        return
                    self.enqueued_to = queue.enqueue(session, self.scope, self.enqueued_to)
                    tasks = queue.reserve(session, *wanted_images)
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
        self.chunks += len(chunks)

    def _take_in(self, *, briefly: bool) -> None:
        """Wait for a chunk, or for a stop, and write what has come."""
        for tasks, answers in self.workers.finished(self.stop, briefly=briefly):
            self.chunks -= 1
            if isinstance(answers, Crash):
                self._record_crash(tasks, answers)
            elif isinstance(answers, CellstoreError):
                self._write(everything=True)  # what is done is not lost
                raise answers
            else:
                outputs, seconds = answers
                known = seconds if self.seconds is None else self.seconds
                for task, output in zip(tasks, outputs, strict=True):
                    if isinstance(output, Failure):
                        self._fail(task, output)
                    else:
                        self.ready.append((task, output, seconds))
                        known = 0.8 * known + 0.2 * seconds
                        self.seconds = known
        self._write(everything=False)

    def _record_crash(self, tasks: Sequence[Task], crash: Crash) -> None:
        """The chunk in the hands of a dead worker counts as tried, one that waited does not."""
        with self.database.begin() as session:
            if not crash.suspect or self.stop.is_set():
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
        """Write files, then rows, closing the jobs; leave those that are no longer ours."""
        together = self.stage.images_per_file
        size = together if together > 1 else MOST_WRITTEN
        conflicts, alone = 0, 0
        while self.ready and (everything or alone or len(self.ready) >= together):
            piece = self.ready[: 1 if alone else size]
            number = len(piece)
            try:
                ours = self._write_now(piece)
            except ConflictError:
                conflicts += 1
                if conflicts >= MOST_CONFLICTS:
                    raise
                continue
            except (StorageError, DatabaseError):
                raise
            except Exception as error:
                if number > 1:  # rows of one of them cannot be written: the others can
                    alone = number
                    continue
                self._fail(piece[0][0], Failure.of(error))
                ours = {}
            else:
                self.progress.advance(number - len(ours))
            # What is left has lost some of its jobs to another worker: the others are tried again.
            self.ready[:number] = [
                (replace(task, jobs={recipe: task.jobs[recipe] for recipe in recipes}), *rest)
                for task, *rest in piece
                if (recipes := ours.get(task.image_id))
            ]
            conflicts, alone = 0, max(0, alone - (number - len(ours)))

    def _write_now(self, ready: Sequence[tuple[Task, Any, float]]) -> Mapping[int, Sequence[int]]:
        """Files first, then the rows of all recipes in one transaction, which closes the jobs.

        Where some jobs are another worker's now, or their image has changed, nothing is written;
        returns by image the recipes whose jobs are still ours. Empty: nothing is left to write.
        """
        written = []
        for run in self.counters.values():
            done = [(task, output) for task, output, _ in ready if run.recipe_id in task.jobs]
            if done:
                written.append((run, done, self.stage.write_together(run, done)))
        seconds = sum(took for _, _, took in ready) / len(ready)
        digests = {
            task.jobs[run.recipe_id]: self.stage.digest(run.recipe_id, output)
            for run, done, _ in written
            for task, output in done
        }
        with self.database.begin() as session:
            ours = queue.close(session, self.owner, digests, seconds)
            if sum(map(len, ours.values())) < sum(len(task.jobs) for task, _, _ in ready):
                session.rollback()
                return ours
            cells = [self.stage.insert(session, *each) for each in written]
        for (run, done, _), number in zip(written, cells, strict=True):
            run.images += len(done)
            run.cells += number
        return {}


# --- workers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why one image failed: a sentence, and all that is known. ``may_pass``: not its own fault."""

    sentence: str
    detail: str
    may_pass: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return what is kept of an error: of an unexpected one, its traceback."""
        known = isinstance(error, CellstoreError)
        detail = str(error) if known else "".join(traceback.format_exception(error))
        may_pass = not known or isinstance(error.__cause__, OSError)
        return cls(first_line(error), detail, may_pass)


@dataclass(frozen=True)
class Crash:
    """A worker is gone. ``suspect``: it was working on this very chunk."""

    suspect: bool


Answers: TypeAlias = tuple[list[Any], float]
"""The output or the ``Failure`` of each image of a chunk, and the seconds that one took."""

Finished: TypeAlias = tuple[Sequence[Task], Answers | Crash | CellstoreError]
"""The error is one that the next image would meet, too: a full disk, a network that is damaged."""


class Workers(Protocol):
    """Workers and the chunks that they have. ``computes_here``: in this process, not beside it."""

    computes_here: bool

    def room(self) -> int:
        """Return how many chunks more may be submitted, so that nobody waits.

        Raises:
            CellstoreError: a worker cannot load the stage, or dies whenever it tries.
        """

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Give a chunk to the worker that has least to do."""

    def finished(self, stop: threading.Event, *, briefly: bool) -> list[Finished]:
        """Wait for a worker, or for ``stop``; return the chunks that are over, in order.

        ``briefly``: only for a moment, because another worker has nothing to do.
        """

    def close(self, *, drop: bool) -> None:
        """End the workers; ``drop``: what is in flight is not waited for."""


@dataclass
class _Worker:
    """A pool of one thread or process, how it loads the stage, and its chunks, the oldest first.

    A pool for each, so that a death is one worker's and tells which chunk it had in its hands:
    libraries that start workers again (loky) only say that one of them died.
    """

    pool: Executor
    loading: Future[None]
    chunks: list[tuple[Future[Answers], Sequence[Task]]] = field(default_factory=list)
    false_starts: int = 0


class LocalWorkers:
    """One thread of this process, or some processes, which are started again when they died."""

    def __init__(self, stage: ImageStage[Any, Any], workers: int) -> None:
        self.computes_here = workers == 1
        self._given = stage if self.computes_here else pickle.dumps(stage)
        self._threads = max(1, cores() // workers)
        self._workers = [self._start() for _ in range(workers)]

    def _start(self, false_starts: int = 0) -> _Worker:
        if self.computes_here:
            pool: Executor = ThreadPoolExecutor(1, thread_name_prefix="cellstore-worker")
        else:  # "spawn": torch and threads do not survive a fork
            pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=set_up_process, initargs=(self._threads,)
            )
        return _Worker(pool, pool.submit(load_stage, self._given), false_starts=false_starts)

    def room(self) -> int:
        """One chunk at work and one that waits, for each worker that has loaded the stage."""
        room = 0
        for worker in self._workers:
            if worker.loading.done():
                if isinstance(worker.loading.exception(), BrokenProcessPool):
                    continue  # started again when its chunks are taken back
                worker.loading.result()
                room += max(0, CHUNKS - len(worker.chunks))
        return room

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Give a chunk to the worker that has the fewest."""
        ready = [index for index, worker in enumerate(self._workers) if worker.loading.done()]
        index = min(ready, key=lambda index: len(self._workers[index].chunks))
        worker = self._workers[index]
        try:
            future = worker.pool.submit(work_on, self._given, inputs)
        except BrokenProcessPool as error:
            if worker.chunks:  # it died of the first of them; this one waits behind it
                future = Future()
                future.set_exception(error)
            else:
                worker = self._workers[index] = self._start()
                future = worker.pool.submit(work_on, self._given, inputs)
        worker.chunks.append((future, tasks))

    def finished(self, stop: threading.Event, *, briefly: bool) -> list[Finished]:
        """Wait for the first worker; of one that died, the oldest chunk is what it died of."""
        waited_for: list[Future[Any]] = [w.chunks[0][0] for w in self._workers if w.chunks]
        waited_for += [worker.loading for worker in self._workers if not worker.loading.done()]
        wait_for_one(waited_for, stop, briefly=briefly)
        finished: list[Finished] = []
        for index, worker in enumerate(self._workers):
            never_loaded = worker.loading.done() and isinstance(
                worker.loading.exception(), BrokenProcessPool
            )
            dead, suspect = never_loaded, not never_loaded
            while worker.chunks:
                future, tasks = worker.chunks[0]
                if not (dead or future.done()):
                    break
                worker.chunks.pop(0)
                error = future.exception() if future.done() else None
                if not future.done() or isinstance(error, BrokenProcessPool):
                    finished.append((tasks, Crash(suspect)))
                    dead, suspect = True, False
                elif isinstance(error, CellstoreError):
                    finished.append((tasks, error))
                else:
                    finished.append((tasks, future.result()))
            if dead:
                false_starts = worker.false_starts + 1 if never_loaded else 0
                if false_starts >= MOST_FALSE_STARTS:
                    raise StoreError(
                        "Workers die while they start: killed, or out of memory. Free some memory, "
                        "or give fewer --workers. A Python script that asks for workers must do so "
                        "below if __name__ == '__main__':"
                    )
                self._workers[index] = self._start(false_starts)
        return finished

    def close(self, *, drop: bool) -> None:
        """End all workers; processes that are to be dropped are killed, a thread ends alone."""
        for worker in self._workers:
            if drop and isinstance(worker.pool, ProcessPoolExecutor):
                for process in list((worker.pool._processes or {}).values()):
                    process.kill()
            worker.pool.shutdown(wait=not (drop and self.computes_here), cancel_futures=drop)


def wait_for_one(
    futures: Sequence[Future[Any]], stop: threading.Event, *, briefly: bool
) -> set[Future[Any]]:
    """Wait for one of ``futures`` or for ``stop``; return the futures that are done."""
    while True:
        done, _ = wait(futures, POLL_SECONDS, FIRST_COMPLETED)
        if done or briefly or not futures or stop.is_set():
            return done


_here = threading.local()  # networks are not shared by threads


def work_on(given: ImageStage[Any, Any] | bytes, inputs: Sequence[Any]) -> Answers:
    """Do in a worker what a stage does with each of ``inputs``; return the outputs in their order.

    While a batch is computed, the next one is read and the files of the last one are written.

    Raises:
        CellstoreError: the stage cannot be loaded, or a file cannot be written.
    """
    load_stage(given)
    started = time.perf_counter()
    stage: ImageStage[Any, Any] = _here.stage
    batches = [inputs[i : i + stage.batch] for i in range(0, len(inputs), stage.batch)]
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming = reader.submit(_each, stage.read, batches[0])
        written: list[Future[list[Any]]] = []
        for batch in (*batches[1:], []):
            loaded = coming.result()
            if batch:
                coming = reader.submit(_each, stage.read, batch)
            good = [item for item in loaded if not isinstance(item, Failure)]
            made = _each(stage.compute, [good] if good else [])
            if made and isinstance(made[0], Failure) and len(good) > 1:
                # One of them spoils the batch: each for itself, so that it fails alone.
                made = _each(stage.compute, [[item] for item in good])
            parts = ([part] if isinstance(part, Failure) else part for part in made)
            computed = iter([result for part in parts for result in part])
            results = [item if isinstance(item, Failure) else next(computed) for item in loaded]
            written.append(writer.submit(_each, stage.write, results, StorageError))
        outputs = [output for future in written for output in future.result()]
    return outputs, (time.perf_counter() - started) / len(inputs)


def _each(
    function: Callable[[Any], Any],
    arguments: Sequence[Any],
    fatal: type[Exception] | tuple[()] = (),
) -> list[Any]:
    """Call a function with each argument; a ``Failure`` takes the place of what cannot be done."""
    results = []
    for argument in arguments:
        if isinstance(argument, Failure):
            results.append(argument)
            continue
        try:
            results.append(function(argument))
        except fatal:
            raise
        except Exception as error:
            results.append(Failure.of(error))
    return results


def load_stage(given: ImageStage[Any, Any] | bytes) -> None:
    """Load a stage in this worker, so that its first chunk need not."""
    if getattr(_here, "given", None) != given:
        stage: ImageStage[Any, Any] = (
            pickle.loads(given) if isinstance(given, bytes) else given  # noqa: S301 - the parent's
        )
        stage.load()
        _here.given, _here.stage = given, stage


def set_up_process(threads: int) -> None:
    """Prepare a process that only works: few threads, no Ctrl-C, no life without its parent."""
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    # Ctrl-C, and the SIGTERM that clusters send to all of a job, are for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def die_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True, name="cellstore-parent").start()


def cores() -> int:
    """Return the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
