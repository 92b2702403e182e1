-- The confusion matrix: one row per predict run, subset, level, vote, true label and answer, with
-- the number n of cells, images or wells. Pairs that never occur have no row. Withheld answers
-- (abstained) do not count.
SELECT run_id, subset, level, vote, truth, predicted, count(*) AS n
FROM scored_predictions
WHERE abstained IS NULL
GROUP BY run_id, subset, level, vote, truth, predicted
