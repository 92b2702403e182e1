-- Where the labels of a plate come from: run, code, split, weights, and what was segmented how.
-- :plate (text)  The barcode.
-- :run (predict run) = latest  Whose labels.
SELECT
    well, site, truth, n_cells, subset, well_in_training, current, train_run_id,
    checkpoint_sha256, segment_recipe_id, weights_sha256, code_version, user_name, started_at
FROM lineage
WHERE run_id = $run AND plate = $plate
ORDER BY image_id, segmentation_id
