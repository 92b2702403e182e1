-- The label of an image by the vote of its cells: one row per predict run, image and vote.
-- vote is hard (each cell counts once, for its first choice), soft (each cell counts with the
-- probabilities it gave) or median (the label with the highest median probability). A draw goes to
-- the label with the higher summed probability, then to the first in alphabetical order; tie says
-- that there was a draw. votes is what the winner got: cells, summed probability, or the median.
-- share is that per cell (the median itself), margin how far it is above the runner-up's share.
-- abstained: null, few cells or close, by vote_rules. truth_place is the place of the true label
-- (1: winner, null: no cell named it among its stored choices); truth_probability the mean
-- probability that the cells gave it; correct is null without a truth or where it abstained.
WITH named AS (
    SELECT id, value, row_number() OVER (ORDER BY value DESC, id DESC) AS late FROM labels
),
meant AS (
    SELECT value, list(late) AS lates FROM named GROUP BY value
),
late_by_id AS (
    -- Looked up rather than joined: DuckDB would build the join on the long side.
    SELECT list(late ORDER BY i.id) AS lates
    FROM (SELECT unnest(range(1, max(id) + 1)) AS id FROM labels) AS i
    LEFT JOIN named AS n ON n.id = i.id
),
told AS NOT MATERIALIZED (
    SELECT c.run_id, c.image_id, c.cells, c.probability, n.lates[c.label_id] AS late
    FROM image_label_counts AS c
    CROSS JOIN late_by_id AS n
),
-- What decides is an entry, in the order of its parts: late is small for a label that is late in
-- the alphabet. Each vote is counted by itself, so that one alone can be asked for.
voted AS (
    SELECT run_id, image_id, 'hard' AS vote, max(entry, 2) AS best, list(entry) AS entries,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM (
        SELECT run_id, image_id, cells,
            struct_pack(
                weight := CAST(cells AS DOUBLE),
                probability := probability,
                late := late
            ) AS entry
        FROM told
    )
    GROUP BY run_id, image_id
    UNION ALL
    SELECT run_id, image_id, 'soft' AS vote, max(entry, 2) AS best, list(entry) AS entries,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM (
        SELECT run_id, image_id, cells,
            struct_pack(
                weight := probability,
                probability := probability,
                late := late
            ) AS entry
        FROM told
    )
    GROUP BY run_id, image_id
    UNION ALL
    SELECT run_id, image_id, 'median' AS vote, max(entry, 2) AS best, list(entry) AS entries,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM (
        SELECT told.run_id, told.image_id, told.cells,
            struct_pack(
                weight := m.probability,
                probability := told.probability,
                late := told.late
            ) AS entry
        FROM told
        JOIN named AS n ON n.late = told.late
        JOIN image_label_medians AS m
            ON m.run_id = told.run_id AND m.image_id = told.image_id AND m.label = n.value
    )
    GROUP BY run_id, image_id
),
placed AS (
    SELECT
        v.*,
        ri.well_id,
        ri.subset,
        ri.truth,
        best[1].weight AS votes,
        coalesce(best[2].weight, 0) AS runner_up_votes,
        CASE v.vote WHEN 'median' THEN 1 ELSE nullif(n_cells, 0) END AS whole,
        list_filter(entries, lambda entry: list_contains(t.lates, entry.late))[1] AS true_entry
    FROM voted AS v
    JOIN run_images AS ri ON ri.run_id = v.run_id AND ri.image_id = v.image_id
    LEFT JOIN meant AS t ON t.value = ri.truth
),
ruled AS (
    SELECT
        p.*,
        w.value AS winner,
        u.value AS runner_up,
        votes / whole AS share,
        (votes - runner_up_votes) / whole AS margin,
        votes = runner_up_votes AS tie,
        CASE
            WHEN n_cells < r.min_cells THEN 'few cells'
            WHEN (votes - runner_up_votes) / whole < r.min_margin THEN 'close'
        END AS abstained,
        CASE WHEN true_entry IS NOT NULL
            THEN len(list_filter(entries, lambda entry: entry >= true_entry)) END AS truth_place,
        CASE WHEN truth IS NOT NULL
            THEN coalesce(true_entry.probability, 0) / nullif(n_cells, 0) END AS truth_probability
    FROM placed AS p
    JOIN named AS w ON w.late = best[1].late
    LEFT JOIN named AS u ON u.late = best[2].late AND runner_up_votes > 0
    CROSS JOIN vote_rules AS r
)
SELECT
    run_id,
    image_id,
    well_id,
    subset,
    vote,
    winner,
    votes,
    runner_up,
    runner_up_votes,
    n_cells,
    share,
    margin,
    tie,
    abstained,
    truth,
    truth_place,
    truth_probability,
    CASE WHEN abstained IS NULL THEN winner = truth END AS correct
FROM ruled
