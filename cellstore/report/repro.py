"""The commands that redo a run: what it was asked to do, every run it relies on, and the script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..config import (
    BASELINES,
    BaselineParams,
    HitsParams,
    MeasureParams,
    PredictParams,
    ProfileParams,
    RunName,
    SegmentParams,
    SplitParams,
    TrainParams,
    flag,
    options_of,
    spelled,
    unspeakable,
)
from ..enums import FeatureStorage, Origin, Stage, Status
from ..jobs.lookup import IN_RECIPES, find_run
from ..jobs.workspace import Workspace
from ..models import (
    Event,
    FeatureFile,
    FeatureSet,
    Image,
    IngestFile,
    Job,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    Well,
)
from ..notebooks import Shown
from ..query.cells import plane_of

Params = (
    SegmentParams
    | MeasureParams
    | SplitParams
    | TrainParams
    | BaselineParams
    | PredictParams
    | ProfileParams
    | HitsParams
)


@dataclass(frozen=True)
class RunOptions:
    """What a run was asked to do: parameters, and the names of what it read.

    ``inputs``: ``split``, ``segmentation``, ``measurement``, ``baseline`` and ``run`` are options
    of the command; ``name`` is that of a split. ``doubts`` are sentences on what a command cannot
    express, or the store does not know. ``unread``: parameters that the baseline does not read, and
    its command refuses.
    """

    params: Params
    inputs: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """A run that is needed, and the command that redoes it (without ``cellstore``).

    The command has every option, so that the recipe's fingerprint comes out the same; else it is
    the command as it was typed, or empty where that is not known. ``tables``: name,
    sha256, layout and number of rows of each file that an ingest read. ``refused``: how many rows
    were refused or images failed, for which the command ended with 1.
    """

    run_id: int
    stage: str
    words: tuple[str, ...]
    doubts: tuple[str, ...]
    fingerprint: str
    weights_sha256: str | None
    code_version: str
    started_at: str
    tables: tuple[dict[str, Any], ...] = ()
    refused: int = 0


@dataclass(frozen=True)
class Repro(Shown):
    """All steps up to a run, in the order of doing them. ``script`` does them, in a shell.

    Also the renames of channels that no recipe had named by then: later ones name them anew.
    """

    run_id: int
    stage: str
    steps: tuple[Step, ...]
    script: str


MARK = 16
"""Digits of a fingerprint that name a recipe in a command, in any store that has it."""

FROM_FILE = "file"
"""What a recipe of a training calls a file of weights."""

_COMMANDS: Mapping[type, tuple[str, ...]] = {
    SegmentParams: ("segment",),
    MeasureParams: ("measure",),
    SplitParams: ("split", "create"),
    TrainParams: ("train",),
    BaselineParams: ("train", "--no-predict"),
    PredictParams: ("predict",),
    ProfileParams: ("profile",),
    HitsParams: ("hits",),
}

_SELECTION = ("--plate", "--well", "--where", "--limit")
"""Which images a command was about: no part of a recipe, so it is read from what was typed."""

_NOT_PACKAGES = ("python", "platform", "resumed", "cellstore", "threads", "device", "cuda")


def options_of_run(session: Session, run: Run) -> RunOptions | None:
    """Return what a run was asked to do; none: it is redone by the command that was typed."""
    recipe, stored = run.recipe, run.recipe.parameters
    if {"imported", "files", "declared"} & stored.keys():  # what other tools made
        return None
    doubts: tuple[str, ...] = ()
    read = {item.stage: item for item in recipe.inputs}
    segment, measure = read.get(Stage.SEGMENT), read.get(Stage.MEASURE)
    sources = {"segmentation": segment, "measurement": measure}
    inputs = {name: found.fingerprint[:MARK] for name, found in sources.items() if found}
    flagged = stored.get("exclude_flagged")
    flagging = {"exclude_flagged": None if flagged is None else str(flagged)}
    match recipe.stage:
        case Stage.SEGMENT:
            return RunOptions(SegmentParams.from_recipe(stored))
        case Stage.MEASURE if "channels" in stored:
            measured = MeasureParams.from_recipe(stored, features=(stored.get("group", "basic"),))
            if "group" not in stored and segment and measured.plane == plane_of(segment):
                measured = MeasureParams()
            return RunOptions(measured, inputs)
        case Stage.SPLIT if "seed" in stored:
            result = run.result or {}
            names = result.get("splits", [result.get("split")])
            query = select(Split).where(Split.recipe_id == recipe.id).order_by(Split.id)
            made = session.scalars(query).all()
            split = next((item for item in made if item.name in names), next(iter(made), None))
            name = str(names[0]) if split is None else split.family or split.name
            doubts = () if split else ("the split is deleted",)
            return RunOptions(SplitParams.from_recipe(stored, **flagging), {"name": name}, doubts)
        case Stage.TRAIN:
            if run.split is not None:
                inputs = {"split": run.split.name} | inputs
            more: Any = {"features": _named_set(measure)} | flagging
            selection = str(stored.get("where") or stored.get("sql") or "")
            if re.search(r"\b(select|from)\b", selection, re.IGNORECASE):
                doubt = (
                    "its cells are selected by SQL, which may read what is not made again with it: "
                    "images outside the split, predictions, numbers of rows"
                )
                doubts = (doubt,)
            if "baseline" in stored:
                inputs = {"baseline": str(stored["baseline"])} | inputs
                params = BaselineParams.from_recipe(stored, **more)
                known = (
                    item for item in options_of(params) if item.metadata["section"] == BASELINES
                )
                unread = frozenset(item.name for item in known) - stored.keys()
                return RunOptions(params, inputs, doubts, unread)
            if stored.get("weights") == FROM_FILE:
                doubt = (
                    "it began from a file of weights that the store does not hold: put the path "
                    f"of the file with sha256 {recipe.weights_sha256} in place of --weights=file"
                )
                doubts = (doubt, *doubts)
            return RunOptions(TrainParams.from_recipe(stored, **more), inputs, doubts)
        case Stage.PREDICT:
            labelled = PredictParams.from_recipe(stored)
            if labelled.split is not None:
                by_mark = select(Split.name).where(Split.fingerprint == labelled.split)
                known = session.scalar(by_mark.order_by(Split.id).limit(1))
                doubts = () if known else ("the split whose subset it labelled is deleted",)
                labelled = replace(labelled, split=known or labelled.split)
            return RunOptions(labelled, {"run": str(run.parent_id)}, doubts)
        case Stage.PROFILE if segment is not None:
            of = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
            of = of.join(Image, Image.well_id == Well.id)
            of = of.join(Segmentation, Segmentation.image_id == Image.id).distinct()
            every = set(session.scalars(of.where(Segmentation.recipe_id == segment.id)))
            read_plates = (run.result or {}).get("barcodes", [])
            more = {"features": _named_set(measure), "select": tuple(stored["select"]), **flagging}
            more["plates"] = () if every == set(read_plates) else tuple(read_plates)
            return RunOptions(ProfileParams.from_recipe(stored, **more), inputs, doubts)
        case Stage.HITS if run.parent is not None:
            result = run.result or {}
            compared = sorted(chain.from_iterable((result.get("plate_sets") or {}).values()))
            whole = compared == sorted((run.parent.result or {}).get("barcodes", []))
            more = {"profiles": str(run.parent_id), "plates": () if whole else tuple(compared)}
            labels = read.get(Stage.PREDICT)
            if labels is not None:
                last = select(func.max(Run.id)).where(Run.recipe_id == labels.id, Run.id < run.id)
                more["run"] = str(session.scalar(last.where(Run.status == Status.DONE)))
            more["curves"] = tuple(stored["curves"])
            return RunOptions(HitsParams.from_recipe(stored, **more))
    return None


def _named_set(measure: Recipe | None) -> str | None:
    """Return the name of a feature set in files; the built-in ones are found by their recipe."""
    found = None if measure is None else measure.feature_set
    return found.name if found and found.storage is FeatureStorage.FILES else None


def words_of(options: RunOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of the command after ``cellstore``, and what they cannot express."""
    params, inputs = options.params, options.inputs
    words = list(_COMMANDS[type(params)])
    words += [f"--{name}={value}" for name, value in inputs.items() if name != "name"]
    doubts = list(options.doubts)
    for item in options_of(params):
        if item.name in options.unread:
            continue
        value = getattr(params, item.name)
        words += spelled(item, value)
        doubts += [
            f"{flag(item)} cannot hold the name {text!r}: this step can be redone from Python only"
            for text in unspeakable(item, value)
        ]
    if isinstance(params, SplitParams):
        words += ["--", inputs["name"]]
    return tuple(words), tuple(doubts)


def repro(workspace: Workspace, reference: RunName) -> Repro:
    """Return the commands and versions that redo a run, and all that it relies on."""
    with workspace.database.read() as session:
        run = find_run(session, reference)
        needed: dict[int, Run] = {}
        waiting = [run]
        while waiting:
            item = waiting.pop()
            if item.id not in needed and item.id <= run.id:
                needed[item.id] = item
                waiting += _before(session, item)
        ingests = select(Run).where(Run.stage == Stage.INGEST, Run.status == Status.DONE)
        for item in session.scalars(ingests.where(Run.id < run.id)):
            needed.setdefault(item.id, item)
        steps = tuple(_step_of(session, needed[number]) for number in sorted(needed))
        return Repro(run.id, run.stage.value, steps, _script(run, steps, _renames(session, run)))


def _renames(session: Session, run: Run) -> list[tuple[datetime, tuple[str, ...]]]:
    """When channels were renamed before a run, and the command, where recipes use the new name."""
    query = select(Event.created_at, Event.row_id, Plate.barcode, Event.old, Event.new)
    query = query.outerjoin(Plate, Plate.id == Event.row_id).order_by(Event.id)
    query = query.where(Event.table_name == "plates", Event.created_at < run.started_at)
    everywhere, found = None, list[tuple[datetime, tuple[str, ...]]]()
    for at, row_id, plate, old, new in session.execute(query):
        if "channel" not in (old or {}) or IN_RECIPES in new:
            continue
        names = old["channel"], new["channel"]
        if row_id is None:
            everywhere = names
        elif everywhere == names or plate is None:
            continue
        of_plate = () if row_id is None else (f"--plate={plate}",)
        found.append((at, ("rename", "channel", *of_plate, "--", *names)))
    return found


def _before(session: Session, run: Run) -> list[Run]:
    """The runs before ``run`` that made what it reads."""
    # One command brought a declared model and its predictions.
    found = [] if run.parent is None or run.parent.origin is Origin.DECLARED else [run.parent]
    flagged = run.recipe.parameters.get("exclude_flagged")
    if isinstance(flagged, int):
        found.append(session.get_one(Run, flagged))
    read = [] if run.split is None else [run.split.recipe]
    read += [recipe for recipe in run.recipe.inputs if recipe.stage is not Stage.TRAIN]
    for recipe in read:
        mine = select(Run).where(Run.recipe_id == recipe.id, Run.stage == recipe.stage)
        done = mine.where(Run.id < run.id, Run.status == Status.DONE)
        made = session.scalars(done.order_by(Run.id)).all()
        if not made:  # by an ingest, or by a predict run that kept its embedding
            masks = select(Segmentation.run_id).where(Segmentation.recipe_id == recipe.id)
            files = select(FeatureFile.run_id).join(FeatureSet)
            either = masks.union(files.where(FeatureSet.recipe_id == recipe.id)).subquery()
            by = select(Run).where(Run.id.in_(select(either.c.run_id)), Run.id < run.id)
            made = session.scalars(by.order_by(Run.id)).all()
        found += made
    return found


def _step_of(session: Session, run: Run) -> Step:
    """How one run is redone."""
    options = options_of_run(session, run)
    typed = typed_words(run.command)
    usual: tuple[str, ...] = (run.stage.value,)
    usual = ("ingest", "refresh") if run.stage is Stage.INGEST else usual
    usual = ("predictions", "apply", "embed") if "declared" in run.recipe.parameters else usual
    if typed is not None and typed[:1] not in [(word,) for word in usual]:
        typed = None  # of a command that does much more, such as demo
    if options is None:
        words: tuple[str, ...] = typed or ()
        doubts: tuple[str, ...] = () if typed else (f"it was begun by: {run.command}",)
    else:
        words, doubts = words_of(options)
        if run.stage in (Stage.SEGMENT, Stage.MEASURE):
            # A run that did every image whose files the store has need not name any.
            mine = select(func.count()).where(Job.run_id == run.id, Job.recipe_id == run.recipe_id)
            every = select(func.count()).where(Image.content_sha256.is_not(None))
            if session.scalar(mine.where(Job.status == Status.DONE)) != session.scalar(every):
                if typed is None:
                    doubts += ("which images it was about is not known: it was begun from Python",)
                else:
                    words += tuple(selection_of(typed))
    files = select(IngestFile).where(IngestFile.run_id == run.id).order_by(IngestFile.id)
    failed = select(func.count()).where(Job.run_id == run.id, Job.status == Status.FAILED)
    return Step(
        run_id=run.id,
        stage=run.stage.value,
        words=words,
        doubts=doubts,
        fingerprint=run.recipe.fingerprint,
        weights_sha256=run.recipe.weights_sha256,
        code_version=run.code_version,
        started_at=run.started_at.isoformat(),
        tables=tuple(
            {"name": file.name, "sha256": file.sha256, "layout": file.layout, "rows": file.n_rows}
            for file in session.scalars(files)
        ),
        refused=int((run.result or {}).get("refused") or 0) + (session.scalar(failed) or 0),
    )


def selection_of(typed: Sequence[str]) -> list[str]:
    """Return the options of a typed command that name the images it was about."""
    found = []
    for number, word in enumerate(typed):
        name, mark, value = word.partition("=")
        if name in _SELECTION and mark:
            found.append(f"{name}={value}")
        elif name in _SELECTION and number + 1 < len(typed):
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
        elif not re.match(r"--store=|--json$", word):
            kept.append(word)
    return tuple(kept)


WIDE = 96
_OF_RUN = ("--run=", "--profiles=")
_NUMBER = """number() {
  python3 -c 'import json, sys
found = json.load(sys.stdin)
print((found[0] if isinstance(found, list) else found)["run_id"])'
}"""
"""Prints the number of a run from the JSON of the command that made it."""


def _script(
    run: Run,
    steps: Sequence[Step],
    renames: Sequence[tuple[datetime, tuple[str, ...]]],
) -> str:
    """The script. It finds out by itself which numbers runs get in the store it is run in."""
    lines = ["#!/bin/sh"]

    def comment(text: str) -> None:
        """In one line, whatever is in ``text``."""
        lines.append("# " + "".join(char if char.isprintable() else " " for char in text))

    comment(f"Redoes run {run.id} ({run.stage.value}) of {run.started_at:%Y-%m-%d} UTC,")
    comment("and all that it relies on. In a new store: cellstore init redone, then")
    comment("export CELLSTORE_STORE=redone. In the store itself nothing is done twice.")
    lines += ["set -eu", ""]
    known = {name: text for name, text in run.environment.items() if name not in _NOT_PACKAGES}
    wanted = {"cellstore": run.code_version.partition("+")[0], **known}
    pins = [shlex.quote(f"{name}=={version}") for name, version in wanted.items()]
    python = run.environment.get("python", "unknown")
    comment(f"Versions: Python {python}, cellstore {run.code_version}")
    comment("pip install " + " ".join(pins))
    if commit := re.search(r"\+g([0-9a-f]+)", run.code_version):
        comment(f"From a checkout of its source: git checkout {commit[1]}")
    named = {word.partition("=")[2] for s in steps for word in s.words if word.startswith(_OF_RUN)}
    variables = {
        str(step.run_id): f"run_{step.run_id}"
        for step in steps
        if step.stage == "train" or str(step.run_id) in named
    }
    if variables:
        lines += ["", _NUMBER]
    waiting = list(renames)
    for number, step in enumerate(steps, start=1):
        lines.append("")
        while waiting and waiting[0][0] < datetime.fromisoformat(step.started_at):
            lines.append(shlex.join(("cellstore", *waiting.pop(0)[1])))
        comment(f"{number}. {step.stage}, run {step.run_id}, recipe {step.fingerprint[:16]}")
        if step.code_version != run.code_version:
            comment(f"made by cellstore {step.code_version}")
        if step.weights_sha256 and step.stage in (Stage.SEGMENT, Stage.TRAIN):
            comment(f"weights with sha256 {step.weights_sha256}")
        for table in step.tables:
            comment(f"reads {table['name']}, sha256 {table['sha256']}, as {table['layout']}")
        for doubt in step.doubts:
            comment(f"Note: {doubt}")
        if not step.words:
            continue
        command = ["cellstore"]  # over as many lines as it needs
        for word in step.words:
            name, _, of_run = word.partition("=")
            variable = variables.get(of_run) if word.startswith(_OF_RUN) else None
            shown = shlex.quote(word) if variable is None else f'{name}="${variable}"'
            if len(command[-1]) + len(shown) > WIDE and command != ["cellstore"]:
                command[-1] += " \\"
                command.append(f"  {shown}")
            else:
                command[-1] += f" {shown}"
        text = "\n".join(command)
        if (variable := variables.get(str(step.run_id))) is not None:
            text = f"{variable}=$({text} --json | number)"
        elif step.refused:
            comment(
                f"Rows refused or images failed then: {step.refused:,}. It may end with 1 again."
            )
            text += " || [ $? -eq 1 ]"
        lines.append(text)
    return "\n".join(lines) + "\n"
