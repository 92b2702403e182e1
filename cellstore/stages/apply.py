"""Apply: a function or a model of somebody's own looks at the cells, and what it says is kept.

An embedding, or features, become a feature set of the cells; probabilities a training that is
declared, and a predict run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from ..analysis.features import BASIC_GROUP
from ..analysis.segmentation import pick_device
from ..artifacts import ArtifactFolder, StoredFile
from ..config import THIS_PROCESS, ApplyParams, ImageInput, Resources, Selection, option_of
from ..db.bulk import insert_new
from ..enums import (
    PROJECTION_CHANNEL,
    ArtifactKind,
    FeatureStorage,
    Gives,
    Projection,
    Stage,
    Status,
    Subset,
)
from ..errors import CellstoreError, ImageError, UserInputError, some_of
from ..io.image_files import decode_tiff, project
from ..jobs.execute import NO_MEMORY, ImageStage, RunCounter, execute, run_jobs
from ..jobs.lookup import (
    IS_CURRENT,
    find_channels,
    find_recipe,
    find_split,
    first_of,
    images_of,
    in_recipes,
)
from ..jobs.planes import ChannelFile, channel_files, choose_files, lacking_channels, open_file
from ..jobs.queue import JobScope, Task, among, count_images, requeue
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
from ..learn.branches import IMAGE, MASK
from ..learn.normalising import Scaler, add_plates, fit_inputs
from ..models import (
    Artifact,
    FeatureSet,
    Image,
    ImageFile,
    Job,
    Plate,
    Prediction,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
    Well,
)
from ..notebooks import Shown
from ..query.cells import (
    CellRows,
    CellSource,
    choose_recipes,
    current_segmentation,
    feature_leak,
    last_with_masks,
    plate_of,
    read_cells,
    read_masks,
)
from ..query.feature_files import (
    ROWS_OF_FILE,
    WrittenFile,
    forget_lost_files,
    images_of_lost_files,
    images_per_file,
    open_set,
    register_files,
    set_of_recipe,
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
    PredictionRows,
    check_alone,
    insert_predictions,
    latest_run,
    measured_images,
    unfinished,
)

if TYPE_CHECKING:
    from ..learn.crops import CellCrops
    from ..learn.functions import OwnFunction

VERSION = 1

NO_BOXES = (
    "The boxes of these cells are unknown, so they cannot be cut out of the image. "
    "If you have their masks, run: cellstore ingest masks DIR"
)

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
    """Let a function look at the cells of some images, and keep the numbers that it returns.

    ``function``: a function, a module of torch, an estimator of scikit-learn, ``module:name``, or
    the path of an ONNX file. A function gets one argument, a dictionary of the N cells of a batch,
    all of one image:

    - ``image`` (N, C, S, S) float32: the crops of C channels, from -1 (black) to about 1;
    - ``mask`` (N, 1, S, S) float32: the share of each pixel that is of the cell;
    - ``features`` (N, F) float64: measurements, as measured or scaled;
    - ``cell_id`` (N,) int64.

    Only what was asked for is there. A network gets tensors of the first three, in this order. It
    returns an array (N, D), or a table of N rows with names of columns, or (N, K) probabilities in
    the order of the classes of the split (those of its training subset, sorted: ``classes`` of
    ``Store.dataset``), or a dictionary by class. ``parameters`` are kept with the recipe.

    An interrupted call is completed by the same call. A feature set gets images that are new;
    probabilities of another selection of images are another run.

    Raises:
        UnknownNameError: no such split, segmentation, channel, feature set or plate.
        UserInputError: the function is not there, was fitted with other columns or classes, cannot
            do the first images, or the feature set is there already and was made otherwise.
        MissingExtraError: an ONNX file, and its runtime is not installed.
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
    notes = plan.notes
    if own.reference is None and resources != THIS_PROCESS:
        notes.append(
            f"{own.name} is known in this process only, so it worked alone. For more workers, put "
            "it into a module, and name it: module:name"
        )
        resources = THIS_PROCESS
    if plan.split is not None and params.gives is Gives.PROBABILITIES:
        return _label(workspace, plan, params, resources)
    return _describe(workspace, plan, params, resources)


@dataclass(frozen=True)
class _Plan:
    """What is to be done: ``images`` by ``stage``; ``parameters`` and ``inputs`` of the recipe.

    ``planes``: whose intensities are scaled plate by plate, by those of ``split`` where there is
    one. ``classes``: label ids by class, in the order in which a function returns them. ``unseen``:
    no image is opened.
    """

    images: Select[int]
    stage: Apply
    parameters: dict[str, Any]
    inputs: tuple[Recipe, ...]
    planes: tuple[ImageInput, ...]
    split: Split | None
    classes: dict[str, int]
    unseen: bool
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
    selected = images_of(session, Selection(params.plates, params.wells, params.where))
    if split is not None and (subset != "all" or labels):
        members = select(SplitMember.image_id).where(SplitMember.split_id == split.id)
        if subset != "all":
            members = members.where(SplitMember.subset == Subset(subset))
        selected = selected.where(Image.id.in_(members))
    if params.limit is not None:
        selected = first_of(session, selected, params.limit)
    n_selected = session.scalar(
        select(func.count()).select_from(Image).where(Image.id.in_(selected))
    )
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
        if odd and own.classes == [str(number) for number in range(len(learned))]:
            own.labels, odd = tuple(learned), []  # it was fitted on positions
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
    planes: tuple[ImageInput, ...] = ()
    if channels and params.intensity == "plate":
        planes = tuple(ImageInput((channel,)) for channel in channels)
    stage = Apply(
        workspace.artifacts,
        function=own,
        source=source,
        columns=columns,
        channels=channels,
        crop=params.crop,
        mask=params.mask,
        scaler=scaler,
        in_order=n_learned,
    )
    unseen, number = not pixels, n_selected or 0
    return _Plan(
        images, stage, described, tuple(inputs), planes, split, classes, unseen, number, notes
    )


def _check_options(own: OwnFunction, params: ApplyParams, *, image: bool) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserInputError: there is one.
    """
    if own.is_estimator and params.mask:
        raise UserInputError("An estimator of scikit-learn reads measurements only: no --mask.")
    for option, used in (("channels", image), ("intensity", image), ("crop", image or params.mask)):
        if not used and getattr(params, option) != option_of(ApplyParams, option).default:
            raise UserInputError(f"{own.name} is given no crops: leave --{option} out.")


def _channels(session: Session, images: Select[int], named: Sequence[str]) -> tuple[str, ...]:
    """The channels of the crops as recipes call them; default: all of the images."""
    if not named:
        query = select(ImageFile.channel).where(ImageFile.image_id.in_(images))
        query = query.where(ImageFile.channel != PROJECTION_CHANNEL).group_by(ImageFile.channel)
        named = session.scalars(
            query.order_by(func.min(ImageFile.position), ImageFile.channel)
        ).all()
    chosen = in_recipes(session, find_channels(session, tuple(named)))
    if len(set(chosen)) < len(chosen) or not chosen:
        raise UserInputError("Name each channel of the crops once: --channels A,B.")
    return chosen


def _with_scales(workspace: Workspace, plan: _Plan, recipe_id: int) -> Apply:
    """The stage, with the intensities of plates that become 1 in crops.

    Those that an earlier run of the recipe has used stay as they are when images are added.
    """
    if not plan.planes:
        return plan.stage
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
            scales = fit_inputs(session, workspace.database, training, None, plan.planes)
        scales = add_plates(session, workspace.database, source, plan.planes, scales, new)
    known = {**(scales.intensities or {}), **known}
    text = json.dumps({name: list(known[name]) for name in barcodes}, sort_keys=True, indent=1)
    kept = workspace.artifacts.write(ArtifactKind.CHECKPOINT, text.encode(), ".json")
    return replace(plan.stage, intensities=json.loads(text), scales=kept)


def _try(workspace: Workspace, plan: _Plan, stage: Apply) -> list[str]:
    """Ask the function about a few cells, before anything is written; return its columns.

    Raises:
        UserInputError: it could not do any of the first images.
    """
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
            number = min(FEW, len(loaded.ids))
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
) -> ApplyResult:
    """Make a feature set, or complete it."""
    own = plan.stage.function
    spec = RecipeSpec(Stage.MEASURE, VERSION, plan.parameters, None, plan.inputs)
    with workspace.database.begin() as session:
        recipe = register(session, spec)
        taken = session.scalars(select(FeatureSet).where(FeatureSet.name == params.name))
        found = taken.one_or_none()
        if found is not None and found.recipe_id != recipe.id:
            old = session.get_one(Recipe, found.recipe_id).parameters
            odd = [key for key, value in plan.parameters.items() if old.get(key) != value]
            other = "of other cells, or otherwise"
            if odd and "gives" in old:
                names = " and ".join(odd).replace("fitted_on", "split")
                other = f"with {'other' if names.endswith('s') else 'another'} {names}"
            raise UserInputError(
                f"Feature set {params.name!r} is there already, and was made {other}. Give "
                "another --name."
            )
        counted = count_images(session, recipe.id, plan.images, unseen=plan.unseen)
        together = images_per_file(session, plan.inputs[0].id, ROWS_OF_FILE)
        lost = images_of_lost_files(session, workspace.artifacts, recipe.id)
        columns = None if found is None else [str(c["name"]) for c in found.columns]
    stage = plan.stage
    if counted.todo or lost is not None:
        stage = _with_scales(workspace, plan, recipe.id)
        columns = columns or _try(workspace, plan, stage)
        more: dict[str, Any] = {"images_per_file": together, "expected": tuple(columns)}
        stage = replace(stage, name=params.name, **more)
    kept = {"feature_set": params.name, "note": params.note, **code_of_caller()}
    (did,) = execute(
        workspace, stage, [recipe], plan.images, resources, result=kept, unseen=plan.unseen
    )
    return ApplyResult(
        run_id=did.run_id,
        name=params.name,
        gives=params.gives,
        function=own.name,
        selected=plan.selected,
        waiting=plan.selected - did.selected + did.waiting,
        earlier=did.selected - did.waiting - did.done - len(did.failures) - did.failed_before,
        done=did.done,
        failures=did.failures,
        cells=did.cells,
        failed_before=did.failed_before,
        feature_set=params.name,
        columns=None if columns is None else len(columns),
        notes=tuple(plan.notes),
    )


def _label(
    workspace: Workspace, plan: _Plan, params: ApplyParams, resources: Resources
) -> ApplyResult:
    """Make a predict run that is whole, and the training that is declared of its model."""
    own, split, images = plan.stage.function, plan.split, plan.images
    notes = list(plan.notes)
    assert split is not None
    said = {"function": plan.parameters["function"], "parameters": plan.parameters["parameters"]}
    with workspace.database.begin() as session:
        train = declared_training(session, split, params, said)
        inputs = (register(session, train), *plan.inputs)
        recipe = register(
            session, RecipeSpec(Stage.PREDICT, VERSION, plan.parameters, None, inputs)
        )
        latest = latest_run(session, recipe.id)
        counted = count_images(session, recipe.id, images, unseen=plan.unseen)
    check_not_withdrawn(latest)
    ready = counted.selected - counted.waiting
    if latest is not None and latest.status is Status.DONE:
        did, train_run_id = RunCounter(latest.id, recipe.id), latest.parent_id
    else:
        stage = replace(
            _with_scales(workspace, plan, recipe.id),
            classes=tuple(plan.classes),
            label_ids=tuple(plan.classes.values()),
            top_k=params.top_k,
        )
        _try(workspace, plan, stage)
        kept = {"labels": list(plan.classes), "note": params.note}
        train_run_id = declare_training(workspace, train, split.id, kept)
        with running(
            workspace.database,
            recipe,
            parent_id=train_run_id,
            split_id=split.id,
            resume=None if latest is None else latest.id,
            device=own.device,
        ) as current:
            if latest is None:
                check_alone(workspace, recipe.id, current.id)
            scope = JobScope({recipe.id: current.id}, images, plan.unseen)
            with workspace.database.begin() as session:
                # A run is whole or not finished: what failed is tried again.
                requeue(session, Job.recipe_id == recipe.id, among(images))
            did = run_jobs(workspace, stage, scope, resources)[recipe.id]
            labelled = and_(Prediction.run_id == current.id, Prediction.rank == 1)
            with workspace.database.read() as session:
                cells = session.scalar(select(func.count()).where(labelled))
            current.result = {"images": ready - len(did.failures), "failed": len(did.failures)}
            current.result |= {"cells": cells, "note": params.note, **code_of_caller()}
            if did.failures:
                current.error = unfinished(did)
    if params.trained_on is None:
        notes.append(NOT_DECLARED)
    return ApplyResult(
        run_id=did.run_id,
        name=params.name,
        gives=params.gives,
        function=own.name,
        selected=plan.selected,
        waiting=plan.selected - ready,
        earlier=ready - did.images - len(did.failures),
        done=did.images,
        failures=tuple(did.failures),
        cells=did.cells,
        train_run_id=train_run_id,
        split=split.name,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class ApplyInput:
    """What a worker needs of an image: its cells, its masks (path, sha256) and its channels."""

    plate: str
    rows: CellRows
    mask: tuple[str, str] | None
    files: tuple[ChannelFile, ...]


@dataclass(frozen=True)
class LoadedCells:
    """The N cells of an image: ``ids`` (N,), crops and ``features`` (N, F), if they are given.

    Crops are resized when they are needed, a batch at a time.
    """

    ids: NDArray[np.int64]
    crops: CellCrops | None
    features: NDArray[Any] | None


@dataclass(frozen=True)
class ApplyOutput:
    """What was said of the N cells of an image: ``values`` (N, D), or ``rows`` of predictions."""

    cell_ids: NDArray[np.int64]
    values: NDArray[Any]
    rows: PredictionRows | None = None


@dataclass(frozen=True)
class Apply(ImageStage[ApplyInput, ApplyOutput]):
    """The stage. ``columns``: the measurements that are given, by ``scaler`` if they are scaled.

    ``intensities``: by plate those of the channels that become 1, which are kept as ``scales``. Of
    a feature set: its ``name``, and the ``expected`` columns; of labels: the ``classes`` with their
    ``label_ids``, the first ``in_order`` of which an array has.
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

    def load(self) -> None:
        """Find the function, and put a network on its device."""
        self.function.load()

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, ApplyInput | CellstoreError]:
        """Return by image id its cells with their measurements, its masks and its files."""
        files = channel_files(session, [task.image_id for task in tasks]) if self.channels else {}
        reader, found = self.source.reader(), dict[int, ApplyInput | CellstoreError]()
        for task in tasks:
            image = task.image_id
            try:
                rows = read_cells(session, self.source, image, self.columns, reader)
                mask, chosen = None, list[ChannelFile]()
                if (self.channels or self.mask) and len(rows.cell_ids):
                    now = current_segmentation(session, self.source.segment_id, image)
                    if now.mask_artifact_id is None or rows.boxes is None:
                        read_masks(session, self.artifacts, now)  # says what to do
                        raise ImageError(NO_BOXES)
                    file = session.get_one(Artifact, now.mask_artifact_id)
                    mask = (file.path, file.sha256)
                    chosen = choose_files(files.get(image, []), ImageInput(self.channels))
                found[image] = ApplyInput(plate_of(session, image), rows, mask, tuple(chosen))
            except (ImageError, UserInputError) as error:  # it lacks a channel, or masks
                found[image] = error
        return found

    def read(self, task_input: ApplyInput) -> LoadedCells:
        """Cut the cells of an image out."""
        rows, crops = task_input.rows, None
        features: NDArray[Any] | None = None
        if task_input.mask is not None and rows.boxes is not None:
            from ..learn.crops import CellCrops, Pictures, cut_crops

            masks = decode_tiff(self.artifacts.read(*task_input.mask))
            planes = [project([open_file(file)], Projection.MEDIAN) for file in task_input.files]
            scales = None if self.intensities is None else self.intensities[task_input.plate]
            pictures = Pictures(
                masks,
                None,
                # The mask is cut without intensities of the cell.
                np.zeros(masks.shape, np.uint8) if self.mask else None,
                tuple(planes),
                None if scales is None else (0.0, *scales),
            )
            sizes, layers = cut_crops(pictures, rows.boxes, rows.labels)
            none = np.empty((len(sizes), 0), np.float32)
            crops = CellCrops(sizes, layers, none, rows.labels, rows.cell_ids)
        if self.columns:
            features = rows.features
            if self.scaler is not None:
                features = self.scaler.transform(rows.features, task_input.plate)
        return LoadedCells(rows.cell_ids, crops, features)

    def give(self, cells: LoadedCells, piece: slice) -> dict[str, Any]:
        """Return what the function is given of some cells of an image."""
        # A copy: whose cells these are does not change with what a function does to it.
        batch: dict[str, Any] = {"cell_id": cells.ids[piece].copy()}
        if cells.crops is not None:
            from ..learn.crops import crop_cells

            some = cells.crops.take(np.arange(len(cells.ids))[piece])
            crops = crop_cells(some, self.crop, self.function.crops_on).crops
            if self.channels:
                batch["image"] = crops[IMAGE]
            if self.mask:
                batch["mask"] = (crops[MASK][:, :1] + 1) / 2
        if cells.features is not None:
            batch["features"] = cells.features[piece]
        return batch

    def ask(self, cells: LoadedCells, number: int) -> tuple[list[str], NDArray[Any]]:
        """Return the names of the columns, or the classes, and the numbers (N, D) of N cells.

        These are the first of an image.

        Raises:
            ImageError: the function ended with an error, or returned something else.
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

    def compute(self, loaded: LoadedCells) -> ApplyOutput:
        """Return what the function says of the cells."""
        if number := len(loaded.ids):
            names, values = self.ask(loaded, number)
        else:
            names, values = list(self.classes), np.empty((0, len(self.expected)), np.float32)
        rows = self._rows(loaded.ids, names, values) if self.classes else None
        return ApplyOutput(loaded.ids, values, rows)

    def _rows(
        self, ids: NDArray[np.int64], names: Sequence[str], values: NDArray[Any]
    ) -> PredictionRows:
        """The most probable classes of each cell, of equals the first by name, as rows."""
        by_class = dict(zip(self.classes, self.label_ids, strict=True))
        order = sorted(range(len(names)), key=names.__getitem__)
        sorted_values = values[:, order] if len(ids) else np.empty((0, len(order)))
        labels = np.array([by_class[names[index]] for index in order], dtype=np.int64)
        best = np.argsort(-sorted_values, axis=1, kind="stable")[:, : self.top_k]
        kept = best.shape[1]
        chosen = np.take_along_axis(sorted_values, best, axis=1).astype(np.float64)
        return PredictionRows(
            np.repeat(ids, kept),
            np.tile(np.arange(1, kept + 1), len(ids)),
            labels[best].ravel(),
            np.clip(chosen, 0.0, 1.0).ravel(),
        )

    def write_together(
        self, run: RunCounter, done: Sequence[tuple[Task, ApplyOutput]]
    ) -> Sequence[WrittenFile]:
        """Write the numbers of some images."""
        if self.classes:
            return ()
        kind = pa.float32() if self.function.gives is Gives.EMBEDDING else pa.float64()
        schema = pa.schema([(name, kind) for name in self.expected])
        ids = [output.cell_ids for _, output in done]
        return write_features(self.artifacts, schema, ids, [o.values.T for _, o in done])

    def digest(self, recipe_id: int, output: ApplyOutput) -> str:
        """Return the digest of the rows of an image, or of its cell ids and numbers."""
        if output.rows is not None:
            return output.rows.digest()
        return digest_of_numbers(output.cell_ids, output.values)

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, ApplyOutput]],
        files: Sequence[WrittenFile],
    ) -> int:
        """Write the predictions, or the rows of the files; the first ones make the feature set.

        Raises:
            UserInputError: another command has made a set of this name.
        """
        if self.scales is not None:
            keep_files(session, [self.scales], run.run_id)
        if self.classes:
            insert_predictions(session, run.run_id, (o.rows for _, o in done if o.rows))
        elif files:
            dtype = "float32" if self.function.gives is Gives.EMBEDDING else "float64"
            said = {"unit": "1", "source": f"cellstore apply: {self.function.name}", "formula": ""}
            said["description"] = "Made by a function that is not of cellstore."
            columns = [{"name": name, "dtype": dtype, **said} for name in self.expected]
            row = {"name": self.name, "recipe_id": run.recipe_id, "columns": columns}
            insert_new(session, FeatureSet, [{**row, "storage": FeatureStorage.FILES}])
            found = set_of_recipe(session, run.recipe_id)
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
