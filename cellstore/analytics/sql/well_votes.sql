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
        count(DISTINCT image_id) AS n_images,
        CAST(sum(cells) AS BIGINT) AS cells,
        CAST(sum(CAST(probability AS DECIMAL(28, 12))) AS DOUBLE) AS probability
    FROM image_label_votes
    GROUP BY run_id, well_id, subset, label
),
weighed AS (
    SELECT lv.*, v.vote, CASE v.vote WHEN 'hard' THEN lv.cells ELSE lv.probability END AS weight
    FROM label_votes AS lv
    CROSS JOIN (VALUES ('hard'), ('soft')) AS v(vote)
),
placed AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, well_id, subset, vote
            ORDER BY weight DESC, probability DESC, label
        ) AS place
    FROM weighed
)
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
    max(weight) FILTER (WHERE place = 1) / nullif(sum(cells), 0) AS share,
    max(weight) FILTER (WHERE place = 1)
        = coalesce(max(weight) FILTER (WHERE place = 2), 0) AS tie,
    any_value(truth) AS truth,
    max(place) FILTER (WHERE label = truth) AS truth_place,
    max(label) FILTER (WHERE place = 1) = any_value(truth) AS correct
FROM placed
GROUP BY run_id, well_id, subset, vote
