-- Wells that a run was scored on although its network was trained on images of the same well.
-- Scores on these say how well a well is recognised, not a treatment.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Subset of the split that is scored.
SELECT r.plate, r.well, any_value(r.truth) AS truth, count(*) AS images
FROM run_images AS r
JOIN wells AS w ON w.id = r.well_id
WHERE r.run_id = $run AND r.subset = $subset AND r.well_in_training
GROUP BY r.plate, r.well, w.id, w.well_row, w.well_column
ORDER BY r.plate, w.well_row, w.well_column
