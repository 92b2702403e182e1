-- Cells of each well by each segmentation recipe: in all, per image, and how many are excluded.
-- :plate (text) = nothing  Only this plate.
WITH counted AS (
    SELECT c.segmentation_id, count(*) AS cells, count(*) - count(e.cell_id) AS excluded
    FROM cells AS c
    LEFT JOIN eligible_cells AS e ON e.cell_id = c.id
    GROUP BY c.segmentation_id
)
SELECT
    i.plate, i.well, i.treatment, s.recipe_id AS recipe,
    count(*) AS images,
    CAST(sum(coalesce(c.cells, 0)) AS BIGINT) AS cells,
    CAST(sum(coalesce(c.excluded, 0)) AS BIGINT) AS excluded,
    avg(coalesce(c.cells, 0)) AS per_image
FROM segmentations AS s
JOIN image_table AS i ON i.image_id = s.image_id
LEFT JOIN counted AS c ON c.segmentation_id = s.id
WHERE $plate IS NULL OR i.plate = $plate
GROUP BY i.plate, i.well, i.well_row, i.well_column, i.treatment, s.recipe_id
ORDER BY i.plate, i.well_row, i.well_column, s.recipe_id
