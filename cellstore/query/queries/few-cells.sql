-- Images in which a recipe has found few cells, the emptiest first.
-- :fewer_than (whole number) = 10  How many are few.
SELECT i.plate, i.well, i.site, i.treatment, s.recipe_id AS recipe, s.n_cells
FROM segmentations AS s
JOIN image_table AS i ON i.image_id = s.image_id
WHERE s.n_cells < $fewer_than
ORDER BY s.n_cells, i.plate, i.well_row, i.well_column, i.site, s.recipe_id
