-- How many cells of each segmentation count (see eligible_cells), and how many do not: one row per
-- segmentation.
SELECT
    s.id AS segmentation_id,
    s.image_id,
    s.recipe_id,
    CASE WHEN x.image_id IS NULL THEN s.n_cells - count(e.cell_id) ELSE 0 END AS n_cells,
    CASE WHEN x.image_id IS NULL THEN count(e.cell_id) ELSE s.n_cells END AS n_excluded_cells
FROM segmentations AS s
LEFT JOIN excluded_cells AS e ON e.segmentation_id = s.id
LEFT JOIN excluded_images AS x ON x.image_id = s.image_id
GROUP BY s.id, s.image_id, s.recipe_id, s.n_cells, x.image_id
