-- The median of the probabilities that the cells of a well gave each label: one row per predict
-- run, well, side of the split and label. A label that is not among the stored choices of a cell got 0 from it,
-- so a label that fewer than half of the cells name has the median 0. Only voters count.
WITH named AS (
    SELECT
        b.run_id,
        ri.well_id,
        ri.subset,
        b.label_id,
        count(*) FILTER (WHERE b.rank = 1) AS cells,
        list(b.probability ORDER BY b.probability) AS given
    FROM ballots AS b
    JOIN run_images AS ri ON ri.run_id = b.run_id AND ri.image_id = b.image_id
    GROUP BY b.run_id, ri.well_id, ri.subset, b.label_id
),
counted AS (
    SELECT
        *,
        CAST(sum(cells) OVER (PARTITION BY run_id, well_id, subset) AS BIGINT) AS n_cells
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
    p.well_id,
    p.subset,
    l.value AS label,
    (
        CASE WHEN p.lower < 1 THEN 0 ELSE p.given[p.lower] END
        + CASE WHEN p.upper < 1 THEN 0 ELSE p.given[p.upper] END
    ) / 2 AS probability
FROM placed AS p
JOIN labels AS l ON l.id = p.label_id
