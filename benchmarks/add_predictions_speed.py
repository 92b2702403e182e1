"""A table of predictions added, beside a bare bulk insert of the same rows from the same file.

    python benchmarks/add_predictions_speed.py                     # about 2 minutes, 700 MB
    python benchmarks/add_predictions_speed.py --rows 250000 1000000

Stores of so many cells with a class each are made, and the classes are written to a Parquet file.
``bare`` reads it, looks the numbers of the classes up, and inserts the rows into table
``predictions``, with its indexes and triggers, in one transaction on SQLite. ``added`` is
``Store.add_predictions``: every row is checked, images are jobs with digests, and the cells of each
image are written in a transaction of their own. Each is a process of its own on a copy of the
store; printed are seconds, seconds of CPU, and the peak of memory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from votes_store import make_store

from cellstore.store import Store

CELLS_OF_IMAGE = 150
ROWS = "SELECT cell_id, l.value AS label, probability FROM predictions AS p JOIN labels AS l"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=(250_000, 1_000_000))
    parser.add_argument("--work", type=Path, help="where to write (some 700 MB)")
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        what, root, file = args.do
        (bare if what == "bare" else added)(Path(root), Path(file))
        return
    folder = Path(tempfile.mkdtemp(prefix="add-predictions-", dir=args.work))
    try:
        for rows in args.rows:
            make_store(folder / "store", rows, rows // CELLS_OF_IMAGE)
            with Store.open(folder / "store") as store:
                run = "(SELECT max(id) FROM runs WHERE stage = 'predict')"
                table = store.sql(f"{ROWS} ON l.id = label_id WHERE run_id = {run}")
                pq.write_table(table, folder / "rows.parquet")
            for what in ("bare", "added"):
                shutil.copytree(folder / "store", folder / what)
                words = ("--do", what, str(folder / what), str(folder / "rows.parquet"))
                print(f"{rows:10,} rows, {what:6}", end="", flush=True)
                subprocess.run([sys.executable, __file__, *words], check=True)
                shutil.rmtree(folder / what)
            shutil.rmtree(folder / "store")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bare(root: Path, file: Path) -> None:
    from sqlalchemy import select

    from cellstore.enums import Stage
    from cellstore.jobs.runs import RecipeSpec, running
    from cellstore.models import Label

    with Store.open(root) as store:
        database = store.workspace.database
        spec = RecipeSpec(Stage.PREDICT, 1, {"bare": True})
        with running(database, spec, split_id=1) as run:
            clock = Clock()
            with database.begin() as session:
                ids = dict(session.execute(select(Label.value, Label.id)).all())
                connection = session.connection()
                for batch in pq.ParquetFile(file).iter_batches(65_536):
                    cells, labels, chances = (column.to_pylist() for column in batch.columns)
                    pairs = zip(cells, labels, chances, strict=True)
                    values = [(run.id, cell, 1, ids[label], p) for cell, label, p in pairs]
                    statement = "INSERT INTO predictions VALUES (?, ?, ?, ?, ?)"
                    connection.exec_driver_sql(statement, values)
            clock.stop()


def added(root: Path, file: Path) -> None:
    with Store.open(root) as store:
        clock = Clock()
        store.add_predictions(file, "speed", split="drawn", trained_on=[])
        clock.stop()


class Clock:
    """Seconds, seconds of CPU, and the peak of memory."""

    def __init__(self) -> None:
        self.before = self._peak()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Print what it took."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        peak = self._peak()
        print(f"{wall:8.1f} s{cpu:8.1f} s CPU{peak:8.0f} MB at most ({self.before:.0f} before)")

    @staticmethod
    def _peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()  # of this program alone
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
