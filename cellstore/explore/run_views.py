"""Runs, what they found, and the lineage of everything."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import joinedload
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..enums import Stage, Status, Subset
from ..errors import UnknownNameError, UserInputError, some_of
from ..models import Run, Split
from ..report.audit import KINDS, audit, shown
from ..report.drawing import interval_bar
from ..report.hits_figures import MARKS
from ..report.leaderboard import Leaderboard, list_runs
from ..report.lineage_page import lineage_content
from ..report.report_figures import confusion_of, matrix_of, training_curves
from ..report.report_page import report_content
from ..report.scoring import report
from ..report.votes import SUBSETS
from ..settings import need
from ..stages.hits import hits_result
from .requests import (
    ask,
    choice,
    explorer_of,
    kept,
    page,
    row_of,
    runs_done,
    text,
    url_of,
    whole,
)

RUNS = 100
"""Runs of a page."""
IMAGES = 48
"""Images of a page."""
HIT_ROWS = 1_000
"""Treatments that are listed."""
CURVES = 6
"""Treatments whose dose curves are drawn."""
LISTED = 40
"""Values of a list that are shown."""

DID = {
    Stage.INGEST: "images and tables read in",
    Stage.SEGMENT: "cells found in images",
    Stage.MEASURE: "cells measured",
    Stage.QC: "unusual images and cells flagged",
    Stage.SPLIT: "images divided into subsets",
    Stage.TRAIN: "training",
    Stage.PREDICT: "labels of cells",
    Stage.FINETUNE: "a network taught to find cells",
    Stage.PROFILE: "profiles of wells",
    Stage.HITS: "treatments compared with the controls",
}

WITH_MODEL = (joinedload(Run.recipe), joinedload(Run.parent).joinedload(Run.recipe))
"""What a run is read with, to say which model it is of."""
SHOWS = {"wrong": "surest and wrong", "ties": "ties", "right": "right", "all": "all"}
"""Images that are listed, and what people call them."""
VOTED_IMAGES = """
    SELECT v.image_id, v.plate, v.well, v.site, v.control, v.truth, v.winner, v.runner_up, v.share,
        v.n_cells, v.tie, v.correct, v.abstained, r.well_in_training AS seen,
        o.winner AS other_winner, o.correct AS other_correct, count(*) OVER () AS total
    FROM votes AS v
    JOIN run_images AS r ON r.run_id = v.run_id AND r.image_id = v.image_id
    LEFT JOIN votes AS o ON o.run_id = $other AND o.level = 'image' AND o.vote = 'hard'
        AND o.image_id = v.image_id AND o.abstained IS NULL
    WHERE v.run_id = $run AND v.level = 'image' AND v.vote = 'hard'
        AND ($label IS NULL OR v.truth = $label)
        AND ($predicted IS NULL OR v.abstained IS NULL AND v.winner = $predicted)
        AND ($subset IS NULL OR v.subset = $subset)
        AND CASE $show WHEN 'wrong' THEN NOT v.correct WHEN 'right' THEN v.correct
            WHEN 'ties' THEN v.tie ELSE true END
        AND ($other IS NULL OR v.abstained IS NULL AND o.winner <> v.winner)
    ORDER BY v.share DESC NULLS LAST, v.image_id
    LIMIT $most OFFSET $after
"""
FAILURES = """
    SELECT j.*, i.plate || '/' || i.well || '/' || i.site AS name
    FROM (
        SELECT error, count(*) AS n, min(image_id) AS image FROM jobs
        WHERE run_id = ? AND status = 'failed' GROUP BY error
    ) AS j LEFT JOIN image_table AS i ON i.image_id = j.image
    ORDER BY n DESC LIMIT 20
"""
"""The most frequent reasons of failed jobs, each with an image."""
SEEN_TEST_WELLS = """
    SELECT run_id, count(DISTINCT well_id) AS wells FROM run_images
    WHERE run_id IN (SELECT unnest(CAST($runs AS BIGINT[])))
        AND subset = 'test' AND well_in_training
    GROUP BY run_id
"""
CELL_PAIRS = """
    SELECT r.truth, l.value AS predicted, CAST(sum(c.cells) AS BIGINT) AS n
    FROM image_label_counts AS c
    JOIN run_images AS r ON r.run_id = c.run_id AND r.image_id = c.image_id
    JOIN labels AS l ON l.id = c.label_id
    WHERE c.run_id = ? AND r.subset = ? AND r.truth IS NOT NULL AND c.cells > 0
    GROUP BY r.truth, l.value
"""
HITS = """
    SELECT * FROM hit_table WHERE run_id = ?
    ORDER BY CASE verdict {order} ELSE 9 END, effect DESC NULLS LAST, treatment, dose
"""


def find_run(request: Request) -> Run:
    """Return the run of an address; raises UnknownNameError."""
    with explorer_of(request).workspace.database.read() as session:
        return row_of(session, Run, request.path_params["run"], WITH_MODEL)


# All runs


def runs(request: Request) -> Response:
    """All runs, the newest first, with the models of a split ranked."""
    stages = {stage.value: stage for stage in Stage}
    stage = text(request, "stage")
    if stage is not None:
        stage = choice(request, "stage", stages, stage)
    before = whole(request, "before", 2**53)
    query = select(Run).where(Run.id < before).order_by(Run.id.desc()).limit(RUNS + 1)
    query = query.options(*WITH_MODEL)
    if stage is not None:
        query = query.where(Run.stage == stages[stage])
    with explorer_of(request).workspace.database.read() as session:
        found = list(session.scalars(query))
        counted = session.execute(select(Run.stage, func.count()).group_by(Run.stage)).all()
        splits = list(session.scalars(select(Split.name).order_by(Split.id.desc()).limit(200)))
    counts = {Stage(stage).value: number for stage, number in counted}
    return page(
        request,
        "runs.html.j2",
        rows=[_row(run) for run in found[:RUNS]],
        next=found[RUNS - 1].id if len(found) > RUNS else None,
        stage=stage,
        stages={name: counts[name] for name in stages if name in counts},
        splits=splits,
        split=text(request, "split"),
        ranked=counts.get("train", 0),
    )


def _model(run: Run) -> str:
    """What trained or labelled: a network, or the name of a baseline or of a declared model."""
    own = (run if run.stage == Stage.TRAIN or run.parent is None else run.parent).recipe.parameters
    return str(own.get("baseline") or own.get("declared") or "network")


def _did(run: Run) -> str:
    if run.stage == Stage.TRAIN:
        return f"training of {_model(run)}"
    if run.stage == Stage.PREDICT:
        return f"labels by {_model(run)}" + (f" (run {run.parent_id})" if run.parent_id else "")
    return DID[Stage(run.stage)]


def _row(run: Run) -> dict[str, Any]:
    result = run.result or {}
    numbers = [
        f"{result[name]:,} {name}"
        for name in ("plates", "images", "wells", "cells", "treatments", "hits", "failed")
        if isinstance(result.get(name), int) and (name != "failed" or result[name])
    ]
    took = str(run.ended_at - run.started_at).partition(".")[0] if run.ended_at else "-"
    return {"run": run, "did": _did(run), "numbers": numbers, "took": took}


def ranked_runs(request: Request) -> Response:
    """A part: the models of a split, the best first, and whether one has seen its test wells."""
    split = text(request, "split")

    def read() -> tuple[Leaderboard, dict[str, Any] | None]:
        board = list_runs(explorer_of(request).workspace, split)
        scored = [row.predict_runs[-1] for row in board.runs if row.predict_runs]
        seen = {row["run_id"]: row for row in ask(request, SEEN_TEST_WELLS, {"runs": scored})}
        return board, next((seen[run] for run in scored if run in seen), None)

    board, leak = kept(request, ("runs", split), read)
    return page(request, "ranked_runs.html.j2", board=board, leak=leak, bar=interval_bar)


# One run


def run_page(request: Request) -> Response:
    """What a run did, and what came of it."""
    run = find_run(request)
    workspace = explorer_of(request).workspace
    record = audit(workspace, str(run.id), "run").record
    values: dict[str, Any] = {
        "run": run,
        "record": record,
        "row": _row(run),
        "parameters": _values(record["recipe"]["parameters"]),
        "result": _values(record["result"] or {}),
        "failures": [],
        "shows": SHOWS,
        "listed": LISTED,
    }
    if record["jobs"].get("failed"):
        values["failures"] = ask(request, FAILURES, [run.id])
    if run.stage == Stage.PREDICT:
        values["others"] = {row["id"]: f"run {row['id']}, {row['model']}"
                            for row in runs_done(request, Stage.PREDICT)
                            if row["id"] != run.id}  # fmt: skip
        values["other"] = other = whole(request, "other")
        if other is not None and other not in values["others"]:
            raise UserInputError(f"There is no other predict run {other} that is done.")
    if run.stage == Stage.HITS:
        order = " ".join(f"WHEN '{verdict}' THEN {i}" for i, verdict in enumerate(MARKS))
        hits = ask(request, HITS.format(order=order), [run.id])
        ends = [x for row in hits for x in (row["effect"], row["effect_high"]) if x is not None]
        values["hits"], values["hits_more"] = hits[:HIT_ROWS], len(hits) > HIT_ROWS and len(hits)
        values["limits"], values["bar"] = (-1.0, max([1.0, *ends])), interval_bar
        values["marks"] = MARKS
    return page(request, "run.html.j2", **values)


def _values(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), shown(name, x, digits=64, most=LISTED))
            for name, x in found.items() if x not in (None, [], {}, "")]  # fmt: skip


def report_part(request: Request) -> Response:
    """A part: the report of a predict run on images, whose numbers lead to pictures."""
    run = find_run(request)
    other = whole(request, "other")
    workspace = explorer_of(request).workspace

    def make() -> bytes:
        content: dict[str, Any] = {}

        def look(*read: Any) -> None:
            content.update(report_content(workspace, *read, place=url_of))

        compare = None if other is None else str(other)
        report(workspace, str(run.id), compare=compare, only_images=True, look=look)
        made = page(request, "report.html.j2", frame="part.html.j2", heading="h2", **content)
        return bytes(made.body)

    return HTMLResponse(kept(request, ("report", run.id, other), make))


def cells_part(request: Request) -> Response:
    """A part: the confusion matrix of single cells."""
    run = find_run(request)

    given = [run.id, Subset.TEST.value]
    rows = kept(request, ("cell pairs", run.id), lambda: ask(request, CELL_PAIRS, given))
    counts = {(row["truth"], row["predicted"]): row["n"] for row in rows}
    total = sum(counts.values())
    at = partial(url_of, "cells", run=run.id, subset=Subset.TEST.value, sort="-probability")
    return page(
        request,
        "cell_matrix.html.j2",
        matrix=matrix_of(confusion_of(counts, {}), at) if total else None,
        n=total,
        right=sum(n for (truth, label), n in counts.items() if truth == label) / max(1, total),
    )


def curves_part(request: Request) -> Response:
    """A part: the learning curves of a train run."""
    run = find_run(request)

    def make() -> str | None:
        with explorer_of(request).reader.questions() as questions:
            return training_curves(questions, run.id)

    return page(request, "curves.html.j2", curves=kept(request, ("curves", run.id), make))


def doses_part(request: Request) -> Response:
    """A part: the dose curves of a hits run, those of the first treatments."""
    run = find_run(request)
    if run.stage != Stage.HITS or run.status != Status.DONE:
        raise UnknownNameError(f"Run {run.id} ({run.stage.value}) has no dose curves.")
    workspace = explorer_of(request).workspace

    def make() -> list[tuple[str, list[dict[str, Any]]]]:
        from ..report.hits_page import curves_of, doses_of, read_screen

        need("report")
        need("hits")
        with workspace.database.read() as session:
            result = hits_result(session, session.get_one(Run, run.id))
        if not result.doses:
            return []
        screen = read_screen(workspace, result, run.recipe.parameters)
        first: dict[str, Any] = {}
        for item in screen.judged:
            if doses_of(screen, item):
                first.setdefault(item.perturbation, item)
        shown = list(first.items())[:CURVES]
        return [(name, curves_of(screen, item)) for name, item in shown]

    return page(request, "doses.html.j2", most=CURVES, found=kept(request, ("doses", run.id), make))


def voted_images(request: Request) -> Response:
    """Images that a run has labelled, with their fields: by truth, by label, ties, mistakes."""
    run = find_run(request)
    if run.stage != Stage.PREDICT:
        raise UnknownNameError(f"Run {run.id} ({run.stage.value}) has labelled nothing.")
    label, predicted = text(request, "label"), text(request, "predicted")
    other = whole(request, "other")
    subset = text(request, "subset")
    if subset is not None:
        subset = choice(request, "subset", list(SUBSETS), subset)
    show = choice(request, "show", SHOWS, "all")
    number = whole(request, "page", 1, low=1, high=100_000) or 1
    given: dict[str, Any] = {"label": label, "predicted": predicted, "other": other}
    given["subset"] = subset
    limits = {"most": IMAGES, "after": IMAGES * (number - 1)}
    rows = ask(request, VOTED_IMAGES, {"run": run.id, "show": show, **given, **limits})
    total = rows[0]["total"] if rows else 0
    parts = [
        "Images" if show == "all" else f"Images, {SHOWS[show]}",
        f"of {label}" if label else "",
        f"that got the label {predicted}" if predicted else "",
        f"to which run {other} gives another label" if other else "",
    ]
    cells = url_of("cells", run=run.id, label=label, predicted=predicted, subset=subset)
    return page(
        request,
        "voted_images.html.j2",
        run=run,
        heading=" ".join(part for part in parts if part),
        rows=rows,
        total=total,
        number=number,
        pages=-(-total // IMAGES),
        show=show,
        shows=SHOWS,
        cells=cells if label or predicted else None,
        **given,
    )


def lineage(request: Request) -> Response:
    """The lineage of an image, a well, a cell, a run, a plate or a file, and its record."""
    kind, name = request.path_params["kind"], request.path_params["name"]
    if kind not in KINDS:
        raise UnknownNameError(f"There is no lineage of {kind[:40]}: it is of {some_of(KINDS, 9)}.")
    workspace = explorer_of(request).workspace
    found = audit(workspace, name, kind, on_disk=False)
    content = lineage_content(workspace, found, url_of)
    return page(request, "lineage.html.j2", frame="layout.html.j2", **content)


ROUTES = [
    Route("/runs", runs),
    Route("/runs/ranked", ranked_runs),
    Route("/run/{run:int}", run_page),
    Route("/run/{run:int}/report", report_part),
    Route("/run/{run:int}/cells", cells_part),
    Route("/run/{run:int}/curves", curves_part),
    Route("/run/{run:int}/doses", doses_part),
    Route("/run/{run:int}/images", voted_images),
    Route("/lineage/{kind}/{name:path}", lineage),
]
