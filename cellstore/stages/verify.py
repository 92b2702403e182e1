"""Whether a store is whole: its database, the rows that jobs wrote, and all files."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from ..analysis.features import BASIC_GROUP
from ..analysis.quality import PlaneQuality
from ..artifacts import ArtifactFolder, sha256_of
from ..db.bulk import in_lists
from ..db.events import Change, broken_events, record_events
from ..enums import FeatureStorage, Stage, Status
from ..errors import ImageError, StorageError
from ..io.image_files import decode_tiff
from ..jobs.execute import cores
from ..jobs.queue import close_dead_runs
from ..jobs.runs import digest, digest_of_numbers
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Image,
    ImageQuality,
    Job,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Well,
)
from ..query.feature_files import FileFacts, stream_ids
from ..settings import track


@dataclass(frozen=True)
class Problem:
    """What is not as it should be: a file, or the database (its address), or an image of it.

    ``path`` of a file is relative to the artifacts folder.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """What was found. ``orphans`` are files that no row names; ``young`` may still get a row.

    ``segmentations`` are those whose masks are known, ``feature_files`` the files of feature sets,
    ``jobs`` those whose rows were compared with their digest.
    """

    files: int
    segmentations: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    young: int
    removed: int
    feature_files: int = 0
    jobs: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (orphans that were removed are not)."""
        return not self.problems and len(self.orphans) == self.removed


FILES_BATCH = 200
CHANGED = "the file is not what was written (sha256 differs)"


@dataclass(frozen=True)
class _File:
    """A stored file. ``cells``: of each segmentation that it is the mask of, image and numbers."""

    path: str
    sha256: str
    cells: tuple[tuple[str, list[int]], ...]


def check_files(workspace: Workspace) -> tuple[int, int, list[Problem]]:
    """Count the stored files and the segmentations with masks, and say what is wrong with them.

    Reading, hashing and unpacking leave Python's lock alone, so threads share the work.
    """
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(Artifact)) or 0
        masks = session.scalar(select(func.count(Segmentation.mask_artifact_id))) or 0
    problems: list[Problem] = []
    for found in track(workspace.progress, "verify files", total, _checked(workspace)):
        problems += found
    return total, masks, problems


def _checked(workspace: Workspace) -> Iterator[list[Problem]]:
    """Yield what is wrong with each file, a few files ahead of the reader."""
    waiting: deque[Future[list[Problem]]] = deque()
    threads = max(2, cores())
    with ThreadPoolExecutor(threads) as pool:
        for file in _files(workspace):
            waiting.append(pool.submit(_check, workspace.artifacts, file))
            if len(waiting) >= 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _files(workspace: Workspace) -> Iterator[_File]:
    last = 0
    columns = (Artifact.id, Artifact.path, Artifact.sha256)
    query = select(*columns).order_by(Artifact.id).limit(FILES_BATCH)
    cells_of_masks = (
        select(Segmentation.mask_artifact_id, Segmentation.id, Plate.barcode, Image.core_name)
        .add_columns(Cell.object_number)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
        .order_by(Segmentation.id, Cell.object_number)
    )
    while True:
        with workspace.database.read() as session:
            files = session.execute(query.where(Artifact.id > last)).all()
            ids = [row.id for row in files]
            of_files = cells_of_masks.where(Segmentation.mask_artifact_id.in_(ids))
            rows = session.execute(of_files).all()
        if not files:
            return
        cells: dict[int | None, list[tuple[str, list[int]]]] = {}
        for (mask, _, barcode, core), group in groupby(rows, key=lambda row: row[:4]):
            numbers = [row.object_number for row in group if row.object_number is not None]
            cells.setdefault(mask, []).append((f"{barcode}/{core}", numbers))
        yield from (_File(row.path, row.sha256, tuple(cells.get(row.id, ()))) for row in files)
        last = ids[-1]


def _check(folder: ArtifactFolder, file: _File) -> list[Problem]:
    """Say what is wrong with a file: its bytes, or the cells in a mask."""
    try:
        if not file.cells:
            found = sha256_of(folder.locate(file.path))
            return [] if found == file.sha256 else [Problem(file.path, CHANGED)]
        data = folder.locate(file.path).read_bytes()
    except FileNotFoundError:
        return [Problem(file.path, "the file is gone")]
    except StorageError as error:
        return [Problem(file.path, str(error))]
    except OSError as error:
        return [Problem(file.path, f"the file cannot be read ({error.strerror})")]
    if hashlib.sha256(data).hexdigest() != file.sha256:
        return [Problem(file.path, CHANGED)]
    try:
        inside = labels_inside(decode_tiff(data))
    except ImageError as error:
        return [Problem(file.path, f"{image}: {error}") for image, _ in file.cells]
    return [
        Problem(
            file.path,
            f"{image}: the mask has {len(inside)} cells, the database {len(numbers)}, "
            "or other labels",
        )
        for image, numbers in file.cells
        if not np.array_equal(inside, numbers)
    ]


def labels_inside(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Return the labels of ``masks`` (H, W) but 0, ascending."""
    small = masks.dtype.kind == "u" and masks.dtype.itemsize <= 2
    found = np.flatnonzero(np.bincount(masks.ravel())) if small else np.unique(masks)
    labels: NDArray[np.int64] = found[found != 0].astype(np.int64)
    return labels


@dataclass(frozen=True)
class _Features:
    """A file of a feature set, what the database says of it, and whose cells it may hold."""

    path: str
    name: str
    recorded: FileFacts
    recipe_id: int


def check_features(workspace: Workspace, broken: set[str]) -> tuple[int, list[Problem]]:
    """Count the files of feature sets, and say which do not fit their cells."""
    query = (
        select(Artifact.path, FeatureSet.name, FeatureSet.recipe_id)
        .add_columns(FeatureFile.n_rows, FeatureFile.first_cell_id, FeatureFile.last_cell_id)
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .order_by(FeatureSet.recipe_id, FeatureFile.first_cell_id, Artifact.path)
    )
    with workspace.database.read() as session:
        files = [
            _Features(path, name, FileFacts(*recorded), recipe_id)
            for path, name, recipe_id, *recorded in session.execute(query)
        ]
    problems = []
    whole = [file for file in files if file.path not in broken]
    for file, earlier in track(
        workspace.progress, "verify features", len(whole), _with_earlier(whole)
    ):
        reason = _features_reason(workspace, file, earlier)
        if reason is not None:
            problems.append(Problem(file.path, f"feature set {file.name}: {reason}"))
    return len(files), problems


def _with_earlier(files: Sequence[_Features]) -> Iterator[tuple[_Features, list[_Features]]]:
    """Yield files, by set and first cell, with those before whose range reaches into theirs."""
    near: list[_Features] = []
    for file in files:
        first = file.recorded.first_cell_id
        near = [
            other
            for other in near
            if other.recipe_id == file.recipe_id and other.recorded.last_cell_id >= first
        ]
        yield file, near
        near = [*near, file]


def _features_reason(
    workspace: Workspace, file: _Features, earlier: Sequence[_Features]
) -> str | None:
    locate = workspace.artifacts.locate
    facts, homeless, twice = FileFacts(0, 0, 0), 0, 0
    try:
        others = [stream_ids(locate(other.path)) for other in earlier]
        taken = np.concatenate([np.empty(0, np.int64), *chain.from_iterable(others)])
        for ids in stream_ids(locate(file.path)):
            facts = facts.with_ids(ids)
            homeless += len(ids) - _cells_among(workspace, file.recipe_id, ids)
            twice += int(np.isin(ids, taken).sum())
    except StorageError as error:
        return str(error)
    if facts != file.recorded:
        return f"the file has {facts}, the database {file.recorded}"
    if twice:
        return f"{twice} of its cells are in another file of the set, too"
    return f"{homeless} of its cells are not in the database" if homeless else None


def _cells_among(workspace: Workspace, recipe_id: int, ids: NDArray[np.int64]) -> int:
    """How many of these ascending ids are cells of the segmentations that the set is of."""
    source = select(RecipeInput.input_id).where(RecipeInput.recipe_id == recipe_id)
    of_recipe = select(Segmentation.id).where(Segmentation.recipe_id.in_(source))
    there = select(Cell.id, Cell.segmentation_id).where(Cell.id.between(int(ids[0]), int(ids[-1])))
    # Cells first, then their segmentations: a join would walk all cells of the recipe, each time.
    with workspace.database.read() as session:
        homes = {row.id: row.segmentation_id for row in session.execute(there)}
        right: set[int] = set()
        for some in in_lists(set(homes.values())):
            right.update(session.scalars(of_recipe.where(Segmentation.id.in_(some))))
    cells = [cell for cell, home in homes.items() if home in right]
    return int(np.isin(ids, cells).sum())


JOBS_BATCH = 200


def check_rows(workspace: Workspace) -> tuple[int, list[Problem]]:
    """Count the jobs whose rows are in the database, and say whose are not what the job wrote.

    What a job wrote into files is not looked at here: files have digests of their own.
    """
    in_files = select(FeatureSet.recipe_id).where(FeatureSet.storage == FeatureStorage.FILES)
    which = and_(Job.status == Status.DONE, Job.digest.is_not(None), Job.recipe_id.not_in(in_files))
    query = (
        select(Job.id, Job.image_id, Job.recipe_id, Job.run_id, Job.content_sha256, Job.digest)
        .add_columns(Recipe.stage, Plate.barcode, Image.core_name)
        .join(Recipe, Recipe.id == Job.recipe_id)
        .join(Image, Image.id == Job.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(which)
        .order_by(Job.id)
        .limit(JOBS_BATCH)
    )
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(Job).where(which)) or 0
    problems: list[Problem] = []
    last = 0
    workspace.progress.start("verify rows", total)
    try:
        while True:
            with workspace.database.read() as session:
                jobs = session.execute(query.where(Job.id > last)).all()
                problems += [
                    Problem(
                        f"{job.barcode}/{job.core_name}",
                        f"rows of {job.stage.value} recipe {job.recipe_id} are not what its job "
                        f"{job.id} (run {job.run_id}) wrote (digest differs)",
                    )
                    for job in jobs
                    if _digest_of_rows(session, job) != job.digest
                ]
            if not jobs:
                return total, problems
            last = jobs[-1].id
            workspace.progress.advance(len(jobs))
    finally:
        workspace.progress.finish()


def _digest_of_rows(session: Session, job: Any) -> str:
    """The digest of a job's rows as they are now, made as ``digest`` of its stage makes it."""
    cells = (
        select(Cell.id)
        .join(Segmentation, Segmentation.id == Cell.segmentation_id)
        .where(Segmentation.image_id == job.image_id)
        .where(func.coalesce(Segmentation.content_sha256, job.content_sha256) == job.content_sha256)
    )  # null: another tool found the cells, and does not say in which bytes
    match job.stage:
        case Stage.SEGMENT:
            mask, flow = aliased(Artifact), aliased(Artifact)
            found = session.execute(
                select(Segmentation.id, mask.sha256, flow.sha256, Segmentation.diameter)
                .outerjoin(mask, mask.id == Segmentation.mask_artifact_id)
                .outerjoin(flow, flow.id == Segmentation.flow_artifact_id)
                .where(Segmentation.image_id == job.image_id)
                .where(Segmentation.recipe_id == job.recipe_id)
                .where(Segmentation.content_sha256 == job.content_sha256)
            ).one_or_none()
            if found is None:
                return ""
            names = [c.name for c in Cell.__table__.columns if c.name not in CELL_KEYS]
            rows = session.execute(
                select(*(getattr(Cell, name) for name in names))
                .where(Cell.segmentation_id == found.id)
                .order_by(Cell.object_number)
            )
            return digest([*found[1:], [dict(zip(names, row, strict=True)) for row in rows]])
        case Stage.MEASURE:
            columns = [getattr(CellFeatures, feature.name) for feature in BASIC_GROUP.features]
            values = session.execute(
                select(*columns)
                .where(CellFeatures.recipe_id == job.recipe_id, CellFeatures.cell_id.in_(cells))
                .order_by(CellFeatures.cell_id)
            )
            table = np.array([tuple(row) for row in values], dtype=np.float64)
            return digest_of_numbers(table.reshape(-1, len(columns)).T)
        case Stage.PREDICT:
            answers = session.execute(
                select(Prediction.label_id, Prediction.probability)
                .where(Prediction.run_id == job.run_id, Prediction.cell_id.in_(cells))
                .order_by(Prediction.cell_id, Prediction.rank)
            ).all()
            labels, probabilities = zip(*answers, strict=True) if answers else ((), ())
            return digest_of_numbers(np.array(labels), np.array(probabilities))
        case _:
            names = [field.name for field in fields(PlaneQuality)]
            measured = session.execute(
                select(ImageQuality.channel, *(getattr(ImageQuality, name) for name in names))
                .where(ImageQuality.image_id == job.image_id)
                .where(ImageQuality.recipe_id == job.recipe_id)
                .where(ImageQuality.content_sha256 == job.content_sha256)
            )
            return digest(sorted(list(row) for row in measured))


CELL_KEYS = ("id", "segmentation_id")
BATCH = 500
GRACE_MINUTES = 10.0


def verify(
    workspace: Workspace, *, fix: bool = False, minutes: float = GRACE_MINUTES
) -> VerifyResult:
    """Look at the database, and compare rows and files with their digests; look for orphans.

    Masks and features are compared with their cells, and events must be the chain they were.

    ``fix`` removes the orphans: files left by a crash between writing a file and its row. Files
    younger than ``minutes`` are left alone, as a running command may be about to name them.
    """
    broken = [
        Problem(workspace.database.shown, reason)
        for reason in workspace.database.damage(quick=False)
    ]
    # The folder is listed before the rows are read: what a running command adds is no orphan.
    before = min(time.time() - 60 * minutes, _oldest_running(workspace))
    there = list(workspace.artifacts.walk())
    files, masks, problems = check_files(workspace)
    problems = _still_named(workspace, problems)
    features, odd = check_features(workspace, {problem.path for problem in problems})
    jobs, changed = check_rows(workspace)
    with workspace.database.read() as session:
        events = [Problem(workspace.database.shown, reason) for reason in broken_events(session)]
    unnamed = _unnamed(workspace, there)
    old = [path for path in unnamed if _older(workspace.artifacts, path, before)]
    removed = sum(_remove(workspace.artifacts, path) for path in old) if fix else 0
    if removed:
        with workspace.database.begin() as session:
            record_events(
                session, [Change("artifacts", None, {"path": path}, None) for path in old]
            )
    return VerifyResult(
        files=files,
        segmentations=masks,
        problems=(*broken, *problems, *odd, *changed, *events),
        orphans=tuple(old),
        young=len(unnamed) - len(old),
        removed=removed,
        feature_files=features,
        jobs=jobs,
    )


def _still_named(workspace: Workspace, problems: list[Problem]) -> list[Problem]:
    """Leave out files that were forgotten meanwhile: a training replaces its state."""
    gone = set(_unnamed(workspace, [problem.path for problem in problems]))
    return [problem for problem in problems if problem.path not in gone]


def _oldest_running(workspace: Workspace) -> float:
    """Return when the oldest run began that may still be about to name its files.

    A run of more than a day ago was killed: nothing closed it.
    """
    now = datetime.now(UTC)
    query = select(func.min(Run.started_at)).where(
        Run.status == Status.RUNNING, Run.started_at > now - timedelta(days=1)
    )
    with workspace.database.begin() as session:
        close_dead_runs(session)
        found = session.scalar(query)
    return (found or now).timestamp()


def _unnamed(workspace: Workspace, there: list[str]) -> list[str]:
    unnamed: list[str] = []
    for start in range(0, len(there), BATCH):
        piece = there[start : start + BATCH]
        with workspace.database.read() as session:
            named = set(session.scalars(select(Artifact.path).where(Artifact.path.in_(piece))))
        unnamed += [path for path in piece if path not in named]
    return unnamed


def _older(folder: ArtifactFolder, path: str, moment: float) -> bool:
    try:
        return (folder.root / path).lstat().st_mtime <= moment
    except FileNotFoundError:
        return False


def _remove(folder: ArtifactFolder, path: str) -> bool:
    # Not resolved: an orphan that is a link is removed itself, never what it points to.
    try:
        (folder.root / path).unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        raise StorageError(
            f"{path} cannot be removed: {error.strerror}. Mend the permissions of the store, "
            "then run the same command again."
        ) from error
    return True
