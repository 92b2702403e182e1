"""One run of a stage that goes image by image, from its recipe to its result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, event, func, select
from sqlalchemy.orm import Session

from ..config import THIS_PROCESS, Resources
from ..db.session import Database
from ..enums import Stage, Status
from ..errors import CellstoreError, ConflictError, DatabaseError, RunCancelledError, StorageError
from ..models import Job, Recipe
from ..progress import Progress
from . import queue
from .executors import (
    Answer,
    Crew,
    Failure,
    Step,
    Stop,
    Success,
    WorkerDiedError,
    explained,
    open_crew,
)
from .queue import Outcome, Owner, Progressed, Task, heartbeat, lease_seconds, progressed
from .recipes import RecipeSpec, known_recipe, register
from .runs import RunHandle, running
from .workspace import Workspace

WAIT_SECONDS = 0.5
START_SECONDS = 0.02
CHUNK_SECONDS = 2.0
"""How long a worker should be busy with one chunk: long enough to hide the way there and back."""
LARGEST_CHUNK = 64
MOST_CONFLICTS = 5
"""How often rows are written again because another transaction stood in the way."""
MOST_WRITTEN = 64
"""Images whose rows are written in one transaction at most, when they come in that fast."""

Order = TypeVar("Order")
Result = TypeVar("Result")
Pairs = Sequence[tuple[Task, Any]]


def as_they_are(pairs: Pairs) -> Any:
    """Pack nothing."""
    return pairs


@dataclass(frozen=True)
class Work(Generic[Order, Result]):
    """What a stage does with each image.

    ``step`` makes the part that runs in a worker; for workers in other processes it must be a
    frozen dataclass that pickles. ``fetch`` returns by job id what a worker needs, or the error
    that makes the image fail. ``insert`` writes rows inside the transaction that closes the jobs;
    it is given what ``pack`` made of the results before it, by writing files, for example. Results
    of ``together`` images are packed at a time, fewer at the end. ``batch``: images per call of
    the step.
    """

    label: str
    step: Callable[[], Step[Order, Any, Any, Result]]
    fetch: Callable[[Session, Sequence[Task]], Mapping[int, Order | CellstoreError]]
    insert: Callable[[Session, Any], None]
    pack: Callable[[Sequence[tuple[Task, Result]]], Any] = as_they_are
    together: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Share:
    """Whose jobs: the run in whose name, the recipe, and the images by a query of their ids.

    ``unseen``: also images that have not been seen, for work that opens none. ``again``: jobs that
    failed before get another try. ``beside``: other runs whose rows are written, too; when one of
    them is cancelled, all end.
    """

    run_id: int
    recipe_id: int
    candidates: Select[int]
    unseen: bool = False
    again: bool = False
    beside: tuple[int, ...] = ()


def work_through(
    database: Database,
    progress: Progress,
    work: Work[Any, Any],
    share: Share,
    resources: Resources | None = None,
) -> Outcome:
    """Do every open job of a share; one failing image fails alone.

    Ctrl-C (or SIGTERM) ends it when the images in hand are done, a second one at once; either
    way no job is lost.

    Raises:
        StorageError: the disk is full or read-only; the jobs in hand are given back.
        KeyboardInterrupt: it was stopped.
        RunCancelledError: somebody cancelled the run.
    """
    lease = lease_seconds()
    with database.begin() as session:
        queue.take_back(session, share.recipe_id)
        if share.again:
            queue.forgive(session, share.recipe_id, share.candidates)
        state = queue.progressed(session, share.recipe_id, share.candidates, unseen=share.unseen)
    crew = open_crew(resources or THIS_PROCESS)
    owner = Owner.of_this_process(computes=crew.computes_here)
    loop = _Loop(database, progress, work, share, owner, lease, crew, state.todo)
    progress.start(work.label, state.todo)
    done = False
    try:
        runs = (share.run_id, *share.beside)
        with heartbeat(database, share.recipe_id, runs, owner, lease) as cancelled:
            loop.go(cancelled)
        done = True
    finally:
        progress.finish()
        crew.close(drop=not done)
        loop.release()
    return loop.outcome


class _LostError(Exception):
    """Some jobs are another worker's now, or their image has changed; ``ours`` are the others."""

    def __init__(self, ours: set[int]) -> None:
        super().__init__()
        self.ours = ours


@dataclass
class _Loop:
    database: Database
    progress: Progress
    work: Work[Any, Any]
    share: Share
    owner: Owner
    lease: float
    crew: Crew
    left: int
    outcome: Outcome = field(default_factory=Outcome)
    _flying: dict[Future[list[Answer]], list[Task]] = field(default_factory=dict)
    _ready: list[tuple[Task, Success]] = field(default_factory=list)
    _queued_to: int | None = 0
    _seconds: float | None = None
    _stopping: bool = False

    def go(self, cancelled: threading.Event) -> None:
        """Work until nothing is left, here or in other hands."""
        with _stop_signals(self._say_stopping) as stopped:
            self.crew.start(self.work.step)
            while not (stopped.is_set() or cancelled.is_set()):
                room = self.crew.room(len(self._flying))
                self._hand_out(room)
                if self._flying:
                    self._take_in()
                elif self._ready:
                    self._write(everything=True)
                elif not room:
                    stopped.wait(START_SECONDS)
                elif self._nothing_left():
                    return
                else:
                    stopped.wait(WAIT_SECONDS)
            self._finish_in_hand()
        if cancelled.is_set():
            raise RunCancelledError(f"Run {self.share.run_id} was cancelled; what is done is kept.")
        raise KeyboardInterrupt

    def _say_stopping(self) -> None:
        self._stopping = True
        count = sum(len(tasks) for tasks in self._flying.values())
        images = "1 image" if count == 1 else f"{count} images"
        self.progress.note(f"Stopping when {images} in hand are done; Ctrl-C again drops them.")

    def _hand_out(self, room: int) -> None:
        """Keep the crew busy: reserve jobs and submit them, a chunk for each that has room."""
        size = self._chunk_size(room + len(self._flying))
        tasks = self._reserved(room * size) if room > 0 else []
        if not tasks:
            return
        self.left -= len(tasks)
        with self.database.read() as session:
            orders = self.work.fetch(session, tasks)
        batches = -(-len(tasks) // (room * self.work.batch))
        for chunk in _chunks(tasks, batches * self.work.batch):
            self._submit(chunk, orders)

    def _chunk_size(self, slots: int) -> int:
        if self._seconds is None:
            return self.work.batch
        wanted = int(CHUNK_SECONDS / max(self._seconds, 1e-6))
        # Smaller towards the end, so that all workers end at the same time.
        fair = self.left // (2 * max(1, slots))
        return max(1, min(LARGEST_CHUNK, wanted, fair) // self.work.batch) * self.work.batch

    def _reserved(self, number: int) -> list[Task]:
        """Reserve jobs, making those of the next images where none is open."""
        share = self.share
        while True:
            with self.database.begin() as session:
                found = queue.reserve(
                    session,
                    share.run_id,
                    share.recipe_id,
                    share.candidates,
                    self.owner,
                    self.lease,
                    number,
                )
            if found or self._queued_to is None:
                return found
            with self.database.begin() as session:
                self._queued_to = queue.enqueue(
                    session,
                    share.run_id,
                    share.recipe_id,
                    share.candidates,
                    self._queued_to,
                    unseen=share.unseen,
                )

    def _submit(self, tasks: Sequence[Task], orders: Mapping[int, Any]) -> None:
        good = []
        for task in tasks:
            order = orders[task.job_id]
            if isinstance(order, CellstoreError):
                self._fail(task, explained(order))
            else:
                good.append(task)
        if good:
            chunk = [orders[task.job_id] for task in good]
            self._flying[self.crew.submit(chunk, self.work.batch)] = good

    def _take_in(self) -> None:
        """Wait for a chunk, and write what has come."""
        done, _ = wait(self._flying, timeout=WAIT_SECONDS, return_when=FIRST_COMPLETED)
        for future in [future for future in self._flying if future in done]:  # oldest first
            self._sort(self._flying.pop(future), future)
        self._write(everything=False)

    def _sort(self, tasks: list[Task], future: Future[list[Answer]]) -> None:
        try:
            answers = future.result()
        except WorkerDiedError as death:
            self._lose(tasks, suspect=death.suspect)
            return
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, Success):
                self._ready.append((task, answer))
                self._learn(answer.seconds)
            elif isinstance(answer, Failure):
                self._fail(task, answer)
        for stop in (answer for answer in answers if isinstance(answer, Stop)):
            self._write(everything=True)  # what is done is not lost
            raise stop.error

    def _learn(self, seconds: float) -> None:
        known = seconds if self._seconds is None else self._seconds
        self._seconds = 0.8 * known + 0.2 * seconds

    def _lose(self, tasks: list[Task], *, suspect: bool) -> None:
        """A worker died: the chunk in its hands counts as tried, one that waited does not."""
        if not suspect or self._stopping:
            with self.database.begin() as session:
                queue.release(session, self.owner, [task.job_id for task in tasks])
            return
        for task in tasks:
            with self.database.begin() as session:
                again = queue.mourn(session, self.owner, task)
            if not again:
                self._failed(task, "Its worker died again and again.")

    def _fail(self, task: Task, failure: Failure) -> None:
        with self.database.begin() as session:
            again = queue.fail(session, self.owner, task, failure.detail, may_pass=failure.may_pass)
        if again:
            self.progress.note(f"{task.name}: {failure.sentence} It is tried again.")
        else:
            self._failed(task, failure.sentence)

    def _failed(self, task: Task, sentence: str) -> None:
        self.outcome.failures.append((task.name, sentence))
        self.progress.note(f"{task.name}: {sentence}")
        self.progress.advance()

    def _write(self, *, everything: bool) -> None:
        together = self.work.together
        while self._ready and (everything or len(self._ready) >= together):
            size = together if together > 1 else MOST_WRITTEN
            piece, self._ready = self._ready[:size], self._ready[size:]
            self._write_together(piece)

    def _write_together(self, ready: list[tuple[Task, Success]]) -> None:
        try:
            done = self._written(ready)
        except (StorageError, DatabaseError):
            raise
        except Exception as error:
            if len(ready) == 1:
                self._fail(ready[0][0], explained(error))
                return
            for one in ready:  # rows of one of them cannot be written: the others can
                self._write_together([one])
            return
        self.outcome.done += done
        self.progress.advance(len(ready))

    def _written(self, ready: list[tuple[Task, Success]]) -> int:
        """Write rows and close jobs, but of those that are no longer ours; return how many."""
        conflicts = 0
        while ready:
            packed = self.work.pack([(task, answer.result) for task, answer in ready])
            try:
                self._write_now(ready, packed)
                return len(ready)
            except _LostError as lost:
                ready = [pair for pair in ready if pair[0].job_id in lost.ours]
            except ConflictError:
                conflicts += 1
                if conflicts >= MOST_CONFLICTS:
                    raise
        return 0

    def _write_now(self, ready: list[tuple[Task, Success]], packed: Any) -> None:
        seconds = sum(answer.seconds for _, answer in ready) / len(ready)
        with self.database.begin() as session:
            ours = queue.close(session, self.owner, [task for task, _ in ready], seconds)
            if len(ours) < len(ready):
                raise _LostError(ours)
            self.work.insert(session, packed)

    def _nothing_left(self) -> bool:
        """Whether nobody else has jobs of ours that may come back; frees those of the dead."""
        share = self.share
        with self.database.begin() as session:
            queue.take_back(session, share.recipe_id)
            return not queue.held_by_others(session, share.recipe_id, share.candidates, self.owner)

    def _finish_in_hand(self) -> None:
        while self._flying:
            self._take_in()
        self._write(everything=True)

    def release(self) -> None:
        """Give back what is in hand. If that fails, the leases will run out by themselves."""
        with suppress(CellstoreError), self.database.begin() as session:
            queue.release_all(session, self.owner, self.share.recipe_id)


def _chunks(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Pieces of ``size``; an image over which a worker died is alone, so that it dies alone."""
    for task in tasks:
        if task.deaths:
            yield [task]
    others = [task for task in tasks if not task.deaths]
    for start in range(0, len(others), size):
        yield others[start : start + size]


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
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int
    failed_before: int = 0
    forecast: Forecast | None = None


@dataclass
class Tally:
    """The run in whose name rows are written, and how many cells they are of.

    ``beside``: images that were done in the pass of another recipe.
    """

    run_id: int
    recipe_id: int
    cells: int = 0
    beside: int = 0

    def add(self, session: Session, cells: int, beside: int = 0) -> None:
        """Count what a transaction writes once it is committed; one that is undone counts not."""

        def kept(_session: Session) -> None:
            self.cells += cells
            self.beside += beside

        event.listen(session, "after_commit", kept, once=True)


@dataclass(frozen=True)
class Part:
    """One of the recipes of a call; ``on_register`` adds the rows that belong to it.

    ``parent_id``: the run whose result its run relies on.
    """

    spec: RecipeSpec
    on_register: Callable[[Session, Recipe], None] | None = None
    parent_id: int | None = None


Tallies = Sequence[tuple[int, Tally]]
"""The place of a recipe among the parts of a call, and its tally."""


def execute(
    workspace: Workspace,
    spec: RecipeSpec,
    candidates: Select[int],
    work_of: Callable[[Tally], Work[Any, Any]],
    *,
    resources: Resources,
    dry_run: bool = False,
    on_register: Callable[[Session, Recipe], None] | None = None,
    parent_id: int | None = None,
) -> JobsResult:
    """Do, in one run, what a recipe has not done of the candidates; or only say what it would do.

    ``on_register`` adds the rows that belong to the recipe itself. ``parent_id``: the run whose
    result this one relies on.

    Raises:
        StorageError, KeyboardInterrupt, RunCancelledError: see :func:`work_through`.
    """
    parts = [Part(spec, on_register, parent_id)]

    def only(tallies: Tallies) -> Work[Any, Any]:
        return work_of(tallies[0][1])

    return execute_together(
        workspace, parts, candidates, only, resources=resources, dry_run=dry_run
    )[0]


def execute_together(
    workspace: Workspace,
    parts: Sequence[Part],
    candidates: Select[int],
    work_of: Callable[[Tallies], Work[Any, Any]],
    *,
    resources: Resources,
    dry_run: bool = False,
) -> list[JobsResult]:
    """Do several recipes in one pass over the images, each in a run of its own.

    The work that ``work_of`` returns does the jobs of the first of some tallies, and closes those
    of the others beside it (``jobs.close_beside``). What is left of the others then, because the
    first was done before or failed, is done after that.

    Raises:
        StorageError, KeyboardInterrupt, RunCancelledError: see :func:`work_through`.
    """
    if dry_run:
        return [_forecast(workspace, part.spec, candidates, resources) for part in parts]
    with workspace.database.begin() as session:
        recipes = [_registered(session, part) for part in parts]
        states = [progressed(session, recipe.id, candidates) for recipe in recipes]
    open_parts = [place for place, state in enumerate(states) if state.todo]
    results = [_result(None, *pair) for pair in zip(recipes, states, strict=True)]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(_running(workspace, parts[place], recipes[place]))
            for place in open_parts
        ]
        tallies = [
            (place, Tally(run.id, recipes[place].id))
            for place, run in zip(open_parts, runs, strict=True)
        ]
        for number, (place, tally) in enumerate(tallies):
            work = work_of(tallies[number:])
            beside = tuple(other.run_id for _, other in tallies if other is not tally)
            outcome = _pass(workspace, work, tally, candidates, resources, beside)
            done = outcome.done + tally.beside
            runs[number].result = {
                "images": done, "failed": outcome.failed, "cells": tally.cells,
            }  # fmt: skip
            failures = tuple(outcome.failures)
            results[place] = _result(
                tally.run_id, recipes[place], states[place], done, failures, tally.cells
            )
    return results


def _running(workspace: Workspace, part: Part, recipe: Recipe) -> AbstractContextManager[RunHandle]:
    return running(workspace.database, recipe, parent_id=part.parent_id)


def _registered(session: Session, part: Part) -> Recipe:
    recipe = register(session, part.spec)
    if part.on_register is not None:
        part.on_register(session, recipe)
    return recipe


def _pass(
    workspace: Workspace,
    work: Work[Any, Any],
    tally: Tally,
    candidates: Select[int],
    resources: Resources,
    beside: tuple[int, ...],
) -> Outcome:
    if tally.beside:
        with workspace.database.read() as session:
            if not progressed(session, tally.recipe_id, candidates).todo:
                return Outcome()
    share = Share(tally.run_id, tally.recipe_id, candidates, beside=beside)
    return work_through(workspace.database, workspace.progress, work, share, resources)


def _result(
    run_id: int | None,
    recipe: Recipe | None,
    state: Progressed,
    done: int = 0,
    failures: tuple[tuple[str, str], ...] = (),
    cells: int = 0,
    forecast: Forecast | None = None,
) -> JobsResult:
    recipe_id = None if recipe is None else recipe.id
    return JobsResult(
        run_id,
        recipe_id,
        state.selected,
        state.waiting,
        done,
        failures,
        cells,
        state.failed,
        forecast,
    )


def _forecast(
    workspace: Workspace, spec: RecipeSpec, candidates: Select[int], resources: Resources
) -> JobsResult:
    with workspace.database.read() as session:
        recipe = known_recipe(session, spec)
        state = progressed(session, recipe.id if recipe else 0, candidates)
        per_image, basis = _past(session, spec.stage, recipe)
    workers = max(1, resources.workers)
    seconds = None if per_image is None else per_image * state.todo / workers
    forecast = Forecast(state.todo, workers, per_image, seconds, basis)
    return _result(None, recipe, state, forecast=forecast)


def _past(session: Session, stage: Stage, recipe: Recipe | None) -> tuple[float | None, str | None]:
    """Mean seconds of the last jobs of a recipe, else of the stage; and of which."""
    if recipe is not None and (found := _mean(session, recipe.id)) is not None:
        return found, "this recipe"
    query = (
        select(Job.recipe_id)
        .join(Recipe, Recipe.id == Job.recipe_id)
        .where(Recipe.stage == stage, Job.status == Status.DONE)
        .order_by(Job.id.desc())
    )
    other = session.scalar(query.limit(1))
    return (None, None) if other is None else (_mean(session, other), f"recipe {other}")


def _mean(session: Session, recipe_id: int) -> float | None:
    done = (Job.recipe_id == recipe_id, Job.status == Status.DONE)
    last = select(Job.seconds).where(*done).order_by(Job.id.desc()).limit(1000).subquery()
    return session.scalar(select(func.avg(last.c.seconds)))
