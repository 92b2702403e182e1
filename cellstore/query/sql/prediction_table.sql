-- What predict runs answered for each cell, by the names that people use: one row per predict run
-- and cell that votes, with its first choice as label and the true label as truth (null: unknown).
-- subset is the subset of the run's split that the image is in, or outside.
SELECT
    p.run_id,
    ri.plate,
    ri.well,
    ri.site,
    t.treatment,
    t.dose,
    t.dose_unit,
    ri.control,
    p.cell_id,
    l.value AS label,
    p.probability,
    ri.truth,
    l.value = ri.truth AS correct,
    ri.subset,
    p.image_id,
    ri.well_id
FROM eligible_predictions AS p
JOIN labels AS l ON l.id = p.label_id
JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
JOIN wells AS w ON w.id = ri.well_id
LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
WHERE p.rank = 1 AND p.cell_id IS NOT NULL
