-- Cells of each well by each segmentation recipe: in all, per image, and how many are excluded.
-- :plate (text) = nothing  Only this plate.
WITH counted AS (
    SELECT segmentation_id, count(*) AS cells, count(excluded) AS excluded
    FROM cells GROUP BY segmentation_id
)
SELECT
    p.barcode AS plate, w.name AS well, t.name AS perturbation, s.recipe_id,
    count(*) AS images,
    CAST(sum(coalesce(c.cells, 0)) AS BIGINT) AS cells,
    CAST(sum(coalesce(c.excluded, 0)) AS BIGINT) AS excluded,
    avg(coalesce(c.cells, 0)) AS cells_per_image
FROM segmentations AS s
JOIN images AS i ON i.id = s.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatments AS t ON t.id = w.treatment_id
LEFT JOIN counted AS c ON c.segmentation_id = s.id
WHERE $plate IS NULL OR p.barcode = $plate
GROUP BY p.barcode, w.id, w.name, w.well_row, w.well_column, t.name, s.recipe_id
ORDER BY p.barcode, w.well_row, w.well_column, s.recipe_id
