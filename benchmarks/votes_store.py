"""A store whose images are labelled cell by cell by two runs, made of drawn rows by bulk SQL.

Images differ in how hard they are and in their number of cells (one in fifty has six or fewer, so
that votes are tied). Wrong answers of an image go mostly to three labels. Probabilities are
multiples of 1/1024: their sums are exact in any order, so every engine must find the same votes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from cellstore.config import PredictParams, SegmentParams, TrainParams
from cellstore.enums import PERTURBATION, GroupLevel, PerturbationKind, Stage, Subset
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Image,
    Label,
    Perturbation,
    Plate,
    Split,
    Treatment,
    TreatmentPart,
    Well,
)
from cellstore.stages.ingest.write_treatments import treatment_values

COMPOUND = PerturbationKind.COMPOUND

LABELS = 250
WELLS = 384
SITES = 9
COLUMNS = 24
ROWS_AT_ONCE = 500_000
QUICK = "PRAGMA synchronous=OFF; PRAGMA cache_size=-400000; PRAGMA foreign_keys=OFF;"


def make_store(root: Path, cells: int, images: int) -> None:
    """Make a store of so many cells and images, with two predict runs that labelled every cell."""
    root.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    workspace, _ = create_workspace(root)
    try:
        truth = _insert_images(workspace, images)
        image_of = np.repeat(np.arange(images), _counts(rng, cells, images))
        # A run that has ended takes no more rows.
        with closing(sqlite3.connect(root / "cellstore.db")) as db, ExitStack() as going_on:
            segmented, predicted = _make_runs(workspace, going_on)
            db.executescript(QUICK)
            _insert_cells(db, image_of, segmented)
            for run in predicted:
                _insert_predictions(db, run, image_of, truth, rng)
            db.execute("ANALYZE")
            db.commit()
    finally:
        workspace.database.close()


def _counts(rng: np.random.Generator, cells: int, images: int) -> NDArray[np.int64]:
    few = rng.random(images) < 0.02
    wanted = np.where(few, rng.integers(1, 7, images), 0)
    weight = np.where(few, 0, rng.gamma(6.0, 1.0, images))
    found: NDArray[np.int64] = wanted + rng.multinomial(
        cells - int(wanted.sum()), weight / weight.sum()
    )
    return found


def _insert_images(workspace: Workspace, images: int) -> NDArray[np.int64]:
    """Make plates, wells, images and their split; return the label id of each image."""
    with workspace.database.begin() as session:
        names = [f"compound {i:03d}" for i in range(LABELS)]
        kinds = [
            Treatment(
                **treatment_values([TreatmentRecord(COMPOUND, name)]),
                parts=[
                    TreatmentPart(position=1, perturbation=Perturbation(kind=COMPOUND, name=name))
                ],
            )
            for name in names
        ]
        labels = [Label(field=PERTURBATION, value=name) for name in names]
        plates = [
            Plate(barcode=f"BR{116990 + i:08d}") for i in range(-(-images // (WELLS * SITES)))
        ]
        session.add_all([*kinds, *labels, *plates])
        session.flush()
        kind_ids, label_ids = [kind.id for kind in kinds], [label.id for label in labels]
        session.add_all(_wells(plates, kind_ids, images))
        session.flush()
        wells = session.execute(select(Well.id, Well.name, Well.treatment_id).order_by(Well.id))
        fields = [(*well, site) for well in wells for site in range(1, SITES + 1)][:images]
        session.add_all(
            Image(well_id=well, site=site, core_name=f"{name}f{site:02d}")
            for well, name, _, site in fields
        )
        recipe = register(session, RecipeSpec(Stage.SPLIT, 1, {"drawn": True}))
        session.add(_split(recipe.id))
    truth = np.array([label_ids[kind_ids.index(kind)] for _, _, kind, _ in fields])
    _insert_members(workspace, truth)
    return truth


def _wells(plates: list[Plate], kinds: list[int], images: int) -> Iterator[Well]:
    for number in range(-(-images // SITES)):
        row, column = divmod(number % WELLS, COLUMNS)
        yield Well(
            plate_id=plates[number // WELLS].id,
            well_row=row + 1,
            well_column=column + 1,
            name=f"{chr(65 + row)}{column + 1:02d}",
            treatment_id=kinds[number * 7 % LABELS],
        )


def _split(recipe_id: int) -> Split:
    return Split(
        name="drawn",
        recipe_id=recipe_id,
        protocol="published",
        field=PERTURBATION,
        group_level=GroupLevel.IMAGE,
        seed=0,
        query="SELECT id FROM images",
        fingerprint="5" * 64,
        excluded={},
        created_at=datetime.now(UTC),
        frozen_at=None,
    )


def _insert_members(workspace: Workspace, truth: NDArray[np.int64]) -> None:
    with workspace.database.begin() as session:
        connection = session.connection()
        rows = [(1, i, Subset.TEST.value, label) for i, label in enumerate(truth.tolist(), 1)]
        connection.exec_driver_sql("INSERT INTO split_members VALUES (?, ?, ?, ?)", rows)


def _make_runs(workspace: Workspace, going_on: ExitStack) -> tuple[int, list[int]]:
    """Return the segmentation run and two predict runs, which end with ``going_on``."""
    run = partial(_run, workspace, going_on)
    segmented = run(Stage.SEGMENT, asdict(SegmentParams.of("published")))
    trained = [run(Stage.TRAIN, asdict(TrainParams(seed=seed)), split_id=1) for seed in (0, 1)]
    plain = asdict(PredictParams())
    return segmented, [run(Stage.PREDICT, plain, parent, 1) for parent in trained]


def _run(
    workspace: Workspace,
    going_on: ExitStack,
    stage: Stage,
    parameters: Any,
    parent: int | None = None,
    split_id: int | None = None,
) -> int:
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(stage, 1, parameters))
    run = running(workspace.database, recipe, parent_id=parent, split_id=split_id)
    return int(going_on.enter_context(run).id)


def _insert_cells(db: sqlite3.Connection, image_of: NDArray[np.int64], run: int) -> None:
    counts = np.bincount(image_of)
    db.executemany(
        "INSERT INTO segmentations (id, image_id, recipe_id, run_id, n_cells, created_at)"
        " SELECT ?, ?, recipe_id, id, ?, started_at FROM runs WHERE id = ?",
        ((i, i, count, run) for i, count in enumerate(counts.tolist(), start=1)),
    )
    starts = np.cumsum(counts) - counts
    labels = np.arange(image_of.size) - starts[image_of] + 1
    statement = (
        "INSERT INTO cells (id, segmentation_id, object_number, min_row, min_col, max_row, max_col,"
        " centroid_row, centroid_col) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    for part in _parts(image_of.size):
        row = (labels[part] * 37) % 1000
        column = (labels[part] * 101) % 1000
        values = [np.arange(part.start, part.stop) + 1, image_of[part] + 1, labels[part]]
        values += [row, column, row + 30, column + 30, row + 14.5, column + 15.25]
        db.executemany(statement, zip(*(item.tolist() for item in values), strict=True))
    db.commit()


def _insert_predictions(
    db: sqlite3.Connection,
    run: int,
    image_of: NDArray[np.int64],
    truth: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    known = np.unique(truth)
    skill = rng.beta(1.2, 2.5, truth.size)
    confusers = rng.choice(known, (truth.size, 3))
    for part in _parts(image_of.size):
        images = image_of[part]
        draw = rng.random(images.size)
        wrong = confusers[images, rng.integers(0, 3, images.size)]
        wrong = np.where(rng.random(images.size) < 0.6, wrong, rng.choice(known, images.size))
        labels = np.where(draw < skill[images], truth[images], wrong)
        chances = rng.integers(20, 1020, images.size) / 1024
        cells = range(part.start + 1, part.stop + 1)
        db.executemany(
            f"INSERT INTO predictions VALUES ({int(run)}, ?, 1, ?, ?)",
            zip(cells, labels.tolist(), chances.tolist(), strict=True),
        )
    db.commit()


def _parts(total: int) -> Iterator[slice]:
    for start in range(0, total, ROWS_AT_ONCE):
        yield slice(start, min(total, start + ROWS_AT_ONCE))
