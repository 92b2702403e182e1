"""A dry run in bounded memory."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

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
