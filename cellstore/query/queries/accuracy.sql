-- How often a predict run is right, per subset of the split, level (cell, image, well) and vote.
-- Bare numbers: intervals and baselines are in cellstore report.
-- :run (predict run) = latest  Whose labels.
SELECT subset, level, vote, n, correct, accuracy
FROM accuracy
WHERE run_id = $run
ORDER BY subset, level, vote
