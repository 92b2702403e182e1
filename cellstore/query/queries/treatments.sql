-- Every treatment with its target and its wells, plates and images.
SELECT
    t.name_with_dose AS treatment, t.target,
    (
        SELECT string_agg(p.kind, '|') FROM treatment_parts AS tp
        JOIN perturbations AS p ON p.id = tp.perturbation_id WHERE tp.treatment_id = t.id
    ) AS kind,
    string_agg(DISTINCT w.control, ', ') AS control,
    count(DISTINCT w.plate_id) AS plates,
    count(DISTINCT w.id) AS wells,
    count(DISTINCT i.id) AS images
FROM treatments AS t
LEFT JOIN wells AS w ON w.treatment_id = t.id
LEFT JOIN images AS i ON i.well_id = w.id
GROUP BY t.id, t.name_with_dose, t.target
ORDER BY images DESC, t.name_with_dose, t.id
