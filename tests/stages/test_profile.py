"""Profiles of wells: whose cells count, the values of pycytominer, and runs that are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pycytominer
import pytest
from factories import Factory
from realdata import real_data
from typer.testing import CliRunner, Result

from cellstore.analysis.well_profiles import MISSING, WELL_COLUMNS
from cellstore.config import ProfileParams
from cellstore.enums import CellFlagReason, Control, Level, Stage
from cellstore.errors import StorageError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Recipe, Run, Segmentation, Well
from cellstore.query.engine import open_questions
from cellstore.stages import profile as reading
from cellstore.stages.export import ExportFormat, export_profiles
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.profile import open_profiles, profile
from cellstore_cli.app import app

FEATURES = ("area", "Area_2", "gaps", "texture", "flat")
LAYOUT = ("DMSO", "DMSO", "DMSO", "taxol", "taxol", "nothing left")
PLAIN = ProfileParams(features="cp", select=())


class Screen:
    """Two plates of six wells with two images each, and a feature set ``cp`` in files.

    ``cells``: a row for each cell. The last well of each plate has images without cells.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.make = workspace, Factory(workspace)
        random = np.random.default_rng(3)
        self.segment_run = self.make.run(Stage.SEGMENT)
        with workspace.database.read() as session:
            self.segment = session.get_one(Recipe, self.segment_run.recipe_id)
        kinds = {name: self.make.treatment(name) for name in ("DMSO", "nothing left")}
        kinds["taxol"] = self.make.doses(("taxol", 2.0))
        self.wells: list[Well] = []
        self.images: list[Image] = []
        self.masks: list[Segmentation] = []
        every, rows = [], []
        for number in (1, 2):
            plate = self.make.plate(f"P{number}", f"batch {number}")
            for column, name in enumerate(LAYOUT, start=1):
                well = self.make.well(plate, 2, column, kinds[name])
                self.wells.append(well)
                for site in (1, 2):
                    image = self.make.image(well, site)
                    count = 0 if name == "nothing left" else 2 + site
                    found = self.make.segmentation(image, self.segment_run, count)
                    self.images.append(image)
                    self.masks.append(found)
                    for cell in self.make.cells_of(found):
                        values = random.normal(5 * number, 1, len(FEATURES)).tolist()
                        values[4] = 2.0
                        every.append(cell)
                        rows.append((cell.id, well.id, f"P{number}", image.id, *values))
        names = ["cell_id", "well_id", "Metadata_Plate", "image_id", *FEATURES]
        self.cells = pd.DataFrame(rows, columns=names)
        self.cells.loc[0, "gaps"] = np.nan
        self.cells.loc[8, "texture"] = np.inf
        columns = {name: self.cells[name].tolist() for name in FEATURES}
        columns["what"] = ["x"] * len(rows)
        self.make.feature_files("cp", every, columns, self.segment, rows_of_file=20)

    def controls(self) -> pd.DataFrame:
        """``cells`` without infinite values, and which are of controls."""
        control = {well.id: well.control for well in self.wells}
        cells = self.cells.replace(np.inf, np.nan)
        return cells.assign(Metadata_control=[str(control[i]) for i in cells["well_id"]])

    def by_hand(self, cells: pd.DataFrame, operation: str = "median") -> pd.DataFrame:
        """Profiles by pycytominer's own functions, a row for each well that has cells."""
        strata = ["Metadata_Plate", "Metadata_control", "well_id"]
        wells = pycytominer.aggregate(cells, strata, list(FEATURES), operation=operation)
        parts = [
            pycytominer.normalize(
                part,
                list(FEATURES),
                meta_features=strata,
                samples="Metadata_control == 'negative'",
                method="mad_robustize",
            )
            for _, part in wells.groupby("Metadata_Plate")
        ]
        found: pd.DataFrame = pd.concat(parts).set_index("well_id")
        return found


@pytest.fixture
def screen(workspace: Workspace) -> Screen:
    return Screen(workspace)


def values_of(workspace: Workspace, run: int) -> pd.DataFrame:
    """The profiles of a run, by well."""
    found = open_profiles(workspace, run)[1]
    return pd.DataFrame(found.values, columns=list(found.columns), index=found.table["well_id"])


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    ours = ours.dropna(how="all")
    assert sorted(ours.index) == sorted(theirs.index)
    np.testing.assert_allclose(ours, theirs.loc[ours.index, list(ours.columns)], rtol=1e-9)


def test_profiles_are_those_of_pycytominer_and_are_kept(screen: Screen) -> None:
    workspace = screen.workspace
    made = profile(workspace, PLAIN)
    expected = screen.by_hand(screen.controls())
    assert_same(values_of(workspace, made.run_id), expected)
    counts = (made.plates, made.wells, made.wells_without_cells, made.controls, made.cells)
    assert counts == (2, 12, 2, 6, 70)
    assert (made.measured, made.features, made.wells_without_values) == (5, 4, 2)
    assert made.gone == {"the same value in most controls of a plate": ["flat"]}
    assert made.notes == ("Left out, because they are no numbers: 1 (what).",)

    run, found = open_profiles(workspace)
    assert run == made.run_id
    assert tuple(found.table.columns) == WELL_COLUMNS
    wells = found.table.set_index("well_id")
    taxol, empty = wells.loc[screen.wells[3].id], wells.loc[screen.wells[5].id]
    assert (taxol["plate"], taxol["well"], taxol["batch"]) == ("P1", "B04", "batch 1")
    assert (taxol["treatment"], taxol["dose"], taxol["dose_unit"]) == ("taxol", 2.0, "uM")
    assert (taxol["n_cells"], taxol["n_images"], taxol["control"]) == (7, 2, None)
    assert (empty["n_cells"], empty["n_images"]) == (0, 2)
    assert wells.loc[screen.wells[0].id, "control"] == "negative"
    again = profile(workspace, ProfileParams(select=()))  # it is the only feature set
    assert again == replace(made, already_done=True)
    assert profile(workspace, PLAIN, force=True).run_id > made.run_id
    (workspace.artifacts.root / path_of(workspace, made.run_id)).unlink()
    with pytest.raises(StorageError, match="cellstore verify"):
        open_profiles(workspace, made.run_id)


def path_of(workspace: Workspace, run: int) -> str:
    with workspace.database.read() as session:
        return session.get_one(Run, run).artifacts[0].path


def test_whose_cells_count(screen: Screen) -> None:
    workspace, make, cells = screen.workspace, screen.make, screen.controls()
    first = profile(workspace, PLAIN)
    make.exclude(Level.IMAGE, screen.images[0].id)
    make.exclude(Level.CELL, int(cells["cell_id"].iloc[-1]))
    make.exclude(Level.WELL, screen.wells[4].id)
    made = profile(workspace, PLAIN)
    assert made.run_id != first.run_id
    counted = cells[cells["image_id"] != screen.images[0].id].iloc[:-1]
    counted = counted[counted["well_id"] != screen.wells[4].id]
    assert_same(values_of(workspace, made.run_id), screen.by_hand(counted))
    table = open_profiles(workspace)[1].table.set_index("well_id")
    assert tuple(table.loc[screen.wells[0].id, ["n_cells", "n_images"]]) == (4, 1)
    assert screen.wells[4].id not in table.index

    quality = make.recipe(Stage.QC, inputs=[screen.segment])
    qc = make.run(Stage.QC, quality, result={"plates": ["P1", "P2"]})
    flagged = make.cells_of(screen.masks[3])[:2]
    for cell in flagged:
        make.flag_cell(qc, cell, CellFlagReason.BORDER)
    made = profile(workspace, replace(PLAIN, exclude_flagged="latest"))
    counted = counted[~counted["cell_id"].isin([cell.id for cell in flagged])]
    assert_same(values_of(workspace, made.run_id), screen.by_hand(counted))
    assert "has not looked at" in made.notes[0]
    only = profile(workspace, replace(PLAIN, plates=("P2",)))
    assert (only.plates, only.wells) == (1, 6)


@pytest.mark.one_database
def test_ways_to_average_in_blocks_of_columns(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 70)  # two columns at a time
    workspace, cells = screen.workspace, screen.controls()
    assert_same(values_of(workspace, profile(workspace, PLAIN).run_id), screen.by_hand(cells))
    made = profile(workspace, replace(PLAIN, average="mean"))
    assert_same(values_of(workspace, made.run_id), screen.by_hand(cells, "mean"))
    made = profile(workspace, replace(PLAIN, average="weighted", normalise="none"))
    of_images = cells.groupby(["well_id", "image_id"])[list(FEATURES)]
    medians, counts = of_images.median(), of_images.count()
    expected = (medians * counts).groupby("well_id").sum() / counts.groupby("well_id").sum()
    assert_same(values_of(workspace, made.run_id), expected)


@pytest.mark.one_database
def test_built_in_measurements_and_steps_in_their_order(screen: Screen) -> None:
    make, workspace = screen.make, screen.workspace
    recipe = make.recipe(Stage.MEASURE, inputs=[screen.segment])
    measured, random = make.run(Stage.MEASURE, recipe), np.random.default_rng(0)
    make.feature_set(recipe, "basic_0123abcd")
    for image, found in zip(screen.images, screen.masks, strict=True):
        make.job(measured, image)
        for cell in make.cells_of(found)[:3]:  # one of each second image is not measured
            make.features([cell], measured, area=random.normal(), solidity=random.normal())
    made = profile(workspace, ProfileParams(select=()))
    assert (made.feature_set, made.features, made.cells) == ("basic_0123abcd", 2, 70)
    assert "centroid_y" not in [name for names in made.gone.values() for name in names]
    (note,) = made.notes
    assert note.startswith("10 of 70 cells are not in feature set basic_0123abcd")
    params = ProfileParams(features="cp", normalise="sphere", positions="median-polish")
    made = profile(workspace, replace(params, harmony="batch", select=("missing", "variance")))
    assert made.features == 4
    assert np.isfinite(values_of(workspace, made.run_id).to_numpy()).sum() == 40


@pytest.mark.one_database
def test_what_cannot_be_averaged_is_a_sentence(screen: Screen) -> None:
    make, workspace = screen.make, screen.workspace
    with pytest.raises(UnknownNameError, match="There is no profile run yet"):
        open_profiles(workspace)
    with pytest.raises(UserInputError, match="Harmony has nothing to bring together"):
        profile(workspace, replace(PLAIN, plates=("P1",), harmony="plate"))
    with pytest.raises(UserInputError, match="is failed and has no profiles"):
        open_profiles(workspace, last_run(workspace))
    with pytest.raises(UnknownNameError, match=r"come to its end\. Next: cellstore profile"):
        open_profiles(workspace)
    third = make.plate("P3")
    image = make.image(make.well(third, 1, 1, control=Control.NEGATIVE))
    with pytest.raises(UserInputError, match="No image of P3 that counts is segmented"):
        profile(workspace, replace(PLAIN, plates=("P3",)))
    make.segmentation(image, screen.segment_run)
    with pytest.raises(UserInputError, match="None of the segmented images of P3 has a cell"):
        profile(workspace, replace(PLAIN, plates=("P3",)))
    other = make.image(make.well(third, 1, 2, control=Control.NEGATIVE))
    make.segmentation(other, screen.segment_run, 2)
    with pytest.raises(UserInputError, match="No cell of P3 that counts is measured"):
        profile(workspace, replace(PLAIN, plates=("P3",)))
    made = profile(workspace, replace(PLAIN, select=("missing",)))
    make.image(make.well(third, 1, 3))
    made = profile(workspace, replace(PLAIN, select=("missing",)), force=True)
    assert any("1 well has images, but none that is segmented" in note for note in made.notes)
    assert any(
        "Fewer than 2 negative control wells with cells are on plate P3" in note
        for note in made.notes
    )
    assert MISSING not in made.gone


@pytest.mark.one_database
def test_the_command_says_what_it_made_and_what_is_next(screen: Screen) -> None:
    def run(*words: str) -> Result:
        store = ["--store", str(screen.workspace.settings.root)]
        return CliRunner().invoke(app, ["profile", "--features", "cp", *words, *store])

    found = run("--select", "none")
    assert found.exit_code == 0
    assert "12 on 2 plates, 6 of them negative controls" in found.stdout
    assert "4 of 5 of cp" in found.stdout
    assert found.stderr.count("they are no numbers: 1 (what)") == 1
    assert found.stderr.splitlines()[-1].endswith(" hits")
    assert max(map(len, found.stdout.splitlines())) <= 80
    again = run("--select", "none", "--json")
    assert json.loads(again.stdout)["already_done"] is True
    assert "Nothing to do" in run("--select", "none").stdout
    wrong = run("--select", "varience")
    assert (wrong.exit_code, "variance" in wrong.stderr) == (2, True)
    wrong = run("--plate", "P9")
    assert (wrong.exit_code, "P9" in wrong.stderr) == (2, True)


@pytest.mark.one_database
def test_profiles_leave_as_pycytominer_reads_them(screen: Screen, tmp_path: Path) -> None:
    workspace = screen.workspace
    made = profile(workspace, replace(PLAIN, select=("variance",)))
    found = open_profiles(workspace)[1]
    with workspace.database.begin() as session:
        session.get_one(Well, screen.wells[3].id).metadata_ = {"moa": "tubulin"}
    for name in ("wells.parquet", "wells.csv", "wells.h5ad"):
        form = {".csv": ExportFormat.CSV, ".h5ad": ExportFormat.ANNDATA}
        path = tmp_path / name
        written = export_profiles(
            workspace, path, format=form.get(path.suffix, ExportFormat.PARQUET)
        )
        assert (written.run_id, written.wells, written.plates) == (made.run_id, 12, 2)
        frame = pycytominer.cyto_utils.load_profiles(path)
        features = pycytominer.cyto_utils.infer_cp_features(frame)
        assert features == ["Cells_area", "Cells_Area_2", "Cells_gaps", "Cells_texture"]
        np.testing.assert_allclose(frame[features], found.values)
        about = frame.loc[3].to_dict()
        assert about["Metadata_Plate"] == "P1"
        assert (about["Metadata_Well"], about["Metadata_pert_iname"]) == ("B04", "taxol")
        assert (about["Metadata_dose"], about["Metadata_moa"]) == (2.0, "tubulin")
        assert list(frame["Metadata_Object_Count"]) == list(found.table["n_cells"])
        assert list(frame["Metadata_control_type"][:3]) == ["negative"] * 3
    with pytest.raises(UserInputError, match="is there already"):
        export_profiles(workspace, tmp_path / "wells.csv")


@pytest.mark.one_database
def test_a_real_table_gives_what_pycytominer_makes_of_it(workspace: Workspace) -> None:
    ingest(workspace, real_data("cytotable/data_b_sqlite/data_b.sqlite"))
    select = ("missing", "blocklist", "variance")
    made = profile(workspace, ProfileParams(features="cellprofiler", against="all", select=select))
    with open_questions(workspace) as questions:
        question = """SELECT i.plate, i.well, f.* EXCLUDE (cell_id) FROM cellprofiler AS f
            JOIN cells AS c ON c.id = f.cell_id JOIN segmentations AS s ON s.id = c.segmentation_id
            JOIN image_table AS i ON i.image_id = s.image_id"""
        cells = questions.ask(question).table().to_pandas().replace([np.inf, -np.inf], np.nan)
    features = [name for name in cells.columns[2:] if cells[name].dtype.kind in "fi"]
    strata = list(cells.columns[:2])
    wells = pycytominer.aggregate(cells, strata, features)
    flat = made.gone["the same value in most controls of a plate"]
    features = [name for name in features if name not in flat]
    expected = pycytominer.feature_select(
        pycytominer.normalize(wells, features, meta_features=strata, method="mad_robustize"),
        features,
        operation=["drop_na_columns", "blocklist", "variance_threshold"],
    )
    found = open_profiles(workspace)[1]
    assert list(found.columns) == list(expected.columns[2:])
    assert (made.measured, len(found.columns)) == (1741, made.features)
    assert list(found.table["well"]) == list(expected["well"])
    np.testing.assert_allclose(found.values, expected[list(found.columns)], rtol=1e-9, atol=1e-12)


def last_run(workspace: Workspace) -> int:
    with workspace.database.read() as session:
        return max(run.id for run in session.query(Run))
