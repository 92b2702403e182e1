-- Every image by the names that people use: one row per image, with the treatment of its well.
-- n_cells is what the segmentation made last of its present bytes has found; null: none was made.
-- excluded says why an image does not count (null: it does), itself or with its well or plate.
WITH latest AS (
    SELECT s.image_id, arg_max(s.n_cells, s.id) AS n_cells
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    WHERE s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256
    GROUP BY s.image_id
)
SELECT
    p.barcode AS plate,
    w.name AS well,
    i.site,
    i.plane,
    i.time_point,
    t.treatment,
    t.dose,
    t.dose_unit,
    t.target,
    w.control,
    l.n_cells,
    x.reason AS excluded,
    t.components,
    p.batch,
    i.core_name,
    i.pixel_size,
    w.well_row,
    w.well_column,
    i.id AS image_id,
    w.id AS well_id,
    p.id AS plate_id
FROM images AS i
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
LEFT JOIN latest AS l ON l.image_id = i.id
LEFT JOIN excluded_images AS x ON x.image_id = i.id
