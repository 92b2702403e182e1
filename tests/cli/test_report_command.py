"""The command report: which options go together."""

from __future__ import annotations


def test_maps_need_a_page_to_be_on(cellstore):
    cellstore("init", "store")
    said = cellstore("report", "--map", "area", "--store", "store", code=2)
    assert "add a file for it: --html report.html" in said.err
