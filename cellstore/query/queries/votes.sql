-- What the cells of each image voted for, and by how much.
-- :run (predict run) = latest  Whose labels.
-- :vote (text) = hard  hard: each cell has one vote; soft: with its probabilities; or median.
-- :plate (text) = nothing  Only this plate.
SELECT v.plate, v.well, v.site, v.winner, v.share, v.n_cells, v.runner_up, v.tie, v.truth, v.correct
FROM votes AS v
JOIN image_table AS i ON i.image_id = v.image_id
WHERE
    v.run_id = $run AND v.level = 'image' AND v.vote = $vote
    AND ($plate IS NULL OR v.plate = $plate)
ORDER BY v.plate, i.well_row, i.well_column, v.site, i.plane, i.time_point
