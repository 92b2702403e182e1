-- The label that people gave to an image, else to its well, else to its plate: one row per image and
-- field. label is null where people disagree.
WITH said AS (
    SELECT c.row_id AS image_id, 1 AS distance, c.field, c.label
    FROM current_labels AS c
    WHERE c.level = 'image'
    UNION ALL
    SELECT i.id, 2, c.field, c.label
    FROM current_labels AS c
    JOIN images AS i ON i.well_id = c.row_id
    WHERE c.level = 'well'
    UNION ALL
    SELECT i.id, 3, c.field, c.label
    FROM current_labels AS c
    JOIN wells AS w ON w.plate_id = c.row_id
    JOIN images AS i ON i.well_id = w.id
    WHERE c.level = 'plate'
),
nearest AS (
    SELECT image_id, field, min(distance) AS distance FROM said GROUP BY image_id, field
)
SELECT
    s.image_id,
    s.field,
    CASE WHEN min(s.label) = max(s.label) THEN min(s.label) END AS label
FROM said AS s
JOIN nearest AS n ON n.image_id = s.image_id AND n.field = s.field AND n.distance = s.distance
GROUP BY s.image_id, s.field
