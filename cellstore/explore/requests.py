"""What the pages of the explorer share: the store behind a request, questions to it, and answers.

An endpoint is a plain function. Starlette calls it in a thread of its own, so that a slow one holds
no other page up.
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import duckdb
import jinja2
from anyio import from_thread
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..config import Limits
from ..db.events import caller
from ..enums import Stage
from ..errors import CellstoreError, UnknownNameError, UserInputError, some_of
from ..jobs.run_names import find_predict_run
from ..jobs.workspace import Workspace
from ..models import Annotation, Event, Run
from ..query.engine import Questions, open_questions
from ..query.guard import Parameters, explained
from ..report.drawing import TEMPLATES, environment_of
from ..settings import find_store

T = TypeVar("T")

LIMITS = Limits(seconds=30.0, memory_mb=256, answer_mb=64)
"""What a question of a page may take; the memory is that of all questions together."""
UNUSED_SECONDS = 600.0
"""How long what is loaded stays without a request."""
LIVE_SECONDS = 3.0
"""While a run goes on, a page may be so old,"""
LIVE_TIMES = 20
"""or so many times as old as the loading took."""
WARM = (
    *("run_images", "well_table", "image_table", "treatment_table", "feature_sets", "hit_table"),
    *("image_flags", "cell_flags", "cell_table", "scored_predictions", "prediction_table"),
)
"""What most pages read; the last ones from copies, of which the first takes a while to make."""
POLL_SECONDS = 0.2
"""How often it is looked whether the browser still waits."""
LONGEST_TEXT = 4_000
"""Characters of a parameter of a page."""
KEPT_VALUES = 64
"""Values that :func:`kept` keeps."""


@dataclass
class _Open:
    """Open questions about the store as it was: ``counts``. ``users``: threads that ask them."""

    stack: ExitStack
    questions: Questions
    counts: tuple[Any, ...]
    opened: float
    used: float
    users: int = 0
    closing: bool = False


class Reader:
    """:class:`Questions` about the store, open for all requests until the store changes.

    What one request has loaded, the next one finds; each asks on a connection of its own.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._now: _Open | None = None
        self._lock = threading.Lock()

    def mark(self) -> float:
        """Return what changes with the store: what is kept of answers is right while it is equal.

        Two small reads of the database.
        """
        found = self._enter()
        self._leave(found)
        return found.opened

    @contextmanager
    def questions(self, seconds: float = LIMITS.seconds) -> Iterator[Questions]:
        """Lend open questions; they see the store as it is, while a run goes on as it was lately.

        "Lately" is some seconds, or longer where loading takes long. ``seconds``: what each
        question may take.
        """
        found = self._enter()
        try:
            mine = found.questions.another()
            mine.limits = replace(LIMITS, seconds=seconds)
            try:
                yield mine
            except duckdb.Error as error:  # stopped while something was made ready for it
                raise explained(error) from error
            finally:
                mine.close()
        except CellstoreError as error:
            # A file of the cache is gone, or DuckDB has given up: the next request opens anew.
            failed = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException)
            found.closing = found.closing or isinstance(error.__cause__, failed)
            raise
        finally:
            self._leave(found)

    def warm(self, stopping: threading.Event) -> None:
        """Load what most pages read, and make copies of what runs wrote where there are none."""
        for name in WARM:
            if not stopping.is_set():
                with suppress(CellstoreError), self.questions() as questions:
                    questions.ask_ours(f"FROM {name} LIMIT 0").records()

    def _enter(self) -> _Open:
        counts, live = self._counts()
        with self._lock:
            found = self._now
            if found is None or self._is_old(found, counts, live=live):
                if found is not None:
                    self._retire(found)
                stack = ExitStack()
                questions = stack.enter_context(open_questions(self.workspace, LIMITS))
                now = time.monotonic()
                self._now = found = _Open(stack, questions, counts, now, now)
            found.users += 1
            found.used = time.monotonic()
            return found

    def _leave(self, found: _Open) -> None:
        with self._lock:
            found.users -= 1
            if found.closing:
                self._retire(found)

    def _retire(self, found: _Open) -> None:
        """Close what is open when its last user has left."""
        found.closing = True
        if found is self._now:
            self._now = None
        if not found.users:
            found.stack.close()

    def _counts(self) -> tuple[tuple[Any, ...], bool]:
        """Return numbers that grow with the store, and whether a run goes on."""
        runs = select(func.count(), func.max(Run.id), func.count(Run.ended_at),
                      func.sum(Run.changed_rows))  # fmt: skip
        with self.workspace.database.read() as session:
            n_runs, last, n_ended, changed = session.execute(runs).one()
            event = session.scalar(select(func.max(Event.id)))
            annotation = session.scalar(select(func.max(Annotation.id)))
        return (last, n_runs, n_ended, changed, event, annotation), n_runs != n_ended

    def _is_old(self, found: _Open, counts: tuple[Any, ...], *, live: bool) -> bool:
        if not live or found.counts[-1] != counts[-1]:  # what people note is seen at once
            return found.counts != counts
        lasts = max(LIVE_SECONDS, LIVE_TIMES * found.questions.seconds_loading)
        return time.monotonic() - found.opened > lasts

    def close_unused(self) -> None:
        """Close what is no longer true, or was not used lately: SQLite can shorten its log then."""
        with self._lock:
            found = self._now
        if found is not None and not found.users:
            counts, live = self._counts()
            unused = time.monotonic() - found.used > UNUSED_SECONDS
            if unused or self._is_old(found, counts, live=live):
                with self._lock:
                    self._retire(found)

    def close(self) -> None:
        """Close all that is not in use."""
        with self._lock:
            if self._now is not None:
                self._retire(self._now)


@dataclass
class Explorer:
    """What is behind all pages: ``request.app.state.explorer``.

    ``write``: people may label and exclude. ``csrf``: what a page that writes sends along, in the
    header ``X-CSRF-Token`` or the form field ``csrf``. ``token``: what a browser has to know, where
    the pages can be reached from other machines. ``selections``: cells by name, as bits.
    """

    workspace: Workspace
    write: bool = False
    csrf: str = ""
    token: str | None = None
    reader: Reader = field(init=False)
    kept: dict[str, Any] = field(default_factory=dict)
    selections: dict[str, bytes] = field(default_factory=dict)
    answers: dict[bytes, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = Reader(self.workspace)

    @cached_property
    def login(self) -> str:
        """Who runs the server: the author of what is said without a name."""
        return caller()[0]

    @cached_property
    def _named(self) -> str:
        """What names the store in a command; nothing where the store is found without."""
        root = self.workspace.settings.root
        with suppress(CellstoreError):
            if find_store().root.resolve() == root.resolve():
                return ""
        return f" --store {shlex.quote(str(root))}"

    def command(self, typed: str) -> str:
        """Return a command as it can be pasted where the explorer was started."""
        return typed.replace("cellstore", f"cellstore{self._named}", 1)

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The templates: every text is escaped; what cannot be seen in one is written out."""
        made = environment_of("cellstore.explore.templates", TEMPLATES)
        made.globals.update(url_of=url_of, explorer=self, command=self.command)
        return made


def explorer_of(request: Request) -> Explorer:
    """Return the explorer that a request is made to."""
    found: Explorer = request.app.state.explorer
    return found


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """Return a page, or a part of one, from a template of ``explore/templates``."""
    made = explorer_of(request).templates.get_template(template)
    text = made.render(request=request, path=request.url.path, **values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


@contextmanager
def waited_for(request: Request, questions: Questions) -> Iterator[None]:
    """Stop what is asked here when the browser no longer waits for the answer."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(POLL_SECONDS)
        while True:  # between two statements it is not heard
            questions.interrupt()
            await asyncio.sleep(POLL_SECONDS)

    task = from_thread.run_sync(lambda: asyncio.get_running_loop().create_task(watch()))
    try:
        yield
    finally:
        from_thread.run_sync(task.cancel)


@contextmanager
def asking(request: Request, seconds: float = LIMITS.seconds) -> Iterator[Questions]:
    """Lend open questions, which are stopped when the browser goes away."""
    with explorer_of(request).reader.questions(seconds) as found, waited_for(request, found):
        yield found


def ask(request: Request, sql: str, parameters: Parameters | None = None) -> list[dict[str, Any]]:
    """Answer a question of our own, for some thousand rows; a row is a dictionary."""
    with asking(request) as questions:
        return questions.ask_ours(sql, parameters).records()


def kept(request: Request, key: object, make: Callable[[], T]) -> T:
    """Return what ``make`` returned for this ``key``, made again once the store has changed."""
    explorer = explorer_of(request)
    mark, digest = explorer.reader.mark(), hashlib.sha256(repr(key).encode()).digest()
    found = explorer.answers.get(digest)
    if found is None or found[0] != mark:
        found = explorer.answers[digest] = mark, make()
    for old in list(explorer.answers)[:-KEPT_VALUES]:
        explorer.answers.pop(old, None)
    value: T = found[1]
    return value


def row_of(session: Session, model: type[T], number: int, options: Sequence[Any] = ()) -> T:
    """Return a row by its number, read with some ``options``; raises UnknownNameError."""
    found = session.get(model, number, options=options) if number < 2**63 else None
    if found is None:
        raise UnknownNameError(f"There is no {model.__name__.lower()} {number}.")
    return found


RUNS = """
    SELECT r.id, s.name AS split,
        coalesce(p.parameters ->> 'baseline', p.parameters ->> 'declared',
            CASE WHEN t.id IS NOT NULL THEN 'network' END) AS model
    FROM runs AS r LEFT JOIN runs AS t ON t.id = r.parent_id AND t.stage = 'train'
    LEFT JOIN recipes AS p ON p.id = t.recipe_id
    LEFT JOIN splits AS s ON s.id = coalesce(r.split_id, t.split_id)
    WHERE r.stage = $stage AND r.status = 'done' ORDER BY r.id DESC LIMIT 200
"""


def runs_done(request: Request, stage: Stage) -> list[dict[str, Any]]:
    """Return ``id``, ``split`` and ``model`` of the runs of a stage that are done, newest first."""
    given = {"stage": stage.value}
    return kept(request, ("runs done", stage), lambda: ask(request, RUNS, given))


def usual_run(request: Request, stage: Stage) -> int | None:
    """Return the run meant where none is named: the newest, of predict runs that of a network."""
    rows = runs_done(request, stage)
    if stage != Stage.PREDICT or not rows:
        return rows[0]["id"] if rows else None
    with explorer_of(request).workspace.database.read() as session, suppress(UserInputError):
        return find_predict_run(session, "latest").id
    return None


def text(request: Request, name: str, default: str | None = None) -> str | None:
    """Return a parameter of the address; an empty one is none. Raises UserInputError."""
    found = request.query_params.get(name)
    if found is None or not found.strip():
        return default
    if len(found) > LONGEST_TEXT:
        raise UserInputError(f"{name} is longer than {LONGEST_TEXT} characters.")
    return found


def whole(
    request: Request, name: str, default: int | None = None, *, low: int = 0, high: int = 2**53
) -> int | None:
    """Return a whole number of the address. Raises UserInputError."""
    found = text(request, name)
    if found is None:
        return default
    try:
        number = int(found)
    except ValueError:
        raise UserInputError(f"{name} has to be a whole number, not {found[:40]!r}.") from None
    if not low <= number <= high:
        raise UserInputError(f"{name} has to be between {low} and {high}, not {number}.")
    return number


def choice(request: Request, name: str, choices: Collection[str], default: str) -> str:
    """Return a parameter that is one of some words. Raises UserInputError."""
    found = text(request, name, default) or default
    if found not in choices:
        raise UserInputError(f"{name} has to be one of {some_of(list(choices), 12)}.")
    return found


def url_of(what: str, *names: Any, **parameters: Any) -> str:
    """Return the address of a page: ``url_of("well", "P1", "B02", run=3)``; what is None goes."""
    path = "/".join(["", what, *(quote(str(name), safe="") for name in names)])
    given = {name: value for name, value in parameters.items() if value is not None}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path
