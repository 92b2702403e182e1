from __future__ import annotations

import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from realdata import real_data

from cellstore.errors import BadTableError, UserInputError
from cellstore.io.layouts import Layout, SourceKind, detect

LOADDATA = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site\nd.tif,P1,A01,1\n"
PUBLISHED = "FileName_OrigRNA,Metadata_pert_iname\nr01c01f01p01-ch3sk1fk1fl1.tiff,DMSO\n"
PLATEMAP = "well_position\tbroad_sample\nA01\tBRD-1\n"
IMAGES = "ImageNumber,Metadata_Plate,Metadata_Well\n1,P1,A01\n"
OBJECTS = "ImageNumber,ObjectNumber,AreaShape_Area\n1,1,9\n"


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", list(Layout))
def test_every_layout_brings_something(layout: Layout) -> None:
    assert layout.kind in SourceKind


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout.PUBLISHED, SourceKind.IMAGES),
        (Layout.IMAGE_FOLDER, SourceKind.IMAGES),
        (Layout.JUMP_PLATES, SourceKind.TREATMENTS),
        (Layout.SINGLE_CELLS, SourceKind.FEATURES),
        (Layout.MASKS, SourceKind.MASKS),
    ],
)
def test_what_a_layout_brings(layout: Layout, kind: SourceKind) -> None:
    assert layout.kind is kind


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        (LOADDATA, Layout.LOADDATA),
        (PUBLISHED, Layout.PUBLISHED),
        (PLATEMAP, Layout.PLATEMAP),
        ("broad_sample\tpert_iname\tgene\nBRD-1\tx\tY\n", Layout.TREATMENT_TABLE),
    ],
)
def test_tables_are_told_by_their_columns(tmp_path: Path, text: str, layout: Layout) -> None:
    assert detect(write(tmp_path, text)) is layout


def test_a_table_of_images_may_name_treatments_too(tmp_path: Path) -> None:
    header, row = LOADDATA.split()
    more = ",Metadata_well_position,Metadata_broad_sample,Metadata_pert_iname"
    path = write(tmp_path, f"{header}{more}\n{row},A01,BRD-1,x\n")
    assert detect(path) is Layout.LOADDATA
    assert detect(path, SourceKind.TREATMENTS) is Layout.PLATEMAP


def test_a_folder_with_an_index_is_read_through_it(tmp_path: Path) -> None:
    write(tmp_path, '<EvaluationInputData xmlns="http://x/HarmonyV5"/>', "Index.idx.xml")
    write(tmp_path, "", "r01c01f01p01-ch1sk1fk1fl1.tiff")
    assert detect(tmp_path) is Layout.HARMONY


def test_a_folder_of_plate_maps(tmp_path: Path) -> None:
    write(tmp_path, PLATEMAP, "one.txt")
    write(tmp_path, PLATEMAP, "two.txt")
    assert detect(tmp_path) is Layout.PLATEMAP


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p01-ch2sk1fk1fl1.tiff"], "image-folder"),
        (["AS_09047_050428030001_O01f00d2.TIF"], "image-folder"),
        (["B7_01_1_3_DAPI_001.tif", "B7_01_2_3_GFP_001.tif"], "image-folder"),
    ],
)
def test_folders_of_images_are_told_by_their_file_names(
    tmp_path: Path, names: list[str], layout: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert detect(tmp_path).value == layout


def test_tables_of_objects_with_their_images(tmp_path: Path) -> None:
    write(tmp_path, IMAGES, "Image.csv")
    write(tmp_path, OBJECTS, "Cells.csv")
    assert detect(tmp_path) is Layout.CELLPROFILER_CSV


def test_images_beside_tables_of_objects_are_ambiguous_until_one_is_asked_for(
    tmp_path: Path,
) -> None:
    write(tmp_path, IMAGES, "Image.csv")
    write(tmp_path, OBJECTS, "Cells.csv")
    write(tmp_path, "", "AS_09047_050428030001_O01f00d2.TIF")
    named = "holds features and images. Run: cellstore ingest features .*, or: .* ingest images "
    with pytest.raises(BadTableError, match=named):
        detect(tmp_path)
    assert detect(tmp_path, SourceKind.IMAGES) is Layout.IMAGE_FOLDER
    assert detect(tmp_path, SourceKind.FEATURES) is Layout.CELLPROFILER_CSV


def test_masks_are_read_only_when_asked_for(tmp_path: Path) -> None:
    assert detect(tmp_path, SourceKind.MASKS) is Layout.MASKS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"Filename_OrigDNA,metadata_well\nx,A01\n",
            r"yours has Filename_OrigDNA, metadata_well.*FileName_Orig",
        ),
        (b"x,y\n1,2\n", "do not recognise.*plate map.*LoadData.*single cells"),
        (
            b"Well,Vendor,Dose\nA01,taxol,1\n",
            "^file: I do not recognise this table. A plate map needs a well .*; yours has Well, Ve",
        ),
        (OBJECTS.encode(), r"one table of a CellProfiler export.*Image\.csv"),
        (b"Assay_Plate_Barcode,Plate_Map_Name\nP1,m\n", "folder of the plate maps"),
        (b"<html></html>", "not a Harmony index"),
        (b"", "is empty"),
        (b"II*\0\0\0\0\0", "not a text table"),
    ],
)
def test_files_of_no_layout_say_what_is_missing(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(BadTableError, match=message):
        detect(path)


def test_a_database_without_the_tables_of_cellprofiler(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    with pytest.raises(BadTableError, match="without the tables of CellProfiler"):
        detect(path)


def test_a_source_of_another_kind_than_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadTableError, match=r"looks like loaddata \(images\).*not features"):
        detect(write(tmp_path, LOADDATA), SourceKind.FEATURES)


def test_images_of_unknown_names_ask_for_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "", "foo-A1.tif")
    with pytest.raises(
        BadTableError, match=r"like foo-A1\.tif.*--pattern, for example '\(\?P<well>"
    ):
        detect(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadTableError, match=r"no Harmony index.*no plate maps.*further down"):
        detect(tmp_path)
    write(tmp_path, LOADDATA, "load_data.csv")
    with pytest.raises(BadTableError, match=r"one of its files, like load_data\.csv"):
        detect(tmp_path)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(
        [
            b"",
            b"SQLite format 3\0",
            b"PAR1",
            b"<?xml version='1.0'?><EvaluationInputData>",
            b"\x1f\x8b\x08\0",
            LOADDATA.encode(),
            OBJECTS.encode(),
        ]
    ),
    st.binary(max_size=40),
    st.booleans(),
)
def test_any_bytes_are_of_a_layout_or_refused(
    tmp_path: Path, start: bytes, junk: bytes, before: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(junk + start if before else start + junk)
    try:
        found = detect(path)
    except UserInputError:
        return
    assert isinstance(found, Layout)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("distributed_cellprofiler/load_data_CPG_BR00117035.csv", "loaddata"),
        ("pe2loaddata/Version1/load_data_version1.csv", "loaddata"),
        ("pe2loaddata/Version1/Index.idx.xml", "harmony"),
        ("cpjump1/images/DMSO", "image-folder"),
        ("cellprofiler_examples/ExampleIlluminationCorrection", "image-folder"),
        ("cytodataframe/NF1_Plate_2/Plate_2_images", "image-folder"),
        ("cytodataframe/NF1_Plate_2/Plate_2_with_image_data_shrunken.parquet", "single-cells"),
        ("cytotable/Cell-Health/test-SQ00014613.sqlite", "cellprofiler-sqlite"),
        ("cytotable/data_b_sqlite/data_b.sqlite", "cellprofiler-sqlite"),
        ("cytotable/data_b", "cellprofiler-csv"),
        ("cytotable/BR00116991-A01-1", "cellprofiler-csv"),
        ("jump_datasets/plate.csv.gz", "jump-plates"),
        ("jump_datasets/crispr.csv.gz", "treatment-table"),
        ("jump_datasets/perturbation_control.csv", "treatment-table"),
        ("jump_target/JUMP-Target-1_compound_metadata.tsv", "treatment-table"),
        ("jump_target/JUMP-Target-1_orf_metadata.tsv", "treatment-table"),
        ("nf1_platemaps/platemap_NF1_plate2.csv", "platemap"),
        ("cpjump1/metadata/platemaps/2020_11_04_CPJUMP1/platemap", "platemap"),
    ],
)
def test_the_layouts_of_real_sources(name: str, layout: str) -> None:
    assert detect(real_data(name)).value == layout


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        ["Metadata_Plate", "Metadata_Well", "Cells_AreaShape_Area", "Nuclei_Texture_Entropy"],
        ["Metadata_broad_sample", "Metadata_well_position", "Metadata_gene", "Cells_Area"],
        ["Metadata_Well", *(f"efficientnet_{number}" for number in range(672))],
    ],
)
def test_well_profiles_are_refused_by_name(tmp_path: Path, columns: list[str], ending: str) -> None:
    path = tmp_path / f"profiles.{ending}"
    rows = pa.table({name: ["1", "2"] for name in columns})
    (pq.write_table if ending == "parquet" else pa_csv.write_csv)(rows, path)
    words = "well profiles, .* ingest the table of single cells"
    for kind in (None, SourceKind.FEATURES):
        with pytest.raises(BadTableError, match=words):
            detect(path, kind)


def test_a_plate_map_with_many_columns_is_no_profile(tmp_path: Path) -> None:
    columns = ["well_position", "broad_sample", *(f"note_{number}" for number in range(40))]
    path = tmp_path / "map.csv"
    path.write_text(",".join(columns) + "\n" + ",".join("x" for _ in columns) + "\n")
    assert detect(path) is Layout.PLATEMAP
