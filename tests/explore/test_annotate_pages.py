"""Labels and exclusions from the pages: only with --write, taken back, by several people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace
from cellstore.store import Store


@pytest.fixture
def writing(writable: Workspace) -> Iterator[TestClient]:
    app = make_app(writable, write=True)
    headers = {"origin": "http://testserver", "x-csrf-token": app.state.explorer.csrf}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as made:
        yield made
    app.state.explorer.reader.close()


def test_what_is_said_is_kept_and_taken_back(writing: TestClient, writable: Workspace) -> None:
    store = Store(writable)
    two = {"level": "cell", "ids": [1, 2]}
    said = writing.post("/annotate", json={**two, "label": "<b>round", "user": "ada"})
    assert said.json() == {"said": "2 cells: <b>round", "notes": []}
    writing.post("/annotate", json={**two, "label": "flat", "user": "bob", "field": "annotation"})
    writing.post(
        "/annotate", json={"level": "image", "ids": [1], "label": "flagged", "field": "flag"}
    )
    well = {"level": "well", "ids": ["DEMO0001/B02"], "reason": "debris", "user": "ada"}
    assert writing.post("/annotate/exclude", json=well).json()["said"].endswith("(debris)")
    rows = store.sql(
        "SELECT user_name, field, label FROM annotation_table ORDER BY ALL"
    ).to_pylist()
    login = store.log(limit=1).entries[0]["by"]
    assert sorted(tuple(row.values()) for row in rows) == sorted(
        [("ada", "annotation", "<b>round")] * 2
        + [("bob", "annotation", "flat")] * 2
        + [(login, "flag", "flagged")]
    )
    assert store.audit("DEMO0001/B02", "well").record["excluded"] == "debris"

    page = writing.get("/annotations")
    assert page.status_code == 200
    assert "&lt;b&gt;round" in page.text
    assert "<b>round" not in page.text
    assert page.text.count("data-undo=") == 6
    assert 'href="/cell/1"' in page.text
    assert "<td>ada, bob</td>" in page.text  # how far they agree
    chosen = writing.get("/annotations?user=bob&level=cell").text
    assert chosen.count("data-undo=") == 2
    assert writing.get("/annotate/labels").json()["labels"] == ["<b>round", "flat"]

    assert writing.post("/annotate/undo", json={"user": "ada"}).json()["said"] == (
        "DEMO0001/B02: counts again"
    )
    assert (
        writing.post("/annotate/undo", json={"user": "ada"}).json()["said"] == "2 cells: no label"
    )
    numbers = store.sql("SELECT annotation_id FROM annotation_table WHERE user_name = 'bob'")
    one = numbers.to_pylist()[0]["annotation_id"]
    assert writing.post("/annotate/undo", json={"ids": [one]}).status_code == 200
    again = writing.post("/annotate/undo", json={"ids": [one]})
    assert (again.status_code, "taken back already" in again.text) == (400, True)
    assert store.sql("FROM annotation_table").num_rows == 2


WRONG: list[Any] = [
    *([], "text", 7, {}, {"level": "cell"}, {"level": "cell", "ids": [1]}),
    {"level": "cell", "ids": [1], "label": ["a"]},
    {"level": "cell", "ids": [1.5], "label": "a"},
    {"level": "cell", "ids": [True], "label": "a"},
    {"level": "cell", "ids": list(range(6000)), "label": "a"},
    {"level": "cell", "ids": [10**40], "label": "a"},
    {"level": "dog", "ids": [1], "label": "a"},
    {"level": "cell", "ids": [1], "label": "a" * 300},
    {"level": "cell", "ids": [1], "label": "a", "user": "b" * 300},
    {"level": "cell", "ids": [1], "label": "a", "field": "target"},
    {"level": "well", "ids": ["'; DROP TABLE annotations"], "label": "a"},
]


def test_only_a_page_of_a_writing_explorer_writes(
    writing: TestClient, writable: Workspace, client: TestClient
) -> None:
    for body in WRONG:
        answer = writing.post("/annotate", json=body)
        assert answer.status_code in (400, 404), body
        assert "Traceback" not in answer.text
    assert writing.post("/annotate", content=b"{").status_code == 400
    assert writing.post("/annotate/exclude", json={"level": "cell", "ids": [1]}).status_code == 400
    right = {"level": "cell", "ids": [1], "label": "round", "reason": "x"}
    for headers in ({"x-csrf-token": "wrong"}, {"origin": "http://elsewhere"}):
        for path in ("/annotate", "/annotate/exclude", "/annotate/undo"):
            assert writing.post(path, json=right, headers=headers).status_code == 403
    assert Store(writable).sql("FROM annotations").num_rows == 0

    assert 'data-copy="cellstore --store' in (page := client.get("/field/1").text)
    assert "napari 1" in page
    reading = client.get("/annotations")
    assert reading.status_code == 200
    assert "annotate.js" not in reading.text
    assert "data-undo" not in reading.text
    assert client.get("/annotate/labels").status_code == 404
    refused = client.post("/annotate", json=right, headers={"origin": "http://testserver"})
    assert refused.status_code in (404, 405)


def test_keys_label_exclude_and_take_back(
    writable_site: str, writable: Workspace, tab: Any, browser: Any
) -> None:
    store = Store(writable)
    told = "[data-told]"

    def waits_for(page: Any, words: str) -> None:
        page.wait_for_selector(f"[data-told]:has-text('{words}')")

    tab.goto(f"{writable_site}/well/DEMO0001/B02")
    tab.wait_for_selector("[data-user]:not(:empty)")
    tab.click("[data-do=labels]")
    tab.fill("dialog[open] textarea", "round\nflat\nround")
    tab.click("dialog[open] button[value=ok]")
    tab.wait_for_url("**key=round&key=flat")
    tab.keyboard.press("2")
    waits_for(tab, "DEMO0001/B02: flat")
    tab.focus("a[data-image]")
    image = int(tab.get_attribute("a[data-image]", "data-image"))
    tab.keyboard.press("1")
    waits_for(tab, "round")
    tab.evaluate("document.dispatchEvent(new CustomEvent('cellstore:selection', "
                 "{detail: {level: 'cell', ids: [1, 2, 3]}}))")  # fmt: skip
    tab.keyboard.press("f")
    waits_for(tab, "3 cells: flag flagged")

    other = browser.new_context().new_page()  # another person, at the same time
    other.goto(tab.url)
    other.wait_for_selector("[data-label=flat]")
    other.click("[data-do=user]")
    other.fill("dialog[open] input", "bob")
    other.keyboard.press("Enter")
    other.wait_for_selector("[data-user]:has-text('bob')")
    other.keyboard.press("1")
    waits_for(other, "B02: round")
    other.keyboard.press("x")
    other.keyboard.type("air bubble")
    other.keyboard.press("Enter")
    waits_for(other, "does not count (air bubble)")
    assert store.audit("DEMO0001/B02", "well").record["excluded"] == "air bubble"
    other.keyboard.press("z")
    waits_for(other, "counts again")
    other.context.close()

    login = store.log(limit=1).entries[0]["by"]
    query = "SELECT user_name, level, field, label FROM annotation_table ORDER BY annotation_id"
    assert [tuple(row.values()) for row in store.sql(query).to_pylist()] == [
        (login, "well", "annotation", "flat"),
        (login, "image", "annotation", "round"),
        *[(login, "cell", "flag", "flagged")] * 3,
        ("bob", "well", "annotation", "round"),
    ]
    tab.keyboard.press("z")
    waits_for(tab, "3 cells: flag no label")
    tab.goto(f"{writable_site}/annotations?user={login}")
    tab.click(f"tr:has(a[href='/field/{image}']) button")
    tab.wait_for_load_state()
    tab.wait_for_selector("table.said tbody tr:only-child")
    assert tab.text_content(told) == ""
    assert store.sql(query).num_rows == 2
