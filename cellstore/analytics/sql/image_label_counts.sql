-- The votes of the cells of an image, counted: one row per predict run, image and label (by id).
-- cells counts the cells whose first choice the label was; probability is the sum of the
-- probabilities that all cells gave it (every stored rank). Only voters count.
SELECT
    run_id,
    image_id,
    label_id,
    count(*) FILTER (WHERE rank = 1) AS cells,
    -- Whole numbers add up to the same sum in any order, so that ties are ties every time.
    CAST(sum(CAST(round(probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12 AS probability
FROM ballots
GROUP BY run_id, image_id, label_id
