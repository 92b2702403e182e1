-- What every voter said: one row per predict run, cell and stored choice (rank 1 is the first).
-- Only voters count.
SELECT run_id, image_id, cell_id, rank, label_id, probability
FROM placed_predictions
WHERE NOT excluded
