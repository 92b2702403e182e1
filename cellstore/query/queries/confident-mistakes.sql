-- Images that a run labels wrongly with the largest share of the vote.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Side of the split: train, validation, test or outside.
-- :top (whole number) = 20  How many.
SELECT
    p.barcode AS plate, w.name AS well, i.site, v.truth, v.winner, v.share, v.n_cells,
    v.truth_place
FROM image_votes AS v
JOIN images AS i ON i.id = v.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE v.run_id = $run AND v.vote = 'soft' AND v.subset = $subset AND NOT v.correct
ORDER BY v.share DESC, v.image_id
LIMIT $top
