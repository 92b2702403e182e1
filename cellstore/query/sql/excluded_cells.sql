-- The cells that do not count by themselves (see exclusions): one row per cell, with its
-- segmentation. Those of excluded images, wells and plates do not count either.
SELECT c.id AS cell_id, c.segmentation_id
FROM cells AS c
WHERE c.excluded IS NOT NULL
OR EXISTS (SELECT 1 FROM later_exclusions AS e WHERE e.level = 'cell' AND e.id = c.id)
