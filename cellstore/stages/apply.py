"""Apply: a function or a model of somebody's own looks at the cells, and what it says is kept.

An embedding, or features, become a feature set of the cells; probabilities a training that is
declared, and a predict run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ..analysis.features import BASIC_GROUP
from ..analysis.segmentation import pick_device
from ..artifacts import ArtifactFolder, StoredFile
from ..config import THIS_PROCESS, ApplyParams, ImageInput, Resources, option_of
from ..enums import (
    ArtifactKind,
    Gives,
    Stage,
    Status,
    Subset,
)
from ..errors import CellstoreError, ImageError, UserInputError, some_of
from ..jobs.execute import NO_MEMORY, ImageStage, RunCounter, execute
from ..jobs.lookup import (
    IS_CURRENT,
    find_channels,
    find_recipe,
    find_split,
    in_recipes,
)
from ..jobs.planes import lacking_channels
from ..jobs.queue import JobScope, Task, count_images
from ..jobs.runs import (
    RecipeSpec,
    digest,
    digest_of_images,
    digest_of_numbers,
    files_of,
    keep_files,
    register,
    running,
)
from ..jobs.workspace import Workspace
from ..learn.branches import IMAGE, MASK, count_channels
from ..learn.normalising import Scaler, add_plates, fit_inputs
from ..models import (
    FeatureSet,
    Image,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    Well,
)
from ..notebooks import Shown
from ..query.cells import (
    CellSource,
    choose_recipes,
    feature_leak,
    last_with_masks,
)
from ..query.feature_files import (
    ROWS_OF_FILE,
    WrittenFile,
    forget_lost_files,
    images_of_lost_files,
    images_per_file,
    make_set,
    open_set,
    register_files,
    write_features,
)
from ..query.source import check_set_name
from ..settings import need
from .own_models import (
    ADDS_UP,
    NOT_DECLARED,
    check_not_withdrawn,
    classes_of,
    code_of_caller,
    declare_training,
    declared_training,
)
from .predict import (
    CellAnswers,
    best_rows,
    check_alone,
    insert_predictions,
    label_all,
    latest_run,
    measured_images,
    select_images,
)

if TYPE_CHECKING:
    from ..learn.batches import CellView, FoundCells
    from ..learn.crops import CellCrops
    from ..learn.functions import OwnFunction

VERSION = 1

TRIED = 3
"""Images with which a function is tried before anything is written."""
FEW = 4
"""Cells of each of them."""


@dataclass(frozen=True)
class ApplyResult(Shown):
    """What a function made of the cells.

    ``run_id``: ``None`` if there was nothing to do for a feature set. ``selected`` images were
    asked for; ``waiting`` of them have no measurements or miss files, ``earlier`` were done before,
    ``failed_before`` failed before and were left alone, ``done`` are done now, with so many
    ``cells``. Of probabilities: ``train_run_id`` is the training that was declared, of ``split``;
    else ``feature_set`` has so many ``columns``. ``notes``: what a reader of the numbers should
    know.
    """

    run_id: int | None
    name: str
    gives: str
    function: str
    selected: int
    waiting: int
    earlier: int
    done: int
    failures: tuple[tuple[str, str], ...]
    cells: int
    failed_before: int = 0
    train_run_id: int | None = None
    split: str | None = None
    feature_set: str | None = None
    columns: int | None = None
    notes: tuple[str, ...] = ()


def apply(
    workspace: Workspace,
    function: Any,
    params: ApplyParams,
    *,
    device: str = "auto",
    resources: Resources = THIS_PROCESS,
    parameters: Mapping[str, Any] | None = None,
) -> ApplyResult:
    """Let a function look at the cells of some images; see ``Store.apply``.

    An interrupted call is completed by the same call. A feature set gets images that are new;
    probabilities of another selection of images are another run.
    """
    need("train")
    from ..learn.functions import find_function

    own = find_function(function)
    own.gives, own.softmax = params.gives, params.softmax
    own.batch_size = params.batch_size
    own.device = str(pick_device(device))
    if params.gives is not Gives.PROBABILITIES:
        check_set_name(params.name, "--name")
    with workspace.database.read() as session:
        plan = _plan(session, workspace, own, params, dict(parameters or {}))
    if own.reference is None and resources != THIS_PROCESS:
        plan.notes.append(
            f"{own.name} is known in this process only, so it worked alone. For more workers, put "
            "it into a module, and name it: module:name"
        )
        resources = THIS_PROCESS
    make = _label if params.gives is Gives.PROBABILITIES else _describe
    made = make(workspace, plan, params, resources)
    return ApplyResult(
        name=params.name,
        gives=params.gives,
        function=own.name,
        selected=plan.selected,
        notes=tuple(plan.notes),
        **made,
    )


class _Plan(NamedTuple):
    """What is to be done: ``images`` by ``stage``, by the recipe ``spec``.

    ``split``: whose classes, subsets or scales are meant. ``selected``: how many images were asked
    for.
    """

    images: Select[int]
    stage: Apply
    spec: RecipeSpec
    split: Split | None
    selected: int
    notes: list[str]


def _plan(
    session: Session,
    workspace: Workspace,
    own: OwnFunction,
    params: ApplyParams,
    more: dict[str, Any],
) -> _Plan:
    labels = params.gives is Gives.PROBABILITIES
    subset = params.subset or ("test" if labels else "all")
    split = None
    if labels or params.scaled or params.split or subset != "all":
        split = find_split(session, params.split)

    # What it is given.
    image = params.image and not own.is_estimator
    measured = params.features is not None or not (image or params.mask)
    _check_options(own, params, image=image)
    name = None if params.features == BASIC_GROUP.name else params.features
    measure = None
    if measured:
        segment, measure = choose_recipes(session, params.segmentation, None, name)
        found = open_set(session, workspace.artifacts, measure.id)
        source = CellSource(segment.id, measure.id, features=found, annotated=True)
    else:
        if params.segmentation is None:
            segment = last_with_masks(session)
        else:
            segment = find_recipe(session, Stage.SEGMENT, params.segmentation)
        source = CellSource(segment.id, None, annotated=True)

    # Which images.
    of_subset = None if subset == "all" else Subset(subset)
    of_split = split.id if split is not None and (of_subset or labels) else None
    selected, n_selected = select_images(session, params, of_split, of_subset)
    images = selected.join(Segmentation, IS_CURRENT)
    images = images.where(Segmentation.recipe_id == segment.id)
    pixels = image or params.mask
    if measured:
        images = measured_images(images, source, pixels=pixels)
    channels = _channels(session, images, params.channels) if image else ()
    images, lacking = lacking_channels(session, images, [ImageInput((c,)) for c in channels])
    notes = []
    if lacking:
        names = some_of([f"{image} ({what})" for image, what in lacking], 3)
        notes.append(f"{len(lacking):,} images were left out: {names}.")
    if session.scalar(images.where(Segmentation.n_cells > 0).limit(1)) is None:
        first = "cellstore segment, then: cellstore measure" if measured else "cellstore segment"
        raise UserInputError(
            f"None of the {n_selected} selected images has cells to look at. Choose other images, "
            f"or run: {first}"
        )

    # How it is scaled, and what makes it the same work as before.
    columns = own.choose_columns(source.features.columns) if measured else ()
    own.features, own.known = columns, own.identity()
    inputs = [segment] if measure is None else [segment, measure]
    described: dict[str, Any] = {
        "declared": params.name,
        "gives": params.gives,
        "function": own.known,
        "parameters": more,
        "columns": list(columns),
    }
    if pixels:
        described |= {"channels": list(channels), "mask": params.mask, "crop": params.crop}
    if channels:
        described["intensity"] = params.intensity
    scaler = None
    if params.scaled:
        if split is None or not measured:
            raise UserInputError("--scaled is about measurements: name some with --features NAME.")
        training = replace(source, split_id=split.id, annotated=False)
        training = replace(training, features=replace(training.features, columns=columns))
        scaler = fit_inputs(session, workspace.database, training, "train")
        described["scaler"] = digest(scaler.to_json())
        own.features = columns = scaler.names
    if split is not None and (labels or channels):
        described["fitted_on"] = split.fingerprint
    classes: dict[str, int] = {}
    n_learned = 0
    if labels and split is not None:
        known = classes_of(session, split.id)
        learned = classes_of(session, split.id, Subset.TRAIN) or known
        n_learned, classes = len(learned), learned | known  # those that it may know come first
        described |= {"images": digest_of_images(session, images)}
        same = ("softmax", "top_k", "plates", "wells", "where", "limit")
        described |= {key: getattr(params, key) for key in same}
        described["subset"] = None if subset == "all" else subset
        if measured and (mark := source.features.mark(session, segment.id, images)) is not None:
            described["feature_files"] = mark
        odd = [name for name in own.classes or () if name not in classes]
        if own.is_estimator and not hasattr(own.given, "predict_proba"):
            notes.append(f"{own.name} gives no probabilities: each of its labels counts with 1.")
        if odd:
            raise UserInputError(
                f"{own.name} knows classes that split {split.name!r} does not have: "
                f"{some_of(odd)}. The split has {some_of(list(known))}. Fit it on these, or name "
                "another --split."
            )
        if measure is not None and (leak := feature_leak(session, measure, split.id)):
            notes.append(leak)
    stage = Apply(
        workspace.artifacts,
        function=own,
        source=source,
        columns=columns,
        channels=channels,
        crop=params.crop,
        mask=params.mask,
        scaler=scaler,
        by_plate=bool(channels) and params.intensity == "plate",
        classes=tuple(classes),
        label_ids=tuple(classes.values()),
        in_order=n_learned,
        top_k=params.top_k,
    )
    of = Stage.PREDICT if labels else Stage.MEASURE
    spec = RecipeSpec(of, VERSION, described, None, tuple(inputs))
    return _Plan(images, stage, spec, split, n_selected, notes)


def _check_options(own: OwnFunction, params: ApplyParams, *, image: bool) -> None:
    """Refuse options that would do nothing."""
    if own.is_estimator and params.mask:
        raise UserInputError("An estimator of scikit-learn reads measurements only: no --mask.")
    for option, used in (("channels", image), ("intensity", image), ("crop", image or params.mask)):
        if not used and getattr(params, option) != option_of(ApplyParams, option).default:
            raise UserInputError(f"{own.name} is given no crops: leave --{option} out.")


def _channels(session: Session, images: Select[int], named: Sequence[str]) -> tuple[str, ...]:
    """The channels of the crops as recipes call them; default: all of the images."""
    named = tuple(named or count_channels(session, images))
    chosen = in_recipes(session, find_channels(session, named))
    if len(set(chosen)) < len(chosen) or not chosen:
        raise UserInputError("Name each channel of the crops once: --channels A,B.")
    return chosen


def _with_scales(workspace: Workspace, plan: _Plan, recipe_id: int) -> Apply:
    """The stage, with the intensities of plates that become 1 in crops.

    Those that an earlier run of the recipe has used stay as they are when images are added.
    """
    if not plan.stage.by_plate:
        return plan.stage
    planes = [ImageInput((channel,)) for channel in plan.stage.channels]
    source, scales = replace(plan.stage.source, annotated=False), Scaler(intensities={})
    with workspace.database.read() as session:
        known: dict[str, Any] = {}
        for run_id in session.scalars(select(Run.id).where(Run.recipe_id == recipe_id)):
            for file in files_of(session, run_id, ArtifactKind.CHECKPOINT):
                known |= json.loads(workspace.artifacts.read(file.path, file.sha256))
        on_plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id)
        on_plates = on_plates.join(Image, Image.well_id == Well.id)
        barcodes = sorted(session.scalars(on_plates.where(Image.id.in_(plan.images)).distinct()))
        new = [barcode for barcode in barcodes if barcode not in known]
        if new and plan.split is not None:
            training = replace(source, split_id=plan.split.id)
            scales = fit_inputs(session, workspace.database, training, None, planes)
        scales = add_plates(session, workspace.database, source, planes, scales, new)
    known = {**(scales.intensities or {}), **known}
    text = json.dumps({name: list(known[name]) for name in barcodes}, sort_keys=True, indent=1)
    kept = workspace.artifacts.write(ArtifactKind.CHECKPOINT, text.encode(), ".json")
    return replace(plan.stage, intensities=json.loads(text), scales=kept)


def _try(workspace: Workspace, plan: _Plan, stage: Apply) -> list[str]:
    """Ask the function about a few cells, before anything is written; return its columns."""
    with workspace.database.read() as session:
        first = plan.images.where(Segmentation.n_cells > 0).order_by(Image.id).limit(TRIED)
        tasks = [Task(int(i), "", "", {}, 0, 0) for i in session.scalars(first)]
        given = stage.fetch(session, tasks)
    stage.load()
    problem: Exception | None = None
    for task in tasks:
        item = given[task.image_id]
        try:
            if isinstance(item, CellstoreError):
                raise item
            loaded = stage.read(item)
            number = min(FEW, len(loaded))
            if number:
                return stage.ask(loaded, number)[0]
        except ImageError as error:
            problem = problem or error
        except MemoryError:
            problem = problem or ImageError(NO_MEMORY)
    raise UserInputError(
        f"None of the first {len(tasks)} images could be done, so nothing was begun. "
        f"{problem or 'They have no measured cells.'}"
    ) from problem


def _describe(
    workspace: Workspace, plan: _Plan, params: ApplyParams, resources: Resources
) -> dict[str, Any]:
    """Make a feature set, or complete it."""
    stage = plan.stage
    with workspace.database.begin() as session:
        recipe = register(session, plan.spec)
        taken = session.scalars(select(FeatureSet).where(FeatureSet.name == params.name))
        found = taken.one_or_none()
        if found is not None and found.recipe_id != recipe.id:
            old = session.get_one(Recipe, found.recipe_id).parameters
            odd = [key for key, value in plan.spec.parameters.items() if old.get(key) != value]
            raise UserInputError(
                f"Feature set {params.name!r} is there already, and was made otherwise (other "
                f"{' and '.join(odd) or 'cells'}). Give another --name."
            )
        counted = count_images(session, recipe.id, plan.images, unseen=stage.unseen)
        together = images_per_file(session, stage.source.segment_id, ROWS_OF_FILE)
        lost = images_of_lost_files(session, workspace.artifacts, recipe.id)
        columns = None if found is None else [str(c["name"]) for c in found.columns]
    if counted.todo or lost is not None:
        stage = _with_scales(workspace, plan, recipe.id)
        columns = columns or _try(workspace, plan, stage)
        stage = replace(stage, name=params.name, images_per_file=together, expected=tuple(columns))
    kept = {"feature_set": params.name, "note": params.note, **code_of_caller()}
    (did,) = execute(
        workspace, stage, [recipe], plan.images, resources, result=kept, unseen=stage.unseen
    )
    return {
        "run_id": did.run_id,
        "waiting": plan.selected - did.selected + did.waiting,
        "earlier": did.selected - did.waiting - did.done - len(did.failures) - did.failed_before,
        "done": did.done,
        "failures": did.failures,
        "cells": did.cells,
        "failed_before": did.failed_before,
        "feature_set": params.name,
        "columns": None if columns is None else len(columns),
    }


def _label(
    workspace: Workspace, plan: _Plan, params: ApplyParams, resources: Resources
) -> dict[str, Any]:
    """Make a predict run that is whole, and the training that is declared of its model."""
    stage, split, images = plan.stage, plan.split, plan.images
    assert split is not None
    details = {key: plan.spec.parameters[key] for key in ("function", "parameters")}
    with workspace.database.begin() as session:
        train = declared_training(session, split, params, details)
        inputs = (register(session, train), *plan.spec.inputs)
        recipe = register(session, replace(plan.spec, inputs=inputs))
        latest = latest_run(session, recipe.id)
        counted = count_images(session, recipe.id, images, unseen=stage.unseen)
    check_not_withdrawn(latest)
    ready = counted.selected - counted.waiting
    if latest is not None and latest.status is Status.DONE:
        did, train_run_id = RunCounter(latest.id, recipe.id), latest.parent_id
    else:
        stage = _with_scales(workspace, plan, recipe.id)
        _try(workspace, plan, stage)
        kept = {"labels": list(stage.classes), "note": params.note}
        train_run_id = declare_training(workspace, train, split.id, kept)
        with running(
            workspace.database,
            recipe,
            parent_id=train_run_id,
            split_id=split.id,
            resume=None if latest is None else latest.id,
            device=stage.device,
        ) as current:
            if latest is None:
                check_alone(workspace, recipe.id, current.id)
            scope = JobScope({recipe.id: current.id}, images, stage.unseen)
            did = label_all(workspace, stage, scope, current, resources)
            current.result |= {"note": params.note, **code_of_caller()}
    if params.trained_on is None:
        plan.notes.append(NOT_DECLARED)
    return {
        "run_id": did.run_id,
        "waiting": plan.selected - ready,
        "earlier": ready - did.images - len(did.failures),
        "done": did.images,
        "failures": tuple(did.failures),
        "cells": did.cells,
        "train_run_id": train_run_id,
        "split": split.name,
    }


@dataclass(frozen=True)
class Apply(ImageStage["FoundCells", CellAnswers]):
    """The stage. ``columns``: the measurements that are given, by ``scaler`` if they are scaled.

    ``intensities``: by plate those of the channels that become 1, which are kept as ``scales``, if
    they are scaled ``by_plate``. Of a feature set: its ``name``, and the ``expected`` columns; of
    labels: the ``classes`` with their ``label_ids``, the first ``in_order`` of which an array has.
    """

    label = "apply"

    artifacts: ArtifactFolder
    function: OwnFunction
    source: CellSource
    columns: tuple[str, ...]
    channels: tuple[str, ...]
    crop: int
    mask: bool
    scaler: Scaler | None = None
    by_plate: bool = False
    intensities: Mapping[str, Sequence[float]] | None = None
    scales: StoredFile | None = None
    images_per_file: int = 1
    name: str = ""
    expected: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = ()
    in_order: int = 0
    top_k: int = 0

    @property
    def device(self) -> str:
        """Where networks compute."""
        return self.function.device

    @property
    def unseen(self) -> bool:
        """Whether no image is opened."""
        return not (self.channels or self.mask)

    def load(self) -> None:
        """Find the function, and put a network on its device."""
        self.function.load()

    @property
    def view(self) -> CellView:
        """What the function is shown of an image."""
        from ..learn.batches import CellView

        shown = (MASK,) * self.mask + (IMAGE,) * bool(self.channels)
        return CellView(shown, self.channels)

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, FoundCells | CellstoreError]:
        """Return by image id its cells with their measurements, its masks and its files."""
        reader = self.source.reader()
        found: dict[int, FoundCells | CellstoreError] = {}
        for task in tasks:
            image = task.image_id
            try:
                found[image] = self.view.find(session, self.source, image, self.columns, reader)
            except (ImageError, UserInputError) as error:  # it lacks a channel, or masks
                found[image] = error
        return found

    def read(self, task_input: FoundCells) -> CellCrops:
        """Cut the cells of an image out; crops are resized when they are needed, in batches."""
        from ..learn.crops import CellCrops

        rows, scales = task_input.rows, None
        sizes, layers = np.zeros((len(rows.cell_ids), 2), np.int64), {}  # type: Any, Any
        if task_input.masks is not None:
            if self.intensities is not None:
                scales = (0.0, *self.intensities[task_input.plate])
            sizes, layers = self.view.cut(self.artifacts, task_input, scales)
        features: NDArray[Any] = rows.features
        if self.scaler is not None:
            features = self.scaler.transform(features, task_input.plate)
        return CellCrops(sizes, layers, features, rows.labels, rows.cell_ids)

    def give(self, cells: CellCrops, piece: slice) -> dict[str, Any]:
        """Return what the function is given of some cells of an image."""
        from ..learn.crops import crop_cells
        from ..learn.functions import NETWORK

        # A copy: whose cells these are does not change with what a function does to it.
        some = cells.take(np.arange(len(cells))[piece])
        batch: dict[str, Any] = {"cell_id": some.cell_ids}
        # Of a network on its device, since they stay there.
        device = self.device if self.function.kind == NETWORK else "cpu"
        crops = crop_cells(some, self.crop, device).crops
        if self.channels:
            batch["image"] = crops[IMAGE]
        if self.mask:
            batch["mask"] = (crops[MASK][:, :1] + 1) / 2
        if self.columns:
            batch["features"] = some.features
        return batch

    def ask(self, cells: CellCrops, number: int) -> tuple[list[str], NDArray[Any]]:
        """Return the names of the columns, or the classes, and the numbers (N, D) of N cells.

        These are the first of an image.
        """
        names, values = self.function(partial(self.give, cells), number)
        called = self.function.name
        if self.classes:
            order = list(self.classes[: self.in_order])
            if names is None and values.shape[1] != len(order):
                raise ImageError(
                    f"{called} returned {values.shape[1]} numbers for each cell, and the split has "
                    f"{len(order)} classes ({some_of(order)}): one for each, in this order."
                )
            if odd := [name for name in names or () if name not in self.classes]:
                raise ImageError(
                    f"{called} returned classes that the split does not have: {some_of(odd)}. It "
                    f"has {some_of(self.classes)}."
                )
            sums = values.sum(axis=1)
            if (values < -ADDS_UP).any() or (np.abs(sums - 1) > ADDS_UP).any():
                low, high = float(values.min()), float(values.max())
                raise ImageError(
                    f"{called} returned numbers from {low:.3g} to {high:.3g} that add up to "
                    f"{float(sums[np.argmax(np.abs(sums - 1))]):.3g} for a cell: they are "
                    "not probabilities. If they are logits, add --softmax."
                )
            return names or order, values
        kind = "embedding" if self.function.gives is Gives.EMBEDDING else "feature"
        names = names or [f"{kind}_{index:03d}" for index in range(values.shape[1])]
        plain = [name.strip().casefold() for name in names]  # SQL knows no capitals
        if len(set(plain)) < len(plain) or not {"", "cell_id"}.isdisjoint(plain):
            raise ImageError(
                f"{called} returned columns {some_of(names)}. Each needs a name of its own, which "
                "is not cell_id."
            )
        if self.expected and tuple(names) != self.expected:
            raise ImageError(
                f"{called} returned {len(names)} columns ({some_of(names, 2)}), and "
                f"{len(self.expected)} ({some_of(self.expected, 2)}) for other images."
            )
        if kind == "embedding":
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
            if np.isinf(values).any():
                raise ImageError(
                    f"{called} returned numbers above {np.finfo(np.float32).max:.1g}, more than an "
                    "embedding holds. Scale them, or add: --gives features"
                )
        return names, values

    def compute(self, loaded: CellCrops) -> CellAnswers:
        """Return what the function says of the cells."""
        ids = loaded.cell_ids
        names = list(self.classes or self.expected)
        values: NDArray[Any] = np.empty((0, len(names)), np.float32)
        if len(ids):
            names, values = self.ask(loaded, len(ids))
        rows = None
        if self.classes:
            by_class = dict(zip(self.classes, self.label_ids, strict=True))
            order = sorted(range(len(names)), key=names.__getitem__)  # of equals, the first
            labels = np.array([by_class[names[index]] for index in order], dtype=np.int64)
            rows = best_rows(ids, labels, values[:, order], self.top_k)
        return CellAnswers(ids, rows, values)

    def write_together(
        self, run: RunCounter, done: Sequence[tuple[Task, CellAnswers]]
    ) -> Sequence[WrittenFile]:
        """Write the numbers of some images."""
        if self.classes:
            return ()
        kind = pa.float32() if self.function.gives is Gives.EMBEDDING else pa.float64()
        schema = pa.schema([(name, kind) for name in self.expected])
        ids = [output.cell_ids for _, output in done]
        return write_features(self.artifacts, schema, ids, [o.values.T for _, o in done])

    def digest(self, recipe_id: int, output: CellAnswers) -> str:
        """Return the digest of the rows of an image, or of its cell ids and numbers."""
        if output.rows is not None:
            return digest_of_numbers(np.column_stack(output.rows))
        return digest_of_numbers(output.cell_ids, output.values)

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, CellAnswers]],
        files: Sequence[WrittenFile],
    ) -> int:
        """Write the predictions, or the rows of the files; the first ones make the feature set."""
        if self.scales is not None:
            keep_files(session, [self.scales], run.run_id)
        if self.classes:
            insert_predictions(session, run.run_id, (o.rows for _, o in done if o.rows))
        elif files:
            dtype = "float32" if self.function.gives is Gives.EMBEDDING else "float64"
            details = {"dtype": dtype, "source": f"cellstore apply: {self.function.name}"}
            details["description"] = "Made by a function that is not of cellstore."
            found = make_set(session, self.name, run.recipe_id, self.expected, **details)
            if found is None:
                raise UserInputError(
                    f"Another command has made feature set {self.name!r}. Give another --name."
                )
            register_files(session, self.artifacts, found.id, run.run_id, files)
        return sum(len(output.cell_ids) for _, output in done)

    def find_lost(
        self, session: Session, recipe_id: int, images: Select[int]
    ) -> Collection[int] | None:
        """Return the images whose file of numbers is gone."""
        return images_of_lost_files(session, self.artifacts, recipe_id)

    def forget_lost(self, session: Session, recipe_id: int) -> None:
        """Delete the rows of the files that are gone."""
        forget_lost_files(session, self.artifacts, recipe_id)
