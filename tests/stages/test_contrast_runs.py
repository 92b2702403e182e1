"""Contrasts in a store: rows that say what is there, and runs that are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from factories import Factory
from sqlalchemy import select, update

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import BaselineParams, ContrastParams
from cellstore.enums import Control, Stage, Status, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn.trained_models import open_model
from cellstore.models import Cell, CellFeatures, Image, Plate, Recipe, Run, Treatment, Well
from cellstore.stages.contrast import ContrastResult, ContrastRow, contrast
from cellstore.stages.train_baselines import train_baselines

pytest.importorskip("sklearn")

CELLS = 12
FAST = ContrastParams(nulls=19)
LAYOUT: dict[str, tuple[int, int]] = {
    # treatment: wells on the first plate, on the second
    "DMSO": (4, 4),
    "strong": (2, 2),
    "nothing": (3, 1),
    "once": (1, 0),
}


class Screen:
    """Two plates that differ much, and what ``LAYOUT`` says is on them; ``strong`` does much."""

    def __init__(self, workspace: Workspace) -> None:
        self.make = Factory(workspace)
        self.random = np.random.default_rng(1)  # one of 20 would let "nothing" look different
        self.treatments = {name: self.make.treatment(name) for name in LAYOUT}
        self.segment = self.make.run(Stage.SEGMENT)
        recipe = self.make.recipe(Stage.MEASURE, inputs=[self.recipe_of(self.segment)])
        self.measure = self.make.run(Stage.MEASURE, recipe)
        self.plates = [self.make.plate("P1"), self.make.plate("P2")]
        for index, plate in enumerate(self.plates):
            names = [name for name, wells in LAYOUT.items() for _ in range(wells[index])]
            for column, name in enumerate(names, start=1):
                shift = 100.0 * index + 5.0 * (name == "strong")
                self.well(plate, column, self.treatments[name], shift)

    def recipe_of(self, run: Run) -> Recipe:
        with self.make.workspace.database.read() as session:
            return session.get_one(Recipe, run.recipe_id)

    def well(self, plate: Plate, column: int, treatment: Treatment, shift: float = 0.0) -> Well:
        """A well with an image of some cells, whose first features are shifted."""
        well = self.make.well(plate, 1, column, treatment)
        found = self.make.segmentation(self.make.image(well), self.segment, CELLS)
        self.features(self.make.cells_of(found), shift)
        return well

    def features(self, cells: Sequence[Cell], shift: float) -> None:
        values = self.random.normal(size=(len(cells), len(FEATURE_NAMES) - 2))
        values[:, :3] += shift
        named = [dict(zip(FEATURE_NAMES, row, strict=False)) for row in values.tolist()]
        keys = {"recipe_id": self.measure.recipe_id, "run_id": self.measure.id}
        self.make.add_all(
            [
                CellFeatures(cell_id=cell.id, **keys, **row)
                for cell, row in zip(cells, named, strict=True)
            ]
        )


def by_name(result: ContrastResult) -> dict[str, ContrastRow]:
    return {row.treatment: row for row in result.rows}


def test_what_differs_is_told_from_what_does_not(workspace: Workspace) -> None:
    Screen(workspace)
    result = contrast(workspace, FAST)
    assert result.rows[0].treatment == "strong"
    rows = by_name(result)
    assert (rows["strong"].different, rows["strong"].auc) == ("yes", pytest.approx(1, abs=0.01))
    assert (rows["strong"].wells, rows["strong"].plates) == (4, 2)
    assert (rows["strong"].cells, rows["strong"].control_cells) == (48, 48)
    # On the first plate more often than controls are, and plates differ: that gives nothing away.
    assert rows["nothing"].different == "no"
    assert rows["nothing"].auc == pytest.approx(0.5, abs=0.2)
    assert (rows["once"].different, rows["once"].auc, rows["once"].wells) == (
        "too few wells",
        None,
        1,
    )
    assert rows["once"].note == "1 well with cells on plates that have both: none can be held out"
    chance = rows["DMSO vs DMSO"]
    assert (chance.null, chance.different, chance.wells) == (True, "chance", 4)
    assert chance.note == "19 times 4 control wells against the others"
    assert (result.control, result.treatments, result.tested, result.different) == ("DMSO", 3, 2, 1)
    run = run_of(workspace, result.run_id)
    assert (run.stage, run.status, run.seed) == (Stage.CONTRAST, Status.DONE, 0)


@pytest.mark.one_database
def test_each_dose_is_compared_by_itself_or_all_together(workspace: Workspace) -> None:
    screen = Screen(workspace)
    screen.make.treatment("kinase", "CDK1")
    low, high = (screen.make.doses(("kinase", dose)) for dose in (1.0, 10.0))
    for column, (item, shift) in enumerate(((low, 0.0), (high, 5.0)) * 2, start=1):
        well = screen.well(screen.plates[0], column + 12, item, shift)
        assert well.treatment_id == item.id
    rows = by_name(contrast(workspace, FAST))
    assert (rows["kinase 1 uM"].different, rows["kinase 10 uM"].different) == ("no", "yes")
    assert (rows["kinase 1 uM"].wells, rows["kinase 10 uM"].wells) == (2, 2)
    named = contrast(workspace, replace(FAST, treatments=("kinase",)))
    assert {row.treatment for row in named.rows if not row.null} == {"kinase 1 uM", "kinase 10 uM"}
    one = contrast(workspace, replace(FAST, treatments=("kinase 10 uM",)))
    assert {row.treatment for row in one.rows if not row.null} == {"kinase 10 uM"}
    together = by_name(contrast(workspace, replace(FAST, field="perturbation")))
    assert together["kinase"].wells == 4
    assert together.keys() >= {"strong", "nothing", "once"}
    targets = contrast(workspace, replace(FAST, field="target")).rows
    assert [(row.treatment, row.wells) for row in targets if not row.null] == [("CDK1", 4)]
    with pytest.raises(UnknownNameError, match="kinase 1 uM"):
        contrast(workspace, replace(FAST, treatments=("kinase 2 uM",)))


@pytest.mark.one_database
def test_a_well_that_became_a_control_is_compared_anew(workspace: Workspace) -> None:
    """The well alone: others of its treatment stay what is compared. Untreated wells may be one."""
    Screen(workspace)
    first = contrast(workspace, FAST)
    with workspace.database.begin() as session:
        of_name = select(Well.id).join(Treatment).join(Plate, Plate.id == Well.plate_id)
        of_name = of_name.where(Treatment.name == "nothing", Plate.barcode == "P1").limit(1)
        wells = update(Well).where(Well.id == of_name.scalar_subquery())
        session.execute(wells.values(control=Control.NEGATIVE))
        bare = select(Well.id).where(Well.control == Control.NEGATIVE).limit(1).scalar_subquery()
        session.execute(update(Well).where(Well.id == bare).values(treatment_id=None))
    second = contrast(workspace, FAST)
    assert (second.already_done, second.control) == (False, "DMSO, no treatment, nothing")
    assert second.run_id > first.run_id
    rows = by_name(second)
    assert (rows["nothing"].wells, rows["nothing"].control_wells) == (3, 9)
    pooled = contrast(workspace, replace(FAST, pooled=True)).rows[0]
    assert (pooled.wells, pooled.control_wells) == (8, 9)


def run_of(workspace: Workspace, run_id: int) -> Run:
    with workspace.database.read() as session:
        return session.get_one(Run, run_id)


def test_nothing_is_compared_twice_unless_something_changed(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    first = contrast(sqlite_workspace, FAST)
    assert contrast(sqlite_workspace, FAST) == replace(first, already_done=True)
    forced = contrast(sqlite_workspace, FAST, force=True)
    assert (forced.run_id > first.run_id, forced.rows) == (True, first.rows)
    assert not contrast(sqlite_workspace, replace(FAST, seed=1)).already_done
    # A corrected table: a well has another treatment, and "once" has two.
    with sqlite_workspace.database.begin() as session:
        name = select(Treatment.id).where(Treatment.name == "nothing")
        last = select(Well.id).where(Well.treatment_id.in_(name)).order_by(Well.id.desc()).limit(1)
        once = screen.treatments["once"].id
        well = update(Well).where(Well.id == session.scalars(last).one())
        session.execute(well.values(treatment_id=once))
    corrected = contrast(sqlite_workspace, FAST)
    assert not corrected.already_done
    assert by_name(corrected)["once"].wells == 2
    screen.well(screen.plates[0], 20, screen.treatments["once"])  # an image that came later
    assert by_name(contrast(sqlite_workspace, FAST))["once"].wells == 3


def test_which_treatments_and_which_control(sqlite_workspace: Workspace) -> None:
    Screen(sqlite_workspace)
    pooled = contrast(sqlite_workspace, replace(FAST, pooled=True))
    row = pooled.rows[0]
    assert (row.treatment, row.wells, row.control_wells) == ("all treatments", 9, 8)
    some = replace(FAST, treatments=("nothing", "strong"), pooled=True)
    assert contrast(sqlite_workspace, some).rows[0].wells == 8
    other = contrast(sqlite_workspace, replace(FAST, control="strong", treatments=("DMSO",)))
    assert [(row.treatment, row.different) for row in other.rows[:1]] == [("DMSO", "yes")]
    assert other.control == "strong"
    one_plate = contrast(sqlite_workspace, replace(FAST, plates=("P2",)))
    assert by_name(one_plate)["strong"].wells == 2
    assert "once" not in by_name(one_plate)


def test_few_cells_are_compared_if_that_is_asked_for(sqlite_workspace: Workspace) -> None:
    Screen(sqlite_workspace)
    row = contrast(sqlite_workspace, replace(FAST, max_cells=20)).rows[0]
    assert (row.treatment, row.cells, row.control_cells, row.wells) == ("strong", 20, 20, 4)


def test_a_plate_without_controls_is_left_out_and_said_to_be(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    bare = screen.make.plate("P3")
    screen.well(bare, 1, screen.treatments["strong"])
    screen.well(bare, 2, screen.make.treatment("elsewhere"))
    rows = by_name(contrast(sqlite_workspace, FAST))
    assert (rows["strong"].wells, rows["strong"].note) == (4, "1 plate of it has no control wells")
    assert rows["elsewhere"].note == "none of its plates has control wells"


def test_features_of_another_tool(sqlite_workspace: Workspace) -> None:
    screen = Screen(sqlite_workspace)
    with sqlite_workspace.database.read() as session:
        query = select(Cell, CellFeatures.area).join(CellFeatures, CellFeatures.cell_id == Cell.id)
        cells, areas = zip(*session.execute(query.order_by(Cell.id)).all(), strict=True)
    gone = [float("nan") if i % 5 == 0 else value for i, value in enumerate(areas)]
    columns = {"x": list(areas), "with gaps": gone}
    screen.make.feature_files("cp", cells, columns, screen.recipe_of(screen.segment))
    result = contrast(sqlite_workspace, replace(FAST, features="cp"))
    assert (result.feature_set, result.columns) == ("cp", 2)
    assert by_name(result)["strong"].different == "yes"


def test_what_cannot_be_compared_is_said(sqlite_workspace: Workspace) -> None:
    Screen(sqlite_workspace)

    def refused(**options: object) -> str:
        with pytest.raises(UserInputError) as caught:
            contrast(sqlite_workspace, replace(FAST, **options))
        return str(caught.value)

    assert "Unknown treatment 'strung'" in refused(treatments=("strung",))
    assert "Unknown treatment 'water'" in refused(control="water")
    assert "Unknown plate 'P9'" in refused(plates=("P9",))
    assert "--folds must be at least 2" in refused(folds=1)
    with pytest.raises(UnknownNameError, match="feature set 'cp'"):
        contrast(sqlite_workspace, replace(FAST, features="cp"))
    with sqlite_workspace.database.begin() as session:
        session.execute(update(Well).values(control=None))
    assert "No well is a negative control" in refused()


def test_a_baseline_reads_features_as_differences_to_the_controls_of_the_plate(
    sqlite_workspace: Workspace,
) -> None:
    pytest.importorskip("torch")
    screen = Screen(sqlite_workspace)
    with sqlite_workspace.database.read() as session:
        query = select(Image, Treatment.name).join(Well, Well.id == Image.well_id)
        images = session.execute(query.join(Treatment, Treatment.id == Well.treatment_id)).all()
    labels = {name: screen.make.label(name) for name in ("DMSO", "strong")}
    members = [(i, Subset.TRAIN, labels[name]) for i, name in images if name in labels]
    screen.make.split(members)
    params = BaselineParams(normalise="plate-controls")
    (result,) = train_baselines(sqlite_workspace, ["logistic"], params)
    right = []
    with sqlite_workspace.database.read() as session:
        model = open_model(session, sqlite_workspace, session.get_one(Run, result.run_id))
        for image, _, label in members:
            said = model.model.predict(model.reader(image.id))[0].argmax(axis=1)
            right += [model.record.labels[index] == label.value for index in said]
    assert np.mean(right) > 0.98  # plates differ twenty times as much as treatments do
