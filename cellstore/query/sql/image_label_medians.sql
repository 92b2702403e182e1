-- The median of the probabilities that the cells of an image gave each label: one row per predict
-- run, image and label. A label that is not among the stored choices of a cell got 0 from it,
-- so a label that fewer than half of the cells name has the median 0. Only voters count.
WITH counted AS (
    SELECT
        run_id,
        image_id,
        label_id,
        named,
        sum(cells) OVER (PARTITION BY run_id, image_id) AS n_cells
    FROM image_label_counts
),
-- Only these need a look at single cells; mostly that is one label, or none.
often AS (FROM counted WHERE 2 * named >= n_cells),
given AS (
    SELECT b.run_id, b.image_id, b.label_id, list(b.probability ORDER BY b.probability) AS ordered
    FROM ballots AS b
    JOIN often AS o
        ON o.run_id = b.run_id AND o.image_id = b.image_id AND o.label_id = b.label_id
    GROUP BY b.run_id, b.image_id, b.label_id
),
placed AS (
    -- The one or two middle places in the order of all cells, counted past those that gave 0.
    SELECT
        c.*,
        g.ordered,
        CAST((c.n_cells + 1) // 2 - (c.n_cells - c.named) AS BIGINT) AS lower,
        CAST(c.n_cells // 2 + 1 - (c.n_cells - c.named) AS BIGINT) AS upper
    FROM counted AS c
    LEFT JOIN given AS g
        ON g.run_id = c.run_id AND g.image_id = c.image_id AND g.label_id = c.label_id
)
SELECT
    p.run_id,
    p.image_id,
    l.value AS label,
    (
        CASE WHEN p.lower < 1 THEN 0 ELSE p.ordered[p.lower] END
        + CASE WHEN p.upper < 1 THEN 0 ELSE p.ordered[p.upper] END
    ) / 2 AS probability
FROM placed AS p
JOIN labels AS l ON l.id = p.label_id
