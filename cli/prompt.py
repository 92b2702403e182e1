"""The prompt of ``cellstore sql``: one question after the other, each on the store as it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from cellstore.errors import CellstoreError, UserInputError
from cellstore.query.guard import Limits

from . import tell_schema, writing
from .confined import confined
from .context import say
from .writing import Wanted

if TYPE_CHECKING:
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyPressEvent

    from cellstore.store import Store

_WORD = re.compile(r"\.?\w+")
WELCOME = "Questions in SQL, each ends with a semicolon. .help says more, Ctrl-D leaves."
HELP = """\
SELECT ...;      ask; the question may have several lines
.tables          all tables, views and feature sets
.schema TABLE    what TABLE and its columns are
.asks            the saved questions (cellstore ask)
.help            this
.quit            leave; so does Ctrl-D
Tab completes names. Ctrl-C stops a question. Arrow up brings back earlier ones."""


def talk(store: Store, limits: Limits, spill: Path) -> None:
    """Ask for questions and answer them until the person leaves."""
    session = _session(_words(store))
    say(WELCOME)
    while True:
        try:
            text = session.prompt("cellstore> ", multiline=True, prompt_continuation="       ... ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text.strip().rstrip(";").strip() in (".quit", ".exit", "quit", "exit"):
            return
        if text.strip():
            _safely(store, text.strip(), limits, spill)


def _safely(store: Store, text: str, limits: Limits, spill: Path) -> None:
    try:
        with confined(limits, spill):
            _answer(store, text, limits)
    except KeyboardInterrupt:
        say("Stopped.")
    except CellstoreError as error:
        say(f"Error: {error}")
    except MemoryError:
        say("Error: The question needs more memory than allowed. Ask for less at a time.")


def _answer(store: Store, text: str, limits: Limits) -> None:
    if text.startswith("."):
        _command(store, *text.rstrip("; ").split())
        return
    with store.open_questions(limits) as questions:
        writing.write(questions.stream(text), Wanted())


def _command(store: Store, name: str, *words: str) -> None:
    if name == ".tables" and not words:
        tell_schema.overview(store.schema())
    elif name == ".schema" and len(words) == 1:
        tell_schema.relation(store.schema(), words[0])
    elif name == ".schema" and not words:
        tell_schema.overview(store.schema())
    elif name == ".asks" and not words:
        tell_schema.questions(store.questions())
    elif name == ".help":
        say(HELP)
    else:
        raise UserInputError(f"There is no {' '.join((name, *words))!r}. See .help")


def _session(words: Iterable[str]) -> PromptSession[str]:
    return PromptSession(
        history=_history(),
        completer=_Words(sorted(set(words), key=str.lower)),
        complete_while_typing=False,
        lexer=PygmentsLexer(SqlLexer),
        key_bindings=_keys(),
    )


def _history() -> History:
    """Return what keeps the questions of a user for the next time, if that can be kept."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(home) / "cellstore"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "questions"
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _words(store: Store) -> set[str]:
    words = {".tables", ".schema", ".asks", ".help", ".quit"}
    with store.open_questions() as questions:
        for name in questions.names:
            words |= {name, *(column for column, _ in questions.columns(name))}
        answer = questions.ask(
            """
            SELECT upper(keyword_name) FROM duckdb_keywords()
            UNION SELECT function_name || '(' FROM duckdb_functions()
            WHERE function_type IN ('scalar', 'aggregate') AND function_name ~ '^[a-z][a-z0-9_]+$'
            """
        )
    return words | set(answer[0].to_pylist())


class _Words(Completer):
    """Completes the word before the cursor: names as they are, after a dot too."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
        """Yield the words that go on as what is typed, those in small letters first."""
        typed = document.get_word_before_cursor(pattern=_WORD)
        if not typed:
            return
        found = [word for word in self._words if word.lower().startswith(typed.lower())]
        for word in sorted(found, key=lambda word: (word.isupper(), word.endswith("("))):
            yield Completion(word, start_position=-len(typed))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        state = buffer.complete_state
        if state is not None and state.current_completion is not None:
            buffer.complete_state = None
        elif _is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    return keys


def _is_whole(text: str) -> bool:
    text = text.strip()
    if not text or text.startswith(".") or text.lower() in ("quit", "exit"):
        return True
    return text.endswith(";")
