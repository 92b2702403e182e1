"""What a person excludes counts nowhere, and again once it is undone: one relation says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from sqlalchemy import select

from cellstore.config import SplitParams, VoteOptions
from cellstore.enums import (
    CellFlagReason,
    ImageFlagReason,
    Level,
    Stage,
)
from cellstore.errors import UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import EXCLUSIONS, Run
from cellstore.query.cells import CellSource, list_blocks, read_cells
from cellstore.query.engine import open_questions
from cellstore.report.audit import audit
from cellstore.report.scoring import report
from cellstore.stages.export import export
from cellstore.stages.split import create_split
from cellstore.stages.status import status
from cellstore.store import Store

audit_cell = partial(audit, kind="cell")


@contextmanager
def excluded(make: Factory, level: Level, row_id: int) -> Iterator[None]:
    """Exclude something for a while."""
    found = make.exclude(level, row_id)
    yield
    make.undo(found)


def rows(workspace: Workspace, sql: str) -> list[dict[str, Any]]:
    with open_questions(workspace) as questions:
        return questions.ask(sql).records()


def source_of(screen: SmallScreen, **more: Any) -> CellSource:
    recipes = (screen.segment_run.recipe_id, screen.measure_run.recipe_id)
    return CellSource(*recipes, split_id=screen.split.id, **more)


def images_read(workspace: Workspace, source: CellSource) -> dict[int, int]:
    with workspace.database.read() as session:
        return {block.image_id: block.n_cells for block in list_blocks(session, source)}


def test_the_relation_says_what_why_and_who(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    cells = make.cells_of(screen.segmentations["B01"])
    small = make.cells(screen.segmentations["B01"], 1, excluded="perimeter is 0")[0]
    qc = make.run(Stage.QC)
    make.flag_image(qc, screen.images["B02"], ImageFlagReason.CELL_COUNT)
    make.flag_cell(qc, cells[0], CellFlagReason.BORDER)
    well = make.exclude(Level.WELL, screen.images["B03"].well_id)
    bare = make.exclude(Level.CELL, cells[1].id, reason=None)
    make.undo(make.exclude(Level.PLATE, screen.plate.id))
    wanted = {
        ("cell", small.id, "perimeter is 0", "segmentation", None, None),
        ("image", screen.images["B02"].id, "cell count", "quality", qc.id, None),
        ("cell", cells[0].id, "touches the border", "quality", qc.id, None),
        ("well", screen.images["B03"].well_id, "debris", "annotation", None, well.id),
        ("cell", cells[1].id, "excluded by ada", "annotation", None, bare.id),
    }
    with workspace.database.read() as session:
        assert {tuple(row) for row in session.execute(select(EXCLUSIONS))} == wanted
    assert {tuple(row.values()) for row in rows(workspace, "FROM exclusions")} == wanted


def test_votes_and_report_leave_out_what_is_excluded(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    image = screen.images["B01"]
    cells = screen.factory.cells_of(screen.segmentations["B01"])
    before, scored = Store(workspace).votes(), report(workspace)  # copies of the run are made here
    assert (before.units, scored.cells) == (4, 7)
    with excluded(screen.factory, Level.PLATE, screen.plate.id):
        assert Store(workspace).votes().units == 0
        with pytest.raises(UserInputError):
            report(workspace)
    levels = {Level.WELL: image.well_id, Level.IMAGE: image.id, Level.CELL: cells[0].id}
    for level, number in levels.items():
        with excluded(screen.factory, level, number):
            gone = 1 if level is Level.CELL else 3
            votes, found = Store(workspace).votes(), report(workspace)
            assert votes.units == (4 if gone == 1 else 3)
            assert found.cells == 7 - gone
            assert any(f"no vote: 1 {level.value}." in note for note in found.notes)
            assert rows(workspace, "SELECT count(*) AS n FROM prediction_table")[0]["n"] == 8 - gone
            by_well = Store(workspace).votes(level="well", vote="median")
            assert by_well.units == votes.units
    after = Store(workspace).votes()
    assert after.table.equals(before.table)
    assert report(workspace).cells == 7


@pytest.mark.one_database
def test_the_answer_does_not_depend_on_the_copies(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on whether the images that an exclusion is about are counted by themselves."""
    views = ("image_label_counts", "ranked_votes", "votes", "scored_predictions")
    screen = small_screen(workspace)
    before = [rows(workspace, f"FROM {view} ORDER BY ALL") for view in views]
    cell = rows(workspace, "SELECT max(cell_id) AS id FROM predictions")[0]["id"]
    screen.factory.exclude(Level.CELL, cell)
    of_cell = [rows(workspace, f"FROM {view} ORDER BY ALL") for view in views]
    assert all(a != b for a, b in zip(before, of_cell, strict=True))
    screen.factory.exclude(Level.WELL, screen.images["B01"].well_id)
    first = Store(workspace).votes().table
    apart = [rows(workspace, f"FROM {view} ORDER BY ALL") for view in views]
    monkeypatch.setattr("cellstore.query.engine.MOST_RECOUNTED", -1)
    assert [rows(workspace, f"FROM {view} ORDER BY ALL") for view in views] == apart
    assert Store(workspace).votes().table.equals(first)
    for path in (workspace.settings.cache / "snapshots").iterdir():
        path.unlink()
    assert Store(workspace).votes().table.equals(first)
    assert audit(workspace, "BR1/B01/1", "image").record["labellings"] == []


@pytest.mark.one_database
def test_training_reads_no_excluded_image_and_predicting_reads_all(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    source = source_of(screen)
    before = images_read(workspace, source)
    assert len(before) == 5
    image = screen.images["B02"]
    with excluded(screen.factory, Level.WELL, image.well_id):
        assert images_read(workspace, source) == {k: n for k, n in before.items() if k != image.id}
        assert images_read(workspace, source_of(screen, annotated=True)) == before
        with workspace.database.read() as session:
            assert len(read_cells(session, source, image.id).cell_ids) == 0
    first = screen.factory.cells_of(screen.segmentations["B02"])[0]
    with excluded(screen.factory, Level.CELL, first.id):
        assert images_read(workspace, source)[image.id] == before[image.id] - 1
    assert images_read(workspace, source) == before


@pytest.mark.one_database
def test_flags_count_beside_annotations_where_they_are_asked_for(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    qc = make.run(
        Stage.QC,
        make.recipe(Stage.QC, inputs=[make.recipe(Stage.QC), segment_recipe(screen)]),
        result={"plates": ["BR1"], "state": ""},
    )
    make.flag_image(qc, screen.images["B02"], ImageFlagReason.CELL_COUNT)
    with excluded(make, Level.IMAGE, screen.images["B01"].id):
        assert Store(workspace).votes().units == 3
        options = VoteOptions(exclude_flagged=str(qc.id))
        assert Store(workspace).votes(vote_options=options).units == 2
        assert len(images_read(workspace, source_of(screen, unflagged_by=qc.id))) == 3
        found = report(workspace, vote_options=options)
        assert (found.images_flagged, found.cells_flagged) == (1, 2)
    assert Store(workspace).votes(vote_options=options).units == 3


def segment_recipe(screen: SmallScreen) -> Any:
    with screen.factory.workspace.database.read() as session:
        return session.get_one(Run, screen.segment_run.id).recipe


def test_a_split_names_no_excluded_image_and_says_how_many(workspace: Workspace) -> None:
    make = Factory(workspace)
    plate = make.plate("P1")
    treatments = [make.treatment("DMSO"), make.treatment("drug")]
    wells = [make.well(plate, 1, column, treatments[column % 2]) for column in range(1, 9)]
    for well in wells:
        make.image(well)
    before = create_split(workspace, "before")
    assert (before.images, before.excluded["annotated"]) == (8, 0)
    with excluded(make, Level.WELL, wells[0].id), excluded(make, Level.WELL, wells[1].id):
        during = create_split(workspace, "during")
    assert (during.images, during.excluded["annotated"]) == (6, 2)
    after = create_split(workspace, "after")
    assert (after.images, after.fingerprint) == (8, before.fingerprint)
    with (
        excluded(make, Level.PLATE, plate.id),
        pytest.raises(UserInputError, match="excluded by annotations"),
    ):
        create_split(workspace, "none", SplitParams())


@pytest.mark.one_database
def test_tables_export_audit_and_status_say_why(workspace: Workspace, tmp_path: Path) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    image, cell = screen.images["B01"], make.cells_of(screen.segmentations["B02"])[0]
    n_cells = len(make.cells_of(screen.segmentations["B01"]))

    def reasons() -> dict[str, int]:
        out = tmp_path / "cells.parquet"
        export(workspace, out, include_excluded=True, force=True)
        written = pq.read_table(out)["Metadata_Excluded"].to_pylist()
        found = rows(workspace, "SELECT excluded FROM cell_table ORDER BY cell_id")
        assert sorted(map(str, written)) == sorted(str(row["excluded"]) for row in found)
        return {
            "cells": sum(text is not None for text in written),
            "images": rows(workspace, "SELECT count(excluded) AS n FROM image_table")[0]["n"],
            "wells": rows(workspace, "SELECT count(excluded) AS n FROM well_table")[0]["n"],
            "status": status(workspace).excluded,
            "status images": status(workspace).excluded_images,
            "eligible": rows(workspace, "SELECT count(*) AS n FROM eligible_cells")[0]["n"],
            "audit": audit_cell(workspace, str(cell.id)).record["excluded"] == "debris",
        }

    all_cells = status(workspace).cells
    nothing = dict.fromkeys(("cells", "images", "wells", "status", "status images"), 0)
    assert reasons() == {**nothing, "eligible": all_cells, "audit": False}
    well, one = make.exclude(Level.WELL, image.well_id), make.exclude(Level.CELL, cell.id)
    gone = n_cells + 1
    assert reasons() == {
        "cells": gone,
        "images": 1,
        "wells": 1,
        "status": gone,
        "status images": 1,
        "eligible": all_cells - gone,
        "audit": True,
    }
    make.undo(well)
    make.undo(one)
    assert reasons() == {**nothing, "eligible": all_cells, "audit": False}


COUNTED = ("well", "n_images", "n_excluded_images", "n_cells", "n_excluded_cells")


def test_every_count_knows_what_is_excluded(workspace: Workspace) -> None:
    screen = small_screen(workspace)  # B01 to B04 have 3, 2, 2, 1 cells; A01 and A02 1 each
    make, store = screen.factory, Store(workspace)
    bare = make.image(make.well(screen.plate, 3, 1))
    make.segmentation(bare, screen.segment_run, 0)
    new = make.image(make.well(screen.plate, 3, 2))
    unmeasured = make.cells_of(make.segmentation(new, screen.segment_run, 2))

    def answers(name: str, *columns: str) -> list[tuple[Any, ...]]:
        return [tuple(row[c] for c in columns) for row in store.ask(name).to_pylist()]

    counts = ("wells", "treatments", "images", "cells", "excluded_images", "excluded_cells")
    assert answers("plates", *counts) == [(8, 2, 8, 12, 0, 0)]
    assert answers("unlabelled", "well") == [("A01",), ("A02",), ("C01",), ("C02",)]
    assert answers("wells-without-cells", "well") == [("C01",)]

    cell = make.cells_of(screen.segmentations["B01"])[0]
    for kind, name in (
        *(("well", "BR1/B02"), ("well", "BR1/A01"), ("well", "BR1/C01")),
        *(("cell", str(cell.id)), ("cell", str(unmeasured[0].id))),
    ):
        store.exclude(kind, name, reason="debris")
    assert answers("plates", *counts) == [(5, 2, 5, 7, 3, 5)]
    wells = ("name_with_dose", "wells", "images", "excluded_wells", "excluded_images")
    assert answers("treatments", *wells) == [("taxol", 3, 3, 1, 1), ("DMSO", 1, 1, 1, 1)]
    assert answers("unlabelled", "well", "cells", "excluded") == [("A02", 1, 0), ("C02", 1, 1)]
    assert answers("unmeasured", "well", "unmeasured") == [("C02", 1)]
    assert answers("few-cells", "well", "n_cells", "excluded") == [
        *(("A02", 1, 0), ("B04", 1, 0), ("C02", 1, 1), ("B01", 2, 1), ("B03", 2, 0))
    ]
    assert answers("cell-counts", "well", "images", "cells", "excluded", "per_image") == [
        *(("A01", 0, 0, 1, None), ("A02", 1, 1, 0, 1.0)),
        *(("B01", 1, 2, 1, 2.0), ("B02", 0, 0, 2, None), ("B03", 1, 2, 0, 2.0)),
        *(("B04", 1, 1, 0, 1.0), ("C01", 0, 0, 0, None), ("C02", 1, 1, 1, 1.0)),
    ]
    assert answers("wells-without-cells", "well") == []
    found = rows(workspace, f"SELECT {', '.join(COUNTED)} FROM well_table ORDER BY well")
    assert [tuple(row.values()) for row in found] == [
        *(("A01", 0, 1, 0, 1), ("A02", 1, 0, 1, 0), ("B01", 1, 0, 2, 1), ("B02", 0, 1, 0, 2)),
        *(("B03", 1, 0, 2, 0), ("B04", 1, 0, 1, 0), ("C01", 0, 1, 0, 0), ("C02", 1, 0, 1, 1)),
    ]
    query = "SELECT well, n_cells, n_excluded_cells FROM image_table WHERE plate = 'BR1' ORDER BY 1"
    assert [tuple(row.values()) for row in rows(workspace, query)][2:4] == [
        ("B01", 2, 1),
        ("B02", 0, 2),
    ]
