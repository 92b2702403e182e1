-- What the cells of an image said: one row per predict run, image and label.
-- cells counts the cells whose first choice the label was; probability is the sum of the
-- probabilities that all cells gave it (every stored rank). Excluded cells have no vote.
WITH votes AS (
    SELECT
        p.run_id,
        s.image_id,
        p.label_id,
        count(*) FILTER (WHERE p.rank = 1) AS cells,
        -- Decimals add up to the same sum in any order, so that ties are ties every time.
        CAST(sum(CAST(p.probability AS DECIMAL(18, 12))) AS DOUBLE) AS probability
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    WHERE c.excluded IS NULL
    GROUP BY p.run_id, s.image_id, p.label_id
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
