"""qc: what is odd is told in 80 columns, listed, drawn, and left out when asked."""

from __future__ import annotations

import re

import numpy as np

from cellstore.io.image_files import encode_tiff
from cellstore_cli.output import span

FEW = ("--min-images", "5")
FLAGGED = ("--exclude-flagged", "latest")


def saturate(screen, name):
    """Make half of the pixels of an image white."""
    pixels = np.random.default_rng(1).integers(0, 4000, (32, 32)).astype(np.uint16)
    pixels[:16] = 65_535
    (screen.parent / "images" / name).write_bytes(encode_tiff(pixels))


def ready(cellstore, store, screen):
    saturate(screen, "r01c02f01p01-ch1sk1fk1fl1.tiff")
    cellstore("ingest", screen, "--images", screen.parent / "images", "--store", store)


def test_a_table_a_plate_and_the_list_of_flagged_images(cellstore, store, screen):
    ready(cellstore, store, screen)
    told = cellstore("qc", *FEW, "--list", "--store", store)
    assert all(len(line) <= 80 for line in told.out.splitlines())
    assert "images looked at now  12" in told.out
    row = next(line.split() for line in told.out.splitlines() if line.startswith("P1  "))
    assert row[:3] == ["P1", "12", "1"]
    assert re.search(r"^P1/A02/1 +saturated +DNA +0.5  0.01 or less$", told.out, re.MULTILINE)
    assert "No cells yet" in told.err
    again = cellstore("qc", *FEW, "--store", store)
    assert "Nothing has changed since run" in again.out


def test_json_has_everything(cellstore, store, screen):
    ready(cellstore, store, screen)
    found = cellstore("qc", *FEW, "--list", "--store", store, "--json").json
    assert found["plates"][0]["by_reason"]["saturated"] == 1
    flag = next(item for item in found["flags"] if item["reason"] == "saturated")
    assert (flag["well"], flag["channel"], flag["value"]) == ("A02", "DNA", 0.5)
    assert cellstore("qc", *FEW, "--store", store, "--json").json["flags"] == []


def test_a_page_is_written(cellstore, store, screen, tmp_path):
    ready(cellstore, store, screen)
    told = cellstore("qc", *FEW, "--html", "qc.html", "--store", store)
    assert "page: qc.html" in told.out
    assert "<svg" in (tmp_path / "qc.html").read_text()


def test_an_empty_store_says_so(cellstore):
    cellstore("init", "empty")
    assert "no image is selected" in cellstore("qc", "--store", "empty").out
    said = cellstore("qc", "--html", "x.html", "--store", "empty", code=2)
    assert "nothing to draw" in said.err


def test_a_failed_image_ends_with_1(cellstore, store, screen):
    path = screen.parent / "images" / "r01c02f01p01-ch1sk1fk1fl1.tiff"
    path.unlink()
    said = cellstore("qc", *FEW, "--store", store, code=1)
    assert "1 of 12 images could not be looked at" in said.err


def test_a_split_leaves_out_and_says_what(cellstore, store, screen):
    ready(cellstore, store, screen)
    sizes = ("--test-size", "0.5", "--validation-size", "0", "--store", store)
    early = cellstore("split", "create", "early", *FLAGGED, *sizes, code=2)
    assert "cellstore qc" in early.err
    run = cellstore("qc", *FEW, "--store", store, "--json").json["run_id"]
    made = cellstore("split", "create", "clean", *FLAGGED, *sizes)
    assert f"qc run {run}" in made.out
    assert "1 image excluded" in made.out
    named = cellstore("split", "create", "named", "--exclude-flagged", run, *sizes, "--json").json
    assert named["excluded"]["qc_run"] == run
    unknown = cellstore("split", "create", "x", "--exclude-flagged", 99, *sizes, code=2)
    assert "99" in unknown.err


def test_limits_in_words():
    assert span(1.0, 2.5) == "1 to 2.5"
    assert span(1.0, None) == "1 or more"
    assert span(None, 0.01) == "0.01 or less"
