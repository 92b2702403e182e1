-- What the cells of an image said: one row per predict run, image and label.
-- cells counts the cells whose first choice the label was; probability is the sum of the
-- probabilities that all cells gave it (every stored rank). Only voters count.
WITH votes AS (
    SELECT
        run_id,
        image_id,
        label_id,
        count(*) FILTER (WHERE rank = 1) AS cells,
        -- Decimals add up to the same sum in any order, so that ties are ties every time.
        CAST(sum(CAST(probability AS DECIMAL(18, 12))) AS DOUBLE) AS probability
    FROM ballots
    GROUP BY run_id, image_id, label_id
)
SELECT
    v.run_id,
    v.image_id,
    ri.well_id,
    ri.subset,
    ri.truth,
    l.value AS label,
    v.cells,
    v.probability
FROM votes AS v
JOIN labels AS l ON l.id = v.label_id
JOIN run_images AS ri ON ri.run_id = v.run_id AND ri.image_id = v.image_id
