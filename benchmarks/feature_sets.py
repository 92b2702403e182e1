r"""How fast CellProfiler's tables become a feature set, beside DuckDB and CytoTable.

    python benchmarks/feature_sets.py measurements.sqlite
    python benchmarks/feature_sets.py small.sqlite --cells 48000 \
        --scanner-python duckdb-env/bin/python --cytotable-python cytotable-env/bin/python

``--cells`` first scales a small SQLite file of the cytominer-database layout (tables Image, Cells,
Nuclei, Cytoplasm): its rows again and again, numbers with a little noise, 120 cells per image.

Every line is a process of its own, with its own peak memory. The clock of each starts when its
imports are done and the file was read once, and ends when the result is on disk: cellstore's also
makes the store, finds out the sha256 of the file, writes plates, wells, images, segmentations and
cells, and syncs its files; the others write one Parquet file and sync nothing. ``DuckDB, Arrow``
reads the tables through ADBC; ``DuckDB, scanner`` (its SQLite extension, from
``duckdb-extension-sqlite-scanner`` in the environment of ``--scanner-python``) reads them itself.
CytoTable's workers leave its process: its CPU and memory are those of the parent alone.
All must agree on the number of cells and on the sum of Cells_AreaShape_Area.
"""

from __future__ import annotations

import argparse
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
from contextlib import closing
from pathlib import Path
from typing import Any

OBJECTS = ("Cytoplasm", "Cells", "Nuclei")
KEYS = ("TableNumber", "ImageNumber")
AREA = "Cells_AreaShape_Area"
CELLS_OF_IMAGE = 120


def main() -> None:
    args = parsed()
    if args.step is not None:
        STEPS[args.step](args.source, args.work)
        return
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="feature-sets-", dir=args.work))
    try:
        source = args.source.resolve()
        if args.cells:
            source = scaled(source, folder / "scaled.sqlite", args.cells)
        compare(source, folder, pythons(args), args.repeat)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="SQLite file in cytominer-database layout")
    parser.add_argument("--cells", type=int, help="scale the file to about as many cells first")
    parser.add_argument("--repeat", type=int, default=1, help="times; the median is shown")
    parser.add_argument("--scanner-python", type=Path, help="a Python with DuckDB's scanner")
    parser.add_argument("--cytotable-python", type=Path, help="a Python with CytoTable")
    parser.add_argument("--work", type=Path, help="where to write (some GB)")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    return parser.parse_args()


def pythons(args: argparse.Namespace) -> dict[str, str]:
    """Return the Python of each step that can be run."""
    found = {"cellstore": sys.executable, "cellstore again": sys.executable}
    found["DuckDB, Arrow"] = sys.executable
    if args.scanner_python:
        found["DuckDB, scanner"] = str(args.scanner_python.absolute())
    if args.cytotable_python:
        found["CytoTable"] = str(args.cytotable_python.absolute())
    return found


def compare(source: Path, folder: Path, steps: dict[str, str], repeat: int) -> None:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for _ in range(repeat):  # in turns: a busy minute hits all alike
        shutil.rmtree(folder / "store", ignore_errors=True)
        for name, python in steps.items():
            runs[name].append(measured(name, python, source, folder))
    answers = {
        name: {(run["cells"], run["area"]) for run in of_step} for name, of_step in runs.items()
    }
    if len(set().union(*answers.values())) > 1:
        sys.exit(f"The answers differ: {answers}")
    floor = "DuckDB, scanner" if "DuckDB, scanner" in steps else "DuckDB, Arrow"
    show(source, runs, floor)


def show(source: Path, runs: dict[str, list[dict[str, Any]]], floor: str) -> None:
    middle = {name: sorted(r, key=lambda x: x["seconds"])[len(r) // 2] for name, r in runs.items()}
    first = next(iter(middle.values()))
    size = source.stat().st_size / 1e6
    print(f"{size:,.0f} MB of SQLite, {first['cells']:,} cells, sum of {AREA} {first['area']:,.0f}")
    print(f"{'':18} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'/ ' + floor:>18}")
    for name, run in middle.items():
        ratio = run["seconds"] / middle[floor]["seconds"]
        print(f"{name:18} {run['seconds']:8.2f} {run['cpu']:8.2f} {run['mb']:8.0f} {ratio:18.2f}")


def measured(step: str, python: str, source: Path, folder: Path) -> dict[str, Any]:
    """Run a step in a process of its own; it prints what it took."""
    words = [python, __file__, str(source), "--step", step, "--work", str(folder)]
    # As an activated environment would: tools of that environment are found first.
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{step}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def timed(work: Callable[[], None], answer: Callable[[], tuple[int, float]], source: Path) -> None:
    """Run ``work`` on a file that is in memory already, and print what it took."""
    with source.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    before = processor_seconds()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    cpu = processor_seconds() - before
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(who).ru_maxrss for who in both) / 1024
    cells, area = answer()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": peak, "cells": cells, "area": area}))


def processor_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def by_cellstore(source: Path, folder: Path) -> None:
    from adbc_driver_sqlite import dbapi  # noqa: F401 - imports (of pandas) are not on the clock

    from cellstore.stages.ingest import ingest_features  # noqa: F401
    from cellstore.store import Store

    def work() -> None:
        with Store.create(folder / "store") as store:
            result = store.ingest(source)
        assert result.cells, "nothing was created"

    timed(work, lambda: in_store(folder / "store"), source)


def by_cellstore_again(source: Path, folder: Path) -> None:
    from adbc_driver_sqlite import dbapi  # noqa: F401 - imports (of pandas) are not on the clock

    from cellstore.stages.ingest import ingest_features  # noqa: F401
    from cellstore.store import Store

    def work() -> None:
        with Store.open(folder / "store") as store:
            result = store.ingest(source)
        assert result.unchanged == result.rows, "something changed"

    timed(work, lambda: in_store(folder / "store"), source)


def in_store(store: Path) -> tuple[int, float]:
    return in_parquet(store.glob("artifacts/features/*/*.parquet"))


def in_parquet(paths: Iterator[Path]) -> tuple[int, float]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = [pq.read_table(path, columns=[AREA])[0] for path in paths]
    return sum(map(len, columns)), sum(pc.sum(pc.cast(item, "float64")).as_py() for item in columns)


def by_duckdb_arrow(source: Path, folder: Path) -> None:
    import duckdb
    from adbc_driver_sqlite import dbapi

    target = folder / "arrow.parquet"

    def work() -> None:
        con = duckdb.connect()
        with dbapi.connect(f"file:{source}?mode=ro") as db, db.cursor() as cursor:
            for table in (*OBJECTS, "Image"):
                listed = ", ".join(guarded(name, kind) for name, kind in columns_of(source, table))
                # A batch as long as the table: its types are told from all of its rows.
                cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": "10000000"})
                cursor.execute(f'SELECT {listed} FROM "{table}"')
                con.register(table, cursor.fetch_arrow_table())
        con.execute(joined({name: name for name in (*OBJECTS, "Image")}, target))

    timed(work, lambda: in_parquet(iter([target])), source)


def guarded(name: str, kind: str) -> str:
    return f'nullif("{name}", \'nan\') AS "{name}"' if kind == "FLOAT" else f'"{name}"'


def by_duckdb_scanner(source: Path, folder: Path) -> None:
    import duckdb
    from duckdb_extensions import import_extension  # type: ignore[import-not-found]

    target = folder / "scanner.parquet"
    con = duckdb.connect()
    import_extension("sqlite_scanner", con=con)

    def work() -> None:
        con.execute("LOAD sqlite_scanner; SET sqlite_all_varchar = true")
        con.execute(f"ATTACH '{source}' AS s (TYPE sqlite, READ_ONLY)")
        con.execute(joined({table: typed(source, table) for table in (*OBJECTS, "Image")}, target))

    timed(work, lambda: in_parquet(iter([target])), source)


def typed(source: Path, table: str) -> str:
    """SQLite holds the text 'nan' in FLOAT columns: read as text, cast column by column."""
    kinds = {"FLOAT": "DOUBLE", "BIGINT": "BIGINT"}
    listed = ", ".join(
        f'"{name}"::{kinds.get(kind, "VARCHAR")} AS "{name}"'
        for name, kind in columns_of(source, table)
    )
    return f"(SELECT {listed} FROM s.{table})"


def columns_of(source: Path, table: str) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(source)) as db:
        found = [(row[1], row[2]) for row in db.execute(f'PRAGMA table_info("{table}")')]
    if table != "Image":
        return found
    return [item for item in found if item[0] in KEYS or "_Metadata_" in item[0]]


def joined(tables: dict[str, str], target: Path) -> str:
    keys = ", ".join(KEYS)
    of = {name: ", ".join(f"{name[:2]}.{key}" for key in KEYS) for name in tables}
    return f"""COPY (
        SELECT Im.Image_Metadata_Plate, Im.Image_Metadata_Well, Im.Image_Metadata_Site, Cy.*,
               Ce.* EXCLUDE ({keys}), Nu.* EXCLUDE ({keys})
        FROM {tables["Cytoplasm"]} Cy
        JOIN {tables["Cells"]} Ce
          ON ({of["Cells"]}, Ce.ObjectNumber) = ({of["Cytoplasm"]}, Cy.Cytoplasm_Parent_Cells)
        JOIN {tables["Nuclei"]} Nu
          ON ({of["Nuclei"]}, Nu.ObjectNumber) = ({of["Cytoplasm"]}, Cy.Cytoplasm_Parent_Nuclei)
        JOIN {tables["Image"]} Im ON ({of["Image"]}) = ({of["Cytoplasm"]})
    ) TO '{target}' (FORMAT parquet)"""


def by_cytotable(source: Path, folder: Path) -> None:
    import cytotable  # type: ignore[import-not-found]
    import duckdb
    from duckdb_extensions import import_extension

    for name in ("sqlite_scanner", "httpfs"):  # else it would download them
        import_extension(name, con=duckdb.connect())
    target = folder / "cytotable.parquet"
    os.chdir(folder)  # Parsl writes its logs where it stands

    def work() -> None:
        cytotable.convert(
            source_path=str(source),
            source_datatype="sqlite",
            dest_path=str(target),
            dest_datatype="parquet",
            preset="cell-health-cellprofiler-to-cytominer-database",
        )

    timed(work, lambda: in_parquet(iter([target])), source)


def scaled(source: Path, target: Path, cells: int) -> Path:
    """Write the rows of ``source`` again and again until there are about as many ``cells``."""
    images = max(1, cells // CELLS_OF_IMAGE)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        new.execute("PRAGMA synchronous = OFF")
        query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type DESC"
        for (sql,) in old.execute(query).fetchall():
            new.execute(sql)
        for table in ("Image", *OBJECTS):
            found = old.execute(f'SELECT * FROM "{table}" LIMIT {CELLS_OF_IMAGE}')
            names = [item[0] for item in found.description]
            marks = ", ".join("?" * len(names))
            rows = again(table, names, found.fetchall(), images)
            new.executemany(f'INSERT INTO "{table}" VALUES ({marks})', rows)
        new.commit()
    return target


def again(table: str, names: list[str], rows: list[Any], images: int) -> Iterator[list[Any]]:
    """Yield ``rows`` for image after image, each number a little different."""
    for image in range(images):
        number = 1 if table == "Image" else CELLS_OF_IMAGE
        for item in range(number):
            noise = 1 + 0.05 * (((image * 7919 + item * 104729) % 2001) / 1000 - 1)
            row = rows[(image + item) % len(rows)]
            fixed = key_values(image, item + 1)
            yield [
                fixed[name]
                if name in fixed
                else fixed.get(name.partition("_")[2], noisy(value, noise))
                for name, value in zip(names, row, strict=True)
            ]


def key_values(image: int, number: int) -> dict[str, Any]:
    well, site = divmod(image, 9)
    row, column = divmod(well, 24)
    return {
        "TableNumber": f"{image:032x}",
        "ImageNumber": image + 1,
        "ObjectNumber": number,
        "Number_Object_Number": number,
        "Parent_Cells": number,
        "Parent_Nuclei": number,
        "Metadata_Well": f"{chr(65 + row % 16)}{column + 1:02d}",
        "Metadata_Row": row % 16 + 1,
        "Metadata_Col": column + 1,
        "Metadata_Site": site + 1 + 9 * (row // 16),
    }


def noisy(value: Any, noise: float) -> Any:
    return value * noise if isinstance(value, float) else value


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "cellstore": by_cellstore,
    "cellstore again": by_cellstore_again,
    "DuckDB, Arrow": by_duckdb_arrow,
    "DuckDB, scanner": by_duckdb_scanner,
    "CytoTable": by_cytotable,
}

if __name__ == "__main__":
    main()
