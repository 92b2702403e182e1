"""init, ingest, db: the first things that a person types."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from cellstore.io.image_files import encode_tiff
from cellstore.models import Base


def test_init_makes_a_store_and_keeps_an_existing_one(cellstore):
    assert "Made the store" in cellstore("init", "store").out
    assert "There is already a store" in cellstore("init", "store").out
    assert cellstore("init", "other", "--json").json["created"] is True
    assert "Made the store" in cellstore("--store", "third", "init").out
    assert "There is already a store" in cellstore("--store", "third", "init").out


def test_init_in_a_place_that_cannot_be_written_is_one_sentence(cellstore, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = cellstore("init", tmp_path / "file" / "store", code=2)
    assert said.err.startswith("Error: ")
    assert "cannot be written" in said.err


def test_init_with_a_database_out_of_reach_leaves_nothing(cellstore, tmp_path):
    said = cellstore(
        "init", "store", "--database", f"postgresql://me:s3cret@/x?host={tmp_path}", code=2
    )
    assert said.err.startswith("Error: ")
    assert "s3cret" not in said.err
    assert not Path("store").exists()


def test_init_with_a_url_that_cannot_be_read_is_one_sentence(cellstore):
    said = cellstore("init", "x", "--database", "postgresql://bob:s3cret@host:port/x", code=2)
    assert said.err.startswith("Error: The database URL cannot be read")
    assert "s3cret" not in said.err
    assert not Path("x").exists()


def test_init_of_an_existing_store_on_another_database_is_refused(cellstore, store):
    said = cellstore("init", store, "--database", "postgresql://me:s3cret@server/x", code=2)
    assert said.err.startswith("Error: There is already a store")
    assert said.err.count("\n") == 1
    assert "s3cret" not in said.err
    assert cellstore("status", "--json", "--store", store).json["images"] == 12


@pytest.mark.parametrize("words", [["--store", "store", "status"], ["status", "--store", "store"]])
def test_the_store_stands_before_or_after_the_command(cellstore, store, words):
    assert "images" in cellstore(*words).out


def test_the_store_is_found_upwards_and_by_the_environment(cellstore, store, monkeypatch, tmp_path):
    monkeypatch.setenv("CELLSTORE_STORE", str(tmp_path / "store"))
    assert cellstore("status", "--json").json["images"] == 12
    monkeypatch.delenv("CELLSTORE_STORE")
    (tmp_path / "store" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "store" / "deep")
    assert cellstore("status", "--json").json["images"] == 12


def test_no_store_is_one_sentence_that_says_what_to_do(cellstore):
    said = cellstore("status", code=2)
    assert said.err.count("\n") == 1
    assert "cellstore init" in said.err


def test_ingest_twice_changes_nothing_and_says_so(cellstore, store, screen):
    words = ("ingest", screen, "--images", screen.parent / "images", "--store", store)
    assert "Nothing has changed" in cellstore(*words).out
    assert cellstore(*words, "--json").json["unchanged"] == 12


def test_rows_that_cannot_be_used_are_listed_by_reason(cellstore, store, tmp_path):
    lines = ["FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname"]
    lines += [f"x{number}.tif,P1,ZZ9{number},1,DMSO" for number in range(12)]
    lines += ["good.tif,P1,H12,1,DMSO"]
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    said = cellstore("ingest", "bad.csv", "--store", store, code=1)
    assert "12 rows" in said.out
    assert "line 2:" in said.out
    assert "line 12:" not in said.out
    assert "And 11 more like this." in said.out
    result = cellstore("ingest", "bad.csv", "--store", store, "--json", code=1).json
    assert [item["line"] for item in result["issues"]] == list(range(2, 14))
    asked = cellstore("sql", "SELECT line FROM ingest_issues", "--store", store, "--json").json
    assert [row["line"] for row in asked] == 2 * list(range(2, 14))


def test_a_dry_run_of_images(cellstore, store, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("r01c02f03p01-ch1sk1fk1fl1.tiff", "r01c02f03p01-ch2sk1fk1fl1.tiff"):
        (tmp_path / "images" / name).write_bytes(b"not looked at")
    at = ("--store", store)
    said = cellstore("ingest", "images", "--dry-run", "--channels", "1=Mito,2=DNA", *at)
    assert "image-folder" in said.out
    assert "Mito" in said.out
    assert "dry run" in said.err
    found = cellstore("ingest", "images", "--dry-run", "--json", *at).json
    assert [(row["well"], row["channel"]) for row in found["preview"]] == [
        *(("A02", "ch1"), ("A02", "ch2")),
    ]


def test_a_dry_run_of_masks_looks_for_their_images(cellstore, store, tmp_path):
    pixels = np.zeros((32, 32), np.uint16)
    pixels[2:9, 2:9] = 7
    (tmp_path / "outlines").mkdir()
    for name in ("r01c01f01p01-ch1sk1fk1fl1_cp_masks.tif", "absent_cp_masks.tif"):
        (tmp_path / "outlines" / name).write_bytes(encode_tiff(pixels))
    words = ("ingest", "masks", "outlines", "--dry-run", "--store", store)
    said = cellstore(*words, code=1)
    assert "no such image" in said.out
    assert "dry run" in said.err
    found = cellstore(*words, "--json", code=1).json
    assert [(row["plate"], row["well"], row["cells"]) for row in found["preview"]] == [
        ("P1", "A01", 1)
    ]
    question = "SELECT count(*) AS n FROM runs WHERE stage = 'ingest'"
    before = cellstore("sql", question, "--store", store, "--json").json
    cellstore(*words, code=1)
    assert cellstore("sql", question, "--store", store, "--json").json == before


def _features_of(kind: str, folder: Path, area: float) -> Path:
    """Two cells in B02 of plate P9, a third without an image or well, as ``kind`` writes them."""
    columns = ("ImageNumber", "ObjectNumber", "AreaShape_Area", "AreaShape_Extent")
    cells = [(1, 1, area, 0.5), (1, 2, area + 1, 0.6), (7, 1, 3.0, 0.7)]
    if kind == "csv":
        source = folder / "cp"
        source.mkdir(exist_ok=True)
        place = "ImageNumber,Metadata_Plate,Metadata_Well,Metadata_Site\n1,P9,B02,1\n"
        (source / "Image.csv").write_text(place)
        rows = [",".join(map(str, row)) for row in (columns, *cells)]
        (source / "Cells.csv").write_text("\n".join(rows) + "\n")
        return source
    if kind == "sqlite":
        source = folder / "cp.sqlite"
        source.unlink(missing_ok=True)
        with closing(sqlite3.connect(source)) as database:
            database.execute(
                "CREATE TABLE Image (ImageNumber INT, Image_Metadata_Plate TEXT, "
                "Image_Metadata_Well TEXT, Image_Metadata_Site INT)"
            )
            database.execute("INSERT INTO Image VALUES (1, 'P9', 'B02', 1)")
            database.execute(
                "CREATE TABLE Cells (ImageNumber INT, ObjectNumber INT, "
                "Cells_AreaShape_Area FLOAT, Cells_AreaShape_Extent FLOAT)"
            )
            database.executemany("INSERT INTO Cells VALUES (?, ?, ?, ?)", cells)
            database.commit()
        return source
    source = folder / "cells.parquet"
    wells = ["B02" if number == 1 else "nowhere" for number, *_ in cells]
    places = {"Metadata_Plate": ["P9"] * 3, "Metadata_Well": wells, "Metadata_Site": ["1"] * 3}
    values = {
        f"Cells_{name}": [row[at] for row in cells] for at, name in enumerate(columns) if at > 1
    }
    numbers = {"Metadata_ObjectNumber": [row[1] for row in cells]}
    pq.write_table(pa.table({**places, **numbers, **values}), source)
    return source


@pytest.mark.one_database
@pytest.mark.parametrize("kind", ["csv", "sqlite", "parquet"])
def test_a_dry_run_of_features_says_what_an_ingest_would_do(cellstore, workspace, tmp_path, kind):
    def everything() -> tuple[dict[str, list[str]], list[tuple[str, bytes]]]:
        with workspace.database.read() as session:
            rows = {
                table.name: sorted(map(repr, session.execute(select(table))))
                for table in Base.metadata.sorted_tables
            }
        folder = workspace.artifacts
        return rows, [(path, folder.locate(path).read_bytes()) for path in sorted(folder.walk())]

    at = ("--name", "other", "--store", workspace.settings.root)
    source = _features_of(kind, tmp_path, 10.0)
    empty = everything()
    said = cellstore("ingest", source, "--dry-run", *at, code=1)
    assert "dry run" in said.err
    assert re.search(r"P9 +B02 +1 +1 +1 +2\n", said.out)
    assert max(map(len, said.out.partition("Rows that were")[0].splitlines())) <= 80
    planned = cellstore("ingest", source, "--dry-run", "--json", *at, code=1).json
    assert everything() == empty
    assert (planned["cells"], planned["images"], planned["refused"]) == (2, 1, 1)

    done = cellstore("ingest", source, "--json", *at, code=1).json
    names = ("rows", "created", "updated", "unchanged", "refused", "cells", "feature_set")
    assert {name: planned[name] for name in names} == {name: done[name] for name in names}
    assert planned["issues"] == done["issues"]

    # The same again, and other values for the same cells: compared with the files of the store.
    full = everything()
    again = cellstore("ingest", source, "--dry-run", "--json", *at, code=1).json
    assert (again["unchanged"], again["cells"], again["preview"]) == (done["created"], 0, [])
    other = _features_of(kind, tmp_path, 11.0)
    differs = cellstore("ingest", other, "--dry-run", "--json", *at, code=1).json
    assert "other values than before" in [issue["reason"] for issue in differs["issues"]]
    renamed = cellstore("ingest", other, "--dry-run", "--json", "--name", "third", *at[2:], code=1)
    assert [row["cells"] for row in renamed.json["preview"]] == [2]
    assert everything() == full


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ingest", "a", "b"), "one source"),
        (("ingest", "masks", "a", "b"), "one source"),
        (("ingest", "a", "--map", "odd"), "OLD=NEW"),
        (("ingest", "a", "--channels", "1="), "OLD=NEW"),
    ],
)
def test_words_that_do_not_fit_are_one_sentence(cellstore, words, said):
    told = cellstore(*words, code=2)
    assert said in told.err
    assert told.err.count("\n") == 1


def test_a_table_in_an_object_store_is_named_as_it_was_written(cellstore, store):
    for more in ([], ["--dry-run"]):
        said = cellstore("ingest", "s3://me:secret@b/t.csv", "--store", store, *more, code=2)
        assert said.err.startswith("Error: s3://b/t.csv is not on this machine")


def test_a_table_of_which_no_row_can_be_used_is_an_error(cellstore, store, tmp_path):
    (tmp_path / "bad.csv").write_text(
        "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site\nx.tif,P1,nowhere,1\n"
    )
    assert "No row" in cellstore("ingest", "bad.csv", "--store", store, code=2).err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        ("", "empty"),
        ("a,b\n1,2\n", "FileName_OrigRNA"),
        ("FileName_OrigRNA,Metadata_pert_inane\nx,y\n", "Metadata_pert_inane"),
    ],
    ids=["absent", "empty", "other", "near"],
)
def test_a_table_that_cannot_be_read_writes_nothing(cellstore, store, tmp_path, content, words):
    if content is not None:
        (tmp_path / "table.csv").write_text(content)
    before = cellstore("status", "--json", "--store", store).json
    said = cellstore("ingest", "table.csv", "--store", store, code=2)
    assert said.err.startswith("Error: ")
    assert words in said.err
    assert cellstore("status", "--json", "--store", store).json == before


def test_db_commands(cellstore, store):
    assert "as it should be (revision 0012)" in cellstore("db", "check", "--store", store).out
    assert "up to date" in cellstore("db", "upgrade", "--store", store).err


def test_a_changed_schema_is_told_with_exit_code_1(cellstore, store):
    with sqlite3.connect(store / "cellstore.db") as connection:
        connection.execute("ALTER TABLE plates ADD COLUMN colour TEXT")
    connection.close()
    assert "colour" in cellstore("db", "check", "--store", store, code=1).out


def test_a_newer_store_is_refused_with_the_command(cellstore, store):
    with sqlite3.connect(store / "cellstore.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    for words in (("status",), ("db", "upgrade"), ("db", "check"), ("init", store)):
        said = cellstore(*words, "--store", store, code=2).err
        assert "9999" in said
        assert "pip install --upgrade" in said


def test_a_lost_mark_of_the_schema_is_one_sentence(cellstore, store):
    with sqlite3.connect(store / "cellstore.db") as connection:
        connection.execute("DELETE FROM alembic_version")
    connection.close()
    for words in (("status",), ("db", "upgrade")):
        said = cellstore(*words, "--store", store, code=2)
        assert "no record of their schema" in said.err
        assert said.err.count("\n") == 1


def test_a_lost_database_is_one_sentence(cellstore, store):
    for file in store.glob("cellstore.db*"):
        file.unlink()
    assert "backup" in cellstore("status", "--store", store, code=2).err


def test_a_damaged_marker_is_one_sentence(cellstore, store):
    (store / "cellstore.toml").write_text("[[[")
    assert "cannot be read" in cellstore("status", "--store", store, code=2).err


def test_a_table_whose_images_are_all_absent_is_no_success(cellstore, store):
    columns = "Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigDNA,PathName_OrigDNA\n"
    Path("gone.csv").write_text(f"{columns}far,A01,1,a.tif,/nowhere\nfar,A02,1,b.tif,/nowhere\n")
    at = ("--store", store)
    for _ in range(2):  # also when the table was read before
        said = cellstore("ingest", "gone.csv", *at, code=1)
        assert "No image file was found (2 images). The rows are stored." in " ".join(
            said.err.split()
        )
        assert "--images FOLDER" in said.err
    assert cellstore("ingest", "gone.csv", *at, "--json", code=1).json["missing_images"] == 2
    asked = cellstore("sql", "SELECT well FROM image_table WHERE plate = 'far'", *at, "--json").json
    assert [row["well"] for row in asked] == ["A01", "A02"]
    cellstore("ingest", "gone.csv", "--look", "nowhere", *at)  # what was asked for was done
    Path("here").mkdir()
    Path("here/a.tif").write_bytes(encode_tiff(np.arange(16, dtype=np.uint16).reshape(4, 4)))
    cellstore("ingest", "gone.csv", "--images", "here", *at)
