-- Images that a run labels wrongly with the largest share of the vote.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Subset of the split: train, validation, test or outside.
-- :top (whole number) = 20  How many.
SELECT
    v.plate, v.well, v.site, v.truth, v.predicted, v.confidence AS share,
    v.truth_rank
FROM scored_predictions AS v
WHERE
    v.run_id = $run AND v.level = 'image' AND v.vote = 'soft' AND v.subset = $subset
    AND NOT v.correct
ORDER BY v.confidence DESC, v.image_id
LIMIT $top
