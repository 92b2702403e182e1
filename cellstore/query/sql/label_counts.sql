-- What the cells of an image, or of a well, predicted, counted: one row per predict run, level
-- (image or well), unit_id (its id), subset and label (by id). Other columns as in
-- image_label_counts. subset is null for images; a well whose images are in several subsets of the
-- split is counted in each by itself, so that training images never speak for test images.
SELECT
    run_id,
    'image' AS level,
    image_id AS unit_id,
    CAST(NULL AS VARCHAR) AS subset,
    label_id,
    cells,
    named,
    probability
FROM image_label_counts
UNION ALL
SELECT
    c.run_id,
    'well' AS level,
    ri.well_id AS unit_id,
    ri.subset,
    c.label_id,
    CAST(sum(c.cells) AS BIGINT) AS cells,
    CAST(sum(c.named) AS BIGINT) AS named,
    CAST(sum(CAST(round(c.probability * 1e12) AS BIGINT)) AS DOUBLE) / 1e12 AS probability
FROM image_label_counts AS c
JOIN run_images AS ri ON ri.run_id = c.run_id AND ri.image_id = c.image_id
GROUP BY c.run_id, ri.well_id, ri.subset, c.label_id
