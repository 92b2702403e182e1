"""The commands that put things right, as people type them."""

from __future__ import annotations

from pathlib import Path

from foreign_cells import add_foreign_cells, by_id


def test_a_person_corrects_a_screen_and_sees_it(cellstore, store):
    at = ("--store", store)
    said = cellstore("rename", "plate", "P1", "BR1", *at, "--dry-run")
    assert "12 images" in said.out
    assert "dry run" in said.err
    assert "Next: " in cellstore("rename", "plate", "P1", "BR1", *at).err
    said = cellstore("relabel", "BR1/A01", *at, "--treatment", "taxol", "--reason", "shifted")
    assert "DMSO" in said.out
    assert "taxol" in said.out
    cellstore("exclude", "well", "BR1", "A02", *at, "--reason", "debris")
    assert cellstore("audit", "BR1/A02", *at, "--json").json["excluded"] == "debris"
    cellstore("include", "well", "BR1/A02", *at)
    assert cellstore("audit", "BR1/A02", *at, "--json").json["excluded"] is None
    done = cellstore("relabel", "BR1/A01", *at, "--treatment=DMSO", "--reason=no", "--json").json
    assert done["changes"][0]["new"]["treatment"] == "DMSO"
    said = cellstore("log", *at, "--plate", "BR1").out
    assert "BR1/A02: excluded none -> debris" in said
    assert "why: shifted" in said
    assert max(map(len, said.splitlines())) <= 80
    assert cellstore("log", *at, "--limit", "1", "--json").json["entries"][0]["reason"] == "no"


def test_people_label_what_they_see(cellstore, store):
    at = ("--store", store)
    said = cellstore("annotate", "image", "P1/A01/1", "P1/A02/1", *at, "--label", "blurred")
    assert "2 images  annotation  -       blurred" in said.out
    assert "Next: " in said.err
    more = ("--user", "bob", "--reason", "look again")
    cellstore("annotate", "image", "P1/A01/1", *at, "--label", "sharp", *more)
    first = cellstore("ask", "annotations", *at, "--json").json[0]
    assert [first[name] for name in ("label", "user_name", "reason")] == [
        *("sharp", "bob", "look again")
    ]
    (row,) = cellstore("ask", "agreement", *at, "--json").json
    assert (row["both"], row["agreement"], row["kappa"]) == (1, 0.0, 0.0)
    assert "blurred" in cellstore("audit", "P1/A01/1", *at).out
    well = cellstore("audit", "image", "P1/A01", *at, code=2).err
    assert "P1/A01 is a well" in well
    assert "cellstore audit well P1/A01" in well
    cellstore("annotate", "image", "P1/A01/1", *at, "--undo", "--user", "bob")
    assert cellstore("ask", "agreement", *at, "--json").json == []
    for words in ((), ("--undo", "--label", "sharp")):
        assert "Say what it is" in cellstore("annotate", "image", "1", *words, *at, code=2).err


def test_errors_are_one_sentence(cellstore, store):
    at = ("--store", store)
    for words in (
        ("rename", "plate", "P7", "P8"),
        ("rename", "channel", "ER", "RNA"),
        ("relabel", "P1/Z99", "--treatment", "x", "--reason", "r"),
        ("exclude", "image", "P1/A01/77", "--reason", "r"),
        ("exclude", "cell", "x", "--reason", "r"),
        ("include", "well", "P1/A01"),
        ("annotate", "well", "P1/A01", "--undo"),
        ("annotate", "cell", "x", "--label", "round"),
        ("annotate", "well", "P1/A01", "--label", "round", "--field", "treatment"),
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
    planned = cellstore("backup", "b.tar", "--store", store, "--dry-run", "--json").json
    assert not Path("b.tar").exists()
    made = cellstore("backup", "b.tar", "--store", store, "--json").json
    same = ("rows", "artifacts", "missing")
    assert {name: planned[name] for name in same} == {name: made[name] for name in same}
    assert 0.5 < planned["size_bytes"] / made["size_bytes"] < 2
    said = cellstore("backup", "b.tar", "--store", store)
    assert "rows" in said.out
    assert said.err.splitlines()[-1] == "Next: cellstore restore b.tar DIR --dry-run"
    assert "dry run" in cellstore("restore", "b.tar", "new", "--dry-run").err
    said = cellstore("restore", "b.tar", "new")
    assert said.err.splitlines()[-1] == "Next: cellstore --store new verify"
    count = ("sql", "SELECT count(*) AS n FROM images", "--json", "--store", "new")
    assert cellstore(*count).json[0]["n"] == 12
    assert "not empty" in cellstore("restore", "b.tar", "new", code=2).err


def test_imported_cells_are_undone_and_come_back(cellstore, with_set):
    at = ("--store", with_set)

    def numbers():
        tables = ("segmentations", "cells", "feature_sets", "feature_files", "artifacts")
        counts = ", ".join(f"(SELECT count(*) FROM {name}) AS {name}" for name in tables)
        return cellstore("sql", f"SELECT {counts}", *at, "--json").json[0]

    before = numbers()
    assert before["cells"] == 24
    query = "SELECT id FROM runs WHERE stage = 'ingest' ORDER BY id DESC LIMIT 2"
    features, cells = (row["id"] for row in cellstore("sql", query, *at, "--json").json)
    said = cellstore("undo", cells, *at, code=2)
    assert f"ingest run {features}" in said.err
    assert numbers() == before
    cellstore("undo", features, *at)
    assert "24 cells" in cellstore("undo", cells, *at).out
    assert set(numbers().values()) == {0}
    found = cellstore("verify", *at, "--json", code=1).json  # rows that the test made by itself
    assert found["orphans"] == []
    add_foreign_cells(with_set, 2, by_id)
    assert numbers() == before
    found = cellstore("sql", "SELECT count(*) AS n FROM cp", *at, "--json").json[0]["n"]
    assert found == 24
    assert cellstore("delete", "plate", "P1", "--yes", *at, code=2).err.count("split main") == 1
    cellstore("split", "delete", "main", "--yes", *at)
    cellstore("delete", "plate", "P1", "--yes", *at)
    assert numbers()["cells"] == 0
    assert cellstore("sql", "FROM cell_table", *at, "--json").json == []


def test_a_map_that_is_taken_back_says_what_the_wells_had(cellstore, store, tmp_path):
    at = ("--store", store)
    path = tmp_path / "map.csv"
    path.write_text("Well,Compound,Dose (uM),Passage\nA01,drug,5,7\nA02,drug,5,8\n")
    tried = cellstore("ingest", path, "--plate", "P9", "--dry-run", *at)
    changes = [line.split()[-1] for line in tried.out.splitlines() if line.startswith("P9 ")]
    assert changes == ["new", "new"]
    cellstore("ingest", path, "--plate", "P1", *at)
    path.write_text("Well,Compound,Dose (uM),Passage\nA01,drug,5,9\nA02,drug,5,10\n")
    tried = cellstore("ingest", path, "--plate", "P1", "--dry-run", *at)
    assert "was" not in tried.out
    run = cellstore("ingest", path, "--plate", "P1", "--json", *at).json["run_id"]
    said = cellstore("undo", run, "--reason", "wrong", *at)
    assert "Passage 9" in said.out
    assert "concerns  4 images" in said.out
    assert "{" not in said.out
