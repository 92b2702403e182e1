"""train on a feature set of another tool: what is asked, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", "--store", "store")


@pytest.mark.heavy
def test_a_network_without_pictures_is_said_to_be_one(cellstore, with_set: Path):
    pytest.importorskip("torch")
    said = cellstore("train", "--features", "cp", *SMALL)
    facts = dict(line.split(None, 1) for line in said.out.splitlines() if line.startswith("branch"))
    assert facts == {"branches": "tabular"}
    assert "So the network looks at: tabular." in " ".join(said.err.split())
    again = cellstore("train", "--features", "cp", "--branches", "tabular", "--json", *SMALL)
    assert again.json["already_done"]
    assert (again.json["feature_set"], again.json["branches"]) == ("cp", ["tabular"])
    assert cellstore("predict", "--device", "cpu", "--json", "--store", "store").json["cells"] == 12


def test_what_cannot_be_read_is_told_before_anything_is_done(cellstore, with_set: Path):
    pytest.importorskip("torch")
    said = cellstore("train", "--features", "cp", "--branches", "mask, tabular", *SMALL, code=2)
    assert "Use --branches tabular" in said.err
    said = cellstore("train", "--features", "cq", *SMALL, code=2)
    assert "Unknown feature set 'cq'" in said.err
    said = cellstore("train", *SMALL, code=2)
    assert "sets with --features: cp" in said.err
