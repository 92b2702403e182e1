"""Runs in the explorer: what their pages say, and where their numbers lead."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cellstore.jobs.workspace import Workspace
from cellstore.query.engine import open_questions
from cellstore.report.leaderboard import list_runs
from cellstore.report.scoring import report


@pytest.fixture(scope="module")
def about(screen: Workspace) -> dict[str, Any]:
    """Two predict runs, the run that trained the first, and what they have in common."""
    board = list_runs(screen)
    best, other = board.runs[0], board.runs[1]
    return {"run": best.predict_runs[-1], "train": best.train_runs[-1], "best": best,
            "other": other.predict_runs[-1]}  # fmt: skip


def words(text: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def links(text: str) -> list[str]:
    return [unescape(link) for link in re.findall(r'href="([^"]+)"', text)]


def asked(workspace: Workspace, sql: str, *values: Any) -> list[Any]:
    with open_questions(workspace) as questions:
        return list(questions.ask(sql, list(values)).rows())


def test_runs_are_listed_by_stage(client: TestClient, about: dict[str, Any]) -> None:
    every = client.get("/runs").text
    assert f"{about['run']}, predict" in words(every)
    some = words(client.get("/runs?stage=train").text)
    assert f"{about['train']}, train" in some
    assert f"{about['run']}, predict" not in some
    assert client.get("/runs?stage=nothing").status_code == 400
    ranked = words(client.get("/runs/ranked").text)
    assert f"{100 * about['best'].accuracy:.1f} %" in ranked
    assert client.get("/runs/ranked?split=unknown").status_code == 404
    assert client.get("/run/999").status_code == 404
    assert client.get(f"/run/{2**70}").status_code == 404


def test_the_report_of_a_run_says_what_report_says(
    client: TestClient, screen: Workspace, about: dict[str, Any]
) -> None:
    """The same scores, though wells and cells are not read, and pictures of fields of one plate."""
    whole = report(screen, str(about["run"]))
    quick = report(screen, str(about["run"]), only_images=True)
    assert quick.score("image", "hard").accuracy == whole.score("image", "hard").accuracy
    assert quick.score("image", "soft").low == whole.score("image", "soft").low
    assert [(x.label, x.correct, x.low) for x in quick.by_class] == [
        (x.label, x.correct, x.low) for x in whole.by_class
    ]
    assert quick.against_nulls == whole.against_nulls
    assert quick.leak == whole.leak
    text = client.get(f"/run/{about['run']}/report").text
    said = words(text)
    assert f"{100 * about['best'].accuracy:.1f} %" in said
    assert whole.against_nulls in said
    assert re.search(r"\w+ is recognised best, \w+ worst\.|are recognised equally often;", said)
    pairs = re.findall(r"negative control \(DMSO\) (\S+) \w+", said)
    assert len(pairs) == 2
    assert text.count("data:image/jpeg") == 4
    assert "<script" not in text


def test_numbers_of_the_matrix_lead_to_as_many_images(
    client: TestClient, screen: Workspace, about: dict[str, Any]
) -> None:
    text = client.get(f"/run/{about['run']}/report").text
    table = text[text.index('<table class="matrix">') :]
    cells = re.findall(r'<td class="(?:right|same|other)"[^>]*><a href="([^"]+)">(\d+)</a>', table)
    assert sum(int(count) for _, count in cells) == report(screen, str(about["run"])).images
    for address, count in cells[:3]:
        page = client.get(unescape(address)).text
        assert page.count("/thumbnail?") == int(count)
    sums = "SELECT truth, predicted, n FROM confusion WHERE run_id = ? AND level = 'cell'"
    known = asked(screen, f"{sums} AND subset = 'test'", about["run"])
    squares = re.findall(r">(\d+)(?:</a>)?</td>", client.get(f"/run/{about['run']}/cells").text)
    assert sorted(map(int, squares)) == sorted(n for _, _, n in known)


def test_images_are_chosen_as_saved_questions_choose_them(
    client: TestClient, screen: Workspace, about: dict[str, Any]
) -> None:
    run, other = about["run"], about["other"]
    wrong = asked(
        screen,
        "SELECT count(*) FROM votes WHERE run_id = ? AND level = 'image' AND vote = 'hard' "
        "AND NOT correct",
        other,
    )
    found = client.get(f"/run/{other}/images?show=wrong").text
    assert words(found).count("labels and subsets") == 0
    assert f"{wrong[0][0]} image" in words(found)
    differ = asked(
        screen,
        "SELECT count(*) FROM votes AS a JOIN votes AS b ON a.image_id = b.image_id "
        "AND b.level = 'image' AND b.vote = 'hard' AND b.run_id = ? "
        "WHERE a.run_id = ? AND a.level = 'image' AND a.vote = 'hard' AND a.winner <> b.winner",
        other,
        run,
    )
    beside = words(client.get(f"/run/{run}/images?other={other}").text)
    assert f"{differ[0][0]} image" in beside
    assert f"Run {other}:" in beside
    for bad in ("show=nothing", "page=0", "subset=none", "other=x"):
        assert client.get(f"/run/{run}/images?{bad}").status_code == 400
    assert client.get(f"/run/{about['train']}/images").status_code == 404
    assert "There is no such image." in client.get(f"/run/{run}/images?label=<b>").text


def test_each_run_has_a_page(client: TestClient, screen: Workspace, about: dict[str, Any]) -> None:
    for run, stage in asked(screen, "SELECT id, stage FROM runs ORDER BY id"):
        page = client.get(f"/run/{run}")
        assert page.status_code == 200, stage
        assert f"Run {run}: " in words(page.text)
    train = client.get(f"/run/{about['train']}").text
    assert f"/run/{about['run']}" in links(train)
    assert client.get(f"/run/{about['train']}/doses").status_code == 404
    curves = client.get(f"/run/{about['train']}/curves")
    assert "baselines learn in one go" in curves.text


def test_lineage_leads_from_box_to_box(
    client: TestClient, screen: Workspace, about: dict[str, Any], tmp_path: Path
) -> None:
    """Each box of an image's history leads to its page, and the page shows the image."""
    named = "SELECT plate, well, site, image_id FROM votes WHERE run_id = ? AND level = 'image'"
    plate, well, site, image = asked(screen, f"{named} ORDER BY image_id LIMIT 1", about["run"])[0]
    page = client.get(f"/lineage/image/{plate}%2F{well}%2F{site}")
    assert page.text == client.get(f"/lineage/image/{image}").text
    assert "data:image/jpeg" in page.text
    known = ("/run/", "/field/", "/lineage/")
    found = {link for link in links(page.text) if link.startswith(known)}
    assert {f"/run/{about['run']}", f"/run/{about['train']}", f"/field/{image}"} <= found
    for link in found:
        assert client.get(link).status_code == 200, link
    cell = asked(screen, "SELECT min(cell_id) FROM prediction_table WHERE image_id = ?", image)[0][
        0
    ]
    for address in (f"cell/{cell}", f"well/{plate}%2F{well}", f"plate/{plate}", "run/latest"):
        assert client.get(f"/lineage/{address}").status_code == 200, address
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    for address in (f"artifact/{outside}", "artifact/unknown", "run/999", "nothing/1"):
        assert client.get(f"/lineage/{address}").status_code == 404, address


def test_keys_walk_over_the_matrix(tab: Any, site: str, about: dict[str, Any]) -> None:
    """In a browser: parts arrive after the page, arrows go to squares with images, Enter opens."""
    tab.goto(f"{site}/run/{about['other']}")
    squares = tab.locator("#confusion table.matrix td a")
    squares.first.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.closest('tr').rowIndex") == 2
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/images?**")
    assert tab.locator("figure.card").count() > 0
