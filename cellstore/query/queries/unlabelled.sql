-- Images that a predict run has not labelled: none of their cells has a prediction. Excluded images
-- are not listed. cells: how many count of those that any recipe has found there; excluded: how
-- many do not.
-- :run (predict run) = latest  Whose predictions.
WITH labelled AS (
    SELECT DISTINCT image_id FROM predictions_with_image WHERE run_id = $run AND rank = 1
),
found AS (
    SELECT image_id, sum(n_cells) AS cells, sum(n_excluded_cells) AS excluded
    FROM counted_cells
    GROUP BY image_id
)
SELECT
    i.plate, i.well, i.site, i.treatment, CAST(coalesce(found.cells, 0) AS BIGINT) AS cells,
    CAST(coalesce(found.excluded, 0) AS BIGINT) AS excluded
FROM image_table AS i
LEFT JOIN found ON found.image_id = i.image_id
WHERE i.image_id NOT IN (SELECT image_id FROM labelled) AND i.excluded IS NULL
ORDER BY i.plate, i.well_row, i.well_column, i.site, i.plane, i.time_point
