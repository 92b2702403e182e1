-- Images with cells that no recipe has measured with the built-in features. Cells of other
-- tools have their measurements in feature sets instead.
-- Mend with: cellstore measure.
SELECT
    p.barcode AS plate, w.name AS well, i.site, s.recipe_id, count(*) AS unmeasured
FROM cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
JOIN images AS i ON i.id = s.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE c.id NOT IN (SELECT cell_id FROM features)
GROUP BY p.barcode, w.name, w.well_row, w.well_column, i.id, i.site, s.recipe_id
ORDER BY p.barcode, w.well_row, w.well_column, i.site, s.recipe_id
