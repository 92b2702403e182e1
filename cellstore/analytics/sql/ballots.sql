-- What every voter said: one row per predict run, cell and stored choice (rank 1 is the first).
-- Only voters count.
SELECT p.run_id, v.image_id, p.cell_id, p.rank, p.label_id, p.probability
FROM predictions AS p
JOIN voters AS v ON v.cell_id = p.cell_id
