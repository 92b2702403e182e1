-- Images with cells that count and that no recipe has measured with the built-in features. Cells of
-- other tools have their measurements in feature sets instead.
-- Mend with: cellstore measure.
SELECT i.plate, i.well, i.site, s.recipe_id AS recipe, count(*) AS unmeasured
FROM eligible_cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
JOIN image_table AS i ON i.image_id = s.image_id
WHERE c.cell_id NOT IN (SELECT cell_id FROM features)
GROUP BY i.plate, i.well, i.well_row, i.well_column, i.image_id, i.site, s.recipe_id
ORDER BY i.plate, i.well_row, i.well_column, i.site, s.recipe_id
