-- The cells that have a vote: one row per cell. Excluded cells have none.
SELECT c.id AS cell_id, c.segmentation_id, s.image_id
FROM cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
WHERE c.excluded IS NULL
