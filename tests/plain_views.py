"""The views in SQL that SQLite and PostgreSQL know: another way to the same answers.

A view whose own file says it in such SQL is taken from there; the others are written anew, with
window functions where DuckDB's have lists and records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, text

from cellstore.config import VoteOptions
from cellstore.jobs.workspace import Workspace
from cellstore.models import CellFeatures
from cellstore.query.source import VIEWS, view

COUNTS = """
    SELECT run_id, image_id, label_id, sum(CASE WHEN rank = 1 THEN 1 ELSE 0 END) AS cells,
        count(*) AS named,
        sum(probability) AS probability
    FROM eligible_predictions GROUP BY run_id, image_id, label_id
"""

MEDIANS = """
    WITH given AS (
        SELECT p.run_id, 'image' AS level, p.image_id AS unit_id, CAST(NULL AS VARCHAR) AS subset,
            p.cell_id, p.rank, p.label_id, p.probability
        FROM eligible_predictions p
        UNION ALL
        SELECT p.run_id, 'well', ri.well_id, ri.subset, p.cell_id, p.rank, p.label_id, p.probability
        FROM eligible_predictions p
        JOIN run_images ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
    ),
    voting AS (
        SELECT DISTINCT run_id, level, unit_id, subset, cell_id FROM given WHERE rank = 1
    ),
    named AS (SELECT DISTINCT run_id, level, unit_id, subset, label_id FROM given),
    filled AS (
        SELECT n.*, coalesce(g.probability, 0) AS x, v.cell_id
        FROM named n
        JOIN voting v ON v.run_id = n.run_id AND v.level = n.level AND v.unit_id = n.unit_id
            AND coalesce(v.subset, '') = coalesce(n.subset, '')
        LEFT JOIN given g ON g.run_id = v.run_id AND g.level = v.level AND g.cell_id = v.cell_id
            AND g.label_id = n.label_id
    ),
    ordered AS (
        SELECT f.*,
            row_number() OVER (
                PARTITION BY run_id, level, unit_id, subset, label_id ORDER BY x, cell_id
            ) AS place,
            count(*) OVER (PARTITION BY run_id, level, unit_id, subset, label_id) AS n
        FROM filled f
    )
    SELECT m.run_id, m.level, m.unit_id, m.subset, m.label_id, max(c.cells) AS cells,
        max(c.probability) AS summed, avg(m.x) AS probability
    FROM ordered m
    JOIN label_counts c ON c.run_id = m.run_id AND c.level = m.level AND c.unit_id = m.unit_id
        AND coalesce(c.subset, '') = coalesce(m.subset, '') AND c.label_id = m.label_id
    WHERE m.place IN ((m.n + 1) / 2, m.n / 2 + 1)
    GROUP BY m.run_id, m.level, m.unit_id, m.subset, m.label_id
"""

PLACED = """
    SELECT v.*, row_number() OVER (
        PARTITION BY run_id, level, vote, unit_id, subset
        ORDER BY votes DESC, probability DESC, label {binary}, label_id
    ) AS place
    FROM label_votes v
"""

RANKED = """
    SELECT run_id, level, vote, unit_id, subset,
        max(label_id) FILTER (WHERE place = 1) AS winner_id,
        max(votes) FILTER (WHERE place = 1) AS votes,
        max(label_id) FILTER (WHERE place = 2 AND votes > 0) AS runner_up_id,
        coalesce(max(votes) FILTER (WHERE place = 2), 0) AS runner_up_votes,
        sum(cells) AS n_cells
    FROM ({placed}) AS placed GROUP BY run_id, level, vote, unit_id, subset
"""

SCORED_VOTES = """
    SELECT v.run_id, v.level, v.vote, v.unit_id, v.plate, v.well, v.site, v.subset, v.truth,
        v.winner AS predicted, v.share AS confidence, t.place AS truth_rank,
        coalesce(t.probability, 0) / nullif(v.n_cells, 0) AS truth_probability, v.tie, v.abstained,
        v.correct, v.control, v.image_id, v.well_id, v.plate_id
    FROM votes v
    LEFT JOIN ({placed}) AS t ON t.run_id = v.run_id AND t.level = v.level AND t.vote = v.vote
        AND t.unit_id = v.unit_id AND coalesce(t.subset, v.subset) = v.subset AND t.label = v.truth
    WHERE v.truth IS NOT NULL
"""

COMPONENTS = r"""
    '[' || coalesce(max('{"perturbation"\:"' || p.name || '","kind"\:"' || p.kind
        || '","dose"\:null,"dose_unit"\:null}'), '') || ']'
"""
"""Of treatments of one perturbation without dose, as the random stores have them."""


def definitions(vote_options: VoteOptions, *, sqlite: bool) -> dict[str, str]:
    """Return the query of every view, a view after those it reads."""
    found = {name: view(name, vote_options) for name in VIEWS}
    binary = "" if sqlite else 'COLLATE "C"'
    placed = PLACED.format(binary=binary)
    found["vote_options"] = found["vote_options"].replace("AS DOUBLE)", "AS DOUBLE PRECISION)")
    for table in ("w", "pl"):
        path = f"""({table}.metadata, '$."' || s.field || '"')"""
        plain = f"json_extract{path}" if sqlite else f"({table}.metadata ->> s.field)"
        found["run_images"] = found["run_images"].replace(f"json_extract_string{path}", plain)
    run_images = found["run_images"]  # its lists, where no model was declared
    start, end = run_images.index("CASE WHEN trained.origin"), run_images.index(" AS trained_on")
    found["run_images"] = (
        (run_images[:start] + "'train'" + run_images[end:])
        .replace("list(DISTINCT m.subset)", "max(CASE WHEN m.subset = 'train' THEN 1 ELSE 0 END)")
        .replace(
            "list_has_any(coalesce(su.of_well, []), predicting.trained_on)",
            "coalesce(su.of_well, 0) = 1",
        )
    )
    found["image_label_counts"] = COUNTS
    found["label_counts"] = found["label_counts"].replace(
        "CAST(sum(CAST(round(c.probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12",
        "sum(c.probability)",
    )
    found["label_medians"] = MEDIANS
    votes = found["label_votes"].replace("AS DOUBLE)", "AS DOUBLE PRECISION)")
    found["label_votes"] = votes.replace("ORDER BY value,", f"ORDER BY value {binary},")
    found["ranked_votes"] = RANKED.format(placed=placed)
    found["votes"] = (
        found["votes"]
        .replace("any_value(", "max(")
        .replace("NULL AS image_id", "CAST(NULL AS BIGINT) AS image_id")
        .replace("NULL AS site", "CAST(NULL AS INTEGER) AS site")
    )
    scored = found["scored_predictions"]
    cells = scored[scored.index("SELECT\n    p.run_id, 'cell'") : scored.rindex("UNION ALL")]
    truths = scored[scored.index("WITH cell_truths") : scored.index(",\ntrue_labels")]
    found["scored_predictions"] = f"{truths} {cells} UNION ALL {SCORED_VOTES.format(placed=placed)}"
    # Whole numbers divide to whole numbers here.
    found["class_report"] = found["class_report"].replace("sum(correct) /", "1.0 * sum(correct) /")
    found["class_report"] = found["class_report"].replace("2 * sum(", "2.0 * sum(")
    counts = ", ".join(f"CAST(NULL AS BIGINT) AS {name}" for name in ("well_id", *COUNTED))
    none = f"(SELECT CAST(NULL AS BIGINT) AS run_id, {counts} LIMIT 0)"  # the stores have none
    found["profiles"] = found["profiles"].replace("{values}", none)
    whole = found["treatment_table"]
    start, end = whole.index("CAST(to_json("), whole.index(" AS components")
    found["treatment_table"] = whole[:start] + COMPONENTS + whole[end:]
    seconds = "EXTRACT(epoch FROM t.ended_at - t.started_at)"
    if sqlite:
        seconds = "86400 * (julianday(t.ended_at) - julianday(t.started_at))"
    found["training_runs"] = (
        found["training_runs"]
        .replace("epoch(t.ended_at - t.started_at)", seconds)
        .replace("p.parameters\n", "CAST(p.parameters AS VARCHAR) AS parameters\n")
    )
    each = "json_each(p.parameters)" if sqlite else "json_each_text(p.parameters)"
    found["run_parameters"] = (
        f"SELECT r.id AS run_id, r.stage, j.key AS name, CAST(j.value AS VARCHAR) AS value "
        f"FROM runs AS r JOIN recipes AS p ON p.id = r.recipe_id CROSS JOIN {each} AS j"
    )
    measured = [
        f"f.{column.name}"
        for column in CellFeatures.__table__.columns
        if column.name not in ("cell_id", "recipe_id", "run_id")
    ]
    for name, own in (("centroid_y", "centroid_row"), ("centroid_x", "centroid_col")):
        measured.append(f"CASE WHEN f.cell_id IS NOT NULL THEN c.{own} END AS {name}")
    found["cell_table"] = found["cell_table"].replace(
        "f.* EXCLUDE (cell_id, recipe_id, run_id)", ", ".join(measured)
    )
    order = (*reversed([name for name in VIEWS if name not in EARLY]),)
    return {name: found[name] for name in (*EARLY, *order)}


COUNTED = ("n_cells", "n_images")

EARLY = (
    "later_exclusions",
    "excluded_images",
    "treatment_table",
    "eligible_cells",
    "excluded_cells",
    "counted_cells",
    "image_table",
    "current_labels",
    "image_labels",
    "run_images",
    "vote_options",
    "predictions_with_image",
    "eligible_predictions",
    "image_label_counts",
    "label_counts",
    "label_medians",
    "label_votes",
    "ranked_votes",
    "votes",
    "scored_predictions",
    "accuracy",
    "confusion",
    "class_report",
)
"""A view comes after those it reads."""


@contextmanager
def plain_views(workspace: Workspace, vote_options: VoteOptions) -> Iterator[Connection]:
    """Open a connection to the database itself that has every view, for itself alone."""
    found = definitions(vote_options, sqlite=workspace.database.is_sqlite)
    with workspace.database.engine.connect() as connection:
        for name, query in found.items():
            connection.execute(text(f"CREATE TEMPORARY VIEW {name} AS {query}"))
        try:
            yield connection
        finally:
            for name in reversed(found):
                connection.execute(text(f"DROP VIEW {name}"))
            connection.rollback()
