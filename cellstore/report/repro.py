"""All runs that a run relies on, in the order of redoing them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..config import (
    BaselineParams,
    MeasureParams,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
    flag,
    options_of,
    spelled,
    unspeakable,
)
from ..enums import FeatureStorage, Stage, Status
from ..jobs.lookup import run_in
from ..jobs.workspace import Workspace
from ..models import (
    FeatureFile,
    FeatureSet,
    Image,
    IngestFile,
    Job,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Split,
)
from ..query.cells import plane_of

Params = SegmentParams | MeasureParams | SplitParams | TrainParams | BaselineParams | PredictParams


@dataclass(frozen=True)
class Order:
    """What a run was asked to do, as the library takes it.

    ``names``: what goes beside the parameters: ``name`` of a split, ``split``, ``segmentation``,
    ``measurement``, ``run``, ``baseline``, ``folds``. ``doubts`` are sentences on what a command
    cannot say, or the store does not know.
    """

    params: Params
    names: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableRead:
    """A file that an ingest run read."""

    name: str
    sha256: str
    layout: str
    rows: int


@dataclass(frozen=True)
class Step:
    """A run that is needed, and the command that redoes it (without ``cellstore``).

    ``spelled``: the command says every option, so that the recipe's fingerprint comes out the
    same; else it is the command as it was typed, or empty where that is not known.
    """

    run_id: int
    stage: str
    words: tuple[str, ...]
    spelled: bool
    doubts: tuple[str, ...]
    fingerprint: str
    weights_sha256: str | None
    code_version: str
    environment: dict[str, Any]
    started_at: str
    tables: tuple[TableRead, ...] = ()


@dataclass(frozen=True)
class Repro:
    """All steps up to a run, in the order of doing them. ``script`` does them, in a shell."""

    run_id: int
    stage: str
    steps: tuple[Step, ...]
    packages: dict[str, str]
    python: str | None
    code_version: str
    script: str


IDENTICAL, EQUAL, DIFFERENT = "identical", "equal within tolerance", "different"
IMPOSSIBLE = "cannot be redone"


@dataclass(frozen=True)
class Check:
    """What came of redoing a run beside the store.

    ``compared`` of ``what`` were compared, ``differ`` of them differ: the first are told in
    ``differences``. ``largest`` is the largest difference of a number, to be held against
    ``tolerance``. ``same_recipe``: the recipe of the redone run has the same fingerprint.
    ``reasons``: why it cannot be redone, or why it may differ.
    """

    run_id: int
    stage: str
    outcome: str
    what: str
    compared: int
    differ: int
    largest: float
    tolerance: float
    same_recipe: bool
    differences: tuple[str, ...]
    reasons: tuple[str, ...]
    seconds: float = 0.0


MARK = 16
"""Digits of a fingerprint that name a recipe in a command, in any store that has it."""

FROM_FILE = "file"
"""What a recipe of a training calls a file of weights."""


def order_of(session: Session, run: Run, recipe: Recipe) -> Order | None:
    """Return the order of a run; none: its stage is redone by the command that was typed."""
    read = _READ.get(recipe.stage)
    return None if read is None else read(session, run, recipe)


def _orders_segment(_session: Session, _run: Run, recipe: Recipe) -> Order | None:
    if "imported" in recipe.parameters:
        return None
    params = SegmentParams.from_recipe(recipe.parameters)
    if params.diameter_from is not None:
        params = replace(params, diameter_from=params.diameter_from[:MARK])
    return Order(params)


def _orders_measure(session: Session, _run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "imported" in stored or "channels" not in stored:
        return None
    params = MeasureParams.from_recipe(stored, features=(stored.get("group", "basic"),))
    segment = input_of(session, recipe, Stage.SEGMENT)
    if "group" not in stored and segment is not None and params.plane == plane_of(segment):
        params = MeasureParams()
    return Order(params, _named(session, recipe))


def _named(session: Session, recipe: Recipe) -> dict[str, str]:
    """Segmentation and measurement that a recipe reads, by fingerprint."""
    words = {Stage.SEGMENT: "segmentation", Stage.MEASURE: "measurement"}
    found = {}
    for stage, word in words.items():
        source = input_of(session, recipe, stage)
        if source is not None:
            found[word] = source.fingerprint[:MARK]
    return found


def input_of(session: Session, recipe: Recipe, stage: Stage) -> Recipe | None:
    """Return the recipe of a stage that ``recipe`` reads from, if there is one."""
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    query = query.where(RecipeInput.recipe_id == recipe.id, Recipe.stage == stage)
    return session.scalars(query.order_by(Recipe.id).limit(1)).first()


def _orders_split(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "files" in stored or "seed" not in stored:  # the tables of others
        return None
    flagged = stored["exclude_flagged"]
    params = SplitParams.from_recipe(
        stored, exclude_flagged=None if flagged is None else str(flagged)
    )
    result = run.result or {}
    query = select(Split).where(Split.recipe_id == recipe.id).order_by(Split.id)
    made = session.scalars(query).all()
    told = result.get("splits", [result.get("split")])
    mine = [split for split in made if split.name in told] or made
    if not mine:
        return Order(params, {"name": str(told[0])}, ("the split is deleted",))
    return Order(params, {"name": mine[0].family or mine[0].name})


def _set_name(session: Session, recipe: Recipe) -> str | None:
    """The feature set that a training read by name: one in files."""
    measure = input_of(session, recipe, Stage.MEASURE)
    if measure is None:
        return None
    query = select(FeatureSet.name).where(FeatureSet.recipe_id == measure.id)
    return session.scalar(query.where(FeatureSet.storage == FeatureStorage.FILES))


def _orders_train(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    split = session.get(Split, run.split_id) if run.split_id else None
    names = _named(session, recipe) | ({"split": split.name} if split else {})
    flagged = stored.get("exclude_flagged")
    more = {
        "features": _set_name(session, recipe),
        "exclude_flagged": None if flagged is None else str(flagged),
    }
    if "baseline" in stored:
        params = BaselineParams.from_recipe(stored, **more)
        return Order(params, names | {"baseline": str(stored["baseline"])})
    doubts: tuple[str, ...] = ()
    if stored.get("weights") == FROM_FILE:
        doubt = (
            "it began from a file of weights that the store does not hold: put the path of the "
            f"file with sha256 {recipe.weights_sha256} in place of --weights=file"
        )
        doubts = (doubt,)
    return Order(TrainParams.from_recipe(stored, **more), names, doubts)


def _orders_predict(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    params = PredictParams.from_recipe(stored)
    doubts: tuple[str, ...] = ()
    if params.split is not None:
        query = select(Split.name).where(Split.fingerprint == params.split).order_by(Split.id)
        name = session.scalar(query.limit(1))
        doubts = () if name else ("the split whose subset it labelled is deleted",)
        params = replace(params, split=name or params.split)
    return Order(params, {"run": str(run.parent_id)}, doubts)


_READ: Mapping[Stage, Callable[[Session, Run, Recipe], Order | None]] = {
    Stage.SEGMENT: _orders_segment,
    Stage.MEASURE: _orders_measure,
    Stage.SPLIT: _orders_split,
    Stage.TRAIN: _orders_train,
    Stage.PREDICT: _orders_predict,
}


_BEGIN: Mapping[type, tuple[str, ...]] = {
    SegmentParams: ("segment",),
    MeasureParams: ("measure",),
    SplitParams: ("split", "create"),
    TrainParams: ("train",),
    BaselineParams: ("train", "--no-predict"),
    PredictParams: ("predict",),
}
_NAMES = ("baseline", "split", "segmentation", "measurement", "run")


def words_of(order: Order) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of the command after ``cellstore``, and what they cannot say."""
    params, names = order.params, order.names
    words = list(_BEGIN[type(params)])
    words += [f"--{name}={names[name]}" for name in _NAMES if name in names]
    doubts = list(order.doubts)
    for item in options_of(params):
        if item.name in params.settled:
            continue
        value = getattr(params, item.name)
        words += spelled(item, value)
        doubts += [
            f"{flag(item)} cannot hold the name {text!r}: this step can be redone from Python only"
            for text in unspeakable(item, value)
        ]
    if isinstance(params, SplitParams):
        words += ["--", names["name"]]
    return tuple(words), tuple(doubts)


WIDE = 96
_OF_RUN = "--run="
_NUMBER = """number() {
  python3 -c 'import json, sys
found = json.load(sys.stdin)
print((found[0] if isinstance(found, list) else found)["run_id"])'
}"""
"""Prints the number of a run from the JSON of the command that made it."""


def script_of(
    run: Run, steps: Sequence[Step], packages: Mapping[str, str], python: str | None
) -> str:
    """Return the script. What a run is called in the store it runs in, it finds out itself."""
    lines = ["#!/bin/sh"]
    lines += _comment(f"Redoes run {run.id} ({run.stage.value}) of {run.started_at:%Y-%m-%d} UTC,")
    lines += _comment("and all that it relies on. In a new store: cellstore init redone, then")
    lines += _comment("export CELLSTORE_STORE=redone. In the store itself nothing is done twice.")
    lines += ["set -eu", "", *_versions(run, packages, python)]
    needed = {step.run_id: f"run_{step.run_id}" for step in steps if step.stage == Stage.TRAIN}
    if needed:
        lines += ["", _NUMBER]
    for number, step in enumerate(steps, start=1):
        lines += ["", *_step(number, step, run, needed)]
    return "\n".join(lines) + "\n"


def _versions(run: Run, packages: Mapping[str, str], python: str | None) -> list[str]:
    commit = re.search(r"\+g([0-9a-f]+)", run.code_version)
    wanted = {"cellstore": run.code_version.partition("+")[0], **packages}
    pins = [shlex.quote(f"{name}=={version}") for name, version in wanted.items()]
    lines = _comment(f"Versions: Python {python or 'unknown'}, cellstore {run.code_version}")
    lines += _comment("pip install " + " ".join(pins))
    if commit:
        lines += _comment(f"From a checkout of its source: git checkout {commit[1]}")
    return lines


def _step(number: int, step: Step, run: Run, needed: Mapping[int, str]) -> list[str]:
    lines = _comment(f"{number}. {step.stage}, run {step.run_id}, recipe {step.fingerprint[:16]}")
    if step.code_version != run.code_version:
        lines += _comment(f"made by cellstore {step.code_version}")
    if step.weights_sha256 and step.stage in (Stage.SEGMENT, Stage.TRAIN):
        lines += _comment(f"weights with sha256 {step.weights_sha256}")
    for table in step.tables:
        lines += _comment(f"reads {table.name}, sha256 {table.sha256}, as {table.layout}")
    for doubt in step.doubts:
        lines += _comment(f"Mind: {doubt}")
    if not step.words:
        return lines
    command = _command(step.words, needed)
    if step.run_id in needed:
        return [*lines, f"{needed[step.run_id]}=$({command} --json | number)"]
    return [*lines, command]


def _command(words: Sequence[str], needed: Mapping[int, str]) -> str:
    """The command over as many lines as it needs."""
    shown = ["cellstore", *(_word(word, needed) for word in words)]
    lines = [shown[0]]
    for word in shown[1:]:
        if len(lines[-1]) + len(word) > WIDE and not lines[-1].endswith("cellstore"):
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _word(word: str, needed: Mapping[int, str]) -> str:
    run = word.removeprefix(_OF_RUN)
    if word.startswith(_OF_RUN) and run.isdecimal() and int(run) in needed:
        return f'{_OF_RUN}"${needed[int(run)]}"'
    return shlex.quote(word)


def _comment(text: str) -> list[str]:
    """A comment of one line, whatever is in ``text``."""
    return ["# " + "".join(char if char.isprintable() else " " for char in text)]


SELECTIONS = ("--plate", "--well", "--where", "--limit")
"""What says which images a command was about: no part of a recipe, so it is read as typed."""

_BY_IMAGE = (Stage.SEGMENT, Stage.MEASURE)
_COMMANDS = {Stage.INGEST: (("ingest",), ("refresh",))}
"""How commands begin that make runs of a stage, where they are not called like it."""

_NOT_PACKAGES = ("python", "platform", "resumed", "cellstore")


def repro(workspace: Workspace, reference: str) -> Repro:
    """Return the commands and versions that redo a run, and all that it relies on.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = run_in(session, reference)
        steps = tuple(step_of(session, item) for item in _chain(session, run))
    known = run.environment
    packages = {n: str(v) for n, v in known.items() if n not in _NOT_PACKAGES}
    python = str(known["python"]) if "python" in known else None
    return Repro(
        run_id=run.id,
        stage=run.stage.value,
        steps=steps,
        packages=packages,
        python=python,
        code_version=run.code_version,
        script=script_of(run, steps, packages, python),
    )


def _chain(session: Session, run: Run) -> list[Run]:
    """The run and all before it that it relies on, by number; ingests are all needed."""
    found: dict[int, Run] = {}
    waiting = [run]
    while waiting:
        item = waiting.pop()
        if item.id in found:
            continue
        found[item.id] = item
        waiting += [other for other in _before(session, item) if other.id <= item.id]
    ingests = select(Run).where(Run.stage == Stage.INGEST, Run.id < run.id)
    for item in session.scalars(ingests.where(Run.status == Status.DONE)):
        found.setdefault(item.id, item)
    return [found[key] for key in sorted(found)]


def _before(session: Session, run: Run) -> Iterator[Run]:
    if run.parent_id is not None:
        yield session.get_one(Run, run.parent_id)
    recipe = session.get_one(Recipe, run.recipe_id)
    flagged = recipe.parameters.get("exclude_flagged")
    if isinstance(flagged, int):
        yield session.get_one(Run, flagged)
    if run.split_id is not None:
        split = session.get_one(Split, run.split_id)
        yield from _makers(session, session.get_one(Recipe, split.recipe_id), run)
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    for source in session.scalars(query.where(RecipeInput.recipe_id == recipe.id)):
        if source.stage is not Stage.TRAIN:
            yield from _makers(session, source, run)


def _makers(session: Session, recipe: Recipe, run: Run) -> list[Run]:
    """The finished runs before ``run`` that made what a recipe stands for."""
    mine = select(Run).where(Run.recipe_id == recipe.id, Run.stage == recipe.stage)
    done = mine.where(Run.id < run.id, Run.status == Status.DONE).order_by(Run.id)
    made = list(session.scalars(done))
    if made:
        return made
    # Brought in by an ingest, or by a predict run that kept its embedding.
    ids = set(
        session.scalars(
            select(Segmentation.run_id).where(Segmentation.recipe_id == recipe.id).distinct()
        )
    )
    files = select(FeatureFile.run_id).join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
    ids |= set(session.scalars(files.where(FeatureSet.recipe_id == recipe.id).distinct()))
    return list(session.scalars(select(Run).where(Run.id.in_(ids)).order_by(Run.id)))


def step_of(session: Session, run: Run) -> Step:
    """Return how one run is redone."""
    recipe = session.get_one(Recipe, run.recipe_id)
    order = order_of(session, run, recipe)
    typed = typed_words(run.command)
    if typed is not None and typed[:1] not in _COMMANDS.get(run.stage, ((run.stage.value,),)):
        typed = None  # of a command that does much more, such as demo
    if order is None:
        words: tuple[str, ...] = typed or ()
        doubts: tuple[str, ...] = () if typed else (f"it was begun by: {run.command}",)
    else:
        words, doubts = words_of(order)
        if run.stage in _BY_IMAGE and not _did_all(session, run):
            words, doubts = _with_selection(words, doubts, typed)
    return Step(
        run_id=run.id,
        stage=run.stage.value,
        words=words,
        spelled=order is not None,
        doubts=doubts,
        fingerprint=recipe.fingerprint,
        weights_sha256=recipe.weights_sha256,
        code_version=run.code_version,
        environment=run.environment,
        started_at=run.started_at.isoformat(),
        tables=_tables(session, run),
    )


def _did_all(session: Session, run: Run) -> bool:
    """Whether a run did every image that the store has the files of, so that none need be named."""
    mine = select(func.count()).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
    there = select(func.count()).where(Image.content_sha256.is_not(None))
    return session.scalar(mine.where(Job.status == Status.DONE)) == session.scalar(there)


def _with_selection(
    words: tuple[str, ...], doubts: tuple[str, ...], typed: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if typed is None:
        doubt = "which images it was about is not known: it was begun from Python"
        return words, (*doubts, doubt)
    return (*words, *selection_of(typed)), doubts


def selection_of(typed: tuple[str, ...]) -> list[str]:
    """Return the options of a typed command that say which images it was about."""
    found = []
    for number, word in enumerate(typed):
        name, mark, value = word.partition("=")
        if name not in SELECTIONS:
            continue
        if mark:
            found.append(f"{name}={value}")
        elif number + 1 < len(typed):
            found.append(f"{name}={typed[number + 1]}")
    return found


def typed_words(command: str) -> tuple[str, ...] | None:
    """Return the words after ``cellstore`` of a command that was typed, without its ``--store``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if not words or words[0] != "cellstore":
        return None
    kept: list[str] = []
    skip = False
    for word in words[1:]:
        if skip or word == "--store":
            skip = not skip
            continue
        if not re.match(r"--store=|--json$", word):
            kept.append(word)
    return tuple(kept)


def _tables(session: Session, run: Run) -> tuple[TableRead, ...]:
    query = select(IngestFile).where(IngestFile.run_id == run.id).order_by(IngestFile.id)
    return tuple(
        TableRead(row.name, row.sha256, row.layout, row.n_rows) for row in session.scalars(query)
    )
