-- Every cell by the names that people use: one row per cell, with plate, well, site, treatment and
-- the built-in measurements (null: not measured). Only cells that the segmentation made last of the
-- present bytes of their image has found, by the measure recipe used last on it; excluded says why
-- a cell does not count (null: it does). Lengths are in pixels; area_um2 is the area in square
-- micrometres where the pixel size is known. For the measurements of another feature set: JOIN its
-- name USING (cell_id).
WITH latest AS (
    SELECT s.image_id, max(s.id) AS segmentation_id
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    WHERE s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256
    GROUP BY s.image_id
),
measured AS (
    SELECT
        ri.input_id AS segment_recipe_id,
        r.recipe_id AS measure_recipe_id,
        row_number() OVER (PARTITION BY ri.input_id ORDER BY r.id DESC) AS number
    FROM runs AS r
    JOIN recipe_inputs AS ri ON ri.recipe_id = r.recipe_id
    WHERE r.stage = 'measure'
    AND r.recipe_id NOT IN (SELECT recipe_id FROM feature_sets WHERE storage = 'files')
)
SELECT
    i.plate,
    i.well,
    i.site,
    i.treatment,
    i.dose,
    i.dose_unit,
    i.target,
    i.control,
    c.id AS cell_id,
    c.object_number,
    coalesce(c.excluded, x.reason, i.excluded) AS excluded,
    f.* EXCLUDE (cell_id, recipe_id, run_id),
    f.area * i.pixel_size * i.pixel_size AS area_um2,
    i.pixel_size,
    i.components,
    i.image_id,
    i.well_id,
    c.segmentation_id,
    m.measure_recipe_id
FROM cells AS c
JOIN latest AS l ON l.segmentation_id = c.segmentation_id
JOIN image_table AS i ON i.image_id = l.image_id
JOIN segmentations AS s ON s.id = c.segmentation_id
LEFT JOIN measured AS m ON m.segment_recipe_id = s.recipe_id AND m.number = 1
LEFT JOIN (
    SELECT id, min(reason) AS reason FROM later_exclusions WHERE level = 'cell' GROUP BY id
) AS x ON x.id = c.id
LEFT JOIN features AS f ON f.cell_id = c.id AND f.recipe_id = m.measure_recipe_id
