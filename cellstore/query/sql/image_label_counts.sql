-- The votes of the cells of an image, counted: one row per predict run, image and label (by id).
-- cells counts the cells whose first choice the label was, named those that named it at all
-- (every stored rank); probability is the sum of what they gave it. Only voters count.
SELECT
    run_id,
    image_id,
    label_id,
    count(*) FILTER (WHERE rank = 1) AS cells,
    count(*) AS named,
    -- Whole numbers add up to the same sum in any order, so that ties are ties every time.
    CAST(sum(CAST(round(probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12 AS probability
FROM ballots
GROUP BY run_id, image_id, label_id
