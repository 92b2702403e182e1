"""The page of a field: the numbers that are sent, what is said of a cell, and the viewer itself."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from factories import Factory
from sqlalchemy import select
from starlette.testclient import TestClient

from cellstore.enums import Stage
from cellstore.explore import field_views
from cellstore.explore.server import make_app
from cellstore.jobs.planes import channel_files, open_file
from cellstore.jobs.workspace import Workspace
from cellstore.models import Cell, Image, Prediction, Segmentation
from cellstore.query.cells import read_masks

PIXELS = """() => {
  const from = document.querySelector("canvas"), to = document.createElement("canvas");
  [to.width, to.height] = [from.width, from.height];
  const pen = to.getContext("2d");
  pen.drawImage(from, 0, 0);
  const of = pen.getImageData(0, 0, to.width, to.height).data;
  let light = 0, amber = 0;
  for (let at = 0; at < of.length; at += 4) {
    light += of[at] + of[at + 1] + of[at + 2];
    if (of[at] === 255 && of[at + 1] === 196 && of[at + 2] === 0) amber += 1;
  }
  return [light / of.length, amber];
}"""
"""How light the canvas is, and how many of its pixels are of an outline."""


def test_channels_and_masks_are_sent_as_they_are_in_the_files(
    client: TestClient, screen: Workspace
) -> None:
    with screen.database.read() as session:
        files = channel_files(session, [1])[1]
        found = session.scalars(select(Segmentation).where(Segmentation.image_id == 1)).one()
        masks = read_masks(session, screen.artifacts, found)
    assert len(files) == 3
    for at, file in enumerate(files):
        answer = client.get(f"/field/1/channel/{at}.raw")
        plane = open_file(file)
        assert answer.headers["x-pixels"] == "u2 {} {} uint16".format(*plane.shape)
        assert answer.content == plane.astype("<u2").tobytes()
        mark = {"if-none-match": answer.headers["etag"]}
        assert client.get(f"/field/1/channel/{at}.raw", headers=mark).status_code == 304
    answer = client.get(f"/field/1/mask.raw?segmentation={found.id}")
    assert answer.content == masks.astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("u1", "u1"), ("bool", "u1"), (">u2", "u2"), ("u4", "u4"), ("i2", "f4"), ("f8", "f4")],
)
def test_pixels_of_any_kind(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str
) -> None:
    plane = np.arange(6).reshape(2, 3).astype(dtype)
    monkeypatch.setattr(field_views, "open_file", lambda file: plane)
    answer = client.get("/field/1/channel/0.raw")
    assert answer.headers["x-pixels"] == f"{kind} 2 3 {plane.dtype.name}"
    np.testing.assert_array_equal(np.frombuffer(answer.content, f"<{kind}").reshape(2, 3), plane)


def test_a_cell_is_described_by_its_number_or_by_its_object(
    client: TestClient, screen: Workspace
) -> None:
    with screen.database.read() as session:
        cell = session.scalars(select(Cell).join(Prediction).limit(1)).one()
        image, number = cell.segmentation.image, cell.object_number
        well, area = image.well, cell.features[0].area
        choices = [(item.label.value, item.probability) for item in cell.predictions]
        runs = {item.run_id for item in cell.predictions}
        cell_id, segmentation, treatment = cell.id, cell.segmentation_id, well.treatment
        names = [well.plate.barcode, well.name, treatment.name_with_dose]
    page = client.get(f"/field/{image.id}?cell={cell_id}")
    assert f'"id": {cell_id}' in page.text
    panel = client.get(f"/field/{image.id}/cell?cell={cell_id}").text
    same = client.get(f"/field/{image.id}/cell?segmentation={segmentation}&object={number}").text
    assert panel == same
    for words in (*names, f"{area:.4g}", "test", *(f"Run {run}" for run in runs)):
        assert words in panel
    for label, probability in choices:
        assert label in panel
        assert f"{probability:.3f}" in panel
    crop = client.get(html.unescape(re.findall(r'<img src="([^"]+)"', panel)[0]))
    assert crop.headers["content-type"] == "image/jpeg"


def test_two_segmentations_and_the_other_planes_and_times(writable: Workspace) -> None:
    make = Factory(writable)
    with writable.database.read() as session:
        image, found = session.get_one(Image, 1), session.get_one(Segmentation, 1)
        well, n_cells = image.well, found.n_cells
    n_more = n_cells + 2
    other = make.segmentation(image, make.run(Stage.SEGMENT), n_more, mask_artifact_id=1)
    later, deeper = (make.image(well, image.site, **at) for at in ({"time_point": 2}, {"plane": 2}))
    next_site = make.image(well, image.site + 1, missing=True)
    ids, images = (found.id, other.id), (later.id, deeper.id, next_site.id)
    app = make_app(writable)
    with TestClient(app) as client:
        page = client.get(f"/field/1?segmentation={ids[1]}&before={ids[0]}").text
        assert "2 more than before." in page
        assert f"<b>{n_cells} cells</b>" in page
        for number in ids:
            assert f"/field/1/mask.raw?segmentation={number}" in page
        assert client.get("/field/1").text.count("/field/1/mask.raw") == 2  # preload and script
        for words in ("Plane", "Time point", "1 of 2 in this well"):
            assert words in page
        for number in images:
            assert f'href="/field/{number}"' in page
        assert "is missing" in client.get(f"/field/{next_site.id}/thumbnail").text
        assert "is missing" in client.get(f"/field/{next_site.id}/channel/0.raw").text


def test_what_is_not_there_is_a_sentence(client: TestClient, screen: Workspace) -> None:
    with screen.database.read() as session:
        of_two = session.scalars(select(Segmentation).where(Segmentation.image_id == 2)).one()
        elsewhere = session.scalars(
            select(Cell.id).where(Cell.segmentation_id == of_two.id).limit(1)
        ).one()
    for address in (
        "/field/99999", "/field/x", "/field/1?cell=99999", f"/field/1?cell={elsewhere}",
        f"/field/1?segmentation={of_two.id}", "/field/1?before=99999", "/field/1/channel/9.raw",
        "/field/1/channel/-1.raw", "/field/1/channel/%C2%B2.raw",
        "/field/1/mask.raw?segmentation=2",
        f"/field/1/cell?cell={elsewhere}", "/field/1/cell?segmentation=1&object=99999",
        "/field/1/cell",
        "/field/99999/contrast.json", "/field/99999/channel/0.raw",
    ):  # fmt: skip
        answer = client.get(address)
        assert (answer.status_code, address) == (404, address)
        assert "Traceback" not in answer.text
    for address in ("/field/1?cell=x", "/field/1?cell=1e3", "/field/1/mask.raw?segmentation=-1"):
        assert client.get(address).status_code == 400


def test_the_viewer(tab: Any, site: str, screen: Workspace) -> None:
    with screen.database.read() as session:
        image = session.get_one(Image, 1)
        cell = max(image.segmentations[0].cells, key=lambda item: item.object_number)
        at = cell.centroid_row or 0, cell.centroid_col or 0
        cell_id, name = cell.id, image.well.plate.barcode
    tab.set_viewport_size({"width": 900, "height": 540})  # few pixels to draw in software
    tab.goto(f"{site}/field/1")
    tab.wait_for_selector("#view:not([aria-busy])")
    light, amber = tab.evaluate(PIXELS)
    assert light > 5
    assert amber > 500

    def shown() -> Any:
        tab.wait_for_timeout(300)  # a frame, and the address
        return tab.evaluate(PIXELS)

    tab.get_by_label("Outlines", exact=True).uncheck()
    assert shown()[1] == 0
    level = tab.get_by_role("spinbutton", name="White level of").first
    level.fill(str(round(float(level.input_value()) / 3)))
    brighter = shown()[0]
    assert brighter > light * 1.1
    assert "c0=" in tab.url
    assert "outlines=none" in tab.url

    box = tab.locator("canvas").bounding_box()
    side = min(box["width"], box["height"])
    with screen.database.read() as session:
        height = session.get_one(Image, 1).files[0].height or 0
    x = box["x"] + box["width"] / 2 + (at[1] / height - 0.5) * side
    y = box["y"] + box["height"] / 2 + (at[0] / height - 0.5) * side
    tab.mouse.click(x, y)
    tab.wait_for_selector(f"article[data-cell='{cell_id}']")
    shown()
    assert f"cell={cell_id}" in tab.url
    tab.reload()  # the address brings the same view back
    tab.wait_for_selector(f"article[data-cell='{cell_id}']")
    tab.wait_for_selector("#view:not([aria-busy])")
    assert abs(shown()[0] - brighter) < 1
    tab.get_by_role("button", name="Reset").click()
    assert abs(shown()[0] - light) < 1.5  # but for the outlines

    tab.locator("canvas").focus()
    tab.keyboard.press("+")
    assert "z=" in (shown() and tab.url)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save SVG").click()
    tree = ElementTree.parse(download.value.path())
    texts = [element.text or "" for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any(name in text for text in texts)
    assert any("pixel" in text or "µm" in text for text in texts)


def test_without_webgl_there_is_a_picture_and_a_sentence(tab: Any, site: str) -> None:
    tab.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    tab.goto(f"{site}/field/1")
    tab.wait_for_selector("#view img")
    assert "no WebGL2" in tab.locator("#view .said").inner_text()
    assert tab.locator("#view img").evaluate(
        "image => image.decode().then(() => image.naturalWidth)"
    )
