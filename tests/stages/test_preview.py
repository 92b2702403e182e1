"""A dry run in bounded memory."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from cellstore.config import IngestParams
from cellstore.stages.ingest.ingest import preview


def write(path: Path, count: int) -> Path:
    """A table of ``count`` images, two of each well; every image twice."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("FileName_OrigDNA", "Metadata_Plate", "Metadata_Well", "Metadata_Site"))
        for number in (*range(count), *range(count)):
            writer.writerow((f"{number}.tif", "P1", f"A{number // 2 + 1:02d}", number % 2))
    return path


@pytest.mark.parametrize(("most", "images", "wells"), [(3, 3, 3), (5, 5, 4), (8, 8, 4)])
def test_what_is_told_apart_is_bounded_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, images: int, wells: int
) -> None:
    monkeypatch.setattr(sys.modules[preview.__module__], "MOST", most)
    found = preview(write(tmp_path / "t.csv", 8))
    assert (found.rows, found.images, len(found.wells)) == (16, images, wells)
    assert found.at_least is (most < 8)


def test_blank_wells_are_named_where_they_have_images(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", 6)  # wells A01 to A03
    platemap = tmp_path / "map.csv"
    platemap.write_text("Well,Compound\nA1,taxol\nA2,\nA4,\nA5,noco\n")
    found = preview(table, IngestParams(platemap=platemap))
    blank, missing = found.notes
    assert blank.startswith("1 well is blank in map.csv, so its treatment is not known: A02. To")
    assert missing.startswith("1 well with images got no treatment: A03, but wells without images")
    platemap.write_text("Well,Compound\nA1,taxol\nA2,\nA3,x\nA4,\n")
    (note,) = preview(table, IngestParams(platemap=platemap)).notes
    assert note.startswith("1 well is blank in map.csv")
