"""A small screen: a store filled end to end, without pixels."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Any

from factories import Factory, sha
from sqlalchemy import Table, func, insert, or_, select
from unguarded import as_owner

from cellstore.enums import ArtifactKind, GroupLevel, Stage, Subset
from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA, Image, Label, Plate, Run, Segmentation, Split


@dataclass(frozen=True)
class SmallScreen:
    """What :func:`small_screen` made."""

    factory: Factory
    plate: Plate
    images: dict[str, Image]
    labels: dict[str, Label]
    segmentations: dict[str, Segmentation]
    split: Split
    segment_run: Run
    measure_run: Run
    train_run: Run
    predict_run: Run

    @property
    def workspace(self) -> Workspace:
        return self.factory.workspace


VOTES: dict[str, tuple[Subset, str, list[list[tuple[str, float]]]]] = {
    # well: side, truth, the choices of each cell
    "A01": (Subset.TRAIN, "DMSO", []),
    "A02": (Subset.TRAIN, "taxol", []),
    # hard: DMSO 2, taxol 1; soft: DMSO 0.6+0.5+0.1 = 1.2, taxol 0.3+0.4+0.9 = 1.6
    "B01": (
        Subset.TEST,
        "DMSO",
        [
            [("DMSO", 0.6), ("taxol", 0.3)],
            [("DMSO", 0.5), ("taxol", 0.4)],
            [("taxol", 0.9), ("DMSO", 0.1)],
        ],
    ),
    # hard: a draw, 1 to 1; soft: taxol 0.8+0.3 = 1.1, DMSO 0.2+0.6 = 0.8
    "B02": (
        Subset.TEST,
        "taxol",
        [[("taxol", 0.8), ("DMSO", 0.2)], [("DMSO", 0.6), ("taxol", 0.3)]],
    ),
    # hard: a draw, and soft too (0.7 each): DMSO comes first in the alphabet
    "B03": (
        Subset.TEST,
        "taxol",
        [[("DMSO", 0.5), ("taxol", 0.2)], [("taxol", 0.5), ("DMSO", 0.2)]],
    ),
    # not in the split: all cells say taxol, and the treatment is taxol
    "B04": (Subset.TEST, "outside", [[("taxol", 0.75), ("DMSO", 0.25)]]),
}
"""The votes of :func:`small_screen`, worked out by hand."""


Kept = tuple[bytes, bytes | dict[Table, list[dict[str, Any]]]]
_KEPT: dict[tuple[GroupLevel, bool], Kept] = {}
"""What was made in an empty store of either database: it is put into the next one as it stands."""


def small_screen(workspace: Workspace, group_level: GroupLevel = GroupLevel.WELL) -> SmallScreen:
    """A plate of six wells with one image each, through every stage; see ``VOTES``."""
    database = workspace.database
    any_rows = [select(1).select_from(table).exists() for table in METADATA.sorted_tables]
    with database.read() as session:
        is_empty = not session.scalar(select(or_(*any_rows)))
    if not is_empty:
        return _make_screen(workspace, group_level)
    key = (group_level, database.is_sqlite)
    if key not in _KEPT:
        made = _make_screen(workspace, group_level)
        _KEPT[key] = pickle.dumps(replace(made, factory=None)), _content(workspace)
        return made
    screen, content = _KEPT[key]
    if isinstance(content, bytes):
        database.close()
        workspace.settings.sqlite.write_bytes(content)
    else:
        _insert(workspace, content)
    found: SmallScreen = pickle.loads(screen)
    return replace(found, factory=Factory(workspace))


def _content(workspace: Workspace) -> bytes | dict[Table, list[dict[str, Any]]]:
    """The file of an embedded database, the rows of any other."""
    if workspace.database.is_sqlite:
        workspace.database.close()
        return workspace.settings.sqlite.read_bytes()
    with workspace.database.read() as session:
        found = {
            table: [dict(row) for row in session.execute(select(table)).mappings()]
            for table in METADATA.sorted_tables
        }
    return {table: rows for table, rows in found.items() if rows}


def _insert(workspace: Workspace, rows: dict[Table, list[dict[str, Any]]]) -> None:
    with as_owner(workspace) as owner:
        for table, some in rows.items():
            owner.execute(insert(table), some)
            if "id" in table.columns:
                sequence = func.pg_get_serial_sequence(table.name, "id")
                owner.execute(select(func.setval(sequence, max(row["id"] for row in some))))


def _make_screen(workspace: Workspace, group_level: GroupLevel) -> SmallScreen:
    make = Factory(workspace)
    plate = make.plate("BR1", batch="2026_03")
    treatments = {"DMSO": make.treatment("DMSO"), "taxol": make.treatment("taxol", "TUBB")}
    labels = {name: make.label(name) for name in treatments}
    images = {
        name: make.image(
            make.well(
                plate,
                ord(name[0]) - 64,
                int(name[1:]),
                treatments["taxol" if truth == "outside" else truth],
            )
        )
        for name, (_, truth, _) in VOTES.items()
    }
    members = [
        (images[name], side, labels[truth])
        for name, (side, truth, _) in VOTES.items()
        if truth != "outside"
    ]
    segment_recipe = make.recipe(Stage.SEGMENT, weights_sha256=sha("cellpose weights"))
    segment_run = make.run(Stage.SEGMENT, segment_recipe)
    segmentations = {
        name: make.segmentation(images[name], segment_run, max(1, len(votes)))
        for name, (_, _, votes) in VOTES.items()
    }
    measure_recipe = make.recipe(Stage.MEASURE, inputs=[segment_recipe])
    measure_run = make.run(Stage.MEASURE, measure_recipe)
    for found in segmentations.values():
        make.features(make.cells_of(found), measure_run, area=64.0)
    split = make.split(members, group_level=group_level)
    train_recipe = make.recipe(Stage.TRAIN, inputs=[segment_recipe, measure_recipe])
    train_run = make.run(
        Stage.TRAIN, train_recipe, split_id=split.id, seed=0, query="SELECT cells.id FROM cells"
    )
    make.attach(train_run, make.artifact(ArtifactKind.CHECKPOINT, "model", ".safetensors"))
    make.attach(train_run, make.artifact(ArtifactKind.CHECKPOINT, "model json", ".json"))
    make.metrics(
        train_run,
        train_loss=[0.9, 0.7],
        validation_loss=[1.0, 0.8],
        train_accuracy=[0.5, 0.7],
        validation_accuracy=[0.4, 0.6],
    )
    predict_run = make.run(
        Stage.PREDICT,
        make.recipe(Stage.PREDICT, inputs=[train_recipe]),
        parent_id=train_run.id,
        split_id=split.id,
    )
    for name, (_, _, votes) in VOTES.items():
        if votes:
            answers = [[(labels[label], value) for label, value in cell] for cell in votes]
            make.predict(predict_run, make.cells_of(segmentations[name]), answers)
    return SmallScreen(
        make,
        plate,
        images,
        labels,
        segmentations,
        split,
        segment_run,
        measure_run,
        train_run,
        predict_run,
    )
