-- The median of the probabilities that the cells of an image, or of a well, gave a label: one row
-- per predict run, level, unit_id, subset and label (by id), as in label_counts. A cell that does
-- not have the label among its stored choices gave it 0, so the median of a label that fewer than
-- half of the cells name is 0. cells and summed are cells and probability of label_counts.
WITH totals AS (
    SELECT run_id, level, unit_id, subset, CAST(sum(cells) AS BIGINT) AS n_cells
    FROM label_counts
    GROUP BY run_id, level, unit_id, subset
),
counted AS (
    SELECT c.*, t.n_cells
    FROM label_counts AS c
    JOIN totals AS t
        ON t.run_id = c.run_id
        AND t.level = c.level
        AND t.unit_id = c.unit_id
        AND t.subset IS NOT DISTINCT FROM c.subset
),
-- Only these need a look at single cells; mostly that is one label, or none.
often AS (FROM counted WHERE 2 * named >= n_cells),
given AS (
    SELECT run_id, 'image' AS level, image_id AS unit_id, CAST(NULL AS VARCHAR) AS subset, label_id,
        probability
    FROM eligible_predictions
    UNION ALL
    SELECT p.run_id, 'well' AS level, ri.well_id AS unit_id, ri.subset, p.label_id, p.probability
    FROM eligible_predictions AS p
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
),
ordered AS (
    SELECT g.run_id, g.level, g.unit_id, g.subset, g.label_id,
        list(g.probability ORDER BY g.probability DESC) AS largest
    FROM given AS g
    JOIN often AS o
        ON o.run_id = g.run_id
        AND o.level = g.level
        AND o.unit_id = g.unit_id
        AND o.subset IS NOT DISTINCT FROM g.subset
        AND o.label_id = g.label_id
    GROUP BY g.run_id, g.level, g.unit_id, g.subset, g.label_id
)
SELECT
    c.run_id,
    c.level,
    c.unit_id,
    c.subset,
    c.label_id,
    c.cells,
    c.probability AS summed,
    -- The one or two in the middle, counted from the largest; behind the last given one come zeros.
    (
        coalesce(o.largest[(c.n_cells + 1) // 2], 0) + coalesce(o.largest[c.n_cells // 2 + 1], 0)
    ) / 2 AS probability
FROM counted AS c
LEFT JOIN ordered AS o
    ON o.run_id = c.run_id
    AND o.level = c.level
    AND o.unit_id = c.unit_id
    AND o.subset IS NOT DISTINCT FROM c.subset
    AND o.label_id = c.label_id
