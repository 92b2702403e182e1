-- The cells that count, and so vote: one row per cell. Excluded cells do not, nor do the cells of
-- excluded images, wells and plates (see exclusions). Flags exclude where the option
-- --exclude-flagged says so.
SELECT c.id AS cell_id, c.segmentation_id, s.image_id
FROM cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
-- With NOT EXISTS the same takes DuckDB 50 times as long.
LEFT JOIN excluded_images AS e ON e.image_id = s.image_id
LEFT JOIN (SELECT id FROM later_exclusions WHERE level = 'cell') AS x ON x.id = c.id
WHERE c.excluded IS NULL AND e.image_id IS NULL AND x.id IS NULL
