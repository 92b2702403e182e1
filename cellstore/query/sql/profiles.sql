-- The wells of each profile run that is done, by the names that people use: one row per run and well,
-- with what the well has now, then a column per feature. A feature that a run has not is null.
SELECT
    p.barcode AS plate,
    w.name AS well,
    t.treatment,
    t.dose,
    t.dose_unit,
    t.target,
    w.control,
    f.*
FROM {values} AS f
JOIN wells AS w ON w.id = f.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
