-- Where the labels of a plate come from: its images, the split, and the networks by the beginnings
-- of their sha256. All columns: SELECT * FROM lineage.
-- :plate (text)  The barcode.
-- :run (predict run) = latest  Whose labels.
SELECT
    well, site, truth, n_cells, subset, well_in_training, current, train_run_id AS trained,
    left(checkpoint_sha256, 8) AS network, left(weights_sha256, 8) AS segmented
FROM lineage
WHERE run_id = $run AND plate = $plate
ORDER BY image_id, segmentation_id
