-- The cells that have a vote where flagged ones have none: in place of voters, by
-- report --exclude-flagged. {run} is the number of a quality-control run.
SELECT c.id AS cell_id, c.segmentation_id, s.image_id
FROM cells AS c
JOIN segmentations AS s ON s.id = c.segmentation_id
WHERE
    c.excluded IS NULL
    AND NOT EXISTS (FROM image_flags AS f WHERE f.run_id = {run} AND f.image_id = s.image_id)
    AND NOT EXISTS (FROM cell_flags AS f WHERE f.run_id = {run} AND f.cell_id = c.id)
