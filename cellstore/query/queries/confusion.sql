-- The confusion matrix: which label was predicted for which, the most frequent mistake first.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Subset of the split: train, validation, test or outside.
-- :level (text) = image  Of what: cell, image or well.
-- :vote (text) = hard  hard, soft or median.
-- :all (yes or no) = no  Right answers, too.
SELECT truth, predicted, n
FROM confusion
WHERE
    run_id = $run AND subset = $subset AND level = $level AND vote = $vote
    AND ($all OR truth <> predicted)
ORDER BY n DESC, truth, predicted
