-- Which label was taken for which: one row per predict run, side, level, vote, truth and
-- predicted label, with the number n of cells, images or wells. Pairs that never occur have no row.
-- Withheld answers (abstained) do not count.
SELECT run_id, subset, level, vote, truth, predicted, count(*) AS n
FROM verdicts
WHERE abstained IS NULL
GROUP BY run_id, subset, level, vote, truth, predicted
