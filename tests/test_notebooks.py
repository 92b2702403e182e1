"""What a notebook shows: tables of results, pictures of cells and fields, and the tutorial."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from screens import SmallScreen

from cellstore import Selection, SplitParams, Store, demo
from cellstore.analysis.rendering import CONTROL, DEMO_TREATMENTS, PlateDesign
from cellstore.config import IngestParams
from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.notebooks import SHOWN_ROWS, Rows, Shown, html_of

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert(1)</script>\u202e&"


class Tables(HTMLParser):
    """The rows of all tables, and that every element is closed and none is a script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img")
        assert not [name for name, _ in attrs if name.startswith("on")]
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@dataclass(frozen=True)
class Line(Shown):
    run_id: int
    cells: int
    name: str | None = None
    share: float = 0.5


@dataclass(frozen=True)
class OfLines(Shown):
    run_id: int
    cells: int
    ok: bool
    at: datetime
    counts: dict[str, int]
    nothing: tuple[str, ...]
    lines: tuple[Line, ...]
    pairs: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


def test_a_result_is_shown_as_tables() -> None:
    lines = tuple(Line(1000 + number, 2000) for number in range(SHOWN_ROWS + 5))
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    found = OfLines(1234, 1234, True, at, {"train": 1500}, (), lines, ((HOSTILE, 1),), (HOSTILE,))
    html = html_of(found)
    rows = Tables(html).rows
    assert rows[:5] == [
        ["run id", "1234"],  # a number of something, and a count
        ["cells", "1,234"],
        ["ok", "yes"],
        ["at", "2026-01-02 03:04:05"],
        ["counts", "train 1,500"],
    ]
    assert rows[5] == ["run id", "cells", "share"]  # no column without a value
    assert rows[6] == ["1000", "2,000", "0.5"]
    assert len(rows) == 6 + SHOWN_ROWS + 1
    assert "and 5 more" in html
    assert rows[-1] == ["<script>alert(1)</script>\\u202e&", "1"]
    assert "Of lines" in html
    assert html.count("<details open>") == 1
    assert html.count("<script>") == 0
    assert "nothing" not in html


def test_results_of_a_store_are_shown(read_screen: SmallScreen) -> None:
    store, run = Store(read_screen.workspace), read_screen.predict_run.id
    assert repr(store) == f"Store({str(store.root)!r})"
    rows = Tables(store._repr_html_()).rows
    assert ["images", "6"] in rows
    assert rows[-1][0] == "next"
    assert rows[-1][1].startswith("cellstore ")
    report = store.report(run)
    shown = Tables(report._repr_html_()).rows
    best = report.score("image", "hard")
    assert ["images", f"{report.images}"] in shown
    assert any(row[:2] == ["image", "hard"] and f"{best.accuracy:.4g}" in row for row in shown)
    for result in (
        store.status(),
        store.votes(run),
        store.audit(run, "run"),
        store.audit("BR1/B01/1"),
        store.show_split(),
        store.check_split(),
        store.cells(features=False),
        store.log(),
        store.jobs(),
        store.repro(run),
        store.questions()[0],
        store.schema()[0],
    ):
        assert Tables(result._repr_html_()).rows, type(result)  # type: ignore[attr-defined]
    splits = store.list_splits()
    assert isinstance(splits, Rows)
    assert Tables(splits._repr_html_()).rows[1][0] == read_screen.split.name
    frame = pd.DataFrame(splits)
    assert list(frame["name"]) == [read_screen.split.name]
    assert list(pd.DataFrame(report.scores).columns[:3]) == ["level", "vote", "n"]


def test_all_results_of_a_store_are_shown() -> None:
    source = (ROOT / "cellstore" / "store.py").read_text()
    loaded = re.findall(r"^    from (\.\S+) import (.+)$", source.partition("class Store")[0], re.M)
    found = 0
    for module, names in loaded:
        for name in names.split(", "):
            kind = getattr(import_module(module, "cellstore"), name)
            if re.search(rf"\) -> (\w+\[)?{name}\b", source) and is_dataclass(kind):
                assert name in ("Questions", "CellDataset") or hasattr(kind, "_repr_html_"), name
                found += 1
    assert found > 30


SCREEN = PlateDesign(
    plates=("P1",),
    treatments=DEMO_TREATMENTS[:3],
    control_wells=3,
    treated_wells=3,
    sites=1,
    size=112,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small store of rendered cells where the demo's would be."""
    made = tmp_path_factory.mktemp("notebook")
    plates = demo.render_plates(made / "cellstore-demo", design=SCREEN)
    with Store.create(plates.store) as store:
        store.ingest(plates.metadata, IngestParams(images=plates.images))
        store.ingest(plates.truth, IngestParams(kind="masks"))
        store.measure()
        store.create_split("by-well", SplitParams(test_size=0.34, validation_size=0.33))
    return made


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    from matplotlib import pyplot

    matplotlib.use("Agg")
    with Store.open(folder / "cellstore-demo" / "store") as opened:
        yield opened
    pyplot.close("all")


def texts(axes: Any) -> list[str]:
    return ["" if not one.texts else one.texts[0].get_text() for one in axes.ravel()]


def pixels(axes: Any) -> list[bytes]:
    return [image.get_array().tobytes() for one in axes.ravel() for image in one.images]


def test_cells_of_each_treatment_stand_beside_controls(store: Store) -> None:
    axes = store.show(n=3)
    assert axes.shape == (3, 3 + 2)
    names = [text.get_text() for text in axes[0, 0].figure.texts[:3]]
    assert names == sorted(item.pert_iname for item in SCREEN.treatments)
    ids = [int(re.match(r"cell (\d+)\narea [\d,]+$", text)[1]) for text in texts(axes) if text]  # type: ignore[index]
    assert len(ids) == 3 * 3 + 2 * 2  # the controls have none beside them
    table = store.sql("SELECT cell_id, treatment, well, control, area FROM cell_table").to_pandas()
    cells = table.set_index("cell_id").loc[ids]
    assert set(cells["treatment"].iloc[:3]) == {names[0]} == {CONTROL.pert_iname}
    beside = [int(text.split()[1]) for line in axes[:, 3:] for text in texts(line) if text]
    assert set(table.set_index("cell_id").loc[beside, "control"]) == {"negative"}
    assert cells.groupby("treatment")["well"].nunique().min() == 3  # one of each well first
    assert pixels(store.show(n=3)) == pixels(axes)
    assert pixels(store.show(n=3, seed=1)) != pixels(axes)
    area = f"area {cells['area'].iloc[0]:.3g}"
    assert area in texts(axes)[0]
    assert len(axes[0, 0].collections) == 1  # the outline
    assert not store.show(n=1, outlines=False)[0, 0].collections


def test_a_picture_is_the_cell_in_the_middle_of_its_image(store: Store) -> None:
    from cellstore.config import ImageInput
    from cellstore.jobs.planes import read_image
    from cellstore.report.drawing import grey_limits

    cell = store.sql(
        "SELECT c.*, s.image_id FROM cells c JOIN segmentations s ON s.id = c.segmentation_id "
        "WHERE min_row > 12 AND min_col > 12 AND max_row < 100 AND max_col < 100 ORDER BY c.id"
    ).to_pylist()[0]
    axes = store.show(cell["id"], by=None, channels=["Mito"])
    assert axes.shape == (1, 1)
    shown = np.asarray(axes[0, 0].images[0].get_array())
    side = len(shown)
    assert side >= max(cell["max_row"] - cell["min_row"], cell["max_col"] - cell["min_col"])
    plane = read_image(store.workspace.database, cell["image_id"], ImageInput(("Mito",)))
    low, high = grey_limits(plane)
    top = (cell["min_row"] + cell["max_row"] - side) // 2
    left = (cell["min_col"] + cell["max_col"] - side) // 2
    window = plane[top : top + side, left : left + side]
    grey = np.clip((window - low) / (high - low), 0, 1)
    np.testing.assert_allclose(shown, np.repeat(grey[..., None], 3, -1), atol=1e-6)


def test_what_is_shown_can_be_said_in_many_ways(store: Store) -> None:
    test = store.cells("by-well", "test")
    frame = test.to_pandas()
    frame["predicted"] = np.where(frame.index % 2, "b", "a")
    frame["probability"] = 0.25
    axes = store.show(frame, by="predicted", n=2, numbers=["probability", "solidity"])
    assert axes.shape == (2, 2)
    assert all("probability 0.25\nsolidity" in text for text in texts(axes))
    few = frame["cell_id"][:3]
    assert len([t for t in texts(store.show(few, by=None)) if t]) == 3
    assert len([t for t in texts(store.show(list(few), by=None)) if t]) == 3
    assert store.show(test, n=1).shape == (3, 3)
    by_label = store.show(test, by="label", n=1)
    assert by_label.shape == (frame["label"].nunique(), 1)
    assert store.show(store.sql("SELECT 1 AS cell_id"), by=None).shape == (1, 1)
    large = store.show("area > 300", by="well", n=1, channels=["Mito", "RNA"])
    assert all(float(t.split()[-1].replace(",", "")) > 300 for t in texts(large) if t)
    assert np.ptp(np.asarray(large[0, 0].images[0].get_array()), axis=-1).max() > 0  # colours
    fields = store.show(Selection(limit=3), by=None)
    assert fields.shape == (1, 3)
    assert texts(fields)[0].startswith("P1/")
    assert fields[0, 0].images[0].get_array().shape == (112, 112, 3)
    assert store.show("P1/B02/1", by="well").shape == (1, 1)


def test_what_cannot_be_shown_is_said(store: Store, folder: Path) -> None:
    for what, more, error, sentence in (
        ("area > 1e9", {}, UserInputError, "nothing to show"),
        ("aera > 3", {}, UserInputError, "aera"),
        (10**9, {}, UserInputError, "nothing to show"),
        ("P9/Z99/1", {}, UnknownNameError, "P9"),
        (pd.DataFrame({"cell": [1]}), {}, UserInputError, "needs a column cell_id"),
        ([1.5, None], {}, UserInputError, "Give ids of cells"),
        (pd.DataFrame({"cell_id": [1, None]}), {}, UserInputError, "Column cell_id needs a number"),
        (None, {"by": "treatmnt"}, UnknownNameError, "Did you mean treatment"),
        (None, {"numbers": ["aera"]}, UnknownNameError, "Did you mean area"),
        (None, {"channels": ["DNAA"]}, UnknownNameError, "channel"),
        (None, {"n": 0}, UserInputError, "n must be at least 1"),
        (None, {"n": "all"}, UserInputError, "n must be a whole number, not 'all'"),
    ):
        with pytest.raises(error, match=sentence):
            store.show(what, **more)  # type: ignore[arg-type]
    images = folder / "cellstore-demo" / "images"
    images.rename(images.with_name("gone"))
    try:
        with pytest.raises(ImageError, match="images"):
            store.show(n=1)
    finally:
        images.with_name("gone").rename(images)


def test_the_tutorial_notebook_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    path = ROOT / "docs" / "tutorial.ipynb"
    assert path.stat().st_size < 300_000
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|work|home|root)/", text)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), names)
            if hasattr(value, "_repr_html_"):
                assert value._repr_html_()
    names["store"].close()
