"""The page of a lineage: one file, no script, whatever things are called."""

from __future__ import annotations

import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories import sha
from screens import small_screen

from cellstore.jobs.lookup import find_well
from cellstore.jobs.workspace import Workspace
from cellstore.models import ImageFile, Well
from cellstore.report.audit import audit
from cellstore.report.drawing import plain
from cellstore.report.lineage_page import (
    BOX,
    Lineage,
    draw_lineage,
    lay_out,
    lineage_of,
    write_lineage,
)

audit_image = partial(audit, kind="image")
audit_well = partial(audit, kind="well")
audit_cell = partial(audit, kind="cell")
audit_run = partial(audit, kind="run")
audit_artifact = partial(audit, kind="artifact")

pytest.importorskip("matplotlib")
pytest.importorskip("networkx")

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=cmd()|'/c calc'!A1",
    "{{ 7*7 }}",
    "$x_2$",
    "药 \u202e é",
)


class Page(HTMLParser):
    """Gathers the elements, what they load, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_audit_has_a_page_that_needs_nothing_else(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = sqlite_workspace
    screen = small_screen(workspace)
    audits = {
        "image": audit_image(workspace, "BR1/B01/1"),
        "well": audit_well(workspace, "BR1/B01"),
        "cell": audit_cell(workspace, "3"),
        "predict": audit_run(workspace, "latest predict"),
        "train": audit_run(workspace, "latest train"),
        "file": audit_artifact(workspace, sha("model")),
    }
    for name, found in audits.items():
        path = write_lineage(workspace, found, tmp_path / f"{name}.html")
        page = Page(path.read_text())
        assert "svg" in page.tags, name
        assert not page.tags & {"script", "link", "iframe", "object", "embed"}, name
        assert all(value.startswith("#") for value in page.loads), name
        assert page.handlers == []
    text = Page((tmp_path / "image.html").read_text()).text
    for shown in (f"run {screen.predict_run.id}", "taxol", "a07987890c", "grouped"):
        assert shown in text


def test_names_are_text_and_nothing_else(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    make = small_screen(sqlite_workspace).factory
    for name in HOSTILE:
        with sqlite_workspace.database.read() as session:
            well = session.get_one(Well, find_well(session, "B01"))
        make.well_change(well, make.treatment(name, name), file=name)
    found = audit_image(sqlite_workspace, "BR1/B01/1")
    page = Page(write_lineage(sqlite_workspace, found, tmp_path / "page.html").read_text())
    assert not page.tags & {"script", "img"}
    assert page.handlers == []
    for name in HOSTILE:
        assert plain(name) in page.text


def test_what_led_to_a_label(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    graph = lineage_of(audit_image(sqlite_workspace, "BR1/B01/1"))
    above: set[str] = set()
    level = {f"label {screen.predict_run.id}"}
    while level:
        level = {source for source, target in graph.arrows if target in level}
        above |= level
    kinds = {graph.boxes[key][0] for key in above}
    assert kinds == {
        *("file", "image", "segmentation", "weights", "predict", "checkpoint", "train"),
        *("split", "treatment"),
    }


def test_boxes_stand_below_what_led_to_them_and_never_on_each_other() -> None:
    graph = Lineage("d")
    # An arrow from a to e goes past two layers.
    above = {"b": "a", "d": "bc", "e": "da", "g": "f"}
    for key in "abcdefg":
        graph.add(key, "file", key, after=above.get(key, ""))
    positions, paths, size = lay_out(graph)
    for source, target in graph.arrows:
        assert positions[source][1] + BOX[1] < positions[target][1]
    boxes = [positions[key] for key in graph.boxes]
    for i, (x, y) in enumerate(boxes):
        assert BOX[0] / 2 <= x <= size[0] - BOX[0] / 2
        assert all(abs(x - u) > BOX[0] or abs(y - v) > BOX[1] for u, v in boxes[i + 1 :])
    assert max(map(len, paths)) == 4
    assert not re.search(r"\bnan\b", str(positions))


def test_of_many_files_one_box_stands(sqlite_workspace: Workspace) -> None:
    """Its boxes lead on all the same: no link is left of a box that is gone."""
    screen = small_screen(sqlite_workspace)
    with sqlite_workspace.database.begin() as session:
        for number in range(6):
            name, digest = f"more{number}.tiff", sha(f"more{number}")
            values = {"position": 9 + number, "name": name, "sha256": digest}
            image = screen.images["B01"].id
            session.add(ImageFile(image_id=image, channel=f"C{number}", **values))
    graph = lineage_of(audit_image(sqlite_workspace, "BR1/B01/1"), lambda *names: f"/{names[0]}")
    assert "files" in graph.boxes
    assert set(graph.addresses) <= set(graph.boxes)
    assert graph.addresses["image"] == "/field"
    assert draw_lineage(graph).count("<a ") == len(graph.addresses)
