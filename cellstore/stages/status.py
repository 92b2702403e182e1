"""Status: what is in a store, what is left to do, and what failed.

Counted in plain SQL: this command is asked often, and the classes of the tables load slowly.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from ..errors import UserInputError, some_of
from ..io.uris import shown
from ..jobs.gone_files import FEW, GoneFiles, find_gone
from ..jobs.workspace import Workspace
from ..notebooks import Shown


@dataclass(frozen=True)
class StatusResult(Shown):
    """What is in a store.

    ``cells`` counts all recipes; ``excluded`` and ``excluded_images`` are those that do not count,
    whatever quality control has flagged. ``gone`` are the folders from which image files are gone:
    all folders were looked for, and the first files. ``untreated_wells`` are those
    with images of which no table has said what was done to them. ``next``: see :func:`next_step`.
    ``segmented`` and ``measured`` are images that at least one recipe has done for their
    present bytes, or whose cells and features another tool gave. ``features`` counts the rows of
    the built-in measurements; ``feature_sets`` are all sets, with the number of their columns and
    of the cells that have values. ``flagged_images`` are those of the newest finished
    quality-control run, ``qc_run_id``.

    ``recipes``: how many images each has done; ``stale``: done for bytes that have changed since;
    ``todo``: what its next run would do, stale ones and those that others have not finished
    included. ``reads``: the segment recipe whose cells it measures; ``replaced_by``: the segment
    recipe that was used after it.
    """

    store: str
    database: str
    plates: int
    wells: int
    treatments: int
    images: int
    missing_images: int
    segmented: int
    measured: int
    cells: int
    excluded: int
    features: int
    splits: int
    runs: int
    predictions: int
    recipes: tuple[dict[str, Any], ...]
    feature_sets: tuple[dict[str, Any], ...] = ()
    qc_run_id: int | None = None
    flagged_images: int = 0
    excluded_images: int = 0
    gone: tuple[GoneFiles, ...] = ()
    untreated_wells: int = 0
    next: tuple[str, ...] = ()


# An image is done by a recipe with a finished job for its present bytes; or another tool found its
# cells ("given"). What a segmentation saw is unknown where it has no sha256.
DONE = """
    EXISTS (
        SELECT 1 FROM jobs AS j JOIN recipes AS r ON r.id = j.recipe_id
        WHERE j.image_id = i.id AND j.content_sha256 = i.content_sha256 AND j.status = 'done'
            AND r.stage = '{stage}'
    )
"""
GIVEN = """
    EXISTS (
        SELECT 1 FROM segmentations AS s
        WHERE s.image_id = i.id
            AND (s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256) {condition}
    )
"""
# Segment recipes of feature sets that no job of ours fills.
OF_OTHERS = """
    AND s.recipe_id IN (
        SELECT ri.input_id FROM recipe_inputs AS ri JOIN feature_sets AS f USING (recipe_id)
        WHERE f.storage = 'files'
            AND NOT EXISTS (SELECT 1 FROM jobs AS j WHERE j.recipe_id = f.recipe_id)
    )
"""
EXCLUDED_IMAGES = """
    SELECT id AS image_id FROM exclusions WHERE level = 'image' AND run_id IS NULL
    UNION
    SELECT i.id FROM images AS i JOIN exclusions AS e ON e.id = i.well_id WHERE e.level = 'well'
    UNION
    SELECT i.id FROM images AS i JOIN wells AS w ON w.id = i.well_id
    JOIN exclusions AS e ON e.id = w.plate_id WHERE e.level = 'plate'
"""
COUNTS = f"""
    WITH excluded AS ({EXCLUDED_IMAGES}),
    qc AS (SELECT max(id) AS id FROM runs WHERE stage = 'qc' AND status = 'done')
    SELECT
        (SELECT count(*) FROM plates) AS plates,
        (SELECT count(*) FROM wells) AS wells,
        (SELECT count(*) FROM treatments) AS treatments,
        (
            SELECT count(*) FROM wells AS w WHERE treatment_id IS NULL
                AND EXISTS (SELECT 1 FROM images AS i WHERE i.well_id = w.id)
        ) AS untreated_wells,
        (SELECT count(*) FROM images) AS images,
        (SELECT count(*) FROM images WHERE content_sha256 IS NULL) AS missing_images,
        (
            SELECT count(*) FROM images AS i
            WHERE {DONE.format(stage="segment")} OR {GIVEN.format(condition="")}
        ) AS segmented,
        (
            SELECT count(*) FROM images AS i
            WHERE {DONE.format(stage="measure")} OR {GIVEN.format(condition=OF_OTHERS)}
        ) AS measured,
        (SELECT count(*) FROM cells) AS cells,
        (
            SELECT count(*) FROM (
                SELECT id FROM exclusions WHERE level = 'cell' AND run_id IS NULL
                UNION
                SELECT c.id FROM cells AS c
                JOIN segmentations AS s ON s.id = c.segmentation_id
                JOIN excluded ON excluded.image_id = s.image_id
            ) AS of_both
        ) AS excluded,
        (SELECT count(*) FROM features) AS features,
        (SELECT count(*) FROM splits) AS splits,
        (SELECT count(*) FROM runs) AS runs,
        (SELECT count(*) FROM predictions) AS predictions,
        (SELECT id FROM qc) AS qc_run_id,
        (
            SELECT count(DISTINCT f.image_id) FROM image_flags AS f JOIN qc ON qc.id = f.run_id
        ) AS flagged_images,
        (SELECT count(*) FROM excluded) AS excluded_images
"""  # noqa: S608 - no values
RECIPES = """
    SELECT r.stage, r.id AS recipe_id, r.fingerprint,
        count(*) FILTER (WHERE j.status = 'done' AND j.content_sha256 = i.content_sha256) AS done,
        count(*) FILTER (WHERE j.status = 'done' AND j.content_sha256 <> i.content_sha256) AS stale,
        count(*) FILTER (WHERE j.status = 'failed' AND j.content_sha256 = i.content_sha256)
            AS failed,
        count(*) FILTER (
            WHERE j.status IN ('pending', 'running') AND j.content_sha256 = i.content_sha256
        ) AS open
    FROM jobs AS j
    JOIN recipes AS r ON r.id = j.recipe_id
    JOIN images AS i ON i.id = j.image_id
    GROUP BY r.stage, r.id, r.fingerprint
    UNION ALL
    SELECT 'segment', r.id, r.fingerprint,
        count(*) FILTER (WHERE s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256),
        count(*) FILTER (
            WHERE s.content_sha256 <> i.content_sha256
                OR s.content_sha256 IS NOT NULL AND i.content_sha256 IS NULL
        ), 0, NULL
    FROM recipes AS r
    JOIN segmentations AS s ON s.recipe_id = r.id
    JOIN images AS i ON i.id = s.image_id
    WHERE r.stage = 'segment' AND NOT EXISTS (SELECT 1 FROM jobs AS j WHERE j.recipe_id = r.id)
    GROUP BY r.id, r.fingerprint
    ORDER BY 2
"""
# The last ones are of other tools: there is no job of them, and none is open.
# By measure recipe the segment recipe that it reads, and how many images have masks of that for
# their present bytes.
READS = """
    SELECT ri.recipe_id, ri.input_id, (
        SELECT count(*) FROM segmentations AS s JOIN images AS i ON i.id = s.image_id
        WHERE s.recipe_id = ri.input_id AND s.mask_artifact_id IS NOT NULL
            AND i.content_sha256 IS NOT NULL
            AND (s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256)
    )
    FROM recipe_inputs AS ri
    JOIN recipes AS r ON r.id = ri.recipe_id JOIN recipes AS source ON source.id = ri.input_id
    WHERE r.stage = 'measure' AND source.stage = 'segment'
"""
FEATURE_SETS = """
    SELECT f.name, f.recipe_id, f.storage, json_array_length(f.columns) AS columns,
        CAST(coalesce(measured.n, 0) + coalesce(written.n, 0) AS bigint) AS cells
    FROM feature_sets AS f
    LEFT JOIN (
        SELECT recipe_id, count(*) AS n FROM features GROUP BY recipe_id
    ) AS measured ON measured.recipe_id = f.recipe_id
    LEFT JOIN (
        SELECT feature_set_id, sum(n_rows) AS n FROM feature_files GROUP BY feature_set_id
    ) AS written ON written.feature_set_id = f.id
    ORDER BY f.id
"""
# How far a store has come: of the cells found last, of the split made last, of the network trained
# last on it.
STEPS = """
    WITH found AS (
        SELECT recipe_id AS id FROM segmentations ORDER BY id DESC LIMIT 1
    ),
    split AS (SELECT max(id) AS id FROM splits),
    trainings AS (
        SELECT r.id, {baseline} AS baseline
        FROM runs AS r JOIN split ON split.id = r.split_id JOIN recipes AS c ON c.id = r.recipe_id
        WHERE r.stage = 'train' AND r.status = 'done'
    ),
    trained AS (SELECT max(id) AS id FROM trainings WHERE baseline IS NULL)
    SELECT
        EXISTS (SELECT 1 FROM images) AS images,
        EXISTS (SELECT 1 FROM images WHERE content_sha256 IS NOT NULL) AS files,
        EXISTS (SELECT 1 FROM found) AS cells,
        EXISTS (
            SELECT 1 FROM found JOIN recipe_inputs AS ri ON ri.input_id = found.id
            JOIN feature_sets AS f ON f.recipe_id = ri.recipe_id
            WHERE EXISTS (
                SELECT 1 FROM jobs AS j WHERE j.recipe_id = f.recipe_id AND j.status = 'done'
            ) OR EXISTS (SELECT 1 FROM feature_files AS ff WHERE ff.feature_set_id = f.id)
        ) AS features,
        EXISTS (SELECT 1 FROM wells WHERE treatment_id IS NOT NULL) AS treatments,
        (SELECT id FROM split) IS NOT NULL AS splits,
        (SELECT id FROM trained) IS NOT NULL AS networks,
        EXISTS (
            SELECT 1 FROM runs AS r JOIN trained ON trained.id = r.parent_id
            WHERE r.stage = 'predict' AND r.status = 'done'
        ) AS predictions,
        EXISTS (SELECT 1 FROM trainings WHERE baseline IS NOT NULL) AS baselines,
        EXISTS (
            SELECT 1 FROM runs AS r JOIN trainings AS t ON t.id = r.parent_id
            WHERE r.stage = 'predict' AND r.status = 'done'
        ) AS labels,
        EXISTS (SELECT 1 FROM runs WHERE stage = 'qc' AND status = 'done') AS qc,
        EXISTS (SELECT 1 FROM runs WHERE stage = 'profile' AND status = 'done') AS profiles,
        EXISTS (SELECT 1 FROM runs WHERE stage = 'hits' AND status = 'done') AS hits
"""
PLATEMAP = "cellstore ingest PLATEMAP  (no well has a treatment yet)"
NEXT = {
    "images": ("cellstore ingest FOLDER", "cellstore ingest TABLE --images FOLDER"),
    "files": ("cellstore ingest TABLE --images FOLDER  (no image file was found yet)",),
    "cells": ("cellstore segment",),
    "features": ("cellstore measure",),
    "treatments": (PLATEMAP,),
    "splits": ("cellstore split create by-well",),
    "networks": ("cellstore train",),
    "predictions": ("cellstore predict",),
}
"""What is to be done first where a store has none of these, in this order."""
USEFUL = {
    "baselines": "cellstore train --baseline null  (scores that the network has to beat)",
    "qc": "cellstore qc",
}
"""What is useful where a store lacks these only."""
WHICH = {"profiles": "cellstore profile", "hits": "cellstore hits"}
"""What says which treatments do something, as soon as cells are measured."""
LAST_CELLS = "SELECT recipe_id FROM segmentations WHERE n_cells > 0 ORDER BY run_id DESC LIMIT 1"
"""The segment recipe that other commands take where none is named."""


def next_step(session: Session) -> tuple[str, ...]:
    """Return the next useful commands, the first one first, by what a store has and lacks."""
    # The baseline of a recipe; null where it is of a network.
    baseline = "c.parameters->>'baseline'"
    if session.get_bind().dialect.name == "sqlite":
        baseline = "json_extract(c.parameters, '$.baseline')"
    steps = session.execute(text(STEPS.format(baseline=baseline))).mappings().one()
    lacks = [name for name in NEXT if not steps[name]]
    which = [step for name, step in WHICH.items() if not steps[name]][:1]
    if steps["features"] and not steps["files"]:  # a table of cells: no image is needed for these
        return NEXT["treatments"] if "treatments" in lacks else (*which, WHICH["profiles"])[:1]
    if not lacks:
        useful = [step for name, step in USEFUL.items() if not steps[name]]
        then = ("cellstore votes", "cellstore export cells.parquet")
        return *which, "cellstore report", *useful, *then
    if lacks[0] == "networks" and steps["baselines"]:
        return *NEXT["networks"], "cellstore report" if steps["labels"] else "cellstore predict"
    if lacks[0] != "cells":
        return (*(which if lacks[0] == "splits" else ()), *NEXT[lacks[0]])
    from ..jobs.planes import choose_channels

    try:
        choose_channels(session, None)
        segment = NEXT["cells"][0]
    except UserInputError:  # no name of a channel says DNA
        found = session.scalars(text("SELECT DISTINCT channel FROM image_files ORDER BY 1"))
        first, *others = found
        segment = (
            f"cellstore segment --preview 6 --channels {shlex.quote(first)}  "
            f"(or another one that shows the nuclei: {some_of(others, 7)})"
        )
    return (segment, *(() if steps["treatments"] else (PLATEMAP,)))


def status(workspace: Workspace) -> StatusResult:
    """Count what is in a store."""
    with workspace.database.read() as session:
        counts = session.execute(text(COUNTS)).mappings().one()
        jobs = session.execute(text(RECIPES)).mappings().all()
        reads = {recipe: more for recipe, *more in session.execute(text(READS))}
        last = session.scalar(text(LAST_CELLS))
        sets = session.execute(text(FEATURE_SETS)).mappings().all()
        gone = find_gone(session, FEW)
        step = next_step(session)
    seen = counts["images"] - counts["missing_images"]
    recipes = []
    for row in jobs:
        (source, segmented), is_ours = (
            reads.get(row["recipe_id"], (None, 0)),
            row["open"] is not None,
        )
        # How many images can be done; what is not known to be is what is open.
        ready = {"segment": seen, "qc": seen, "measure": segmented}.get(row["stage"])
        todo = row["open"] if ready is None else max(0, ready - row["done"] - row["failed"])
        replaced = row["stage"] == "segment" and row["done"] and last != row["recipe_id"]
        more = {"todo": todo if is_ours else 0, "reads": source}
        more |= {"replaced_by": last if replaced and is_ours else None}
        recipes.append({**row, "open": row["open"] or 0, **more})
    return StatusResult(
        store=str(workspace.settings.root),
        database=workspace.database.shown,
        **counts,
        recipes=tuple(recipes),
        feature_sets=tuple(map(dict, sets)),
        gone=tuple(gone),
        next=(f"cellstore relocate {shown(gone[0].folder)} NEW",) if gone else step,
    )
