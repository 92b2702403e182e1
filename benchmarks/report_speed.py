"""What a report costs: the numbers as text and the page, of one labelled 384-well plate.

python benchmarks/report_speed.py [--plates 1] [--wells 384] [--sites 9] [--cells 130]

Makes a store of drawn rows (see report_store.py), with two networks and four null baselines that
have labelled every cell, then times the commands as they are typed, each in a process of its own:
the first time, when the store's copies of big tables are made, and again. Prints seconds, those of
the processors (which others on the machine disturb less), peak memory and the size of the page. The
aim is less than 20 s and 5 MB for 450,000 cells.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report_store import add_design, design_of, make_store

COMMAND = [sys.executable, "-c", "from cellstore_cli.app import app; app()", "report"]


def measured(words: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, those of its processors, and its peak memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"This failed: {' '.join(words)}")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_design(parser)
    parser.add_argument("--keep", type=Path, help="make the store in this folder, and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        store, page = folder / "store", folder / "report.html"
        started = time.perf_counter()
        cells = make_store(store, design_of(options))
        print(f"{cells:,} cells, made in {time.perf_counter() - started:.0f} s\n")
        place = ["--store", str(store)]
        steps = {
            "report, first time": place,
            "report, again": place,
            "page": [*place, "--html", str(page)],
            "page, beside another run": [*place, "--html", str(page), "--compare", "4"],
        }
        print(f"{'':<28}{'seconds':>8}{'CPU s':>8}{'MB':>8}{'page MB':>9}")
        for name, words in steps.items():
            page.unlink(missing_ok=True)
            seconds, busy, memory = measured([*COMMAND, *words])
            size = f"{page.stat().st_size / 1e6:.2f}" if page.exists() else "-"
            row = f"{name:<28}{seconds:>8.1f}{busy:>8.1f}{memory:>8.0f}{size:>9}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
