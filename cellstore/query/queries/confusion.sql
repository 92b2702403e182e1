-- Which label was taken for which, the most frequent mistake first.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Side of the split: train, validation, test or outside.
-- :level (text) = image  Of what: cell, image or well.
-- :vote (text) = hard  hard or soft.
-- :all (yes or no) = no  With what was right, too.
SELECT truth, predicted, n
FROM confusion
WHERE
    run_id = $run AND subset = $subset AND level = $level AND vote = $vote
    AND ($all OR truth <> predicted)
ORDER BY n DESC, truth, predicted
