"""What the pages of the explorer share: the store behind a request, questions to it, and answers.

An endpoint is a plain function. Starlette calls it in a thread of its own, so that a slow one holds
no other page up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import jinja2
from anyio import from_thread
from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..errors import UnknownNameError, UserInputError, some_of
from ..jobs.workspace import Workspace
from ..models import Annotation, Event, Run
from ..query.engine import Questions, open_questions
from ..query.guard import Limits, Parameters
from ..report.drawing import TEMPLATES, environment_of

T = TypeVar("T")

LIMITS = Limits(seconds=30.0, memory_mb=200, answer_mb=64)
"""What a question of a page may take."""
KEPT_OPEN = 3
"""Questions that stay open, for requests at the same time."""
KEPT_SECONDS = 30.0
"""How long one stays open unused: while it is, SQLite cannot shorten its log."""
LIVE_SECONDS = 3.0
"""While a run goes on, a page may be so old."""
POLL_SECONDS = 0.2
"""How often it is looked whether the browser still waits."""
LONGEST_TEXT = 4_000
"""Characters of a parameter of a page."""
KEPT_VALUES = 64
"""Values that :func:`kept` keeps."""


class NotFoundError(UnknownNameError):
    """There is no such page, or nothing of that name in the store."""


@dataclass
class _Open:
    stack: ExitStack
    questions: Questions
    mark: tuple[Any, ...]
    used: float


class Reader:
    """Open :class:`Questions`, kept for the next request as long as the store does not change."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._idle: list[_Open] = []
        self._lock = threading.Lock()

    def mark(self) -> tuple[Any, ...]:
        """Return what changes with the store: what is kept of answers is right while it is equal.

        Two small reads of the database.
        """
        runs = select(func.count(), func.max(Run.id), func.count(Run.ended_at),
                      func.sum(Run.changed_rows))  # fmt: skip
        with self.workspace.database.read() as session:
            n_runs, last, n_ended, changed = session.execute(runs).one()
            event = session.scalar(select(func.max(Event.id)))
            annotation = session.scalar(select(func.max(Annotation.id)))
        clock = 0 if n_runs == n_ended else int(time.monotonic() / LIVE_SECONDS)
        return last, n_runs, n_ended, changed, event, annotation, clock

    @contextmanager
    def questions(self, seconds: float = LIMITS.seconds) -> Iterator[Questions]:
        """Lend open questions; they see the store as it was at most some seconds ago.

        ``seconds``: what each of them may take.
        """
        mark = self.mark()
        found = self._take(mark)
        if found is None:
            stack = ExitStack()
            questions = stack.enter_context(open_questions(self.workspace, LIMITS))
            found = _Open(stack, questions, mark, time.monotonic())
        found.questions.limits = replace(LIMITS, seconds=seconds)
        try:
            yield found.questions
        except BaseException:
            found.stack.close()
            raise
        found.used = time.monotonic()
        with self._lock:
            keep = len(self._idle) < KEPT_OPEN
            if keep:
                self._idle.append(found)
        if not keep:
            found.stack.close()

    def _take(self, mark: tuple[Any, ...]) -> _Open | None:
        with self._lock:
            old = [item for item in self._idle if item.mark != mark]
            self._idle = [item for item in self._idle if item.mark == mark]
            found = self._idle.pop() if self._idle else None
        for item in old:
            item.stack.close()
        return found

    def close_unused(self) -> None:
        """Close what nobody has used lately."""
        now = time.monotonic()
        with self._lock:
            old = [item for item in self._idle if now - item.used > KEPT_SECONDS]
            self._idle = [item for item in self._idle if now - item.used <= KEPT_SECONDS]
        for item in old:
            item.stack.close()

    def close(self) -> None:
        """Close all that is not in use."""
        with self._lock:
            old, self._idle = self._idle, []
        for item in old:
            item.stack.close()


@dataclass
class Explorer:
    """What is behind all pages: ``request.app.state.explorer``.

    ``write``: people may label and exclude. ``csrf``: what a page that writes sends along, in the
    header ``X-CSRF-Token`` or the form field ``csrf``. ``token``: what a browser has to know, where
    the pages can be reached from other machines.
    """

    workspace: Workspace
    write: bool = False
    csrf: str = ""
    token: str | None = None
    reader: Reader = field(init=False)
    kept: dict[str, Any] = field(default_factory=dict)
    answers: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = Reader(self.workspace)

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The templates: every text is escaped; what cannot be seen in one is written out."""
        made = environment_of("cellstore.explore.templates", TEMPLATES)
        made.globals.update(url_of=url_of, explorer=self)
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


def ask(request: Request, sql: str, parameters: Parameters | None = None) -> list[dict[str, Any]]:
    """Answer a question of our own over the relations of the store; a row is a dictionary.

    It is stopped when the browser goes away. For some thousand rows; larger answers are read from
    ``explorer.reader.questions()``.

    Raises:
        QueryError: it takes longer, or more memory, than a page may.
    """
    with (
        explorer_of(request).reader.questions() as questions,
        waited_for(request, questions),
    ):
        return questions.ask_ours(sql, parameters).records()


def kept(request: Request, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what ``make`` returned for this ``key``, made again once the store has changed."""
    explorer = explorer_of(request)
    mark = explorer.reader.mark()
    found = explorer.answers.get(key)
    if found is None or found[0] != mark:
        found = explorer.answers[key] = mark, make()
    for old in list(explorer.answers)[:-KEPT_VALUES]:
        explorer.answers.pop(old, None)
    value: T = found[1]
    return value


def text(request: Request, name: str, default: str | None = None) -> str | None:
    """Return a parameter of the address; an empty one is none.

    Raises:
        UserInputError: it is too long.
    """
    found = request.query_params.get(name)
    if found is None or not found.strip():
        return default
    if len(found) > LONGEST_TEXT:
        raise UserInputError(f"{name} is longer than {LONGEST_TEXT} characters.")
    return found


def whole(
    request: Request, name: str, default: int | None = None, *, low: int = 0, high: int = 2**53
) -> int | None:
    """Return a whole number of the address.

    Raises:
        UserInputError: it is something else, or out of range.
    """
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


def choice(request: Request, name: str, choices: Mapping[str, T] | list[str], default: str) -> str:
    """Return a parameter that is one of some words.

    Raises:
        UserInputError: it is none of them.
    """
    found = text(request, name, default) or default
    if found not in choices:
        raise UserInputError(f"{name} has to be one of {some_of(list(choices), 12)}.")
    return found


def url_of(what: str, *names: Any, **parameters: Any) -> str:
    """Return the address of a page: ``url_of("well", "P1", "B02", run=3)``; what is None goes."""
    path = "/".join(["", what, *(quote(str(name), safe="") for name in names)])
    given = {name: value for name, value in parameters.items() if value is not None}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path
