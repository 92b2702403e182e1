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
    assert "Look at cellstore-preview/contact-sheet.png" in said.out
    assert "without --preview for 12 images." in said.out
    assert all(len(line) <= 80 for line in lines)
    assert len(list((tmp_path / "cellstore-preview").iterdir())) == 4
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
    assert "Look at" not in said.out


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
        "size_error": 0.12,
        "losses": (0.3, 0.2),
        "refused": ({"file": "x.tif", "reason": "no such image: nothing is named like it"},),
    }
    return FinetuneResult(**{**values, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["AP after", "0.830", "--model run:12 --preview 6", "Not used: x.tif"]),
        ({"after": 0.6}, ["The new network is worse"]),
        ({"before": None, "after": None, "held_out": 0}, ["not known", "nobody knows"]),
        ({"size_error": None}, ["--diameter PIXELS"]),
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
