"""Doses in the views, worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from factories import Factory

from cellstore.enums import Level, Stage
from cellstore.jobs.workspace import Workspace
from cellstore.models import Plate
from cellstore.query.engine import open_questions


def ask(workspace: Workspace, sql: str) -> list[tuple[Any, ...]]:
    with open_questions(workspace) as questions:
        return list(questions.ask(sql).rows())


@pytest.fixture
def make(workspace: Workspace) -> Factory:
    return Factory(workspace)


@pytest.fixture
def plate(make: Factory) -> Plate:
    """A01: 1 uM taxol; A02: 10 uM of it; A03: it with zinc; A04: DMSO; A05: nothing known."""
    plate = make.plate("P1")
    make.treatment("taxol", "TUBB")
    make.treatment("zinc", "MT1A")
    treatments = [
        make.doses(("taxol", 1.0)),
        make.doses(("taxol", 10.0)),
        make.doses(("zinc", 0.5), ("taxol", 10.0)),
        make.treatment("DMSO"),
        None,
    ]
    wells = [make.well(plate, 1, column, item) for column, item in enumerate(treatments, start=1)]
    run = make.run(Stage.SEGMENT)
    for well in wells:
        make.cells_of(make.segmentation(make.image(well, 2), run, 2))
    return plate


def test_wells_and_cells_have_treatment_and_dose_apart(workspace: Workspace, plate: Plate) -> None:
    names = "plate, well, treatment, target, dose, dose_unit, control, excluded"
    expected = [
        ("P1", "A01", "taxol", "TUBB", 1.0, "uM", None, None),
        ("P1", "A02", "taxol", "TUBB", 10.0, "uM", None, None),
        ("P1", "A03", "taxol + zinc", "MT1A|TUBB", None, None, None, None),
        ("P1", "A04", "DMSO", None, None, None, "negative", None),
        ("P1", "A05", None, None, None, None, None, None),
    ]
    found = ask(workspace, f"SELECT {names} FROM well_table ORDER BY well")
    assert found == expected
    cells = ask(
        workspace,
        f"SELECT {names}, site, object_number FROM cell_table ORDER BY well, object_number",
    )
    assert cells == [(*row, 2, number) for row in expected for number in (1, 2)]


def test_components_have_the_dose_of_each_part(workspace: Workspace, plate: Plate) -> None:
    def part(name: str, dose: float | None) -> dict[str, Any]:
        unit = None if dose is None else "uM"
        return {"perturbation": name, "kind": "compound", "dose": dose, "dose_unit": unit}

    expected = {
        "A01": [part("taxol", 1.0)],
        "A02": [part("taxol", 10.0)],
        "A03": [part("taxol", 10.0), part("zinc", 0.5)],
        "A04": [part("DMSO", None)],
    }
    for relation in ("well_table", "image_table", "cell_table"):
        rows = ask(workspace, f"SELECT DISTINCT well, components FROM {relation}")
        known = {well: json.loads(text) for well, text in rows if text is not None}
        assert known == expected
        assert len(rows) == 5
    second = "SELECT well FROM well_table WHERE components ->> '$[1].dose' = '0.5'"
    assert ask(workspace, second) == [("A03",)]
    query = "SELECT name_with_dose, dose FROM treatment_table WHERE name_with_dose LIKE '% uM'"
    assert ask(workspace, f"{query} ORDER BY 1") == [
        ("taxol 1 uM", 1.0),
        ("taxol 10 uM", 10.0),
        ("taxol 10 uM + zinc 0.5 uM", None),
    ]


@pytest.mark.one_database
def test_an_untreated_well_has_no_components(make: Factory, workspace: Workspace) -> None:
    make.well(make.plate("P1"), 1, 1, make.doses())
    assert ask(workspace, "SELECT dose, components FROM well_table") == [(None, "[]")]


@pytest.mark.one_database
def test_a_well_says_why_the_whole_of_it_is_excluded(
    make: Factory, workspace: Workspace, plate: Plate
) -> None:
    first, second = (row[0] for row in ask(workspace, WELLS)[:2])
    image = ask(workspace, f"SELECT image_id FROM image_table WHERE well_id = {second}")[0][0]
    of_well = make.exclude(Level.WELL, first, "air bubble")
    make.exclude(Level.IMAGE, image, "out of focus")  # an image is not the whole well
    query = "SELECT excluded FROM well_table ORDER BY well"
    assert [row[0] for row in ask(workspace, query)] == ["air bubble", None, None, None, None]
    of_plate = make.exclude(Level.PLATE, plate.id, "dropped")
    expected = ["air bubble", *["dropped"] * 4]
    assert [row[0] for row in ask(workspace, query)] == expected
    make.undo(of_well)
    assert [row[0] for row in ask(workspace, query)] == ["dropped"] * 5
    make.undo(of_plate)
    assert [row[0] for row in ask(workspace, query)] == [None] * 5


WELLS = "SELECT well_id FROM well_table ORDER BY well"
