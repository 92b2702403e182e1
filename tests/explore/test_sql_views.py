"""Questions in the explorer: answers, what is refused, files, saved questions, and the box."""

from __future__ import annotations

import io
import threading
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
from starlette.testclient import TestClient

from cellstore.jobs.workspace import Workspace
from cellstore.query.engine import Questions
from cellstore.query.saved_queries import shipped_questions
from cellstore.store import Store

CELLS = "SELECT cell_id, plate, well, area, [area, NULL] AS pair FROM cell_table ORDER BY cell_id"


def test_an_answer_counts_its_rows_and_leads_to_its_things(
    client: TestClient, screen: Workspace
) -> None:
    found = client.get("/sql/answer", params={"q": CELLS}).text
    cells = Store(screen).sql("SELECT count(*) AS n FROM cell_table").to_pylist()[0]["n"]
    assert f"<b>{cells:,} rows</b>" in found
    shown = min(cells, 500)
    assert found.count("<tr>") == shown + 1
    assert ("first 500 are shown" in found) == (cells > 500)
    missing = client.get(
        "/sql/answer", params={"q": "SELECT NULL AS x, 1e0 / 3 AS y, 3e0 AS z"}
    ).text
    assert '<td class="null">null</td>' in missing
    assert (
        '<td class="n" title="0.3333333333333333">0.333333</td><td class="n" title="3.0">3</td>'
        in missing
    )
    nothing = client.get("/sql/answer", params={"q": "SELECT 1 AS one WHERE false"}).text
    assert "with no rows. Columns: one" in nothing


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("DELETE FROM plates", "can only read"),
        ("COPY plates TO 'out.csv'", "can only read"),
        ("SET memory_limit = '9GB'", "can only read"),
        ("FROM read_text('/etc/passwd')", "cannot read read_text()"),
        ("FROM '/etc/passwd'", "/etc/passwd"),
        ("SELECT current_setting('threads')", "cannot read current_setting()"),
        ("SELECT 1; SELECT 2", "one at a time"),
        ("", "There is no question"),
        ("SELECT 1 \0", "NUL"),
    ],
)
def test_a_question_that_does_more_than_read_is_refused(
    client: TestClient, sql: str, words: str
) -> None:
    for path in ("/sql/answer", "/sql/answer.csv"):
        found = client.get(path, params={"q": sql})
        assert found.status_code == 400
        assert words in found.text
        assert "root:" not in found.text
        assert "Traceback" not in found.text


def test_an_error_names_the_line(client: TestClient) -> None:
    sql = "SELECT plate,\n  <i>wel\nFROM well_table"
    found = client.get("/sql/answer", params={"q": sql.replace("<i>", "")}).text
    assert 'data-line="2"' in found
    assert "Line 2: <code>wel</code>" in found
    escaped = client.get("/sql/answer", params={"q": sql}).text
    assert "&lt;i&gt;wel" in escaped


def test_values_and_names_are_escaped_and_another_site_cannot_ask(client: TestClient) -> None:
    sql = """SELECT '<script>alert(1)</script>' AS "<b>x", '"><img src=x>' AS barcode, chr(8238)"""
    found = client.get("/sql/answer", params={"q": sql}).text
    assert "<script" not in found
    assert "<b>x" not in found
    assert "<img" not in found
    assert "\u202e" not in found
    page = client.get("/sql", params={"q": f"{sql}</textarea><script>"}).text
    assert "</textarea><script>" not in page
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert "data-runs" in client.get("/sql?q=SELECT+1").text
    led = client.get("/sql?q=SELECT+1", headers=elsewhere)
    assert "data-runs" not in led.text
    assert "press Ask" in led.text
    for path in ("/sql/answer?q=SELECT+1", "/sql/answer.csv?q=SELECT+1"):
        assert client.get(path, headers=elsewhere).status_code == 403
    long = client.get("/sql", params={"q": "x" * 20_001})
    assert (long.status_code, "cellstore sql --file" in long.text) == (400, True)


def test_files_hold_the_whole_answer(client: TestClient, screen: Workspace) -> None:
    expected = Store(screen).sql(CELLS)
    parquet = client.get("/sql/answer.parquet", params={"q": CELLS})
    assert 'filename="answer.parquet"' in parquet.headers["content-disposition"]
    assert pyarrow.parquet.read_table(io.BytesIO(parquet.content)).equals(expected)
    text = client.get("/sql/answer.csv", params={"q": CELLS})
    read = pyarrow.csv.read_csv(io.BytesIO(text.content))
    for name in ("cell_id", "plate", "well", "area"):
        assert read[name].to_pylist() == expected[name].to_pylist()
    area = expected["area"][0].as_py()
    assert read["pair"][0].as_py() == f"[{area}, null]"
    assert client.get("/sql/answer.exe", params={"q": CELLS}).status_code == 404
    empty = client.get("/sql/answer.csv", params={"q": "SELECT 1 AS a WHERE false"})
    assert empty.text.strip() == '"a"'


def test_saved_questions_are_pages(client: TestClient, screen: Workspace) -> None:
    listed = client.get("/questions").text
    for question in shipped_questions():
        assert f'href="/questions/{question.name}"' in listed
        assert client.get(f"/questions/{question.name}").status_code == 200
    page = client.get("/questions/disagreements").text
    assert "data-runs" not in page  # it needs two runs
    runs = "SELECT id FROM runs WHERE stage = 'predict' ORDER BY id LIMIT 2"
    first, second = Store(screen).sql(runs)["id"].to_pylist()
    params: Any = [("runs", str(first)), ("runs", str(second)), ("vote", "soft")]
    expected = Store(screen).ask("disagreements", runs=[first, second], vote="soft")
    found = client.get("/questions/disagreements/answer.parquet", params=params)
    assert pyarrow.parquet.read_table(io.BytesIO(found.content)).equals(expected)
    assert "data-runs" in client.get("/questions/disagreements", params=params).text
    assert (
        f"<b>{len(expected):,} row"
        in client.get("/questions/disagreements/answer", params=params).text
    )
    assert client.get("/questions/no-such").status_code == 404
    assert client.get("/questions/..%2F..%2Fx").status_code == 404
    wrong = client.get("/questions/accuracy/answer", params={"run": "<b>"})
    assert wrong.status_code == 400
    assert "<b>" not in wrong.text


def test_the_list_has_every_relation(client: TestClient, screen: Workspace) -> None:
    found = {item["name"]: item for item in client.get("/sql/names").json()}
    assert {item.name for item in Store(screen).schema()} == set(found)
    assert ["plate", "VARCHAR", "barcode of the plate"] in found["cell_table"]["columns"]


def test_the_box_completes_asks_and_cancels(
    tab: Any, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    interrupt = Questions.interrupt

    def noted(questions: Questions) -> None:
        interrupt(questions)
        stopped.set()

    monkeypatch.setattr(Questions, "interrupt", noted)
    tab.goto(f"{site}/sql")
    tab.wait_for_selector("#relations summary")
    tab.click("#q")
    tab.keyboard.type("SELECT count(*) AS n FROM plat")
    assert tab.locator("#names li code").first.inner_text() == "plates"
    tab.keyboard.press("Tab")
    assert tab.input_value("#q").endswith("FROM plates")
    tab.keyboard.type(" AS p WHERE p.bar")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.input_value("#q").endswith("p.barcode")
    tab.keyboard.type(" LIKE '%'")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("#answer td")
    assert tab.inner_text("#answer td") == "2"
    assert "q=SELECT" in tab.url
    tab.fill("#q", "SELECT sum(a.range * b.range) FROM range(10000000) a, range(1000000) b")
    tab.click("button.primary")
    tab.click("[data-cancel]")
    tab.wait_for_selector("text=Cancelled.")
    assert stopped.wait(5)  # the server has heard of it
