"""A field: its channels at full bit depth, its cells, and what is known of each of them."""

from __future__ import annotations

import hashlib
from textwrap import wrap

from markupsafe import escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import CellstoreError, UnknownNameError
from .pixels import field_thumbnail
from .requests import LONGEST_TEXT, explorer_of, text, whole


def chosen_channels(request: Request) -> list[str]:
    """Return the channels that an address names: ``?channels=DNA&channels=ER``."""
    return [name[:LONGEST_TEXT] for name in request.query_params.getlist("channels") if name][:50]


def image_id(request: Request) -> int:
    """Return the number of the image that an address names.

    Raises:
        UnknownNameError: it is no number.
    """
    found = str(request.path_params["image_id"])
    if not (found.isascii() and found.isdecimal() and len(found) < 19):
        raise UnknownNameError(f"There is no image {found[:40]!r}.")
    return int(found)


def bytes_once(request: Request, data: bytes, kind: str) -> Response:
    """Return ``data``, or only that the browser has them already."""
    mark = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"ETag": mark, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == mark:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


def sentence_picture(words: str) -> Response:
    """Return a picture that says why there is none: an ``<img>`` can show no text."""
    lines = wrap(words, 44)[:8]
    said = "".join(
        f'<text x="12" y="{24 + 18 * at}">{escape(line)}</text>' for at, line in enumerate(lines)
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 {24 + 18 * len(lines)}" '
        f'font-family="sans-serif" font-size="13" fill="#8a8f98">{said}</svg>'
    )
    return Response(svg.encode("utf-8", "replace"), 404, media_type="image/svg+xml")


def thumbnail(request: Request) -> Response:
    """A field as a picture; ``?width=&channels=&outlines=1&segmentation=``."""
    try:
        picture = field_thumbnail(
            explorer_of(request),
            image_id(request),
            width=whole(request, "width", 360) or 0,
            channels=chosen_channels(request),
            outlines=text(request, "outlines") is not None,
            segmentation_id=whole(request, "segmentation"),
        )
    except CellstoreError as error:
        return sentence_picture(str(error))
    return bytes_once(request, picture, "image/jpeg")


ROUTES = [Route("/field/{image_id}/thumbnail", thumbnail)]
