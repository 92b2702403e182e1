-- What predict runs answered for each cell, by the names that people use: one row per predict run
-- and cell that votes, with its first choice as label and the true label as truth (null: unknown).
-- subset is the subset of the run's split that the image is in, or outside.
SELECT
    p.run_id,
    ri.plate,
    ri.well,
    ri.site,
    t.name AS treatment,
    d.dose,
    d.dose_unit,
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
LEFT JOIN treatments AS t ON t.id = w.treatment_id
LEFT JOIN (
    SELECT treatment_id, max(dose) AS dose, max(dose_unit) AS dose_unit
    FROM treatment_parts
    GROUP BY treatment_id
    HAVING count(*) = 1
) AS d ON d.treatment_id = t.id
WHERE p.rank = 1
