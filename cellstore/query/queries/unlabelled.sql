-- Images that a predict run has not labelled: none of their cells has a prediction.
-- cells counts the cells that any recipe has found there.
-- :run (predict run) = latest  Whose predictions.
WITH labelled AS (
    SELECT DISTINCT image_id FROM predictions_with_image WHERE run_id = $run AND rank = 1
),
found AS (
    SELECT image_id, sum(n_cells) AS cells FROM segmentations GROUP BY image_id
)
SELECT
    i.plate, i.well, i.site, i.treatment, CAST(coalesce(found.cells, 0) AS BIGINT) AS cells
FROM image_table AS i
LEFT JOIN found ON found.image_id = i.image_id
WHERE i.image_id NOT IN (SELECT image_id FROM labelled)
ORDER BY i.plate, i.well_row, i.well_column, i.site, i.plane, i.time_point
