-- How many cells of each segmentation count (see eligible_cells), and how many do not: one row per
-- segmentation.
SELECT
    s.id AS segmentation_id,
    s.image_id,
    s.recipe_id,
    count(e.cell_id) AS n_cells,
    s.n_cells - count(e.cell_id) AS n_excluded_cells
FROM segmentations AS s
LEFT JOIN eligible_cells AS e ON e.segmentation_id = s.id
GROUP BY s.id, s.image_id, s.recipe_id, s.n_cells
