-- Every well by the names that people use: one row per well, with its treatment, and how many of its
-- images and of their cells (as in image_table) count and do not. excluded says why a well does not
-- count (null: it does), itself or with its plate; then none of its images and cells does.
WITH counted AS (
    SELECT
        well_id,
        count(*) - count(excluded) AS n_images,
        count(excluded) AS n_excluded_images,
        CAST(sum(n_cells) AS BIGINT) AS n_cells,
        CAST(sum(n_excluded_cells) AS BIGINT) AS n_excluded_cells
    FROM image_table
    GROUP BY well_id
)
SELECT
    p.barcode AS plate,
    w.name AS well,
    t.treatment,
    t.dose,
    t.dose_unit,
    t.target,
    w.control,
    coalesce(c.n_images, 0) AS n_images,
    c.n_cells,
    coalesce(c.n_excluded_images, 0) AS n_excluded_images,
    c.n_excluded_cells,
    coalesce(x.reason, y.reason) AS excluded,
    t.components,
    p.batch,
    w.well_row,
    w.well_column,
    w.id AS well_id,
    p.id AS plate_id
FROM wells AS w
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
LEFT JOIN counted AS c ON c.well_id = w.id
LEFT JOIN (
    SELECT id, min(reason) AS reason FROM later_exclusions WHERE level = 'well' GROUP BY id
) AS x ON x.id = w.id
LEFT JOIN (
    SELECT id, min(reason) AS reason FROM later_exclusions WHERE level = 'plate' GROUP BY id
) AS y ON y.id = p.id
