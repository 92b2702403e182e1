-- Images whose vote was a tie: two labels had as many cells. The winner then is the label with
-- the higher summed probability.
-- :run (predict run) = latest  Whose labels.
SELECT v.plate, v.well, v.site, v.winner, v.runner_up, v.votes, v.n_cells, v.truth, v.correct
FROM votes AS v
JOIN image_table AS i ON i.image_id = v.image_id
WHERE v.run_id = $run AND v.level = 'image' AND v.vote = 'hard' AND v.tie
ORDER BY v.plate, i.well_row, i.well_column, v.site, i.plane, i.time_point
