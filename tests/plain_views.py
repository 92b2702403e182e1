"""The views in SQL that SQLite and PostgreSQL know: another way to the same answers.

A view whose own file says it in such SQL is taken from there; the others are written anew, with
window functions where DuckDB's have lists and records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, text

from cellstore.config import VoteRules
from cellstore.jobs.workspace import Workspace
from cellstore.query.views import ORDER, queries

COUNTS = """
    SELECT run_id, image_id, label_id, sum(CASE WHEN rank = 1 THEN 1 ELSE 0 END) AS cells,
        count(*) AS named,
        sum(probability) AS probability
    FROM ballots GROUP BY run_id, image_id, label_id
"""

WINNERS = """
    WITH weighed AS (
        SELECT c.*, l.value, 'hard' AS vote, CAST(c.cells AS DOUBLE PRECISION) AS weight
        FROM image_label_counts c JOIN labels l ON l.id = c.label_id
        UNION ALL
        SELECT c.*, l.value, 'soft', c.probability
        FROM image_label_counts c JOIN labels l ON l.id = c.label_id
    ),
    placed AS (
        SELECT w.*, row_number() OVER (
            PARTITION BY run_id, image_id, vote
            ORDER BY weight DESC, probability DESC, value {binary}, label_id
        ) AS place
        FROM weighed w
    )
    SELECT run_id, image_id, vote, max(label_id) FILTER (WHERE place = 1) AS winner_id,
        max(weight) FILTER (WHERE place = 1) AS votes,
        max(label_id) FILTER (WHERE place = 2 AND weight > 0) AS runner_up_id,
        coalesce(max(weight) FILTER (WHERE place = 2), 0) AS runner_up_votes,
        sum(cells) AS n_cells
    FROM placed GROUP BY run_id, image_id, vote
"""

MEDIANS = """
    WITH said AS (
        SELECT b.run_id, {unit}, b.cell_id, b.rank, b.label_id, b.probability
        FROM ballots b JOIN run_images ri ON ri.run_id = b.run_id AND ri.image_id = b.image_id
    ),
    voting AS (SELECT DISTINCT run_id, {names}, cell_id FROM said WHERE rank = 1),
    named AS (SELECT DISTINCT run_id, {names}, label_id FROM said),
    given AS (
        SELECT n.*, coalesce(s.probability, 0) AS x, v.cell_id
        FROM named n
        JOIN voting v ON v.run_id = n.run_id AND {same}
        LEFT JOIN said s ON s.run_id = v.run_id AND s.cell_id = v.cell_id
            AND s.label_id = n.label_id
    ),
    ordered AS (
        SELECT g.*,
            row_number() OVER (PARTITION BY run_id, {names}, label_id ORDER BY x, cell_id) AS place,
            count(*) OVER (PARTITION BY run_id, {names}, label_id) AS n
        FROM given g
    )
    SELECT run_id, {names}, l.value AS label, avg(x) AS probability
    FROM ordered JOIN labels l ON l.id = label_id
    WHERE place IN ((n + 1) / 2, n / 2 + 1)
    GROUP BY run_id, {names}, l.value
"""

VOTES = """
    WITH told AS (
        SELECT run_id, {names}, label, max(truth) AS truth, sum(cells) AS cells,
            sum(probability) AS probability
        FROM image_label_votes GROUP BY run_id, {names}, label
    ),
    counted AS (
        SELECT told.*, 'hard' AS vote, CAST(cells AS DOUBLE PRECISION) AS weight FROM told
        UNION ALL SELECT told.*, 'soft', probability FROM told
        UNION ALL
        SELECT told.*, 'median', m.probability FROM told
        JOIN {medians} m ON m.run_id = told.run_id AND m.label = told.label AND {same}
    ),
    placed AS (
        SELECT c.*, row_number() OVER (
            PARTITION BY run_id, {names}, vote
            ORDER BY weight DESC, probability DESC, label {binary}
        ) AS place
        FROM counted c
    ),
    voted AS (
        SELECT run_id, {names}, vote,
            max(label) FILTER (WHERE place = 1) AS winner,
            max(weight) FILTER (WHERE place = 1) AS votes,
            max(label) FILTER (WHERE place = 2 AND weight > 0) AS runner_up,
            coalesce(max(weight) FILTER (WHERE place = 2), 0) AS runner_up_votes,
            sum(cells) AS n_cells,
            CASE WHEN vote = 'median' THEN 1 ELSE nullif(sum(cells), 0) END AS whole,
            max(truth) AS truth,
            max(place) FILTER (WHERE label = truth) AS truth_place,
            coalesce(max(probability) FILTER (WHERE label = truth), 0) / nullif(sum(cells), 0)
                AS share_of_truth
        FROM placed GROUP BY run_id, {names}, vote
    ),
    ruled AS (
        SELECT v.*, votes / whole AS share, (votes - runner_up_votes) / whole AS margin,
            votes = runner_up_votes AS tie,
            CASE WHEN n_cells < r.min_cells THEN 'few cells'
                WHEN (votes - runner_up_votes) / whole < r.min_margin THEN 'close' END AS abstained
        FROM voted v CROSS JOIN vote_rules r
    )
    SELECT r.run_id, {shown}, vote, winner, votes, runner_up, runner_up_votes, n_cells, share,
        margin, tie, abstained, r.truth, truth_place,
        CASE WHEN r.truth IS NOT NULL THEN share_of_truth END AS truth_probability,
        CASE WHEN abstained IS NULL THEN winner = r.truth END AS correct
    FROM ruled r {more}
"""

IMAGE = {
    "unit": "b.image_id",
    "names": "image_id",
    "same": "{0}.image_id = {1}.image_id",
    "shown": "r.image_id, ri.well_id, ri.subset",
    "more": "JOIN run_images ri ON ri.run_id = r.run_id AND ri.image_id = r.image_id",
}
WELL = {
    "unit": "ri.well_id, ri.subset",
    "names": "well_id, subset",
    "same": "{0}.well_id = {1}.well_id AND {0}.subset = {1}.subset",
    "shown": "r.well_id, r.subset",
    "more": "",
}


def definitions(rules: VoteRules, *, sqlite: bool) -> dict[str, str]:
    """Return the query of every view, a view after those it reads."""
    own = queries(rules)
    found = {name: own[name] for name in ORDER}
    found["vote_rules"] = found["vote_rules"].replace("AS DOUBLE)", "AS DOUBLE PRECISION)")
    for name in ("voters", "ballots"):
        found[name] = found[name].replace("NOT EXISTS (FROM", "NOT EXISTS (SELECT 1 FROM")
    found["image_label_counts"] = COUNTS
    found["image_winners"] = WINNERS.format(binary="" if sqlite else 'COLLATE "C"')
    for level, words in (("image", IMAGE), ("well", WELL)):
        medians = {**words, "same": words["same"].format("v", "n")}
        found[f"{level}_label_medians"] = MEDIANS.format(**medians)
        votes = {**words, "same": words["same"].format("m", "told")}
        found[f"{level}_votes"] = VOTES.format(
            **votes, medians=f"{level}_label_medians", binary="" if sqlite else 'COLLATE "C"'
        )
    found["verdicts"] = found["verdicts"].replace("any_value(", "max(")
    # Whole numbers divide to whole numbers here.
    found["class_report"] = found["class_report"].replace("sum(correct) /", "1.0 * sum(correct) /")
    found["class_report"] = found["class_report"].replace("2 * sum(", "2.0 * sum(")
    return found


@contextmanager
def plain_views(workspace: Workspace, rules: VoteRules) -> Iterator[Connection]:
    """Open a connection to the database itself that has every view, for itself alone."""
    found = definitions(rules, sqlite=workspace.database.is_sqlite)
    with workspace.database.engine.connect() as connection:
        for name, query in found.items():
            connection.execute(text(f"CREATE TEMPORARY VIEW {name} AS {query}"))
        try:
            yield connection
        finally:
            for name in reversed(found):
                connection.execute(text(f"DROP VIEW {name}"))
            connection.rollback()
