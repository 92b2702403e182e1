"""The server of the explorer: who may ask, which pages there are, and what becomes of errors.

Only this machine is answered, unless another host is asked for; then a browser has to know a token,
which is a part of the link that is printed. A page of another site can neither read nor write:
``Host`` is checked against its trick of a name that leads here, ``Origin`` and a CSRF token where
something is written, and the policy of each page (CSP) allows no script but ours.
"""

from __future__ import annotations

import ctypes
import hmac
import secrets
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from importlib import import_module
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import CellstoreError, UnknownNameError
from ..jobs.workspace import Workspace
from .requests import Explorer, page

VIEWS = (
    "annotate_views",
    "plate_views",
    "field_views",
    "run_views",
    "cell_views",
    "scatter_views",
    "sql_views",
)
"""The modules of the pages: ``ROUTES`` of each, and ``WRITING_ROUTES`` of some with ``--write``."""
READING_POSTS = frozenset(("/selection",))
"""Paths whose POST changes nothing of the store; their endpoints check the CSRF token."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LARGEST_BODY = 32 << 20
"""Bytes of a request: a bit for each cell that may be selected."""
LONGEST_ADDRESS = 32_768
COOKIE = "cellstore_token"
MALLOC_ARENA_MAX = -8
"""Of ``mallopt`` in malloc.h."""
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests that no page of ours would make, and adds the headers of safety."""

    def __init__(self, app: ASGIApp, explorer: Explorer, hosts: frozenset[str] | None) -> None:
        """``hosts``: the names under which the server may be asked for; ``None``: any."""
        self.app, self.explorer, self.hosts = app, explorer, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, send_safely)
            return
        await self.app(scope, _bounded(receive), send_safely)

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        request = Request(scope)
        host = headers.get("host", "")
        name = _hostname(host)
        if not name or (self.hosts is not None and name not in self.hosts):
            return _refuse(421, "This address is not of the explorer. Use the one it has printed.")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_ADDRESS:
            return _refuse(414, "The address is too long.")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return _refuse(400, "The length of the request is no number.")
        if len(length) > 12 or int(length) > LARGEST_BODY:
            return _refuse(413, "The request is too large.")
        if (token := self.explorer.token) is not None:
            given = request.query_params.get("token")
            if given is not None and _same(given, token):
                rest = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
                path = (scope.get("raw_path") or request.url.path.encode()).decode("latin-1")
                there = path + (f"?{urlencode(rest)}" if rest else "")
                answer = RedirectResponse("/" + there.lstrip("/"), 303)
                answer.set_cookie(COOKIE, token, httponly=True, samesite="lax")
                return answer
            if not _same(request.cookies.get(COOKIE, ""), token):
                return _refuse(403, "Open the link that cellstore explore has printed.")
        site = headers.get("sec-fetch-site", "none")
        if site == "cross-site" and headers.get("sec-fetch-mode", "navigate") != "navigate":
            return _refuse(403, "Another site asked for this.")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin", "")
            if origin.partition("://")[2] != host or not host:
                return _refuse(403, "Another site asked for this.")
            if not self.explorer.write and scope["path"] not in READING_POSTS:
                return _refuse(405, "This explorer only reads. Start it with --write to change.")
        return None


def check_csrf(request: Request) -> None:
    """Check that a page that writes has sent the token of this server along."""
    if not _same(request.headers.get("x-csrf-token", ""), request.app.state.explorer.csrf):
        raise HTTPException(403, "Load the page again, then repeat this.")


def _same(given: str, known: str) -> bool:
    return bool(known) and hmac.compare_digest(given.encode(), known.encode())


def _hostname(host: str) -> str:
    try:
        there = urlsplit(f"//{host}")
        return "" if there.username is not None or there.port == 0 else there.hostname or ""
    except ValueError:  # no port, or no address of IPv6
        return ""


def _refuse(status: int, words: str) -> Response:
    return PlainTextResponse(words + "\n", status)


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            raise HTTPException(413, "The request is too large.")
        return message

    return bounded


def static(request: Request) -> Response:
    """Return a script or a style of ours."""
    name = request.path_params["name"]
    folder = "cellstore.report.templates" if name == "page.css" else "cellstore.explore.static"
    known = {item.name: item for item in files(folder).iterdir()}
    suffix = "." + name.rpartition(".")[2]
    if name not in known or suffix not in TYPES:
        raise UnknownNameError(f"There is no {name}.")
    return Response(known[name].read_bytes(), media_type=TYPES[suffix],
                    headers={"Cache-Control": "no-cache"})  # fmt: skip


def _wrong(request: Request, error: Exception) -> Response:
    """An error as a page, or as a line of text where a script has asked."""
    status, words = HTTPStatus.INTERNAL_SERVER_ERROR, ""
    if isinstance(error, HTTPException):
        status, words = HTTPStatus(error.status_code), error.detail
    elif isinstance(error, CellstoreError):
        unknown = isinstance(error, UnknownNameError)
        status = HTTPStatus.NOT_FOUND if unknown else HTTPStatus.BAD_REQUEST
        words = str(error)
    else:
        reason = str(error).strip().splitlines() or ["no reason given"]
        words = f"Something unexpected happened ({type(error).__name__}: {reason[0][:200]})."
        traceback.print_exception(error, file=sys.stderr)
    found: Response
    if request.headers.get("sec-fetch-dest", "document") not in ("document", "iframe"):
        found = PlainTextResponse(words.encode("utf-8", "replace"), status)
    else:
        found = page(request, "error.html.j2", status, title=status.phrase, words=words)
    found.headers.update(HEADERS)  # of what is unexpected, the guard does not hear
    return found


def make_app(
    workspace: Workspace,
    *,
    write: bool = False,
    hosts: frozenset[str] | None = frozenset({"127.0.0.1", "localhost", "::1", "testserver"}),
    token: str | None = None,
) -> Starlette:
    """Return the application; ``hosts`` are its names (``None``: any, with a ``token``)."""
    explorer = Explorer(workspace, write, secrets.token_urlsafe(24), token)
    routes = [Route("/static/{name}", static)]
    for name in VIEWS:
        views = import_module(f".{name}", __package__)
        routes += views.ROUTES
        routes += getattr(views, "WRITING_ROUTES", ()) if write else ()
    handlers: Any = dict.fromkeys((HTTPException, CellstoreError, Exception), _wrong)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(Guard, explorer=explorer, hosts=hosts)
    app.state.explorer = explorer
    return app


def serve(
    workspace: Workspace,
    *,
    port: int,
    host: str,
    write: bool,
    ready: Callable[[str], None],
) -> None:
    """Answer until Ctrl-C; ``ready`` is told the address when the pages can be opened.

    Raises UserInputError.
    """
    import socket

    import uvicorn

    from ..errors import UserInputError

    # glibc gives threads areas of memory of their own, and keeps what pictures have left in each.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MALLOC_ARENA_MAX, 2)
    local = is_loopback(host)
    token = None if local else secrets.token_urlsafe(24)
    hosts = frozenset({"127.0.0.1", "localhost", "::1", host}) if local else None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserInputError(
            f"Port {port} of {host} cannot be used: {error.strerror or error}. "
            "Choose another one with --port; 0 takes a free one."
        ) from error
    app = make_app(workspace, write=write, hosts=hosts, token=token)
    reader = app.state.explorer.reader
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    server = uvicorn.Server(config)
    stopping = threading.Event()

    def look_after() -> None:
        told = False
        while not stopping.wait(0.05 if not told else 5.0):
            if server.started and not told:
                told = True
                ready(address + (f"?token={token}" if token else ""))
                reader.warm(stopping)
            reader.close_unused()

    threading.Thread(target=look_after, daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        stopping.set()
        reader.close()
        listening.close()
