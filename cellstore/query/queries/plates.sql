-- Every plate: how many of its wells, treatments, images and cells (of all recipes) count, and how
-- many images and cells do not.
WITH sums AS (
    SELECT
        t.plate_id,
        count(*) FILTER (WHERE t.excluded IS NULL) AS wells,
        count(DISTINCT w.treatment_id) FILTER (WHERE t.excluded IS NULL) AS treatments,
        sum(t.n_images) AS images,
        sum(t.n_excluded_images) AS excluded_images
    FROM well_table AS t
    JOIN wells AS w ON w.id = t.well_id
    GROUP BY t.plate_id
),
found AS (
    SELECT w.plate_id, sum(c.n_cells) AS cells, sum(c.n_excluded_cells) AS excluded_cells
    FROM counted_cells AS c
    JOIN images AS i ON i.id = c.image_id
    JOIN wells AS w ON w.id = i.well_id
    GROUP BY w.plate_id
)
SELECT
    p.barcode AS plate, p.batch, coalesce(s.wells, 0) AS wells,
    coalesce(s.treatments, 0) AS treatments,
    CAST(coalesce(s.images, 0) AS BIGINT) AS images,
    CAST(coalesce(f.cells, 0) AS BIGINT) AS cells,
    CAST(coalesce(s.excluded_images, 0) AS BIGINT) AS excluded_images,
    CAST(coalesce(f.excluded_cells, 0) AS BIGINT) AS excluded_cells
FROM plates AS p
LEFT JOIN sums AS s ON s.plate_id = p.id
LEFT JOIN found AS f ON f.plate_id = p.id
ORDER BY p.barcode
