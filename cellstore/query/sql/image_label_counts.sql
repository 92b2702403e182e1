-- What the cells of an image predicted, counted: one row per predict run, image and label (by id).
-- cells counts the cells whose first choice the label was, named those that have it among their
-- stored choices; probability is the sum of what they gave it. See label_votes for names.
SELECT
    run_id,
    image_id,
    label_id,
    count(*) FILTER (WHERE rank = 1) AS cells,
    count(*) AS named,
    -- Whole numbers add up to the same sum in any order, so that ties are ties every time.
    CAST(sum(CAST(round(probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12 AS probability
FROM eligible_predictions
GROUP BY run_id, image_id, label_id
