-- Images in which a recipe has found few cells that count, the emptiest first. Excluded images are
-- not listed; excluded says how many more cells it has found that do not count.
-- :fewer_than (whole number) = 10  How many are few.
SELECT
    i.plate, i.well, i.site, i.treatment, c.recipe_id AS recipe, c.n_cells,
    c.n_excluded_cells AS excluded
FROM counted_cells AS c
JOIN image_table AS i ON i.image_id = c.image_id
WHERE c.n_cells < $fewer_than AND i.excluded IS NULL
ORDER BY c.n_cells, i.plate, i.well_row, i.well_column, i.site, c.recipe_id
