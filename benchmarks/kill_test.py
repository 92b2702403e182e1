r"""Segment images while its processes are killed, again and again; then compare with peace.

    python benchmarks/kill_test.py
    python benchmarks/kill_test.py --images 200 --kills 100 --seconds 0.6 --database postgres

A program segments small images with two workers (a threshold stands in for the network); at random
moments its parent or one of its workers gets SIGKILL, and a killed parent is started again. At the
end: is each image done once, are all rows those of an undisturbed run, is every file what its row
says? ``--seconds``: what an image takes, so that there is something to kill.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import killing
from jobs_speed import postgres
from sqlalchemy import func, select

from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import Job
from cellstore.stages.verify import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    args = parser.parse_args()
    kinds = ["sqlite", "postgres"] if args.database == "both" else [args.database]
    wrong = [kind for kind in kinds if not survived(kind, args)]
    sys.exit(f"Not survived: {', '.join(wrong)}" if wrong else 0)


def survived(kind: str, args: argparse.Namespace) -> bool:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = None
        if kind == "postgres":
            url = stack.enter_context(postgres(folder / "pg")).format("small")
        workspace, _ = create_workspace(folder / "store", url)
        killing.fill(workspace, folder / "images", args.images)
        began = time.monotonic()
        pauses = (0.3, 3.0)
        kills, parents = killing.kill_often(
            folder / "store", args.seconds, args.kills, pauses, args.seed
        )
        killing.segment_slowly(workspace)
        seconds = time.monotonic() - began
        same = is_same(workspace, folder, args.images)
        deaths = deaths_of(workspace)
        workspace.database.close()
    said = "as in peace" if same else "DIFFERENT"
    print(
        f"{kind:9} {args.images} images, {kills} kills ({parents} of the parent) in "
        f"{seconds:.0f} s; deaths noted {deaths[0]}, most over one image {deaths[1]}: {said}",
        flush=True,
    )
    return same


def is_same(workspace: Workspace, folder: Path, images: int) -> bool:
    calm, _ = create_workspace(folder / "calm")
    killing.fill(calm, folder / "images", images)
    killing.segment_slowly(calm)
    rows = killing.rows_of(workspace) == killing.rows_of(calm)
    counts = killing.counts_of(workspace) == killing.counts_of(calm)
    calm.database.close()
    verify(workspace, fix=True, minutes=0.0)  # a kill may leave a file that no row names
    return rows and counts and verify(workspace, minutes=0.0).ok


def deaths_of(workspace: Workspace) -> tuple[int, int]:
    with workspace.database.read() as session:
        total, most = session.execute(select(func.sum(Job.deaths), func.max(Job.deaths))).one()
    return int(total or 0), int(most or 0)


if __name__ == "__main__":
    main()
