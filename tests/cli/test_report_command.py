"""The command report: what it says before it looks at a store."""

from __future__ import annotations


def test_maps_need_a_page_to_be_on(cellstore):
    said = cellstore("report", "--map", "area", code=2)
    assert "Name a file for it too: --html report.html" in said.err
