"""Export: pycytominer's columns, every current cell once, whole files or none."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from sqlalchemy import select
from unguarded import unguarded

from cellstore import settings
from cellstore.analysis.features import FEATURE_NAMES
from cellstore.enums import Control, Level, Stage
from cellstore.errors import MissingExtraError, StorageError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    FeatureSet,
    Image,
    Plate,
    Recipe,
    Run,
    Segmentation,
    TreatmentPart,
)
from cellstore.query.cells import choose_recipes
from cellstore.query.describe import described
from cellstore.query.engine import open_questions
from cellstore.query.feature_files import find_feature_set
from cellstore.stages import export as reading
from cellstore.stages.export import ExportFormat, export

pytestmark = pytest.mark.one_database


@pytest.fixture
def screen(workspace: Workspace) -> SmallScreen:
    screen = small_screen(workspace)
    screen.factory.job(screen.measure_run, screen.images["B01"])
    return screen


def rows_of(workspace: Workspace, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of a Parquet export."""
    out = folder / "cells.parquet"
    export(workspace, out, force=True, **options)
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def recipe_of(make: Factory, run: Run) -> Recipe:
    """The recipe of a run."""
    with make.workspace.database.read() as session:
        return session.get_one(Recipe, run.recipe_id)


def test_a_row_per_cell_in_the_order_of_wells(screen: SmallScreen, tmp_path: Path) -> None:
    rows = rows_of(screen.factory.workspace, tmp_path)
    found = [(row["Metadata_Well"], row["Metadata_ObjectNumber"]) for row in rows]
    assert found == [
        *(("A01", 1), ("A02", 1), ("B01", 1), ("B01", 2), ("B01", 3)),
        *(("B02", 1), ("B02", 2), ("B03", 1), ("B03", 2), ("B04", 1)),
    ]
    assert [row["Metadata_ImageNumber"] for row in rows] == [1, 2, 3, 3, 3, 4, 4, 5, 5, 6]


@pytest.mark.each_database
def test_what_a_row_says(workspace: Workspace, tmp_path: Path) -> None:
    make = Factory(workspace)
    treatment = make.treatment(
        "taxol",
        "TUBB",
        identifier="BRD-1",
        inchikey="RCINICONZNJXQF",
        smiles="C=O",
        pubchem_cid="36314",
    )
    well = make.well(make.plate("001", "2026_03"), 2, 3, treatment, control=Control.POSITIVE)
    image = make.image(well, 4, plane=5, time_point=6, core_name="r02c03f04")
    make.image_file(image, "ER", missing=True)
    run = make.run(Stage.SEGMENT)
    (cell,) = make.cells_of(make.segmentation(image, run, 1))
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=[recipe_of(make, run)]))
    make.job(measured, image)
    make.features([cell], measured, area=64.0)
    (row,) = rows_of(workspace, tmp_path)
    features = {f"Cells_{name}": 1.0 for name in FEATURE_NAMES} | {"Cells_area": 64.0}
    features |= {"Cells_centroid_y": cell.centroid_row, "Cells_centroid_x": cell.centroid_col}
    assert row == {
        "Metadata_Plate": "001",
        "Metadata_Batch": "2026_03",
        "Metadata_cell_line": None,
        "Metadata_time_point": None,
        "Metadata_Well": "B03",
        "Metadata_Site": 4,
        "Metadata_Plane": 5,
        "Metadata_Timepoint": 6,
        "Metadata_CoreName": "r02c03f04",
        "Metadata_pert_type": "compound",
        "Metadata_pert_iname": "taxol",
        "Metadata_target": "TUBB",
        "Metadata_dose": None,
        "Metadata_dose_unit": None,
        "Metadata_dose_original": None,
        "Metadata_components": None,
        "Metadata_control_type": "positive",
        "Metadata_broad_sample": "BRD-1",
        "Metadata_InChIKey": "RCINICONZNJXQF",
        "Metadata_smiles": "C=O",
        "Metadata_pubchem_cid": "36314",
        "Metadata_ImageNumber": 1,
        "Metadata_CellId": cell.id,
        "Metadata_Segmentation": recipe_of(make, run).fingerprint[:12],
        "Metadata_ObjectNumber": 1,
        "Metadata_MinRow": cell.min_row,
        "Metadata_MinCol": cell.min_col,
        "Metadata_MaxRow": cell.max_row,
        "Metadata_MaxCol": cell.max_col,
        "Metadata_CentroidRow": cell.centroid_row,
        "Metadata_CentroidCol": cell.centroid_col,
        "Metadata_Excluded": None,
        "Image_FileName_DNA": "r02c03f04-DNA.tiff",
        "Image_FileName_ER": "r02c03f04-ER.tiff",
        "Image_PathName_DNA": "/images",
        "Image_PathName_ER": None,
        **features,
    }


@pytest.mark.each_database
def test_doses_and_metadata_come_back_as_they_came(workspace: Workspace, tmp_path: Path) -> None:
    make = Factory(workspace)
    treatment = make.treatment("taxol")
    with unguarded(workspace) as session:
        part = session.scalars(select(TreatmentPart)).one()
        part.dose, part.dose_unit, part.dose_original = 5.0, "uM", "5000 nM"
    plate = make.add(Plate(barcode="P", cell_line="A549", metadata_={"media": "DMEM"}))
    well = make.well(plate, 1, 1, treatment, metadata_={"seeding": "500", "Metadata's": "x"})
    other = make.well(plate, 1, 2, metadata_={"media": "RPMI"})
    run = make.run(Stage.SEGMENT)
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=[recipe_of(make, run)]))
    for image in (make.image(well), make.image(other)):
        make.features(make.cells_of(make.segmentation(image, run, 1)), measured)
        make.job(measured, image)
    rows = rows_of(workspace, tmp_path)
    names = ("dose", "dose_unit", "dose_original", "cell_line", "media", "seeding", "Metadata's")
    assert [[row[f"Metadata_{name}"] for name in names] for row in rows] == [
        [5.0, "uM", "5000 nM", "A549", "DMEM", "500", "x"],
        [None, None, None, "A549", "RPMI", None, None],
    ]


def cp_features(columns: list[str]) -> list[str]:
    """The rule of pycytominer's ``infer_cp_features``, for its default compartments."""
    return [name for name in columns if name.startswith(("Cells", "Nuclei", "Cytoplasm"))]


def test_pycytominer_finds_the_features(screen: SmallScreen, tmp_path: Path) -> None:
    columns = list(rows_of(screen.factory.workspace, tmp_path)[0])
    assert cp_features(columns) == [f"Cells_{name}" for name in FEATURE_NAMES]
    others = [name for name in columns if name not in cp_features(columns)]
    assert all(name.startswith(("Metadata_", "Image_")) for name in others)


def test_excluded_cells_are_rows_where_they_are_asked_for(
    screen: SmallScreen, tmp_path: Path
) -> None:
    make = screen.factory
    make.cells(screen.segmentations["A01"], 1, excluded="perimeter is 0")
    make.exclude(Level.WELL, screen.images["A02"].well_id, "dead")
    rows = rows_of(make.workspace, tmp_path)
    assert len(rows) == 9
    assert {row["Metadata_Excluded"] for row in rows} == {None}
    assert "A02" not in {row["Metadata_Well"] for row in rows}
    rows = rows_of(make.workspace, tmp_path, include_excluded=True)
    found = {
        (row["Metadata_Well"], row["Metadata_ObjectNumber"]): row["Metadata_Excluded"]
        for row in rows
        if row["Metadata_Excluded"]
    }
    assert (len(rows), found) == (11, {("A01", 2): "perimeter is 0", ("A02", 1): "dead"})
    result = export(make.workspace, tmp_path / "cells.parquet", force=True)
    assert (result.cells, result.excluded) == (9, 2)


def test_when_all_cells_are_excluded_no_file_is_written(
    workspace: Workspace, tmp_path: Path
) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate(), 1, 1))
    run = make.run(Stage.SEGMENT)
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=[recipe_of(make, run)]))
    make.job(measured, image)
    make.exclude(Level.IMAGE, image.id, "out of focus")
    make.segmentation(image, run, 2)
    with pytest.raises(UserInputError, match=r"All 2 cells are excluded.*--include-excluded"):
        export(workspace, tmp_path / "cells.csv", format=ExportFormat.CSV)
    assert not (tmp_path / "cells.csv").exists()


@pytest.mark.each_database
def test_all_sets_of_the_cells_are_joined_and_one_is_named_by_its_group(
    screen: SmallScreen, tmp_path: Path
) -> None:
    make, segment = screen.factory, recipe_of(screen.factory, screen.segment_run)
    cells = make.cells_of(screen.segmentations["B01"])

    def add(name: str, **values: float | str) -> None:
        columns = {key: [value] * len(cells) for key, value in values.items()}
        make.feature_files(name, cells, columns, segment)

    add("texture_0a1b2c3d", contrast_DNA=1.0)
    add("texture_4a1b2c3d", contrast_DNA=2.0, area=3.0)
    add("seen", area=4.0, Nuclei_Area=5.0, kind="round", Cells_kind="x")
    out = tmp_path / "cells.parquet"
    result = export(make.workspace, out)
    assert result.feature_sets == ("texture_4a1b2c3d", "seen")
    table = pq.read_table(out)
    names = [name for name in table.column_names if not name.startswith(("Metadata_", "Image_"))]
    assert names == [
        *(f"Cells_{name}" for name in FEATURE_NAMES),
        *("Cells_contrast_DNA", "Cells_texture_4a1b2c3d_area", "Cells_seen_area"),
        *("Nuclei_Area", "Text_kind", "Text_Cells_kind"),
    ]
    kinds = {name: table.schema.field(name).type for name in cp_features(names)}
    assert set(kinds.values()) == {pa.float64()}  # what pycytominer computes with
    rows = {(row["Metadata_Well"], row["Metadata_ObjectNumber"]): row for row in table.to_pylist()}
    assert len(rows) == 10
    measured, other = rows["B01", 1], rows["A01", 1]
    assert measured["Cells_area"] is not None
    assert other["Cells_area"] is not None
    shown = ("Cells_contrast_DNA", "Cells_texture_4a1b2c3d_area", "Cells_seen_area", "Nuclei_Area")
    assert [measured[name] for name in shown] == [2.0, 3.0, 4.0, 5.0]
    assert [other[name] for name in shown] == [None] * 4
    for group in ("texture", "Texture", "texture_4a1b2c3d"):
        result = export(make.workspace, out, features=group, force=True)
        assert (result.feature_sets, result.features) == (("texture_4a1b2c3d",), 2)
    with pytest.raises(UnknownNameError, match=r"feature set 'intensity'.*texture"):
        export(make.workspace, out, features="intensity", force=True)


def test_cells_of_other_bytes_are_not_exported(screen: SmallScreen, tmp_path: Path) -> None:
    workspace = screen.factory.workspace
    with workspace.database.begin() as session:
        session.get_one(Image, screen.images["B01"].id).content_sha256 = "f" * 64
        unknown = session.get_one(Segmentation, screen.segmentations["B02"].id)
        unknown.content_sha256 = None
    wells = {row["Metadata_Well"] for row in rows_of(workspace, tmp_path)}
    assert wells == {"A01", "A02", "B02", "B03", "B04"}


@pytest.mark.each_database
def test_batches_do_not_change_what_is_written(
    screen: SmallScreen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = screen.factory.workspace
    whole = rows_of(workspace, tmp_path)
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 2 * len(FEATURE_NAMES))
    assert rows_of(workspace, tmp_path) == whole
    assert pq.ParquetFile(tmp_path / "cells.parquet").num_row_groups > 2


def test_csv_says_the_same(screen: SmallScreen, tmp_path: Path) -> None:
    workspace = screen.factory.workspace
    result = export(workspace, tmp_path / "cells.csv", format=ExportFormat.CSV)
    with (tmp_path / "cells.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = rows_of(workspace, tmp_path)
    assert (result.cells, len(rows)) == (10, 10)
    for row, values in zip(rows, wanted, strict=True):
        assert list(row) == list(values)
        for name, value in values.items():
            text = row[name]
            same = text == "" if value is None else text == value
            assert same or float(text) == value, name


SIGNS = "=+-@\t\uff1d\uff0b\uff0d\uff20"  # the last are full-width
ODD = ["=SUM(A1)", "+1", "-1", "@x", 'quote " and, comma', "two\nlines", "\tµ-Ω 漢", " space "]
ODD += [f"{sign}1" for sign in SIGNS[-4:]]


def test_odd_texts_are_exact_unless_a_spreadsheet_is_meant(
    workspace: Workspace, tmp_path: Path
) -> None:
    make = Factory(workspace)
    plate, run = make.plate(), make.run(Stage.SEGMENT)
    for number, name in enumerate(ODD, start=1):
        image = make.image(make.well(plate, 1, number, make.treatment(name)))
        make.segmentation(image, run, 1)
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=[recipe_of(make, run)]))
    make.job(measured, image)
    found = {}
    for safe in (False, True):
        out = tmp_path / f"{safe}.csv"
        export(workspace, out, format=ExportFormat.CSV, for_spreadsheet=safe)
        with out.open(newline="", encoding="utf-8") as file:
            found[safe] = [row["Metadata_pert_iname"] for row in csv.DictReader(file)]
    assert found[False] == ODD
    assert found[True] == [f"'{name}" if name[0] in SIGNS else name for name in ODD]
    with pytest.raises(UserInputError, match="--format csv"):
        export(workspace, tmp_path / "a.parquet", for_spreadsheet=True)


def test_names_of_features_are_harmless_for_a_spreadsheet_too(
    workspace: Workspace, tmp_path: Path
) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate(), 1, 1))
    imported(make, image, pa.table({'=HYPERLINK("x")': [1.0]}), "odd")
    out = tmp_path / "safe.csv"
    export(workspace, out, format=ExportFormat.CSV, features="odd", for_spreadsheet=True)
    with out.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file))[-1] == 'Cells_=HYPERLINK("x")'


def imported(make: Factory, image: Image, values: pa.Table, name: str = "theirs") -> None:
    """Cells of another tool, and a feature set of theirs."""
    segment = make.recipe(Stage.SEGMENT, parameters={"imported": "test", "name": name})
    found = make.segmentation(image, make.run(Stage.INGEST, segment), values.num_rows)
    columns = dict(zip(values.column_names, values.columns, strict=True))
    make.feature_files(name, make.cells_of(found), columns, segment)


VALUES = pa.table(
    {
        "Nuclei_AreaShape_Area": pa.array([1.5, None, math.nan]),
        "Nuclei_Number": pa.array([1, None, 3], pa.int64()),
        "Nuclei_Class": pa.array(["a", None, ""], pa.string()),
    }
)


def test_features_in_files_keep_names_and_types_and_nan_is_null(
    screen: SmallScreen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = screen.factory
    imported(make, screen.images["B01"], VALUES)
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 3)
    out = tmp_path / "cells.parquet"
    result = export(make.workspace, out)  # what was ingested last
    assert (result.feature_sets, result.cells, result.features) == (("theirs",), 3, 3)
    names = ["Nuclei_AreaShape_Area", "Nuclei_Number", "Text_Nuclei_Class"]
    table = pq.read_table(out).select(names)
    assert table.schema.types == VALUES.schema.types
    assert [table[name].to_pylist() for name in names] == [
        [1.5, None, None],
        [1, None, 3],
        ["a", None, ""],
    ]
    built_in = f"{screen.measure_run.recipe_id}"
    assert export(make.workspace, out, measurement=built_in, force=True).cells == 10
    with pytest.raises(UserInputError, match="belongs to measure recipe"):
        export(make.workspace, out, features="theirs", measurement=built_in, force=True)
    with pytest.raises(UserInputError, match="belongs to segment recipe"):
        export(
            make.workspace,
            out,
            features="theirs",
            segmentation=str(screen.segment_run.recipe_id),
            force=True,
        )


def test_a_feature_file_that_is_gone_is_a_sentence(screen: SmallScreen, tmp_path: Path) -> None:
    imported(screen.factory, screen.images["B01"], VALUES)
    artifacts = screen.factory.workspace.artifacts
    (path,) = artifacts.root.rglob("*.parquet")
    path.unlink()
    with pytest.raises(StorageError, match="cellstore verify"):
        export(screen.factory.workspace, tmp_path / "cells.parquet")
    assert list(tmp_path.glob("*cells*")) + list(tmp_path.glob(".part*")) == []


def test_a_feature_named_like_a_fact_is_a_feature(screen: SmallScreen, tmp_path: Path) -> None:
    values = pa.table({"Metadata_Well": pa.array([1.0]), "Image_FileName_DNA": pa.array(["x"])})
    imported(screen.factory, screen.images["B01"], values)
    (row,) = rows_of(screen.factory.workspace, tmp_path)
    assert (row["Metadata_Well"], row["Cells_Metadata_Well"]) == ("B01", 1.0)
    assert row["Text_Image_FileName_DNA"] == "x"


def test_plates_are_chosen(screen: SmallScreen, tmp_path: Path) -> None:
    make = screen.factory
    image = make.image(make.well(make.plate("BR0"), 1, 1))
    make.segmentation(image, screen.segment_run, 2)
    workspace = make.workspace
    assert [row["Metadata_Plate"] for row in rows_of(workspace, tmp_path)] == [
        *["BR0"] * 2,
        *["BR1"] * 10,
    ]
    assert len(rows_of(workspace, tmp_path, plates=["BR0"])) == 2
    with pytest.raises(UnknownNameError, match="plate 'BR9'"):
        rows_of(workspace, tmp_path, plates=["BR0", "BR9"])
    make.plate("empty")
    with pytest.raises(UserInputError, match="no cells on empty"):
        rows_of(workspace, tmp_path, plates=["empty"])


def test_an_empty_store_says_what_to_do(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cellstore measure"):
        export(workspace, tmp_path / "a.parquet")
    with pytest.raises(UnknownNameError, match="feature set 'x'"):
        export(workspace, tmp_path / "a.parquet", features="x")


def test_an_existing_file_is_kept(screen: SmallScreen, tmp_path: Path) -> None:
    out = tmp_path / "cells.parquet"
    out.write_text("precious")
    with pytest.raises(UserInputError, match="--force"):
        export(screen.factory.workspace, out)
    assert out.read_text() == "precious"
    export(screen.factory.workspace, out, force=True)
    assert pq.read_table(out).num_rows == 10
    with pytest.raises(UserInputError, match="is a folder"):
        export(screen.factory.workspace, tmp_path)
    with pytest.raises(UserInputError, match="no folder"):
        export(screen.factory.workspace, tmp_path / "absent" / "a.csv")


@pytest.mark.parametrize("form", [ExportFormat.PARQUET, ExportFormat.CSV])
def test_what_fails_leaves_the_old_file_and_no_other(
    screen: SmallScreen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: ExportFormat
) -> None:
    out = tmp_path / "out" / "cells"
    out.parent.mkdir()
    out.write_text("precious")
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 1)
    calls = []

    def full(_: int = 1) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(screen.factory.workspace.progress, "advance", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(screen.factory.workspace, out, format=form, force=True)
    assert [path.name for path in out.parent.iterdir()] == ["cells"]
    assert out.read_text() == "precious"


def test_anndata_is_an_extra(
    screen: SmallScreen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.EXTRAS, "anndata", ("no_such_anndata",))
    with pytest.raises(MissingExtraError, match=r"cellstore\[anndata\]"):
        export(screen.factory.workspace, tmp_path / "a.h5ad", format=ExportFormat.ANNDATA)


@pytest.mark.skipif(find_spec("anndata") is None, reason="anndata is not installed")
def test_anndata_has_features_as_x_and_facts_as_obs(screen: SmallScreen, tmp_path: Path) -> None:
    import anndata

    out = tmp_path / "a.h5ad"
    export(screen.factory.workspace, out, format=ExportFormat.ANNDATA)
    found = anndata.read_h5ad(out)
    rows = rows_of(screen.factory.workspace, tmp_path)
    assert list(found.var_names) == [f"Cells_{name}" for name in FEATURE_NAMES]
    assert found.X[:, 0].tolist() == [row["Cells_area"] for row in rows]
    assert found.obs["Metadata_Well"].tolist() == [row["Metadata_Well"] for row in rows]


@pytest.mark.skipif(find_spec("anndata") is None, reason="anndata is not installed")
def test_anndata_keeps_texts_and_gaps_apart_from_numbers(
    screen: SmallScreen, tmp_path: Path
) -> None:
    import anndata

    imported(screen.factory, screen.images["B01"], VALUES)
    out = tmp_path / "a.h5ad"
    export(screen.factory.workspace, out, format=ExportFormat.ANNDATA, features="theirs")
    found = anndata.read_h5ad(out)
    assert list(found.var_names) == ["Nuclei_AreaShape_Area", "Nuclei_Number"]
    assert repr(found.X.tolist()) == "[[1.5, 1.0], [nan, nan], [nan, 3.0]]"
    assert [text for text in found.obs["Text_Nuclei_Class"] if isinstance(text, str)] == ["a", ""]
    assert found.obs["Metadata_smiles"].isna().all()


def test_a_group_names_its_set_that_was_measured_last(screen: SmallScreen, tmp_path: Path) -> None:
    make = screen.factory
    segment, other = recipe_of(make, screen.segment_run), make.recipe(Stage.SEGMENT)
    cells = make.cells_of(screen.segmentations["B01"])
    of_other = make.segmentation(screen.images["B01"], make.run(Stage.SEGMENT, other), 1)
    make.feature_files("texture_11111111", cells, {"a": [1.0] * 3}, segment)
    make.feature_files("texture_22222222", cells, {"a": [2.0] * 3}, segment)
    make.feature_files("texture_33333333", make.cells_of(of_other), {"a": [3.0]}, other)
    make.feature_files("basic", cells, {"a": [4.0] * 3}, segment)  # its own name goes before
    with make.workspace.database.read() as session:
        recipes = {found.name: found.recipe for found in session.scalars(select(FeatureSet))}
    for name in ("texture_22222222", "texture_11111111"):
        make.job(make.run(Stage.MEASURE, recipes[name]), screen.images["B01"])
    with make.workspace.database.read() as session:
        assert find_feature_set(session, "texture").name == "texture_11111111"
        assert find_feature_set(session, "texture", other.id).name == "texture_33333333"
        assert find_feature_set(session, "basic").name == "basic"
        _, measure = choose_recipes(session, str(other.id), None, "texture")
        assert measure.id == recipes["texture_33333333"].id
    with open_questions(make.workspace) as questions:
        assert list(questions.ask("SELECT DISTINCT a FROM texture").rows()) == [(1.0,)]
        assert list(questions.ask("SELECT DISTINCT a FROM basic").rows()) == [(4.0,)]
        words = {item.name: item for item in described(questions) if item.kind == "feature set"}
        assert [column.name for column in words["texture"].columns] == ["cell_id", "a"]
        assert "of this group" in words["texture"].words
        assert "of this group" not in words["basic"].words + words["texture_11111111"].words
