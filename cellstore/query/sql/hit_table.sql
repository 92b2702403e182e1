-- What each hits run says of each treatment: one row per run, plate_set and treatment. plate_set names
-- the plates that were scored together. effect is in standard deviations of the controls (0: as far
-- from them as they are from each other), cell_count is a ratio to the controls. p and q are those of
-- the measure that the rule of the run reads. treatment_scores has all measures, a row for each.
WITH scored AS (
    SELECT
        run_id,
        plate_set,
        treatment_id,
        max(verdict) AS verdict,
        max(CASE WHEN measure = 'activity' THEN value END) AS activity,
        max(CASE WHEN measure = 'hit' THEN p END) AS p,
        max(CASE WHEN measure = 'hit' THEN q END) AS q,
        max(CASE WHEN measure = 'effect' THEN value END) AS effect,
        max(CASE WHEN measure = 'effect' THEN low END) AS effect_low,
        max(CASE WHEN measure = 'effect' THEN high END) AS effect_high,
        max(CASE WHEN measure = 'cell_count' THEN value END) AS cell_count,
        max(CASE WHEN measure = 'cell_count' THEN low END) AS cell_count_low,
        max(CASE WHEN measure = 'cell_count' THEN high END) AS cell_count_high,
        max(CASE WHEN measure = 'replicate_correlation' THEN value END) AS replicate_correlation,
        max(CASE WHEN measure = 'hit' THEN n_wells END) AS n_wells,
        max(CASE WHEN measure = 'hit' THEN n_controls END) AS n_controls,
        max(CASE WHEN measure = 'hit' THEN n_plates END) AS n_plates,
        max(CASE WHEN measure = 'hit' THEN note END) AS note,
        max(cell_line) AS cell_line,
        max(time_point) AS time_point
    FROM treatment_scores
    WHERE level = 'treatment'
    GROUP BY run_id, plate_set, treatment_id
)
SELECT
    t.treatment,
    t.dose,
    t.dose_unit,
    t.target,
    s.verdict,
    s.activity,
    s.p,
    s.q,
    s.effect,
    s.effect_low,
    s.effect_high,
    s.cell_count,
    s.cell_count_low,
    s.cell_count_high,
    s.replicate_correlation,
    s.n_wells,
    s.n_controls,
    s.n_plates,
    s.note,
    s.plate_set,
    s.cell_line,
    s.time_point,
    s.run_id,
    s.treatment_id
FROM scored AS s
LEFT JOIN treatment_table AS t ON t.treatment_id = s.treatment_id
