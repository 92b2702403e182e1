"""The page of hits: what it says and draws, without images, with hostile names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import Factory

from cellstore.config import HitsParams
from cellstore.enums import ArtifactKind, Stage
from cellstore.jobs.runs import keep_files
from cellstore.jobs.workspace import Workspace
from cellstore.report.hits_page import q_text, sd_text, write_hits_page
from cellstore.stages.hits import hits

pytest.importorskip("copairs")
pytest.importorskip("pycytominer")

HOSTILE = "<script>alert(1)</script> \"'> & $x$"
COLUMNS = ("Nuclei_AreaShape_Area", "mean_intensity_DNA", "e1", "e2")


def profiled(workspace: Workspace, folder: Path) -> None:
    """Two plates: seven controls, two wells of a treatment that enlarges nuclei, and four doses."""
    make, random = Factory(workspace), np.random.default_rng(0)
    control, strong = make.treatment("DMSO"), make.treatment(HOSTILE, "AAA")
    idle = make.treatment("idle")
    doses = {dose: make.doses(("taxol", dose)) for dose in (0.1, 1.0, 10.0, 100.0)}
    wells, values = list[int](), []
    for barcode in ("P1", "P2"):
        plate = make.plate(barcode)
        content = [control] * 7 + [strong] * 2 + [idle] * 2 + [*doses.values()]
        for at, treatment in enumerate(content):
            well = make.well(plate, 2 + at // 6, 2 + at % 6, treatment)
            make.image(well, missing=at == 8)
            wells.append(well.id)
            shift = np.array([9, 0, 6, 0]) if treatment is strong else 0
            values.append(random.normal(size=4) + shift)
    numbers = {"well_id": wells, "n_cells": [20] * len(wells), "n_images": [1] * len(wells)}
    features = dict(zip(COLUMNS, np.array(values).T.tolist(), strict=True))
    path = folder / "profiles.parquet"
    pq.write_table(pa.table(numbers | features), path)
    run = make.run(Stage.PROFILE, result={"feature_set": "theirs", "gone": {}, "notes": []})
    stored = workspace.artifacts.write(ArtifactKind.PROFILES, path.read_bytes(), ".parquet")
    with workspace.database.begin() as session:
        keep_files(session, [stored], run.id)


def test_the_page_says_what_was_found(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellstore.report.hits_figures.FEWEST_WELLS", 100)  # UMAP takes seconds
    profiled(sqlite_workspace, tmp_path)
    found = hits(sqlite_workspace, HitsParams(permutations=300, q=0.2))
    path = tmp_path / "hits.html"
    write_hits_page(sqlite_workspace, found.run_id, path)
    source = path.read_text(encoding="utf-8")
    assert found.answer in source
    assert "nuclei larger" in source
    assert "principal components" in source
    assert "no UMAP" in source
    assert "&lt;script&gt;alert(1)" in source
    assert "<script" not in source
    assert "default-src 'none'" in source
    assert "/images" in source  # the folder of the images is gone: said in their place
    links = set(re.findall(r'href="#([^"]+)"', source))
    assert links <= set(re.findall(r'id="([^"]+)"', source))
    assert {"t1", "ranked", "plates"} <= links
    labels = re.findall(r"<svg[^>]*>", source)
    assert labels
    assert all("aria-label=" in label for label in labels)


def test_the_explorer_has_the_dose_curves_of_a_run(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from cellstore.explore.server import make_app

    profiled(sqlite_workspace, tmp_path)
    run = hits(sqlite_workspace, HitsParams(permutations=300, q=0.2)).run_id
    app = make_app(sqlite_workspace)
    with TestClient(app) as client:
        assert f'data-part="/run/{run}/doses"' in client.get(f"/run/{run}").text
        part = client.get(f"/run/{run}/doses").text
    app.state.explorer.reader.close()
    assert re.findall("<h3>(.*)</h3>", part) == ["taxol"]
    assert part.count("<svg") == part.count("<figure>") > 0
    assert "effect, SD: " in part
    assert "cells, of the controls: " in part


def test_numbers_are_brief() -> None:
    assert [q_text(x) for x in (None, 1e-5, 0.0012, 0.2)] == [
        "\u2013",
        "< 0.0001",
        "0.0012",
        "0.20",
    ]
    assert [sd_text(x) for x in (None, -1.26, 14.2)] == ["\u2013", "\u22121.3", "+14"]
