"""Home, plates and wells."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .requests import ask, page


def home(request: Request) -> Response:
    """The store at a glance."""
    plates = ask(request, "SELECT barcode FROM plates ORDER BY barcode LIMIT 500")
    return page(request, "home.html.j2", plates=plates)


ROUTES = [Route("/", home)]
