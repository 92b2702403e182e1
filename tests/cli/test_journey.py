"""From images to an audit, as a person types it. Cellpose is replaced: see threshold.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("skimage")

from threshold import use_threshold

from cellstore.io.image_files import encode_tiff

SEEN = """
    SELECT tested.image_id FROM split_members tested
    JOIN images i ON i.id = tested.image_id
    JOIN images sister ON sister.well_id = i.well_id
    JOIN split_members learned ON learned.image_id = sister.id AND learned.subset = 'train'
    WHERE tested.subset = 'test' ORDER BY 1 LIMIT 1
"""  # a test image of a well that was in training

pytestmark = pytest.mark.heavy


def draw_cells(folder: Path) -> None:
    """Overwrite the noise of the screen by squares, larger for later wells."""
    for path in sorted(folder.iterdir()):
        column = int(path.name[4:6])
        pixels = np.zeros((64, 64), np.uint16)
        for row in range(4, 60, 16):
            for col in range(4, 60, 16):
                pixels[row : row + 4 + column, col : col + 5] = 500 + 10 * column
        path.write_bytes(encode_tiff(pixels))


@pytest.fixture
def model(tmp_path, monkeypatch, screen) -> str:
    draw_cells(screen.parent / "images")
    return use_threshold(monkeypatch, tmp_path)[0]


def test_a_screen_from_images_to_an_audit(cellstore, model, store, tmp_path):
    at = ("--store", store)
    said = cellstore("segment", "--model", model, *at)
    assert "images segmented  12" in said.out
    assert "cells found       192" in said.out
    again = cellstore("segment", "--model", model, *at)
    assert "Nothing to do: 12 images segmented already" in again.out
    assert cellstore("measure", *at, "--json").json["cells"] == 192
    assert "Nothing to do" in cellstore("measure", *at).out
    areas = "SELECT avg(area) AS area FROM features JOIN cells c ON c.id = cell_id"
    assert cellstore("sql", areas, "--json", *at).json[0]["area"] == pytest.approx(37.5)

    how = ("--protocol", "published", "--test-size", 0.5)
    published = ("split", "create", "as-published", *how)
    made = cellstore(*published, *at)
    assert "Careful: some wells are in training and in test" in made.err
    assert "there already" in cellstore(*published, *at).err
    assert cellstore("split", "show", *at, "--json").json["wells_in_both_subsets"] > 0
    assert "well" in cellstore("split", "check", "as-published", *at, code=1).out

    small = ("--crop-size", 16, "--epochs", 2, "--batch-size", 32, "--branches", "mask,tabular")
    small = (*small, "--backbone", "shufflenet_v2_x0_5")
    trained = cellstore("train", *small, *at)
    assert "val. loss" in trained.out
    assert "Nothing to do" in cellstore("train", *small, *at).out
    labelled = cellstore("predict", *at)
    assert "cells labelled" in labelled.out

    page = tmp_path / "report.html"
    shown = cellstore("report", "--html", page, *at).out
    assert "image" in shown
    assert str(page) in shown
    assert "<html" in page.read_text(encoding="utf-8")
    assert cellstore("report", "--json", *at).json["leaks"] is True

    (seen,) = cellstore("sql", SEEN, "--json", *at).json
    image = seen["image_id"]
    told = cellstore("audit", "image", image, *at).out
    assert "well in training  yes" in told
    assert "votes" in told
    assert cellstore("audit", "image", image, "--json", *at).json["labellings"][0]["n_cells"] == 16
    assert "perimeter" in cellstore("audit", "cell", 1, *at).out
    assert "predict" in cellstore("audit", "run", *at).out
    assert cellstore("verify", *at, "--json").json["ok"] is True
    status = cellstore("status", *at, "--json").json
    assert (status["segmented"], status["measured"], status["splits"]) == (12, 12, 1)
    assert status["predictions"] > 0


def test_an_image_that_fails_fails_alone(cellstore, model, store, screen):
    broken = screen.parent / "images" / "r01c02f01p01-ch1sk1fk1fl1.tiff"
    broken.write_bytes(broken.read_bytes()[:-40])
    images = screen.parent / "images"
    cellstore("ingest", screen, "--images", images, "--store", store, code=None)
    said = cellstore("segment", "--model", model, "--store", store, code=1)
    assert "images segmented  11" in said.out
    assert "failed P1/r01c02f01" in said.out
    assert "the others are done" in said.err
    assert "r01c02f01" in cellstore("jobs", "--failed", "--store", store).out
    again = cellstore("segment", "--model", model, "--store", store, code=1)
    assert "11 images segmented already" in again.out
    assert "1 failed before" in again.out
    opened = cellstore("retry", "--store", store).out
    assert "1 job is open again" in opened
    machine = cellstore("segment", "--model", model, "--json", "--store", store, code=1)
    assert json.loads(machine.out)["failures"][0][0] == "P1/r01c02f01"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("segment", "--model", "cyto9"), "cyto"),
        (("segment", "--model", "no/such/file.pt"), "no/such/file.pt"),
        (("segment", "--plate", "P9"), "P1"),
        (("segment", "--flow-threshold", "nan"), "a number, not nan"),
        (("measure",), "cellstore segment"),
        (("split", "show", "mine"), "split"),
        (("split", "create", "x", "--plate", "P9"), "P1"),
        (("train",), "split create"),
        (("predict", "--run", "99"), "99"),
        (("predict", "--run", "first"), "number"),
        (("report", "--run", "99"), "99"),
        (("audit", "image", "r99c99f99"), "r99c99f99"),
        (("audit", "cell", "99"), "99"),
        (("audit", "run", "99"), "99"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, tuple) else "",
)
def test_a_wrong_word_is_one_sentence_with_what_to_do(cellstore, store, words, says):
    said = cellstore(*words, "--store", store, code=2)
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert says in said.err
