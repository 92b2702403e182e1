-- The predictions that vote: one row per predict run, cell and stored choice (rank 1 is the
-- first). Those of excluded cells do not, nor do those of flagged cells and images where the
-- option --exclude-flagged says so.
SELECT p.run_id, p.image_id, p.cell_id, p.rank, p.label_id, p.probability
FROM predictions_with_image AS p
WHERE NOT p.excluded
