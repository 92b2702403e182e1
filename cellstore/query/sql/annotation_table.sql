-- The labels that people gave to plates, wells, images and cells, by the names that people use: one
-- row per thing (level), field and person, with the last label that this person gave it. What was
-- taken back is not here. cell_id, site and well are null where the label is of more than that.
WITH located AS (
    SELECT
        c.annotation_id,
        CASE WHEN c.level = 'cell' THEN c.row_id END AS cell_id,
        CASE WHEN c.level = 'image' THEN c.row_id ELSE s.image_id END AS image_id,
        CASE WHEN c.level = 'well' THEN c.row_id END AS well_id,
        CASE WHEN c.level = 'plate' THEN c.row_id END AS plate_id
    FROM current_labels AS c
    LEFT JOIN cells AS x ON c.level = 'cell' AND x.id = c.row_id
    LEFT JOIN segmentations AS s ON s.id = x.segmentation_id
)
SELECT
    p.barcode AS plate,
    w.name AS well,
    i.site,
    l.cell_id,
    c.level,
    c.field,
    c.label,
    c.user_name,
    c.created_at,
    c.reason,
    i.id AS image_id,
    w.id AS well_id,
    p.id AS plate_id,
    c.annotation_id
FROM current_labels AS c
JOIN located AS l ON l.annotation_id = c.annotation_id
LEFT JOIN images AS i ON i.id = l.image_id
LEFT JOIN wells AS w ON w.id = coalesce(i.well_id, l.well_id)
LEFT JOIN plates AS p ON p.id = coalesce(w.plate_id, l.plate_id)
