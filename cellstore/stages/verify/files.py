"""Every stored file against its sha256, and masks against their cells: each file is read once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...artifacts import ArtifactFolder, sha256_of
from ...db.bulk import in_lists
from ...db.models import Artifact, Cell, Image, Plate, Segmentation, Well
from ...errors import ImageError, StorageError
from ...formats.files.images import decode_tiff
from ...progress import track
from ...runs import Workspace
from ...runs.crews import cores
from ...terms import ArtifactKind
from .report import Problem

BATCH = 200
CHANGED = "the file is not what was written (sha256 differs)"


@dataclass(frozen=True)
class _Cells:
    """What the database says of the cells in a mask: whose they are, and their labels."""

    name: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class _File:
    """A stored file; ``cells`` of each segmentation that it is the mask of."""

    path: str
    sha256: str
    cells: tuple[_Cells, ...]


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
    columns = (Artifact.id, Artifact.path, Artifact.sha256, Artifact.kind)
    while True:
        query = select(*columns).where(Artifact.id > last).order_by(Artifact.id).limit(BATCH)
        with workspace.database.read() as session:
            rows = session.execute(query).all()
            masks = [row.id for row in rows if row.kind == ArtifactKind.MASK]
            cells = _cells_of(session, masks)
        if not rows:
            return
        yield from (_File(row.path, row.sha256, tuple(cells.get(row.id, ()))) for row in rows)
        last = rows[-1].id


def _cells_of(session: Session, masks: list[int]) -> dict[int, list[_Cells]]:
    """By artifact of a mask: the cells of each segmentation that has it."""
    query = (
        select(Segmentation.id, Segmentation.mask_artifact_id, Plate.barcode, Image.core_name)
        .join(Image, Image.id == Segmentation.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
    )
    found: dict[int, list[_Cells]] = {}
    for some in in_lists(masks):
        rows = session.execute(query.where(Segmentation.mask_artifact_id.in_(some))).all()
        labels = _labels(session, [row.id for row in rows])
        for number, mask, barcode, core in rows:
            cells = _Cells(f"{barcode}/{core}", tuple(labels.get(number, ())))
            found.setdefault(mask or 0, []).append(cells)
    return found


def _labels(session: Session, segmentations: list[int]) -> dict[int, list[int]]:
    query = select(Cell.segmentation_id, Cell.label)
    found: dict[int, list[int]] = {}
    for some in in_lists(segmentations):
        rows = session.execute(
            query.where(Cell.segmentation_id.in_(some)).order_by(Cell.segmentation_id, Cell.label)
        )
        for number, group in groupby(rows, key=lambda row: row.segmentation_id):
            found[number] = [row.label for row in group]
    return found


def _check(folder: ArtifactFolder, file: _File) -> list[Problem]:
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
    return _check_masks(file, data)


def _check_masks(file: _File, data: bytes) -> list[Problem]:
    try:
        inside = labels_inside(decode_tiff(data))
    except ImageError as error:
        return [Problem(file.path, f"{cells.name}: {error}") for cells in file.cells]
    return [
        Problem(
            file.path,
            f"{cells.name}: the mask has {len(inside)} cells, the database {len(cells.labels)}, "
            "or other labels",
        )
        for cells in file.cells
        if not np.array_equal(inside, cells.labels)
    ]


def labels_inside(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Return the labels of ``masks`` (H, W) but 0, ascending."""
    small = masks.dtype.kind == "u" and masks.dtype.itemsize <= 2
    found = np.flatnonzero(np.bincount(masks.ravel())) if small else np.unique(masks)
    labels: NDArray[np.int64] = found[found != 0].astype(np.int64)
    return labels
