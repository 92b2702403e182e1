"""Masks corrected in napari: stored beside the others, and ready to learn from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
from test_ingest_masks import MASKS, Bench, bench

from cellstore.config import FinetuneParams
from cellstore.errors import MissingExtraError, UnknownNameError, UserInputError
from cellstore.stages.correct_masks import correct_masks
from cellstore.stages.finetune import find_examples
from cellstore.store import Store

pytestmark = pytest.mark.one_database

__all__ = ["bench"]


class Window:
    """What a window of napari is to us: it keeps what it is shown, and a person works in it."""

    def __init__(self, title: str) -> None:
        self.title, self.images, self.keys = title, dict[str, Any](), dict[str, Any]()
        Window.last = self

    def add_image(self, data: Any, *, name: str, **more: Any) -> None:
        self.images[name] = (data, more)

    def add_labels(self, data: Any, *, name: str, **more: Any) -> Any:
        self.labels = type("Layer", (), {"data": data, "scale": more["scale"]})
        return self.labels

    def bind_key(self, key: str, act: Callable[..., None], *, overwrite: bool) -> None:
        self.keys[key] = act

    def paint(self, label: int, rows: slice) -> None:
        self.labels.data[rows, :2] = label

    def save(self) -> None:
        self.keys["Shift-S"](self)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Say what a person does in the next window."""
    napari: Any = ModuleType("napari")
    napari.__spec__ = ModuleSpec("napari", None)
    napari.Viewer = Window
    monkeypatch.setitem(sys.modules, "napari", napari)

    def will(do: Callable[[Any], None]) -> None:
        napari.run = lambda: do(Window.last)

    return will


def test_corrected_masks_are_stored_beside_the_others_and_teach(
    bench: Bench, tmp_path: Path, work: Any
) -> None:
    image = bench.image("r01c01f01p01-ch1.tif", pixel_size=0.5)
    bench.image("r01c01f01p01-ch1.tif", "P2")  # of the same name on another plate
    bench.save("P1/r01c01f01p01-ch1_masks.tif")
    bench.ingest(name="first")
    store, folder = Store(bench.workspace), tmp_path / "corrected"
    before = store.sql("SELECT id, recipe_id, n_cells FROM segmentations").to_pylist()

    def paint_and_save(window: Window) -> None:
        (pixels, shown) = window.images["DNA"]
        assert np.array_equal(pixels, tifffile.imread(bench.images / "P1/r01c01f01p01-ch1.tif"))
        assert (shown["scale"], window.labels.scale) == ((0.5, 0.5), (0.5, 0.5))
        assert shown["contrast_limits"][0] < shown["contrast_limits"][1]
        assert np.array_equal(window.labels.data, MASKS)
        window.paint(77, slice(0, 2))
        window.save()

    work(paint_and_save)
    done = store.napari(str(image.id), folder=folder)
    assert (done.saved, done.name) == (1, "corrected")
    assert "--segmentation" in done.notes[-1]
    kept = tifffile.imread(folder / "P1" / "A01_1" / "r01c01f01p01-ch1_masks.tif")
    assert done.file is not None
    assert Path(done.file).is_relative_to(folder)
    wanted = MASKS.copy()
    wanted[0:2, :2] = 77
    assert np.array_equal(kept, wanted)
    rows = store.sql("SELECT id, recipe_id, n_cells FROM segmentations ORDER BY id").to_pylist()
    assert rows[:1] == before  # as it was
    assert rows[1]["recipe_id"] == done.segmentation != before[0]["recipe_id"]
    assert rows[1]["n_cells"] == done.cells == len(np.unique(wanted)) - 1

    examples, refused = find_examples(bench.workspace, [folder], FinetuneParams(), None)
    assert ([example.image_id for example in examples], refused) == ([image.id], [])

    def paint_and_close(window: Window) -> None:
        assert np.array_equal(window.labels.data, wanted)  # the newest are opened
        window.paint(78, slice(2, 4))

    work(paint_and_close)
    name = "P1/A01/1"
    again = correct_masks(bench.workspace, name, folder=folder)
    assert (again.saved, again.name) == (1, "corrected 2")
    work(lambda window: None)
    assert correct_masks(bench.workspace, name, folder=folder).saved == 0

    first = str(before[0]["recipe_id"])
    work(lambda window: window.paint(0, slice(0, 1)) or window.save())
    assert store.napari(name, segmentation=first, folder=folder).name == "corrected 3"


def test_what_cannot_be_opened_is_said(
    bench: Bench, tmp_path: Path, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bench.image("a.tif")
    work(lambda window: window.paint(1, slice(0, 2)))
    where = {"folder": tmp_path / "out"}
    with pytest.raises(UnknownNameError):
        correct_masks(bench.workspace, "P1/Z09/1", **where)
    with pytest.raises(UnknownNameError, match="segment recipe"):
        correct_masks(bench.workspace, str(image.id), segmentation="99", **where)
    with pytest.raises(UserInputError, match="part of the store"):
        correct_masks(bench.workspace, str(image.id), folder=bench.workspace.artifacts.root)
    assert correct_masks(bench.workspace, str(image.id), **where).cells == 1  # drawn from nothing
    monkeypatch.delitem(sys.modules, "napari")
    monkeypatch.setattr("cellstore.settings.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="cellstore\\[napari\\]"):
        correct_masks(bench.workspace, str(image.id), **where)
