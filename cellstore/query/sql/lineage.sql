-- Where the labels of an image come from: one row per predict run and segmentation of an image.
-- weights_sha256 belongs to the segmentation network, checkpoint_sha256 to the classifier.
-- well_in_training: the classifier was trained on images of this very well. current: the image
-- still has the bytes that were segmented, or these are unknown.
WITH labelled AS (
    SELECT p.run_id, c.segmentation_id, count(*) AS n_cells
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    WHERE p.rank = 1
    GROUP BY p.run_id, c.segmentation_id
),
checkpoints AS (
    SELECT ra.run_id, min(a.sha256) AS sha256
    FROM run_artifacts AS ra
    JOIN artifacts AS a ON a.id = ra.artifact_id
    WHERE a.kind = 'checkpoint' AND a.path LIKE '%.safetensors'
    GROUP BY ra.run_id
)
SELECT
    labelled.run_id,
    i.id AS image_id,
    pl.barcode AS plate,
    w.name AS well,
    i.site,
    i.core_name,
    r.started_at,
    r.user_name,
    r.host,
    r.code_version,
    r.parent_id AS train_run_id,
    ck.sha256 AS checkpoint_sha256,
    sp.name AS split,
    sp.protocol,
    ri.subset,
    ri.well_in_training,
    ri.truth,
    s.id AS segmentation_id,
    s.recipe_id AS segment_recipe_id,
    rec.fingerprint AS segment_fingerprint,
    rec.weights_sha256,
    labelled.n_cells,
    s.content_sha256 IS NULL OR coalesce(s.content_sha256 = i.content_sha256, false) AS current
FROM labelled
JOIN segmentations AS s ON s.id = labelled.segmentation_id
JOIN recipes AS rec ON rec.id = s.recipe_id
JOIN images AS i ON i.id = s.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS pl ON pl.id = w.plate_id
JOIN runs AS r ON r.id = labelled.run_id
JOIN run_images AS ri ON ri.run_id = labelled.run_id AND ri.image_id = i.id
LEFT JOIN splits AS sp ON sp.id = ri.split_id
LEFT JOIN checkpoints AS ck ON ck.run_id = r.parent_id
