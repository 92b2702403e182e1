-- The median of the probabilities that the cells of an image gave each label: one row per predict
-- run, image and label. A label that is not among the stored choices of a cell got 0 from it,
-- so a label that fewer than half of the cells name has the median 0. Only voters count.
WITH named AS (
    SELECT
        b.run_id,
        b.image_id,
        b.label_id,
        count(*) FILTER (WHERE b.rank = 1) AS cells,
        list(b.probability ORDER BY b.probability) AS given
    FROM ballots AS b
    GROUP BY b.run_id, b.image_id, b.label_id
),
counted AS (
    SELECT
        *,
        CAST(sum(cells) OVER (PARTITION BY run_id, image_id) AS BIGINT) AS n_cells
    FROM named
),
placed AS (
    -- The one or two middle places in the order of all cells, counted past those that gave 0.
    SELECT
        *,
        (n_cells + 1) // 2 - (n_cells - len(given)) AS lower,
        n_cells // 2 + 1 - (n_cells - len(given)) AS upper
    FROM counted
)
SELECT
    p.run_id,
    p.image_id,
    l.value AS label,
    (
        CASE WHEN p.lower < 1 THEN 0 ELSE p.given[p.lower] END
        + CASE WHEN p.upper < 1 THEN 0 ELSE p.given[p.upper] END
    ) / 2 AS probability
FROM placed AS p
JOIN labels AS l ON l.id = p.label_id
