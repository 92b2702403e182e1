"""What the tests of the command line share."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_cells import add_foreign_cells, by_id
from typer.testing import CliRunner

from cellstore.config import IngestParams
from cellstore.io.image_files import encode_tiff
from cellstore.store import Store
from cellstore_cli.app import app


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cellstore = Callable[..., Said]


@pytest.fixture
def cellstore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cellstore:
    """Runs a command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int | None = 0, stdin: str | None = None) -> Said:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        said = Said(result.exit_code, result.stdout, result.stderr)
        assert code is None or said.code == code, said
        assert "Traceback" not in said.err
        return said

    return run


def write_screen(folder: Path, treatments: Sequence[str], sites: int = 2) -> Path:
    """Write images and a LoadData table: a row of wells, one treatment each."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for column, treatment in enumerate(treatments, start=1):
        for site in range(1, sites + 1):
            name = f"r01c{column:02d}f{site:02d}p01-ch1sk1fk1fl1.tiff"
            pixels = random.integers(0, 4000, (32, 32)).astype(np.uint16)
            (folder / "images" / name).write_bytes(encode_tiff(pixels))
            rows.append((name, "images", "P1", f"A{column:02d}", site, treatment, "gene"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("FileName_OrigDNA", "PathName_OrigDNA", "Metadata_Plate", "Metadata_Well"),
                *("Metadata_Site", "Metadata_pert_iname", "Metadata_target"),
            ]
        )
        writer.writerows(rows)
    return folder / "metadata.csv"


WELLS = ["DMSO", "DMSO", "aspirin", "aspirin", "taxol", "taxol"]


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    """The table of a small screen: 6 wells, 3 treatments, 12 images, which a test may change."""
    return write_screen(tmp_path / "screen", WELLS)


@pytest.fixture(scope="session")
def _ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a small screen that no test changes."""
    folder = tmp_path_factory.mktemp("shared")
    table = write_screen(folder / "screen", WELLS)
    with Store.create(folder / "store") as made:
        made.ingest(table, IngestParams(images=table.parent / "images"))
    return folder / "store"


@pytest.fixture
def store(
    request: pytest.FixtureRequest, cellstore: Cellstore, tmp_path: Path, _ingested: Path
) -> Path:
    """A store that holds the small screen: that of fixture ``screen`` where a test has it."""
    if "screen" in request.fixturenames:
        screen: Path = request.getfixturevalue("screen")
        cellstore("init", "store")
        cellstore("--store", "store", "ingest", screen, "--images", screen.parent / "images")
    else:
        shutil.copytree(_ingested, tmp_path / "store")
    return Path("store")


@pytest.fixture
def with_set(cellstore, store: Path) -> Path:
    """The small screen with a split and feature set ``cp``: two cells in each image, no masks."""
    add_foreign_cells(store, 2, by_id)
    words = ("--protocol", "published", "--test-size", "0.5", "--store", store)
    cellstore("split", "create", "main", *words)
    return store


@pytest.fixture
def cv(cellstore, tmp_path: Path) -> str:
    """A screen of eight wells of two treatments with 3 cells in each image, in two folds."""
    table = write_screen(tmp_path / "screen", ["DMSO", "taxol"] * 4, sites=1)
    with Store.create(tmp_path / "store") as made:
        made.ingest(table, IngestParams(images=table.parent / "images"))
    add_foreign_cells(Path("store"), 3, by_id)
    cellstore("split", "create", "cv", "--folds", 2, "--validation-size", 0, "--store", "store")
    return "cv"
