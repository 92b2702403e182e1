"""How long profiles of wells take, beside pycytominer called directly, and of how many cells.

python benchmarks/profile_speed.py wells [--plates 30] [--features 1000] [--repeat 3]
python benchmarks/profile_speed.py cells [--cells 1000000 5000000] [--features 50]

``wells``: plates of 384 wells, every 12th a control, in one Parquet file. Both read it, normalise
each plate against its controls (mad), select features by all four operations, and write the result;
both must agree. ``cells``: a store with a feature set in files, 200 cells in each of 5 images of a
well, 13 plates for 5 million cells; the whole of ``cellstore profile``, also that it has nothing to
do. Every line is a process of its own, with its own peak memory; the clock starts after imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

WELLS, IMAGES, CELLS = 384, 5, 200
"""Of a plate, of a well, of an image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["wells", "cells", *STEPS])
    parser.add_argument("--plates", type=int, default=30)
    parser.add_argument("--features", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--work", type=Path, help="where to write (some GB)")
    args = parser.parse_args()
    if args.what in STEPS:
        STEPS[args.what](args.work)
        return
    with tempfile.TemporaryDirectory(prefix="profile-speed-", dir=args.work) as folder:
        if args.what == "wells":
            write_wells(Path(folder), args.plates, args.features or 1000)
            compare_wells(Path(folder), args.repeat)
            return
        for number in args.cells:
            store = Path(folder, str(number))
            make_store(store, number, args.features or 50)
            first, again = measured("profile", store), measured("profile", store)
            print(
                f"{number:>10,} cells {first['seconds']:8.1f} s {first['cpu']:8.1f} s CPU "
                f"{first['mb']:6.0f} MB; again {again['seconds']:6.1f} s {again['mb']:6.0f} MB",
                flush=True,
            )


def measured(step: str, work: Path) -> dict[str, Any]:
    """Run a step in a process of its own; it prints what it took."""
    words = [sys.executable, __file__, step, "--work", str(work)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{step}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def timed(work: Callable[[], None]) -> None:
    before, began = time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": peak}))


def write_wells(folder: Path, plates: int, features: int) -> None:
    import pandas as pd

    random = np.random.default_rng(0)
    number = plates * WELLS
    # Some features go together: each is one of fewer sources, and some noise of its own.
    sources = random.normal(size=(number, features // 2))
    values = sources[:, random.integers(0, features // 2, features)]
    values += random.gamma(1.0, 0.4, features) * random.normal(size=values.shape)
    table = pd.DataFrame(values, columns=[f"Cells_{at}" for at in range(features)])
    table.insert(0, "Metadata_Plate", np.repeat([f"P{at:02}" for at in range(plates)], WELLS))
    control = np.where(np.arange(number) % 12 == 0, "negative", "no")
    table.insert(1, "Metadata_control", control)
    table.to_parquet(folder / "wells.parquet")


def compare_wells(folder: Path, repeat: int) -> None:
    import pandas as pd

    runs: dict[str, list[dict[str, Any]]] = {"cellstore": [], "pycytominer": []}
    for _ in range(repeat):  # in turns: a busy minute hits both alike
        for step, of_step in runs.items():
            of_step.append(measured(step, folder))
    ours, theirs = (pd.read_parquet(folder / f"{step}.parquet") for step in runs)
    features = [name for name in theirs.columns if name.startswith("Cells_")]
    assert [name for name in ours.columns if name.startswith("Cells_")] == features
    assert (ours[features].to_numpy() == theirs[features].to_numpy()).all()
    print(f"{len(ours):,} wells, {len(features):,} features are left; the values are the same")
    best = {
        step: {key: min(run[key] for run in of_step) for key in of_step[0]}
        for step, of_step in runs.items()
    }
    for step, run in best.items():
        print(f"{step:12} {run['seconds']:7.2f} s {run['cpu']:7.2f} s CPU {run['mb']:6.0f} MB")
    ratio = {key: best["cellstore"][key] / best["pycytominer"][key] for key in ("seconds", "mb")}
    print(f"{'ratio':12} {ratio['seconds']:7.2f} of the time, {ratio['mb']:.2f} of the memory")


def by_cellstore(folder: Path) -> None:
    import pyarrow.parquet as pq
    import pycytominer  # noqa: F401 - not on the clock

    from cellstore.analysis.well_profiles import WELL_COLUMNS, WellProfiles
    from cellstore.config import ProfileParams
    from cellstore.stages import profile

    def work() -> None:
        file = pq.ParquetFile(folder / "wells.parquet")
        names = [name for name in file.schema_arrow.names if name.startswith("Cells_")]

        def read() -> WellProfiles:  # in blocks of columns, as DuckDB's answers come
            values = np.empty((file.metadata.num_rows, len(names)))
            for start in range(0, len(names), 100):
                some = names[start : start + 100]
                for at, column in enumerate(file.read(some).columns, start):
                    values[:, at] = column.to_numpy()
            about = file.read(["Metadata_Plate", "Metadata_control"]).to_pandas()
            table = about.set_axis(["plate", "control"], axis=1)
            table = table.reindex(columns=list(WELL_COLUMNS)).assign(n_cells=1, n_images=1)
            return WellProfiles(table.assign(well_id=range(len(table))), values, tuple(names))

        found = profile._compared(read(), ProfileParams())
        (folder / "cellstore.parquet").write_bytes(profile._as_parquet(found))

    timed(work)


def by_pycytominer(folder: Path) -> None:
    import pandas as pd
    import pycytominer

    def work() -> None:
        table = pd.read_parquet(folder / "wells.parquet")
        parts = [
            pycytominer.normalize(
                part, samples="Metadata_control == 'negative'", method="mad_robustize"
            )
            for _, part in table.groupby("Metadata_Plate")
        ]
        operations = ["drop_na_columns", "blocklist", "variance_threshold"]
        pycytominer.feature_select(
            pd.concat(parts), operation=[*operations, "correlation_threshold"]
        ).to_parquet(folder / "pycytominer.parquet")

    timed(work)


def by_profile(store: Path) -> None:
    import pycytominer  # noqa: F401 - not on the clock

    from cellstore.config import ProfileParams
    from cellstore.stages import profile  # noqa: F401 - not on the clock
    from cellstore.store import Store

    def work() -> None:
        with Store.open(store) as opened:
            opened.profile(ProfileParams(features="deep"))

    timed(work)


STEPS = {"cellstore": by_cellstore, "pycytominer": by_pycytominer, "profile": by_profile}


def make_store(root: Path, number: int, features: int) -> None:
    """Make a store of so many cells, with a feature set ``deep`` in files."""
    import pyarrow as pa
    from sqlalchemy import func, insert, select

    from cellstore.enums import Control, FeatureStorage, Stage
    from cellstore.jobs.runs import RecipeSpec, register, running
    from cellstore.jobs.workspace import create_workspace
    from cellstore.models import Cell, FeatureSet, Image, Plate, Segmentation, Well
    from cellstore.query.feature_files import FeatureWriter, register_files

    workspace, _ = create_workspace(root)
    database, random = workspace.database, np.random.default_rng(0)
    wells = -(-number // (IMAGES * CELLS))
    plates = -(-wells // WELLS)
    with database.begin() as session:
        segment = register(session, RecipeSpec(Stage.SEGMENT, 1, {"imported": "benchmark"}))
        spec = RecipeSpec(Stage.MEASURE, 1, {"imported": "benchmark"}, None, (segment,))
        measure = register(session, spec)
        names = [f"deep_{at}" for at in range(features)]
        about = {"dtype": "float32", "unit": None, "source": "benchmark"}
        columns = [{"name": name, **about} for name in names]
        kept = FeatureSet(
            name="deep", recipe_id=measure.id, columns=columns, storage=FeatureStorage.FILES
        )
        session.add_all([kept, *(Plate(id=at + 1, barcode=f"P{at}") for at in range(plates))])
        session.flush()
        set_id = kept.id
        rows = [
            {"id": at + 1, "plate_id": at // WELLS + 1, "well_row": at % WELLS // 24 + 1}
            | {"well_column": at % 24 + 1, "name": f"w{at % WELLS}"}
            | {"control": Control.NEGATIVE if at % 12 == 0 else None}
            for at in range(wells)
        ]
        session.execute(insert(Well), rows)
        images = [
            {"id": at + 1, "well_id": at // IMAGES + 1, "site": at % IMAGES + 1}
            | {"core_name": f"i{at}", "content_sha256": f"{at:064x}"}
            for at in range(wells * IMAGES)
        ]
        session.execute(insert(Image), images)
    box: dict[str, float] = {"min_row": 0, "min_col": 0, "max_row": 9, "max_col": 9}
    box |= {"centroid_row": 4.0, "centroid_col": 4.0}
    with running(database, segment) as run:
        for start in range(0, len(images), 500):
            some = images[start : start + 500]
            with database.begin() as session:
                masks = [
                    {"id": row["id"], "image_id": row["id"], "recipe_id": segment.id}
                    | {"content_sha256": row["content_sha256"], "run_id": run.id}
                    | {"n_cells": CELLS, "diameter": 9.0, "created_at": datetime.now(UTC)}
                    for row in some
                ]
                session.execute(insert(Segmentation), masks)
                cells = [
                    {"segmentation_id": row["id"], "object_number": label + 1, **box}
                    for row in some
                    for label in range(CELLS)
                ]
                session.execute(insert(Cell), cells)
    schema = pa.schema([(name, pa.float32()) for name in names])
    writer = FeatureWriter(workspace.artifacts, schema)
    with running(database, measure) as run:
        with database.read() as session:
            last = session.scalar(select(func.max(Cell.id))) or 0
        for start in range(1, last + 1, 10_000):
            ids = np.arange(start, min(last + 1, start + 10_000))
            values = random.normal(size=(features, len(ids))).astype(np.float32)
            values += (ids // (CELLS * IMAGES) % 7).astype(np.float32) * 0.1
            writer.write(
                ids, pa.RecordBatch.from_arrays(list(map(pa.array, values)), schema=schema)
            )
        writer.finish()
        with database.begin() as session:
            register_files(session, workspace.artifacts, set_id, run.id, writer.files)
    database.close()


if __name__ == "__main__":
    main()
