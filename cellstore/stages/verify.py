"""Verify that the files of a store are what the database says."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder, sha256_of
from ..db.bulk import in_lists
from ..db.models import (
    Artifact,
    Cell,
    FeatureFile,
    FeatureSet,
    Image,
    Plate,
    RecipeInput,
    Run,
    Segmentation,
    Well,
)
from ..errors import ImageError, StorageError
from ..formats.files.images import decode_tiff
from ..progress import track
from ..reading.featuresets import FileFacts, stream_ids
from ..runs import Workspace
from ..terms import Status

BATCH = 500
GRACE_MINUTES = 10.0


@dataclass(frozen=True)
class Problem:
    """A file that is not as it should be; ``path`` is relative to the artifacts folder."""

    path: str
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """What was found. ``orphans`` are files that no row names; ``young`` may still get a row.

    ``segmentations`` are those whose masks are known, ``feature_files`` the files of feature sets.
    """

    files: int
    segmentations: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    young: int
    removed: int
    feature_files: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (orphans that were removed are not)."""
        return not self.problems and len(self.orphans) == self.removed


@dataclass(frozen=True)
class _File:
    id: int
    path: str
    sha256: str


def verify(
    workspace: Workspace, *, fix: bool = False, minutes: float = GRACE_MINUTES
) -> VerifyResult:
    """Compare every file with its sha256, masks and features with their cells; look for orphans.

    ``fix`` removes the orphans: files left by a crash between writing a file and its row. Files
    younger than ``minutes`` are left alone, as a running command may be about to name them.
    """
    # The folder is listed before the rows are read: what a running command adds is no orphan.
    before = min(time.time() - 60 * minutes, _oldest_running(workspace))
    there = list(workspace.artifacts.walk())
    files, problems = _check_files(workspace)
    broken = {problem.path for problem in problems}
    masks, wrong = _check_masks(workspace, broken)
    features, odd = _check_features(workspace, broken)
    unnamed = _unnamed(workspace, there)
    old = [path for path in unnamed if _older(workspace.artifacts, path, before)]
    removed = sum(_remove(workspace.artifacts, path) for path in old) if fix else 0
    return VerifyResult(
        files=files,
        segmentations=masks,
        problems=(*problems, *wrong, *odd),
        orphans=tuple(old),
        young=len(unnamed) - len(old),
        removed=removed,
        feature_files=features,
    )


def _oldest_running(workspace: Workspace) -> float:
    """Return when the oldest run began that may still be about to name its files.

    A run of more than a day ago was killed: nothing closed it.
    """
    now = datetime.now(UTC)
    query = select(func.min(Run.started_at)).where(
        Run.status == Status.RUNNING, Run.started_at > now - timedelta(days=1)
    )
    with workspace.database.read() as session:
        found = session.scalar(query)
    return (found or now).timestamp()


def _check_files(workspace: Workspace) -> tuple[int, list[Problem]]:
    with workspace.database.read() as session:
        total = session.scalar(select(func.count()).select_from(Artifact)) or 0
    problems = []
    for file in track(workspace.progress, "verify files", total, _files(workspace)):
        reason = _wrong(workspace.artifacts, file)
        if reason is not None:
            problems.append(Problem(file.path, reason))
    return total, problems


def _files(workspace: Workspace) -> Iterator[_File]:
    last = 0
    while True:
        query = select(Artifact.id, Artifact.path, Artifact.sha256).where(Artifact.id > last)
        with workspace.database.read() as session:
            rows = session.execute(query.order_by(Artifact.id).limit(BATCH)).all()
        if not rows:
            return
        yield from (_File(*row) for row in rows)
        last = rows[-1].id


def _wrong(folder: ArtifactFolder, file: _File) -> str | None:
    try:
        found = sha256_of(folder.locate(file.path))
    except FileNotFoundError:
        return "the file is gone"
    except StorageError as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"
    return None if found == file.sha256 else "the file is not what was written (sha256 differs)"


def _check_masks(workspace: Workspace, broken: set[str]) -> tuple[int, list[Problem]]:
    with workspace.database.read() as session:
        total = session.scalar(select(func.count(Segmentation.mask_artifact_id))) or 0
    problems = []
    for pairs in track(workspace.progress, "verify masks", total, _masks(workspace)):
        path, sha256, name, labels = pairs
        reason = None if path in broken else _mask_reason(workspace, path, sha256, labels)
        if reason is not None:
            problems.append(Problem(path, f"{name}: {reason}"))
    return total, problems


Mask = tuple[str, str, str, list[int]]


def _masks(workspace: Workspace) -> Iterator[Mask]:
    last = 0
    while True:
        with workspace.database.read() as session:
            rows = session.execute(_mask_rows(last)).all()
            labels = _labels(session, [row.id for row in rows])
        if not rows:
            return
        for row in rows:
            yield row.path, row.sha256, f"{row.barcode}/{row.core_name}", labels.get(row.id, [])
        last = rows[-1].id


def _mask_rows(last: int) -> Select[int, str, str, str, str]:
    return (
        select(Segmentation.id, Artifact.path, Artifact.sha256, Plate.barcode, Image.core_name)
        .join(Artifact, Artifact.id == Segmentation.mask_artifact_id)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Segmentation.id > last)
        .order_by(Segmentation.id)
        .limit(20)
    )


def _labels(session: Session, segmentations: list[int]) -> dict[int, list[int]]:
    rows = session.execute(
        select(Cell.segmentation_id, Cell.label)
        .where(Cell.segmentation_id.in_(segmentations))
        .order_by(Cell.segmentation_id, Cell.label)
    )
    grouped = groupby(rows, key=lambda row: row.segmentation_id)
    return {number: [row.label for row in group] for number, group in grouped}


def _mask_reason(workspace: Workspace, path: str, sha256: str, labels: list[int]) -> str | None:
    try:
        mask = decode_tiff(workspace.artifacts.read(path, sha256))
    except (StorageError, ImageError) as error:
        return str(error)
    found = [int(label) for label in np.unique(mask) if label != 0]
    if found == labels:
        return None
    return f"the mask has {len(found)} cells, the database {len(labels)}, or other labels"


@dataclass(frozen=True)
class _Features:
    """A file of a feature set, what the database says of it, and whose cells it may hold."""

    path: str
    name: str
    said: FileFacts
    recipe_id: int

    def meets(self, later: _Features) -> bool:
        """Whether this is an earlier file of the same set whose range reaches into the other's."""
        return (
            self.recipe_id == later.recipe_id
            and (self.said.first_cell_id, self.path) < (later.said.first_cell_id, later.path)
            and self.said.last_cell_id >= later.said.first_cell_id
        )


def _check_features(workspace: Workspace, broken: set[str]) -> tuple[int, list[Problem]]:
    with workspace.database.read() as session:
        files = [
            _Features(path, name, FileFacts(rows, first, last), recipe_id)
            for path, name, rows, first, last, recipe_id in session.execute(_feature_rows())
        ]
    problems = []
    for file in track(workspace.progress, "verify features", len(files), iter(files)):
        whole = [other for other in files if other.path not in broken]
        reason = None if file.path in broken else _features_reason(workspace, file, whole)
        if reason is not None:
            problems.append(Problem(file.path, f"feature set {file.name}: {reason}"))
    return len(files), problems


def _feature_rows() -> Any:
    return (
        select(
            Artifact.path,
            FeatureSet.name,
            FeatureFile.n_rows,
            FeatureFile.first_cell_id,
            FeatureFile.last_cell_id,
            FeatureSet.recipe_id,
        )
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .order_by(FeatureFile.first_cell_id)
    )


def _features_reason(
    workspace: Workspace, file: _Features, files: Sequence[_Features]
) -> str | None:
    locate = workspace.artifacts.locate
    facts, homeless, twice = FileFacts(0, 0, 0), 0, 0
    try:
        earlier = [list(stream_ids(locate(other.path))) for other in files if other.meets(file)]
        taken = np.concatenate([np.empty(0, np.int64), *chain.from_iterable(earlier)])
        for ids in stream_ids(locate(file.path)):
            facts = facts.with_ids(ids)
            homeless += len(ids) - _cells_among(workspace, file.recipe_id, ids)
            twice += int(np.isin(ids, taken).sum())
    except StorageError as error:
        return str(error)
    if facts != file.said:
        return f"the file has {facts}, the database {file.said}"
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
