"""The loop of a stage that goes image by image: reserve, fetch, hand out, write, close.

This process alone talks to the database; a crew (see ``crews``) opens the files and computes. All
rows of an image are written in the transaction that closes its job: either both are there or
neither.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import Session

from ..config import THIS_PROCESS, Resources
from ..db.session import Database
from ..errors import CellstoreError, ConflictError, DatabaseError, RunCancelledError, StorageError
from ..progress import Progress
from . import jobs
from .crews import Crew, WorkerDiedError, open_crew
from .jobs import Outcome, Task
from .leases import Owner, heartbeat, lease_seconds
from .workers import Answer, Failure, Step, Stop, Success, explained

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
        jobs.take_back(session, share.recipe_id)
        if share.again:
            jobs.forgive(session, share.recipe_id, share.candidates)
        state = jobs.progressed(session, share.recipe_id, share.candidates, unseen=share.unseen)
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
                found = jobs.reserve(
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
                self._queued_to = jobs.enqueue(
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
                jobs.release(session, self.owner, [task.job_id for task in tasks])
            return
        for task in tasks:
            with self.database.begin() as session:
                again = jobs.mourn(session, self.owner, task)
            if not again:
                self._failed(task, "Its worker died again and again.")

    def _fail(self, task: Task, failure: Failure) -> None:
        with self.database.begin() as session:
            again = jobs.fail(session, self.owner, task, failure.detail, may_pass=failure.may_pass)
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
            ours = jobs.close(session, self.owner, [task for task, _ in ready], seconds)
            if len(ours) < len(ready):
                raise _LostError(ours)
            self.work.insert(session, packed)

    def _nothing_left(self) -> bool:
        """Whether nobody else has jobs of ours that may come back; frees those of the dead."""
        share = self.share
        with self.database.begin() as session:
            jobs.take_back(session, share.recipe_id)
            return not jobs.held_by_others(session, share.recipe_id, share.candidates, self.owner)

    def _finish_in_hand(self) -> None:
        while self._flying:
            self._take_in()
        self._write(everything=True)

    def release(self) -> None:
        """Give back what is in hand. If that fails, the leases will run out by themselves."""
        with suppress(CellstoreError), self.database.begin() as session:
            jobs.release_all(session, self.owner, self.share.recipe_id)


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
