-- Every treatment with its target, its wells and images that count, the plates they are on, and how
-- many wells and images do not count.
SELECT
    t.name_with_dose, t.target,
    (
        SELECT string_agg(p.kind, '|') FROM treatment_parts AS tp
        JOIN perturbations AS p ON p.id = tp.perturbation_id WHERE tp.treatment_id = t.id
    ) AS kind,
    string_agg(DISTINCT w.control, ', ') AS control,
    count(DISTINCT w.plate_id) FILTER (WHERE x.excluded IS NULL) AS plates,
    count(w.id) FILTER (WHERE x.excluded IS NULL) AS wells,
    CAST(coalesce(sum(x.n_images), 0) AS BIGINT) AS images,
    count(w.id) FILTER (WHERE x.excluded IS NOT NULL) AS excluded_wells,
    CAST(coalesce(sum(x.n_excluded_images), 0) AS BIGINT) AS excluded_images
FROM treatments AS t
LEFT JOIN wells AS w ON w.treatment_id = t.id
LEFT JOIN well_table AS x ON x.well_id = w.id
LEFT JOIN treatment_table AS named ON named.treatment_id = t.id
GROUP BY t.id, t.name, t.name_with_dose, t.target, named.dose
ORDER BY images DESC, t.name, named.dose, t.name_with_dose, t.id
