"""Who may ask the server of the explorer, and what becomes of errors."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace


def test_a_page_comes_with_its_policy_and_an_unknown_one_is_a_page_too(client: TestClient) -> None:
    home = client.get("/")
    assert home.status_code == 200
    assert "script-src 'self'" in home.headers["content-security-policy"]
    missing = client.get("/nothing/of/this")
    assert missing.status_code == 404
    assert "Back to the start" in missing.text
    assert client.get("/static/page.css").status_code == 200
    assert client.get("/static/..%2Fserver.py").status_code == 404


def test_an_unexpected_error_is_a_page_with_the_policy(screen: Workspace) -> None:
    def broken(_: Request) -> Response:
        raise RuntimeError("<b>oh")

    app = make_app(screen)
    app.router.routes.append(Route("/broken", broken))
    answer = TestClient(app, raise_server_exceptions=False).get("/broken")
    assert answer.status_code == 500
    assert "&lt;b&gt;oh" in answer.text
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    app.state.explorer.reader.close()


def test_another_host_and_another_site_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "attacker.example"}).status_code == 421
    fetched = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/", headers=fetched).status_code == 403
    assert client.post("/", headers={"origin": "http://attacker.example"}).status_code == 403
    assert client.post("/", headers={"origin": "http://testserver"}).status_code == 405


def test_another_machine_needs_the_link(screen: Workspace) -> None:
    app = make_app(screen, hosts=None, token="secret")
    with TestClient(app) as client:
        assert client.get("/").status_code == 403
        assert client.get("/?token=wrong").status_code == 403
        assert client.get("/?token=secret&x=1").url.query == b"x=1"
        assert client.get("/").status_code == 200
    app.state.explorer.reader.close()


def test_the_browser_shows_the_home_page(tab: object, site: str) -> None:
    tab.goto(site)  # type: ignore[attr-defined]
    assert "cellstore" in tab.title()  # type: ignore[attr-defined]
