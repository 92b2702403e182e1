-- Every plate with its wells, treatments, images and cells (of all recipes).
WITH sums AS (
    SELECT
        w.plate_id,
        count(DISTINCT w.id) AS wells,
        count(DISTINCT w.treatment_id) AS treatments,
        count(DISTINCT i.id) AS images
    FROM wells AS w
    LEFT JOIN images AS i ON i.well_id = w.id
    GROUP BY w.plate_id
),
found AS (
    SELECT w.plate_id, CAST(sum(s.n_cells) AS BIGINT) AS cells
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    GROUP BY w.plate_id
)
SELECT
    p.barcode AS plate, p.batch, coalesce(sums.wells, 0) AS wells,
    coalesce(sums.treatments, 0) AS treatments, coalesce(sums.images, 0) AS images,
    coalesce(found.cells, 0) AS cells
FROM plates AS p
LEFT JOIN sums ON sums.plate_id = p.id
LEFT JOIN found ON found.plate_id = p.id
ORDER BY p.barcode
