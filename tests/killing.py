"""A segmentation that can be killed at any moment: a store to segment, a program that does it with
some processes, and one that kills them.

``python tests/killing.py STORE SECONDS WORKERS`` is the program; SECONDS is what an image takes. It
imports little, since it is started often.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select

from cellstore.analysis.segmentation import ModelFiles, SegmentationResult
from cellstore.config import IngestParams, Resources, SegmentParams
from cellstore.enums import Stage
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.execute import JobsResult, execute
from cellstore.jobs.lookup import images_of
from cellstore.jobs.runs import RecipeSpec, register
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Cell, Image, Job, Segmentation
from cellstore.stages.segment import Segment
from cellstore.store import Store

PROGRAM = Path(__file__)
HEADER = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site"


@dataclass(frozen=True)
class SlowSegmenter:
    """Finds the blocks of :func:`_plane`, after a while."""

    seconds: float

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        time.sleep(self.seconds)
        block_of_row = (np.arange(len(image)) + 5) // 7
        masks = np.where(image > 100, block_of_row[:, None], 0).astype(np.uint16)
        flows = np.zeros((*image.shape, 4), np.uint8)
        flows[..., 3] = np.where(masks > 0, 255, 0)
        return SegmentationResult(masks, flows, 30.0)


@dataclass(frozen=True)
class SegmentSlowly(Segment):
    """The real stage around the threshold."""

    seconds: float = 0.0

    def load(self) -> None:
        object.__setattr__(self, "segmenter", SlowSegmenter(self.seconds))


def segment_slowly(
    workspace: Workspace, seconds: float = 0.0, resources: Resources | None = None
) -> JobsResult:
    """Run the stage ``segment`` with the threshold in place of a network."""
    files = ModelFiles("threshold", PROGRAM, None, "0" * 64)
    spec = RecipeSpec(Stage.SEGMENT, 1, {"threshold": 100})
    stage = SegmentSlowly(
        SegmentParams.of("published"), files, "cpu", workspace.artifacts, spec, seconds=seconds
    )
    with workspace.database.begin() as session:
        images = images_of(session)
        recipe = register(session, spec)
    return execute(workspace, stage, [recipe], images, resources or Resources())[0]


def fill(workspace: Workspace, folder: Path, images: int) -> None:
    """Write and ingest small images: bright blocks, each image its own."""
    from cellstore.stages.ingest.ingest import ingest

    folder.mkdir(exist_ok=True)
    lines = [HEADER]
    for number in range(images):
        row, column, site = number // 24 % 16 + 1, number % 24 + 1, number // 384 + 1
        name = f"r{row:02d}c{column:02d}f{site:02d}p01-ch1sk1fk1fl1.tiff"
        (folder / name).write_bytes(encode_tiff(_plane(number)))
        lines.append(f"{name},P1,{chr(64 + row)}{column:02d},{site}")
    table = folder / "load_data.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ingest(workspace, table, IngestParams(images=folder))


def _plane(number: int) -> NDArray[np.uint16]:
    plane = np.full((32, 32), number % 90, np.uint16)
    for block in range(1 + number % 4):
        plane[2 + 7 * block : 6 + 7 * block, 2 : 6 + number % 20] = 150 + number % 50
    return plane


Rows = list[tuple[Any, ...]]


def rows_of(workspace: Workspace) -> Rows:
    """What a segmentation wrote, by names that do not depend on who wrote first."""
    mask, flow = Artifact.__table__.alias(), Artifact.__table__.alias()
    query = (
        select(
            Image.core_name,
            Segmentation.content_sha256,
            Segmentation.n_cells,
            mask.c.sha256,
            flow.c.sha256,
            Cell.object_number,
            Cell.min_row,
            Cell.min_col,
            Cell.max_row,
            Cell.max_col,
            Cell.centroid_row,
            Cell.centroid_col,
            Cell.excluded,
        )
        .join(Segmentation, Segmentation.image_id == Image.id)
        .join(mask, mask.c.id == Segmentation.mask_artifact_id)
        .join(flow, flow.c.id == Segmentation.flow_artifact_id)
        .outerjoin(Cell, Cell.segmentation_id == Segmentation.id)
        .order_by(Image.core_name, Segmentation.id, Cell.object_number)
    )
    with workspace.database.read() as session:
        return [tuple(row) for row in session.execute(query)]


def number_of(core_name: str) -> tuple[int, ...]:
    """What images sort by in the order in which :func:`fill` makes them: site, row, column."""
    row, column, site = (int(core_name[start : start + 2]) for start in (1, 4, 7))
    return site, row, column


def counts_of(workspace: Workspace) -> tuple[int, int, int]:
    """Segmentations, jobs, artifacts."""
    with workspace.database.read() as session:
        tables = (Segmentation, Job, Artifact)
        found = [session.scalar(select(func.count()).select_from(table)) for table in tables]
    return found[0] or 0, found[1] or 0, found[2] or 0


def start(
    root: Path, seconds: float, workers: int = 2, stderr: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(PROGRAM), str(root), str(seconds), str(workers)]
    return subprocess.Popen(words, stderr=stderr, start_new_session=True)


def kill_often(
    root: Path, seconds: float, kills: int, pauses: tuple[float, float], seed: int
) -> tuple[int, int]:
    """Run the program and kill it or one of its workers, again and again.

    Returns how many processes were killed, and how many of them were the parent. Ends early when
    the work is done.
    """
    chance = random.Random(seed)
    process, parents = start(root, seconds), 0
    for number in range(kills):
        time.sleep(chance.uniform(*pauses))
        if process.poll() is not None:
            return number, parents
        workers = children(process.pid)
        victim = chance.choice(workers) if workers and chance.random() < 0.6 else process.pid
        os.kill(victim, signal.SIGKILL)
        if victim == process.pid:
            process.wait()
            parents += 1
            process = start(root, seconds)
    assert process.wait(timeout=240) == 0
    return kills, parents


def children(pid: int) -> Sequence[int]:
    """The processes that a process started, and those that they started: workers are forked."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    started = [int(word) for word in text.split()]
    return started + [below for child in started for below in children(child)]


def main() -> None:
    with Store.open(sys.argv[1]) as store:
        segment_slowly(store.workspace, float(sys.argv[2]), Resources(workers=int(sys.argv[3])))


if __name__ == "__main__":
    main()
