-- Wells that a run was scored on although its network was trained on images of the same well.
-- Scores on these say how well a well is recognised, not a treatment.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Side of the split that is scored.
SELECT
    p.barcode AS plate, w.name AS well, any_value(r.truth) AS truth, count(*) AS images
FROM run_images AS r
JOIN wells AS w ON w.id = r.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE r.run_id = $run AND r.subset = $subset AND r.well_in_training
GROUP BY p.barcode, w.id, w.name, w.well_row, w.well_column
ORDER BY p.barcode, w.well_row, w.well_column
