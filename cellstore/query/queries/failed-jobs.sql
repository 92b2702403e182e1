-- Images on which a stage failed, and why. Try again with: cellstore retry.
SELECT
    r.stage, j.run_id, p.barcode AS plate, w.name AS well, i.site, j.attempts, j.error
FROM jobs AS j
JOIN runs AS r ON r.id = j.run_id
JOIN images AS i ON i.id = j.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE j.status = 'failed'
ORDER BY r.stage, p.barcode, w.well_row, w.well_column, i.site, j.id
