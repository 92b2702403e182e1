"""Home, plates and wells: what they say is what the store says."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from screens import SmallScreen
from sqlalchemy import insert
from starlette.testclient import TestClient

from cellstore.explore.server import make_app
from cellstore.explore.well_colours import WellValues, ink_on, make_scale, viridis
from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA
from cellstore.report.drawing import brief
from cellstore.store import Store

WELL = re.compile(
    r'<a href="([^"]*)" class="([^"]*)" data-group="(\d+)" aria-label="([^"]*)"'
    r'(?: style="background:(#[0-9a-f]{6});color:(#[0-9a-f]{6})")?><span>([^<]*)</span>'
)


def wells_of(client: TestClient, address: str) -> dict[str, dict[str, Any]]:
    """The wells of the maps of a page, by ``PLATE/WELL``."""
    page = client.get(address)
    assert page.status_code == 200, page.text
    keys = ("kinds", "group", "words", "colour", "ink", "written")
    found = {}
    for url, *values in WELL.findall(page.text):
        texts = (html.unescape(value).replace("\u00ad", "") for value in values)
        found[url.removeprefix("/well/")] = dict(zip(keys, texts, strict=True))
    return found


def test_a_map_shows_every_well_with_the_mean_of_a_feature(
    client: TestClient, screen: Workspace
) -> None:
    shown = wells_of(client, "/plates?plate=DEMO0001&plate=DEMO0002&colour=feature&feature=area")
    with Store(screen).open_questions() as questions:
        means = questions.ask(
            "SELECT plate || '/' || well AS at, avg(area) AS area FROM cell_table "
            "WHERE excluded IS NULL GROUP BY ALL"
        ).records()
        wells = questions.ask("SELECT plate || '/' || well AS at, * FROM well_table").records()
    assert shown.keys() == {row["at"] for row in wells}
    for row in means:
        assert shown[row["at"]]["written"] == brief(row["area"])
    for row in wells:
        words = shown[row["at"]]["words"]
        assert f"{row['n_cells']} cells in 1 field," in words
        assert row["treatment"] in words
        assert ("negative control" in words) is (row["control"] == "negative")
    # One scale for both plates: equal values, equal colours; the largest is the end of it.
    largest = max(means, key=lambda row: row["area"])
    assert shown[largest["at"]]["colour"] == viridis(1)


def test_a_map_of_a_run_marks_what_it_learned_and_leaves_out_what_it_did_not_say(
    client: TestClient, screen: Workspace
) -> None:
    with Store(screen).open_questions() as questions:
        run = questions.ask("SELECT max(id) FROM runs WHERE stage = 'predict'").rows()
        (number,) = next(run)
        said = questions.ask(
            "SELECT plate || '/' || well AS at, winner, correct FROM votes "
            "WHERE level = 'image' AND vote = 'hard' AND run_id = ?",
            [number],
        ).records()
        seen = questions.ask(
            "SELECT DISTINCT plate || '/' || well FROM run_images "
            "WHERE run_id = ? AND well_in_training",
            [number],
        ).rows()
        learned = {row[0] for row in seen}
    pair = "/plates?plate=DEMO0001&plate=DEMO0002"
    accuracy = wells_of(client, f"{pair}&colour=accuracy&run={number}")
    assert learned == {at for at, well in accuracy.items() if "seen" in well["kinds"].split()}
    assert learned
    for row in said:  # one field in each well
        assert accuracy[row["at"]]["written"] == ("100" if row["correct"] else "0")
    for at in accuracy.keys() - {row["at"] for row in said}:
        assert "novalue" in accuracy[at]["kinds"]
        assert accuracy[at]["colour"] == ""
    votes = wells_of(client, f"{pair}&colour=vote&run={number}")
    assert {row["at"]: row["winner"] for row in said} == {
        at: well["written"] for at, well in votes.items() if well["written"]
    }


def test_maps_of_what_is_not_there_say_so(client: TestClient) -> None:
    flags = client.get("/plate/DEMO0001?colour=flags")
    assert flags.status_code == 200
    assert "No qc run has ended yet. Next: cellstore qc" in flags.text
    assert "Plate maps bring doses" in client.get("/plate/DEMO0001?colour=dose").text
    assert client.get("/plate/DEMO9").status_code == 404
    assert client.get("/plate/DEMO0001?colour=accuracy&run=1").status_code == 404
    assert client.get("/plate/DEMO0001?colour=size").status_code == 400
    # What was chosen for another colour is not meant for this one.
    assert wells_of(client, "/plate/DEMO0001?colour=accuracy&was=profile&run=1")
    assert "Unknown" not in client.get("/plate/DEMO0001?colour=feature&was=profile&feature=x").text
    assert "Unknown feature" in client.get("/plate/DEMO0001?colour=feature&feature=x").text
    assert client.get("/well/DEMO0001/Z99").status_code == 404
    assert client.get("/plates?treatment=nothing").status_code == 404


def test_colours_of_values() -> None:
    wells = [{"treatment": "DMSO", "control": "negative"}, {"treatment": "a", "control": None}]
    numbers = make_scale(WellValues("x", {1: 0.0, 2: 50.0, 3: 100.0}, limits=(0.0, 100.0)), [])
    assert [numbers.colours[well] for well in (1, 2, 3)] == ["#440154", viridis(0.5), "#fde725"]
    assert numbers.ticks == ["0", "25", "50", "75", "100"]
    odd = make_scale(WellValues("x", {n: float(n) for n in range(100)} | {100: 1e6}), [])
    assert odd.ticks[-1].startswith("≥")
    assert odd.colours[100] == viridis(1)
    groups = make_scale(WellValues("Treatment", {1: "DMSO", 2: "a", 3: "a"}), wells)
    assert groups.colours[1] == "#4d545e"
    assert groups.colours[2] == groups.colours[3] != groups.colours[1]
    assert [(words, wells) for words, _, wells in groups.entries] == [("a", 2), ("DMSO", 1)]
    many = make_scale(WellValues("Treatment", {n: f"t{n}" for n in range(20)}), [])
    assert many.entries[-1][0] == "13 others"
    chosen = make_scale(WellValues("Treatment", {n: f"t{n:02}" for n in range(20)}), [], "t19")
    assert chosen.entries[0][0] == "t19"
    doses = make_scale(WellValues("Dose", {1: "1 uM", 2: "10 uM"}, order=["1 uM", "10 uM"]), [])
    assert doses.colours == {1: viridis(0), 2: viridis(1)}
    assert make_scale(WellValues("x", {}), []).colours == {}
    assert (ink_on("#440154"), ink_on("#fde725")) == ("#ffffff", "#000000")


def test_a_well_has_its_fields_and_the_controls_nearest_to_it(
    client: TestClient, screen: Workspace
) -> None:
    with Store(screen).open_questions() as questions:
        wells = questions.ask("SELECT * FROM well_table WHERE plate = 'DEMO0001'").records()
    one = next(row for row in wells if row["control"] is None)
    controls = sorted(
        (row for row in wells if row["control"] == "negative"),
        key=lambda row: (
            (row["well_row"] - one["well_row"]) ** 2
            + (row["well_column"] - one["well_column"]) ** 2,
            row["well_row"],
            row["well_column"],
        ),
    )
    page = client.get(f"/well/DEMO0001/{one['well'].lower()}?channels=DNA&outlines=1")
    assert page.status_code == 200
    text = html.unescape(page.text)
    beside = text[text.index("Negative controls of this plate") :]
    assert [f"/well/DEMO0001/{row['well']}?" in beside for row in controls] == [True] * 2 + [
        False
    ] * (len(controls) - 2)
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) == 3  # one field in each well
    assert all("outlines=1" in picture for picture in pictures)
    assert client.get(pictures[0]).headers["content-type"] == "image/jpeg"
    votes = client.get(f"/well/DEMO0001/{one['well']}/votes").text
    assert "No run has labelled" in votes or "right" in votes or "wrong" in votes
    history = client.get(f"/well/DEMO0001/{one['well']}/history").text
    assert "In splits: by-well" in history


def test_votes_of_a_well_are_those_of_the_store(client: TestClient, screen: Workspace) -> None:
    with Store(screen).open_questions() as questions:
        votes = questions.ask(
            "SELECT run_id, plate, well, winner, truth, n_cells FROM votes "
            "WHERE level = 'well' AND vote = 'hard' ORDER BY run_id DESC, plate, well"
        ).records()
    first = votes[0]
    page = client.get(f"/well/{first['plate']}/{first['well']}/votes").text
    rows = re.findall(r"<tr><td><a href=\"/run/(\d+)\">.*?</tr>", page, re.DOTALL)
    own = [row for row in votes if (row["plate"], row["well"]) == (first["plate"], first["well"])]
    assert rows == [str(row["run_id"]) for row in own]  # the newest first
    for row, text in zip(own, page.split("<tr><td>")[1:], strict=True):
        assert row["winner"] in text
        assert ("right" if row["winner"] == row["truth"] else "wrong") in text
        assert f"of {row['n_cells']}" in text


def test_both_databases_have_the_same_maps(read_screen: SmallScreen) -> None:
    app = make_app(read_screen.workspace)
    plate, run = read_screen.plate.barcode, read_screen.predict_run.id
    with TestClient(app, raise_server_exceptions=False) as client:
        votes = wells_of(client, f"/plate/{plate}?colour=vote")
        answers = {at[-3:]: well["written"] for at, well in votes.items() if well["written"]}
        # B02 and B03 are draws; the summed probability decides, then the alphabet.
        assert answers["B01"] == "DMSO"
        assert answers["B02"] == "taxol"
        assert answers["B03"] == "DMSO"
        right = wells_of(client, f"/plate/{plate}?colour=accuracy&run={run}")
        assert right[f"{plate}/B01"]["written"] == "100"
        assert "seen" in right[f"{plate}/A01"]["kinds"]
        for kind in ("treatment", "dose", "control", "cells", "feature", "profile", "verdict"):
            assert client.get(f"/plate/{plate}?colour={kind}").status_code == 200
        page = client.get(f"/well/{plate}/B01/votes").text
        assert "2, taxol 1" in page
        assert "of 3" in page
        for address in ("/", "/home/stages", "/runs/ranked", "/plates", f"/well/{plate}/B01"):
            assert client.get(address).status_code == 200
        assert client.get(f"/well/{plate}/B01/history").status_code == 200
        for asked in (plate, "B01", "taxol", "run 1", "1", "image 1", "nothing"):
            found = client.get("/search", params={"q": asked}, follow_redirects=False)
            assert found.status_code in (200, 303, 404)
    app.state.explorer.reader.close()


@pytest.mark.parametrize(
    ("asked", "address"),
    [
        ("DEMO0002", "/plate/DEMO0002"),
        ("plate DEMO0002", "/plate/DEMO0002"),
        ("demo0002", "/plate/DEMO0002"),
        ("DEMO002", None),
        ("DEMO0001/b2", "/well/DEMO0001/B02"),
        ("DEMO0001/B02/1", "/field/1"),
        ("cell 3", "/cell/3"),
        ("run 2", "/run/2"),
        ("latest train", "/run/6"),
        ("Demolimus", "/plates?treatment=demolimus"),
        ("/etc/passwd", None),
        ("7", None),
        ("<script>alert(1)</script>", None),
        ("nothing\0", None),
    ],
)
def test_the_search_goes_to_what_is_named(
    client: TestClient, asked: str, address: str | None
) -> None:
    answer = client.get("/search", params={"q": asked}, follow_redirects=False)
    if address is not None:
        assert answer.headers["location"] == address
        return
    assert answer.status_code in (200, 404)
    assert "<script>alert" not in answer.text
    links = re.findall(r'<li><a href="([^"]+)"', answer.text)
    if asked == "7":
        assert links[:3] == ["/field/7", "/cell/7", "/run/7"]
    if asked == "DEMO002":
        assert "/plate/DEMO0002" in links


def test_home_says_what_there_is_and_what_to_do(client: TestClient) -> None:
    home = client.get("/").text
    (step,) = re.findall(r'Next: <code>([^<]+)</code> <button[^>]+ data-copy="([^"]+)"', home)
    assert step[0] == step[1]
    assert step[0].startswith("cellstore --store ")  # the tests are not run in the store
    assert "/plate/DEMO0001" in home
    maps = client.get("/plates/small").text
    drawn = re.findall(r'aria-label="Map of plate (\w+) by treatment: (\d+) wells"', maps)
    assert drawn == [("DEMO0001", "14"), ("DEMO0002", "14")]
    assert sum(path.count("M") for path in re.findall(r'<path d="([^"]+)"', maps)) == 28
    stages = client.get("/home/stages").text
    assert "28 of 28" in stages
    runs = html.unescape(client.get("/runs/ranked").text)
    assert "logistic" in runs
    assert "majority" in runs
    assert "95 % interval" in runs


def test_names_are_text_and_exclusions_are_shown(writable: Workspace) -> None:
    name = 'A/B <b>& "quoted" \'\u202e'
    with writable.database.begin() as session:
        plates, wells = METADATA.tables["plates"], METADATA.tables["wells"]
        session.execute(insert(plates).values(id=90, barcode=name))
        session.execute(
            insert(wells).values(id=900, plate_id=90, well_row=1, well_column=1, name="A01")
        )
    Store(writable).exclude("well", "DEMO0001/B02", reason="<i>dust</i>")
    app = make_app(writable)
    with TestClient(app, raise_server_exceptions=False) as client:
        listed = client.get("/plates").text
        (address,) = (x for x in re.findall(r'href="(/plate/[^"]+)"', listed) if "A%2FB" in x)
        page = client.get(address)
        assert page.status_code == 200
        assert "<b>&" not in page.text
        assert "\u202e" not in page.text
        (well,) = re.findall(r'href="(/well/[^"]+)"', page.text)
        shown = client.get(well)
        assert shown.status_code == 200
        assert "no fields" in shown.text
        assert client.get(f"{well}/votes").status_code == 200
        crossed = wells_of(client, "/plate/DEMO0001")["DEMO0001/B02"]
        assert "excluded" in crossed["kinds"]
        assert "<i>dust</i>" in crossed["words"]  # escaped, as text
        assert "does not count: &lt;i&gt;dust" in client.get("/well/DEMO0001/B02").text
        assert client.get("/well/DEMO0001/B02/history").status_code == 200
    app.state.explorer.reader.close()


def test_keys_move_over_the_map_and_open_a_well(tab: Any, site: str) -> None:
    tab.goto(f"{site}/plate/DEMO0001")
    first = tab.locator(".wells a").first
    first.focus()
    name = first.get_attribute("aria-label")
    assert tab.locator(".tip").inner_text() == name
    tab.keyboard.press("ArrowRight")
    moved = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert moved != name
    assert moved[0] == name[0]  # the same row
    tab.keyboard.press("ArrowDown")
    below = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    assert below[0] > moved[0]
    assert below[1:3] == moved[1:3]  # the same column
    same = tab.locator(".wells a.same").count()
    assert same >= 2  # its replicates
    with tab.expect_navigation():
        tab.select_option("select[name=colour]", "cells")
    assert "colour=cells" in tab.url
    tab.locator(".wells a").nth(1).hover()
    assert "cells" in tab.locator(".tip").inner_text()
    tab.locator(".wells a").nth(1).focus()
    with tab.expect_navigation():
        tab.keyboard.press("Enter")
    assert "/well/DEMO0001/" in tab.url
    tab.get_by_text("In splits: by-well").wait_for()


def test_fields_of_a_well_are_selected_by_key_and_mouse(tab: Any, writable_site: str) -> None:
    tab.goto(f"{writable_site}/well/DEMO0001/B02")
    tab.evaluate("""
        window.heard = [];
        document.addEventListener("cellstore:selection", ({detail}) => window.heard.push(detail));
    """)
    first, second = (tab.locator(".montage a").nth(at) for at in (0, 1))
    ids = [int(field.get_attribute("data-image")) for field in (first, second)]
    first.focus()
    tab.keyboard.press("Space")
    second.click(modifiers=["Shift"])
    assert tab.locator(".montage a.selected").count() == 2
    tab.keyboard.press("Escape")
    assert tab.locator(".montage a.selected").count() == 0
    heard = tab.evaluate("window.heard")
    assert [said["ids"] for said in heard] == [ids[:1], ids, []]
    assert {said["level"] for said in heard} == {"image"}
