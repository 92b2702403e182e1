-- What predict runs said, with the image of each cell: one row per predict run, cell and stored
-- choice, as in predictions, and whether the segmentation
-- excluded the cell. A model that sees whole images has a row per image and choice; cell_id is null.
SELECT
    p.run_id,
    s.image_id,
    p.cell_id,
    c.excluded IS NOT NULL AS excluded,
    p.rank,
    p.label_id,
    p.probability
FROM predictions AS p
JOIN cells AS c ON c.id = p.cell_id
JOIN segmentations AS s ON s.id = c.segmentation_id
UNION ALL
SELECT run_id, image_id, NULL AS cell_id, false AS excluded, rank, label_id, probability
FROM image_predictions
