r"""The whole way of a screen by command, killed again and again; then compared with peace.

    python benchmarks/kill_test.py
    python benchmarks/kill_test.py --kills 60 --database postgres

Rendered plates go from ``ingest`` to ``export`` in two stores: once in peace, and once with
SIGKILL at random moments of each command (to all its processes, to the leading one alone, or to one
of its workers), after which the same command is given again. At the end: do both stores have the
same rows and the same table, is every file what its row says, and is nothing left over?
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pandas as pd
from jobs_speed import postgres
from killing import children

from cellstore.analysis.rendering import DEMO_TREATMENTS, PlateDesign
from cellstore.artifacts import PART
from cellstore.demo import render_plates
from cellstore.store import Store

PROGRAM = [sys.executable, "-c", "from cellstore_cli.app import run; run()"]
DESIGN = PlateDesign(
    plates=("P1",), treatments=DEMO_TREATMENTS[:3], control_wells=8, treated_wells=5, size=128
)
MOST_TRIES = 20
STEPS = (
    ("ingest", "{plates}/metadata.csv", "--images", "{plates}/images"),
    ("segment", "--preset", "published", "--workers", "2"),
    ("measure", "--features", "basic,intensity", "--channels", "RNA", "--workers", "2"),
    ("qc",),
    ("split", "create", "by-well"),
    ("train", "--split", "by-well", "--baseline", "logistic", "--no-predict"),
    ("predict",),
    ("apply", "mine:embed", "--name", "mine", "--crop", "16", "--workers", "2"),
    ("apply", "mine:label", "--name", "mine", "--gives", "probabilities", "--crop", "16"),
    ("votes",),
    ("profile", "--select", "none"),
    ("hits", "--permutations", "100"),
    ("export", "{store}.csv", "--force"),
)
MODULE = """
import numpy as np
from scipy.special import softmax

def embed(batch):
    return np.concatenate([batch["image"].mean((2, 3)), batch["image"].std((2, 3))], axis=1)

def label(batch):
    return softmax(embed(batch)[:, :3], axis=1)
"""
"""A function for each kind of result; the screen has three classes."""
WHERE = "JOIN images AS i ON i.id = {0}.image_id JOIN wells AS w ON w.id = i.well_id"
CELL = f"JOIN segmentations AS s ON s.id = c.segmentation_id {WHERE.format('s')}"
FACTS = {
    # The digest of a prediction is of all digits, that of a measurement has the ids of cells.
    "jobs": "SELECT r.stage, w.name, i.site, j.status, "
    "CASE WHEN r.stage NOT IN ('predict', 'measure') THEN j.digest END FROM jobs AS j "
    f"JOIN recipes AS r ON r.id = j.recipe_id {WHERE.format('j')}",
    "cells": "SELECT w.name, i.site, c.object_number, c.min_row, c.min_col, c.excluded "
    f"FROM cells AS c {CELL}",
    "features": "SELECT w.name, i.site, c.object_number, f.area, f.perimeter, f.solidity "
    f"FROM features AS f JOIN cells AS c ON c.id = f.cell_id {CELL}",
    "quality": "SELECT w.name, i.site, q.channel, q.background FROM image_quality AS q "
    f"{WHERE.format('q')}",
    "split": "SELECT w.name, i.site, m.subset, l.value FROM split_members AS m "
    f"JOIN labels AS l ON l.id = m.label_id {WHERE.format('m')}",
    # The cells have other numbers, so that sums are in another order.
    "predictions": "SELECT w.name, i.site, c.object_number, p.rank, l.value, "
    "round(p.probability, 4) FROM predictions AS p JOIN labels AS l ON l.id = p.label_id "
    f"JOIN cells AS c ON c.id = p.cell_id {CELL}",
    "embedding": "SELECT w.name, i.site, c.object_number, round(f.embedding_000, 4), "
    f"round(f.embedding_005, 4) FROM mine AS f JOIN cells AS c ON c.id = f.cell_id {CELL}",
    "profiles": "SELECT well, n_cells, n_images, round(area, 6), round(extent, 6) FROM profiles",
    "scores": "SELECT level, name, measure, quantity, verdict, round(value, 6), round(q, 6) "
    "FROM treatment_scores",
    "votes": "SELECT level, vote, plate, well, site, winner, n_cells, round(share, 4) FROM votes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    args = parser.parse_args()
    kinds = ["sqlite", "postgres"] if args.database == "both" else [args.database]
    wrong = [kind for kind in kinds if not survived(kind, args.kills, args.seed)]
    sys.exit(f"Not survived: {', '.join(wrong)}" if wrong else 0)


def survived(kind: str, kills: int, seed: int) -> bool:
    """Whether both stores are the same, whole, and have nothing left over."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls: list[str | None] = [None, None]
        if kind == "postgres":
            url = stack.enter_context(postgres(folder / "pg"))
            urls = [url.format("small"), url.format("large")]
        render_plates(folder / "plates", design=DESIGN)
        (folder / "mine.py").write_text(MODULE)
        chance, calm, killed = random.Random(seed), folder / "calm", folder / "killed"
        seconds = [0.0] * len(STEPS)
        for store, address in zip((calm, killed), urls, strict=True):
            database = [] if address is None else ["--database", address]
            subprocess.run([*PROGRAM, "init", store, *database], check=True, capture_output=True)
        for number, step in enumerate(STEPS):
            began = time.monotonic()
            if go(calm, step, folder) != 0:
                sys.exit(f"{step[0]} ended with an error, without any kill")
            seconds[number] = time.monotonic() - began
        done = tries = 0
        for number, step in enumerate(STEPS):
            share = kills * (number + 1) // len(STEPS) - done
            some, again = go_killed(killed, step, folder, share, seconds[number], chance)
            done, tries = done + some, tries + again
        left = leftovers(killed)
        fixed = go(killed, ("verify", "--fix", "--older-than", "0"), folder)
        whole = go(killed, ("verify",), folder) == 0
        after = leftovers(killed)
        same = {name: facts(calm, query) == facts(killed, query) for name, query in FACTS.items()}
        same["table"] = exported(calm) == exported(killed)
    print(
        f"{kind:9} {len(DESIGN)} images, {done} kills, {tries} more tries; left over {len(left)}, "
        f"after verify --fix {len(after)} (it ended with {fixed}, then verify "
        f"{'0 problems' if whole else 'PROBLEMS'}); different: "
        + (", ".join(name for name, is_same in same.items() if not is_same) or "nothing"),
        flush=True,
    )
    return whole and not after and all(same.values())


def start(store: Path, step: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Begin a command; what it says goes to a file."""
    names = {"plates": folder / "plates", "store": store}
    words = [word.format(**names) for word in step]
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [*PROGRAM, *words, "--store", store],
            stdout=said, stderr=said, start_new_session=True, cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def go(store: Path, step: Sequence[str], folder: Path) -> int:
    """Run a command to its end."""
    return start(store, step, folder).wait()


def go_killed(
    store: Path,
    step: Sequence[str],
    folder: Path,
    kills: int,
    seconds: float,
    chance: random.Random,
) -> tuple[int, int]:
    """Kill a command that often, then let it end; return the kills, and the tries after them."""
    done = tries = 0
    for _ in range(3 * kills):  # some commands are done before they are killed
        if done == kills:
            break
        process = start(store, step, folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.0, seconds))
        if process.poll() is None:
            done += 1
            kind, workers = chance.choice(("all", "leader", "worker")), children(process.pid)
            with suppress(ProcessLookupError):
                if kind == "all":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    only = kind == "worker" and workers
                    os.kill(chance.choice(workers) if only else process.pid, signal.SIGKILL)
            process.wait()
    while go(store, step, folder) != 0:
        if b"is there already" in (folder / "said").read_bytes()[-400:]:
            break  # a split that was made before its command was killed
        tries += 1
        if tries > MOST_TRIES:
            sys.exit((folder / "said").read_text()[-2000:])
        go(store, ("retry",), folder)
    return done, tries


def leftovers(store: Path) -> list[Path]:
    """What a command keeps only while it runs."""
    spill = store / "cache" / "spill"
    return [path for path in store.rglob("*") if PART in path.name or path.parent == spill]


def facts(store: Path, query: str) -> list[str]:
    """The rows that a question gives, in an order of their own."""
    with Store.open(store) as opened:
        return sorted(map(str, opened.sql(query).to_pylist()))


def exported(store: Path) -> list[str]:
    """The lines of the table without the numbers of cells, in an order of their own."""
    table = pd.read_csv(store.with_suffix(".csv"), dtype=str).drop(columns="Metadata_CellId")
    return sorted(map(str, table.itertuples(index=False)))


if __name__ == "__main__":
    main()
