"""split: what is on each subset, and nothing left out in silence."""

from __future__ import annotations

import pytest


def test_what_is_left_out_is_said(cellstore, store, tmp_path):
    (tmp_path / "more.csv").write_text(
        "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname\n"
        "new.tif,P2,A01,1,lonely\nnew2.tif,P2,A02,1,\n"
    )
    cellstore("ingest", "more.csv", "--look", "nowhere", "--store", store)
    sizes = ("--test-size", "0.5", "--validation-size", "0")
    made = cellstore("split", "create", "by-well", *sizes, "--store", store)
    assert "missing files" in made.out
    assert "without a label" in made.out
    assert "wells in two subsets  0" in made.out
    assert "validation subset is empty" in made.err
    again = cellstore("split", "create", "by-well", *sizes, "--store", store)
    assert "nothing has changed" in again.err
    other = cellstore("split", "create", "by-well", "--seed", "5", *sizes, "--store", store, code=2)
    assert "never changes" in other.err


def test_a_class_that_cannot_be_split_is_named(cellstore, store, tmp_path):
    (tmp_path / "more.csv").write_text(
        "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname\n"
        "new.tif,P2,A01,1,lonely\n"
    )
    cellstore("ingest", "more.csv", "--look", "nowhere", "--store", store)
    words = ("--test-size", "0.5", "--validation-size", "0", "--allow-missing", "--store", store)
    said = cellstore("split", "create", "by-well", *words)
    assert "lonely" in said.out
    assert "has one well only, and two are needed" in said.out
    assert "--group image" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    folds = cellstore("split", "create", "k", "--folds", "9", "--allow-missing", "--store", store,
                      code=2)  # fmt: skip
    assert "'lonely' has 1 well" in folds.err
    assert "a class needs 3 wells or more" in folds.err


def test_a_validation_subset_of_one_class_is_no_good_split(cellstore, tmp_path):
    rows = [f"{c}{n}.tif,P1,{'AB'[c == 'b']}0{n},1,{c}" for c, n in
            (("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2))]  # fmt: skip
    head = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname"
    (tmp_path / "images.csv").write_text("\n".join([head, *rows, ""]))
    at = ("--store", tmp_path / "new")
    cellstore("init", tmp_path / "new")
    cellstore("ingest", "images.csv", "--look", "nowhere", *at)
    made = cellstore("split", "create", "s", "--allow-missing", "--downsample", "none", *at)
    assert "the validation subset has one class only" in made.err
    found = cellstore("split", "check", *at)
    assert "The validation subset has one class only (a)" in found.out
    assert "Read the warnings, too." in found.out
    cellstore("split", "check", "--strict", *at, code=1)


def test_the_published_protocol_is_marked(cellstore, store):
    pytest.importorskip("sklearn")
    words = ("--protocol", "published", "--test-size", "0.5", "--store", store)
    said = cellstore("split", "create", "as-published", *words)
    assert "Careful" in said.err
    assert cellstore("split", "show", "--store", store, "--json").json["leaking"] is True
    found = cellstore("split", "check", "--store", store, "--json", code=None)
    assert found.code == (1 if found.json["leaks"] else 0)


def draw(cellstore, store, name="by-well", *words):
    sizes = ("--test-size", "0.5", "--validation-size", "0")
    return cellstore("split", "create", name, *sizes, *words, "--store", store)


def test_folds_are_listed_and_deleted_together(cellstore, store):
    made = cellstore(
        *("split", "create", "cv", "--folds", "2", "--validation-size", "0", "--store", store)
    )
    cellstore(
        "split", "create", "x", "--folds", "2", "--test-size", "0.2", "--store", store, code=2
    )
    assert "2, cv-1 to cv-2" in made.out
    assert "12, each tested once" in made.out
    listed = cellstore("split", "list", "--store", store)
    assert [line.split()[0] for line in listed.out.splitlines()[2:]] == ["cv-1", "cv-2"]
    assert max(map(len, listed.out.splitlines())) <= 80
    assert "fold                  2 of cv" in cellstore("split", "show", "--store", store).out
    kept = cellstore("split", "delete", "cv", "--store", store, stdin="n\n", code=1)
    assert "Delete cv-1, cv-2 (24 images assigned)?" in kept.err
    assert len(cellstore("split", "list", "--store", store, "--json").json) == 2
    gone = cellstore("split", "delete", "cv", "--yes", "--store", store)
    assert gone.out.startswith("Deleted cv-1, cv-2")
    assert "no split yet" in cellstore("split", "list", "--store", store).out


def test_a_class_is_cut_and_images_are_chosen_by_a_condition(cellstore, store):
    made = draw(
        cellstore, store, "cut", "--downsample", "DMSO=3", "--where", "perturbation <> 'taxol'"
    )
    assert "DMSO, downsampled     3 of 4 images" in made.out
    assert "perturbation, 2 classes" in made.out
    for word in ("DMSO", "=3", "none=1", "DMSO=few"):
        cellstore("split", "create", "x", "--downsample", word, "--store", store, code=2)
    assert "downsampled" not in draw(cellstore, store, "all", "--downsample", "none").out


def test_a_table_of_others_is_imported_and_checked(cellstore, store, tmp_path):
    (tmp_path / "theirs.csv").write_text(
        "split,plate,well,site,pert_iname\n"
        "train,P1,A01,1,DMSO\ntest,P1,A01,2,DMSO\ntrain,P1,A03,1,aspirin\ntest,P7,A03,1,Aspirin\n"
    )
    words = ("split", "import", "theirs", "theirs.csv", "--store", store)
    made = cellstore(*words)
    assert "protocol               imported, by image" in made.out
    assert "rows without an image  1, first theirs.csv, line 5" in made.out
    assert "Careful: some wells are in training and in test" in made.err
    refused = cellstore(*words[:2], "kept", *words[3:], "--group", "well", code=2)
    assert "one subset only" in refused.err
    found = cellstore("split", "check", "theirs", "--store", store, code=1)
    leak = [line for line in found.out.splitlines() if line.startswith("leak")]
    assert leak == ["leak     1 of 2 wells is in both subsets."]
    table = cellstore("split", "check", "--csv", "theirs.csv", code=1)  # needs no store
    assert "rows                    4" in table.out
    assert "'Aspirin' (test) = 'aspirin' (train)" in table.out
    assert max(map(len, table.out.splitlines())) <= 80
    cellstore("split", "check", "theirs", "--csv", "theirs.csv", code=2)
    cellstore("split", "check", "--field", "target", "--store", store, code=2)


def test_a_pipeline_may_stop_at_warnings(cellstore, tmp_path):
    # Aspirin is never tested: a warning, not a leak.
    (tmp_path / "t.csv").write_text(
        "split,plate,well,pert_iname\ntrain,P1,A01,DMSO\ntest,P1,A02,DMSO\ntrain,P1,A03,aspirin\n"
    )
    words = ("split", "check", "--csv", "t.csv", "--json")
    found = cellstore(*words, code=0).json
    assert (found["leaks"], found["warnings"]) == (0, 1)
    assert [item["severity"] for item in found["findings"]] == ["warning", "remark"]
    cellstore(*words, "--strict", code=1)
    (tmp_path / "t.csv").write_text(
        "split,plate,well,pert_iname\ntrain,P1,A01,DMSO\ntest,P1,A02,DMSO\n"
    )
    cellstore(*words, "--strict", code=0)  # a plate in both subsets is only a remark


def test_the_published_protocol_takes_no_group(cellstore, store):
    words = ("split", "create", "p", "--protocol", "published", "--store", store)
    said = cellstore(*words, "--group", "well", "--validation-size", "0.1", code=2).err
    assert "remove --group and --validation-size" in " ".join(said.split())
