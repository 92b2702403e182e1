r"""How fast five million labels become image votes and an accuracy, beside polars and DuckDB.

    python benchmarks/votes_speed.py /tmp/votes --peers-python other-env/bin/python
    python benchmarks/votes_speed.py /tmp/votes --cells 20000000

A store is drawn into the folder (once; it is kept) by ``votes_store.py``: cells in images, 167 in
each on average, and two predict runs that labelled every cell. Asked is the hard vote of each image
and the accuracy of one run. Every line is a process of its own, with its own peak memory:

- ``cellstore, first``: ``Store.votes`` with no snapshot there; ``again``: with the snapshots that
  the first made. The clock starts when imports are done and ends with the answer.
- ``command, first`` and ``again``: ``cellstore votes`` into a Parquet file, start-up included.
- ``polars`` reads the same rows from the same SQLite file through connectorx and groups them.
- ``DuckDB`` joins and votes on a file of its own format with the same tables (made before).

``whole s`` is the whole process, start-up included; ratios of commands are of these. The files are
read once before the clock starts. All must give the same accuracy and votes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CELLS_OF_IMAGE = 5_000_000 / 30_000
ROWS = """
    SELECT s.image_id AS image_id, p.label_id AS label_id, p.probability AS probability
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    WHERE p.run_id = {run} AND p.rank = 1 AND c.excluded IS NULL
"""
TRUTH = "SELECT image_id, label_id AS truth FROM split_members"
VOTE = """
    WITH rows AS ({rows}),
    counted AS (
        SELECT image_id, label_id, count(*) AS votes, sum(probability) AS weight
        FROM rows GROUP BY image_id, label_id
    ),
    ranked AS (
        SELECT image_id, label_id, row_number() OVER (
            PARTITION BY image_id ORDER BY votes DESC, weight DESC, label_id
        ) AS place
        FROM counted
    )
    SELECT r.image_id, r.label_id, t.truth
    FROM ranked AS r JOIN ({truth}) AS t ON t.image_id = r.image_id WHERE r.place = 1
"""


def main() -> None:
    args = parsed()
    if args.step is not None:
        STEPS[args.step](args.folder)
        return
    folder = args.folder.resolve() / str(args.cells)
    if not (folder / "made").exists():
        make(folder, args.cells)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeat):  # in turns: a busy minute hits all alike
        shutil.rmtree(folder / "store" / "cache", ignore_errors=True)
        for name, python in steps(args).items():
            if name == "command, first":
                shutil.rmtree(folder / "store" / "cache", ignore_errors=True)
            runs.setdefault(name, []).append(measured(name, python, folder))
    show(args.cells, runs)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the store is, or is to be (2 GB)")
    parser.add_argument("--cells", type=int, default=5_000_000, help="how many (5 million)")
    parser.add_argument("--repeat", type=int, default=1, help="times; the median is shown")
    parser.add_argument("--peers-python", type=Path, help="a Python with polars and connectorx")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    return parser.parse_args()


def steps(args: argparse.Namespace) -> dict[str, str]:
    """Return the Python of each step that can be run."""
    own = ("cellstore, first", "cellstore, again", "command, first", "command, again", "DuckDB")
    found = dict.fromkeys(own, sys.executable)
    if args.peers_python:
        found["polars"] = str(args.peers_python.absolute())
    return found


def make(folder: Path, cells: int) -> None:
    import duckdb
    from adbc_driver_sqlite import dbapi
    from votes_store import make_store

    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    make_store(folder / "store", cells, round(cells / CELLS_OF_IMAGE))
    with duckdb.connect(str(folder / "native.duckdb")) as own:
        for table in ("predictions", "cells", "segmentations", "split_members"):
            with dbapi.connect(str(sqlite_file(folder))) as db, db.cursor() as cursor:
                columns = "id, segmentation_id, excluded" if table == "cells" else "*"
                columns = "id, image_id" if table == "segmentations" else columns
                cursor.execute(f"SELECT {columns} FROM {table}")
                own.register("rows", cursor.fetch_record_batch())
                own.execute(f"CREATE TABLE {table} AS FROM rows")
    (folder / "made").touch()
    print(f"The store was made in {time.perf_counter() - began:.0f} s.", file=sys.stderr)


def sqlite_file(folder: Path) -> Path:
    return folder / "store" / "cellstore.db"


def predict_run(folder: Path) -> int:
    with sqlite3.connect(sqlite_file(folder)) as db:
        query = "SELECT min(id) FROM runs WHERE stage = 'predict'"
        return int(db.execute(query).fetchone()[0])


def show(cells: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    middle = {name: sorted(r, key=lambda x: x["seconds"])[len(r) // 2] for name, r in runs.items()}
    answers = {name: (run["accuracy"], run["votes"]) for name, run in middle.items()}
    if len(set(answers.values())) > 1:
        sys.exit(f"The answers differ: {answers}")
    accuracy = next(iter(answers.values()))[0]
    size = f"{cells:,} predictions of one run; accuracy per image {accuracy:.6f}"
    print(f"{size}; others used {max(run['others'] for run in middle.values()):.1f} cores")
    floors = [name for name in ("polars", "DuckDB") if name in middle]
    headings = "".join(f"{'/ ' + name:>10}" for name in floors)
    print(f"{'':18}{'wall s':>8}{'CPU s':>8}{'whole s':>9}{'peak MB':>9}{headings}")
    for name, run in middle.items():
        whole = name.startswith("command")
        own = run["whole"] if whole else run["seconds"]
        ratios = "".join(
            f"{own / middle[floor]['whole' if whole else 'seconds']:10.2f}" for floor in floors
        )
        print(
            f"{name:18}{run['seconds']:8.2f}{run['cpu']:8.2f}{run['whole']:9.2f}"
            f"{run['mb']:9.0f}{ratios}"
        )


def measured(step: str, python: str, folder: Path) -> dict[str, Any]:
    """Run a step in a process of its own; it prints what it took."""
    for file in (sqlite_file(folder), folder / "native.duckdb"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    busy, began = machine_seconds(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [python, __file__, str(folder), "--step", step]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{step}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["whole"] = found.get("whole", whole)
    found["others"] = max(0.0, (machine_seconds() - busy - own) / whole)
    return found


def machine_seconds() -> float:
    """Return the processor seconds that this machine has worked so far."""
    words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    numbers = [int(word) for word in words[:8]]
    return (sum(numbers) - numbers[3] - numbers[4]) / float(os.sysconf("SC_CLK_TCK"))


def timed(
    work: Callable[[], tuple[float, Any]], votes: Callable[[Any], list[tuple[int, int]]]
) -> None:
    """Print what ``work`` took, which returns the accuracy, and what ``votes`` makes pairs of."""
    before, began = time.process_time(), time.perf_counter()
    accuracy, answer = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.split("VmHWM:")[1].split()[0])
    told(seconds, cpu, peak, accuracy, votes(answer))


def told(
    seconds: float,
    cpu: float,
    peak: int,
    accuracy: float,
    votes: list[tuple[int, int]],
    **more: float,
) -> None:
    digest = hashlib.sha256(repr(sorted(votes)).encode()).hexdigest()[:12]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "mb": peak / 1024,
                "accuracy": round(accuracy, 6),
                "votes": digest,
                **more,
            }
        )
    )


def by_cellstore(folder: Path) -> None:
    import duckdb  # noqa: F401 - imports are not on the clock
    from adbc_driver_sqlite import dbapi  # noqa: F401
    from pyarrow import dataset  # noqa: F401

    from cellstore.report import votes as stage  # noqa: F401
    from cellstore.store import Store

    run = str(predict_run(folder))

    def work() -> tuple[float, Any]:
        with Store.open(folder / "store") as store:
            found = store.votes(run)
        return found.accuracy or 0.0, found.table

    timed(work, lambda table: pairs(folder, table))


def pairs(folder: Path, table: Any) -> list[tuple[int, int]]:
    with sqlite3.connect(sqlite_file(folder)) as db:
        labels = {value: number for number, value in db.execute("SELECT id, value FROM labels")}
    images = table["image_id"].to_pylist()
    winners = [labels[name] for name in table["winner"].to_pylist()]
    return list(zip(images, winners, strict=True))


def by_command(folder: Path) -> None:
    import pyarrow.parquet as pq

    answer = folder / "answer.parquet"
    answer.unlink(missing_ok=True)
    words = [str(Path(sys.executable).with_name("cellstore")), "votes"]
    words += ["--run", str(predict_run(folder)), "--store", str(folder / "store")]
    words += ["--format", "parquet", "--output", str(answer)]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    table = pq.read_table(answer)
    correct = table["correct"].to_pylist()
    cpu = used.ru_utime + used.ru_stime
    accuracy = sum(correct) / len(correct)
    told(seconds, cpu, used.ru_maxrss, accuracy, pairs(folder, table), whole=seconds)


def by_polars(folder: Path) -> None:
    import connectorx  # type: ignore[import-not-found]  # noqa: F401
    import polars as pl  # type: ignore[import-not-found]

    rows = ROWS.format(run=predict_run(folder))

    def work() -> tuple[float, Any]:
        uri = f"sqlite://{sqlite_file(folder)}"
        cells, images = (
            pl.read_database_uri(query, uri, engine="connectorx") for query in (rows, TRUTH)
        )
        found = (
            cells.lazy()
            .group_by("image_id", "label_id")
            .agg(votes=pl.len(), weight=pl.col("probability").sum())
            .sort("image_id", "votes", "weight", "label_id", descending=[False, True, True, False])
            .unique("image_id", keep="first", maintain_order=True)
            .join(images.lazy(), on="image_id")
            .collect()
        )
        accuracy = float((found["label_id"] == found["truth"]).mean())
        return accuracy, found

    timed(work, lambda found: list(found.select("image_id", "label_id").iter_rows()))


def by_duckdb(folder: Path) -> None:
    import duckdb

    query = VOTE.format(rows=ROWS.format(run=predict_run(folder)), truth=TRUTH)

    def work() -> tuple[float, Any]:
        with duckdb.connect(str(folder / "native.duckdb"), read_only=True) as own:
            found = own.execute(query).fetchnumpy()
        return float((found["label_id"] == found["truth"]).mean()), found

    def votes(found: Any) -> list[tuple[int, int]]:
        return list(zip(found["image_id"].tolist(), found["label_id"].tolist(), strict=True))

    timed(work, votes)


STEPS: dict[str, Callable[[Path], None]] = {
    "cellstore, first": by_cellstore,
    "cellstore, again": by_cellstore,
    "command, first": by_command,
    "command, again": by_command,
    "polars": by_polars,
    "DuckDB": by_duckdb,
}

if __name__ == "__main__":
    main()
