"""The commands that put things right, as people type them."""

from __future__ import annotations


def test_a_person_corrects_a_screen_and_sees_it(cellstore, store):
    at = ("--store", store)
    said = cellstore("rename", "plate", "P1", "BR1", *at, "--dry-run")
    assert "12 images" in said.out
    assert "dry run" in said.err
    cellstore("rename", "plate", "P1", "BR1", *at)
    said = cellstore("relabel", "BR1/A01", *at, "--treatment", "taxol", "--reason", "shifted")
    assert "DMSO" in said.out
    assert "taxol" in said.out
    cellstore("exclude", "well", "BR1", "A02", *at, "--reason", "debris")
    assert cellstore("audit", "BR1/A02", *at, "--json").json["excluded"] == "debris"
    cellstore("include", "well", "BR1/A02", *at)
    assert cellstore("audit", "BR1/A02", *at, "--json").json["excluded"] is None
    done = cellstore("relabel", "BR1/A01", *at, "--treatment=DMSO", "--reason=no", "--json").json
    assert done["changes"][0]["new"]["treatment"] == "DMSO"


def test_errors_are_one_sentence(cellstore, store):
    at = ("--store", store)
    for words in (
        ("rename", "plate", "P7", "P8"),
        ("rename", "channel", "ER", "RNA"),
        ("relabel", "P1/Z99", "--treatment", "x", "--reason", "r"),
        ("exclude", "image", "P1/A01/77", "--reason", "r"),
        ("exclude", "cell", "x", "--reason", "r"),
        ("include", "well", "P1/A01"),
    ):
        said = cellstore(*words, *at, code=2)
        assert said.err.startswith("Error: "), words
        assert len(said.err.strip().splitlines()) == 1


def test_an_ingest_is_undone_and_a_plate_deleted(cellstore, store, screen):
    at = ("--store", store)
    said = cellstore("undo", "1", *at, "--dry-run")
    assert "12 images" in said.out
    assert cellstore("sql", "SELECT count(*) AS n FROM images", *at, "--json").json[0]["n"] == 12
    cellstore("undo", "1", *at, "--reason", "wrong folder")
    assert cellstore("sql", "SELECT count(*) AS n FROM plates", *at, "--json").json[0]["n"] == 0
    assert "undone already" in cellstore("undo", "1", *at, code=2).err
    cellstore("ingest", screen, "--images", screen.parent / "images", *at)
    assert "12 images" in cellstore("delete", "plate", "P1", *at, code=1, stdin="n\n").err
    cellstore("delete", "plate", "P1", *at, stdin="y\n")
    assert cellstore("sql", "SELECT count(*) AS n FROM images", *at, "--json").json[0]["n"] == 0
    assert "plate" in cellstore("delete", "well", "P1/A01", *at, code=2).err


def test_a_store_is_backed_up_and_restored(cellstore, store):
    said = cellstore("backup", "b.tar", "--store", store)
    assert "rows" in said.out
    assert "dry run" in cellstore("restore", "b.tar", "new", "--dry-run").err
    cellstore("restore", "b.tar", "new")
    count = ("sql", "SELECT count(*) AS n FROM images", "--json", "--store", "new")
    assert cellstore(*count).json[0]["n"] == 12
    assert "not empty" in cellstore("restore", "b.tar", "new", code=2).err
