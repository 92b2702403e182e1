-- Images whose vote was a draw: two labels had as many cells. The winner then is the label with
-- the higher summed probability.
-- :run (predict run) = latest  Whose labels.
SELECT
    p.barcode AS plate, w.name AS well, i.site, v.winner, v.runner_up, v.votes, v.n_cells,
    v.truth, v.correct
FROM image_votes AS v
JOIN images AS i ON i.id = v.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE v.run_id = $run AND v.vote = 'hard' AND v.tie
ORDER BY p.barcode, w.well_row, w.well_column, i.site, i.plane, i.time_point
