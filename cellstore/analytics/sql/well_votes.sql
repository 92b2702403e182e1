-- The label of a well by the vote of all cells of its images: one row per predict run, well,
-- side of the split and vote. A well whose images are on several sides has a row for each, so
-- that training images never speak for test images. Columns as in image_votes.
WITH named AS (
    SELECT id, value, row_number() OVER (ORDER BY value DESC, id DESC) AS late FROM labels
),
summed AS (
    SELECT
        c.run_id,
        ri.well_id,
        ri.subset,
        c.label_id,
        any_value(ri.truth) AS truth,
        CAST(sum(c.cells) AS BIGINT) AS cells,
        CAST(sum(CAST(round(c.probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12 AS probability
    FROM image_label_counts AS c
    JOIN run_images AS ri ON ri.run_id = c.run_id AND ri.image_id = c.image_id
    GROUP BY c.run_id, ri.well_id, ri.subset, c.label_id
),
told AS (
    SELECT s.* EXCLUDE (label_id), n.value AS label, n.late
    FROM summed AS s
    JOIN named AS n ON n.id = s.label_id
),
counted AS (
    SELECT *, 'hard' AS vote, CAST(cells AS DOUBLE) AS weight FROM told
    UNION ALL
    SELECT *, 'soft' AS vote, probability AS weight FROM told
    UNION ALL
    SELECT told.*, 'median' AS vote, m.probability AS weight
    FROM told
    JOIN well_label_medians AS m
        ON m.run_id = told.run_id AND m.well_id = told.well_id AND m.subset = told.subset
        AND m.label = told.label
),
entered AS (
    -- What decides, in this order; late is small for a label that is late in the alphabet.
    SELECT
        run_id, well_id, subset, truth, vote, cells,
        struct_pack(weight := weight, probability := probability, late := late) AS entry,
        label = truth AS is_true
    FROM counted
),
voted AS (
    SELECT
        run_id,
        well_id,
        subset,
        any_value(truth) AS truth,
        vote,
        max(entry, 2) AS best,
        list(entry) AS entries,
        max(entry) FILTER (WHERE is_true) AS true_entry,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM entered
    GROUP BY run_id, well_id, subset, vote
),
placed AS (
    SELECT
        *,
        best[1].weight AS votes,
        coalesce(best[2].weight, 0) AS runner_up_votes,
        CASE vote WHEN 'median' THEN 1 ELSE nullif(n_cells, 0) END AS whole,
        CASE WHEN true_entry IS NOT NULL
            THEN len(list_filter(entries, lambda entry: entry >= true_entry)) END AS truth_place,
        CASE WHEN truth IS NOT NULL
            THEN coalesce(true_entry.probability, 0) / nullif(n_cells, 0) END AS truth_probability
    FROM voted
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
        END AS abstained
    FROM placed AS p
    JOIN named AS w ON w.late = best[1].late
    LEFT JOIN named AS u ON u.late = best[2].late AND runner_up_votes > 0
    CROSS JOIN vote_rules AS r
)
SELECT
    run_id,
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
