-- The predictions that vote: one row per predict run, cell and stored choice (rank 1 is the
-- first), of the cells in eligible_cells.
SELECT p.run_id, p.image_id, p.cell_id, p.rank, p.label_id, p.probability
FROM predictions_with_image AS p
WHERE NOT p.excluded
AND NOT EXISTS (FROM excluded_images AS e WHERE e.image_id = p.image_id)
AND NOT EXISTS (FROM later_exclusions AS e WHERE e.level = 'cell' AND e.id = p.cell_id)
