"""split: what is on each side, and nothing left out in silence."""

from __future__ import annotations

import pytest


def test_what_is_left_out_is_said(cellstore, store, tmp_path):
    (tmp_path / "more.csv").write_text(
        "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname\n"
        "new.tif,P2,A01,1,lonely\nnew2.tif,P2,A02,1,\n"
    )
    cellstore("ingest", "more.csv", "--store", store)
    sizes = ("--test-size", "0.5", "--validation-size", "0")
    made = cellstore("split", "create", "by-well", *sizes, "--store", store)
    assert "missing files" in made.out
    assert "without a label" in made.out
    assert "wells on both sides  0" in made.out
    assert "no validation side" in made.err
    again = cellstore("split", "create", "by-well", *sizes, "--store", store)
    assert "nothing has changed" in again.err
    other = cellstore("split", "create", "by-well", "--seed", "5", *sizes, "--store", store, code=2)
    assert "never changes" in other.err


def test_a_class_that_cannot_be_split_is_named(cellstore, store, tmp_path):
    (tmp_path / "more.csv").write_text(
        "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_pert_iname\n"
        "new.tif,P2,A01,1,lonely\n"
    )
    cellstore("ingest", "more.csv", "--store", store)
    words = ("--test-size", "0.5", "--validation-size", "0", "--allow-missing", "--store", store)
    said = cellstore("split", "create", "by-well", *words)
    assert "lonely" in said.out


def test_the_published_protocol_is_marked(cellstore, store):
    pytest.importorskip("sklearn")
    words = ("--protocol", "published", "--test-size", "0.5", "--store", store)
    said = cellstore("split", "create", "as-published", *words)
    assert "Careful" in said.err
    assert cellstore("split", "show", "--store", store, "--json").json["leaking"] is True
    found = cellstore("split", "check", "--store", store, "--json", code=None)
    assert found.code == (1 if found.json["leaks"] else 0)
