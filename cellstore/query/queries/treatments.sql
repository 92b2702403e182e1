-- Every treatment with its target and its wells, plates and images.
SELECT
    t.name AS perturbation, t.target, t.kind,
    string_agg(DISTINCT w.control, ', ') AS control,
    count(DISTINCT w.plate_id) AS plates,
    count(DISTINCT w.id) AS wells,
    count(DISTINCT i.id) AS images
FROM treatments AS t
LEFT JOIN wells AS w ON w.treatment_id = t.id
LEFT JOIN images AS i ON i.well_id = w.id
GROUP BY t.id, t.name, t.target, t.kind
ORDER BY images DESC, t.name, t.id
