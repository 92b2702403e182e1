-- Every treatment by the names that people use: one row per treatment. treatment is its name without
-- doses. Several perturbations have " + " between them: then dose and dose_unit are null, and
-- components has the dose of each.
SELECT
    t.name AS treatment,
    CASE WHEN count(*) = 1 THEN max(tp.dose) END AS dose,
    CASE WHEN count(*) = 1 THEN max(tp.dose_unit) END AS dose_unit,
    t.target,
    t.name_with_dose,
    CAST(to_json(coalesce(list({
        'perturbation': p.name,
        'kind': p.kind,
        'dose': tp.dose,
        'dose_unit': tp.dose_unit
    } ORDER BY tp.position) FILTER (WHERE p.id IS NOT NULL), [])) AS VARCHAR) AS components,
    t.id AS treatment_id
FROM treatments AS t
LEFT JOIN treatment_parts AS tp ON tp.treatment_id = t.id
LEFT JOIN perturbations AS p ON p.id = tp.perturbation_id
GROUP BY t.id, t.name, t.target, t.name_with_dose
