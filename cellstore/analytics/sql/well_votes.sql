-- The label of a well by the vote of all cells of its images: one row per predict run, well,
-- side of the split and vote. A well whose images are on several sides has a row for each, so
-- that training images never speak for test images. Columns as in image_votes.
WITH label_votes AS (
    SELECT
        run_id,
        well_id,
        subset,
        label,
        any_value(truth) AS truth,
        CAST(sum(cells) AS BIGINT) AS cells,
        CAST(sum(CAST(probability AS DECIMAL(28, 12))) AS DOUBLE) AS probability
    FROM image_label_votes
    GROUP BY run_id, well_id, subset, label
),
counted AS (
    SELECT lv.*, v.vote, CASE v.vote WHEN 'hard' THEN lv.cells ELSE lv.probability END AS weight
    FROM label_votes AS lv
    CROSS JOIN (VALUES ('hard'), ('soft')) AS v(vote)
    UNION ALL
    SELECT lv.*, 'median' AS vote, m.probability AS weight
    FROM label_votes AS lv
    JOIN well_label_medians AS m
        ON m.run_id = lv.run_id AND m.well_id = lv.well_id AND m.subset = lv.subset
        AND m.label = lv.label
),
placed AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, well_id, subset, vote
            ORDER BY weight DESC, probability DESC, label
        ) AS place
    FROM counted
),
voted AS (
    SELECT
        run_id,
        well_id,
        subset,
        vote,
        max(label) FILTER (WHERE place = 1) AS winner,
        max(weight) FILTER (WHERE place = 1) AS votes,
        max(label) FILTER (WHERE place = 2 AND weight > 0) AS runner_up,
        coalesce(max(weight) FILTER (WHERE place = 2), 0) AS runner_up_votes,
        CAST(sum(cells) AS BIGINT) AS n_cells,
        CASE vote WHEN 'median' THEN 1 ELSE nullif(sum(cells), 0) END AS whole,
        any_value(truth) AS truth,
        max(place) FILTER (WHERE label = truth) AS truth_place,
        coalesce(max(probability) FILTER (WHERE label = truth), 0) / nullif(sum(cells), 0)
            AS truth_probability
    FROM placed
    GROUP BY run_id, well_id, subset, vote
),
ruled AS (
    SELECT
        v.*,
        votes / whole AS share,
        (votes - runner_up_votes) / whole AS margin,
        votes = runner_up_votes AS tie,
        CASE
            WHEN n_cells < r.min_cells THEN 'few cells'
            WHEN (votes - runner_up_votes) / whole < r.min_margin THEN 'close'
        END AS abstained
    FROM voted AS v
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
    CASE WHEN truth IS NOT NULL THEN truth_probability END AS truth_probability,
    CASE WHEN abstained IS NULL THEN winner = truth END AS correct
FROM ruled
