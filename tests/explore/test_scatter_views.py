"""Scatter plots: points as they are in the store, densities, maps, selections, and the mouse."""

from __future__ import annotations

import io
import json
import re
import struct
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.csv
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from cellstore.explore import point_maps, scatter_views
from cellstore.explore.cell_filters import bits_of, ids_of
from cellstore.explore.scatter_views import CONTROLS, NOTHING, OTHERS, named_groups
from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace
from cellstore.store import Store

CELLS = """SELECT cell_id, area, mean_intensity, treatment, control, plate, well FROM cell_table
    WHERE excluded IS NULL ORDER BY cell_id"""


def read(content: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What the bytes of points or of a density say."""
    length = struct.unpack("<I", content[:4])[0]
    head, at = json.loads(content[4 : 4 + length]), 4 + length
    if head["kind"] == "density":
        return head, {"counts": np.frombuffer(content, "<f8", head["bins"] ** 2, at)}
    n = head["n"]
    kind = "u1" if "groups" in head["colour"] else "<f4"
    return head, {
        "ids": np.frombuffer(content, "<f8", n, at).astype(int),
        "x": np.frombuffer(content, "<f4", n, at + 8 * n),
        "y": np.frombuffer(content, "<f4", n, at + 12 * n),
        "colour": np.frombuffer(content, kind, n, at + 16 * n),
    }


def points(client: TestClient, **given: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The points of an address, once the map of them is made."""
    for _ in range(200):
        found = client.get("/scatter/points", params=given)
        if found.status_code != 202:
            assert found.status_code == 200, found.text
            return read(found.content)
        time.sleep(0.05)
    raise AssertionError(found.text)


def test_points_are_the_cells_of_the_store(client: TestClient, screen: Workspace) -> None:
    rows = Store(screen).sql(CELLS).to_pylist()
    head, found = points(client, x="area", y="mean_intensity", colour="treatment")
    assert head["titles"] == ["area (pixels²)", "mean_intensity (grey levels)"]
    order = np.argsort(found["ids"])
    assert found["ids"][order].tolist() == [row["cell_id"] for row in rows]
    for axis, name in (("x", "area"), ("y", "mean_intensity")):
        np.testing.assert_array_equal(found[axis][order], np.float32([r[name] for r in rows]))
    counts = Counter(row["treatment"] for row in rows if row["control"] != "negative")
    groups = head["colour"]["groups"]
    assert {g["name"]: g["count"] for g in groups if g["code"] < OTHERS} == counts
    (controls,) = (g for g in groups if g["code"] == CONTROLS)
    assert controls["name"] == "DMSO (negative controls)"
    names = {g["code"]: g["name"] for g in groups}
    for cell, code in zip(rows, found["colour"][order], strict=True):
        assert names[code].startswith(cell["treatment"])
    one = rows[0]["treatment"]
    _, some = points(client, treatment=one, colour="area")
    assert len(some["ids"]) == sum(row["treatment"] == one for row in rows)
    np.testing.assert_array_equal(some["colour"], some["x"])


def test_points_by_what_a_run_said(client: TestClient, screen: Workspace) -> None:
    run, said = (
        Store(screen)
        .sql("""
        SELECT run_id, label, truth, count(*) AS n FROM prediction_table
        WHERE run_id = (SELECT max(run_id) FROM prediction_table) GROUP BY ALL
    """)
        .to_pydict(),
        Counter[str](),
    )
    right = Counter[str]()
    for label, truth, n in zip(run["label"], run["truth"], run["n"], strict=True):
        said[label] += n
        right["unknown" if truth is None else "right" if label == truth else "wrong"] += n
    number = run["run_id"][0]

    def legend(colour: str) -> dict[str, int]:
        head, _ = points(client, colour=colour, run=number)
        return {g["name"].removesuffix(" (negative controls)"): g["count"]
                for g in head["colour"]["groups"]}  # fmt: skip

    assert legend("predicted") == said
    assert legend("result") == right
    assert sum(legend("subset").values()) == sum(said.values())


def test_groups_are_the_most_frequent_ones() -> None:
    names = [None, "DMSO", *(f"t{at}" for at in range(9))]
    codes = np.repeat(np.arange(11), [3, 50, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    found, legend = named_groups(names, codes, {"DMSO"})
    assert [(g["code"], g["name"], g["count"]) for g in legend[7:]] == [
        (OTHERS, "2 others", 3),
        (CONTROLS, "DMSO (negative controls)", 50),
        (NOTHING, "unknown", 3),
    ]
    assert [g["name"] for g in legend[:7]] == names[2:9]
    assert np.bincount(found).tolist() == [9, 8, 7, 6, 5, 4, 3, 0, 3, 50, 3]


def test_more_points_are_a_density_whose_parts_are_points(
    client: TestClient, screen: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter_views, "MOST_POINTS", 100)
    monkeypatch.setattr(scatter_views, "BINS", 16)
    rows = Store(screen).sql(CELLS)
    every = Store(screen).sql("SELECT area, mean_intensity FROM features")
    axes = ("area", "mean_intensity")
    x, y = (rows[name].to_numpy().astype(np.float32).astype(float) for name in axes)
    ends = [(float(np.float32(f(every[name].to_numpy())))) for name in axes for f in (min, max)]
    head, found = points(client)
    assert (head["kind"], head["window"]) == ("density", pytest.approx(ends))
    expected, _, _ = np.histogram2d(y, x, bins=16, range=[head["window"][2:], head["window"][:2]])
    np.testing.assert_array_equal(found["counts"].reshape(16, 16), expected)
    x0, x1, y0, y1 = np.quantile(x, 0.4), np.quantile(x, 0.5), y.min(), np.median(y)
    within = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    head, found = points(client, window=f"{x0},{x1},{y0},{y1}")
    assert (head["kind"], head["whole"]) == ("points", False)
    assert sorted(found["ids"]) == rows["cell_id"].to_numpy()[within].tolist()


def test_components_are_those_of_the_features(client: TestClient, screen: Workspace) -> None:
    known = Store(screen).sql("SELECT * EXCLUDE (recipe_id, run_id) FROM features").to_pandas()
    values = known.drop(columns=["cell_id", "centroid_x", "centroid_y"]).to_numpy(dtype=float)
    values = (values - values.mean(axis=0)) / values.std(axis=0)
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    head, found = points(client, x="pca:basic:1", y="pca:basic:2")
    share = sizes**2 / (sizes**2).sum()
    assert head["titles"][0] == f"PC 1 ({share[0]:.0%} of variance) of basic"
    assert "found from all" in head["notes"][0]
    row_of = {cell: at for at, cell in enumerate(known["cell_id"])}
    rows = [row_of[cell] for cell in found["ids"]]
    for axis, at in (("x", 0), ("y", 1)):
        assert abs(np.corrcoef(found[axis], left[rows, at])[0, 1]) > 0.999


def test_a_map_that_nobody_waits_for_stops_with_its_process() -> None:
    from multiprocessing import active_children

    job = point_maps._Job(asked=time.monotonic() - 2 * point_maps.GIVEN_UP)
    with pytest.raises(point_maps._GivenUpError):
        point_maps._umap(np.zeros((20, 2)), job, "UMAP")
    assert not active_children()


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"x": 'area"; DROP TABLE plates; --'}, 404),
        ({"colour": "1 FROM plates --"}, 404),
        ({"x": "pca:nothing:1"}, 404),
        ({"x": "pca:basic:0"}, 404),
        ({"x": "pca:basic:999999999999"}, 404),
        ({"window": "0,1,nan,2"}, 400),
        ({"window": "0"}, 400),
        ({"profiles": "latest"}, 404),
        ({"area": "x..y"}, 400),
        ({"selection": "0"}, 404),
    ],
)
def test_what_an_address_cannot_mean_is_said(
    client: TestClient, given: dict[str, str], status: int
) -> None:
    points(client, x="pca:basic:1")  # its map is there
    found = client.get("/scatter/points", params=given)
    assert found.status_code == status
    assert "Traceback" not in found.text
    assert "unexpected" not in found.text


def test_a_selection_is_kept_counted_and_exported(client: TestClient, screen: Workspace) -> None:
    rows = Store(screen).sql(CELLS).to_pylist()[10:60]
    ids = [row["cell_id"] for row in rows]
    bits = np.zeros(8 * (max(ids) // 8 + 1), np.uint8)
    bits[ids] = 1
    body = np.packbits(bits, bitorder="little").tobytes()
    page = client.get("/scatter?plate=<b>&area=1..2").text
    assert "<b>" not in page.split("<main")[1].replace("</b>", "")
    csrf = re.search(r'name="csrf" content="([^"]+)"', page)
    assert csrf is not None
    headers = {"origin": "http://testserver", "x-csrf-token": csrf[1]}
    for wrong in ({}, {**headers, "x-csrf-token": "x"}, {**headers, "origin": "http://x.example"}):
        assert client.post("/selection", content=body, headers=wrong).status_code == 403
    for bad in (b"1234567", b"\1", body + b"\0" * 99 + b"\1"):
        assert client.post("/selection", content=bad, headers=headers).status_code == 400
    kept = client.post("/selection", content=body, headers=headers).json()
    assert client.post("/selection", content=body + b"\0", headers=headers).json() == kept
    asked = {"selection": kept["selection"], "excluded": "all"}
    back = client.get("/scatter/selected.bin", params=asked).content
    assert back == body
    table = pyarrow.csv.read_csv(
        io.BytesIO(client.get("/scatter/selected.csv", params=asked).content)
    )
    assert table["cell_id"].to_pylist() == ids
    assert table["well"].to_pylist() == [row["well"] for row in rows]
    shown = client.get("/scatter/selected", params=asked).text
    wells = {(row["plate"], row["well"]) for row in rows}
    assert f"Selection: 50 cells in {len(wells)} wells" in shown
    _, some = points(client, selection=kept["selection"])
    assert sorted(some["ids"]) == ids
    name = client.get("/scatter/point", params={"id": ids[0]}).json()
    assert name["lines"][0] == f"{rows[0]['plate']} {rows[0]['well']}, field 1"
    assert name["url"] == f"/cell/{ids[0]}"
    assert client.get("/scatter/point", params={"id": 10**9}).status_code == 404


def test_wells_of_a_profile_run_are_points_too(writable: Workspace) -> None:
    store = Store(writable)
    run = store.profile().run_id
    rows = store.sql(f"SELECT * FROM profiles WHERE run_id = {run} ORDER BY well_id").to_pylist()
    app = make_app(writable)
    with TestClient(app, raise_server_exceptions=False) as client:
        head, found = points(client, profiles=run)
        assert head["unit"] == "wells"
        assert head["titles"][0].startswith("PC 1")
        assert sorted(found["ids"]) == [row["well_id"] for row in rows]
        name = next(name for name in rows[0] if name.endswith("area"))
        _, found = points(client, profiles=run, x=name, y=name, colour="plate")
        by_id = dict(zip(found["ids"], found["x"], strict=True))
        assert [by_id[row["well_id"]] for row in rows] == pytest.approx(
            [np.float32(row[name]) for row in rows]
        )
        page = client.get("/scatter", params={"profiles": run}).text
        headers = {"origin": "http://testserver"}
        headers["x-csrf-token"] = re.findall(r'name="csrf" content="([^"]+)"', page)[0]
        body = bits_of(np.array([rows[0]["well_id"]]))
        kept = client.post(f"/selection?profiles={run}", content=body, headers=headers).json()
        asked = {"selection": kept["selection"], "excluded": "all", "profiles": run}
        assert "in 1 well of 1 plate" in client.get("/scatter/selected", params=asked).text
        back = client.get("/scatter/selected.bin", params=asked).content
        assert back == body
    app.state.explorer.reader.close()


def even_odd(polygon: list[list[float]], x: float, y: float) -> bool:
    found = False
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            found = not found
    return found


def test_the_mouse_selects_exactly_what_is_inside(tab: Any, site: str, client: TestClient) -> None:
    _, known = points(client)
    view = [float(f(known[axis])) for axis in "xy" for f in (np.min, np.max)]
    tab.goto(f"{site}/scatter?view={','.join(map(str, view))}")
    tab.wait_for_selector('#plot[data-ready="yes"]')

    rng = np.random.default_rng(1)
    polygon = rng.normal(size=(30, 2)).tolist()
    spread = rng.normal(size=(2, 400)).astype(np.float32)
    inside = tab.evaluate(
        """async ([polygon, x, y]) => {
            const { inside } = await import("/static/scatter.js");
            const shades = new Uint8Array(x.length);
            return [...inside(polygon, Float32Array.from(x), Float32Array.from(y), shades, [0])];
        }""",
        [polygon, *spread.tolist()],
    )
    assert inside == [int(even_odd(polygon, float(x), float(y))) for x, y in spread.T]
    assert 20 < sum(inside) < 380

    box = tab.locator("canvas[data-points]").bounding_box()
    tab.click("[data-tool=rectangle]")
    left, top, right, bottom = (round(box["x"] + 60), round(box["y"] + 40),
                                round(box["x"] + 300), round(box["y"] + 250))  # fmt: skip

    def drag() -> None:
        tab.mouse.move(left, top)
        tab.mouse.down()
        tab.mouse.move(left + 50, top + 50)
        tab.mouse.move(right, bottom)
        tab.mouse.up()

    def at(px: float, py: float) -> tuple[float, float]:
        x = view[0] + (px - box["x"]) / box["width"] * (view[1] - view[0])
        return x, view[3] - (py - box["y"]) / box["height"] * (view[3] - view[2])

    (x0, y1), (x1, y0) = at(left, top), at(right, bottom)
    within = (known["x"] > x0) & (known["x"] < x1) & (known["y"] > y0) & (known["y"] < y1)
    drag()
    tab.wait_for_selector(f"text=Selection: {within.sum():,} cells")
    name = re.findall(r"lasso=(\w+)", tab.url)[0]
    kept = tab.evaluate(
        "async (name) => [...new Uint8Array(await (await fetch("
        "`/scatter/selected.bin?selection=${name}`)).arrayBuffer())]",
        name,
    )
    assert ids_of(bytes(kept)).tolist() == sorted(known["ids"][within].tolist())

    chosen = "import('/static/selection.js').then(({ selection }) => selection.ids().length)"
    assert tab.evaluate(chosen) == within.sum()  # to be labelled

    tab.reload()  # the address brings it back
    tab.wait_for_selector(f"text=Selection: {within.sum():,} cells")
    tab.click("text=DMSO (negative controls)")
    assert "hide=DMSO" in tab.url
    tab.focus("#plot")
    tab.keyboard.press("Escape")
    assert "lasso" not in tab.url
    tab.click("[data-tool=rectangle]")
    drag()
    controls = known["colour"] == CONTROLS
    tab.wait_for_selector(f"text=Selection: {(within & ~controls).sum():,} cells")
    nearest = int(np.flatnonzero(within & ~controls)[0])
    px = box["x"] + (known["x"][nearest] - view[0]) / (view[1] - view[0]) * box["width"]
    py = box["y"] + (view[3] - known["y"][nearest]) / (view[3] - view[2]) * box["height"]
    tab.mouse.move(float(px), float(py))
    tab.wait_for_selector("[data-tip] a")
    tab.keyboard.press("+")
    assert "view=" in tab.url
