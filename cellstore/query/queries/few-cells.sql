-- Images in which a recipe has found few cells, the emptiest first.
-- :fewer_than (whole number) = 10  How many are few.
SELECT
    p.barcode AS plate, w.name AS well, i.site, t.name AS perturbation, s.recipe_id, s.n_cells
FROM segmentations AS s
JOIN images AS i ON i.id = s.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatments AS t ON t.id = w.treatment_id
WHERE s.n_cells < $fewer_than
ORDER BY s.n_cells, p.barcode, w.well_row, w.well_column, i.site, s.recipe_id
