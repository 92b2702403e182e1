"""From what people type for the parameters of a saved question to values that are bound."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from ..errors import UnknownNameError, UserInputError
from ..runs.lookup import run_in
from ..runs.workspace import Workspace
from ..terms import Stage
from .saved import NOTHING, SavedParameter, SavedQuestion

_STAGES = {
    "predict run": (Stage.PREDICT,),
    "two predict runs": (Stage.PREDICT,),
    "train run": (Stage.TRAIN,),
    "qc run": (Stage.QC,),
    "run": (),
}
_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def bound(
    workspace: Workspace, question: SavedQuestion, given: Mapping[str, object]
) -> dict[str, object]:
    """Return the value of each parameter of ``question``: what is given, else its default.

    Raises:
        UnknownNameError: it has no such parameter, or there is no such run.
        UserInputError: a value is not of its kind, or one that is needed is missing.
    """
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
        raise UserInputError(
            f"The question {question.name} needs --{item.name}: {item.words} "
            f"Example: cellstore ask {question.name} --{item.name} {_example(item)}"
        )
    if given is None or given == NOTHING == item.default:
        return None
    if item.kind == "two predict runs":
        return _runs(session, item, given)
    if item.kind in _STAGES:
        return _run(session, item, given)
    return _plain(item, given)


def _example(item: SavedParameter) -> str:
    return "3,5" if item.kind == "two predict runs" else "3" if item.kind in _STAGES else "VALUE"


def _run(session: Session, item: SavedParameter, given: object) -> int:
    return run_in(session, str(given), _STAGES[item.kind]).id


def _runs(session: Session, item: SavedParameter, given: object) -> list[int]:
    names = given if isinstance(given, list | tuple) else str(given).split(",")
    found = [_run(session, item, str(name).strip()) for name in names]
    if len(found) != 2 or found[0] == found[1]:
        raise UserInputError(f"--{item.name} takes two different runs, like 3,5.")
    return found


def _plain(item: SavedParameter, given: object) -> object:
    text = str(given).strip()
    try:
        if item.kind == "whole number":
            return _small(int(text))
        if item.kind == "number":
            return float(text)
        if item.kind == "yes or no":
            return _TRUTH[text.lower()]
    except (ValueError, KeyError) as error:
        raise UserInputError(f"--{item.name} is a {item.kind}, not {text!r}.") from error
    return str(given)


def _small(number: int) -> int:
    if abs(number) >= 1 << 63:
        raise ValueError(number)
    return number
