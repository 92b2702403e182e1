-- Images that have changed since they were segmented: their cells are those of other bytes.
-- Mend with: cellstore segment.
SELECT
    i.plate, i.well, i.site, s.recipe_id AS recipe, s.run_id AS run, s.n_cells,
    strftime(s.created_at, '%Y-%m-%d %H:%M') AS segmented
FROM segmentations AS s
JOIN images AS m ON m.id = s.image_id
JOIN image_table AS i ON i.image_id = s.image_id
WHERE s.content_sha256 IS NOT NULL AND s.content_sha256 IS DISTINCT FROM m.content_sha256
ORDER BY i.plate, i.well_row, i.well_column, i.site, s.recipe_id
