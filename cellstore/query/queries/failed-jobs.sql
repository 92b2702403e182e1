-- Images on which a stage failed, and why. Try again with: cellstore retry.
SELECT r.stage, j.run_id AS run, i.plate, i.well, i.site, j.attempts, j.error
FROM jobs AS j
JOIN runs AS r ON r.id = j.run_id
JOIN image_table AS i ON i.image_id = j.image_id
WHERE j.status = 'failed'
ORDER BY r.stage, i.plate, i.well_row, i.well_column, i.site, j.id
