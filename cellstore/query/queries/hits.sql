-- Which treatments differ from the controls, by a hits run: hits first, the strongest at the top.
-- effect is in standard deviations of the controls, cell_count a ratio to the controls.
-- :run (hits run) = latest  Whose verdicts.
SELECT
    treatment, dose, dose_unit, target, verdict,
    effect, effect_low, effect_high, q, cell_count, n_wells, n_controls, n_plates, plate_set, note
FROM hit_table
WHERE run_id = $run
ORDER BY
    plate_set,
    list_position(
        ['hit', 'mainly fewer cells', 'small effect', 'cannot say', 'no difference'], verdict
    ),
    effect DESC NULLS LAST, treatment, dose
