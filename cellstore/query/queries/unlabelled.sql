-- Images of which a predict run says nothing: no cell of theirs has a prediction.
-- cells counts the cells that any recipe has found there.
-- :run (predict run) = latest  Whose predictions.
WITH labelled AS (
    SELECT DISTINCT s.image_id
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    WHERE p.run_id = $run AND p.rank = 1
),
found AS (
    SELECT image_id, sum(n_cells) AS cells FROM segmentations GROUP BY image_id
)
SELECT
    p.barcode AS plate, w.name AS well, i.site, t.name AS perturbation,
    CAST(coalesce(found.cells, 0) AS BIGINT) AS cells
FROM images AS i
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatments AS t ON t.id = w.treatment_id
LEFT JOIN found ON found.image_id = i.id
WHERE i.id NOT IN (SELECT image_id FROM labelled)
ORDER BY p.barcode, w.well_row, w.well_column, i.site, i.plane, i.time_point
