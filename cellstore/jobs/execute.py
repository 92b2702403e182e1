"""A stage that goes image by image, and one run of it, from its recipes to its results.

A stage differs from the others in four things: which images it selects and by which
recipe (the function that is named like the stage), what it fetches of an image from the database,
what it computes, and what it inserts. Between them travel a task, its input and its output. The
rest is the same for all, and here: reserve jobs, have workers compute them, write what comes back.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
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
from operator import attrgetter
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..config import THIS_PROCESS, Resources
from ..db.bulk import in_lists
from ..db.events import recording_removed
from ..errors import (
    CellstoreError,
    ConflictError,
    DatabaseError,
    MissingExtraError,
    RunCancelledError,
    StorageError,
    StoreError,
    UserInputError,
    first_line,
)
from ..models import ImageFile, Job, Recipe
from ..notebooks import Shown
from . import queue
from .gone_files import FEW, find_gone, gone_sentence
from .queue import ENV_LEASE, JobScope, Task, count_images
from .runs import running
from .workspace import Workspace

Input = TypeVar("Input")
Output = TypeVar("Output")

WAIT_SECONDS = 0.5
POLL_SECONDS = 0.5
CHUNK_SECONDS = 2.0
"""How long a worker should be busy with one chunk: long enough to hide the way there and back."""
LARGEST_CHUNK = 128
CHUNKS = 2
"""Chunks that a worker has: one at work, one that waits behind it."""
CONNECT_SECONDS = 10
"""How long a Dask scheduler may take to answer."""
NO_MEMORY = (
    "This machine has too little memory for this image. Give fewer --workers, or try another "
    "machine, with: cellstore retry"
)
ON_LINUX = sys.platform == "linux"


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
        """Open the files of one image, if there are any."""
        return task_input

    def compute(self, loaded: Any) -> Any:
        """Work on one image, if there is work."""
        return loaded

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

    def digest(self, recipe_id: int, output: Output) -> str | None:
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
class JobsResult(Shown):
    """What a stage that goes image by image did.

    ``run_id`` is None when nothing was done. ``selected`` counts the images that the selection
    names, ``waiting`` those of them whose files are still missing, ``failed_before`` those that
    failed in earlier runs and were left alone, ``cells`` what was written by this run.
    ``lacking``: the other images, which were left out because they lack a channel, and which.
    """

    run_id: int | None
    recipe_id: int | None
    selected: int
    waiting: int
    done: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    cells: int = 0
    failed_before: int = 0
    lacking: tuple[tuple[str, str], ...] = ()


def execute(
    workspace: Workspace,
    stage: ImageStage[Any, Any],
    recipes: Sequence[Recipe],
    images: Select[int],
    resources: Resources,
    parent_id: int | None = None,
    result: Mapping[str, Any] | None = None,
    *,
    unseen: bool = False,
) -> list[JobsResult]:
    """Do what ``recipes`` have not done of some images, in a run for each, in one pass.

    ``parent_id``: the run whose result these rely on. ``result``: what else is kept with the runs.
    ``unseen``: also images that have not been seen, for work that opens none.
    """
    with workspace.database.read() as session:
        lost = {recipe.id: stage.find_lost(session, recipe.id, images) for recipe in recipes}
        counts = [count_images(session, recipe.id, images, unseen=unseen) for recipe in recipes]
    if any(found is not None for found in lost.values()):
        gone = list(in_lists({image for found in lost.values() for image in found or ()}))
        with workspace.database.begin() as session, recording_removed(session, gone):
            for recipe_id, found in lost.items():
                queue.reopen(session, recipe_id, found or ())
                for images_without in in_lists(found or ()):  # what has failed for want of them
                    queue.requeue(session, Job.image_id.in_(images_without))
                stage.forget_lost(session, recipe_id)
            counts = [count_images(session, recipe.id, images, unseen=unseen) for recipe in recipes]
    counters: dict[int, RunCounter] = {}
    with ExitStack() as stack:
        device = getattr(stage, "device", "cpu")
        runs = {
            recipe.id: stack.enter_context(
                running(workspace.database, recipe, parent_id=parent_id, device=device)
            )
            for recipe, counted in zip(recipes, counts, strict=True)
            if counted.todo
        }
        if runs:
            by_recipe = {recipe_id: run.id for recipe_id, run in runs.items()}
            scope = JobScope(by_recipe, images, unseen)
            counters = run_jobs(workspace, stage, scope, resources)
        for recipe_id, counter in counters.items():
            failed = len(counter.failures)
            done = {"images": counter.images, "failed": failed, "cells": counter.cells}
            runs[recipe_id].result = {**done, **(result or {})}
            if failed and not counter.images:  # so that it is never taken for the latest result
                runs[recipe_id].error = f"None of the {failed} images could be done."
    nothing = RunCounter(0, 0)
    did = [counters.get(recipe.id, nothing) for recipe in recipes]
    return [
        JobsResult(
            one.run_id or None,
            recipe.id,
            counted.selected,
            counted.waiting,
            one.images,
            tuple(one.failures),
            one.cells,
            counted.failed,
        )
        for recipe, counted, one in zip(recipes, counts, did, strict=True)
    ]


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
        UserInputError: fewer than one worker, or a lease (how long a job stays reserved for a
            worker that is not heard of) that is no number of 1 or more.
        MissingExtraError: a Dask scheduler, and Dask is not installed.
        StoreError: the scheduler does not answer, or workers die whenever they start.
        StorageError: the disk is full or read-only; the jobs in hand are given back.
        KeyboardInterrupt: it was stopped.
        RunCancelledError: somebody cancelled the run.
    """
    loop = _Loop(workspace, stage, scope, resources)
    stop, workers = loop.stop, loop.workers
    for worker in workers:
        worker.start()
    loop.progress.start(stage.label, loop.left)
    heartbeat = threading.Thread(target=loop.renew_leases, daemon=True, name="cellstore-heartbeat")
    heartbeat.start()
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other hears of signals
        for wanted in (signal.SIGINT, signal.SIGTERM):
            handlers[wanted] = signal.signal(wanted, loop.on_signal)
    finished = False
    try:
        while not finished:
            if not stop.is_set():
                loop.submit()
            chunks = [chunk for worker in workers for chunk in worker.chunks]
            # A worker that still loads the stage has no image in hand.
            in_flight = [future for future, tasks in chunks if tasks or not stop.is_set()]
            if in_flight:
                wait(in_flight, POLL_SECONDS, FIRST_COMPLETED)
                loop.collect()
            elif loop.ready:
                loop.write(everything=True)
            elif loop.cancelled:
                runs = ", ".join(str(run) for run in sorted(set(scope.runs.values())))
                raise RunCancelledError(f"Run {runs} was cancelled; what is done is kept.")
            elif stop.is_set():
                raise KeyboardInterrupt
            else:
                with loop.database.begin() as session:
                    finished = not queue.reclaim_expired(session, scope, loop.owner)
                if not finished:
                    stop.wait(WAIT_SECONDS)
    finally:
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
        loop.over.set()
        heartbeat.join()
        loop.progress.finish()
        for worker in workers:
            worker.close(drop=not finished)
        # If that fails, the leases will run out by themselves.
        with suppress(CellstoreError), loop.database.begin() as session:
            queue.release(session, scope, loop.owner)
    return loop.counters


class _Loop:
    """The jobs of a scope on their way: submitted to workers, collected from them, written.

    ``computes_here``: the only worker is a thread of this process. ``over`` ends the renewal of
    leases, ``stop`` the work: nothing more is reserved. ``drained``: nothing is left to reserve,
    until what is in hand is done. ``told``: sentences that were shown. ``left`` counts the images
    that are not reserved yet; ``ready`` holds outputs whose rows are not written, with the seconds
    that they took; ``seconds`` is what an image takes.
    """

    def __init__(
        self,
        workspace: Workspace,
        stage: ImageStage[Any, Any],
        scope: JobScope,
        resources: Resources,
    ) -> None:
        number, text = resources.workers, os.environ.get(ENV_LEASE) or "60"
        self.lease = 0.0
        with suppress(ValueError):
            self.lease = float(text)
        if not self.lease >= 1:
            raise UserInputError(
                f"{ENV_LEASE} should be a number of seconds, 1 or more, not {text!r}."
            )
        self.workers: list[Worker] = []
        if resources.scheduler is not None:
            self.workers = [DaskCluster(pickle.dumps(stage), address=resources.scheduler)]
        elif number == 1:
            self.workers = [Worker(stage)]
        else:
            start_importing(stage)
            threads = max(1, cores() // number)
            self.workers = [Worker(pickle.dumps(stage), threads) for _ in range(number)]
        self.database, self.progress = workspace.database, workspace.progress
        self.stage, self.scope = stage, scope
        self.is_remote = resources.scheduler is not None
        self.computes_here = number == 1 and not self.is_remote
        self.owner = queue.new_owner(computes=self.computes_here)
        self.counters = {recipe: RunCounter(run, recipe) for recipe, run in scope.runs.items()}
        self.ready: list[tuple[Task, Any, float]] = []
        self.left = 0
        self.enqueued_to: int | None = 0
        self.drained = self.cancelled = False
        self.seconds: float | None = None
        self.stop, self.over = threading.Event(), threading.Event()
        self.told: set[str] = set()
        with self.database.begin() as session:
            queue.reclaim_expired(session, scope, self.owner)
        with self.database.read() as session:
            for recipe_id in scope.runs:
                counted = count_images(session, recipe_id, scope.images, unseen=scope.unseen)
                self.left = max(self.left, counted.todo)
            # The workers of a cluster may see folders that are not on this machine.
            if self.left and not scope.unseen and not self.is_remote:
                for item in find_gone(session, FEW):
                    of_images = select(ImageFile.id).where(ImageFile.folder_id.in_(item.folder_ids))
                    of_images = of_images.where(ImageFile.image_id.in_(scope.images))
                    if session.scalar(of_images.limit(1)) is not None:
                        self.progress.note(item.sentence)
                        self.told.add(gone_sentence(item.folder))

    def on_signal(self, _number: int, _frame: object) -> None:
        """End when the images in hand are done; at the second signal at once."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()
        self.progress.note("Stopping after the present images. Press Ctrl-C again to stop at once.")

    def renew_leases(self) -> None:
        """Renew the leases until it is over; stop where ``cellstore cancel`` asks for it."""
        while not self.over.wait(min(5.0, self.lease / 4)):
            # What fails is tried again; if all fails, closing the job finds out.
            with suppress(CellstoreError, SQLAlchemyError), self.database.begin() as session:
                if queue.renew(session, self.scope, self.owner, self.lease):
                    self.cancelled = True
                    self.stop.set()

    def submit(self) -> None:
        """Keep the workers busy: reserve jobs, and submit a chunk for each free slot."""
        for worker in self.workers:
            worker.free = worker.room()
        room = sum(max(0, worker.free) for worker in self.workers)
        in_hand = any(worker.chunks for worker in self.workers)
        if room == 0 or (self.drained and in_hand):
            return
        size = 1
        if self.seconds is not None:
            wanted = int(CHUNK_SECONDS / max(self.seconds, 1e-6))
            # Smaller towards the end, so that all workers end at the same time.
            slots = 2 * (room + sum(len(worker.chunks) for worker in self.workers))
            fair = self.left if self.computes_here else self.left // slots
            size = max(1, min(LARGEST_CHUNK, wanted, fair))
        tasks: list[Task] = []
        while not tasks:
            with self.database.begin() as session:
                mine = (session, self.scope, self.owner, self.lease)
                tasks = queue.reserve(*mine, room * size)
                if not tasks and self.enqueued_to is not None:
                    self.enqueued_to = queue.enqueue(session, self.scope, self.enqueued_to)
                    tasks = queue.reserve(*mine, room * size) if self.enqueued_to else []
                self.drained = not tasks and self.enqueued_to is None
                if self.drained:
                    # Images over which a worker died come last, and each alone; in this process
                    # with no other in hand, so that no other is blamed for another death.
                    if self.computes_here and (in_hand or self.ready):
                        return
                    number = 1 if self.computes_here else room
                    tasks = queue.reserve(*mine, number, after_deaths=True)
                    if not tasks:
                        return
        self.left -= len(tasks)
        with self.database.read() as session:
            inputs = self.stage.fetch(session, tasks)
        good = []
        for task in tasks:
            if isinstance(error := inputs[task.image_id], CellstoreError):
                self.fail(task, Failure.of(error))
            else:
                good.append(task)
        size = 1 if any(task.deaths for task in tasks) else -(-len(tasks) // room)
        chunks = [good[start : start + size] for start in range(0, len(good), size)]
        for chunk in chunks:
            worker = max(self.workers, key=attrgetter("free"))
            worker.free -= 1
            worker.submit(chunk, [inputs[task.image_id] for task in chunk])

    def collect(self) -> None:
        """Take the chunks that are over from the workers, and write what they made."""
        fatal: CellstoreError | None = None
        for worker in self.workers:
            while done := [chunk for chunk in worker.chunks if chunk[0].done()]:
                worker.chunks.remove(done[0])
                future, tasks = done[0]
                try:
                    outputs, seconds = future.result()
                except CellstoreError as error:
                    fatal = error
                except Exception as error:
                    self.record_crash(tasks, worker.recover(error, tasks))
                else:
                    worker.false_starts = 0
                    for task, output in zip(tasks, outputs, strict=True):
                        if isinstance(output, Failure):
                            self.fail(task, output)
                        else:
                            self.ready.append((task, output, seconds))
                            known = seconds if self.seconds is None else self.seconds
                            self.seconds = 0.8 * known + 0.2 * seconds
        self.write(everything=fatal is not None)  # what is done is not lost
        if fatal is not None:
            raise fatal

    def record_crash(self, tasks: Sequence[Task], waiting: Sequence[Task]) -> None:
        """The chunk in the hands of a dead worker counts as tried, those ``waiting`` do not."""
        given_up = []
        with self.database.begin() as session:
            if self.stop.is_set():  # who stops us may have killed the worker, too
                waiting, tasks = [*tasks, *waiting], []
            queue.release(session, self.scope, self.owner, waiting)
            given_up = [t for t in tasks if not queue.record_crash(session, self.owner, t)]
        for task in given_up:
            self.note_failure(task, "Its worker died again and again.")

    def fail(self, task: Task, failure: Failure) -> None:
        """Keep why an image failed, or try it again."""
        with self.database.begin() as session:
            again = queue.fail(session, self.owner, task, failure.detail, may_pass=failure.may_pass)
        if again:
            self.progress.note(f"{task.name}: {failure.sentence} It is tried again.")
        else:
            self.note_failure(task, failure.sentence)

    def note_failure(self, task: Task, sentence: str) -> None:
        """Count an image that failed."""
        for recipe_id in task.jobs:
            self.counters[recipe_id].failures.append((task.name, sentence))
        if sentence not in self.told:
            self.told.add(sentence)
            self.progress.note(f"{task.name}: {sentence}")
        self.progress.advance()

    def write(self, *, everything: bool) -> None:
        """Write files, then the rows of all recipes in one transaction, which closes the jobs.

        Where some jobs are another worker's now, or their image has changed, nothing is written:
        they are dropped, and the others written anew.
        """
        together = self.stage.images_per_file
        # Images whose rows are written in one transaction at most, when they come in that fast.
        size = together if together > 1 else 128
        conflicts, alone = 0, 0
        while self.ready and (everything or alone or len(self.ready) >= together):
            piece = self.ready[: 1 if alone else size]
            jobs = sum(len(task.jobs) for task, _, _ in piece)
            seconds = sum(took for _, _, took in piece) / len(piece)
            written = []
            kept: list[tuple[Task, Any, float]] = []
            try:
                digests = {}
                for run in self.counters.values():
                    done = [(task, out) for task, out, _ in piece if run.recipe_id in task.jobs]
                    if done:
                        written.append((run, done, self.stage.write_together(run, done)))
                    for task, output in done:
                        digests[task.jobs[run.recipe_id]] = self.stage.digest(run.recipe_id, output)
                with self.database.begin() as session:
                    ours = queue.close(session, self.owner, digests, seconds)
                    if sum(map(len, ours.values())) < jobs:
                        session.rollback()
                        written = []
                        for task, output, took in piece:
                            still = {
                                recipe: task.jobs[recipe] for recipe in ours.get(task.image_id, ())
                            }
                            if still:
                                kept.append((replace(task, jobs=still), output, took))
                    cells = [self.stage.insert(session, *each) for each in written]
            except ConflictError:
                conflicts += 1
                if conflicts >= 5:  # another transaction stood in the way each time
                    raise
                continue
            except (StorageError, DatabaseError):
                raise
            except Exception as error:
                if len(piece) > 1:  # rows of one of them cannot be written: the others can
                    alone = len(piece)
                    continue
                self.fail(piece[0][0], Failure.of(error))
            else:
                for (run, done, _), number in zip(written, cells, strict=True):
                    run.images += len(done)
                    run.cells += number
                self.progress.advance(len(piece) - len(kept))
            self.ready[: len(piece)] = kept
            conflicts, alone = 0, max(0, alone - (len(piece) - len(kept)))


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
        sentence = NO_MEMORY if isinstance(error, MemoryError) else first_line(error)
        detail = str(error) if known else "".join(traceback.format_exception(error))
        may_pass = not known or isinstance(error.__cause__, OSError)
        return cls(sentence, sentence if sentence == NO_MEMORY else detail, may_pass)


Answers: TypeAlias = tuple[list[Any], float]
"""The output or the ``Failure`` of each image of a chunk, and the seconds that one took."""

Chunk: TypeAlias = tuple[Future[Answers], Sequence[Task]]


@dataclass
class Worker:
    """A thread of this process or, with ``threads`` of its own, a process; the oldest chunk first.

    Each has a pool of its own, so that a crash is one worker's and tells which chunk it had in its
    hands: libraries that start workers again (loky) only say that one of them died. ``free``: how
    many chunks more it can be given, so that nobody waits.
    """

    given: ImageStage[Any, Any] | bytes
    threads: int | None = None
    chunks: list[Chunk] = field(default_factory=list)
    free: int = 0
    false_starts: int = 0

    def start(self) -> None:
        """Load the stage: a chunk without images."""
        if self.threads is None:
            self.pool: Executor = ThreadPoolExecutor(1, thread_name_prefix="cellstore-worker")
        else:
            context = get_context("forkserver" if ON_LINUX else "spawn")
            self.pool = ProcessPoolExecutor(
                1, context, initializer=set_up_process, initargs=(self.threads,)
            )
        self.submit([], [])

    def room(self) -> int:
        """One chunk at work and one that waits, once the stage is loaded."""
        loading = any(not tasks for _, tasks in self.chunks)
        return 0 if loading else CHUNKS - len(self.chunks)

    def submit(self, tasks: Sequence[Task], inputs: Sequence[Any]) -> None:
        """Add a chunk behind the others."""
        try:
            future = self.pool.submit(work_on, self.given, inputs)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
            if not self.chunks:  # it died while it had nothing to do: not of this chunk
                self.chunks.append((future, []))
        self.chunks.append((future, tasks))

    def recover(self, error: Exception, tasks: Sequence[Task]) -> list[Task]:
        """Start a process again; return what only waited behind the ``tasks`` that crashed."""
        if not isinstance(error, BrokenProcessPool):
            raise error
        self.false_starts = 0 if tasks else self.false_starts + 1
        if self.false_starts >= 10:  # it died each time before it could do anything
            raise StoreError(
                "Workers die while they start: killed, or out of memory. Free some memory, "
                "or give fewer --workers. A Python script that asks for workers must do so "
                "below if __name__ == '__main__':"
            )
        waiting = [task for _, chunk in self.chunks for task in chunk]
        self.chunks = []
        self.start()
        return waiting

    def close(self, *, drop: bool) -> None:
        """End the worker; ``drop``: what is in flight is not waited for, a process is killed."""
        if drop and isinstance(self.pool, ProcessPoolExecutor):
            for process in list((self.pool._processes or {}).values()):
                process.kill()
        self.pool.shutdown(wait=not (drop and self.threads is None), cancel_futures=drop)


@dataclass
class DaskCluster(Worker):
    """The workers behind a Dask scheduler; they need cellstore, the images and the artifacts."""

    address: str = ""
    deserted: float | None = None
    """Since when no worker is there."""

    def start(self) -> None:
        """Connect to the scheduler, and wait for its workers."""
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("distributed", "distributed") from error
        for name in ("distributed", "tornado", "asyncio"):  # what is wrong we say in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        make_client: Any = distributed.Client
        try:
            self.client = make_client(self.address, timeout=CONNECT_SECONDS, set_as_default=False)
            self.client.wait_for_workers(1, timeout=6 * CONNECT_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            raise StoreError(
                f"The Dask scheduler at {self.address} does not answer, or has no workers. Its "
                "address looks like tcp://host:8786; start workers with: dask worker ADDRESS. Or "
                "leave --scheduler out to work on this machine."
            ) from error
        self.pool = self.client.get_executor(pure=False, retries=0)

    def room(self) -> int:
        """Two chunks for each thread of the workers that there are now."""
        try:
            threads: int = sum(self.client.nthreads().values())
        except (OSError, TimeoutError, AssertionError) as error:
            raise self.failed(error) from error
        self.deserted = None if threads else self.deserted or time.monotonic()
        if self.deserted and time.monotonic() - self.deserted > 60:
            raise self.failed(TimeoutError("it has no workers any more."))
        return CHUNKS * threads - len(self.chunks)

    def failed(self, error: Exception) -> StoreError:
        """What is said when the scheduler ends, or its workers cannot do the work."""
        return StoreError(
            f"The Dask cluster at {self.address} cannot go on ({first_line(error)}) Its scheduler "
            "and its workers need the same cellstore as this machine. What is done is kept: start "
            "it again, and run the same command."
        )

    def recover(self, error: Exception, tasks: Sequence[Task]) -> list[Task]:
        """Dask starts a worker again by itself, and lost this chunk only; others are at fault."""
        from distributed.scheduler import KilledWorker

        if not isinstance(error, KilledWorker):
            raise self.failed(error) from error
        return []

    def close(self, *, drop: bool) -> None:
        """Leave the cluster as it is."""
        with suppress(Exception):
            self.pool.shutdown(wait=not drop)
        self.client.close()


_here = threading.local()  # networks are not shared by threads


def work_on(given: ImageStage[Any, Any] | bytes, inputs: Sequence[Any]) -> Answers:
    """Do in a worker what a stage does with each of ``inputs``; return the outputs in their order.

    While an image is computed, the next one is read and the files of the last one are written.

    Raises:
        CellstoreError: the stage cannot be loaded, or a file cannot be written.
    """
    if getattr(_here, "given", None) != given:
        loaded_stage: ImageStage[Any, Any] = (
            pickle.loads(given) if isinstance(given, bytes) else given  # noqa: S301 - the parent's
        )
        loaded_stage.load()
        _here.given, _here.stage = given, loaded_stage
    if not inputs:
        return [], 0.0
    stage: ImageStage[Any, Any] = _here.stage
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming = reader.submit(_try, stage.read, inputs[0])
        written = []
        for position in range(1, len(inputs) + 1):
            loaded = coming.result()
            if position < len(inputs):
                coming = reader.submit(_try, stage.read, inputs[position])
            computed = _try(stage.compute, loaded)
            written.append(writer.submit(_try, stage.write, computed, StorageError))
        outputs = [future.result() for future in written]
    return outputs, (time.perf_counter() - started) / len(inputs)


def _try(
    function: Callable[[Any], Any], argument: Any, fatal: type[Exception] | tuple[()] = ()
) -> Any:
    """Call a function; a ``Failure`` takes the place of what cannot be done, and is passed on."""
    if isinstance(argument, Failure):
        return argument
    try:
        return function(argument)
    except fatal:
        raise
    except Exception as error:
        return Failure.of(error)


def start_importing(stage: ImageStage[Any, Any]) -> None:
    """Let a process without threads begin to import the stage; workers will be copies of it.

    This process itself cannot be copied: torch and threads do not survive that. Elsewhere than on
    Linux each worker is started and imports for itself.
    """
    if ON_LINUX:
        from multiprocessing import forkserver, resource_tracker  # not on Windows

        forkserver.set_forkserver_preload([type(stage).__module__])
        # The SIGTERM that clusters send to all of a job is for this process to answer: the new
        # process starts with it blocked. Starting the resource tracker would unblock it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_up_process(threads: int) -> None:
    """Prepare a process that only works: few threads, no Ctrl-C, no life without its parent."""
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ.setdefault(f"{library}_NUM_THREADS", str(threads))
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
