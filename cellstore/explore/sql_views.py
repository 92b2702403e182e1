"""Questions in SQL, saved questions, and their answers as tables and as files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import QueryError, UserInputError
from ..io.tables import csv_parts, parquet_parts
from ..models import Run
from ..notebooks import LONG, json_value
from ..query.describe import described
from ..query.engine import Answer, Questions
from ..query.saved_queries import (
    NOTHING,
    STAGES,
    SavedParameter,
    SavedQuestion,
    bound,
    find_question,
    saved_questions,
)
from .requests import asking, explorer_of, page, text, url_of, waited_for

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS, SHOWN_COLUMNS = 500, 200
"""Of an answer, on a page; a file has all of it."""
SECONDS = 300.0
"""How long a question of a person may take."""
LONGEST_QUESTION = 20_000
"""Characters of a question: it is a part of an address."""
LISTED_RUNS = 200
LONGEST_TITLE = 10_000
FILES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
_PAGES = {"plate": "plate", "barcode": "plate", "image_id": "field", "cell_id": "cell"}
_PAGES |= {"run_id": "run"}
"""Columns whose values name a thing with a page of its own; wells need their plate, too."""


def sql_page(request: Request) -> Response:
    """The box for questions; one that the address brings is asked at once, if it is of ours."""
    return page(request, "sql.html.j2", q=_typed(request), runs_itself=_is_ours(request))


def names(request: Request) -> Response:
    """Every table, view and feature set with its columns, for the list and for completion."""
    with asking(request) as questions:
        found = described(questions)
    order = {"view": 0, "feature set": 1, "table": 2, "step": 3}
    relations = [
        {
            "name": item.name,
            "kind": item.kind,
            "words": item.words,
            "columns": [(column.name, column.type, column.words) for column in item.columns],
        }
        for item in sorted(found, key=lambda item: order[item.kind])
    ]
    return JSONResponse(json_value(relations))


def list_page(request: Request) -> Response:
    """All saved questions, and what is wrong with own ones that cannot be asked."""
    found, problems = saved_questions(explorer_of(request).workspace)
    return page(request, "questions.html.j2", questions=found, problems=problems)


def question_page(request: Request) -> Response:
    """A saved question with a form for its parameters."""
    question = find_question(explorer_of(request).workspace, request.path_params["name"])
    given = _given(request, question)
    fields = []
    for item in question.parameters:
        default = "" if item.default in (None, NOTHING) else str(item.default)
        fields.append((item, given.get(item.name, default), _choices(request, item)))
    missing = any(item.default is None and not value for item, value, _ in fields)
    return page(
        request,
        "question.html.j2",
        question=question,
        fields=fields,
        runs_itself=_is_ours(request) and not missing,
    )


def answer(request: Request) -> Response:
    """The first rows of an answer, as a part of a page."""
    began = time.monotonic()
    _check_ours(request)
    rows: list[Sequence[Any]] = []
    count, stopped = 0, ""
    try:
        sql, values = _asked(request)
        with asking(request, SECONDS) as questions:
            found = questions.ask(sql, values)
            schema = found.schema
            try:
                for batch in found.batches():
                    part = batch.slice(0, max(0, SHOWN_ROWS - len(rows)))
                    if part.num_rows:
                        columns = [_values(c) for c in part.columns[:SHOWN_COLUMNS]]
                        rows += zip(*columns, strict=True)
                    count += batch.num_rows
            except QueryError as error:
                if len(rows) < SHOWN_ROWS:
                    raise
                stopped = str(error)
    except UserInputError as error:
        line = getattr(error, "line", None)
        lines = sql.splitlines() if line else []
        wrong = lines[line - 1].strip() if line and line <= len(lines) else ""
        wrong = wrong[:LONG]
        return page(request, "answer.html.j2", 400, error=str(error), line=line, wrong=wrong)
    heads = schema.names[:SHOWN_COLUMNS]
    here = request.url.path
    query = f"?{request.url.query}" if request.url.query else ""
    return page(
        request,
        "answer.html.j2",
        error="",
        heads=[(name, str(schema.field(i).type)) for i, name in enumerate(heads)],
        rows=[_shown(heads, row) for row in rows],
        count=count,
        columns=len(schema.names),
        stopped=stopped,
        seconds=time.monotonic() - began,
        files={kind: f"{here}.{kind}{query}" for kind in FILES},
    )


def download(request: Request) -> Response:
    """All rows of an answer as a file, which is written while it is sent."""
    _check_ours(request)
    sql, values = _asked(request)
    name = request.path_params.get("name", "answer")
    kind = request.path_params["kind"]
    return as_file(request, f"{name}.{kind}", lambda found: found.ask(sql, values))


def as_file(request: Request, name: str, ask: Callable[[Questions], Answer]) -> Response:
    """Return the rows of what is asked as a file; the ending of its name says in which form."""
    kind = name.rpartition(".")[2]
    if kind not in FILES:
        raise HTTPException(404, f"An answer comes as {' or '.join(FILES)}.")
    with ExitStack() as stack:
        questions = stack.enter_context(explorer_of(request).reader.questions(SECONDS))
        with waited_for(request, questions):  # what is wrong shows before the first byte is sent
            found = ask(questions)
            schema, batches = found.schema, found.batches()
            first = list(next(([batch] for batch in batches), []))
        kept = stack.pop_all()
    write = csv_parts if kind == "csv" else parquet_parts
    parts = _lent(kept, write(schema, chain(first, batches)))
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(parts, media_type=FILES[kind], headers=headers)


def _lent(stack: ExitStack, parts: Iterator[bytes]) -> Iterator[bytes]:
    with stack:
        yield from parts


def _typed(request: Request) -> str:
    found = request.query_params.get("q", "")
    if len(found) > LONGEST_QUESTION:
        raise UserInputError(
            f"The question is longer than {LONGEST_QUESTION:,} characters. Save it in a file and "
            "run: cellstore sql --file FILE"
        )
    return found


def _asked(request: Request) -> tuple[str, Mapping[str, object]]:
    """The saved question of the path, or what was typed, and what is bound to its parameters."""
    name = request.path_params.get("name")
    if name is None:
        return _typed(request), {}
    workspace = explorer_of(request).workspace
    question = find_question(workspace, name)
    return question.query, bound(workspace, question, _given(request, question))


def _given(request: Request, question: SavedQuestion) -> dict[str, str]:
    """The parameters that the address gives; of several values, as of two runs, all."""
    found = {}
    for item in question.parameters:
        every = [value for value in request.query_params.getlist(item.name) if value.strip()]
        if every and (one := text(request, item.name)):
            found[item.name] = ",".join(every) if item.kind == "two predict runs" else one
    return found


def _choices(request: Request, item: SavedParameter) -> list[tuple[str, str]]:
    """The runs that a parameter may name, in words; nothing of one that names none."""
    if item.kind not in STAGES:
        return []
    query = select(Run.id, Run.stage, Run.started_at).order_by(Run.id.desc())
    if stages := STAGES[item.kind]:
        query = query.where(Run.stage.in_(stages))
    with explorer_of(request).workspace.database.read() as session:
        return [
            (str(row.id), f"run {row.id}, {row.stage.value} of {row.started_at:%d %b %Y}")
            for row in session.execute(query.limit(LISTED_RUNS))
        ]


def _is_ours(request: Request) -> bool:
    """Whether a person typed the address or followed a link of ours: no other site asks here."""
    return request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _check_ours(request: Request) -> None:
    if not _is_ours(request):
        raise HTTPException(403, "Another site asked for this. Open /sql and ask it there.")


def _values(column: pa.Array) -> list[Any]:
    try:
        return [json_value(value) for value in column.to_pylist()]
    except (ValueError, OverflowError):  # a time that Python has no date for
        return list(column.cast("string").to_pylist())


def _shown(heads: Sequence[str], row: Sequence[Any]) -> list[tuple[str, str, str, str]]:
    """Return each value as text, its class, where it leads, and the whole where it was cut."""
    plates = [row[heads.index(name)] for name in ("plate", "barcode") if name in heads]
    found = []
    for name, value in zip(heads, row, strict=True):
        kind = "n" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        whole = words = str(value)
        if value is None:
            whole = words = kind = "null"
        elif isinstance(value, bool):
            whole = words = "true" if value else "false"
        elif isinstance(value, float):
            words = f"{value:.6g}"
        link = ""
        if value is not None and name in _PAGES:
            link = url_of(_PAGES[name], value)
        elif name == "well" and value is not None and [*plates, None][0] is not None:
            link = url_of("well", plates[0], value)
        words = words if len(words) <= LONG else f"{words[: LONG - 1]}…"
        found.append((words, kind, link, whole[:LONGEST_TITLE] if whole != words else ""))
    return found


ROUTES = [
    Route("/sql", sql_page),
    Route("/sql/names", names),
    Route("/sql/answer", answer),
    Route("/sql/answer.{kind}", download),
    Route("/questions", list_page),
    Route("/questions/{name}", question_page),
    Route("/questions/{name}/answer", answer),
    Route("/questions/{name}/answer.{kind}", download),
]
