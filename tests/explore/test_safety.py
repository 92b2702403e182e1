"""What hostile requests and hostile names can do to the explorer: nothing."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from urllib.parse import quote, urlsplit

import pytest
from sqlalchemy import select
from starlette.routing import Route
from starlette.testclient import TestClient
from test_report_page import HOSTILE, named_screen

from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace
from cellstore.models import Plate

NAMES = (*HOSTILE[:7], "x" * 10_000)
"""No plate, well, run or question has such a name."""
NUMBERS = ("-1", "0", "99999999999999999999", "1e400", "NaN", "1.5", "\u0661", "1' OR 1=1 --", "")
PATHS = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "%00", "..\\..\\x", "C:\\x")
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200f]")


class Page(HTMLParser):
    """The elements of a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    @property
    def links(self) -> list[str]:
        return [values["href"] for tag, values in self.elements if tag == "a" and "href" in values]


def check(text: str) -> Page:
    """Check that a page holds no script, no handler and no address but our own; return it."""
    page = Page(text)
    for tag, values in page.elements:
        assert not [name for name in values if name.startswith("on")], (tag, values)
        assert tag not in ("iframe", "object", "embed", "base"), values
        if tag == "script" and values.get("type") != "application/json":
            assert re.fullmatch(r"/static/[a-z_]+\.js", values.get("src", "")), values
        for name in ("href", "src", "action", "formaction", "data-part", "xlink:href"):
            if name in values and not values[name].startswith(("data:image/", "data:,")):
                there = urlsplit(values[name])
                assert (there.scheme, there.netloc) == ("", ""), (tag, values)
    assert not re.findall(f".{{0,80}}{HIDDEN.pattern}", text)
    return page


@pytest.fixture
def hostile(sqlite_workspace: Workspace) -> Iterator[TestClient]:
    """The pages about a screen in which everything that a user named has a hostile name."""
    named_screen(sqlite_workspace, HOSTILE)
    app = make_app(sqlite_workspace, write=True)
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as made:
        yield made
    app.state.explorer.reader.close()


def starts(workspace: Workspace) -> list[str]:
    """Addresses from which all pages are reached, of things with hostile names, too."""
    with workspace.database.read() as session:
        barcode = session.scalars(select(Plate.barcode)).one()
    fixed = ["/", "/plates", "/cells", "/scatter", "/runs", "/sql", "/annotations"]
    searches = [f"/search?q={quote(name[:200], safe='')}" for name in HOSTILE]
    columns = quote("SELECT barcode, '<b>' AS \"<script>\" FROM plates", safe="")
    return [*fixed, *searches, f"/plate/{quote(barcode, safe='')}", f"/sql?q={columns}"]


def kind_of(address: str) -> tuple[str, ...]:
    """What two addresses of the same page have in common: the first step, names of parameters."""
    there = urlsplit(address)
    names = sorted(re.findall(r"(?:^|&)([^=&]+)=", there.query))
    return (*there.path.split("/")[1:2], str(there.path.count("/")), *names)


def test_names_make_no_element_on_any_page(
    hostile: TestClient, sqlite_workspace: Workspace
) -> None:
    """All pages that links lead to, some of each kind."""
    waiting, seen = starts(sqlite_workspace), set[str]()
    visits: dict[tuple[str, ...], int] = {}
    while waiting:
        address = waiting.pop(0)
        kind = kind_of(address)
        if address in seen or visits.get(kind, 0) >= 2:
            continue
        seen.add(address)
        visits[kind] = visits.get(kind, 0) + 1
        answer = hostile.get(address)
        assert answer.status_code < 500, (address, answer.text[-400:])
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        if "text/html" not in answer.headers.get("content-type", ""):
            continue
        page = check(answer.text)
        more = [values["data-part"] for _, values in page.elements if values.get("data-part")]
        waiting += [link.split("#")[0] for link in [*page.links, *more] if link[:1] == "/"]
    assert len(seen) > 3


def pages_of(app: object) -> Iterator[tuple[Route, set[str], list[str]]]:
    """Each page with its methods and the parameters that its module reads."""
    for route in app.routes:  # type: ignore[attr-defined]
        source = inspect.getsource(sys.modules[route.endpoint.__module__])
        found = re.findall(r'(?:text|whole|choice|number|given|get)\((?:request, )?"(\w+)"', source)
        yield route, route.methods or set(), sorted(set(found))


def test_no_request_makes_the_server_fail(client: TestClient) -> None:
    """Hostile values in every part of every address: a page or a sentence, never a traceback."""
    values = [*NAMES[:7], *NUMBERS, *PATHS]
    for route, methods, parameters in pages_of(client.app):
        if "GET" not in methods:
            continue
        names = re.findall(r"\{(\w+)(?::\w+)?\}", route.path)
        for value in (*values, NAMES[7]) if names else ("",):
            path = re.sub(r"\{\w+(?::\w+)?\}", quote(value[:9_000], safe=""), route.path)
            answer = client.get(path)
            assert answer.status_code < 500, (path[:200], answer.text[-400:])
            assert "Traceback" not in answer.text
        one = re.sub(r"\{\w+(?::\w+)?\}", "1", route.path)
        for turn, parameter in enumerate(parameters, len(route.path)):
            given = {parameter: values[turn % len(values)]}
            answer = client.get(one, params=given)
            assert answer.status_code < 500, (one, given, answer.text[-400:])
            if "text/html" in answer.headers.get("content-type", ""):
                check(answer.text)


def test_what_is_not_there_is_a_page_that_says_so(client: TestClient) -> None:
    for address in ("/plate/none", "/well/none/A01", "/field/999999", "/run/999999", "/x"):
        answer = client.get(address)
        assert answer.status_code == 404, address
        assert "Back to the start" in answer.text
    script = client.get("/x", headers={"sec-fetch-dest": "empty"})
    assert script.status_code == 404
    assert "<" not in script.text


def test_only_the_names_of_this_machine_are_answered(client: TestClient) -> None:
    for host in ("127.0.0.1:80", "localhost", "LOCALHOST:9", "[::1]:8765"):
        assert client.get("/", headers={"host": host}).status_code == 200, host
    others = ("127.0.0.1.attacker.example", "attacker.example", "localhost@attacker.example", "")
    for host in (*others, "[bad", "0.0.0.0", "127.0.0.1:x"):
        assert client.get("/", headers={"host": host}).status_code in (400, 421), host


def test_writing_needs_a_page_of_ours(hostile: TestClient) -> None:
    """Of the same origin, with the token of this server, whatever the page."""
    csrf = hostile.app.state.explorer.csrf  # type: ignore[attr-defined]
    ours = {"origin": "http://testserver", "x-csrf-token": csrf}
    written = [route for route, methods, _ in pages_of(hostile.app) if "POST" in methods]
    for route in written:
        path = re.sub(r"\{\w+(?::\w+)?\}", "1", route.path)
        for headers in (
            {},
            {"x-csrf-token": csrf},
            {**ours, "origin": "null"},
            {**ours, "origin": "http://attacker.example"},
            {**ours, "origin": "http://testserver:81"},
            {**ours, "origin": "http://["},
            {**ours, "x-csrf-token": ""},
            {**ours, "x-csrf-token": csrf + "x"},
            {**ours, "x-csrf-token": "\xe9"},
            {"origin": "http://testserver"},
        ):
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            assert hostile.post(path, headers=raw, json={}).status_code == 403, (path, headers)
        for body in (
            b"",
            b"[]",
            b"{",
            b'{"a": NaN}',
            b"\xff\xfe",
            b"null",
            b"9" * 5_000,
            b"[" * 200_000,
        ):
            answer = hostile.post(path, headers=ours, content=body)
            assert answer.status_code < 500, (path, body[:20], answer.text[-400:])
        for named in (
            {"ids": [10**30]},
            {"user": "u" * 300},
            {"user": "a\nb"},
            {"reason": "r" * 2000},
        ):
            sent = {"level": "plate", "ids": [1], "label": "x", "reason": "y", **named}
            answer = hostile.post(path, headers=ours, json=sent)
            assert 400 <= answer.status_code < 500, (path, named, answer.text[-400:])
        large = hostile.post(path, headers=ours, content=b"x" * (33 << 20))
        assert large.status_code == 413
        parts = (b"x" * (1 << 20) for _ in range(33))  # without its length at the head
        assert hostile.post(path, headers=ours, content=parts).status_code == 413


def test_odd_methods_lengths_and_addresses_are_refused(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
        assert client.request(method, "/").status_code in (403, 405), method
    assert client.head("/").status_code == 200
    assert client.get("/?x=" + "y" * 40_000).status_code == 414
    for length in ("-1", "abc", "9" * 30):
        headers = {"origin": "http://testserver", "content-length": length}
        assert client.post("/", headers=headers).status_code in (400, 405, 413), length


def test_a_link_of_another_machine_sends_nobody_elsewhere(screen: Workspace) -> None:
    """The token goes into a cookie, and the address is one of ours."""
    app = make_app(screen, hosts=None, token="secret")
    with TestClient(app, follow_redirects=False) as asked:
        for path in ("//attacker.example/", "/\\attacker.example/", "/%2f/attacker.example"):
            there = asked.get(f"http://testserver{path}?token=secret").headers["location"]
            assert re.match(r"/(?![/\\])", there), there
            assert "secret" not in there
        there = asked.get("http://testserver/plate/a%2Fb?token=secret").headers["location"]
        assert there == "/plate/a%2Fb"
        assert asked.get("/?token=secret", headers={"host": "["}).status_code == 421
        answer = asked.get("/?token=secret&a=1")
        assert "HttpOnly" in answer.headers["set-cookie"]
        for cookie in (b"cellstore_token=wr\xf6ng", b"cellstore_token=", b"cellstore_token"):
            asked.cookies.clear()
            assert asked.get("/", headers={"cookie": cookie}).status_code == 403
    app.state.explorer.reader.close()


def test_no_template_and_no_script_has_a_way_round_the_policy() -> None:
    """No inline script or handler; nothing made of text at run time; nothing from elsewhere."""
    templates = [
        item for item in files("cellstore.explore.templates").iterdir() if item.name.endswith(".j2")
    ]
    assert templates
    for item in templates:
        text = item.read_text(encoding="utf-8")
        for script in re.findall(r"<script\b([^>]*)>", text):
            assert 'src="/static/' in script or 'type="application/json"' in script, item.name
        assert not re.search(r"\son[a-z]+\s*=\s*[\"'{]", text), item.name
        assert not re.search(r"javascript:|https?://|autoescape false|<style", text), item.name
    for item in files("cellstore.explore.static").iterdir():
        if item.name.endswith(".js"):
            text = item.read_text(encoding="utf-8")
            bad = r"\beval\(|new Function|document\.write|outerHTML|insertAdjacentHTML|javascript:"
            assert not re.search(bad, text), item.name
            other = re.findall(r"https?://(?!www\.w3\.org/)\S+", text)
            assert not other, (item.name, other)
            assert not re.search(r"set(?:Timeout|Interval)\(\s*[\"'`]", text), item.name
