"""What people say of what they see: the page of it, and with ``--write`` the requests that add."""

from __future__ import annotations

import json
from typing import Any

from anyio import from_thread
from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..db.bulk import IN_AT_ONCE
from ..db.fields import is_label_now
from ..enums import ANNOTATION, Level
from ..errors import UserInputError
from ..jobs.lookup import readable
from ..models import Annotation
from ..query.saved_queries import shipped_questions
from ..stages.annotate import annotate, set_excluded, undo_annotations
from ..stages.corrections import LONGEST, Correction
from .requests import ask, explorer_of, page, text, url_of, whole
from .server import check_csrf

SHOWN = 100
"""Rows of a page of what was said."""
LONGEST_REASON = 1_000
"""Characters of a reason."""
KEYS = 9
"""Labels that have a key."""

_SAID = f"""
WITH said AS (
    SELECT level, row_id, field, label, user_name, created_at, reason, annotation_id
    FROM current_labels
    UNION ALL
    SELECT a.level, a.row_id, NULL, 'does not count', a.user_name, a.created_at, a.reason, a.id
    FROM annotations AS a
    JOIN later_exclusions AS e ON e.annotation_id = a.id
),
chosen AS (
    SELECT * FROM said
    WHERE ($field IS NULL OR coalesce(field, '') = $field)
    AND ($label IS NULL OR label = $label)
    AND ($user IS NULL OR user_name = $user)
    AND ($level IS NULL OR level = $level)
),
shown AS (
    SELECT * FROM chosen WHERE $before IS NULL OR annotation_id < $before
    ORDER BY annotation_id DESC LIMIT {SHOWN + 1}
)
SELECT
    c.*, p.barcode AS plate, w.name AS well, i.site, i.id AS image_id,
    (SELECT count(*) FROM chosen) AS n
FROM shown AS c
LEFT JOIN cells AS x ON c.level = 'cell' AND x.id = c.row_id
LEFT JOIN segmentations AS s ON s.id = x.segmentation_id
LEFT JOIN images AS i ON i.id = CASE WHEN c.level = 'image' THEN c.row_id ELSE s.image_id END
LEFT JOIN wells AS w ON w.id = coalesce(i.well_id, CASE WHEN c.level = 'well' THEN c.row_id END)
LEFT JOIN plates AS p ON p.id = coalesce(w.plate_id, CASE WHEN c.level = 'plate' THEN c.row_id END)
ORDER BY c.annotation_id DESC
"""  # noqa: S608 - a number of ours
_COUNTS = """
SELECT field, level, label, user_name, count(*) AS n
FROM current_labels GROUP BY ALL ORDER BY field, level, n DESC, label, user_name LIMIT 200
"""


def what_was_said(request: Request) -> Response:
    """Show labels, how far people agree, and with ``--write`` buttons that take labels back."""
    names = ("field", "label", "user", "level")
    given: dict[str, Any] = {name: text(request, name) for name in names}
    rows = ask(request, _SAID, {**given, "before": whole(request, "before")})
    more = rows[SHOWN:]
    for row in rows:
        row["name"], row["url"] = _named(row)
    (agreement,) = (item.query for item in shipped_questions() if item.name == "agreement")
    counts = ask(request, _COUNTS)
    choices = {
        "field": sorted({row["field"] for row in counts}),
        "label": sorted({row["label"] for row in counts} | {"does not count"}),
        "user": sorted({row["user_name"] for row in [*counts, *rows]}),
        "level": [level.value for level in Level],
    }
    here = {name: value for name, value in given.items() if value is not None}
    older = url_of("annotations", **here, before=rows[SHOWN - 1]["annotation_id"]) if more else None
    return page(
        request,
        "annotations.html.j2",
        rows=rows[:SHOWN],
        number=rows[0]["n"] if rows else 0,
        given=given,
        choices=choices,
        counts=counts,
        agreement=ask(request, agreement, {"field": given["field"]}),
        older=older,
    )


def _named(row: dict[str, Any]) -> tuple[str, str | None]:
    """What something is called, and the address of its page."""
    parts = [str(row[name]) for name in ("plate", "well", "site") if row[name] is not None]
    name = "/".join(parts) or f"{row['level']} {row['row_id']}"
    match row["level"]:
        case Level.CELL:
            there = None if row["image_id"] is None else row["row_id"]
            return f"cell {row['row_id']} of {name}", there and url_of("cell", there)
        case Level.IMAGE:
            return name, url_of("field", row["row_id"])
        case _:
            return name, url_of(row["level"], *parts) if parts else None


def used_labels(request: Request) -> Response:
    """Return the labels of a field that people gave most, for the keys."""
    field = readable(text(request, "field", ANNOTATION) or "")
    query = select(Annotation.value).where(Annotation.field == field, is_label_now(Annotation))
    query = query.group_by(Annotation.value).order_by(func.count().desc(), Annotation.value)
    with explorer_of(request).workspace.database.read() as session:
        found = list(session.scalars(query.limit(KEYS)))
    return JSONResponse({"field": field, "labels": found})


def _sent(request: Request) -> dict[str, Any]:
    """Return what a page has sent, checked: texts, and a list of ids or names.

    Raises HTTPException or UserInputError.
    """
    check_csrf(request)
    try:
        sent = json.loads(from_thread.run(request.body))
    except (ValueError, RecursionError):
        sent = None
    if not isinstance(sent, dict):
        raise UserInputError("This is not what a page of the explorer sends.")
    found: dict[str, Any] = {}
    for name in ("level", "label", "field", "user", "reason"):
        value = sent.get(name)
        if value is not None and not isinstance(value, str):
            raise UserInputError(f"{name} has to be a text.")
        value = readable(value or "")
        most = LONGEST_REASON if name == "reason" else LONGEST
        if len(value) > most or not value.isprintable():
            raise UserInputError(f"{name} has to be at most {most:,} printable characters.")
        found[name] = value or None
    ids = sent.get("ids")
    if ids is not None:
        right = isinstance(ids, list) and all(
            type(item) is str or (type(item) is int and abs(item) < 2**63) for item in ids
        )
        if not right or not 1 <= len(ids) <= IN_AT_ONCE:
            raise UserInputError(f"Choose 1 to {IN_AT_ONCE:,} at once.")
    return {**found, "ids": ids}


def _answer(done: Correction) -> Response:
    shown = [f"{item['name']}: {_words(item['new'])}" for item in done.changes]
    return JSONResponse({"said": "; ".join(shown[:3]), "notes": list(done.notes)})


def _words(new: dict[str, Any]) -> str:
    ((field, value),) = new.items()
    if field == "excluded":
        return "counts again" if value is None else f"does not count ({value})"
    return f"{'' if field == ANNOTATION else f'{field} '}{value or 'no label'}"


def add_label(request: Request) -> Response:
    """Give cells, images, wells or plates a label."""
    sent = _sent(request)
    if sent["label"] is None:
        raise UserInputError("Say which label.")
    done = annotate(
        explorer_of(request).workspace,
        sent["level"] or "",
        sent["ids"] or [],
        sent["label"],
        field=sent["field"] or ANNOTATION,
        user=sent["user"],
        reason=sent["reason"],
    )
    return _answer(done)


def exclude(request: Request) -> Response:
    """Let cells, images, wells or plates count nowhere, with a reason."""
    sent = _sent(request)
    if sent["reason"] is None:
        raise UserInputError("Say why it should not count.")
    more: dict[str, Any] = {"user": sent["user"], "reason": sent["reason"]}
    workspace = explorer_of(request).workspace
    return _answer(set_excluded(workspace, sent["level"] or "", sent["ids"] or [], True, **more))


def undo(request: Request) -> Response:
    """Take back the rows of ``ids``, or what the person said last."""
    sent = _sent(request)
    if not all(type(item) is int for item in sent["ids"] or ()):
        raise UserInputError("Name the label to take back by its number in table annotations.")
    more: dict[str, Any] = {"user": sent["user"], "reason": sent["reason"]}
    return _answer(undo_annotations(explorer_of(request).workspace, sent["ids"], **more))


ROUTES = [Route("/annotations", what_was_said)]
WRITING_ROUTES = [
    Route("/annotate/labels", used_labels),
    Route("/annotate", add_label, methods=["POST"]),
    Route("/annotate/exclude", exclude, methods=["POST"]),
    Route("/annotate/undo", undo, methods=["POST"]),
]
"""Those that are there with ``--write`` only."""
