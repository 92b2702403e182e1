"""Which cells an address means, and the gallery of them."""

from __future__ import annotations

import html
import re
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from factories import MOMENT, Factory
from screens import SmallScreen
from sqlalchemy import text
from starlette.requests import Request
from starlette.testclient import TestClient

from cellstore.enums import AnnotationKind, ImageFlagReason, Level, Stage
from cellstore.errors import QueryError, UnknownNameError, UserInputError
from cellstore.explore import cell_views
from cellstore.explore.cell_filters import bits_of, chosen_cells, keep_selection
from cellstore.explore.pixels import jpeg, sheet_pixels
from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace
from cellstore.models import Annotation, Cell, Image, Segmentation

PLAIN = """
    SELECT c.id FROM cells AS c
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    JOIN treatments AS t ON t.id = w.treatment_id
    JOIN features AS f ON f.cell_id = c.id
    LEFT JOIN predictions AS a ON a.cell_id = c.id AND a.run_id = :first AND a.rank = 1
    LEFT JOIN labels AS l ON l.id = a.label_id
    LEFT JOIN predictions AS b ON b.cell_id = c.id AND b.run_id = :last AND b.rank = 1
    LEFT JOIN split_members AS m ON m.image_id = i.id
    LEFT JOIN labels AS n ON n.id = m.label_id
    WHERE c.excluded IS NULL AND
"""
RUNS = "SELECT run_id FROM predictions GROUP BY run_id ORDER BY count(DISTINCT probability) DESC"
AREAS = "SELECT cell_id, area FROM features"
PROBABILITY = "SELECT avg(probability) FROM predictions WHERE rank = 1 AND run_id = :run"


def plain(workspace: Workspace, condition: str) -> set[int]:
    """What the database itself says of the cells of a condition."""
    with workspace.database.read() as session:
        first, last = session.scalars(text(RUNS))
        found = session.execute(text(PLAIN + condition), {"first": first, "last": last})
        return {row[0] for row in found}


def asked(app: Any, **filters: Any) -> Request:
    """A request with these filters in its address."""
    query = urlencode(filters, doseq=True).encode()
    scope = {"type": "http", "method": "GET", "path": "/cells", "headers": [], "app": app}
    return Request(scope | {"query_string": query})


def ids(app: Any, prefix: str = "", **filters: Any) -> set[int]:
    """The cells that these filters choose; none is chosen twice."""
    chosen = chosen_cells(asked(app, **filters), prefix)
    with app.state.explorer.reader.questions() as questions:
        rows = questions.ask_ours(chosen.query, chosen.values).records()
    found = {row["cell_id"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_filters_choose_the_cells_that_plain_sql_does(
    client: TestClient, screen: Workspace
) -> None:
    app: Any = client.app
    with screen.database.read() as session:
        first, last = session.scalars(text(RUNS))
        barcode, treatment = session.execute(
            text(
                "SELECT p.barcode, t.name FROM wells AS w JOIN plates AS p ON p.id = w.plate_id "
                "JOIN treatments AS t ON t.id = w.treatment_id WHERE w.control IS NULL LIMIT 1"
            )
        ).one()
        area = session.scalar(text("SELECT avg(area) FROM features"))
        sure = session.scalar(text(PROBABILITY), {"run": first})
        label = session.scalar(text("SELECT min(label_id) FROM split_members"))
        label = session.scalar(text("SELECT value FROM labels WHERE id = :id"), {"id": label})
    of_first = {"run": first}
    large, certain = f"f.area >= {area}", f"a.probability >= {sure}"
    expected: list[tuple[dict[str, Any], str]] = [
        ({}, "true"),
        ({"plate": barcode}, f"p.barcode = '{barcode}'"),
        ({"well": ["B02", "B03"]}, "w.name IN ('B02', 'B03')"),
        ({"treatment": treatment}, f"t.name = '{treatment}'"),
        ({"control": "negative"}, "w.control = 'negative'"),
        ({"control": "none"}, "w.control IS NULL"),
        ({"image": "1,2"}, "i.id IN (1, 2)"),
        ({"area": f"{area}..", "eccentricity": "..0.7"}, f"{large} AND eccentricity <= 0.7"),
        ({"where": f"area >= {area} AND site = 1 -- all"}, large),
        (of_first, "a.cell_id IS NOT NULL"),
        (of_first | {"predicted": label}, f"l.value = '{label}'"),
        (of_first | {"label": label}, f"a.cell_id IS NOT NULL AND n.value = '{label}'"),
        (of_first | {"result": "right"}, "l.value = n.value"),
        (of_first | {"result": "wrong"}, "l.value <> n.value"),
        (of_first | {"subset": "test"}, "a.cell_id IS NOT NULL AND m.subset = 'test'"),
        ({"subset": "train"}, "m.subset = 'train'"),
        (of_first | {"subset": "train", "area": f"{area}.."}, f"m.subset = 'train' AND {large}"),
        (of_first | {"other": last}, "a.label_id <> b.label_id"),
        (of_first | {"min_probability": sure}, certain),
        (of_first | {"max_probability": sure}, f"NOT {certain}"),
    ]
    for filters, condition in expected:
        cells = plain(screen, condition)
        assert ids(app, **filters) == cells, filters
        assert cells, filters
    # The second filter of a page has a prefix, and neither sees the other.
    both = {"well": "B02", "b.well": "B03", "b.area": f"{area}.."}
    assert ids(app, **both) == plain(screen, "w.name = 'B02'")
    assert ids(app, "b.", **both) == plain(screen, f"w.name = 'B03' AND f.area >= {area}")
    some = sorted(plain(screen, "true"))[3::7]
    name = keep_selection(app.state.explorer, bits_of(np.array(some[::-1], np.int64)))
    assert ids(app, selection=name) == ids(app, cells=",".join(map(str, some))) == set(some)


def test_filters_and_the_gallery_on_both_databases(read_screen: SmallScreen) -> None:
    workspace = read_screen.factory.workspace
    app = make_app(workspace)
    every = "SELECT cell_id, probability FROM predictions WHERE rank = 1 ORDER BY 2 DESC, 1"
    with workspace.database.read() as session:
        labelled = [row[0] for row in session.execute(text(every))]
        of_label = set(session.scalars(text(
            "SELECT p.cell_id FROM predictions AS p JOIN labels AS l ON l.id = p.label_id "
            "WHERE p.rank = 1 AND l.value = 'taxol'"
        )))  # fmt: skip
    assert ids(app, run="latest") == set(labelled)
    assert ids(app, predicted="taxol") == of_label
    with TestClient(app) as client:
        assert crops(client.get("/cells?run=latest&sort=-probability").text) == labelled
        assert client.get("/cells/count?run=latest").text.startswith(f"{len(labelled)} cells in")
        assert set(all_crops(client, treatment="taxol", beside="none")) == ids(
            app, treatment="taxol"
        )
    app.state.explorer.reader.close()


def test_what_cannot_be_meant_is_said_in_a_sentence(client: TestClient) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"area": "nan.."}, UserInputError),
        ({"area": "1e999.."}, UserInputError),
        ({"nothing": "1..2"}, UnknownNameError),
        ({"treatment": "demotax"}, UnknownNameError),
        ({"well": "b2"}, UnknownNameError),
        ({"cells.id": "1..2"}, UnknownNameError),
        ({"dose": "much"}, UserInputError),
        ({"cells": "1;DROP TABLE cells"}, UserInputError),
        ({"control": "x' OR 'a' = 'a"}, UserInputError),
        ({"run": "999999"}, UnknownNameError),
        ({"selection": "../../etc/passwd"}, UnknownNameError),
        ({"flagged": "yes"}, UnknownNameError),
        ({"where": "area >"}, QueryError),
        ({"where": "true) OR (1 = 1); DELETE FROM cells --"}, QueryError),
        ({"where": "area > (SELECT count(*) FROM read_csv('/etc/passwd'))"}, QueryError),
        ({"plate": ["x"] * 501}, UserInputError),
    ]
    for filters, kind in wrong:
        with pytest.raises(kind):
            chosen_cells(asked(client.app, **filters))
    for hostile in ("' OR 1 = 1 --", '"; DROP TABLE cells', "$run", "\u202eB02", "a..b"):
        for name in ("predicted", "label"):
            assert ids(client.app, **{name: hostile}) == set()
        for name in ("plate", "well", "treatment"):
            with pytest.raises(UnknownNameError, match=f"Unknown {name}"):
                ids(client.app, **{name: hostile})


def test_flags_exclusions_and_labels_by_people_choose_cells(writable: Workspace) -> None:
    make = Factory(writable)
    cells = sorted(plain(writable, "true"))
    qc = make.run(Stage.QC)
    with writable.database.read() as session:
        first = session.get_one(Cell, cells[0])
        image = session.get_one(
            Image, session.scalar(text("SELECT max(image_id) FROM segmentations"))
        )
    make.flag_cell(qc, first)
    make.flag_image(qc, image, ImageFlagReason.OUT_OF_FOCUS)
    of_image = plain(writable, f"i.id = {image.id}")
    make.exclude(Level.CELL, cells[1])
    values = {"user_name": "ada", "created_at": MOMENT, "kind": AnnotationKind.LABEL}
    made = [
        make.add(Annotation(level=Level.CELL, row_id=cell, value=value, **values))
        for cell, value in ((cells[2], "mitotic"), (cells[3], "debris"))
    ]
    make.add(Annotation(level=Level.CELL, row_id=cells[3], undoes_id=made[1].id, **values))
    app = make_app(writable)
    counting = set(cells) - {cells[1]}
    assert ids(app) == counting
    assert ids(app, excluded="yes") == {cells[1]}
    assert ids(app, excluded="all") == set(cells)
    flagged = ({cells[0]} | of_image) & counting
    assert ids(app, flagged="yes") == flagged
    assert ids(app, flagged="no") == counting - flagged
    assert ids(app, flagged="out of focus") == of_image & counting
    assert ids(app, annotated="yes") == ids(app, annotated="mitotic") == {cells[2]}
    assert ids(app, annotated="no") == counting - {cells[2]}
    app.state.explorer.reader.close()


def crops(page: str) -> list[int]:
    """The cells of a page or a sheet, in their order."""
    return [int(found) for found in re.findall(r'data-cell="(\d+)"', page)]


def all_crops(client: TestClient, **filters: Any) -> list[int]:
    """The cells of all sheets, one after the other."""
    page = client.get("/cells", params=filters).text
    found = crops(page)
    while (following := re.search(r'data-following="([^"]+)"', page)) is not None:
        page = client.get(html.unescape(following[1])).text
        assert crops(page)
        found += crops(page)
    return found


def test_sheets_show_every_cell_once_in_its_order(
    client: TestClient, screen: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_views, "PER_SHEET", 240)
    monkeypatch.setattr(cell_views, "FIRST", 150)  # the short way does not find a sheet
    with screen.database.read() as session:
        area = dict(list(session.execute(text(AREAS))))
        query = "SELECT cell_id, probability FROM predictions WHERE rank = 1 AND run_id = :run"
        run = session.scalars(text(RUNS)).all()[-1]  # the majority: its probabilities are alike
        sure = dict(list(session.execute(text(query), {"run": run})))
    every = sorted(area)
    assert len(every) > 2 * 240
    assert all_crops(client, sort="id") == every
    assert all_crops(client, sort="area") == sorted(every, key=lambda cell: (area[cell], cell))
    assert all_crops(client, sort="-area", control="negative", beside="none") == sorted(
        ids(client.app, control="negative"), key=lambda cell: (-area[cell], cell)
    )
    certain = all_crops(client, sort="-probability", run=run)
    assert certain == sorted(sure, key=lambda cell: (-sure[cell], cell))
    at_random = all_crops(client)
    assert sorted(at_random) == every
    assert at_random != every
    assert all_crops(client, seed=2) != at_random
    monkeypatch.setattr(cell_views, "FIRST", 4096)
    assert all_crops(client, sort="area") == sorted(every, key=lambda cell: (area[cell], cell))


def test_cells_that_come_meanwhile_do_not_shift_the_sheets(
    writable: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_views, "PER_SHEET", 300)
    app = make_app(writable)
    with TestClient(app) as client:
        before = sorted(plain(writable, "true"))
        page = client.get("/cells?sort=-area").text
        following = html.unescape(re.search(r'data-following="([^"]+)"', page)[1])  # type: ignore[index]
        make = Factory(writable)
        make.exclude(Level.CELL, crops(page)[0])
        with writable.database.begin() as session:
            segmentation = session.get_one(Segmentation, 1)
            segmentation.n_cells += 1
        made = make.cells(segmentation, 1)  # they have no area, and so come last
        seen = crops(page)
        while following:
            page = client.get(following).text
            seen += crops(page)
            found = re.search(r'data-following="([^"]+)"', page)
            following = html.unescape(found[1]) if found else ""
    assert sorted(seen) == sorted([*before, *(cell.id for cell in made)])
    assert seen[-1] == made[-1].id
    app.state.explorer.reader.close()


def test_controls_of_the_same_plates_stand_beside_a_treatment(
    client: TestClient, screen: Workspace
) -> None:
    one = "SELECT p.barcode, t.name FROM wells AS w JOIN plates AS p ON p.id = w.plate_id "
    one += "JOIN treatments AS t ON t.id = w.treatment_id WHERE w.control IS NULL LIMIT 1"
    with screen.database.read() as session:
        barcode, treatment = session.execute(text(one)).one()
    page = client.get("/cells", params={"plate": barcode, "treatment": treatment}).text
    assert f"Negative controls (DMSO) of plate {barcode}" in page
    left, right = (set(crops(part)) for part in page.split('data-pane="b."'))
    treated = plain(screen, f"p.barcode = '{barcode}' AND t.name = '{treatment}'")
    controls = plain(screen, f"p.barcode = '{barcode}' AND w.control = 'negative'")
    assert left
    assert left <= treated
    assert right
    assert right <= controls
    counted = client.get(f"/cells/count?pane=b.&treatment={treatment}&plate={barcode}").text
    assert counted == f"{len(controls)} cells in 4 fields of 4 wells"
    for alone in ("", "treatment=DMSO", f"treatment={treatment}&beside=none"):
        assert 'data-pane="b."' not in client.get(f"/cells?{alone}").text
    two = client.get("/cells?sort=id&well=B02&b.well=B03").text
    left, right = (crops(part) for part in two.split('data-pane="b."'))
    assert left == sorted(plain(screen, "w.name = 'B02'"))[:50]
    assert right == sorted(plain(screen, "w.name = 'B03'"))[:50]


def test_the_form_leads_to_a_plain_address_and_hostile_ones_to_a_sentence(
    client: TestClient, screen: Workspace
) -> None:
    sent = "plate=&treatment=&feature=area&min=100&max=&sort=id"
    answer = client.get(f"/cells?{sent}", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/cells?sort=id&area=100.."
    page = client.get("/cells?treatment=%3Cscript%3Ealert(1)%3C/script%3E").text
    assert "Unknown treatment" in page
    assert "<script>alert" not in page
    assert "No cell is like that" in client.get("/cells?area=1e9..").text
    wrong = ("nosuchfilter=1", "sort=nosuch", "after=1", "after=x~y", f"after={2**70}~1",
             "side=9999", "channels=nosuch", "outlines=2", "b.area=1..x")  # fmt: skip
    for query in wrong:
        assert client.get(f"/cells?{query}").status_code in (400, 404), query
    assert client.get("/cells/more?pane=c").status_code == 400
    assert client.get("/cells/more?pane=b.").status_code == 404
    for query in ("cells=", "cells=1,x", "cells=999999999", "cells=1&side=-1"):
        assert client.get(f"/cells/sheet?{query}").status_code in (400, 404), query
    some = sorted(plain(screen, "true"))[:3]
    listed = ",".join(map(str, some))
    shown = client.get(f"/cells/sheet?cells={listed}&side=48")
    explorer = client.app.state.explorer  # type: ignore[attr-defined]
    assert shown.content == jpeg(sheet_pixels(explorer, some, side=48, outlines=True))
    assert shown.headers["content-type"] == "image/jpeg"
    assert client.get("/cell/nix").status_code == client.get("/cell/999999999").status_code == 404
    there = client.get(f"/cell/{some[0]}", follow_redirects=False).headers["location"]
    assert re.fullmatch(rf"/field/\d+\?cell={some[0]}", there)


def test_one_scrolls_moves_and_selects_in_the_browser(tab: Any, site: str) -> None:
    from playwright.sync_api import expect

    tab.set_default_timeout(10_000)
    tab.goto(f"{site}/cells?sort=area&treatment=DMSO&b.control=none")
    left, right = tab.locator(".pane").all()
    expect(left.locator(".count")).to_contain_text("cells in")
    assert left.locator(".sheet").count() >= 1
    before = right.locator(".crop").count()
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(right.locator(".crop")).not_to_have_count(before)
    ids = right.locator(".crop").evaluate_all("all => all.map(crop => crop.dataset.cell)")
    assert len(set(ids)) == len(ids)
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    tab.wait_for_url("**after=*")  # the address brings back what is on the screen
    tab.evaluate("scrollTo(0, 0)")
    tab.evaluate("""() => {
        window.said = [];
        document.addEventListener("cellstore:selection", event => said.push(event.detail));
    }""")
    left.locator(".crop").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    here = tab.evaluate("document.activeElement.dataset.cell")
    columns = "getComputedStyle(document.querySelector('.sheet')).gridTemplateColumns"
    across = tab.evaluate(f"{columns}.split(' ').length")
    assert here == left.locator(".crop").nth(1 + across).get_attribute("data-cell")
    expect(tab.locator("#about")).to_contain_text("DMSO")
    tab.keyboard.press("Space")
    assert tab.evaluate("said.at(-1)") == {"level": "cell", "ids": [int(here)]}
    right.locator(".crop").nth(2).click(modifiers=["Shift"])
    right.locator(".crop").nth(5).click(modifiers=["Shift"])
    chosen = [int(here), *map(int, ids[2:6])]
    assert sorted(tab.evaluate("said.at(-1).ids")) == sorted(chosen)
    told = {"level": "cell", "ids": [int(here)], "text": "<b>mitotic</b>"}
    tab.evaluate(
        "detail => document.dispatchEvent(new CustomEvent('cellstore:annotated', {detail}))", told
    )
    assert left.locator(".people").inner_text() == "<b>mitotic</b>"
    tab.get_by_role("link", name="Show these").click()
    expect(tab.locator(".crop")).to_have_count(5)
    shown = tab.locator(".crop").evaluate_all("all => all.map(crop => Number(crop.dataset.cell))")
    assert shown == sorted(chosen)
    tab.keyboard.press("Escape")
    tab.locator(".crop").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url(f"**/field/*cell={shown[0]}*")
