-- What the cells of each image voted for, and by how much.
-- :run (predict run) = latest  Whose labels.
-- :vote (text) = hard  hard: each cell has one vote; soft: with its probabilities; or median.
-- :plate (text) = nothing  Only this plate.
SELECT
    p.barcode AS plate, w.name AS well, i.site, v.winner, v.share, v.n_cells,
    v.runner_up, v.tie, v.truth, v.correct
FROM image_votes AS v
JOIN images AS i ON i.id = v.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE v.run_id = $run AND v.vote = $vote AND ($plate IS NULL OR p.barcode = $plate)
ORDER BY p.barcode, w.well_row, w.well_column, i.site, i.plane, i.time_point
