"""segment --preview and finetune as a person types them. Cellpose is replaced: see threshold.py."""

from __future__ import annotations

import pytest
from threshold import use_threshold

from cellstore.stages import finetune as stage
from cellstore.stages.finetune import FinetuneResult


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    return use_threshold(monkeypatch, tmp_path)[0]


def test_a_preview_says_what_it_found_and_how_to_go_on(cellstore, store, model, tmp_path):
    said = cellstore("--store", store, "segment", "--model", model, "--preview", "3")
    lines = said.out.splitlines()
    assert lines[0].split() == ["image", "cells", "diameter", "seconds"]
    assert [line.split()[0] for line in lines[2:5]] == [
        "P1/r01c02f01",
        "P1/r01c04f01",
        "P1/r01c06f01",
    ]
    assert "Look at the pictures in cellstore-preview." in said.out
    assert "without --preview for 12 images." in said.out
    assert all(len(line) <= 80 for line in lines)
    assert len(list((tmp_path / "cellstore-preview").iterdir())) == 3
    assert "segmented   0" in cellstore("--store", store, "status").out


def test_a_preview_for_programs(cellstore, store, model, tmp_path):
    options = ("--preview", "1", "--preview-dir", tmp_path / "there", "--json")
    found = cellstore("--store", store, "segment", "--model", model, *options).json
    assert found["available"] == 12
    assert found["images"][0]["file"] == str(tmp_path / "there" / "P1_r01c04f01.png")


def test_a_preview_with_a_bad_image_ends_with_1(cellstore, store, model, screen):
    for path in (screen.parent / "images").iterdir():
        path.unlink()
    at = ("--store", store, "segment", "--model", model, "--preview", "2")
    said = cellstore(*at, code=1)
    reason = " ".join(said.out.split("failed ")[1].split())
    assert reason.startswith("P1/r01c02f02, P1/r01c05f02: Files are gone from ")


def result_of(**change):
    values = {
        "run_id": 12,
        "recipe_id": 3,
        "model": "run:12",
        "already_done": False,
        "start": "cellstore-nuclei",
        "images": 8,
        "cells": 420,
        "held_out": 2,
        "before": 0.71,
        "after": 0.83,
        "diameter": 31.5,
        "losses": (0.3, 0.2),
        "refused": ({"file": "x.tif", "reason": "no such image: nothing is named like it"},),
    }
    return FinetuneResult(**{**values, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["AP after", "0.830", "--model run:12 --diameter 31.5", "Not used: x.tif"]),
        ({"after": 0.6}, ["The new network is worse"]),
        ({"before": None, "after": None, "held_out": 0}, ["not known", "nobody knows"]),
        ({"diameter": None}, ["--diameter PIXELS"]),
        ({"already_done": True}, ["Nothing to do: run 12"]),
    ],
)
def test_finetune_says_whether_it_was_worth_it(cellstore, store, monkeypatch, change, words):
    seen = {}

    def finetune(workspace, masks, params, **options):
        seen.update(masks=masks, params=params)
        return result_of(**change)

    monkeypatch.setattr(stage, "finetune", finetune)
    said = cellstore(
        *("--store", store, "finetune", "--masks", "a", "--masks", "b.tif"),
        *("--channels", "DNA", "--epochs", "3"),
    )
    assert [str(path) for path in seen["masks"]] == ["a", "b.tif"]
    assert (seen["params"].channels, seen["params"].epochs) == (("DNA",), 3)
    for word in words:
        assert word in said.out + said.err


def test_finetune_without_masks_says_so(cellstore, store):
    said = cellstore("--store", store, "finetune", "--masks", "nowhere", code=2)
    assert "nowhere" in said.err


def test_a_folder_that_moved_and_images_without_the_channel(cellstore, store, model, screen):
    at = ("--store", store)
    images = screen.parent / "images"
    other = screen.parent / "rna"
    other.mkdir()
    for site in (1, 2):
        pixels = (images / f"r01c01f0{site}p01-ch1sk1fk1fl1.tiff").read_bytes()
        (other / f"P2_A01_{site}_RNA.tif").write_bytes(pixels)
    names = ("--pattern", r"(?P<plate>P2)_(?P<well>A01)_(?P<site>\d)_(?P<channel>RNA)")
    said = cellstore("ingest", other, *names, *at)
    assert said.err.splitlines()[-1] == f"Next: cellstore --store {store} segment"

    moved = screen.parent / "moved"
    images.rename(moved)
    status = cellstore("status", *at)
    assert f"12 files are gone from {images}." in status.err
    assert status.err.splitlines()[-1].startswith(f"Next: cellstore --store {store} relocate ")
    asked = cellstore("status", *at, "--json").json
    assert asked["next"][0].startswith("cellstore relocate ")
    assert asked["untreated_wells"] == 1
    assert asked["gone"][0]["files"] == 12
    words = ("segment", "--channels", "DNA", "--model", model, *at)
    failed = cellstore(*words, code=1)
    assert failed.err.count("gone from") == 1
    assert "12 of 12 images could not be segmented." in failed.err
    assert "gone from" not in failed.out
    assert "run the same command again" in failed.err
    assert "cellstore retry" not in failed.err
    assert "2 of 14 images could not be segmented: they lack a channel." in failed.err
    cellstore("relocate", images, moved, "--dry-run", *at)
    said = cellstore("relocate", images, moved, *at)
    assert f"12 files are now read from {moved}, no longer from {images}" in said.out

    said = cellstore(*words, code=1)
    assert "images segmented  12" in said.out
    assert "left out: P2/r01c01f01, P2/r01c01f02: no channel DNA" in said.out
    found = cellstore(*words, "--plate", "P1", "--json").json
    assert (found["selected"], found["lacking"]) == (12, [])
    none = cellstore(*words, "--image", "P2/A01", code=2)
    assert "Unknown channel of the selected images 'DNA'. Known: RNA." in none.err
    said = cellstore("measure", "--plate", "P1", *at)
    assert f"cellstore --store {store} split create by-well" in said.err.splitlines()[-1]
    history = cellstore("audit", "image", "P1/A01/1", *at, "--json").json["corrections"]
    assert [(row["of"], row["new"]) for row in history] == [("folder", {"uri": str(moved)})]
