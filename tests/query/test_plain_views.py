"""Every view against plain SQL on the database itself, on random stores."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from factories import Factory
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plain_views import plain_views
from sqlalchemy import select, text

from cellstore.config import VoteOptions
from cellstore.enums import (
    ArtifactKind,
    CellFlagReason,
    GroupLevel,
    ImageFlagReason,
    Level,
    Stage,
    Status,
    Subset,
    Verdict,
)
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Label, Plate, Run
from cellstore.query import engine
from cellstore.query.engine import open_questions
from cellstore.query.source import VIEWS

LABELS = ("DMSO", "taxol", "zinc", "Ångström")
SIDES = (Subset.TRAIN, Subset.VALIDATION, Subset.TEST, Subset.TEST, None)
Rows = list[tuple[Any, ...]]


@pytest.fixture
def labels(workspace: Workspace) -> list[Label]:
    make = Factory(workspace)
    return [make.label(value) for value in LABELS]


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(random=st.randoms(use_true_random=False))
def test_every_view_equals_plain_sql_on_the_database(
    workspace: Workspace, labels: list[Label], random: Random
) -> None:
    # The store grows with every example: what was copied in the last one is read again.
    flags = add_plate(Factory(workspace), labels, random)
    vote_options = random_rules(random, flags)
    # Every second time views of many rows are not made once, as tables.
    few = engine.FEW if len(plates(workspace)) % 2 else -1
    with (
        patch.object(engine, "FEW", few),
        open_questions(workspace, vote_options=vote_options) as questions,
    ):
        ours = {name: questions.ask(f"SELECT * FROM {name}").table() for name in VIEWS}
    with plain_views(workspace, vote_options) as database:
        for name in VIEWS:
            columns = ", ".join(f'"{column}"' for column in ours[name].column_names)
            rows = database.execute(text(f"SELECT {columns} FROM {name}")).all()
            told = [tuple(row.values()) for row in ours[name].to_pylist()]
            alike(told, [tuple(row) for row in rows], name)


def plates(workspace: Workspace) -> list[int]:
    with workspace.database.read() as session:
        return list(session.scalars(select(Plate.id)))


def random_rules(random: Random, flags: Run) -> VoteOptions:
    return VoteOptions(
        min_cells=random.randint(1, 3),
        min_margin=random.choice([0.0, 0.25, 0.5]),
        controls=random.random() < 0.5,
        exclude_flagged=random.choice([None, str(flags.id)]),
    )


def add_plate(make: Factory, labels: list[Label], random: Random) -> Run:
    """A plate of a few wells, segmented and labelled by two runs; return who flagged some of it."""
    plate = make.plate()
    treatments = [make.treatment(name) for name in LABELS[:3]]
    wells = [
        make.well(plate, 1, column, random.choice([None, *treatments]))
        for column in range(1, random.randint(2, 4))
    ]
    images = [make.image(well, site) for well in wells for site in (1, 2)]
    split = make.split(
        members(random, images, labels), f"split of {plate.barcode}", GroupLevel.IMAGE
    )
    train = make.run(Stage.TRAIN, split_id=split.id)
    make.attach(train, make.artifact(ArtifactKind.CHECKPOINT, plate.barcode, ".safetensors"))
    segmented, flags = make.run(Stage.SEGMENT), make.run(Stage.QC)
    runs = [
        make.run(Stage.PREDICT, parent_id=train.id, split_id=split.id, status=status)
        for status in (Status.DONE, random.choice([Status.DONE, Status.RUNNING, Status.FAILED]))
    ]
    for image in images:
        found = make.segmentation(image, segmented, random.randint(0, 4))
        make.cells(found, random.randint(0, 1), excluded="perimeter is 0")
        cells = make.cells_of(found)
        for run in runs:
            said = [cell for cell in cells if random.random() < 0.9]
            make.predict(run, said, [choices(random, labels) for _ in said])
        of, row_id = random.choice([(Level.IMAGE, image.id), (Level.WELL, image.well_id)])
        for user in random.choices(("ada", "bob"), k=3):
            label = make.label_row(of, row_id, random.choice(LABELS), user_name=user)
            if random.random() < 0.3:
                make.undo(label)
        if random.random() < 0.2:
            make.flag_image(flags, image, ImageFlagReason.OUT_OF_FOCUS)
        for cell in cells[: random.randint(0, 1)]:
            make.flag_cell(flags, cell, CellFlagReason.BORDER)
            if random.random() < 0.3:
                make.exclude(Level.CELL, cell.id)
    hits = make.run(Stage.HITS)
    for treatment in treatments:
        for measure in random.sample(("hit", "effect", "activity", "cell_count"), 3):
            numbers = {name: random.random() for name in ("value", "low", "high", "p", "q")}
            verdict = Verdict.HIT if measure == "hit" else None
            make.score(hits, measure, treatment, **numbers, verdict=verdict, note=plate.barcode)
    for cell in cells[:1]:
        make.label_row(Level.CELL, cell.id, LABELS[0])
    make.label_row(Level.PLATE, plate.id, LABELS[1], field="focus")
    make.exclude(Level.WELL, wells[0].id)
    make.undo(make.exclude(Level.PLATE, plate.id))
    return flags


def members(
    random: Random, images: list[Image], labels: list[Label]
) -> list[tuple[Image, Subset, Label]]:
    sides = [(image, random.choice(SIDES)) for image in images]
    return [(image, side, random.choice(labels)) for image, side in sides if side is not None]


def choices(random: Random, labels: list[Label]) -> list[tuple[Label, float]]:
    """Few distinct probabilities, so that votes are tied; sums of them are exact."""
    chosen = random.sample(labels, random.randint(1, 3))
    return [(label, random.randint(0, 4) / 16) for label in chosen]


def alike(ours: Rows, plain: Rows, view: str) -> None:
    """Check that both are the same rows; the order is nobody's."""
    one, other = ([tuple(map(usual, row)) for row in rows] for rows in (ours, plain))
    assert len(one) == len(other), view
    for mine, theirs in zip(sorted(one, key=order), sorted(other, key=order), strict=True):
        assert [
            # SQLite knows seconds between two moments to a few hundred thousandths only.
            value if isinstance(value, str) else pytest.approx(value, rel=2e-5, nan_ok=True)
            for value in mine
        ] == list(theirs), view


def order(row: tuple[Any, ...]) -> list[str]:
    return [f"{value:.6f}" if isinstance(value, float) else value for value in row]


def usual(value: Any) -> Any:
    """What SQLite has no type for, as it stands there; every number as a float."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(sep=" ")[:19]
    if isinstance(value, str) and value[4:5] == "-" and value[10:11] == " ":
        return value[:19]
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return float(value)
