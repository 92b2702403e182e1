"""Whether a store is whole: its database, the rows that jobs wrote, and all files."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from ..analysis.features import BASIC_GROUP
from ..analysis.quality import PlaneQuality
from ..artifacts import ArtifactFolder, sha256_of, sweep
from ..db.bulk import in_lists
from ..db.events import Change, broken_events, record_events
from ..enums import FeatureStorage, Stage, Status
from ..errors import ImageError, StorageError
from ..io.image_files import decode_tiff
from ..jobs.execute import cores
from ..jobs.gone_files import GoneFiles, find_gone, lost_files
from ..jobs.queue import close_dead_runs
from ..jobs.runs import digest, digest_of_numbers
from ..jobs.workspace import Workspace
from ..models import (
    Artifact,
    Cell,
    CellFeatures,
    Event,
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
from ..query.feature_files import FileContent, stream_ids
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
    ``jobs`` those whose rows were compared with their digest. ``gone``: folders from which image
    files are gone. ``commands`` make stored files again that are gone.
    """

    files: int
    segmentations: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    young: int
    removed: int
    feature_files: int = 0
    jobs: int = 0
    gone: tuple[GoneFiles, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (orphans that were removed are not)."""
        return not (self.problems or self.gone) and len(self.orphans) == self.removed


BATCH = 200
"""Rows that are looked at together."""

GRACE_MINUTES = 10.0
CELL_KEYS = ("id", "segmentation_id")
CHANGED = "the file is not what was written (sha256 differs)"


def verify(
    workspace: Workspace, *, fix: bool = False, minutes: float = GRACE_MINUTES
) -> VerifyResult:
    """Look at the database, and compare rows and files with their digests; look for orphans.

    Masks and features are compared with their cells, events must be the chain they were, and image
    files be where they were seen.

    ``fix`` removes the orphans: files left by a crash between writing a file and its row. Files
    younger than ``minutes`` are left alone, as a running command may be about to name them.

    Raises:
        StorageError: an orphan cannot be removed.
    """
    shown, folder = workspace.database.shown, workspace.artifacts
    broken = [Problem(shown, reason) for reason in workspace.database.damage(quick=False)]
    # The folder is listed before the rows are read: what a running command adds is no orphan.
    before = min(time.time() - 60 * minutes, _oldest_running(workspace))
    if fix:  # what is not whole, and whose command was killed, gets no row
        for at in (folder.root, workspace.settings.cache, workspace.settings.cache / "spill"):
            sweep(at)
    there = list(folder.walk())
    files, masks, found = check_files(workspace)
    # Some were forgotten meanwhile: a training replaces its state.
    forgotten = set(_unnamed(workspace, [problem.path for problem in found]))
    problems = [problem for problem in found if problem.path not in forgotten]
    features, odd = check_features(workspace, {problem.path for problem in problems})
    jobs, changed = check_rows(workspace)
    with workspace.database.read() as session:
        events = [Problem(shown, reason) for reason in broken_events(session)]
        gone = tuple(find_gone(session))
        commands = lost_files(session, folder)[1]
    unnamed = _unnamed(workspace, there)
    old = []
    for path in unnamed:
        with suppress(FileNotFoundError):
            if (folder.root / path).lstat().st_mtime <= before:
                old.append(path)
    if fix and old:
        for path in old:
            try:
                # Not resolved: of a link, the link is removed, never what it points to.
                (folder.root / path).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{path} cannot be removed: {error.strerror}. Mend the permissions of the "
                    "store, then run the same command again."
                ) from error
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
        removed=len(old) if fix else 0,
        feature_files=features,
        jobs=jobs,
        gone=gone,
        commands=commands,
    )


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


# --- files ----------------------------------------------------------------------------------------

_Masks: TypeAlias = list[tuple[str, list[int]]]
"""Of each segmentation that a file is the mask of: its image, and the numbers of its cells."""


def check_files(workspace: Workspace) -> tuple[int, int, list[Problem]]:
    """Count the stored files and the segmentations with masks, and say what is wrong with them.

    Reading, hashing and unpacking leave Python's lock alone, so threads share the work.
    """
    files = select(Artifact.id, Artifact.path, Artifact.sha256).order_by(Artifact.id).limit(BATCH)
    cells_of_masks = (
        select(Segmentation.mask_artifact_id, Segmentation.id, Plate.barcode, Image.core_name)
        .add_columns(Cell.object_number)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
        .order_by(Segmentation.id, Cell.object_number)
    )
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(Artifact)) or 0
        masks = session.scalar(select(func.count(Segmentation.mask_artifact_id))) or 0
    problems: list[Problem] = []
    waiting: deque[Future[list[Problem]]] = deque()
    last, threads, more = 0, max(2, cores()), True
    workspace.progress.start("verify files", total)
    try:
        with ThreadPoolExecutor(threads) as pool:
            while more or waiting:
                if more and len(waiting) < 8 * threads:
                    with workspace.database.read() as session:
                        found = session.execute(files.where(Artifact.id > last)).all()
                        ids = [row.id for row in found]
                        of_files = cells_of_masks.where(Segmentation.mask_artifact_id.in_(ids))
                        rows = session.execute(of_files).all()
                    cells: dict[int | None, _Masks] = {}
                    for (mask, _, barcode, core), group in groupby(rows, key=lambda row: row[:4]):
                        numbers = [
                            row.object_number for row in group if row.object_number is not None
                        ]
                        cells.setdefault(mask, []).append((f"{barcode}/{core}", numbers))
                    for file_id, path, sha256 in found:
                        of_file = cells.get(file_id, [])
                        waiting.append(
                            pool.submit(_check, workspace.artifacts, path, sha256, of_file)
                        )
                        last = file_id
                    more = bool(found)
                if waiting:
                    problems += waiting.popleft().result()
                    workspace.progress.advance()
    finally:
        workspace.progress.finish()
    return total, masks, problems


def _check(folder: ArtifactFolder, path: str, sha256: str, cells: _Masks) -> list[Problem]:
    """Say what is wrong with a file: its bytes, or the ``cells`` in a mask."""
    try:
        if not cells:
            return [] if sha256_of(folder.locate(path)) == sha256 else [Problem(path, CHANGED)]
        data = folder.locate(path).read_bytes()
    except FileNotFoundError:
        return [Problem(path, "the file is gone")]
    except StorageError as error:
        return [Problem(path, str(error))]
    except OSError as error:
        return [Problem(path, f"the file cannot be read ({error.strerror})")]
    if hashlib.sha256(data).hexdigest() != sha256:
        return [Problem(path, CHANGED)]
    try:
        masks = decode_tiff(data)
    except ImageError as error:
        return [Problem(path, f"{image}: {error}") for image, _ in cells]
    small = masks.dtype.kind == "u" and masks.dtype.itemsize <= 2  # counting is faster there
    inside = np.flatnonzero(np.bincount(masks.ravel())) if small else np.unique(masks)
    inside = inside[inside != 0]
    return [
        Problem(
            path,
            f"{image}: the mask has {len(inside)} cells, the database {len(numbers)}, "
            "or other labels",
        )
        for image, numbers in cells
        if not np.array_equal(inside, numbers)
    ]


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
        files = session.execute(query).all()
        of_cells = (Event.table_name == "cells", Event.new.is_(None))
        gone = (row["ids"] for row in session.scalars(select(Event.old).where(*of_cells)))
        deleted = np.array(sorted(chain.from_iterable(gone)), np.int64).reshape(-1, 2)
    problems = []
    near: list[Any] = []
    whole = [file for file in files if file.path not in broken]
    for file in track(workspace.progress, "verify features", len(whole), whole):
        # Files of the set before it whose range of cells reaches into that of this one.
        near = [
            other
            for other in near
            if other.recipe_id == file.recipe_id and other.last_cell_id >= file.first_cell_id
        ]
        reason = _features_reason(workspace, file, [other.path for other in near], deleted)
        near.append(file)
        if reason is not None:
            problems.append(Problem(file.path, f"feature set {file.name}: {reason}"))
    return len(files), problems


def _features_reason(
    workspace: Workspace, file: Any, earlier: Sequence[str], deleted: NDArray[np.int64]
) -> str | None:
    locate = workspace.artifacts.locate
    recorded = FileContent(file.n_rows, file.first_cell_id, file.last_cell_id)
    found, homeless, twice = FileContent(0, 0, 0), 0, 0
    try:
        others = [stream_ids(locate(path)) for path in earlier]
        taken = np.concatenate([np.empty(0, np.int64), *chain.from_iterable(others)])
        for ids in stream_ids(locate(file.path)):
            found = found.with_ids(ids)
            lost = ids[~_are_cells(workspace, file.recipe_id, ids)]
            # The file keeps those of a plate that was deleted.
            before = np.searchsorted(deleted[:, 0], lost, "right") - 1
            if len(deleted):
                lost = lost[(before < 0) | (lost > deleted[before, 1])]
            homeless += len(lost)
            twice += int(np.isin(ids, taken).sum())
    except StorageError as error:
        return str(error)
    if found != recorded:
        return f"the file has {found}, the database {recorded}"
    if twice:
        return f"{twice} of its cells are in another file of the set, too"
    return f"{homeless} of its cells are not in the database" if homeless else None


def _are_cells(workspace: Workspace, recipe_id: int, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these ascending ids are cells of the segmentations that the set is of."""
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
    return np.isin(ids, cells)


# --- rows -----------------------------------------------------------------------------------------


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
        .limit(BATCH)
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
