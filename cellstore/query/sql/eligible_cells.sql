-- The cells that vote: one row per cell. Excluded cells do not, nor do flagged cells and the cells
-- of flagged images where the option --exclude-flagged says so.
SELECT p.cell_id, p.segmentation_id, p.image_id
FROM (
    SELECT c.id AS cell_id, c.segmentation_id, s.image_id
    FROM cells AS c
    JOIN segmentations AS s ON s.id = c.segmentation_id
    WHERE c.excluded IS NULL
) AS p
WHERE true
