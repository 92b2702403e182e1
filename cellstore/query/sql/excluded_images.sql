-- The images of later_exclusions: one row per image that is excluded itself or with its well or
-- plate, and why: of several reasons the first in the alphabet.
SELECT image_id, min(reason) AS reason, min(source) AS source
FROM (
    SELECT id AS image_id, reason, source FROM later_exclusions WHERE level = 'image'
    UNION ALL
    SELECT i.id, e.reason, e.source
    FROM later_exclusions AS e
    JOIN images AS i ON i.well_id = e.id
    WHERE e.level = 'well'
    UNION ALL
    SELECT i.id, e.reason, e.source
    FROM later_exclusions AS e
    JOIN wells AS w ON w.plate_id = e.id
    JOIN images AS i ON i.well_id = w.id
    WHERE e.level = 'plate'
)
GROUP BY image_id
