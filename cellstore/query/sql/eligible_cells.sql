-- The cells that count, and so vote: one row per cell. Excluded cells do not, nor do the cells of
-- excluded images, wells and plates (see exclusions). Flags exclude where the option
-- --exclude-flagged says so.
SELECT c.id AS cell_id, c.segmentation_id, s.image_id
FROM cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
WHERE c.excluded IS NULL
AND NOT EXISTS (FROM excluded_images AS e WHERE e.image_id = s.image_id)
AND NOT EXISTS (FROM later_exclusions AS e WHERE e.level = 'cell' AND e.id = c.id)
