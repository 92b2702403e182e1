-- Precision, recall and F1 of each label, the worst recall first.
-- :run (predict run) = latest  Whose labels.
-- :subset (text) = test  Subset of the split: train, validation, test or outside.
-- :level (text) = image  Of what: cell, image or well.
-- :vote (text) = hard  hard, soft or median.
SELECT label, support, predicted, correct, recall, precision, f1
FROM class_report
WHERE run_id = $run AND subset = $subset AND level = $level AND vote = $vote
ORDER BY recall NULLS LAST, label
