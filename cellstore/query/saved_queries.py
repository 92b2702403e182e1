"""From what people type for the parameters of a saved question to values that are bound."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from ..config import Limits
from ..enums import Stage
from ..errors import QueryError, UnknownNameError, UserInputError
from ..jobs.run_names import find_named_run
from ..jobs.workspace import Workspace
from ..notebooks import Shown
from .guard import read_sql

if TYPE_CHECKING:
    from .engine import Answer

STAGES = {
    "predict run": (Stage.PREDICT,),
    "two predict runs": (Stage.PREDICT,),
    "train run": (Stage.TRAIN,),
    "qc run": (Stage.QC,),
    "hits run": (Stage.HITS,),
    "run": (),
}
KINDS = (*STAGES, "text", "number", "whole number", "yes or no")
"""What a parameter can be. Runs are named as everywhere: by number, or ``latest``."""

NOTHING = "nothing"
"""The default of a parameter that may be left out: null."""

RESERVED = (
    *("sql", "format", "output", "json", "store", "seconds", "memory", "limit", "explain", "help"),
    "for_spreadsheet",
)
"""Options of ``cellstore ask`` itself."""

_NAME = re.compile(r"(?!.{101})[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_PARAMETER = re.compile(
    r":(?P<name>[a-z][a-z0-9_]*) \((?P<kind>[a-z ]+)\)"
    r"(?: = (?P<default>'[^']*'|\S+))?  +(?P<words>\S.*)"
)


@dataclass(frozen=True)
class SavedParameter:
    """What a saved question takes; ``default`` as it would be typed, None: it must be given."""

    name: str
    kind: str
    default: str | None
    words: str


@dataclass(frozen=True)
class SavedQuestion(Shown):
    """A question with a name; ``text`` is its whole file.

    ``path`` is the file of a user's own one, None for those that come with cellstore.
    """

    name: str
    words: str
    parameters: tuple[SavedParameter, ...]
    query: str
    text: str = field(repr=False)
    path: Path | None = None

    def predict_runs(self, values: Mapping[str, Any]) -> list[int] | None:
        """Return the predict runs that are asked about; ``None``: an own one may look at others."""
        if self.path is not None:
            return None
        one = [values[item.name] for item in self.parameters if item.kind == "predict run"]
        two = [values[item.name] for item in self.parameters if item.kind == "two predict runs"]
        found = [*one, *(run for pair in two for run in pair)]
        return None if None in found else found or None


@cache
def shipped_questions() -> tuple[SavedQuestion, ...]:
    """Return the questions that come with cellstore, by name."""
    folder = files("cellstore.query.queries")
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".sql"))
    return tuple(
        parsed(name.removesuffix(".sql"), folder.joinpath(name).read_text(encoding="utf-8"))
        for name in names
    )


def own_folder(workspace: Workspace) -> Path:
    """Return where the own questions of a store are."""
    return workspace.settings.root / "questions"


def saved_questions(workspace: Workspace) -> tuple[list[SavedQuestion], list[str]]:
    """Return all saved questions by name, and what is wrong with own ones that are left out."""
    found = {item.name: item for item in shipped_questions()}
    problems = []
    for path in sorted(own_folder(workspace).glob("*.sql")):
        try:
            found[path.stem] = _own(workspace, path.stem)
        except UserInputError as error:
            problems.append(str(error))
    return [found[name] for name in sorted(found)], problems


def find_question(workspace: Workspace, name: str) -> SavedQuestion:
    """Return a saved question; an own one is taken before one of the same name."""
    if _NAME.fullmatch(name) and (own_folder(workspace) / f"{name}.sql").exists():
        return _own(workspace, name)
    found = {item.name: item for item in shipped_questions()}
    if name not in found:
        known = {*found, *(item.name for item in saved_questions(workspace)[0])}
        raise UnknownNameError.of("saved question", name, sorted(known))
    return found[name]


def _own(workspace: Workspace, name: str) -> SavedQuestion:
    folder = own_folder(workspace)
    path = folder / f"{name}.sql"
    if not _NAME.fullmatch(name):
        raise QueryError(
            f"{path} cannot be asked: {name!r} is no name of a question. Use small letters, digits "
            "and -, a letter first: plates-of-may"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise QueryError(f"{path} leads out of its folder. Put the file itself there.")
    return parsed(name, read_sql(path), path)


def parsed(name: str, text: str, path: Path | None = None) -> SavedQuestion:
    """Return the question that a file holds."""
    lines = text.splitlines()
    length = next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))
    words: list[str] = []
    described: list[str] = []
    for line in (line[2:] for line in lines[:length]):
        if line.strip().startswith(":"):
            described.append(line.strip())
        elif described and line.startswith("   "):  # goes on with the parameter above it
            described[-1] += f" {line.strip()}"
        elif line.strip():
            words.append(line.strip())
    if not words:
        raise QueryError(
            f"The question {path or name} does not say what it asks. Begin its file with a line "
            "like: -- Which plates have no cells."
        )
    parameters = tuple(_parameter(path or name, line) for line in described)
    query = "\n".join(lines[length:]).strip()
    return SavedQuestion(name, " ".join(words), parameters, query, text, path)


def _parameter(file: object, line: str) -> SavedParameter:
    match = _PARAMETER.fullmatch(line)
    kind = match["kind"] if match else ""
    if match is None or kind not in KINDS or match["name"] in RESERVED:
        raise QueryError(
            f"The question {file} describes a parameter as {line!r}. Write it like "
            f"':run (predict run) = latest  Whose labels.'; kinds are {', '.join(KINDS)}."
        )
    default = match["default"]
    default = default if default is None else default.strip("'")
    return SavedParameter(match["name"], kind, default, match["words"])


_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@contextmanager
def open_saved(
    workspace: Workspace,
    question: SavedQuestion,
    given: Mapping[str, object],
    limits: Limits | None = None,
) -> Iterator[Answer]:
    """Open the answer of a saved question; ``given``: the values of its parameters.

    Raises as :func:`bound` and :meth:`Questions.ask` do.
    """
    from .engine import open_questions  # the list of questions needs none of it

    values = bound(workspace, question, given)
    with open_questions(workspace, limits, runs=question.predict_runs(values)) as questions:
        yield questions.ask(question.query, values)


def bound(
    workspace: Workspace, question: SavedQuestion, given: Mapping[str, object]
) -> dict[str, object]:
    """Return the value of each parameter of ``question``: what is given, else its default."""
    known = [item.name for item in question.parameters]
    for name in given:
        if name not in known:
            raise UnknownNameError.of(f"parameter of {question.name}", name, known)
    with workspace.database.read() as session:
        return {
            item.name: _value(session, question, item, given.get(item.name, item.default))
            for item in question.parameters
        }


def _value(
    session: Session, question: SavedQuestion, item: SavedParameter, given: object
) -> object:
    if given is None and item.default is None:
        example = "3,5" if item.kind == "two predict runs" else "3"
        raise UserInputError(
            f"The question {question.name} needs --{item.name}: {item.words} Example: cellstore "
            f"ask {question.name} --{item.name} {example if item.kind in STAGES else 'VALUE'}"
        )
    if given is None or given == NOTHING == item.default:
        return None
    if item.kind == "two predict runs":
        names = given if isinstance(given, list | tuple) else str(given).split(",")
        found = [find_named_run(session, str(name).strip(), STAGES[item.kind]).id for name in names]
        if len(found) != 2 or found[0] == found[1]:
            raise UserInputError(f"--{item.name} takes two different runs, like 3,5.")
        return found
    if item.kind in STAGES:
        return find_named_run(session, str(given), STAGES[item.kind]).id
    text = str(given).strip()
    try:
        if item.kind == "whole number":
            number = int(text)
            if abs(number) < 1 << 63:
                return number
        elif item.kind == "number":
            return float(text)
        elif item.kind == "yes or no":
            return _TRUTH[text.lower()]
        else:
            return str(given)
    except (ValueError, KeyError):
        pass
    raise UserInputError(f"--{item.name} is a {item.kind}, not {text!r}.")
