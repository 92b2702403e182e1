"""All runs that a run relies on, in the order of redoing them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..config import (
    TRAIN_RECIPES,
    BaselineParams,
    ImageInput,
    MeasureParams,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from ..enums import FeatureStorage, GroupLevel, Projection, Stage, Status, Subset
from ..jobs.lookup import run_in
from ..jobs.workspace import Workspace
from ..learn.branches import BRANCHES
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
    verdict: str
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


def _known(kind: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    values = {name: value for name, value in stored.items() if name in names}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}


def _orders_plane(stored: Mapping[str, Any]) -> ImageInput:
    return ImageInput(tuple(stored["channels"]), Projection(stored["projection"]))


def _orders_segment(_session: Session, _run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "imported" in stored:
        return None
    values = _known(SegmentParams, stored)
    values["image"] = _orders_plane(stored["image"])
    if values.get("nuclei") is not None:
        values["nuclei"] = _orders_plane(stored["nuclei"])
    if values.get("diameter_from") is not None:
        values["diameter_from"] = values["diameter_from"][:MARK]
    return Order(SegmentParams(**values))


def _orders_measure(session: Session, _run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    if "group" in stored:
        channels = ImageInput(tuple(stored["channels"]))
        params = MeasureParams(channels, (stored["group"],))
    elif "image" in stored:
        segment = input_of(session, recipe, Stage.SEGMENT)
        plane = _orders_plane(stored["image"])
        same = segment is not None and plane == _plane_of(segment)
        params = MeasureParams(None if same else plane)
        if not same and not plane.channels:
            doubt = "it looked at the first channels, not at what was segmented: from Python only"
            return Order(params, _named(session, recipe), (doubt,))
    else:
        return None
    return Order(params, _named(session, recipe))


def _plane_of(segment: Recipe) -> ImageInput | None:
    return plane_of(segment) if "image" in segment.parameters else None


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
    values = _known(SplitParams, stored)
    values["group_level"] = GroupLevel(stored["group_level"])
    if values.get("downsample") is not None:
        values["downsample"] = tuple((label, size) for label, size in stored["downsample"])
    if stored.get("leave_out_flagged") is not None:
        values["leave_out_flagged"] = str(stored["leave_out_flagged"])
    params = SplitParams(**values)
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
    flagged = stored.get("leave_out_flagged")
    more = {
        "features": _set_name(session, recipe),
        "leave_out_flagged": None if flagged is None else str(flagged),
    }
    if "baseline" in stored:
        kind = str(stored["baseline"])
        params = BaselineParams(**_known(BaselineParams, stored) | more)
        return Order(params, names | {"baseline": kind})
    values = {"branches": BRANCHES} | _known(TrainParams, stored) | more
    if stored.get("weights") == FROM_FILE:
        doubt = (
            "it began from a file of weights that the store does not hold: put the path of the "
            f"file with sha256 {recipe.weights_sha256} in place of --weights=file"
        )
        return Order(TrainParams(**values), names, (doubt,))
    return Order(TrainParams(**values), names)


def _orders_predict(session: Session, run: Run, recipe: Recipe) -> Order | None:
    stored = recipe.parameters
    values = _known(PredictParams, stored)
    if values.get("subset") is not None:
        values["subset"] = Subset(values["subset"])
    params = PredictParams(**values)
    doubts: tuple[str, ...] = ()
    if params.split is not None:
        query = select(Split.name).where(Split.fingerprint == params.split).order_by(Split.id)
        name = session.scalar(query.limit(1))
        doubts = () if name else ("the split whose side it labelled is deleted",)
        params = replace(params, split=name or params.split)
    return Order(params, {"run": str(run.parent_id)}, doubts)


_READ: Mapping[Stage, Callable[[Session, Run, Recipe], Order | None]] = {
    Stage.SEGMENT: _orders_segment,
    Stage.MEASURE: _orders_measure,
    Stage.SPLIT: _orders_split,
    Stage.TRAIN: _orders_train,
    Stage.PREDICT: _orders_predict,
}


NONE = "none"


def words_of(order: Order) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of the command after ``cellstore``, and what they cannot say."""
    spell = _SPELLED[type(order.params)]
    words, doubts = spell(order.params, order.names)
    return tuple(words), (*order.doubts, *doubts)


def _option(name: str, value: Any) -> list[str]:
    # With "=", so that a value may begin with a dash.
    return [] if value is None else [f"--{name}={value}"]


def _number(value: float) -> str:
    return repr(float(value))


def _listed(name: str, values: Sequence[str]) -> list[str]:
    return [f"--{name}={','.join(values)}"] if values else []


def _commas(what: str, values: Iterable[str]) -> list[str]:
    """Doubts about names that a list with commas cannot hold."""
    return [
        f"{what} {value!r} has a comma or space at its end, which a list cannot hold: "
        "this step can be redone from Python only"
        for value in values
        if "," in value or value != value.strip() or not value
    ]


def _segment(params: SegmentParams, _names: dict[str, str]) -> tuple[list[str], list[str]]:
    image, nuclei = params.image, params.nuclei
    words = [
        "segment",
        *_option("model", params.model),
        *_option("flow-threshold", _number(params.flow_threshold)),
        *_option("cellprob-threshold", _number(params.cellprob_threshold)),
        *([] if params.diameter is None else _option("diameter", _number(params.diameter))),
        *_option("diameter-from", params.diameter_from),
        *_plane(image),
        *([] if nuclei is None else _listed("nuclei", nuclei.channels)),
    ]
    doubts = _commas("channel", (*image.channels, *(nuclei.channels if nuclei else ())))
    if nuclei is not None and (nuclei.projection != image.projection or not nuclei.channels):
        doubts.append("the planes of cells and nuclei are projected in two ways, from Python only")
    return words, doubts


def _plane(image: ImageInput) -> list[str]:
    return [*_listed("channels", image.channels), f"--projection={image.projection}"]


def _measure(params: MeasureParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    words = [
        "measure",
        *_listed("features", params.features),
        *([] if params.image is None else _plane(params.image)),
        *_option("segmentation", names.get("segmentation")),
    ]
    channels = () if params.image is None else params.image.channels
    return words, _commas("channel", channels)


def _split(params: SplitParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    size = None if params.folds is not None else _number(params.test_size)
    words = [
        *("split", "create"),
        f"--protocol={params.protocol}",
        f"--field={params.field}",
        *_of_groups(params),
        *_option("test-size", size),
        *_listed("test-plates", params.test_plates),
        *_listed("validation-plates", params.validation_plates),
        *_option("folds", params.folds),
        *_option("seed", params.seed),
        *(f"--plate={plate}" for plate in params.plates),
        *_option("where", params.where),
        *_cuts(params),
        *_option("downsample-by", params.downsample_by),
        *_option("min-images", params.min_images),
        *(["--allow-missing"] if params.allow_missing else []),
        *_left_out(params.leave_out_flagged),
        *("--", names["name"]),
    ]
    return words, _commas("plate", (*params.test_plates, *params.validation_plates))


def _of_groups(params: SplitParams) -> list[str]:
    """What the published protocol settles: it splits single images, and none validates."""
    if params.protocol == "published":
        return []
    size = _number(params.validation_size)
    return [f"--group={params.group_level}", f"--validation-size={size}"]


def _cuts(params: SplitParams) -> list[str]:
    if params.downsample is None:
        return []
    cuts = [f"--downsample={label}={size}" for label, size in params.downsample]
    return cuts or [f"--downsample={NONE}"]


def _left_out(run: str | None) -> list[str]:
    return [] if run is None else ["--leave-out-flagged", f"--qc-run={run}"]


def _sources(names: dict[str, str]) -> list[str]:
    return [
        word
        for name in ("split", "segmentation", "measurement")
        for word in _option(name, names.get(name))
    ]


def _train(params: TrainParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    weights = "--class-weights" if params.class_weights else "--no-class-weights"
    words = [
        "train",
        f"--recipe={params.recipe}",
        *_sources(names),
        *_option("features", params.features),
        *_left_out(params.leave_out_flagged),
        *([] if params.branches is None else [f"--branches={','.join(params.branches)}"]),
        *_listed("channels", params.channels),
        f"--backbone={params.backbone}",
        f"--weights={params.weights}",
        f"--crop-size={params.crop_size}",
        f"--dropout={_number(params.dropout)}",
        f"--epochs={params.epochs}",
        f"--patience={params.patience}",
        f"--monitor={params.monitor}",
        f"--batch-size={params.batch_size}",
        f"--sampler={params.sampler}",
        f"--augment={','.join(params.augment) or NONE}",
        f"--loss={params.loss}",
        weights,
        f"--label-smoothing={_number(params.label_smoothing)}",
        f"--learning-rate={_number(params.learning_rate)}",
        f"--schedule={params.schedule}",
        f"--warmup-epochs={params.warmup_epochs}",
        f"--weight-decay={_number(params.weight_decay)}",
        f"--normalise={params.normalise}",
        f"--intensity={params.intensity}",
        f"--precision={params.precision}",
        f"--seed={params.seed}",
    ]
    usual = TRAIN_RECIPES.get(params.recipe, TrainParams())
    unsaid = [n for n in ("step_size", "gamma") if getattr(params, n) != getattr(usual, n)]
    doubts = [f"{name} is {getattr(params, name)}, from Python only" for name in unsaid]
    return words, [*doubts, *_commas("channel", params.channels)]


def _baseline(params: BaselineParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    words = [
        "train",
        f"--baseline={names['baseline']}",
        "--no-predict",
        *_sources(names),
        *_option("features", params.features),
        *_left_out(params.leave_out_flagged),
        f"--max-cells={params.max_cells}",
        f"--normalise={params.normalise}",
        f"--seed={params.seed}",
    ]
    usual = BaselineParams()
    fixed = ("strength", "trees", "depth", "smallest_leaf")
    unsaid = [name for name in fixed if getattr(params, name) != getattr(usual, name)]
    return words, [f"{name} is {getattr(params, name)}, from Python only" for name in unsaid]


def _predict(params: PredictParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    kept = ["--all-probabilities"] if params.all_probabilities else [f"--top-k={params.top_k}"]
    words = [
        "predict",
        *_option("run", names.get("run")),
        f"--subset={params.subset or 'all'}",
        *_option("split", params.split),
        *(f"--plate={plate}" for plate in params.plates),
        *(f"--well={well}" for well in params.wells),
        *_option("where", params.where),
        *_option("limit", params.limit),
        *kept,
        *_option("embedding", params.embedding),
    ]
    return words, []


_SPELLED: dict[type, Callable[[Any, dict[str, str]], tuple[list[str], list[str]]]] = {
    SegmentParams: _segment,
    MeasureParams: _measure,
    SplitParams: _split,
    TrainParams: _train,
    BaselineParams: _baseline,
    PredictParams: _predict,
}


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
    flagged = recipe.parameters.get("leave_out_flagged")
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
