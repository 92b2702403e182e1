-- Every image by the names that people use: one row per image, with the treatment of its well.
-- n_cells: how many of the cells count that the segmentation made last of its present bytes has
-- found; n_excluded_cells: how many do not. Both are null where none was made. excluded says why an
-- image does not count (null: it does), itself or with its well or plate; then none of its cells does.
WITH latest AS (
    SELECT s.image_id, max(s.id) AS segmentation_id
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
    c.n_cells,
    c.n_excluded_cells,
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
LEFT JOIN counted_cells AS c ON c.segmentation_id = l.segmentation_id
LEFT JOIN excluded_images AS x ON x.image_id = i.id
