r"""How fast ``verify`` checks the files of a store, beside only reading or hashing them.

    python benchmarks/verify_speed.py --images 300
    python benchmarks/verify_speed.py --predictions 5000000

Masks and flows of rendered fields of 1080 x 1080 become the files of a store, with a row for each
segmentation and cell. All lines read the same bytes from the page cache. ``read``: every file,
nothing else. ``sha256sum``: one process over all files. ``verify``: each file hashed, each mask
unpacked and its labels compared with the cells in the database, the folder searched for orphans.

``--predictions``: so many predictions in a store without files, two for each of 250 cells of an
image, are compared with the digests of their jobs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from jobs_speed import fill
from sqlalchemy import insert, select
from training_fields import render_nuclei

from cellstore.db.bulk import bulk_insert
from cellstore.enums import ArtifactKind, Stage, Status
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.planes import cell_rows, insert_cells
from cellstore.jobs.runs import RecipeSpec, digest_of_numbers, keep_files, register, running
from cellstore.models import Cell, Image, Job, Label, Prediction, Segmentation
from cellstore.stages.predict import COLUMNS
from cellstore.store import Store

SIZE, DRAWN = 1080, 6
CELLS, RANKS = 250, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--predictions", type=int, default=0)
    args = parser.parse_args()
    if args.predictions:
        with tempfile.TemporaryDirectory() as name, Store.create(Path(name) / "store") as store:
            predicted(store, args.predictions // (RANKS * CELLS))
            for _ in range(args.repeat):
                print(f"verify rows {timed(lambda: verified(store)):8.2f} s", flush=True)
        return
    with tempfile.TemporaryDirectory() as name, Store.create(Path(name) / "store") as store:
        segmented(store, args.images)
        files = [path for path in store.workspace.artifacts.root.rglob("*") if path.is_file()]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        print(f"{len(files)} files, {megabytes:.0f} MB, {args.images} masks")
        for title, call in (
            ("read", lambda: read(files)),
            ("sha256sum", lambda: hashed(files)),
            ("verify", lambda: verified(store)),
        ):
            seconds = statistics.median(timed(call) for _ in range(args.repeat))
            print(f"{title:12}{seconds:8.2f} s{megabytes / seconds:9.0f} MB/s", flush=True)


def segmented(store: Store, images: int) -> None:
    """Segmentations of drawn masks; one label differs from image to image, so all files do."""
    workspace = store.workspace
    fill(workspace, images)
    rng = np.random.default_rng(1)
    fields = [render_nuclei(rng, (SIZE, SIZE), 30.0) for _ in range(DRAWN)]
    flows = [rng.integers(0, 40, (SIZE, SIZE, 4)).astype(np.uint8) for _ in range(DRAWN)]
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.SEGMENT, 1, {"drawn": SIZE}))
        ids = list(session.scalars(select(Image.id).order_by(Image.id)))
    with running(workspace.database, recipe) as run:
        for number, image_id in enumerate(ids):
            masks = fields[number % DRAWN].masks.copy()
            masks[0, 0] = 1000 + number
            flow = flows[number % DRAWN].copy()
            flow[0, 0, :2] = divmod(number, 256)
            mask_file, flow_file = (
                workspace.artifacts.write(kind, encode_tiff(array), ".tif")
                for kind, array in ((ArtifactKind.MASK, masks), (ArtifactKind.FLOW, flow))
            )
            cells = cell_rows(masks)
            with workspace.database.begin() as session:
                row = Segmentation(
                    image_id=image_id,
                    recipe_id=recipe.id,
                    run_id=run.id,
                    n_cells=len(cells),
                    mask_artifact_id=keep_files(session, [mask_file])[0],
                    flow_artifact_id=keep_files(session, [flow_file])[0],
                    created_at=datetime.now(UTC),
                )
                insert_cells(session, row, cells)


def predicted(store: Store, images: int) -> None:
    """A predict run with a job and its digest for each image."""
    workspace = store.workspace
    fill(workspace, images)
    moment, rng = datetime.now(UTC), np.random.default_rng(1)
    ranks, kept = np.tile(np.arange(1, RANKS + 1), CELLS), RANKS * CELLS
    with workspace.database.begin() as session:
        segment, recipe = (
            register(session, RecipeSpec(stage, 1, {"drawn": SIZE}))
            for stage in (Stage.SEGMENT, Stage.PREDICT)
        )
        session.add_all(Label(field="perturbation", value=value) for value in ("a", "b"))
        content = dict(session.execute(select(Image.id, Image.content_sha256)).all())
        labels = list(session.scalars(select(Label.id)))
    with (
        running(workspace.database, segment) as found,
        running(workspace.database, recipe) as run,
        workspace.database.begin() as session,
    ):
        session.execute(
            insert(Segmentation),
            [
                {"id": k, "image_id": image_id, "recipe_id": segment.id, "content_sha256": sha256}
                | {"run_id": found.id, "n_cells": CELLS, "created_at": moment}
                for k, (image_id, sha256) in enumerate(content.items(), start=1)
            ],
        )
        for k, (image_id, sha256) in enumerate(content.items(), start=1):
            ids = np.arange(1, CELLS + 1) + CELLS * (k - 1)
            rows = [(int(i), k, n) for n, i in enumerate(ids, start=1)]
            bulk_insert(session, Cell, ("id", "segmentation_id", "object_number"), rows)
            first = rng.uniform(0.5, 1, CELLS)
            probability = np.column_stack([first, 1 - first]).ravel()
            columns = (np.repeat(ids, RANKS), ranks, np.tile(labels, CELLS), probability)
            table = list(zip([run.id] * kept, *(c.tolist() for c in columns), strict=True))
            bulk_insert(session, Prediction, COLUMNS, table)
            job = {"recipe_id": recipe.id, "image_id": image_id, "content_sha256": sha256}
            made = digest_of_numbers(np.column_stack(columns))
            session.execute(
                insert(Job), [{**job, "run_id": run.id, "status": Status.DONE, "digest": made}]
            )


def read(files: list[Path]) -> None:
    for path in files:
        path.read_bytes()


def hashed(files: list[Path]) -> None:
    subprocess.run(["sha256sum", *map(str, files)], check=True, stdout=subprocess.DEVNULL)


def verified(store: Store) -> None:
    found = store.verify()
    assert found.ok, found.problems[:3]


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
